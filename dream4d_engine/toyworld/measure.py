"""Measure the toy recipes that start from an image or a personal subject, what multi-step targets are worth, and
whether what makes runs fast changes their results: `python -m dream4d_engine.toyworld.measure --out DIR`.

- images: image-to-4d from one image of the front of each of six objects, against the truth.
- subject: the personal subject of subject.py with its LoRA and without.
- targets: how steady the films are that targets of one and of four denoising steps show.
- films: how steady a film is that is distilled from the video prior by such targets, without a scene.
- steadiness: the same still object animated by targets of one and of four denoising steps.
- paths: text-to-4d with plain PyTorch in full precision, and with everything that is fast on the device.
- priors: text-to-4d by each of --video-priors, from the same still objects.
- autoencoders: text-to-4d with a video prior on latents (--latent, see train_latent.py), through the full autoencoder
  through the tiny one, and through the full one's encoder and the tiny one's decoder.

Writes DIR/measures.json, a sheet of images DIR/PART.png for each part, and prints tables.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..assets import load_scene, save_scene
from ..cameras import CameraBatch, fixed_take, make_cameras, orbit
from ..guidance.distillation import Guidance, distill, distill_at
from ..kernels import select_kernels
from ..priors.files import PriorFiles, prior_files, toy_prior, toy_subject
from ..priors.formats.tiny_vae import TinyDecoder
from ..priors.handle import PriorKind
from ..randomness import Draw
from ..rendering import RenderOptions, render_chunked
from ..scene import Scene, build_scene
from ..schedules import Schedule
from ..supervision import RegularizerWeights
from ..training.config import (
    TOY_CAMERAS,
    TOY_DISTANCE,
    TOY_FOV_DEG,
    TOY_IMAGE,
    TOY_MOTION,
    TOY_PERSONALISED,
    TOY_STATIC,
    ZEROSCOPE,
    MotionRecipe,
    StaticRecipe,
    with_hifa_steps,
)
from ..training.guidance import Handles, active_terms, load_guidance, runtime_for
from ..training.loop import FitSummary, RunControl
from ..training.motion import train_motion
from ..training.reference import Reference, prepare_reference
from ..training.static import train_static
from .captions import as_caption
from .evaluate import Evaluation, Images, change_error, evaluate_scene, frame_error, reference_match
from .models import write_json
from .samples import CAPTIONS, sheet
from .subject import SUBJECT_PROMPT, scene_likeness
from .world import render_caption

IMAGE_CAPTIONS = CAPTIONS[:6]
ONE_OF_EACH = CAPTIONS[:5]
"""Captions, one of each motion."""
LOCAL_MOTION = replace(
    TOY_MOTION,
    steps=250,
    deformation=replace(TOY_MOTION.deformation, body_knots=0),
    cameras=replace(TOY_CAMERAS, azimuth_deg=(-150.0, 150.0)),
    guidance=tuple(
        replace(
            term,
            distillation=replace(
                term.distillation, min_noise=Schedule(0.98, 0.40), max_noise=Schedule(0.98, 0.70), rescale=0.5
            ),
        )
        for term in TOY_MOTION.guidance
    ),
    first_levels=4,
    level_rate=20.0,
    regularizers=RegularizerWeights(),
    optimizer=replace(TOY_MOTION.optimizer, lr_grid=0.02, milestones=()),
)
"""A motion that is local alone: the toy recipe of the measurements with targets of several steps."""
STEADINESS_RECIPE = replace(
    LOCAL_MOTION,
    guidance=tuple(
        replace(
            term,
            distillation=replace(term.distillation, min_noise=Schedule(0.7, 0.2), max_noise=Schedule(0.7, 0.5)),
        )
        for term in LOCAL_MOTION.guidance
    ),
    optimizer=replace(LOCAL_MOTION.optimizer, milestones=(0.5, 0.7, 0.85, 0.95)),
)
"""Targets begin at noise out of which more than one step leads elsewhere than one, and the walk comes to rest."""
MOVING_CAPTIONS = [caption for caption in CAPTIONS if as_caption(caption).motion != "still"]
TARGET_TIMESTEPS = (970, 700, 400)
PATH_CAPTIONS = ONE_OF_EACH[::4]
_SHEET_SIZE, _SHEET_GREY = 64, 0.6
TOY = "toy"  # the shipped prior
_AUTOENCODERS = ("full", "tiny", "tiny decoder")
_NO_LATENT = "the part autoencoders needs --latent: the folder that train_latent.py wrote"


@dataclass(frozen=True)
class Case:
    """One run."""

    part: str
    name: str
    caption: str
    lora: Path | None = None
    n_steps: int = 1  # denoising steps of a target
    way: str = ""  # "plain" or "fast", or one of _AUTOENCODERS
    folder: Path | None = None  # of train_latent.py, or of a video prior
    stills: Path | None = None  # folder of still objects, made once
    device: str = "cpu"
    seed: int = 0
    share: float = 1.0  # of the recipes' steps that are taken


Result = tuple[Case, dict[str, Any], Tensor]
"""(case, its measures, images [n, H, W, 3])."""


def photograph(caption: str, size: int = 128) -> Tensor:
    """An image of an object at rest from the front, cut out, as the recipe toy-image expects it: [H, W, 4]."""
    camera = make_cameras(0.0, 0.0, TOY_DISTANCE, math.radians(TOY_FOV_DEG), 0.0, size, size)
    image = render_caption(replace(as_caption(caption), motion="still"), camera, 4)
    return torch.cat((image.rgb, image.mask), -1)[0, 0]


# ---- the parts ---------------------------------------------------------------------------------------------------


def measure_image(case: Case) -> Result:
    """image-to-4d from one image of the toy world."""
    recipe, motion = _shortened(TOY_IMAGE, case), _shortened(TOY_MOTION, case)
    reference = prepare_reference(photograph(case.caption), recipe.reference)
    still, first = _static(recipe, as_caption(case.caption).object_text, case, reference=reference)
    moving, second = _motion(still, motion, case)
    psnr, _ = reference_match(still, reference, recipe.reference)
    found = evaluate_scene(moving, case.caption)
    measures = {
        "psnr": psnr,
        "iou_unseen": sum(found.iou_per_view[1:]) / (len(found.iou_per_view) - 1),
        "iou_unseen_least": min(found.iou_per_view[1:]),
        "colors_right": found.colors_right,
        "one_face_in_front": found.one_face_in_front,
        "motion_correlation": found.motion_correlation,
        "motion_amplitude": found.motion_amplitude,
        "clip_iou": found.clip_iou,
        **_surface(found),
        "seconds": first.seconds + second.seconds,
    }
    return case, measures, torch.cat((_around(still), _over_time(moving)))


def measure_subject(case: Case) -> Result:
    """The personal subject, with its LoRA or without."""
    recipe = _shortened(TOY_PERSONALISED, case)
    handles = _toys(recipe)
    handles["image"] = replace(handles["image"], lora=case.lora)
    still, summary = _static(recipe, SUBJECT_PROMPT, case, handles=handles)
    found = scene_likeness(still)
    measures = {"right": found.right, "body": found.body, "head": found.head, "iou": found.iou}
    return case, measures | {"seconds": summary.seconds}, _around(still)


def measure_target(case: Case) -> Result:
    """The film that a target of `n_steps` denoising steps shows, from the true film, at rest and in motion, and noise.

    Frame error as of `frame_error`; mean of three targets each.
    """
    told = _told(case)
    generator, measures, began = torch.Generator().manual_seed(case.seed), {}, time.monotonic()
    for start, images in (("still", told.still), ("moving", told.moving)):
        for timestep in TARGET_TIMESTEPS:
            errors = []
            for _ in range(3):
                share, noise = torch.tensor([timestep / 1000]), partial(_normal, generator)
                target = distill_at(told.guidance, images, told.cameras, share, noise).x0
                film = told.guidance.denoiser.decode(target)
                errors.append(told.error(film))
            measures[f"{start}, {timestep}"] = mean(errors)
    return case, measures | {"seconds": time.monotonic() - began}, _frames(film)


def measure_film(case: Case) -> Result:
    """A film distilled from the video prior alone, by targets of `n_steps` denoising steps: what is trained are the
    pixels of a film, at rest to begin with, by Adam; all else as LOCAL_MOTION says."""
    told, began = _told(case), time.monotonic()
    film = told.still.clone().requires_grad_()
    optimizer, steps = torch.optim.Adam([film], lr=LOCAL_MOTION.optimizer.lr_grid), _shortened(LOCAL_MOTION, case).steps
    for step in range(steps):
        optimizer.zero_grad()
        distill(told.guidance, film, told.cameras, step / steps, Draw(case.seed, step)).loss.backward()
        optimizer.step()
    shown = film.detach().clamp(0, 1)
    measures = {"frame_error": told.error(shown), "at rest": told.error(told.still)}
    return case, measures | {"seconds": time.monotonic() - began}, _frames(shown)


@dataclass(frozen=True)
class _Told:
    """The video prior, told a caption, and the true films [1, F, 3, H, W] of the take that it is asked about."""

    guidance: Guidance
    cameras: CameraBatch
    moving: Tensor
    still: Tensor
    seen: Tensor

    def error(self, film: Tensor) -> float:
        """Frame error, over the pixels that the object ever covers."""
        return change_error(_frames(film), _frames(self.moving), self.seen)


def _told(case: Case) -> _Told:
    recipe, device = with_hifa_steps(LOCAL_MOTION, case.n_steps), torch.device(case.device)
    guidance = load_guidance(recipe, _toys(recipe), case.caption, runtime_for(recipe, device))["video"]
    height, width = guidance.denoiser.image_size
    cameras, caption = fixed_take(recipe.n_frames, width, height), as_caption(case.caption)
    moving, still = (
        render_caption(true, cameras, 4, (_SHEET_GREY,) * 3) for true in (caption, replace(caption, motion="still"))
    )
    films = [image.rgb.movedim(-1, 2).to(device) for image in (moving, still)]
    return _Told(guidance, cameras.to(device), films[0], films[1], (moving.mask > 0.5)[0, ..., 0].any(0))


def _frames(film: Tensor) -> Tensor:
    """[1, F, 3, H, W] -> [F, H, W, 3], on the CPU."""
    return film[0].movedim(1, -1).cpu()


def _normal(generator: torch.Generator, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator)


def measure_steadiness(case: Case) -> Result:
    """A motion by targets of `n_steps` denoising steps, with `STEADINESS_RECIPE`."""
    still, _ = _static(_shortened(TOY_STATIC, case), as_caption(case.caption).object_text, case)
    moving, summary = _motion(still, with_hifa_steps(_shortened(STEADINESS_RECIPE, case), case.n_steps), case)
    found = evaluate_scene(moving, case.caption)
    measures = {
        "frame_error": frame_error(lambda cameras: _render(moving, cameras, 0.0), case.caption),
        "stray_motion": found.stray_motion,
        "motion_correlation": found.motion_correlation,
        "motion_amplitude": found.motion_amplitude,
        "clip_iou": found.clip_iou,
        **_surface(found),
        "steps_per_second": 1 / summary.seconds_per_step,
    }
    return case, measures, _over_time(moving, 16)


def measure_path(case: Case) -> Result:
    """text-to-4d by plain PyTorch, or (`way` "fast") with kernels, half precision, compiled and captured models."""
    fast = case.way == "fast"
    kernels = None if fast else select_kernels(case.device, "torch")
    static, motion = (
        replace(recipe, loop=replace(recipe.loop, precision="half" if fast else "full"))
        for recipe in (_shortened(TOY_STATIC, case), _shortened(TOY_MOTION, case))
    )
    start = build_scene(static.scene, torch.Generator().manual_seed(case.seed), kernels)
    still, first = _static(static, as_caption(case.caption).object_text, case, start=start, accelerate=fast)
    moving, second = _motion(still, motion, case, accelerate=fast)
    found = evaluate_scene(moving, case.caption)
    measures = {
        "iou": mean(found.iou_per_view),
        "colors_right": found.colors_right,
        "clip_iou": found.clip_iou,
        **_surface(found),
        "motion_correlation": found.motion_correlation,
        "motion_amplitude": found.motion_amplitude,
        "seconds": first.seconds + second.seconds,
    }
    return case, measures, _over_time(moving)


def measure_prior(case: Case) -> Result:
    """text-to-4d by the shipped video prior, or by that in the case's folder."""
    assert case.stills is not None
    recipe, thing = _shortened(TOY_MOTION, case), as_caption(case.caption).object_text
    path = case.stills / f"{thing.replace(' ', '_')}_{case.seed}_{case.share:g}.safetensors"
    if not path.is_file():
        case.stills.mkdir(parents=True, exist_ok=True)
        save_scene(path, _static(_shortened(TOY_STATIC, case), thing, case)[0])
    still, _ = load_scene(path, device=case.device)
    files = toy_prior("video") if case.folder is None else prior_files(case.folder, "video")
    guidance = load_guidance(recipe, {"video": files}, case.caption, runtime_for(recipe, torch.device(case.device)))
    moving, summary = _motion(still, recipe, case, guidance=guidance)
    found = evaluate_scene(moving, case.caption)
    measures = {
        "colors_right": found.colors_right,
        "iou": found.iou,
        "one_face_in_front": found.one_face_in_front,
        "motion_correlation": found.motion_correlation,
        "motion_amplitude": found.motion_amplitude,
        "stray_motion": found.stray_motion,
        "clip_iou": found.clip_iou,
        **_surface(found),
        "frame_error": frame_error(lambda cameras: _render(moving, cameras, 0.0), case.caption),
        "seconds": summary.seconds,
    }
    return case, measures, _over_time(moving)


