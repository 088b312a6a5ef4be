"""The kernels against golden figures, closed forms and slow loops."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import secrets
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import emulated_cuda
import numpy as np
import pytest
import torch
from places import GOLDEN

from dream4d_engine.kernels import (
    Kernels,
    grid_layout,
    kernel_status,
    lean_mlp,
    nvrtc,
    nvrtc_kernels,
    select_kernels,
    torch_kernels,
    triton_kernels,
)
from dream4d_engine.kernels.launched import Launches, functions
from dream4d_engine.kernels.layout import PRIMES
from dream4d_engine.kernels.torch_kernels import composite, hash_encode, march_rays

ROOT = Path(__file__).parents[2]
BEST_ON_CPU = "numba" if find_spec("numba") else "torch"


def relative_error(ours: np.ndarray, golden: np.ndarray) -> float:
    return float(np.abs(ours - golden).max() / np.abs(golden).max())


@pytest.mark.parametrize("name", ["canonical", "deformation", "small3d", "small4d"])
def test_hash_encode_equals_golden(name: str) -> None:
    said = json.loads((GOLDEN / "meta.json").read_text())[name]
    config, golden = said["config"], np.load(GOLDEN / "encodings.npz")
    layout = grid_layout(
        said["n_input_dims"],
        config["n_levels"],
        config["n_features_per_level"],
        config["log2_hashmap_size"],
        config["base_resolution"],
        config["per_level_scale"],
    )
    assert layout.n_parameters == said["n_params"]
    numbers = np.sin(0.37 * np.arange(layout.n_parameters, dtype=np.float64)).astype(np.float32)
    table = torch.from_numpy(numbers).requires_grad_()
    x = torch.from_numpy(golden[f"{name}.x"]).requires_grad_()
    y = hash_encode(x, table, layout)
    (y * torch.from_numpy(golden[f"{name}.w"])).sum().backward()
    # At all levels, the finest (resolution 4096) included.
    assert np.abs(y.detach().numpy() - golden[f"{name}.y"]).max() < 1e-6
    assert relative_error(x.grad.numpy(), golden[f"{name}.dx"]) < 1e-6
    assert relative_error(table.grad.numpy()[golden[f"{name}.grad_index"]], golden[f"{name}.grad_value"]) < 1e-6


def slow_encode(x: np.ndarray, table: np.ndarray, layout) -> np.ndarray:
    """The definition, corner by corner, in float64."""
    n_dims, n_features = layout.n_dims, layout.n_features
    out = np.zeros((len(x), len(layout.levels), n_features))
    rows = table.reshape(-1, n_features)
    for s, point in enumerate(x):
        for k, level in enumerate(layout.levels):
            position = point * level.scale + 0.5
            low = np.floor(position).astype(int)
            share = position - low
            for corner in range(2**n_dims):
                bits = [corner >> d & 1 for d in range(n_dims)]
                weight = np.prod([f if b else 1 - f for b, f in zip(bits, share, strict=True)])
                number = 0
                for d, b in enumerate(bits):
                    c = int(low[d]) + b
                    if level.hashed:
                        number ^= (c * PRIMES[d]) & 0xFFFFFFFF
                    else:
                        number += c * level.resolution**d
                out[s, k] += weight * rows[level.offset + number % level.size]
    return out.reshape(len(x), -1)


@pytest.mark.parametrize(("n_dims", "n_features"), [(1, 2), (2, 1), (2, 2), (3, 4), (4, 3)])
def test_hash_encode_equals_the_definition_in_any_dimension(n_dims: int, n_features: int) -> None:
    layout = grid_layout(n_dims, 4, n_features, 6, 2, 1.7)
    assert {level.hashed for level in layout.levels} == ({False} if n_dims == 1 else {False, True})
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(40, n_dims, generator=generator, dtype=torch.float64)
    x[0], x[1], x[2, 0] = 0, 1, 1
    table = torch.rand(layout.n_parameters, generator=generator, dtype=torch.float64)
    assert np.allclose(hash_encode(x, table, layout).numpy(), slow_encode(x.numpy(), table.numpy(), layout), atol=1e-12)


@pytest.mark.parametrize(("n_dims", "n_features"), [(3, 2), (4, 2), (2, 3)])
def test_hash_encode_gradients(n_dims: int, n_features: int) -> None:
    layout = grid_layout(n_dims, 3, n_features, 5, 2, 1.6)
    generator = torch.Generator().manual_seed(2)
    x = (torch.rand(7, n_dims, generator=generator, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    table = torch.rand(layout.n_parameters, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: hash_encode(x, t, layout), (x, table))


def test_hash_encode_levels_that_sleep_give_and_get_nothing() -> None:
    layout = grid_layout(3, 5, 2, 9, 4, 1.5)
    table = torch.rand(layout.n_parameters, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(1))
    whole, part = hash_encode(x, table, layout), hash_encode(x, table, layout, 2)
    assert torch.equal(part[:, :4], whole[:, :4])
    assert (part[:, 4:] == 0).all()
    part.sum().backward()
    assert (table.grad[: layout.levels[2].offset * 2] != 0).any()
    assert (table.grad[layout.levels[2].offset * 2 :] == 0).all()
    assert (hash_encode(x, table, layout, 0) == 0).all()


def test_hash_encode_is_repeatable_and_indifferent_to_its_chunks() -> None:
    layout = grid_layout(3, 4, 2, 8, 4, 1.5)
    table = torch.rand(layout.n_parameters, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(1))
    gradients = []
    for _ in range(2):
        table.grad = None
        y = hash_encode(x, table, layout)
        y.square().sum().backward()
        gradients.append(table.grad)
    assert torch.equal(*gradients)
    assert torch.equal(y[30_000:], hash_encode(x[30_000:], table, layout))


def test_hash_encode_of_nothing_and_of_the_wrong_thing() -> None:
    layout = grid_layout(3, 4, 2, 8, 4, 1.5)
    table = torch.zeros(layout.n_parameters, requires_grad=True)
    empty = hash_encode(torch.zeros(0, 3), table, layout)
    assert empty.shape == (0, 8)
    empty.sum().backward()
    with pytest.raises(ValueError, match="3 dimensions"):
        hash_encode(torch.zeros(5, 4), table, layout)
    with pytest.raises(ValueError, match="dimensions, got 5"):
        grid_layout(5, 4, 2, 8, 4, 1.5)


def rays(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=-1) * 3
    targets = (torch.rand(n, 3, generator=generator) * 2 - 1) * 1.3
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1)


@pytest.mark.parametrize("shifted", [False, True])
def test_march_finds_exactly_the_middles_in_occupied_cells(shifted: bool) -> None:
    origins, directions = rays(60)
    step, resolution = 0.05, 8
    occupied = torch.rand(resolution, resolution, resolution, generator=torch.Generator().manual_seed(3)) < 0.3
    jitter = torch.rand(60, generator=torch.Generator().manual_seed(4)) if shifted else None
    ray, start, end = march_rays(origins, directions, 1.0, step, occupied, jitter)
    # Slowly: every lattice point of every ray.
    k = torch.arange(200.0)
    t = (k[None] + (0 if jitter is None else jitter[:, None]) + torch.zeros(60, 1)) * step
    middle = origins[:, None] + (t + step / 2)[..., None] * directions[:, None]
    inside = (middle.abs() <= 1).all(-1)
    cell = ((middle + 1) / 2 * resolution).long().clamp(0, resolution - 1)
    keep = inside & occupied[cell[..., 0], cell[..., 1], cell[..., 2]]
    expected_ray, column = keep.nonzero(as_tuple=True)
    assert torch.equal(ray, expected_ray)
    assert torch.allclose(start, t[expected_ray, column], atol=1e-5)
    assert torch.allclose(end - start, torch.full_like(start, step), atol=1e-5)


def test_march_from_inside_along_an_axis_and_past_the_box() -> None:
    origins = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    directions = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    ray, start, _ = march_rays(origins, directions, 1.0, 0.25)
    assert torch.bincount(ray, minlength=3).tolist() == [4, 8, 0]
    assert torch.equal(start[ray == 0], torch.arange(4) * 0.25)
    assert torch.equal(start[ray == 1], 2 + torch.arange(8) * 0.25)
    for empty in (
        march_rays(origins[2:], directions[2:], 1.0, 0.25),
        march_rays(origins, directions, 1.0, 0.25, torch.zeros(2, 2, 2, dtype=torch.bool)),
        march_rays(origins[:0], directions[:0], 1.0, 0.25),
    ):
        assert all(len(column) == 0 for column in empty)


def test_march_walks_all_of_the_box_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    origins, directions = rays(50)
    occupied = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = march_rays(origins, directions, 1.0, 0.03, occupied)
    monkeypatch.setattr("dream4d_engine.kernels.torch_kernels._MAX_CANDIDATES", 500)
    for a, b in zip(whole, march_rays(origins, directions, 1.0, 0.03, occupied), strict=True):
        assert torch.equal(a, b)


def slow_composite(density, values, ray_indices, t_starts, t_ends, n_rays):
    weights, sums = [], torch.zeros(n_rays, values.shape[-1], dtype=values.dtype)
    transmittance = [1.0] * n_rays
    for i, ray in enumerate(ray_indices.tolist()):
        alpha = 1 - torch.exp(-density[i] * (t_ends[i] - t_starts[i]))
        weights.append(transmittance[ray] * alpha)
        transmittance[ray] = transmittance[ray] * (1 - alpha)
        sums = sums.index_add(0, ray_indices[i : i + 1], (weights[-1] * values[i])[None])
    return torch.stack(weights), sums


def test_composite_equals_the_loop_in_values_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    ray_indices = torch.tensor([0, 0, 0, 2, 2, 3, 5, 5, 5, 5])
    t_starts = torch.rand(10, generator=generator, dtype=torch.float64)
    t_ends = t_starts + torch.rand(10, generator=generator, dtype=torch.float64)
    density = (torch.rand(10, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    values = torch.rand(10, 3, generator=generator, dtype=torch.float64).requires_grad_()
    results = []
    for function in (composite, slow_composite):
        weights, sums = function(density, values, ray_indices, t_starts, t_ends, 6)
        loss = (weights * torch.arange(10)).sum() + (sums.square() * torch.arange(6)[:, None]).sum()
        results.append((weights, sums, *torch.autograd.grad(loss, (density, values))))
    for ours, slow in zip(*results, strict=True):
        assert torch.allclose(ours, slow, atol=1e-12)


def test_composite_of_a_slab_is_its_closed_form() -> None:
    """A slab of constant density has opacity 1 - exp(-density L), behind 300,000 samples of other rays too."""
    n, length = 512, 1.7
    edges = torch.linspace(2, 2 + length, n + 1)
    n_rays = 600
    density = torch.cat((torch.full(((n_rays - 1) * n,), 40.0), torch.full((n,), 0.8)))
    ray_indices = torch.arange(n_rays).repeat_interleave(n)
    weights, sums = composite(
        density, torch.ones(len(density), 1), ray_indices, edges[:-1].repeat(n_rays), edges[1:].repeat(n_rays), n_rays
    )
    assert abs(float(sums[-1]) - (1 - np.exp(-0.8 * length))) < 2e-6
    assert torch.allclose(sums[:-1], torch.ones(n_rays - 1, 1), atol=1e-5)
    assert torch.allclose(torch.zeros(n_rays).index_add(0, ray_indices, weights), sums[:, 0], atol=1e-6)


def test_networks_asked_in_pieces_say_the_same(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(shape, generator=generator) for shape in ((16, 5), (16, 16), (3, 16))]
    x = torch.randn(1000, 5, generator=generator)
    whole = torch_kernels.mlp(x, layers)
    monkeypatch.setattr(torch_kernels, "_ROWS", 300)
    with torch.no_grad():
        pieces = torch_kernels.mlp(x, layers)
    assert torch.allclose(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(5, 16, 16, 3), (24, 64, 1), (3, 8)])
def test_networks_that_keep_little_give_the_same_gradients(monkeypatch, sizes: tuple[int, ...]) -> None:
    monkeypatch.setattr(lean_mlp, "_PIECE", 300 * sizes[1])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o, i, generator=generator) for i, o in itertools.pairwise(sizes)]
    x, grad = (torch.randn(1000, n, generator=generator) for n in (sizes[0], sizes[-1]))
    results = []
    for network, dtype in (
        (lean_mlp.mlp, torch.bfloat16),
        (torch_kernels.mlp, torch.bfloat16),
        (torch_kernels.mlp, None),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *weights)]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = network(leaves[0], leaves[1:])
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for lean, plain, exact in zip(*results, strict=True):
        assert (lean.dtype, lean.shape) == (plain.dtype, plain.shape)
        assert (lean - exact).norm() <= 1.5 * (plain - exact).norm() < 0.15 * exact.norm()


def test_networks_that_keep_little_of_few_samples_or_none() -> None:
    layers = [torch.randn(8, 5).requires_grad_(), torch.randn(3, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        out = lean_mlp.mlp(torch.randn(0, 5), layers)
    (found,) = torch.autograd.grad(out.sum(), layers[:1])
    assert out.shape == (0, 3)
    assert torch.equal(found, torch.zeros(8, 5))


def test_composite_of_nothing() -> None:
    nothing = torch.zeros(0)
    weights, sums = composite(nothing, torch.zeros(0, 4), nothing.long(), nothing, nothing, 3)
    assert weights.shape == (0,)
    assert torch.equal(sums, torch.zeros(3, 4))


@pytest.fixture
def a_new_process() -> None:
    """What is logged once a process is logged again."""
    from dream4d_engine import kernels

    kernels._note.cache_clear()


@pytest.mark.usefixtures("a_new_process")
def test_selection_is_loud_when_asked_for_what_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_kernels("cpu").name == BEST_ON_CPU
    assert f"{BEST_ON_CPU} kernels chosen on cpu" in caplog.text
    assert select_kernels("cpu", "torch").name == "torch"
    with pytest.raises(ValueError, match="unknown kernels 'warp'"):
        select_kernels("cpu", "warp")


@pytest.mark.usefixtures("a_new_process")
def test_every_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Every scene chooses its kernels, and every node has scenes."""
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            select_kernels("cpu")
            select_kernels(torch.device("cpu"))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)), lines
    tried = ["triton", "nvrtc", "cuda", "numba"] + ["torch"] * (BEST_ON_CPU == "torch")
    assert [line.split(" kernels ")[0] for line in lines] == tried
    assert {record.levelno for record in caplog.records} == {logging.INFO}, "nobody expects them on a CPU"


