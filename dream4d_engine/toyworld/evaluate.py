"""How near a result is to the truth of its caption: colour, silhouette, faces, motion.

A result is a function from cameras to images over black; the truth is the toy world's own images from the same
cameras. Everything is measured at fov_y 40 degrees and distance 3, where the world's captions are drawn.

An empty result (no pixel is half covered) scores 0 everywhere: no view has the right colour, every IoU is 0, there
are no faces, and motion correlation and amplitude are 0. Nothing is ever NaN.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..cameras import CameraBatch, fixed_take, orbit
from ..rendering import RenderOptions, render_chunked
from ..scene import Scene
from ..surface.motion import SurfaceMotion, follow_surface
from ..training.config import ReferenceConfig
from ..training.reference import Reference, reference_targets
from .captions import COLORS, MOTIONS, SHAPES, Caption, as_caption
from .motions import world_from_canonical
from .world import render_caption

SCALES = tuple(round(0.75 + 0.025 * i, 3) for i in range(25))
"""The common scales that are tried on a result's silhouettes: 0.75 to 1.35."""

_N_PAIRS = 4096  # of points whose distances are compared


@dataclass(frozen=True)
class Images:
    """What a result shows: rgb [B, F, H, W, 3] composited over black, opacity [B, F, H, W, 1]."""

    rgb: Tensor
    opacity: Tensor


@dataclass(frozen=True)
class SurfaceErrors:
    """How far the points of a scene's surface are from where the true motion carries them; lengths in the object's
    sizes (see `surface_errors`). The mean is over points, or pairs of them, and moments; `worst` is the mean over
    them at the worst moment.

    Args:
        place_error, worst_place_error: |x - y|, x where a point is and y where the truth carries it from its rest.
        rigidity_error, worst_rigidity_error: by how much the distance of two points differs from the true one,
            ||x_i - x_j| - |y_i - y_j||, over pairs from all over the object. Where the true motion is rigid (still,
            jumping, sliding, spinning) |y_i - y_j| is the distance at rest, and 0.03 says that distances change by
            3 % of the size.
    """

    place_error: float
    worst_place_error: float
    rigidity_error: float
    worst_rigidity_error: float


Renderer = Callable[[CameraBatch], Images]
"""From cameras to anything with the fields of `Images`; a function of the cameras' times too."""


@dataclass(frozen=True)
class Evaluation:
    """The measures of one result; the functions of this module say how each is defined.

    Args:
        caption: what it was asked to be.
        colors: the named colour nearest to each view, "none" where there is none. colors_right: how many are right.
        iou: mean silhouette IoU over the views after the best scale and shift; iou_per_view; raw_iou: the mean
            without them. scale: the best one, which makes the result as large as the truth.
        n_faces: of the circle of azimuths. face_azimuth_deg: of the strongest, None without a face.
        face_strength: its peak area relative to the truth's; face_profile: the area at each azimuth, in the same
            unit. one_face_in_front: see `find_faces`.
        motion_correlation: of the motion's signal with the truth's, None for a still caption (or n_times 0).
        motion_amplitude: standard deviation of the signal over the truth's; for a still caption the largest of all
            signals, each over that of the caption that makes it (0 is still); None with n_times 0.
        stray_motion: the largest deviation of the *other* signals from the truth's, in the same units.
        signal, true_signal: the motion's signal at each time, without its mean (a still one's strongest).
        clip_iou, clip_iou_per_time: silhouette IoU over the clip from the front, by the scale of the views and the
            shift of its first frame.
        surface: how far the points of a scene's surface are from the truth; None with n_times 0, and for what is no
            scene or an empty one.
    """

    caption: str
    colors: tuple[str, ...]
    colors_right: int
    iou: float
    iou_per_view: tuple[float, ...]
    raw_iou: float
    scale: float
    n_faces: int
    face_azimuth_deg: float | None
    face_strength: float
    face_profile: tuple[float, ...]
    one_face_in_front: bool
    motion_correlation: float | None
    motion_amplitude: float | None
    stray_motion: float | None
    signal: tuple[float, ...]
    true_signal: tuple[float, ...]
    clip_iou: float | None
    clip_iou_per_time: tuple[float, ...]
    surface: SurfaceErrors | None = None

    def to_dict(self) -> dict:
        """Plain values, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line for people."""
        faces = "1 face in front" if self.one_face_in_front else f"{self.n_faces} faces"
        if self.n_faces and not self.one_face_in_front:
            faces += f" (at {self.face_azimuth_deg:.0f} deg)"
        line = f"{self.caption}: colour {self.colors_right}/{len(self.colors)}, IoU {self.iou:.2f}, {faces}"
        if self.clip_iou is None:
            return line
        correlation = "" if self.motion_correlation is None else f"correlation {self.motion_correlation:.2f}, "
        line += f", motion {correlation}amplitude {self.motion_amplitude:.2f}, clip IoU {self.clip_iou:.2f}"
        if self.surface is None:
            return line
        places, distances = self.surface.place_error, 100 * self.surface.rigidity_error
        return f"{line}, places off by {places:.2f} of the size, distances by {distances:.1f} %"