def measure_autoencoder(case: Case) -> Result:
    """A motion through the full autoencoder or a tiny one (`way`), and how alike their gradients are."""
    if case.folder is None:
        raise ValueError(_NO_LATENT)
    device, recipe = torch.device(case.device), _with_color(_shortened(TOY_MOTION, case))
    full = prior_files(case.folder / "video", "video")
    tiny = case.folder / "tiny"
    handles = {"full": full, "tiny": replace(full, tiny_vae=tiny)}
    handles["tiny decoder"] = replace(full, tiny_vae=TinyDecoder(tiny))
    through = {
        way: load_guidance(recipe, {"video": handles[way]}, case.caption, runtime_for(recipe, device))
        for way in dict.fromkeys(("full", case.way))
    }
    still, _ = _static(_shortened(TOY_STATIC, case), as_caption(case.caption).object_text, case)
    moving, summary = _motion(still, recipe, case, guidance=through[case.way])
    found = evaluate_scene(moving, case.caption)
    gradients = {way: _gradient(guidance["video"], still, case.seed).flatten() for way, guidance in through.items()}
    measures = {
        "motion_correlation": found.motion_correlation,
        "motion_amplitude": found.motion_amplitude,
        "clip_iou": found.clip_iou,
        **_surface(found),
        "frame_error": frame_error(lambda cameras: _render(moving, cameras, 0.0), case.caption),
        "gradient_cosine": float(functional.cosine_similarity(gradients["full"], gradients[case.way], dim=0)),
        "steps_per_second": 1 / summary.seconds_per_step,
    }
    return case, measures, _over_time(moving)