@pytest.mark.parametrize(
    ("torch_version", "platform", "command"),
    [
        ("2.6.0+cu124", "win32", 'pip install "triton-windows<3.3"'),
        ("2.7.1+cu128", "win32", 'pip install "triton-windows<3.4"'),
        ("2.8.0", "win32", 'pip install "triton-windows<3.5"'),
        ("2.9.1+cu130", "win32", 'pip install "triton-windows<3.6"'),
        ("2.10.0", "win32", 'pip install "triton-windows<3.7"'),
        ("2.11.0a0+git123", "win32", 'pip install "triton-windows<3.7"'),
        ("2.12.1", "win32", 'pip install "triton-windows<3.8"'),
        ("2.13.0", "win32", 'pip install "triton-windows<3.8"'),
        ("2.14.1+cu130", "win32", 'pip install "triton-windows<3.9"'),
        ("2.10.0", "linux", 'pip install "triton<3.7"'),
        ("3.4.0", "win32", 'pip install "triton-windows<4.3"'),
    ],
)
def test_the_command_that_brings_triton(monkeypatch, torch_version, platform, command) -> None:
    """The pairs are those of torch's own Linux wheels; a torch newer than all we know says it itself."""
    from dream4d_engine import kernels

    told = ["filelock", 'triton~=4.2.1; platform_system == "Linux"', "triton-other==9.9"]
    monkeypatch.setattr(kernels.metadata, "requires", lambda name: told)
    assert kernels.triton_command(torch_version, platform) == command


