"""Volume rendering of a scene, for training (with gradient, all rays at once) and for looking at it (in chunks).

Along a ray: w_i = alpha_i * prod_{j<i} (1 - alpha_j); rgb = sum w c + (1 - sum w) * background; depth = sum w t;
displacement and normals are sum w d and sum w n; z_variance = sum w (t - depth)^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..cameras import CameraBatch
from ..columns import side_by_side
from ..division import WHOLE, Division
from ..machine import allowed_memory
from ..randomness import Source, draw_rows
from ..rays import RayBundle, RaySamples, rays_from_cameras
from ..scene import FieldOutput, Scene
from ..transfers import send
from .march import PrefetchedSamples, cull_invisible, is_visible, points_of, prefetch_visible, sample_rays

SAMPLES_AT_ONCE = 2**18
"""Points queried together where no gradient is kept, on a CPU; a GPU wants more to do at once."""
PREFETCH_AT_ONCE = 2**19
"""Points queried together ahead of a step, while the step before still holds its memory; more where there is plenty."""
LATTICE_AT_ONCE = 2**22
"""Rays times samples a ray of one chunk, at most, likewise."""
GPU_SHARE = 2**32
"""So many times more on a GPU as the memory it may take has such pieces of 4 GiB: some twentieth is then in use."""


@dataclass(frozen=True)
class RenderOptions:
    """How to render."""

    n_samples: int | None = None  # fixes the step (1.732 * 2 * radius / n_samples); None for the scene's own
    stratified: bool = False  # jitter each ray's lattice by a random share of the step (needs a generator)
    prune: bool = True  # skip empty cells, and samples less opaque than the threshold
    alpha_threshold: float = 0.01  # 0 skips that second look
    normals: bool = False  # composite these too
    displacement: bool = False
    z_variance: bool = False
    background: Tensor | None = None  # a colour [3], or [B, 3] one for each group, instead of the scene's background
    ray_jitter: float = 0.0  # standard deviation of a normal offset on the rays' directions (needs a generator)
    # With gradient: slices of so many rays, each rendered once more in the backward pass instead of keeping what that
    # needs. None: all at once, everything kept.
    rays_at_once: int | None = None
    # In `render_chunked` on a GPU, encodings and networks in half precision, as in training (`render` itself does as
    # the autocast around it says).
    half: bool = False

    def __post_init__(self) -> None:
        for name in ("n_samples", "rays_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class RenderOutput:
    """Images [B, F, H, W, channels]. Sums along rays are not divided by the opacity."""

    rgb: Tensor  # 3 channels, over the background
    opacity: Tensor  # 1, sum w
    depth: Tensor  # 1, sum w t
    background: Tensor  # 3
    z_variance: Tensor | None = None  # 1, sum w (t - depth)^2; this and the following where they were asked for
    normals: Tensor | None = None  # 3, sum w n
    displacement: Tensor | None = None  # 3, sum w d; None for a static scene
    samples: RaySamples | None = None  # S of them, only where all rays went at once
    weights: Tensor | None = None  # [S], w of these


_IMAGES = tuple(f.name for f in fields(RenderOutput) if f.name not in ("samples", "weights"))


@dataclass(frozen=True)
class GradientFrames:
    """Frames of takes through which a step's gradient goes, and how much more that counts for those left out.

    Where every frame is drawn as often, `factor` is one over how often: the mean over the draws is the whole gradient,
    whatever the loss. What is rendered stays the same.
    """

    frames: Tensor  # [B, F] bool, on the CPU
    rays: Tensor  # [N] bool, of their rays
    factor: float


@dataclass(frozen=True)
class View:
    """What cameras [B, F] are going to see: all that is random about it has been drawn."""

    cameras: CameraBatch  # [B, F]
    options: RenderOptions
    rays: RayBundle  # N = B * F * H * W
    background: Tensor | None  # [N, 3], or None for the scene's own
    jitter: Tensor | None  # [N] in [0, 1), of each ray's lattice
    apparent_area: float = 1.0  # of the cameras, see there: the number of samples is about proportional to it
    samples: RaySamples | None = None  # what is on the rays, if that is known already
    gradient: GradientFrames | None = None  # None: all frames carry it
    division: Division = WHOLE  # among processes with the same view; samples are of this one's rays

    @property
    def rays_of_each(self) -> tuple[int, ...]:
        """How many rays each process renders: whole images, where there is one for everybody."""
        n_groups, n_frames, height, width = self.rays.shape
        return self.division.counts(n_groups * n_frames, height * width)

    @property
    def carried(self) -> Tensor | None:
        """[B, F] bool, on the CPU: which frames carry gradient; None: all."""
        return None if self.gradient is None else self.gradient.frames


def prepare_view(scene: Scene, cameras: CameraBatch, options: RenderOptions, source: Source | None = None) -> View:
    """Cast the rays and draw what is random."""
    if source is None and (options.stratified or options.ray_jitter > 0):
        raise ValueError("stratified rendering and ray jitter need a generator")
    # on a GPU the cameras would have to be waited for
    apparent_area = cameras.apparent_area() if cameras.c2w.device.type == "cpu" else 1.0
    cameras = cameras.to(scene.device)
    rays = rays_from_cameras(cameras, options.ray_jitter, source)
    jitter = None
    if options.stratified:
        assert source is not None  # refused above
        jitter = send(draw_rows(torch.rand, (len(rays.origins),), source), scene.device)
    return View(cameras, options, rays, _given_background(rays, options), jitter, apparent_area)


def prefetch_samples(scene: Scene, view: View, capacity: int | None) -> PrefetchedSamples:
    """Begin to find the samples of a view that is rendered later, with the scene as it is now.

    `capacity`: how many intervals there may be on the rays, None: as many as there are, for which a GPU is waited for.
    Raises a ValueError where samples aren't chosen by a first look, or are found again for each part of the rays.
    """
    view = _own(view)
    options, rays = view.options, view.rays
    if not (options.prune and options.alpha_threshold > 0) or options.rays_at_once is not None:
        raise ValueError("samples are found ahead only where rays are pruned by a first look and rendered all at once")
    if capacity is None:
        capacity = len(sample_rays(scene, rays, options.n_samples, view.jitter).t_starts)
    at_once = PREFETCH_AT_ONCE * max(1, _gpu_factor(scene.device) // 8)
    return prefetch_visible(scene, rays, options.n_samples, view.jitter, options.alpha_threshold, at_once, capacity)


def render_view(scene: Scene, view: View) -> RenderOutput:
    """Render all rays of a view, differentiably; at once where its options don't say otherwise.

    Where the view is divided among processes each renders its own rays, and all have the images.
    """
    rays_at_once, mine = view.options.rays_at_once, _own(view)
    if rays_at_once is None or not torch.is_grad_enabled():
        output = _render_rays(scene, mine)
    else:
        output = _render_checkpointed(scene, mine, rays_at_once)
    images = _images(output)
    if view.division.size > 1:
        whole = view.division.gather(torch.cat(list(images.values()), -1), view.rays_of_each)  # in one message
        columns = whole.split([image.shape[-1] for image in images.values()], -1)
        images = dict(zip(images, columns, strict=True))
        output = replace(output, samples=None, weights=None)
    shape = view.rays.shape  # [N, c] -> [B, F, H, W, c]
    images = {name: image.reshape(*shape, image.shape[-1]) for name, image in images.items()}
    return replace(output, samples=output.samples, **images)


def _own(view: View) -> View:
    """Of a view that is divided among processes, this one's rays."""
    if view.division.size == 1:
        return view
    return replace(_slice(view, view.division.own(view.rays_of_each)), samples=view.samples)