# --- images


def true_renderer(
    caption: Caption | str, strength: float = 1.0, mark_azimuths_deg: tuple[float, ...] = (0.0,), supersample: int = 2
) -> Renderer:
    """The toy world itself as a result; the arguments are those of `render_caption`."""

    def renderer(cameras: CameraBatch) -> Images:
        image = render_caption(
            caption, cameras, supersample, (0.0, 0.0, 0.0), strength, mark_azimuths_deg=mark_azimuths_deg
        )
        return Images(image.rgb, image.mask)

    return renderer


def frames_of(renderer: Renderer, cameras: CameraBatch) -> tuple[Tensor, Tensor]:
    """Render one group [1, F]; return the object's own colour [F, H, W, 3] and opacity [F, H, W] on the CPU, no NaN."""
    images = renderer(cameras)
    opacity = images.opacity[0, ..., 0].detach().float().cpu().nan_to_num(0).clamp(0, 1)
    rgb = images.rgb[0].detach().float().cpu().nan_to_num(0)
    return (rgb / opacity.clamp(min=1e-3)[..., None]).clamp(0, 1), opacity


def darkness(color: Tensor, opacity: Tensor) -> Tensor:
    """Return [F, H, W] how much of a dark mark each pixel is, in [0, 1]; 0 where it is not half covered.

    By the pixel's largest channel as a share of the body's (the 80 % quantile over the silhouettes of all images
    together, so that an object darker than the truth is not all mark): 1 below 0.3, 0 above 0.65, linear between,
    so that a blurred or greyish mark still counts in part. The baked light's shades are above 0.7.
    """
    solid = opacity > 0.5
    if not solid.any():
        return torch.zeros_like(opacity)
    value = color.amax(-1)
    # Tensor.quantile takes at most 2^24 values; sorting has no such limit
    values = value[solid].sort().values
    body = values[int(0.8 * (len(values) - 1))].clamp(min=1e-3)
    return ((0.65 - value / body) / 0.35).clamp(0, 1) * solid


# --- colour


def nearest_color(rgb: tuple[float, float, float]) -> str:
    """Return the name of a colour: "white", the nearest hue of the others, or "none" for black and grey.

    Darkness and paleness do not matter: with a saturation (of HSV) of 0.2 or more the hue decides; below it the
    colour is white if its value is at least 0.55. The named hues' saturations are all above 0.8, and the darkest
    shade of white has the value 0.66.
    """
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    if value < 0.12 or (saturation < 0.2 and value < 0.55):
        return "none"
    if saturation < 0.2:
        return "white"

    def difference(name: str) -> float:
        turn = abs(hue - colorsys.rgb_to_hsv(*COLORS[name])[0])
        return min(turn, 1 - turn)

    return min((name for name in COLORS if name != "white"), key=difference)


def view_colors(color: Tensor, opacity: Tensor) -> tuple[str, ...]:
    """Return the named colour of each image: of the mean over its silhouette without the mark."""
    body = (opacity > 0.5) & (darkness(color, opacity) < 0.1)
    return tuple(
        nearest_color(tuple(image[mask].mean(0).tolist())) if mask.any() else "none"
        for image, mask in zip(color, body, strict=True)
    )


# --- silhouettes


def _scaled(opacity: Tensor, scale: float) -> Tensor:
    """Magnify images [F, H, W] about their middle."""
    if scale == 1.0:
        return opacity
    theta = torch.tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]]).expand(len(opacity), 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [len(opacity), 1, *opacity.shape[1:]], align_corners=False)
    return torch.nn.functional.grid_sample(opacity[:, None], grid, align_corners=False)[:, 0]


