"""Frozen networks run in other ways compute what they computed before."""

from __future__ import annotations

import copy
import logging
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import emulated_cuda
import pytest
import torch
import torch.nn.functional as functional
from network_cases import CPU, SMALL_UNET, SMALL_VAE, randn, seeded, tokens_for, video_denoiser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dream4d_engine.cameras import make_cameras, sample_takes
from dream4d_engine.guidance.denoiser import Conditions, split_conditions, stack_conditions
from dream4d_engine.guidance.distillation import DistillationConfig, Guidance, distill
from dream4d_engine.kernels import nvrtc, nvrtc_kernels, triton_kernels
from dream4d_engine.priors import architectures
from dream4d_engine.priors.architectures import ARCHITECTURES, MVDREAM, ZEROSCOPE_V2, random_network
from dream4d_engine.priors.networks import fused_norm, fused_norm_triton
from dream4d_engine.priors.networks.denoisers import accelerated
from dream4d_engine.priors.networks.execution import (
    PLAIN,
    Capture,
    Execution,
    Runtime,
    bring_back,
    can_compile,
    in_slices,
    offload,
)
from dream4d_engine.priors.networks.frozen import halved, speed_up
from dream4d_engine.randomness import Draw
from dream4d_engine.schedules import constant
from dream4d_engine.training.config import CameraRanges
from dream4d_engine.training.guidance import capture_for
from dream4d_engine.training.plan import LADDER

PACKAGE = "dream4d_engine.priors.networks"
SMALL_IF = {
    **architectures._IF,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 16,
    "addition_embed_type_num_heads": 4,
}


def close(ours, theirs, tolerance=1e-8):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(scope="module")
def vae():
    return random_network("AutoencoderKL", SMALL_VAE, CPU, torch.float64)


@pytest.fixture(scope="module")
def video_unet():
    return random_network("UNet3DConditionModel", {**SMALL_UNET, "attention_head_dim": 8}, CPU, torch.float64)


def video_guidance(denoiser, **changes):
    config = DistillationConfig(7.0, constant(0.3), constant(0.7), loss="multistep", color_weight=0.1)
    return Guidance("video", denoiser, tokens_for, replace(config, **changes))


def distilled(guidance, n_groups=2, device=CPU):
    """(loss, gradient on the images) of one distillation."""
    cameras = sample_takes(CameraRanges(), n_groups, 4, 16, 16, seeded()).to(device)
    images = torch.rand(n_groups, 4, 3, 16, 16, generator=seeded(1)).to(device).requires_grad_()
    loss = distill(guidance, images, cameras, 0.0, Draw(2)).loss
    return loss.detach(), torch.autograd.grad(loss, images)[0]


# ---- the same numbers from fewer passes --------------------------------------------------------------------------


def test_a_fast_video_network_predicts_the_same(video_unet):
    fast = speed_up(copy.deepcopy(video_unet))
    given = (randn(2, 4, 3, 8, 16), torch.tensor([3, 50]), randn(2, 7, 16))
    close(fast(*given, return_dict=False)[0], video_unet(*given, return_dict=False)[0])


@pytest.mark.parametrize("linear", [True, False])
def test_a_fast_image_network_predicts_the_same(linear):
    config = {**SMALL_UNET, "attention_head_dim": 8, "use_linear_projection": linear}
    unet = random_network("UNet2DConditionModel", config, CPU, torch.float64)
    fast = speed_up(copy.deepcopy(unet))
    given = (randn(2, 4, 8, 16), torch.tensor([3, 50]), randn(2, 7, 16))
    close(fast(*given, return_dict=False)[0], unet(*given, return_dict=False)[0])


def test_a_fast_pixel_network_predicts_the_same():
    unet = random_network("UNet2DConditionModel", SMALL_IF, CPU, torch.float64)
    fast = speed_up(copy.deepcopy(unet))
    given = (randn(2, 3, 16, 16), torch.tensor([3, 50]), randn(2, 7, 16))
    close(fast(*given, return_dict=False)[0], unet(*given, return_dict=False)[0])