def _with_color(recipe: MotionRecipe) -> MotionRecipe:
    """The recipe with the published one's colour term, which is what a decoder is asked for."""
    weight = ZEROSCOPE.guidance[0].distillation.color_weight
    terms = (replace(term, distillation=replace(term.distillation, color_weight=weight)) for term in recipe.guidance)
    return replace(recipe, guidance=tuple(terms))


def _gradient(guidance: Guidance, scene: Scene, seed: int) -> Tensor:
    """The gradient of four steps on the images of a take; timesteps and noise depend on the seed alone."""
    cameras = fixed_take(TOY_MOTION.n_frames, 32, 32)
    images = _render(scene, cameras, _SHEET_GREY).rgb.movedim(-1, 2).to(scene.device).requires_grad_()
    total = torch.zeros_like(images)
    for step, progress in enumerate((0.25, 0.5, 0.75, 1.0)):
        loss = distill(guidance, images, cameras.to(scene.device), progress, Draw(seed, step)).loss
        total += torch.autograd.grad(loss, images)[0]
    return total


PARTS: dict[str, Callable[[Case], Result]] = {
    "images": measure_image,
    "subject": measure_subject,
    "targets": measure_target,
    "films": measure_film,
    "steadiness": measure_steadiness,
    "paths": measure_path,
    "priors": measure_prior,
    "autoencoders": measure_autoencoder,
}


