"""Rendering: golden images, closed forms, and equal results by every way there is."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from places import GOLDEN

from dream4d_engine.cameras import CameraBatch, orbit
from dream4d_engine.division import Division
from dream4d_engine.dream_in_4d import import_checkpoint
from dream4d_engine.fields.background import BackgroundConfig
from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.machine import limit_memory
from dream4d_engine.rendering import (
    RenderOptions,
    View,
    count_samples,
    prefetch_samples,
    prepare_view,
    render,
    render_chunked,
    render_view,
)
from dream4d_engine.rendering.render import _IMAGES
from dream4d_engine.rendering.shading import KINDS, depth_image, displacement_image, image_of
from dream4d_engine.scene import Scene, SceneConfig, build_scene

GRID = HashGridConfig(n_levels=4, log2_entries=8, base_resolution=4, growth=1.5)
CONFIG = SceneConfig(radiance=RadianceConfig(GRID, hidden_width=16), occupancy_resolution=16, n_samples=48)
MOTION = DeformationConfig(GRID, hidden_width=16, hidden_layers=2)
EVERYTHING = RenderOptions(normals=True, displacement=True, z_variance=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def static_scene() -> Scene:
    return build_scene(CONFIG, generator())


def moving_scene() -> Scene:
    scene = static_scene().with_deformation(MOTION, generator(1))
    with torch.no_grad():
        for parameter in scene.deformation.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(4)) * 0.1)
    return scene


def cameras(size: int = 12, n: int = 3, distance: float = 3.0) -> CameraBatch:
    return orbit(n, size, size, distance=distance, time=torch.linspace(0, 1, n))


def psnr(ours: torch.Tensor, golden: torch.Tensor) -> float:
    return float(-10 * torch.log10((ours - golden).square().mean()))


@pytest.mark.parametrize(("stage", "view"), [("stage1", 1), ("stage2", 2)])
def test_images_equal_golden(stage: str, view: int) -> None:
    """One of the four views of each checkpoint; the others agree as well (80 dB and more) but take longer."""
    scene, _ = import_checkpoint(GOLDEN / f"{stage}.ckpt")
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / f"{stage}_renders.npz").items()}
    one = slice(view, view + 1)
    shot = CameraBatch(
        golden["c2w"][None, one],
        torch.deg2rad(golden["fovy_deg"].float()).expand(1, 1),
        torch.deg2rad(golden["azimuth"])[None, one],
        torch.deg2rad(golden["elevation"])[None, one],
        golden["camera_distances"][None, one],
        golden["times"][None, one, 0],
        64,
        64,
    )
    output = render_chunked(scene, shot, RenderOptions(prune=False, displacement=True))
    assert psnr(output.rgb[0], golden["comp_rgb"][one]) > 80
    assert psnr(output.opacity[0], golden["opacity"][one]) > 100
    assert psnr(output.depth[0], golden["depth"][one]) > 90
    if stage == "stage2":
        assert psnr(output.displacement[0], golden["comp_displacement"][one]) > 110


def constant_density(scene: Scene, density: float) -> None:
    """Make the scene's density the same everywhere, by its blob."""
    logit = float(np.log(np.expm1(density)))
    object.__setattr__(scene.canonical, "blob", lambda u: torch.full_like(u[:, 0], logit))
    with torch.no_grad():
        scene.canonical.density_mlp.layers[-1].zero_()


def test_a_slab_has_its_closed_form() -> None:
    scene = build_scene(replace(CONFIG, n_samples=512), generator())
    constant_density(scene, 0.7)
    straight = orbit(1, 1, 1, elevation_deg=0.0)
    output = render_chunked(scene, straight, RenderOptions(prune=False, z_variance=True))
    expected = 1 - np.exp(-0.7 * 2.0)
    assert float(output.opacity) == pytest.approx(expected, abs=2e-3)
    t = np.linspace(2, 4, 200_001)
    density = 0.7 * np.exp(-0.7 * (t - 2))
    mean = np.trapezoid(density * t, t) if hasattr(np, "trapezoid") else np.trapz(density * t, t)
    spread = density * (t - mean) ** 2
    assert float(output.depth) == pytest.approx(float(mean), abs=1e-2)
    assert float(output.z_variance) == pytest.approx(float(spread.sum() * (t[1] - t[0])), abs=1e-2)