def _best_shift(mask: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's best IoU [F] over all whole-pixel shifts and that shift [F, 2] (rows, columns).

    By Fourier cross correlation of the masks [F, H, W] (0 or 1), padded so that nothing wraps around.
    """
    height, width = mask.shape[1:]
    size = (2 * height, 2 * width)
    spectrum = torch.fft.rfft2(truth, s=size) * torch.fft.rfft2(mask, s=size).conj()
    overlap = torch.fft.irfft2(spectrum, s=size).round()
    # among equal overlaps prefer the smallest shift
    rows, columns = torch.fft.fftfreq(size[0], 1 / size[0]), torch.fft.fftfreq(size[1], 1 / size[1])
    length = (rows[:, None] ** 2 + columns[None] ** 2).sqrt()
    best = (overlap - 1e-4 * length).flatten(1).argmax(1)
    shared = overlap.flatten(1).gather(1, best[:, None])[:, 0]
    union = mask.sum((1, 2)) + truth.sum((1, 2)) - shared
    shift = torch.stack((rows[best // size[1]], columns[best % size[1]]), -1).long()
    return torch.where(union > 0, shared / union.clamp(min=1), 0.0), shift


def _iou(mask: Tensor, truth: Tensor) -> Tensor:
    union = torch.maximum(mask, truth).sum((1, 2))
    return torch.where(union > 0, torch.minimum(mask, truth).sum((1, 2)) / union.clamp(min=1), 0.0)


def _moved(mask: Tensor, shift: Tensor) -> Tensor:
    """Shift images [F, H, W] by (rows, columns), filling with 0."""
    down, right = (int(s) for s in shift)
    height, width = mask.shape[1:]
    padded = torch.nn.functional.pad(mask, (width, width, height, height))
    return padded[:, height - down : 2 * height - down, width - right : 2 * width - right]


def _solid(opacity: Tensor) -> Tensor:
    return (opacity > 0.5).float()


def best_scale(opacity: Tensor, truth: Tensor) -> tuple[float, Tensor]:
    """Return the one scale of SCALES with the best mean IoU, and the IoU of each view [F] with its best shift.

    Silhouettes are pixels with opacity above one half. Each view has its own shift, all have the same scale.
    """
    tried = {scale: _best_shift(_solid(_scaled(opacity, scale)), _solid(truth))[0] for scale in SCALES}
    # of equally good ones the nearest to 1
    scale = max(tried, key=lambda s: (round(float(tried[s].mean()), 6), -abs(s - 1)))
    return scale, tried[scale]


def align(color: Tensor, opacity: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring images [F, H, W, 3], opacities [F, H, W] over true ones: the best scale, each view's best shift.

    Returns both and the IoU of each view [F].
    """
    scale, iou = best_scale(opacity, truth)
    opacity = _scaled(opacity, scale)
    color = torch.stack([_scaled(channel, scale) for channel in color.unbind(-1)], -1)
    shifts = _best_shift(_solid(opacity), _solid(truth))[1]
    moved = torch.cat([_moved(o[None], shift) for o, shift in zip(opacity, shifts, strict=True)])
    painted = [
        torch.cat([_moved(c[None], shift) for c, shift in zip(channel, shifts, strict=True)])
        for channel in color.unbind(-1)
    ]
    return torch.stack(painted, -1), moved, iou


# --- faces


def face_profile(color: Tensor, opacity: Tensor) -> Tensor:
    """Return the dark area of each image [F] (the sum of `darkness`) over the silhouettes' mean area.

    The mean over all images, not each one's own area: a ring seen from its side is so thin that the rest of its
    mark would look large.
    """
    area = (opacity > 0.5).float().sum((1, 2)).mean()
    return darkness(color, opacity).sum((1, 2)) / area.clamp(min=1)


def _runs(high: Tensor) -> list[list[int]]:
    """Return the runs of True on a circle as lists of places."""
    n = len(high)
    if high.all():
        return [list(range(n))]
    starts = [i for i in range(n) if high[i] and not high[i - 1]]
    runs = []
    for start in starts:
        length = next(k for k in range(n) if not high[(start + k) % n])
        runs.append([(start + k) % n for k in range(length)])
    return runs


def find_faces(profile: Tensor, true_peak: float) -> tuple[int, float | None, float, bool]:
    """Count the faces of a circle of azimuths; return (n_faces, azimuth in degrees, strength, one face in front).

    A face is a run of neighbouring azimuths whose dark area is above 0.25 of the result's own peak (and 0.1 of the
    truth's), and that somewhere reaches 0.4 of the own peak and 0.2 of the truth's. So a second face counts when it
    is nearly half as large as the first, and specks do not count. The azimuth is the area-weighted circular mean of
    the strongest run. "One face in front": exactly one run, it contains azimuth 0, and it covers at most two thirds
    of the circle (a dark band all around is no face).

    Args:
        profile: [n] dark areas at azimuths i * 360 / n. true_peak: the largest of the truth.
    """
    n, peak = len(profile), float(profile.max())
    runs = _runs((profile > max(0.25 * peak, 0.1 * true_peak)) & (profile > 0))
    runs = [run for run in runs if profile[run].max() >= max(0.4 * peak, 0.2 * true_peak)]
    if not runs:
        return 0, None, peak / max(true_peak, 1e-6), False
    strongest = max(runs, key=lambda run: float(profile[run].max()))
    angle = torch.tensor(strongest) * (2 * math.pi / n)
    weight = profile[strongest]
    azimuth = math.degrees(math.atan2(float((weight * angle.sin()).sum()), float((weight * angle.cos()).sum())))
    in_front = len(runs) == 1 and 0 in strongest and len(strongest) <= 2 * n / 3
    return len(runs), azimuth, peak / max(true_peak, 1e-6), in_front


# --- motion


def motion_signals(color: Tensor, opacity: Tensor) -> dict[str, Tensor]:
    """Return for each motion a number at each time [F] that this motion moves, seen from the front.

    In units of the image's height, with weights clamp(2 opacity - 0.5, 0, 1), so that thin fog has no part in it:
    - jumping: height of the silhouette's centroid. sliding: how far right it is.
    - stretching: standard deviation of the silhouette's heights.
    - swaying: regression slope of the silhouette's columns on its heights (its lean).
    - spinning: how far right of the silhouette's centroid the mark's centroid is.
    Where there is no silhouette (no mark) the values are 0.
    """
    weight = (2 * opacity - 0.5).clamp(0, 1)
    height, width = weight.shape[1:]
    right = ((torch.arange(width) + 0.5 - width / 2) / height).expand(height, width)
    up = (-(torch.arange(height) + 0.5 - height / 2) / height)[:, None].expand(height, width)

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)

    middle, level = mean(right, weight), mean(up, weight)
    across, along = right - middle[:, None, None], up - level[:, None, None]
    variance = mean(along**2, weight)
    mark = weight * darkness(color, opacity)
    seen = mark.sum((1, 2)) > 0
    return {
        "jumping": level,
        "sliding": middle,
        "stretching": variance.sqrt(),
        "swaying": mean(across * along, weight) / variance.clamp(min=1e-6),
        "spinning": torch.where(seen, mean(right, mark) - middle, 0.0),
    }