def all_cases(
    parts: list[str],
    lora: Path,
    device: str,
    seeds: list[int],
    share: float,
    latent: Path | None = None,
    video_priors: Sequence[str] = (TOY,),
    stills: Path | None = None,
) -> list[Case]:
    """Every run of the parts."""
    images = [Case("images", caption, caption) for caption in IMAGE_CAPTIONS]
    subject = [Case("subject", n, SUBJECT_PROMPT, lora=o) for n, o in (("with LoRA", lora), ("without", None))]
    paths = [Case("paths", f"{c}, {way}", c, way=way) for c in PATH_CAPTIONS for way in ("plain", "fast")]
    known = {"images": images, "subject": subject, "paths": paths}
    for part in ("targets", "films", "steadiness"):
        known[part] = [Case(part, f"{c}, {n} steps", c, n_steps=n) for c in MOVING_CAPTIONS for n in (1, 4)]
    known["autoencoders"] = [
        Case("autoencoders", f"{c}, {way}", c, way=way, folder=latent) for c in ONE_OF_EACH for way in _AUTOENCODERS
    ]
    known["priors"] = [
        Case("priors", f"{c}, {'/'.join(Path(p).parts[-2:])}", c, folder=None if p == TOY else Path(p), stills=stills)
        for p in video_priors
        for c in CAPTIONS
    ]
    cases = [case for part in parts for case in known[part]]
    return [replace(case, device=device, seed=seed, share=share) for case in cases for seed in seeds]