def test_weights_sum_to_the_opacity_and_colours_mix_with_the_background() -> None:
    scene = static_scene()
    output = render(scene, cameras(), RenderOptions(background=torch.tensor([1.0, 0.0, 0.0]), z_variance=True))
    n_rays = output.samples.n_rays
    summed = torch.zeros(n_rays).index_add(0, output.samples.ray_indices, output.weights)
    assert torch.allclose(summed, output.opacity.flatten(), atol=1e-6)
    assert (output.samples.ray_indices.diff() >= 0).all()
    assert (output.opacity >= 0).all() and (output.opacity <= 1 + 1e-6).all()
    black = render(scene, cameras(), RenderOptions(background=torch.zeros(3)))
    expected = black.rgb + (1 - black.opacity) * torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(output.rgb, expected, atol=1e-6)
    assert (output.z_variance >= 0).all()


def test_shapes_and_what_was_not_asked_for() -> None:
    plain = render(static_scene(), cameras(8), RenderOptions(displacement=True))
    assert plain.rgb.shape == (1, 3, 8, 8, 3) and plain.depth.shape == (1, 3, 8, 8, 1)
    assert plain.normals is None and plain.displacement is None and plain.z_variance is None
    full = render(moving_scene(), cameras(8), EVERYTHING)
    assert full.normals.shape == full.displacement.shape == (1, 3, 8, 8, 3)
    assert full.z_variance.shape == (1, 3, 8, 8, 1)


@pytest.mark.parametrize("options", [EVERYTHING, RenderOptions(), RenderOptions(prune=False, displacement=True)])
def test_chunks_change_nothing(options: RenderOptions) -> None:
    scene = moving_scene()
    scene.refresh_occupancy()
    whole, seen = render(scene, cameras(), options), []
    parts = render_chunked(scene, cameras(), options, chunk_rays=37, on_progress=seen.append)
    for name in _IMAGES:
        a, b = getattr(whole, name), getattr(parts, name)
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5), name
    assert parts.samples is None and not parts.rgb.requires_grad
    assert seen[-1] == 1.0 and seen == sorted(seen)


def test_pieces_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = moving_scene()
    whole = render_chunked(scene, cameras(), EVERYTHING)
    monkeypatch.setattr(importlib.import_module("dream4d_engine.rendering.render"), "SAMPLES_AT_ONCE", 100)
    assert torch.allclose(render_chunked(scene, cameras(), EVERYTHING).rgb, whole.rgb, atol=1e-6)


def test_pieces_suit_the_memory_that_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module, card = importlib.import_module("dream4d_engine.rendering.render"), torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=79 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    found = []
    for budget in (None, 12 * 2**30, 2**30, None):
        limit_memory(card, budget)
        found.append(module._gpu_factor(card))
    assert found == [19, 3, 1, 19]


def test_pruning_hardly_shows() -> None:
    scene = static_scene()
    everything = render(scene, cameras(), RenderOptions(prune=False))
    assert (render(scene, cameras()).rgb - everything.rgb).abs().max() < 0.02
    scene.refresh_occupancy()
    pruned = render(scene, cameras())
    assert (pruned.rgb - everything.rgb).abs().max() < 0.02
    assert len(pruned.weights) < 0.3 * len(everything.weights)
    empty_cells_only = render(scene, cameras(), RenderOptions(alpha_threshold=0.0))
    assert len(pruned.weights) < len(empty_cells_only.weights) < len(everything.weights)


def test_zero_deformation_is_the_static_scene() -> None:
    static = static_scene()
    moving = static.with_deformation(MOTION, generator(1))
    for options in (RenderOptions(), RenderOptions(prune=False)):
        a, b = render(static, cameras(), options), render(moving, cameras(), replace(options, displacement=True))
        assert torch.allclose(a.rgb, b.rgb, atol=1e-5) and torch.allclose(a.depth, b.depth, atol=1e-4)
        assert (b.displacement == 0).all()