def render(
    scene: Scene,
    cameras: CameraBatch,
    options: RenderOptions | None = None,
    source: Source | None = None,
) -> RenderOutput:
    """Prepare a view and render it."""
    return render_view(scene, prepare_view(scene, cameras, options or RenderOptions(), source))


@torch.no_grad()
def render_chunked(
    scene: Scene,
    cameras: CameraBatch,
    options: RenderOptions | None = None,
    chunk_rays: int | None = None,
    on_progress: Callable[[float], None] | None = None,
    source: Source | None = None,
) -> RenderOutput:
    """Render images of any size in bounded memory, without gradient; the images are on CPU.

    `chunk_rays` None: as many rays at once as suit the device. `on_progress` is called with the share of the rays done.
    """
    options = options or RenderOptions()
    view = prepare_view(scene, cameras, options, source)
    n_rays = len(view.rays.origins)
    size = _rays_of_a_chunk(scene, options, chunk_rays)
    parts = []
    for start in range(0, n_rays, size):
        with torch.autocast("cuda", torch.float16, enabled=options.half and scene.device.type == "cuda"):
            images = _images(_render_rays(scene, _slice(view, slice(start, start + size))))
        parts.append(torch.cat(list(images.values()), -1).cpu())  # one copy: each makes the host wait
        if on_progress is not None:
            on_progress(min(1.0, (start + size) / n_rays))
    columns = torch.cat(parts).split([image.shape[-1] for image in images.values()], -1)
    whole = {name: column.reshape(*view.rays.shape, -1) for name, column in zip(images, columns, strict=True)}
    return RenderOutput(**whole)