# ---- runs --------------------------------------------------------------------------------------------------------


def _shortened(recipe, case: Case):
    return replace(recipe, steps=max(1, round(recipe.steps * case.share)))


def _toys(recipe: StaticRecipe | MotionRecipe) -> dict[PriorKind, PriorFiles]:
    return {term.prior: toy_prior(term.prior) for term in active_terms(recipe)}


def _static(
    recipe: StaticRecipe,
    prompt: str,
    case: Case,
    reference: Reference | None = None,
    handles: Handles | None = None,
    start: Scene | None = None,
    accelerate: bool = True,
) -> tuple[Scene, FitSummary]:
    device = torch.device(case.device)
    runtime = runtime_for(recipe, device, accelerate)
    guidance = load_guidance(recipe, handles or _toys(recipe), prompt, runtime, reference)
    control = RunControl()
    return train_static(
        recipe, guidance, seed=case.seed, device=device, control=control, scene=start, reference=reference
    )


def _motion(
    still: Scene,
    recipe: MotionRecipe,
    case: Case,
    accelerate: bool = True,
    guidance: Mapping[PriorKind, Guidance] | None = None,
) -> tuple[Scene, FitSummary]:
    """`guidance`: instead of that by the shipped prior."""
    device = torch.device(case.device)
    if guidance is None:
        guidance = load_guidance(recipe, _toys(recipe), case.caption, runtime_for(recipe, device, accelerate))
    return train_motion(still, recipe, guidance, seed=case.seed, device=device, control=RunControl())


def _render(scene: Scene, cameras: CameraBatch, grey: float) -> Images:
    output = render_chunked(scene, cameras, RenderOptions(background=torch.full((3,), grey)))
    return Images(output.rgb, output.opacity)