def test_time_means_nothing_to_a_static_scene_and_much_to_a_moving_one() -> None:
    for scene, same in ((static_scene(), True), (moving_scene(), False)):
        first = render(scene, cameras().at_time(0.0)).rgb
        assert torch.equal(first, render(scene, cameras().at_time(0.8)).rgb) is same


def test_same_seed_same_image_bit_for_bit_with_its_gradient() -> None:
    scene, options = moving_scene(), RenderOptions(stratified=True, ray_jitter=0.01)
    results = []
    for seed in (3, 3, 4):
        scene.zero_grad()
        output = render(scene, cameras(), options, generator(seed))
        output.rgb.square().sum().backward()
        results.append((output.rgb, scene.canonical.grid.table.grad, scene.deformation.grid.table.grad))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    with pytest.raises(ValueError, match="need a generator"):
        render(scene, cameras(), options)


@pytest.mark.parametrize(
    "options", [EVERYTHING, RenderOptions(ray_jitter=0.01), RenderOptions(background=torch.ones(3))]
)
@pytest.mark.parametrize("rays_at_once", [100, 1000])
def test_rendering_slices_twice_gives_the_same_gradient(options: RenderOptions, rays_at_once: int) -> None:
    scene, options = moving_scene(), replace(options, stratified=True)

    def rendered(options: RenderOptions) -> dict[str, torch.Tensor]:
        scene.zero_grad()
        output = render(scene, cameras(), options, generator(9))
        images = {name: getattr(output, name) for name in _IMAGES}
        present = [image for image in images.values() if image is not None]
        torch.cat([(p * torch.randn(p.shape, generator=generator(3))).flatten() for p in present]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in scene.named_parameters() if p.grad is not None}
        return gradients | {name: p.detach() for name, p in images.items() if p is not None}

    at_once, sliced = rendered(options), rendered(replace(options, rays_at_once=rays_at_once))
    assert at_once.keys() == sliced.keys() and {"rgb", "deformation.grid.table"} <= at_once.keys()
    for name, values in at_once.items():
        torch.testing.assert_close(sliced[name], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()), msg=name)


@pytest.mark.parametrize(("n", "size", "shares"), [(3, 2, (2, 1)), (1, 4, (0.25,) * 4)])
@pytest.mark.parametrize("prefetched", [False, True])
def test_shares_of_several_processes_make_up_the_images_and_the_gradient(n, size, shares, prefetched) -> None:
    scene = moving_scene()
    # so little is solid that a quarter of the image has no samples at all
    scene.occupancy.occupied.zero_()
    scene.occupancy.occupied[7:9, 7:9, 7:9] = True
    view = prepare_view(scene, cameras(12, n), replace(EVERYTHING, stratified=True), generator(9))
    weights = torch.randn(*view.rays.shape, 3, generator=generator(3))

    def rendered(view: View) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scene.zero_grad()
        if prefetched:
            view = replace(view, samples=prefetch_samples(scene, view, None).take()[0])
        output = render_view(scene, view)
        (weights * (output.rgb + output.normals + output.displacement)).sum().backward()
        images = torch.cat((output.rgb, output.normals, output.displacement, output.depth), -1).detach()
        return images, {name: p.grad.clone() for name, p in scene.named_parameters()}

    images, gradients = rendered(view)
    parts = [replace(view, division=Division(rank, size, rehearsed=True)) for rank in range(size)]
    assert parts[0].rays_of_each == tuple(int(144 * share) for share in shares)
    found = [rendered(part) for part in parts]
    torch.testing.assert_close(torch.stack([one for one, _ in found]).sum(0), images, rtol=0, atol=1e-6)
    assert images.any() and (n > 1 or not found[0][0][..., 3:].any()), "nothing in the first quarter"
    for name, whole in gradients.items():
        summed = torch.stack([one[name] for _, one in found]).sum(0)
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()), msg=name)


