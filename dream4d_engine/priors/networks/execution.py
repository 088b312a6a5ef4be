"""How a frozen model's networks are run: how much at once, where the weights wait, what is compiled.

None of it changes what is computed, only how much memory it takes and how long.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...guidance.execution import Execution
from ...kernels.launched import first_line
from ...machine import must_be_able
from ...transfers import send
from .fused_norm import has_triton

logger = logging.getLogger(__name__)

Network = Callable[[Tensor], Tensor]


# --- capture -----------------------------------------------------------------------------------------------------


class Capture:
    """Runs a function of tensors: this one as it is written."""

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return function(*inputs)."""
        return function(*inputs)

    def prepare(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Be told that function will be called with such inputs, from somewhere where no capture is possible."""

    def with_gradient(self, function: Network, x: Tensor) -> Tensor:
        """Return function(x), differentiable in x; what the backward pass needs is kept."""
        return function(x)

    def forget(self) -> None:
        """Be told that weights have moved: what was captured with them can't be used any more."""


PLAIN = Capture()


@dataclass(frozen=True)
class Runtime:
    """Where and how the networks of a run work."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of the networks; noise and conversions are float32 whatever it is
    capture: Capture = PLAIN  # replays their work as CUDA graphs; shared, so that the graphs share one pool of memory
    accelerated: bool = False  # frozen layers are fused (GPUs)
    compiled: bool = True  # where accelerated, blocks of large networks are compiled, too


# Numbers in images (12 of 256x256) up to which an encoder takes longer to launch than to run: beyond, capturing it
# gains nothing, and keeps memory.
LAUNCH_BOUND = 12 * 3 * 256**2
_OWN_THREAD = "thread_local"  # others may ask the GPU in the meantime: NCCL's watches over messages between processes


class GraphCapture(Capture):
    """Captures each function once per shapes of its inputs as a CUDA graph, and replays it from then on.

    A replay launches hundreds of kernels at the cost of one. The graphs share one pool of memory: what a graph leaves
    there is copied away before the next one runs. Functions must be methods, of objects whose weights stay where they
    are, that use no gradient outside of themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._device = device
        # one for all: libraries put memory aside for each stream that they work on
        self._warmup = torch.cuda.Stream(device)
        self._graphs: dict[tuple, tuple | _Captured] = {}
        self._known: dict[tuple, Callable] = {}  # kept, so that no other object is found at their places in memory
        self.seconds = 0.0  # spent on capturing, compiling on the way included

    def forget(self) -> None:
        self._graphs.clear()
        self._known.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch._C._cuda_clearCublasWorkspaces()  # some of them lie in the old pool and would keep it alive
        torch.cuda.empty_cache()

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        graph, held, output = self._once(self._key(function, inputs), self._capture, function, inputs)
        for mine, given in zip(held, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return output.clone()  # the next replay of any graph may write there

    def prepare(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._once(self._key(function, inputs), self._capture, function, inputs)

    def with_gradient(self, function: Network, x: Tensor) -> Tensor:
        if x.numel() > LAUNCH_BOUND:
            return function(x)
        key = ("with gradient", *self._key(function, (x,)))
        return _BothWays.apply(self._once(key, self._capture_both_ways, function, (x,)), x)

    def _once(self, key: tuple, capture: Callable, function: Callable, inputs: tuple[Tensor, ...]):
        """What capture(function, inputs) gave the first time."""
        if key not in self._graphs:
            began = time.monotonic()
            self._graphs[key], self._known[key] = capture(function, inputs), function
            seconds = time.monotonic() - began
            self.seconds += seconds
            name = getattr(function, "__name__", "function").strip("_")
            logger.info("captured %s of %s in %.1f s", name, [list(t.shape) for t in inputs], seconds)
        return self._graphs[key]

    def _capture_both_ways(self, function: Network, inputs: tuple[Tensor]) -> _Captured:
        """Capture the forward pass, and the backward pass with what the forward pass leaves for it in the pool."""
        (x,) = inputs
        held = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            self._warm_up(lambda: torch.autograd.grad(function(held).sum(), held))
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=self._pool, capture_error_mode=_OWN_THREAD):
                output = function(held)
            grad = torch.zeros_like(output)
            with torch.cuda.graph(backward, pool=self._pool, capture_error_mode=_OWN_THREAD):
                # retained: other graphs are not to write where those intermediate results are
                (grad_x,) = torch.autograd.grad(output, held, grad, retain_graph=True)
        return _Captured(forward, backward, held, output, grad, grad_x)

    @staticmethod
    def _key(function: Callable, inputs: tuple[Tensor, ...]) -> tuple:
        # a denoiser's methods differ by its networks: another denoiser with the same ones replays the same graph
        of: Any = getattr(function, "__self__", function)
        network = getattr(of, "unet", None) or getattr(of, "transformer", None)
        networks = (id(of),) if network is None else (id(network), id(of.vae))
        return function.__name__, networks, *((t.shape, t.dtype) for t in inputs)

    @torch.no_grad()
    def _capture(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple:
        held = tuple(t.detach().clone() for t in inputs)
        self._warm_up(lambda: function(*held))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=_OWN_THREAD):
            output = function(*held)
        return graph, held, output

    def _warm_up(self, run: Callable[[], object]) -> None:
        self._warmup.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._warmup):
            for _ in range(2):  # what is compiled or chosen on first use is, and all memory is known
                run()
        torch.cuda.current_stream(self._device).wait_stream(self._warmup)
        torch.cuda.empty_cache()


@dataclass
class _Captured:
    """A function captured forward and backward, and where its inputs and results lie."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    x: Tensor
    output: Tensor
    grad: Tensor  # on the output
    grad_x: Tensor
    turns: int = 0  # forward passes so far, so that a backward pass knows whether it belongs to the last one


class _BothWays(torch.autograd.Function):
    """Replay a captured function forward now, and backward later."""

    @staticmethod
    def forward(ctx, captured: _Captured, x: Tensor) -> Tensor:
        captured.x.copy_(x)
        captured.forward.replay()
        captured.turns += 1
        ctx.captured, ctx.turn = captured, captured.turns
        return captured.output.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        captured = ctx.captured
        if captured.turns != ctx.turn:
            raise RuntimeError("called again before its backward pass: the intermediate results are gone")
        captured.grad.copy_(grad)
        captured.backward.replay()
        return None, captured.grad_x.clone()


class _Checkpointed(torch.autograd.Function):
    """Apply a network keeping only its input; the backward pass applies it once more, with gradient."""

    @staticmethod
    def forward(ctx, network: Network, capture: Capture, images: Tensor) -> Tensor:
        ctx.network, ctx.capture = network, capture
        ctx.save_for_backward(images)
        z = capture(network, images)
        capture.prepare(_pulled_back(network), images, z)  # a backward pass can't capture
        return z

    @staticmethod
    def backward(ctx, grad: Tensor):
        (images,) = ctx.saved_tensors
        return None, None, ctx.capture(_pulled_back(ctx.network), images, grad.contiguous())


def _pulled_back(network: Network) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, gradient on network(x)) -> gradient on x."""

    def pull_back(x: Tensor, grad: Tensor) -> Tensor:
        with torch.enable_grad(), without_autocast(x.device):
            again = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(network(again), again, grad)
        return found

    pull_back.__dict__["__self__"] = getattr(network, "__self__", network)  # what GraphCapture knows functions by
    return pull_back


def in_slices(
    network: Network, images: Tensor, execution: Execution, capture: Capture = PLAIN, carried: Tensor | None = None
) -> Tensor:
    """Apply a network to images [n, ...], slice by slice; the result and its gradient are those of one pass.

    `carried`: [n] bool, on the CPU: the images that a gradient is asked for; None: all.
    """
    if carried is not None and torch.is_grad_enabled() and not carried.all():
        rows, rest = (send(mask.nonzero().flatten(), images.device) for mask in (carried, ~carried))
        with torch.no_grad():
            still = in_slices(network, images.index_select(0, rest), execution, capture)
        if not len(rows):
            return still
        moved = in_slices(network, images.index_select(0, rows), execution, capture)
        whole = moved.new_empty(len(images), *moved.shape[1:])
        return whole.index_copy(0, rest, still).index_copy(0, rows, moved)
    at_once, kept = execution.images_at_once or len(images), execution.images_kept
    if not (torch.is_grad_enabled() and images.requires_grad):
        return _joined([capture(network, part) for part in images.split(at_once)])
    if kept is None or kept >= len(images):
        if at_once >= len(images):
            return capture.with_gradient(network, images)
        # a graph holds the intermediate results of one pass, and here are several before the first backward pass
        return _joined([network(part) for part in images.split(at_once)])
    n_checkpointed = len(images) - kept
    # those to be kept come last: the backward pass begins with them, and their memory is free for the others
    parts = [_Checkpointed.apply(network, capture, part) for part in images[:n_checkpointed].split(at_once)]
    return _joined(parts + [network(part) for part in images[n_checkpointed:].split(at_once) if len(part)])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --- weights in main memory --------------------------------------------------------------------------------------


def offload(network: nn.Module, device: torch.device) -> None:
    """Let a network's weights wait in (pinned) main memory and come to `device` part by part, for each forward pass.

    The weights get no gradient. What was compiled is left away: it holds on to weights.
    """
    home = {}
    for tensor in (*network.parameters(), *network.buffers()):
        held = tensor.detach().to("cpu", copy=True)
        # pinned memory is copied while the GPU works
        home[tensor] = tensor.data = held.pin_memory() if device.type == "cuda" else held

    def bring(part: nn.Module, _inputs) -> None:
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = home[tensor].to(device, non_blocking=True, copy=True)

    def leave(part: nn.Module, _inputs, _output) -> None:
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = home[tensor]

    hooks = []
    for part in _parts(network):
        # prepended: hooks that read the weights find them there
        hooks += [part.register_forward_pre_hook(bring, prepend=True), part.register_forward_hook(leave)]
    for module in network.modules():
        module._compiled_call_impl = None
    network.__dict__["_offload_hooks"] = hooks


def bring_back(network: nn.Module, device: torch.device) -> None:
    """Undo `offload`."""
    for hook in network.__dict__.pop("_offload_hooks", ()):
        hook.remove()
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.to(device)


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that bring their own weights, each as a whole when it is called.

    A block with lists of layers can be half of a network, so its layers come one by one. Not so where its forward is
    one of frozen.py's: those use the weights of their layers without calling them.
    """
    for child in network.children():
        has_lists = any(isinstance(c, nn.ModuleList) for c in child.children())
        divisible = has_lists and "forward" not in vars(child) and not list(child.parameters(recurse=False))
        if divisible or isinstance(child, nn.ModuleList):
            yield from _parts(child)
        elif next(child.parameters(), None) is not None:
            yield child


# --- compiling ---------------------------------------------------------------------------------------------------


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, tried once on one small function; where not, the log says why.

    It needs more than the Triton that it makes kernels with: a C++ compiler on some systems, a place for its files.
    """
    if not has_triton(device):
        return False
    try:
        gated = torch.compile(lambda x: functional.silu(x) * x, dynamic=False)
        gated(torch.ones(64, 64, device=device, dtype=torch.float16))  # small, and in the models' own precision
    except Exception as error:  # whatever the compilers raise
        must_be_able(error, "compiled models")
        reason = first_line(error)
        logger.warning("the models run without being compiled: %s: %s", type(error).__name__, reason)
        return False
    return True


def compile_blocks(network: nn.Module) -> int:
    """Let the transformer blocks be compiled on first use and return how many there are.

    They are where compiling pays: their norms, gates and sums fuse. Blocks of one shape share one compilation, and
    torch keeps it on disk for the next run.
    """
    import torch._dynamo

    # a compilation for each shape of a block's input; beyond the limit torch runs it as it is
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    blocks = [m for m in network.modules() if type(m).__name__.endswith("TransformerBlock")]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Frozen networks run in their own precision: autocast would turn their norms to float32 and back."""
    with torch.autocast(device.type, enabled=False):
        yield