def test_a_torch_that_says_nothing_of_triton(monkeypatch) -> None:
    from dream4d_engine import kernels

    monkeypatch.setattr(kernels.metadata, "requires", lambda name: None)
    assert kernels.triton_command("9.1.0", "win32") == "pip install triton-windows"
    assert kernels.triton_command("no version", "linux") == "pip install triton"


@pytest.mark.usefixtures("a_new_process")
def test_a_gpu_without_triton_is_told_what_to_type(monkeypatch, caplog) -> None:
    from dream4d_engine import kernels

    def missing(device):
        raise ModuleNotFoundError("No module named 'triton.language'", name="triton.language")

    def unloadable(device):
        raise RuntimeError("NVRTC cannot be loaded")

    def fast(device):
        return Kernels("nvrtc", *[hash_encode] * 6)

    monkeypatch.setattr(kernels, "_BACKENDS", {**kernels._BACKENDS, "triton": missing, "nvrtc": fast})
    monkeypatch.setattr(kernels, "triton_command", lambda: 'pip install "triton-windows<3.7"')
    with caplog.at_level(logging.INFO):
        assert select_kernels("cuda:1").name == "nvrtc"
    assert {record.levelno for record in caplog.records} == {logging.INFO}, "fast enough not to be warned of"
    caplog.clear()
    monkeypatch.setitem(kernels._BACKENDS, "nvrtc", unloadable)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert select_kernels("cuda:0").name in ("cuda", "torch")
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert first.startswith("triton kernels passed over on cuda:0: triton is not installed")
    assert first.endswith('pip install "triton-windows<3.7"')
    assert second == "nvrtc kernels passed over on cuda:0: NVRTC cannot be loaded"
    (status,) = [status for status in kernel_status("cuda:0") if status.name == "triton"]
    assert not status.usable and 'pip install "triton-windows<3.7"' in status.reason
    with pytest.raises(ValueError, match='cannot run on cuda: triton is not installed.*"triton-windows<3.7"'):
        select_kernels("cuda", "triton")