@pytest.mark.parametrize("options", [RenderOptions(), RenderOptions(stratified=True), RenderOptions(prune=False)])
def test_samples_are_counted_a_few_rays_at_a_time(monkeypatch, options) -> None:
    scene = moving_scene()
    view = prepare_view(scene, cameras(12, 2), options, generator(9))
    module, most = importlib.import_module("dream4d_engine.rendering.render"), []
    sample = module.sample_rays

    def observed(*given):
        found = sample(*given)
        most.append(len(found.t_starts))
        return found

    monkeypatch.setattr(module, "LATTICE_AT_ONCE", 100 * CONFIG.n_samples)
    monkeypatch.setattr(module, "sample_rays", observed)
    found = count_samples(scene, view)
    assert len(most) == 3 and max(most) < sum(most)
    assert found == len(render_view(scene, view).samples.t_starts) > 0


def test_stratified_samples_stay_one_step_apart() -> None:
    scene = static_scene()
    output = render(scene, cameras(), RenderOptions(stratified=True, prune=False), generator())
    step, samples = CONFIG.step_size(), output.samples
    assert torch.allclose(samples.t_ends - samples.t_starts, torch.tensor(step), atol=1e-5)
    same_ray = samples.ray_indices.diff() == 0
    assert torch.allclose(samples.t_starts.diff()[same_ray], torch.tensor(step), atol=1e-5)
    assert (samples.t_starts / step % 1).std() > 0.2


def test_backgrounds_by_group_and_wrong_ones() -> None:
    scene = static_scene()
    two = cameras(6, 4).reshape(2, 2)
    colors = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    output = render(scene, two, RenderOptions(background=colors))
    assert torch.equal(output.background, colors[:, None, None, None].expand(2, 2, 6, 6, 3))
    with pytest.raises(ValueError, match=r"shape \[3\] or \[2, 3\]"):
        render(scene, two, RenderOptions(background=torch.zeros(4)))
    with pytest.raises(ValueError, match="n_samples"):
        RenderOptions(n_samples=0)


def test_a_view_past_the_object_is_background_and_trains() -> None:
    scene = build_scene(replace(CONFIG, background=BackgroundConfig(color=(1.0, 1.0, 1.0))), generator())
    with torch.no_grad():
        scene.occupancy.occupied.fill_(False)
    output = render(scene, cameras(6))
    assert torch.equal(output.rgb, torch.ones_like(output.rgb)) and len(output.weights) == 0
    output.rgb.sum().backward()
    assert torch.equal(render_chunked(scene, cameras(6)).rgb, torch.ones_like(output.rgb))


def test_a_few_steps_make_a_blob_red() -> None:
    scene = static_scene()
    optimiser = torch.optim.Adam(scene.parameters(), lr=0.02)
    for step in range(25):
        output = render(scene, cameras(8), RenderOptions(stratified=True), generator(step))
        loss = (output.rgb - torch.tensor([0.9, 0.1, 0.1])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.01


def test_images_for_people() -> None:
    output = render_chunked(moving_scene(), cameras(), EVERYTHING)
    for kind in KINDS:
        shown = image_of(output, kind)
        assert shown.shape == (1, 3, 12, 12, 3) and shown.min() >= 0 and shown.max() <= 1 and shown.std() > 0
    with pytest.raises(ValueError, match="unknown kind"):
        image_of(output, "albedo")
    with pytest.raises(ValueError, match="holds no normals"):
        image_of(render(static_scene(), cameras(4)), "normals")


def test_near_is_bright_and_no_motion_is_grey() -> None:
    depth = torch.tensor([[2.0], [3.0], [4.0], [0.0]])
    opacity = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    shown = depth_image(depth, opacity)[:, 0]
    assert shown[0] == 1 and shown[0] > shown[1] > shown[2] > shown[3] == 0
    assert (depth_image(depth, torch.zeros(4, 1)) == 0).all()
    assert (displacement_image(torch.zeros(2, 3)) == 0.5).all()