@torch.no_grad()
def count_samples(scene: Scene, view: View) -> int:
    """How many samples of a view are looked at with gradient where it is rendered so; found in bounded memory."""
    options, n_samples = view.options, 0
    size = _rays_of_a_chunk(scene, options, None)
    for start in range(0, len(view.rays.origins), size):
        part = _slice(view, slice(start, start + size))
        n_samples += len(_find_samples(scene, part, options.prune and options.alpha_threshold > 0).t_starts)
    return n_samples


def _find_samples(scene: Scene, view: View, look_first: bool) -> RaySamples:
    """The samples of all rays; with a first look, those that are opaque enough."""
    options = view.options
    samples = sample_rays(scene, view.rays, options.n_samples, view.jitter, options.prune)
    if not look_first:
        return samples
    return cull_invisible(scene, view.rays, samples, options.alpha_threshold, _samples_at_once(scene))


def _rays_of_a_chunk(scene: Scene, options: RenderOptions, wished: int | None) -> int:
    """So many rays at once, or as many as suit the device."""
    more = _gpu_factor(scene.device)
    lattice_rays = more * LATTICE_AT_ONCE // (options.n_samples or scene.config.n_samples)  # if no cell is empty
    return max(1, min(wished or more * 2**15, lattice_rays))


def _render_checkpointed(scene: Scene, view: View, rays_at_once: int) -> RenderOutput:
    """Render slices of the rays now, and once more when the backward pass comes to them."""

    def draw(part: View) -> dict[str, Tensor]:
        return _images(_render_rays(scene, part))

    parts = []
    for start in range(0, len(view.rays.origins), rays_at_once):
        part = _slice(view, slice(start, start + rays_at_once))
        # nothing is drawn while rendering, so there is no state of random numbers to bring back
        parts.append(checkpoint(draw, part, use_reentrant=False, preserve_rng_state=False))
    return RenderOutput(samples=None, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _slice(view: View, rows: slice) -> View:
    """Some of a view's rays; their samples are to be found."""
    rays, background, jitter, gradient = view.rays, view.background, view.jitter, view.gradient
    return replace(
        view,
        rays=replace(rays, origins=rays.origins[rows], directions=rays.directions[rows], times=rays.times[rows]),
        background=None if background is None else background[rows],
        jitter=None if jitter is None else jitter[rows],
        samples=None,
        gradient=None if gradient is None else replace(gradient, rays=gradient.rays[rows]),
    )


def _images(output: RenderOutput) -> dict[str, Tensor]:
    """The images that there are, by name."""
    return {name: getattr(output, name) for name in _IMAGES if getattr(output, name) is not None}


def _given_background(rays: RayBundle, options: RenderOptions) -> Tensor | None:
    """Return the overriding background [N, 3], or None."""
    if options.background is None:
        return None
    color, n_groups = options.background.to(rays.origins), rays.shape[0]
    if color.shape not in ((3,), (n_groups, 3)):
        raise ValueError(f"a background colour has shape [3] or [{n_groups}, 3], got {list(color.shape)}")
    per_group = len(rays.origins) // n_groups
    return color.expand(n_groups, 3).repeat_interleave(per_group, 0)


def _render_rays(scene: Scene, view: View) -> RenderOutput:
    """Render N rays to flat images [N, channels]."""
    options, rays, samples = view.options, view.rays, view.samples
    thin_out = options.prune and options.alpha_threshold > 0
    look_first = thin_out and (torch.is_grad_enabled() or options.normals)
    if samples is None:
        samples = _find_samples(scene, view, look_first)
    gradient = view.gradient if torch.is_grad_enabled() else None
    points, times = points_of(rays, samples)

    def query(rows: slice | Tensor) -> dict[str, Tensor | None]:
        found = _query(scene, points[rows], times[rows], options)
        return {f.name: getattr(found, f.name) for f in fields(FieldOutput)}

    carried = None if gradient is None else gradient.rays.index_select(0, samples.ray_indices)
    found = FieldOutput(**_where_carried(query, carried, gradient))
    density = found.density
    if thin_out and not look_first:  # one look is enough: what is too transparent becomes empty
        density = density * is_visible(density, samples, options.alpha_threshold)
    background = view.background
    if background is None:

        def behind(rows: slice | Tensor) -> dict[str, Tensor | None]:
            return {"rgb": scene.background(rays.directions[rows], scene.kernels)}

        background = _where_carried(behind, None if gradient is None else gradient.rays, gradient)["rgb"]
    return _composite(scene, samples, replace(found, density=density), background, options)


def _where_carried(
    ask: Callable[[slice | Tensor], dict[str, Tensor | None]], carried: Tensor | None, gradient: GradientFrames | None
) -> dict[str, Any]:
    """Ask for all rows, keeping gradient, times its factor, for those that are `carried` [n] alone."""
    if carried is None or gradient is None:
        return ask(slice(None))
    rows, rest = carried.nonzero().flatten(), (~carried).nonzero().flatten()
    if not len(rows):
        with torch.no_grad():
            return ask(rest)
    moved, together = ask(rows), {}  # first: autocast keeps the weights that it casts, with or without gradient
    with torch.no_grad():
        still = ask(rest)
    for name, value in moved.items():
        other = still[name]
        if value is not None and other is not None:
            if value.requires_grad:
                value = value.view_as(value)  # the others may depend on what it was: displacements move densities
                value.register_hook(lambda grad: grad * gradient.factor)
            whole = value.new_empty(len(carried), *value.shape[1:])
            together[name] = whole.index_copy(0, rest, other.to(value.dtype)).index_copy(0, rows, value)
    return together


def _query(scene: Scene, points: Tensor, times: Tensor, options: RenderOptions) -> FieldOutput:
    """Query the scene at points [S, 3] and times [S], in pieces where no gradient is kept."""
    at_once = _samples_at_once(scene)
    if torch.is_grad_enabled() or len(points) <= at_once:
        return scene.query(points, times, options.normals)
    pieces = zip(points.split(at_once), times.split(at_once), strict=True)
    parts = [scene.query(p, t, options.normals) for p, t in pieces]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(FieldOutput)}
    return FieldOutput(**{name: torch.cat(c) for name, c in columns.items() if c[0] is not None})