def _around(scene: Scene) -> Tensor:
    return _render(scene, orbit(8, _SHEET_SIZE, _SHEET_SIZE), _SHEET_GREY).rgb[0]


def _over_time(scene: Scene, n_times: int = 8) -> Tensor:
    return _render(scene, fixed_take(n_times, _SHEET_SIZE, _SHEET_SIZE), _SHEET_GREY).rgb[0]


def _surface(found: Evaluation) -> dict[str, float | None]:
    """How far the surface is from where the truth has it, in sizes; None where nothing was to be seen."""
    errors = found.surface
    return {name: None if errors is None else getattr(errors, name) for name in ("place_error", "rigidity_error")}


def _measure(case: Case) -> Result:
    torch.set_num_threads(1)
    return PARTS[case.part](case)


# ---- what comes out ----------------------------------------------------------------------------------------------


def table(results: list[Result]) -> list[str]:
    """The results of one part as a Markdown table; runs of several seeds as their mean and standard deviation."""
    columns = list(results[0][1])
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in dict.fromkeys(case.name for case, _, _ in results):
        runs = [measures for case, measures, _ in results if case.name == name]
        lines.append(f"| {name} | {' | '.join(_shown([run[c] for run in runs]) for c in columns)} |")
    return lines


def _shown(values: list) -> str:
    """What the seeds' runs gave."""
    if len(values) == 1:
        return _shown_one(values[0])
    if not all(isinstance(value, float | int) for value in values):
        return "; ".join(_shown_one(value) for value in values)
    return f"{_shown_one(mean(values))} ± {_shown_one(stdev(values))}"


def _shown_one(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    if isinstance(value, tuple | list):
        return ", ".join(f"{value.count(v)} {v}" for v in dict.fromkeys(value))
    return str(value)


def write_results(out: Path, results: list[Result]) -> None:
    """Write the numbers and a sheet for each part."""
    parts = dict.fromkeys(case.part for case, _, _ in results)
    several = len({case.seed for case, _, _ in results}) > 1

    def label(case: Case) -> str:
        return f"{case.name}, seed {case.seed}" if several else case.name

    numbers = {part: {label(case): found for case, found, _ in results if case.part == part} for part in parts}
    write_json(out / "measures.json", numbers)
    for part in parts:
        rows = [(label(case), images) for case, _, images in results if case.part == part]
        pixels = torch.stack([images for _, images in rows]).movedim(-1, 2)
        sheet([name for name, _ in rows], pixels, zoom=1).save(out / f"{part}.png")


def main(arguments: list[str] | None = None) -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(prog="python -m dream4d_engine.toyworld.measure", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=list(PARTS), nargs="+", help="all but priors and autoencoders unless told")
    parser.add_argument("--latent", type=Path, help="the folder that train_latent.py wrote, for autoencoders")
    parser.add_argument(
        "--video-priors", nargs="+", default=[TOY], help=f"folders, or {TOY}: those that priors compares"
    )
    parser.add_argument("--lora", type=Path, default=toy_subject(), help="the subject's LoRA")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipes' steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    options = parser.parse_args(arguments)
    options.only = options.only or [part for part in PARTS if part not in ("priors", "autoencoders")]
    if "autoencoders" in options.only and options.latent is None:
        parser.error(_NO_LATENT)
    options.out.mkdir(parents=True, exist_ok=True)
    cases = all_cases(
        options.only,
        options.lora,
        options.device,
        options.seeds,
        options.share,
        options.latent,
        options.video_priors,
        options.out / "stills",
    )
    results: list[Result] = []
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for result in pool.imap_unordered(_measure, cases, chunksize=1):
            results.append(result)
            results.sort(key=lambda done: cases.index(done[0]))
            print(f"after {time.monotonic() - began:.0f} s: {result[0].name} {json.dumps(result[1])}", flush=True)
            write_results(options.out, results)
    for part in options.only:
        print("\n".join(["", part, *table([r for r in results if r[0].part == part])]))


if __name__ == "__main__":
    main()
