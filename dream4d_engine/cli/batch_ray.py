"""The scenes of a batch on a Ray cluster: a task each, with a GPU where the cluster has them."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..documents import describe, first_line
from .batch_job import Ended, Job
from .batch_work import launch
from .errors import UsageError

_MOMENT, _LOOK = 0.5, 0.1
_REACH = 10.0
"""Seconds to wait for an answer of a cluster."""


def _scene(job: Job, machine: Sequence[str], folder: str, out: str) -> Ended:
    """The task: run the scene on the machine that Ray chose; `folder`: where the batch was started."""
    if not Path(out).is_dir():
        return Ended(
            "failed", f"{out} is not there on {platform.node()}: give the batch an --out that all machines share"
        )
    if Path(folder).is_dir():  # names of files are seen from there
        os.chdir(folder)
    child = launch(job, machine, {})  # Ray has put the task's GPU and threads into our environment
    if isinstance(child, Ended):
        return child
    try:
        while (ended := child.ended()) is None:
            time.sleep(_LOOK)
        return ended
    except BaseException:  # so a task is told that it is cancelled
        child.stop()
        child.process.wait()
        raise


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would wait for more than ten minutes."""
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()


class RayPool:
    """Tasks of a cluster."""

    def __init__(self, address: str, device: str, words: Sequence[str], workers: int | None, threads: int) -> None:
        """Meet the cluster.

        device: auto, where a task takes a GPU if the cluster has any, or a name. words: what else the scenes are told
        of the machine. workers: tasks at a time; None: as many as Ray finds room for. threads: CPU cores of a task.
        """
        try:
            import ray
        except ImportError as error:
            raise UsageError('--ray needs the package ray: pip install "dream4d[ray]"') from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to report anything
        more: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            _reach(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            ray.init(address, log_to_driver=False, **more)
        except Exception as error:  # of many kinds, by how the address is wrong
            raise UsageError(
                f"no Ray cluster answers at {describe(address)} ({first_line(error)}): start one with ray start "
                "--head, "
                'or say "local" for one on this machine'
            ) from error
        there = ray.cluster_resources()
        with_gpu = device == "cuda" or (device == "auto" and there.get("GPU", 0) >= 1)
        if not with_gpu and threads > there.get("CPU", 0):
            ray.shutdown()
            raise UsageError(f"--threads {threads} is more than the cluster has ({there.get('CPU', 0):g}): lower it")
        self._ray, self._workers = ray, workers
        self._machine = ["--device", "cuda" if with_gpu else device, *words]
        # taking a scene up again is ours: it is to be said and counted
        self._task = ray.remote(num_gpus=int(with_gpu), num_cpus=threads, max_retries=0)(_scene)
        self._running: dict[Any, Job] = {}
        self._stopping = False

    def has_place(self) -> bool:
        return self._workers is None or len(self._running) < self._workers

    def start(self, job: Job) -> str:
        reference = self._task.remote(job, self._machine, str(Path.cwd()), str(job.folder.parent))
        self._running[reference] = job
        return "handed to Ray"  # which begins it when there is room

    def wait(self) -> list[tuple[Job, Ended]]:
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_MOMENT)
        return [(self._running.pop(reference), self._result(reference)) for reference in done]

    def _result(self, reference: Any) -> Ended:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            return Ended("stopped")
        except self._ray.exceptions.RayTaskError as error:  # of our own task, so it would happen again
            return Ended("stopped" if self._stopping else "failed", first_line(error.cause))
        except self._ray.exceptions.RayError as error:  # the worker, its memory or its machine
            return Ended("stopped" if self._stopping else "killed", first_line(error))

    def stop(self) -> None:
        self._stopping = True
        for reference in self._running:
            self._ray.cancel(reference)  # a task that runs gets a KeyboardInterrupt

    def kill(self) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()