def _spread(signal: Tensor) -> float:
    return float(signal.std(correction=0))


def correlation(signal: Tensor, truth: Tensor) -> float:
    """Return Pearson's correlation; 0 where the signal's spread is below 2 % of the truth's (noise, not motion)."""
    if _spread(signal) <= max(0.02 * _spread(truth), 1e-7):
        return 0.0
    a, b = signal - signal.mean(), truth - truth.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def _motion_scales(caption: Caption, cameras: CameraBatch) -> dict[str, float]:
    """The spread of each motion's own signal when this object makes that motion: the unit of amplitudes."""
    scales = {}
    for motion in MOTIONS[1:]:
        moving = true_renderer(Caption(caption.color, caption.shape, motion))
        scales[motion] = max(_spread(motion_signals(*frames_of(moving, cameras))[motion]), 1e-6)
    return scales


@dataclass(frozen=True)
class _Clip:
    correlation: float | None
    amplitude: float
    stray: float
    signal: Tensor
    true_signal: Tensor
    iou: Tensor


def _evaluate_clip(renderer: Renderer, caption: Caption, cameras: CameraBatch, scale: float) -> _Clip:
    """Measure the motion from one fixed camera [1, F]; see Evaluation and motion_signals."""
    color, opacity = frames_of(renderer, cameras)
    true_color, true_opacity = frames_of(true_renderer(caption), cameras)
    signals, truth = motion_signals(color, opacity), motion_signals(true_color, true_opacity)
    units = _motion_scales(caption, cameras)
    stray = {motion: _spread(signals[motion] - truth[motion]) / units[motion] for motion in units}
    mask, true_mask = _solid(_scaled(opacity, scale)), _solid(true_opacity)
    shift = _best_shift(mask[:1], true_mask[:1])[1][0]
    iou = _iou(_moved(mask, shift), true_mask)
    if not (opacity > 0.5).any():
        return _Clip(None if caption.motion == "still" else 0.0, 0.0, 0.0, 0 * opacity[:, 0, 0], 0 * iou, iou)
    if caption.motion == "still":
        shown = max(stray, key=stray.__getitem__)
        match, amplitude = None, stray[shown]
    else:
        shown = caption.motion
        match = correlation(signals[shown], truth[shown])
        amplitude = _spread(signals[shown]) / max(_spread(truth[shown]), 1e-6)
        del stray[shown]
    return _Clip(match, amplitude, max(stray.values()), signals[shown], truth[shown], iou)