def test_other_missing_libraries_are_named_as_they_are(monkeypatch) -> None:
    from dream4d_engine import kernels

    def missing(device):
        raise ModuleNotFoundError("No module named 'tinycudann'", name="tinycudann")

    monkeypatch.setattr(kernels, "_BACKENDS", {**kernels._BACKENDS, "cuda": missing})
    assert {status.name: status.reason for status in kernel_status("cpu")}["cuda"] == "No module named 'tinycudann'"


@pytest.mark.usefixtures("a_new_process")
def test_selection_passes_over_what_cannot_run(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    from dream4d_engine import kernels

    def broken(device):
        raise ImportError("no such compiler")

    monkeypatch.setattr(kernels, "_BACKENDS", {"fast": broken, **kernels._BACKENDS})
    with caplog.at_level(logging.INFO):
        assert select_kernels("cpu").name == BEST_ON_CPU
    assert "no such compiler" in caplog.text
    with pytest.raises(ValueError, match="fast kernels cannot run on cpu: no such compiler"):
        select_kernels("cpu", "fast")


@pytest.mark.usefixtures("a_new_process")
def test_a_full_card_is_no_reason_to_pass_over_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scene would keep the slow ones for good."""
    from dream4d_engine import kernels

    def full(device):
        raise RuntimeError("a first kernel failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_BACKENDS", {"fast": full, **kernels._BACKENDS})
        for asked in ("auto", "fast"):
            with pytest.raises(torch.OutOfMemoryError, match="while the fast kernels were tried out: a first kernel"):
                select_kernels("cpu", asked)
        assert kernel_status("cpu")[0].reason.endswith("Tried to allocate 2.00 MiB")
    mixed = kernels._with_gradients_of_nvrtc(
        replace(triton_kernels.LAUNCHES, encode_to_table=list), torch.device("cpu")
    )
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc_kernels, "check", full)
        with pytest.raises(torch.OutOfMemoryError, match="the encoding's gradients were tried out"):
            mixed.encode_to_table()
    mixed.encode_to_table()  # it is asked again


@pytest.mark.usefixtures("a_new_process")
@pytest.mark.parametrize("gradient", ["encode_to_table", "encode_to_points"])
def test_the_encodings_gradients_are_the_faster_backends_where_it_runs(monkeypatch, caplog, gradient: str) -> None:
    from dream4d_engine import kernels

    def saying(name: str) -> Launches:
        said = {g: lambda *given: asked.append((name, given)) for g in ("encode_to_table", "encode_to_points")}
        return replace(triton_kernels.LAUNCHES, name=name, **said)

    asked: list = []
    monkeypatch.setattr(nvrtc_kernels, "LAUNCHES", saying("nvrtc"))
    launches = saying("triton")
    mixed, later = (kernels._with_gradients_of_nvrtc(launches, torch.device("cpu")) for _ in range(2))
    assert (
        replace(mixed, encode_to_table=launches.encode_to_table, encode_to_points=launches.encode_to_points) == launches
    )
    with caplog.at_level(logging.INFO):
        getattr(mixed, gradient)(1, 2)
    assert asked == [("triton", (1, 2))], "there is no GPU that it could be compiled for"
    assert "the encoding's gradients stay triton's on cpu: they need a CUDA device" in caplog.text
    monkeypatch.setattr(nvrtc_kernels, "check", lambda device: None)
    for one in (later, mixed):
        getattr(one, gradient)(3)
    assert asked[1:] == [("nvrtc", (3,)), ("triton", (3,))], "an answer holds"


# ---- the other backends against the plain one -----------------------------------------------------------------------


@pytest.fixture(params=["numba", "triton", "nvrtc", pytest.param("cuda", marks=pytest.mark.gpu)])
def fast(request, monkeypatch: pytest.MonkeyPatch) -> tuple[Kernels, torch.device]:
    """A backend and where it runs: on the CPU, on a GPU, or a GPU's code interpreted or compiled for the CPU."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
        return select_kernels("cpu", "numba"), torch.device("cpu")
    if torch.cuda.is_available():
        try:
            return select_kernels("cuda", request.param), torch.device("cuda")
        except ValueError as reason:
            pytest.skip(str(reason))
    if request.param == "cuda":
        pytest.skip("tiny-cuda-nn and nerfacc need a GPU")
    launches = emulated_nvrtc(monkeypatch) if request.param == "nvrtc" else interpreted_triton(monkeypatch)
    return Kernels(request.param, *functions(launches), torch_kernels.mlp), torch.device("cpu")


def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> Launches:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton_kernels, "_RUN", 4)  # interpreted step by step
    return triton_kernels.LAUNCHES


