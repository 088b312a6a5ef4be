"""What the commands that train have in common: finding models, training a stage, showing what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from ..assets import AssetError, Provenance, load_scene, save_scene
from ..cameras import CameraBatch
from ..documents import document_bytes
from ..export import save_image
from ..machine import versions, write_atomically
from ..priors.handle import Prior
from ..scene import Scene
from ..toyworld.evaluate import reference_match
from ..training.checkpoint import set_aside
from ..training.config import MotionRecipe, ReferenceConfig, StaticRecipe, shipped_recipe
from ..training.guidance import Handles, explain_silence, load_guidance, runtime_for, with_frames_of, with_longer_takes
from ..training.loop import PriorSilent, ResumeMismatch, train
from ..training.motion import motion_stage
from ..training.reference import Reference, check_reference, load_reference
from ..training.stages import Stage
from ..training.static import first_scene, static_stage
from ..training.validate import check_recipe
from . import results
from .errors import UsageError
from .models import prior_handles
from .options import Recipe, RunOptions
from .progress import patient
from .run_folder import REFERENCE
from .runs import CONTACT, METRICS, ORBIT, SCENE, VIDEO, Session, open_run

Made = tuple[Scene, Provenance]


def said(prompt: str | None, name: str) -> str:
    """The prompt, if there is one."""
    if prompt is None or not prompt.strip():
        raise UsageError(f"{name} is empty: say what to make, for example 'a red cube is jumping'")
    return prompt.strip()


def read_reference(command: str, options: RunOptions, recipe: StaticRecipe) -> Reference:
    """Read and check the image that a run starts from."""
    if options.image is None:
        raise UsageError(f"say which image to start from: dream4d {command} IMAGE --out FOLDER")
    check_recipe(recipe, "static")  # its numbers are used in looking at the image already
    if recipe.reference is None:  # in the record of a run that is resumed
        raise UsageError(f"the recipe {recipe.name!r} looks at no image: start over in another folder")
    maps = options.maps
    reference = load_reference(
        options.image,
        recipe.reference,
        mask=maps.mask,
        depth=maps.depth_map,
        normals=maps.normal_map,
        mask_shows=maps.mask_shows,
    )
    check_reference(recipe, reference)
    return reference


def keep_reference(session: Session, reference: Reference) -> None:
    """Say and show what was made of the image; a resumed run must go on with the same one."""
    run, name = session.run, reference.fingerprint()
    if run.record.setdefault("reference", name) != name:
        raise ResumeMismatch(
            f"{session.options.image} (or its mask or map) is not the one any more that this run began with: start over"
        )
    session.progress.say(reference.statement)
    save_image(run.path / REFERENCE, reference.over())
    run.save(prepared=reference.statement)


def new_still(session: Session, recipe: StaticRecipe, reference: Reference | None = None) -> Stage:
    """Stage 1 at its beginning."""
    return static_stage(recipe, first_scene(recipe, session.options.seed).to(session.device), reference)


def new_motion(session: Session, recipe: MotionRecipe, still: Scene) -> Stage:
    """Stage 2 at its beginning."""
    options = session.options
    return motion_stage(still.clone().to(session.device), recipe, options.seed, options.deformation_scale)


def of_frames(recipe: MotionRecipe, handles: Handles, n_frames: int | None, flag: str) -> MotionRecipe:
    """The recipe with takes as its prior must have them, or of so many frames as `flag` asked for."""
    try:
        fitting = with_frames_of(recipe, handles)
        longer = with_longer_takes(fitting, handles, n_frames)
    except ValueError as error:
        raise UsageError(f"{error} ({flag})") from error
    _check_frames(recipe, fitting, handles, flag)
    return longer


def _check_frames(recipe: MotionRecipe, fitting: MotionRecipe, handles: Handles, flag: str) -> None:
    """Refuse a number of frames that somebody chose, where the prior makes takes of another: it would be left out."""
    shipped = shipped_recipe(recipe)
    own = recipe.n_frames if recipe.windows is None else recipe.windows.window
    chosen = shipped is None or own != shipped.n_frames
    if chosen and own != fitting.n_frames:
        names = ", ".join(handle.name for handle in handles.values() if handle.n_frames is not None)
        raise UsageError(
            f"--motion.n-frames is {own}, and {names} makes takes of {fitting.n_frames} frames: leave it away; {flag} "
            f'asks for a longer animation, "dream4d": {{"n_frames": {own}}} in its model_index.json for other takes'
        )


def say_windows(session: Session, recipe: MotionRecipe) -> None:
    """Say how a long animation is seen."""
    if recipe.windows is not None:
        session.progress.say(recipe.windows.describe())


def train_stage(
    session: Session,
    recipe: Recipe,
    handles: Handles,
    prompt: str,
    path: Path,
    begin: Callable[[], Stage],
    reference: Reference | None = None,
    parent: Provenance | None = None,
) -> Made:
    """Train what `begin` makes and save it in `path`, unless a run before a resume has done so."""
    name, options, run, processes = recipe.stage, session.options, session.run, session.processes
    session.progress.begin(name, recipe.steps)
    provenance = Provenance(prompt, recipe.name, options.seed, recipe.steps, versions(), parent)
    made = _made_before(session, name, provenance, path)
    if processes.any(made is None):
        runtime = runtime_for(recipe, session.device, compiled=options.gpu.compile)
        loaded: list[Prior] = []
        try:
            with run.timed("load models"):
                guidance = load_guidance(recipe, handles, prompt, runtime, reference, on_prior=loaded.append)
            session.pause(name)  # loading takes minutes; it would be done again, but nothing else is lost
            with run.timed(name):
                stage = begin()
                summary = train(stage, guidance, options.seed, session.control(name))
        except PriorSilent as error:
            way = f"--{name}.loop.precision full runs it in full precision, in a new run"
            raise explain_silence(error, recipe, handles, runtime, way) from error
        finally:
            for prior in loaded:
                prior.release()
        if processes.is_main:
            save_scene(path, stage.scene, provenance)
        run.record.setdefault("fits", {})[name] = asdict(summary)
        run.save()
        processes.wait()  # until it is written
        made = load_scene(path, session.device)  # read back: a resumed run goes on from the very same one
    assert made is not None  # or it would have been trained just now
    session.progress.update(name, recipe.steps)
    processes.wait()  # until all have it: what is unfinished is removed at the end
    return made


def _made_before(session: Session, stage: str, provenance: Provenance, path: Path) -> Made | None:
    """The result of a stage from before a resume; one that can't be used is set aside, and the stage done again."""
    if not path.exists():
        return None
    try:
        scene, found = load_scene(path, session.device)
        # not what it was made with, nor from: that may have been updated since, and was made sure of before
        if replace(found, versions={}, parent=None) == replace(provenance, versions={}, parent=None):
            return scene, found
        why = f"{path} is the result of other settings"
    except AssetError as error:
        why = str(error)
    session.processes.wait()  # until all have seen it
    if session.processes.is_main:
        kept = set_aside(path)
        name = f" (it is kept as {kept.name})" if kept else ""
        session.progress.say(f"{why}{name}: the stage {stage} is done again")
    session.processes.wait()
    return None