def _samples_at_once(scene: Scene) -> int:
    return SAMPLES_AT_ONCE * _gpu_factor(scene.device)


def _gpu_factor(device: torch.device) -> int:
    """How many times more than on a CPU is done at once."""
    if device.type != "cuda":
        return 1
    return max(1, allowed_memory(device) // GPU_SHARE)


def _composite(
    scene: Scene, samples: RaySamples, found: FieldOutput, background: Tensor, options: RenderOptions
) -> RenderOutput:
    """Sum what was found along the rays."""
    middles = samples.middles[:, None]
    displacement = found.displacement if options.displacement else None
    columns = [found.rgb, torch.ones_like(middles), middles]  # their sums: colour, opacity, depth
    columns += [extra for extra in (found.normals, displacement) if extra is not None]
    intervals = samples.ray_indices, samples.t_starts, samples.t_ends, samples.n_rays
    weights, sums = scene.kernels.composite(found.density, side_by_side(*columns), *intervals)  # [S], [N, 5 or more]
    rgb, opacity, depth, *extras = sums.split([column.shape[-1] for column in columns], -1)
    z_variance = None
    if options.z_variance:  # HiFA 2305.18766, section 3.2
        spread = weights[:, None] * (middles - depth.index_select(0, samples.ray_indices)) ** 2
        z_variance = scene.kernels.accumulate(spread, samples.ray_indices, samples.n_rays)
    return RenderOutput(
        rgb=rgb + (1 - opacity) * background,
        opacity=opacity,
        depth=depth,
        background=background,
        z_variance=z_variance,
        normals=extras.pop(0) if found.normals is not None else None,
        displacement=extras.pop(0) if displacement is not None else None,
        samples=samples,
        weights=weights,
    )