def test_a_fast_autoencoder_gives_the_same_latents_gradients_and_images(vae):
    fast = speed_up(copy.deepcopy(vae))
    images, weights = randn(2, 3, 32, 48).requires_grad_(), None
    for network in (vae, fast):
        z = network.encode(images).latent_dist.mode()
        weights = randn(*z.shape, seed=5) if weights is None else weights
        (gradient,) = torch.autograd.grad(z, images, weights)
        decoded = network.decode(z.detach()).sample
        if network is vae:
            expected = (z, gradient, decoded)
    for ours, theirs in zip((z, gradient, decoded), expected, strict=True):
        close(ours, theirs)


def test_speeding_up_keeps_names_and_weights(vae):
    fast = speed_up(copy.deepcopy(vae)).state_dict()
    assert fast.keys() == vae.state_dict().keys()
    assert all(torch.equal(fast[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("size", [(31, 32), (32, 33)])
def test_odd_sizes_are_padded_as_before(vae, size):
    fast = speed_up(copy.deepcopy(vae))
    images = randn(1, 3, *size)
    close(fast.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.mode())


def test_halving_keeps_images_and_their_gradient_in_channels_last():
    conv = torch.nn.Conv2d(8, 8, 3, stride=2).double().requires_grad_(False)
    images, seen = randn(2, 8, 6, 10).contiguous(memory_format=torch.channels_last).requires_grad_(), []
    out = halved(conv, images)
    out.grad_fn.register_prehook(lambda grads: seen.extend(grads))  # on what comes in, then on what goes out
    out.grad_fn.register_hook(lambda into, _: seen.extend(into))
    pull = torch.ones_like(out)
    (gradient,) = torch.autograd.grad(out, images, pull)
    close(gradient, torch.autograd.grad(conv(functional.pad(images, (0, 1, 0, 1))), images, pull)[0])
    assert len(seen) == 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in (out, gradient, *seen))


def test_the_fused_norm_is_a_norm_and_a_silu():
    x, weight, bias, offset = randn(2, 32, 5, 7), randn(32, seed=1), randn(32, seed=2), randn(2, 32, seed=3)
    ours = fused_norm.norm_silu(x, weight, bias, 8, 1e-5, True, offset)
    theirs = functional.silu(functional.group_norm(x + offset[..., None, None], 8, weight, bias, 1e-5))
    close(ours, theirs)


@pytest.fixture
def fresh_answers():
    """What was found out about this machine is forgotten, before and after."""
    for asked in (fused_norm.has_triton, fused_norm.launches_on, can_compile):
        asked.cache_clear()
    yield
    for asked in (fused_norm.has_triton, fused_norm.launches_on, can_compile):
        asked.cache_clear()


def test_triton_that_finds_no_compiler_is_not_used(fresh_answers, monkeypatch):
    def fails(device):
        raise RuntimeError("a first kernel failed: RuntimeError: Failed to find C compiler")

    monkeypatch.setattr(triton_kernels, "check", fails)
    assert not fused_norm.has_triton(torch.device("cuda"))
    assert not can_compile(torch.device("cuda"))


def test_models_are_not_compiled_where_that_fails(fresh_answers, monkeypatch, caplog):
    def broken(function, **_):
        def run(*_):
            raise RuntimeError("Compiler: cl is not found.\nmore")

        return run

    monkeypatch.setattr(triton_kernels, "check", lambda device: None)
    monkeypatch.setattr(torch, "compile", broken)
    assert not can_compile(CPU)
    assert "run without being compiled: RuntimeError: Compiler: cl is not found." in caplog.text


def test_a_full_card_is_no_answer_about_compiling(fresh_answers, monkeypatch):
    def full(*_):
        raise RuntimeError("a first kernel failed: OutOfMemoryError: CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "check", full)
        for asked in (fused_norm.has_triton, can_compile):
            with pytest.raises(torch.OutOfMemoryError, match="Triton's kernels were tried out: a first kernel failed"):
                asked(CPU)
    monkeypatch.setattr(triton_kernels, "check", lambda device: None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: full)
        with pytest.raises(torch.OutOfMemoryError, match="compiled models were tried out"):
            can_compile(CPU)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert can_compile(CPU), "there is room again"


@pytest.fixture(params=["triton", "nvrtc"])
def kernels_device(request, monkeypatch):
    """Where a backend's kernels run: on a GPU, or interpreted or emulated on the CPU."""
    name, on_gpu = request.param, torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else CPU
    if on_gpu:
        try:
            {"triton": triton_kernels, "nvrtc": nvrtc_kernels}[name].check(device)
        except (ImportError, RuntimeError) as reason:
            pytest.skip(str(reason))
    elif name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    elif emulated_cuda.COMPILER is None:
        pytest.skip("g++ is not installed")
    else:
        monkeypatch.setattr(nvrtc, "kernels_of", emulated_cuda.kernels_of)
    launches = import_module(f"{PACKAGE}.fused_norm_{name}").LAUNCHES
    monkeypatch.setattr(fused_norm, "launches_on", lambda device: launches)
    return device


@pytest.fixture
def launches_on():
    """The choice itself, which remembers nothing."""
    chosen = fused_norm.launches_on
    chosen.cache_clear()
    yield chosen
    chosen.cache_clear()


def test_the_kernels_are_tried_out(launches_on, kernels_device, monkeypatch, caplog):
    """Where one gives something else, or fails, the next backend's are taken, or none."""
    launches = fused_norm.launches_on(kernels_device)
    for kernels in (triton_kernels, nvrtc_kernels):
        monkeypatch.setattr(kernels, "check", lambda device: None)

    def said(**changes) -> tuple[str | None, str]:
        caplog.clear()
        launches_on.cache_clear()
        for name in ("triton", "nvrtc"):
            made = replace(launches, name=name, **changes.get(name, {}))
            monkeypatch.setitem(sys.modules, f"{PACKAGE}.fused_norm_{name}", types.SimpleNamespace(LAUNCHES=made))
        with caplog.at_level(logging.INFO):
            found = launches_on(kernels_device)
        return found and found.name, caplog.text

    def twice(x, h, bias, out):
        launches.add(x, h, bias, out)
        out.mul_(2)

    def stops(*_):
        raise RuntimeError("NVRTC: no such instruction\nmore")

    assert said() == ("triton", "")
    name, text = said(triton={"add": twice})
    assert name == "nvrtc" and "the residual differs from PyTorch's by 1.0e+00 of its largest number" in text
    name, text = said(triton={"norm_back": stops}, nvrtc={"rms": stops})
    assert name is None and (kernels_device == CPU or "triton: NVRTC: no such instruction; nvrtc: " in text)


def test_a_full_card_is_no_answer_about_the_kernels(launches_on, kernels_device, monkeypatch):
    launches = fused_norm.launches_on(kernels_device)
    for kernels in (triton_kernels, nvrtc_kernels):
        monkeypatch.setattr(kernels, "check", lambda device: None)

    def full(*_):
        raise RuntimeError("CUDA driver: out of memory (2)")

    def made(**changes):
        return types.SimpleNamespace(LAUNCHES=replace(launches, name="triton", **changes))

    monkeypatch.setitem(sys.modules, f"{PACKAGE}.fused_norm_triton", made(norm=full))
    with pytest.raises(torch.OutOfMemoryError, match="the models' norms were tried out: CUDA driver"):
        launches_on(kernels_device)
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.fused_norm_triton", made())
    assert launches_on(kernels_device).name == "triton", "there is room again"


def test_triton_launches_norms_on_the_tensors_device(monkeypatch):
    """Which need not be the current one: there the memory may not be in reach."""
    inside, launched = [], []

    @contextmanager
    def on_device(device):
        inside.append(device)
        yield
        inside.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *tensors, **known: launched.append((*inside, tensors[0].device))

    names = ("sums", "statistics", "apply", "gradient_sums", "gradient_line", "gradient")
    names += ("rms", "shift", "residual", "double")
    source = types.SimpleNamespace(**{name: Kernel() for name in names})
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.fused_norm_source", source)
    monkeypatch.setattr(import_module(PACKAGE), "fused_norm_source", source, raising=False)
    monkeypatch.setattr(fused_norm_triton, "on_device", on_device)
    x, c = torch.empty(2, 8, 4, 4, device="meta"), torch.empty(8, device="meta")
    launches = fused_norm_triton.LAUNCHES
    _, found = launches.norm(x, c, c, None, 2, 1e-5, True)
    launches.norm_back(x, x, found, c, 2, True, x)
    launches.rms(x, None, None, x, 1e-5)
    launches.shift(x, c)
    launches.add(x, x, c, x)
    launches.double(x, x)
    assert launched == [(x.device, x.device)] * len(names)


NORMS = [
    (128, 32, True, 3, 317),
    (48, 8, False, 0, 317),
    (24, 2, True, 1, 70),
    (1056, 32, False, 3, 5),
    (9, 3, True, 3, 61),
]


@pytest.mark.parametrize(("channels", "n_groups", "silu", "n_offsets", "places"), NORMS)
def test_the_norm_kernels_against_double_precision(kernels_device, channels, n_groups, silu, n_offsets, places):
    def made(*shape, seed):
        return randn(*shape, seed=seed).float().to(kernels_device)

    last = torch.channels_last
    x, grad = (made(3, channels, 1, places, seed=s).contiguous(memory_format=last) for s in (0, 1))
    weight, bias = made(channels, seed=2), made(channels, seed=3)
    offset = made(n_offsets, channels, seed=4) if n_offsets else None
    x.requires_grad_()
    y = fused_norm.norm_silu(x, weight, bias, n_groups, 1e-5, silu, offset)
    (dx,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    moved = exact if offset is None else exact + offset.double()[..., None, None]
    z = functional.group_norm(moved, n_groups, weight.double(), bias.double(), 1e-5)
    z = functional.silu(z) if silu else z
    (dz,) = torch.autograd.grad(z, exact, grad.double())
    for ours, theirs in ((y, z), (dx, dz)):
        assert (ours - theirs).norm() / theirs.norm() < 1e-6


@pytest.mark.parametrize("used", ["both", "normed", "around"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_gradient_of_what_goes_around_a_norm_is_added_in_its_pass(kernels_device, used, kind):
    def made(*shape, seed):
        return randn(*shape, seed=seed).to(kernels_device, kind)

    x, pull, pull_around = (made(3, 48, 5, 9, seed=s).contiguous(memory_format=torch.channels_last) for s in (0, 1, 2))
    weight, bias = made(48, seed=3), made(48, seed=4)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    z = functional.silu(functional.group_norm(exact, 8, weight.double(), bias.double(), 1e-5))
    outputs = fused_norm.norm_silu_beside(x, weight, bias, 8, 1e-5)
    pulls = pull, pull_around.contiguous()  # laid out otherwise
    rows = {"both": slice(2), "normed": slice(1), "around": slice(1, 2)}[used]
    (ours,) = torch.autograd.grad(outputs[rows], x, pulls[rows])
    (theirs,) = torch.autograd.grad((z, exact * 1)[rows], exact, [p.double() for p in pulls[rows]])
    assert (ours - theirs).norm() / theirs.norm() < (1e-6 if kind == torch.float32 else 1e-3)
    assert torch.equal(outputs[1], x)


VIDEOS = [(True, 2, False, 48), (False, 2, True, 48), (True, 0, False, 48), (True, 0, False, 300), (False, 0, False, 7)]


@pytest.mark.parametrize(("weighted", "ahead", "repeated", "channels"), VIDEOS)
def test_the_norm_kernel_of_videos_against_double_precision(kernels_device, weighted, ahead, repeated, channels):
    x = randn(1, channels, 3, 5, 7, seed=0).float().to(kernels_device).contiguous(memory_format=torch.channels_last_3d)
    weight = randn(channels, seed=1).float().to(kernels_device) if weighted else None
    x.requires_grad_()
    y = fused_norm.rms_silu(x, weight, 1e-8, ahead, repeated)
    grad = randn(*y.shape, seed=2).float().to(kernels_device)
    (dx,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    normed = exact * (exact.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    z = functional.silu(normed if weight is None else normed * weight.double()[:, None, None, None])
    first = z[:, :, :1] if repeated else torch.zeros_like(z[:, :, :1])
    z = torch.cat((*[first] * ahead, z), 2)
    (dz,) = torch.autograd.grad(z, exact, grad.double())
    for ours, theirs in ((y, z), (dx, dz)):
        assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_the_kernels_that_add_and_repeat(kernels_device):
    x, h = (randn(2, 48, 5, 6, seed=s).float().to(kernels_device) for s in (0, 1))
    x, h = (t.to(memory_format=torch.channels_last) for t in (x, h))
    bias = randn(48, seed=2).float().to(kernels_device)
    shifted = bias[:, None, None]
    torch.testing.assert_close(fused_norm.add_residual(x, h, bias), x + (h + shifted))
    torch.testing.assert_close(fused_norm.add_bias_(x.clone(memory_format=torch.preserve_format), bias), x + shifted)
    assert torch.equal(fused_norm.double_size(x), functional.interpolate(x, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels_in_half_precision_round_once(kernels_device, dtype):
    """Of what is computed in full precision from the same numbers; not where they lie crooked in memory, either."""
    if dtype == torch.bfloat16 and kernels_device == CPU:
        pytest.skip("bfloat16 is tried on a GPU")

    def made(*shape, seed):
        return randn(*shape, seed=seed).to(kernels_device, dtype)

    for start in (0, 1):  # numbers that a piece of memory does not begin with
        flat = made(2 * 35 * 40 + start, seed=0)[start:]
        x = flat.view(2, 5, 7, 40).permute(0, 3, 1, 2).requires_grad_()
        weight, bias, grad = made(40, seed=1), made(40, seed=2), made(2, 5, 7, 40, seed=3).permute(0, 3, 1, 2)
        y = fused_norm.norm_silu(x, weight, bias, 4, 1e-5, True, bias[None])
        wide = x.detach().float().requires_grad_()
        normed = functional.group_norm(wide + bias.float()[:, None, None], 4, weight.float(), bias.float(), 1e-5)
        z = functional.silu(normed)
        for ours, theirs in ((y, z), (*torch.autograd.grad(y, x, grad), *torch.autograd.grad(z, wide, grad.float()))):
            close_in_half(ours, theirs)
        close_in_half(fused_norm.add_residual(x, grad, bias), x.float() + grad.float() + bias.float()[:, None, None])
        video, gate = x.detach()[:1, :, None], x.detach().permute(0, 2, 3, 1).reshape(2, 35, 40)
        exact = video.float() * (video.float().square().mean(1, keepdim=True) + 1e-6).rsqrt()
        close_in_half(fused_norm.rms_silu(video, None, 1e-6), functional.silu(exact))
        value, by = gate.float().chunk(2, -1)
        close_in_half(fused_norm.gated(gate), value * functional.gelu(by), roundings=3)


def close_in_half(ours: torch.Tensor, theirs: torch.Tensor, roundings: int = 1) -> None:
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.float(), theirs, rtol=roundings * step * 0.6, atol=step * 2e-2)


# ---- plans -------------------------------------------------------------------------------------------------------


class Counted(Capture):
    """Notes what it is asked to run."""

    def __init__(self):
        self.ran = []

    def __call__(self, function, *inputs):
        self.ran.append((function.__name__, len(inputs[0])))
        return function(*inputs)


PLANS = dict.fromkeys(plan.execution for plan in LADDER)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: no plan is tried on one")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make_fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("execution", [*PLANS, Execution(3, 1), Execution(3, 2, 1)], ids=Execution.describe)
def test_every_plan_gives_the_same_loss_and_gradient(video_unet, vae, execution, make_fast, device):
    device = torch.device(device)
    networks = [copy.deepcopy(network).to(device) for network in (video_unet, vae)]
    plain = video_denoiser(*networks, device=device)
    loss, gradient = distilled(video_guidance(plain), device=device)
    benchmark = torch.backends.cudnn.benchmark
    ready = accelerated(plain, capture_for(device), compiled=False) if make_fast else plain
    torch.backends.cudnn.benchmark = benchmark
    planned = ready.run_as(execution)
    for _ in range(2):
        ours, our_gradient = distilled(video_guidance(planned), device=device)
        close(ours, loss, 1e-3)
        close(our_gradient, gradient, 1e-3)


def test_slices_are_encoded_twice_and_never_more_than_asked_for_at_once(video_unet, vae):
    counted = Counted()
    execution = Execution(images_at_once=2, images_kept=2, groups_at_once=1)
    distilled(video_guidance(video_denoiser(video_unet, vae, execution=execution, capture=counted)))
    ran = {name: [n for what, n in counted.ran if what == name] for name, _ in counted.ran}
    assert ran["_encode"] == [2, 2, 2], "six of eight images without gradient; two keep it and are not captured"
    assert ran["pull_back"] == [2, 2, 2]
    assert ran["_decode"] == [2, 2, 2, 2]
    assert ran["_forward"] == [1, 1, 1, 1], "two groups under two conditions"


def test_slices_of_a_function_have_its_gradient():
    x = torch.randn(7, 3, generator=seeded(), dtype=torch.float64).requires_grad_()

    def cube(part):
        return part**3

    for kept in (None, 0, 2, 7, 100):
        y = in_slices(cube, x, Execution(images_at_once=2, images_kept=kept))
        assert torch.equal(y, x**3)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, 3 * x.detach() ** 2)


def test_an_impossible_plan_is_named():
    with pytest.raises(ValueError, match="images_at_once must be at least 1, got 0"):
        Execution(images_at_once=0)


def test_conditions_are_split_as_they_were_stacked():
    one, two = (Conditions(randn(2, 3, 5, 4, seed=s), randn(2, 3, 6, seed=s)) for s in (0, 1))
    pieces = split_conditions(stack_conditions((one, two)), 2)
    for piece, whole in zip(pieces, (one, two), strict=True):
        assert torch.equal(piece.tokens, whole.tokens) and torch.equal(piece.vector, whole.vector)
        assert piece.concat is None


class AtHome(TorchDispatchMode):
    """Lets no operation but a copy touch the memory where weights wait: it would be the wrong device's on a GPU."""

    def __init__(self, network):
        super().__init__()
        self.homes = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default):
            flat, _ = tree_flatten((args, kwargs or {}))
            used = [t for t in flat if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in self.homes]
            assert not used, f"{func} works on weights of {[list(t.shape) for t in used]} that were not brought"
        return func(*args, **(kwargs or {}))


UNETS = {
    "video": ("UNet3DConditionModel", {**SMALL_UNET, "attention_head_dim": 8}),
    "linear": ("UNet2DConditionModel", {**SMALL_UNET, "attention_head_dim": 8, "use_linear_projection": True}),
    "convolved": ("UNet2DConditionModel", {**SMALL_UNET, "attention_head_dim": 8}),
    "pixels": ("UNet2DConditionModel", SMALL_IF),
}


@pytest.mark.parametrize("make_fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("kind", UNETS)
def test_offloaded_weights_come_and_go(kind, make_fast):
    class_name, config = UNETS[kind]
    unet = random_network(class_name, config, CPU, torch.float64)
    unet = speed_up(unet) if make_fast else unet
    channels, width = unet.config.in_channels, config.get("encoder_hid_dim") or config["cross_attention_dim"]
    frames = (3,) if kind == "video" else ()
    given = (randn(1, channels, *frames, 16, 16), torch.tensor([3]), randn(1, 7, width))
    expected = unet(*given, return_dict=False)[0]
    offload(unet, CPU)
    resting = {name: p.data_ptr() for name, p in unet.named_parameters()}
    for _ in range(2):
        with AtHome(unet):
            close(unet(*given, return_dict=False)[0], expected)
        assert {name: p.data_ptr() for name, p in unet.named_parameters()} == resting, "they are at home again"
    bring_back(unet, CPU)
    close(unet(*given, return_dict=False)[0], expected)


def test_the_guard_sees_weights_that_are_not_brought(video_unet):
    unet = copy.deepcopy(video_unet)
    offload(unet, CPU)
    unet._offload_hooks[0].remove()
    with pytest.raises(AssertionError, match="not brought"), AtHome(unet):
        unet(randn(1, 4, 3, 8, 8), torch.tensor([3]), randn(1, 7, 16), return_dict=False)


def test_another_plan_moves_the_weights_only_if_it_has_to(video_unet, vae):
    denoiser = video_denoiser(copy.deepcopy(video_unet), vae)
    loss, gradient = distilled(video_guidance(denoiser))
    away = denoiser.run_as(LADDER[-1].execution)
    assert away.execution.offload
    _, our_gradient = distilled(video_guidance(away))
    close(our_gradient, gradient, 1e-3)
    back = away.run_as(Execution())
    assert torch.equal(distilled(video_guidance(back))[0], loss)


def test_acceleration_changes_no_number(video_unet, vae):
    plain = video_denoiser(video_unet, vae)
    loss, gradient = distilled(video_guidance(plain))
    copied = replace(plain, unet=copy.deepcopy(video_unet), vae=copy.deepcopy(vae))
    benchmark = torch.backends.cudnn.benchmark
    ours, our_gradient = distilled(video_guidance(accelerated(copied, compiled=False)))
    torch.backends.cudnn.benchmark = benchmark
    close(ours, loss, 1e-3)
    close(our_gradient, gradient, 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: nothing is captured as a graph")
@pytest.mark.parametrize("execution", [Execution(), Execution(2, 2), Execution(2, 0, 1)], ids=Execution.describe)
def test_recorded_graphs_replay_what_was_computed(video_unet, vae, execution):
    from dream4d_engine.priors.networks.execution import GraphCapture

    device = torch.device("cuda")
    networks = [copy.deepcopy(network).to(device) for network in (video_unet, vae)]
    plain = video_denoiser(*networks, device=device)
    _, gradient = distilled(video_guidance(plain), device=device)
    fast = accelerated(replace(plain, execution=execution), GraphCapture(device), compiled=False)
    for _ in range(2):  # captured, then replayed
        close(distilled(video_guidance(fast), device=device)[1], gradient, 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: nothing is captured as a graph")
def test_functions_recorded_both_ways_keep_apart():
    from dream4d_engine.priors.networks import execution

    device, generator = torch.device("cuda"), seeded()
    weights = [torch.randn(64, 64, generator=generator).to(device) for _ in range(2)]

    def first(x):
        return torch.tanh(x @ weights[0]).square() @ weights[0]

    def second(x):
        return torch.sigmoid(x @ weights[1]) * x

    capture = execution.GraphCapture(device)
    for _ in range(3):
        x = torch.randn(32, 64, generator=generator).to(device).requires_grad_()
        expected = torch.autograd.grad((first(x) + second(x)).square().sum(), x)[0]
        together = capture.with_gradient(first, x) + capture.with_gradient(second, x)
        capture(torch.sin, x.detach())  # captured between: its memory must not be theirs
        (found,) = torch.autograd.grad(together.square().sum(), x)
        close(found, expected, 1e-5)
    earlier = capture.with_gradient(first, x)
    capture.with_gradient(first, x)
    with pytest.raises(RuntimeError, match="called again before its backward pass"):
        earlier.sum().backward()
    large = torch.zeros(execution.LAUNCH_BOUND + 1, device=device, requires_grad=True)
    capture.with_gradient(torch.sin, large), capture.with_gradient(torch.sin, large)  # not captured: both count
    assert not any("sin" in key for key in capture._graphs if key[0] == "with gradient")


# ---- architectures -----------------------------------------------------------------------------------------------

PARAMETERS = {
    "MVDream": 867.6,
    "Stable Diffusion 2.1 base": 865.9,
    "Zero123-XL": 859.5,
    "DeepFloyd IF-I-XL": 4304.7,
    "ZeroScope v2 576w": 1411.2,
    "ModelScope 1.7b": 1411.2,
    "Stable Diffusion XL": 2567.5,
    "Wan 2.1 1.3B": 1419.0,
    "LTX-Video 2B": 1923.4,
}
"""Millions, of the published UNets and transformers."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architectures_have_the_published_sizes(name):
    import diffusers

    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        unet = getattr(diffusers, architecture.unet_class)(**architecture.unet)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=0.1)


@pytest.mark.parametrize("kind", ["multiview", "image", "novel_view", "video"])
@pytest.mark.parametrize("vae_kind", ["full", "tiny"])
def test_a_narrow_copy_of_each_architecture_guides(kind, vae_kind, monkeypatch):
    architecture = architectures.architecture_for(kind)
    heads = {"attention_head_dim": 8, "cross_attention_dim": 16, "block_out_channels": (32, 32, 64, 64)}
    narrow = replace(
        architecture, unet={**architecture.unet, **heads}, token_width=16, n_tokens=5, image_size=(32, 32), n_frames=2
    )
    narrow = narrow if kind in ("multiview", "video") else replace(narrow, n_frames=None)
    monkeypatch.setattr(architectures, "_SD_VAE", SMALL_VAE)
    config = DistillationConfig(5.0, constant(0.3), constant(0.7))
    before = torch.random.get_rng_state()
    guidance = architectures.random_guidance(narrow, config, Runtime(CPU), vae_kind)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator didn't notice"
    cameras = make_cameras(torch.tensor([[0.0, 1.0]]), 0.2, 3.0, 0.7, 0.0, 16, 16)
    images = torch.rand(1, 2, 3, 16, 16, generator=seeded()).requires_grad_()
    distill(guidance, images, cameras, 0.0, Draw(0)).loss.backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_the_video_architecture_follows_the_frames():
    assert architectures.architecture_for("video", 16).name == "ModelScope 1.7b"
    assert architectures.architecture_for("video", 24) is ZEROSCOPE_V2
    assert architectures.architecture_for("multiview") is MVDREAM
    with pytest.raises(ValueError, match="'smell'"):
        architectures.architecture_for("smell")


def test_nothing_is_recorded_where_cuda_manages_the_memory(monkeypatch, caplog) -> None:
    """ComfyUI asks PyTorch for cudaMallocAsync, under which kernels of triton can't be part of a graph."""
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with caplog.at_level("INFO"):
        assert capture_for(torch.device("cuda")) is PLAIN
    assert "--disable-cuda-malloc" in caplog.text
    assert capture_for(torch.device("cpu")) is PLAIN