def surface_errors(motion: SurfaceMotion, caption: Caption | str) -> SurfaceErrors | None:
    """Compare points of a scene's surface with where the caption's motion carries them; None where there are none.

    A point's true way starts at its rest, where it would be if only the zoom of the deformation displaced it, and is
    the toy world's own: nothing is scaled or shifted to fit.
    """
    n = len(motion.rest)
    if not n:
        return None
    caption, times = as_caption(caption), motion.times.to(motion.rest)
    moves, shape = (
        torch.full_like(times, index, dtype=torch.int64)
        for index in (MOTIONS.index(caption.motion), SHAPES.index(caption.shape))
    )
    affine = world_from_canonical(moves, shape, times)
    # summed by hand: a matrix product may be rounded to fewer digits on a GPU
    truth = (affine[:, None, :3, :3] * motion.rest[None, :, None]).sum(-1) + affine[:, None, :3, 3]
    off = (motion.positions - truth).norm(dim=-1).mean(1) / motion.size
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(n, (_N_PAIRS,), generator=generator).to(times.device)
    other = (one + torch.randint(1, max(n, 2), (_N_PAIRS,), generator=generator).to(times.device)) % n  # never itself
    apart, true = ((where[:, one] - where[:, other]).norm(dim=-1) for where in (motion.positions, truth))
    change = (apart - true).abs().mean(1) / motion.size
    return SurfaceErrors(float(off.mean()), float(off.max()), float(change.mean()), float(change.max()))


# --- all together


def evaluate(
    renderer: Renderer,
    caption: Caption | str,
    size: int = 64,
    n_views: int = 8,
    n_times: int = 8,
    n_azimuths: int = 24,
) -> Evaluation:
    """Compare a result with the truth of its caption.

    Args:
        renderer: the result. size: pixels of the square images. n_views: on a circle at elevation 15 degrees and
            time 0, for colour and silhouettes. n_times: of the clip from the front at elevation 15 degrees, from
            time 0 to 1; 0 leaves the motion out. n_azimuths: on a circle at elevation 10 degrees, for the faces.
    """
    if size < 8 or n_views < 1 or n_azimuths < 4 or n_times == 1 or n_times < 0:
        raise ValueError(
            "evaluate needs size >= 8, n_views >= 1, n_azimuths >= 4 and n_times 0 or at least 2, "
            f"got {size}, {n_views}, {n_azimuths}, {n_times}"
        )
    caption = as_caption(caption)
    truth = true_renderer(caption)
    views = orbit(n_views, size, size)
    color, opacity = frames_of(renderer, views)
    true_opacity = frames_of(truth, views)[1]
    colors = view_colors(color, opacity)
    scale, iou = best_scale(opacity, true_opacity)
    circle = orbit(n_azimuths, size, size, elevation_deg=10.0)
    true_peak = float(face_profile(*frames_of(truth, circle)).max())
    profile = face_profile(*frames_of(renderer, circle))
    n_faces, azimuth, strength, in_front = find_faces(profile, true_peak)
    clip = _evaluate_clip(renderer, caption, fixed_take(n_times, size, size), scale) if n_times else None
    return Evaluation(
        caption=caption.text,
        colors=colors,
        colors_right=colors.count(caption.color),
        iou=float(iou.mean()),
        iou_per_view=tuple(iou.tolist()),
        raw_iou=float(_iou(_solid(opacity), _solid(true_opacity)).mean()),
        scale=scale,
        n_faces=n_faces,
        face_azimuth_deg=azimuth,
        face_strength=strength,
        face_profile=tuple((profile / true_peak).tolist()),
        one_face_in_front=in_front,
        motion_correlation=clip.correlation if clip else None,
        motion_amplitude=clip.amplitude if clip else None,
        stray_motion=clip.stray if clip else None,
        signal=tuple((clip.signal - clip.signal.mean()).tolist()) if clip else (),
        true_signal=tuple((clip.true_signal - clip.true_signal.mean()).tolist()) if clip else (),
        clip_iou=float(clip.iou.mean()) if clip else None,
        clip_iou_per_time=tuple(clip.iou.tolist()) if clip else (),
    )