def emulated_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Launches:
    if emulated_cuda.COMPILER is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(nvrtc, "kernels_of", emulated_cuda.kernels_of)
    monkeypatch.setattr(nvrtc, "capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc_kernels, "_RUN", 8)  # several runs even of a few samples
    return nvrtc_kernels.LAUNCHES


@pytest.fixture
def generator() -> torch.Generator:
    """Other inputs each time; the seed is shown where a test fails."""
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def assert_close(ours: torch.Tensor, plain: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    assert float((ours - plain).detach().abs().max()) <= tolerance * float(plain.detach().abs().max()) + 1e-30


GRIDS = {
    "canonical": (3, 16, 2, 19, 16, 1.447269237440378),
    "deformation": (4, 12, 2, 19, 4, 1.447269237440378),
    "small3d": (3, 6, 2, 10, 8, 1.5),
    "small4d": (4, 5, 2, 12, 4, 1.5),
    "odd": (2, 4, 3, 6, 2, 1.7),
    "wide": (3, 3, 8, 8, 2, 1.7),
    "line": (1, 4, 1, 6, 2, 1.7),
}


@pytest.mark.parametrize("n_active", [None, 2, 0])
@pytest.mark.parametrize("name", GRIDS)
def test_other_backends_encode_alike(fast, generator, name: str, n_active: int | None) -> None:
    kernels, device = fast
    layout = grid_layout(*GRIDS[name])
    table = torch.randn(layout.n_parameters, generator=generator)
    x = torch.rand(3000 if device.type == "cuda" else 20, layout.n_dims, generator=generator)
    x[0], x[1], x[2, 0] = 0, 1, 1
    towards = torch.randn(len(x), layout.n_outputs, generator=generator)
    results = []
    for encode, place in ((kernels.hash_encode, device), (hash_encode, torch.device("cpu"))):
        points, entries = x.to(place).requires_grad_(), table.to(place).requires_grad_()
        y = encode(points, entries, layout, n_active)
        gradients = torch.autograd.grad(y, (points, entries), towards.to(place))
        results.append([value.detach().cpu() for value in (y, *gradients)])
    for ours, plain, tolerance in zip(*results, (2e-6, 2e-6, 1e-5), strict=True):
        assert_close(ours, plain, tolerance)  # the table's gradient sums over samples in any order


@pytest.mark.parametrize("name", ["small3d", "wide"])
def test_encodings_in_half_precision_are_the_rounded_ones(fast, generator, name: str) -> None:
    kernels, device = fast
    if kernels.name not in ("triton", "nvrtc"):
        pytest.skip("the others leave autocast alone")
    layout, half = grid_layout(*GRIDS[name]), torch.float16 if device.type == "cuda" else torch.bfloat16
    x = torch.rand(20, 3, generator=generator).to(device).requires_grad_()
    table = torch.randn(layout.n_parameters, generator=generator).to(device).requires_grad_()
    towards = torch.randn(20, layout.n_outputs, generator=generator).to(device, half)
    whole = kernels.hash_encode(x, table, layout)
    with torch.autocast(device.type, half):
        rounded = kernels.hash_encode(x, table, layout)
    if kernels.name == "nvrtc" or device.type == "cuda":
        assert torch.equal(rounded, whole.to(half))
    assert_close(rounded.float(), whole, 2**-7)  # interpreted, triton cuts digits off
    ours, plain = (torch.autograd.grad(y, (x, table), towards.to(y.dtype)) for y in (rounded, whole))
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("distance", [3.0, 60.0])
def test_other_backends_march_to_the_same_places(fast, generator, shifted: bool, distance: float) -> None:
    kernels, device = fast
    origins, directions = rays(50, int(torch.randint(10**6, (), generator=generator)))
    origins = origins + (3.0 - distance) * directions  # seen from farther away
    origins[0], directions[0] = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.0, 1.0, 0.0])  # inside, along an axis
    jitter = torch.rand(50, generator=generator) if shifted else None
    for occupied in (None, torch.rand(8, 8, 8, generator=generator) < 0.3, torch.zeros(8, 8, 8, dtype=torch.bool)):
        given = [None if t is None else t.to(device) for t in (origins, directions, occupied, jitter)]
        ours = kernels.march_rays(*given[:2], 1.0, 0.01, *given[2:])
        plain = march_rays(*given[:2], 1.0, 0.01, *given[2:])
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)
        for capacity in (len(plain[0]) + 5, len(plain[0]), len(plain[0]) // 2):
            *columns, n_found = kernels.march_into(*given[:2], 1.0, 0.01, *given[2:], capacity)
            whole = torch.stack([c.double() for c in plain])
            fits = capacity >= len(plain[0])
            assert all(len(column) == capacity for column in columns)
            if distance == 60.0 and int(n_found) == -1:
                continue  # too far away for the marks that are there: it says so
            assert int(n_found) == len(plain[0])
            found = torch.stack([c.double() for c in columns])
            kept = whole.shape[1] if fits else int((found[2] > found[1]).sum())
            assert torch.equal(found[:, :kept], whole[:, :kept]) and not found[1:, kept:].any()
    empty = kernels.march_rays(given[0][:0], given[1][:0], 1.0, 0.01)
    assert all(len(column) == 0 for column in empty)


@pytest.mark.parametrize("density_scale", [1.0, 30.0, 3000.0])
def test_other_backends_composite_alike(fast, generator, density_scale: float) -> None:
    kernels, device = fast
    n_rays = 40
    counts = torch.randint(0, 90, (n_rays,), generator=generator)
    counts[::7] = 0
    ray = torch.arange(n_rays).repeat_interleave(counts)
    n = len(ray)
    starts = torch.rand(n, generator=generator)
    given = (ray, starts, starts + 0.02 * torch.rand(n, generator=generator))
    density = torch.rand(n, generator=generator) ** 4 * density_scale
    values = torch.randn(n, 5, generator=generator)
    towards = torch.randn(n, generator=generator), torch.randn(n_rays, 5, generator=generator)
    results = []
    for backend, place in ((kernels, device), (torch_kernels, torch.device("cpu"))):
        d, v = density.to(place).requires_grad_(), values.to(place).requires_grad_()
        there = [t.to(place) for t in given]
        weights, sums = backend.composite(d, v, *there, n_rays)
        gradients = torch.autograd.grad((weights, sums), (d, v), [t.to(place) for t in towards], retain_graph=True)
        again = backend.accumulate(v * weights.detach()[:, None], there[0], n_rays)
        (back,) = torch.autograd.grad(again, v, towards[1].to(place))
        results.append([t.detach().cpu() for t in (weights, sums, *gradients, again, back)])
    # nerfacc sums density times length in float32 before it takes the exponential
    tolerance = 5e-5 if kernels.name == "cuda" else 1e-5
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain, tolerance)