def film(session: Session, name: str, scene: Scene, cameras: CameraBatch, title: str) -> None:
    """Make a video, unless it is there already."""
    if not session.processes.is_main:  # training is shared, what comes after it is not
        return
    path, images, stage = session.run.path / name, session.options.images, name.partition(".")[0]
    n_frames = cameras.shape[1]
    session.progress.begin(stage, n_frames)
    if path.exists():  # videos are written whole or not at all
        session.progress.update(stage, n_frames)
        return
    began = time.monotonic()

    def on_frame(done: int) -> None:
        session.pause(stage, alone=True)
        session.progress.update(stage, done, None, (time.monotonic() - began) / done * (n_frames - done))

    with session.run.timed(stage):
        results.save_scene_video(path, scene, cameras, images.fps, images.samples, title, on_frame)


def show(
    session: Session,
    scene: Scene,
    prompt: str,
    still: Scene | None = None,
    reference: Reference | None = None,
    config: ReferenceConfig | None = None,
    of_a_mesh: bool = False,
) -> None:
    """Make the sheet of images and the measures; `still` is compared with the image that it was made from."""
    if not session.processes.is_main:
        return
    name = "measures"
    told = patient(session.progress, name)

    def on_progress(share: float) -> None:
        session.pause(name, alone=True)
        told(share)

    with session.run.timed(name):
        results.save_contact_sheet(session.run.path / CONTACT, scene, prompt, session.options.images.samples)
        session.pause(name, alone=True)
        measures, lines = results.measure(scene, prompt, of_a_mesh, on_progress)
        if still is not None and reference is not None and config is not None:
            psnr, iou = reference_match(still, reference, config)
            measures["reference"] = {"psnr": psnr, "iou": iou}  # of the image and of the silhouettes
            lines[0] += f", reference view {psnr:.1f} dB"
        write_atomically(session.run.path / METRICS, document_bytes(measures))
    for line in lines:
        session.progress.say(line)


def both_stages(
    command: str,
    options: RunOptions,
    static: StaticRecipe,
    motion: MotionRecipe,
    prompt: str,
    reference: Reference | None = None,
) -> int:
    """A whole run from a sentence, or from an image, to a moving object."""
    object_prompt = prompt if options.object_prompt is None else said(options.object_prompt, "--object-prompt")
    static_priors = prior_handles(static, options, object_prompt)
    motion_priors = prior_handles(motion, options, prompt)
    motion = of_frames(motion, motion_priors, options.motion_frames, "--motion-frames")
    with open_run(command, options, (static, motion), static.scene) as session:
        if reference is not None:
            keep_reference(session, reference)
        say_windows(session, motion)
        session.progress.begin("static", static.steps)  # both bars from the beginning
        session.progress.begin("motion", motion.steps)
        path, begin = session.run.unfinished / "static.safetensors", lambda: new_still(session, static, reference)
        still, parent = train_stage(session, static, static_priors, object_prompt, path, begin, reference)
        path, begin = session.run.path / SCENE, lambda: new_motion(session, motion, still)
        scene, _ = train_stage(session, motion, motion_priors, prompt, path, begin, parent=parent)
        film(session, ORBIT, still, results.orbit_cameras(options.images), prompt)
        film(session, VIDEO, scene, results.final_cameras(options.images, scene), prompt)
        show(session, scene, prompt, still, reference, static.reference)
    return 0