def evaluate_scene(
    scene: Scene,
    caption: Caption | str,
    size: int = 64,
    n_views: int = 8,
    n_times: int = 8,
    n_azimuths: int = 24,
    motion: SurfaceMotion | None = None,
) -> Evaluation:
    """`evaluate` for a scene, and its surface's errors; `motion`: the surface's, if it was followed before."""
    found = evaluate(scene_renderer(scene), caption, size, n_views, n_times, n_azimuths)
    if not n_times:
        return found
    return replace(found, surface=surface_errors(follow_surface(scene) if motion is None else motion, caption))


def scene_renderer(scene: Scene) -> Renderer:
    """A scene as a result, rendered over black on its own device."""
    options = RenderOptions(background=torch.zeros(3, device=scene.device))

    def renderer(cameras: CameraBatch) -> Images:
        output = render_chunked(scene, cameras, options)
        return Images(output.rgb, output.opacity)

    return renderer


# --- the other ways in


def reference_match(scene: Scene, reference: Reference, config: ReferenceConfig, size: int = 64) -> tuple[float, float]:
    """Compare what the reference's camera sees with its image, both over white at `size` pixels.

    Returns (PSNR in dB of the colours, IoU of the silhouettes).
    """
    view = reference_targets(reference, config, size)
    output = render_chunked(scene, view.cameras, RenderOptions(background=torch.ones(3)))
    wanted = view.rgb * view.mask + (1 - view.mask)
    error = float((output.rgb.clamp(0, 1).nan_to_num(0) - wanted).square().mean())
    iou = float(_iou(_solid(output.opacity[0, ..., 0]), _solid(view.mask[0, ..., 0]))[0])
    return -10 * math.log10(max(error, 1e-10)), iou


def frame_error(renderer: Renderer, caption: Caption | str, size: int = 64, n_times: int = 24) -> float:
    """How unsteady a motion is: how far its changes from frame to frame are from the true ones, over black.

    Root mean square, over the pixels that the object ever covers in truth or result, of (result[t+1] - result[t]) -
    (truth[t+1] - truth[t]) in colours multiplied by the opacity; mean over the pairs of frames of a clip from the
    front. A fault that stands still adds nothing.
    """
    cameras = fixed_take(n_times, size, size)
    shown = [(color * opacity[..., None], opacity) for color, opacity in _both(renderer, caption, cameras)]
    seen = torch.stack([opacity.amax(0) > 0.5 for _, opacity in shown]).any(0)
    return change_error(shown[0][0], shown[1][0], seen) if seen.any() else 0.0


def change_error(film: Tensor, truth: Tensor, seen: Tensor) -> float:
    """How far the changes from frame to frame are from the true ones.

    film, truth: [F, H, W, 3]; seen: [H, W], the pixels that count. Root mean square over them, mean over the pairs of
    frames.
    """
    change = film.diff(dim=0) - truth.diff(dim=0)
    return float(change[:, seen].square().mean((1, 2)).sqrt().mean())


def _both(renderer: Renderer, caption: Caption | str, cameras: CameraBatch) -> list[tuple[Tensor, Tensor]]:
    return [frames_of(r, cameras) for r in (renderer, true_renderer(caption))]
