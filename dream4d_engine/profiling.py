"""Where the time of a run goes: what the device does, and where the CPU waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

_PAIRS = 40
"""Of works that the device was idle between, so many are told."""
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Work:
    """A kernel, or on a CPU an operation, in one step."""

    name: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class Idle:
    """What the device had nothing to do between, in one step."""

    before: str  # the work that had ended
    after: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """One step of a run, on average."""

    seconds: float  # of the device at work
    calls: float  # kernels (operations) launched
    work: tuple[Work, ...]  # all of them, the longest first
    waits: dict[str, tuple[float, float]]  # of the CPU for the device, by CUDA's function: (calls, seconds)
    idle: float = 0.0  # seconds without work for the device between its first and its last; 0 on a CPU
    idle_between: tuple[Idle, ...] = ()  # of these, the longest first

    def lines(self, n: int = 16) -> list[str]:
        """The profile as text, with the `n` longest."""
        found = [f"{1e3 * self.seconds:.2f} ms of work in {self.calls:.0f} calls, {1e3 * self.idle:.2f} ms idle"]
        found += [f"{1e3 * w.seconds:9.3f} ms  x{w.calls:<6.0f} {w.name[:90]}" for w in self.work[:n]]
        found += [
            f"{1e3 * i.seconds:9.3f} ms  x{i.calls:<6.0f} idle between {i.before[:40]} and {i.after[:40]}"
            for i in self.idle_between[: n // 4]
        ]
        return found + [f"waited {c:.1f} times, {1e3 * s:.2f} ms: {name}" for name, (c, s) in self.waits.items()]


class Profiler:
    """Watches what runs between start and stop."""

    def __init__(self, device: torch.device) -> None:
        kinds = torch.profiler.ProfilerActivity
        self._device, self._on_gpu = device, device.type == "cuda"
        self._profiler = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if self._on_gpu else [])])

    def start(self) -> None:
        """Begin."""
        self._wait()
        self._profiler.start()

    def stop(self, n_steps: int = 1) -> Profile:
        """End, and return the profile of one of the `n_steps` steps since the start."""
        self._wait()
        self._profiler.stop()
        events, idle = self._profiler.key_averages(), []
        if self._on_gpu:
            spans = [e for e in self._profiler.events() if e.device_type == DeviceType.CUDA]
            found = gaps((e.time_range.start, e.time_range.end, e.name) for e in spans)  # microseconds
            idle = [Idle(*names, time / 1e6 / n_steps, count / n_steps) for names, (time, count) in found.items()]
            idle.sort(key=lambda i: -i.seconds)
            of_device = [e for e in events if e.device_type == DeviceType.CUDA]
            work = [Work(e.key, e.self_device_time_total / 1e6 / n_steps, e.count / n_steps) for e in of_device]
        else:
            work = [Work(e.key, e.self_cpu_time_total / 1e6 / n_steps, e.count / n_steps) for e in events]
        waits = {e.key: (e.count / n_steps, e.self_cpu_time_total / 1e6 / n_steps) for e in events if e.key in _WAITS}
        work.sort(key=lambda w: -w.seconds)
        whole = sum(w.seconds for w in work), sum(w.calls for w in work)
        return Profile(*whole, tuple(work), waits, sum(i.seconds for i in idle), tuple(idle[:_PAIRS]))

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)


def gaps(spans: Iterable[tuple[float, float, str]]) -> dict[tuple[str, str], tuple[float, int]]:
    """The time that no span (begin, end, name) covers between the first and the last.

    By the names of the spans that end before and begin after it: (time, how many times).
    """
    uncovered: dict[tuple[str, str], tuple[float, int]] = {}
    latest: tuple[float, str] | None = None
    for begin, end, name in sorted(spans):
        if latest is not None and begin > latest[0]:
            time, count = uncovered.get((latest[1], name), (0.0, 0))
            uncovered[latest[1], name] = time + begin - latest[0], count + 1
        if latest is None or end > latest[0]:
            latest = end, name
    return uncovered


def profile(run: Callable[[], object], device: torch.device) -> Profile:
    """Return what one call of `run` does."""
    profiler = Profiler(device)
    profiler.start()
    run()
    return profiler.stop()