def test_other_backends_composite_nothing(fast) -> None:
    kernels, device = fast
    nothing = torch.zeros(0, device=device)
    values = torch.zeros(0, 4, device=device)
    weights, sums = kernels.composite(nothing, values, nothing.long(), nothing, nothing, 3)
    assert weights.shape == (0,)
    assert torch.equal(sums.cpu(), torch.zeros(3, 4))
    assert torch.equal(kernels.accumulate(values, nothing.long(), 3).cpu(), torch.zeros(3, 4))


def test_kernels_for_gpus_refuse_what_they_do_not_know(fast) -> None:
    kernels, device = fast
    if kernels.name not in ("triton", "nvrtc"):
        pytest.skip("about kernels of our own for GPUs")
    layout = grid_layout(3, 4, 2, 8, 4, 1.5)
    with pytest.raises(ValueError, match="table in float32, got torch.float64"):
        kernels.hash_encode(torch.zeros(5, 3).to(device), torch.zeros(layout.n_parameters).double().to(device), layout)
    with pytest.raises(ValueError, match="3 dimensions"):
        kernels.hash_encode(torch.zeros(5, 4).to(device), torch.zeros(layout.n_parameters).to(device), layout)


# ---- numba's own -----------------------------------------------------------------------------------------------------


@pytest.fixture
def a_fresh_look_at_numba():
    """Whether it can compile is found out again, and once more afterwards."""
    from dream4d_engine.kernels import numba_kernels

    numba_kernels._fault.cache_clear()
    yield
    numba_kernels._fault.cache_clear()


def test_what_is_compiled_under_one_name_is_not_read_under_another(tmp_path) -> None:
    """ComfyUI imports the same files as part of a package of another name, and can't import this one."""
    pytest.importorskip("numba", reason="numba is not installed")
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        "place = Path(sys.argv[1]) / 'dream4d_engine/kernels/numba_source.py'\n"
        "spec = importlib.util.spec_from_file_location(sys.argv[2], place)\n"
        "module = sys.modules[sys.argv[2]] = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "import numpy as np; numbers = np.zeros((1, 3), np.float32)\n"
        "module.sum_rays(numbers, np.array([0, 1]), np.zeros((1, 3), np.float32), 0, 1)\n"
        "print(sum(module.sum_rays.stats.cache_hits.values()), sum(module.sum_rays.stats.cache_misses.values()))\n"
    )
    said = []
    for name in ("one_pack", "another_pack", "one_pack"):
        command = [sys.executable, "-c", code, str(ROOT), name]
        env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said == [["0", "1"], ["0", "1"], ["1", "0"]], "hits and misses"


@pytest.mark.usefixtures("a_new_process", "a_fresh_look_at_numba")
def test_a_cpu_without_numba_is_told_what_to_type(monkeypatch, caplog) -> None:
    monkeypatch.delitem(sys.modules, "dream4d_engine.kernels.numba_source", raising=False)
    monkeypatch.delattr("dream4d_engine.kernels.numba_source", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it weren't there
    with caplog.at_level(logging.INFO):
        assert select_kernels("cpu").name == "torch"
    (line,) = [record.getMessage() for record in caplog.records if "numba" in record.getMessage()]
    assert line.startswith("numba kernels passed over on cpu: numba is not installed") and "pip install numba" in line
    with pytest.raises(ValueError, match="numba kernels cannot run on cpu: numba is not installed"):
        select_kernels("cpu", "numba")


@pytest.mark.usefixtures("a_new_process", "a_fresh_look_at_numba")
def test_a_numba_that_cannot_compile_is_passed_over(monkeypatch, caplog) -> None:
    source = pytest.importorskip("dream4d_engine.kernels.numba_source", reason="numba is not installed")

    def broken(*given):
        raise OSError("no room for code\nand much more")

    monkeypatch.setattr(source, "composite_gradient", broken)
    with caplog.at_level(logging.INFO):
        assert select_kernels("cpu").name == "torch"
    assert "numba kernels passed over on cpu: a first kernel failed: OSError: no room for code" in caplog.text
    with pytest.raises(ValueError, match="cannot run on cpu: a first kernel failed"):
        select_kernels("cpu", "numba")


def test_numba_is_for_cpus() -> None:
    (status,) = [status for status in kernel_status("meta") if status.name == "numba"]
    assert status.reason == "they are for CPUs"


def test_numba_works_where_nothing_compiled_can_be_kept(monkeypatch) -> None:
    source = pytest.importorskip("dream4d_engine.kernels.numba_source", reason="numba is not installed")
    compiler = source.njit

    def without_a_folder(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compiler(**options)

    monkeypatch.setattr(source, "njit", without_a_folder)

    def double(x):
        return 2 * x

    assert source._compiled(double)(21) == 42


@pytest.fixture
def numba_kernels() -> Kernels:
    pytest.importorskip("numba", reason="numba is not installed")
    return select_kernels("cpu", "numba")


@pytest.fixture
def threads():
    """Sets how many PyTorch uses, and brings the number back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(kernels: Kernels) -> list[torch.Tensor]:
    """All that the kernels give for one case, gradients too."""
    layout, random = grid_layout(3, 5, 2, 9, 4, 1.5), torch.Generator().manual_seed(0)
    origins, directions = rays(2000)
    occupied = torch.rand(8, 8, 8, generator=random) < 0.6
    ray, starts, ends = kernels.march_rays(origins, directions, 1.0, 0.05, occupied, torch.rand(2000, generator=random))
    x = ((origins[ray] + starts[:, None] * directions[ray]) / 2 + 0.5).clamp(0, 1).requires_grad_()
    table = torch.randn(layout.n_parameters, generator=random).requires_grad_()
    features = kernels.hash_encode(x, table, layout)
    weights, sums = kernels.composite(features[:, 0].square(), features, ray, starts, ends, 2000)
    again = kernels.accumulate(features * weights[:, None], ray, 2000)
    loss = (weights.square().sum() + sums.square().sum()) + again.sum()
    return [ray, starts, ends, features, weights, sums, again, *torch.autograd.grad(loss, (x, table))]


def test_numba_gives_the_same_on_any_number_of_threads(numba_kernels, threads) -> None:
    """A resumed run must end as an unbroken one, on whatever machine."""
    threads(1)
    alone = everything(numba_kernels)
    for n in (2, 5):
        threads(n)
        for a, b in zip(alone, everything(numba_kernels), strict=True):
            assert torch.equal(a, b)


def test_numba_serves_several_callers_at_once(numba_kernels, threads) -> None:
    alone = everything(numba_kernels)
    with ThreadPoolExecutor(3) as callers:

        def call(_) -> list[torch.Tensor]:
            torch.set_num_threads(2)
            return everything(numba_kernels)

        for found in callers.map(call, range(3)):
            assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_numba_leaves_what_is_not_float32_to_torch(numba_kernels) -> None:
    layout = grid_layout(3, 4, 2, 8, 4, 1.5)
    x = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = torch.rand(layout.n_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(numba_kernels.hash_encode(x, table, layout), hash_encode(x, table, layout))
    with pytest.raises(ValueError, match="3 dimensions"):
        numba_kernels.hash_encode(torch.zeros(5, 4), table.float(), layout)


def test_numba_reads_no_memory_but_the_table_for_points_that_are_none(numba_kernels) -> None:
    layout = grid_layout(3, 5, 2, 9, 4, 1.5)
    x = torch.tensor([[float("nan")] * 3, [1e30, -1e30, 0.5], [float("inf"), 0.5, 0.5], [0.3, 0.4, 0.5]])
    table = torch.ones(layout.n_parameters, requires_grad=True)
    features = numba_kernels.hash_encode(x, table, layout)
    assert features[0].isnan().all() and torch.allclose(features[3], torch.ones(layout.n_outputs))
    features.sum().backward()
    assert table.grad.shape == table.shape


def test_the_status_of_backends_gives_reasons() -> None:
    found = {status.name: status for status in kernel_status("cpu")}
    assert found["torch"].usable and not found["torch"].reason
    for name in ("triton", "nvrtc", "cuda"):
        assert not found[name].usable and "CUDA device" in found[name].reason


@pytest.mark.usefixtures("a_fresh_look_at_numba")
def test_a_backend_that_cannot_run_keeps_nothing_of_who_asked(monkeypatch):
    """An error that is kept would keep the frames that it went through, and with them a whole run's models."""
    from dream4d_engine.kernels import numba_kernels

    def no_numba():
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    class Model:
        pass

    def ask():
        model = Model()
        with pytest.raises(ModuleNotFoundError, match="numba"):
            numba_kernels.check(torch.device("cpu"))
        return weakref.ref(model)

    monkeypatch.setattr(numba_kernels, "_trial", no_numba)
    kept = [ask(), ask()]
    gc.collect()
    assert [one() for one in kept] == [None, None]
