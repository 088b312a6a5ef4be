"""A prior made of ComfyUI's MODEL, CLIP and VAE: what its nodes have loaded and changed, asked as our denoisers are.

Loading, patches, number formats and what lies where stay ComfyUI's; the autoencoder alone is copied, because gradients
go through it, and ComfyUI's weights are made for inference.
"""

from __future__ import annotations

import dis
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management as management
import comfy.sampler_helpers as helpers
import comfy.samplers as samplers
import torch
import torch.nn.functional as functional
from comfy.model_patcher import create_model_options_clone
from torch import Tensor

from ..dream4d_engine.cameras import CameraBatch, Orbit
from ..dream4d_engine.guidance.denoiser import Conditions
from ..dream4d_engine.guidance.distillation import DistillationConfig, Guidance
from ..dream4d_engine.guidance.execution import Execution
from ..dream4d_engine.guidance.noise import NoiseSchedule
from ..dream4d_engine.guidance.prompts import NEGATIVE_PROMPT, view_index, view_prompts, without_word
from ..dream4d_engine.priors.conditioning import check_prompt, pose_vector, view_conditions
from ..dream4d_engine.priors.errors import PriorError
from ..dream4d_engine.priors.files import digest
from ..dream4d_engine.priors.handle import Prior, PriorKind, ReferenceView
from ..dream4d_engine.priors.networks.checkpointing import frames_asked_for
from ..dream4d_engine.priors.networks.execution import Runtime, in_slices, without_autocast
from .graph_encoder import Encoder
from .graph_families import WHOLE, Family, in_its_range, is_flow, noise_schedule

_PARTS = ("control", "area", "mask", "hooks", "start_percent", "end_percent")
"""What a conditioning can't have here."""
_SAMPLED, _NUMBERS = 64, 64
"""Tensors that a fingerprint looks at, and numbers of each."""


@dataclass(frozen=True, eq=False)
class GraphPrior:
    """What a graph's nodes have loaded, as a PriorHandle."""

    family: Family
    model: Any  # MODEL
    clip: Any  # CLIP, or CLIP_VISION of a model of novel views
    vae: Any  # VAE
    size: tuple[int, int]  # (height, width), pixels
    n_frames: int | None
    low_noise: Any = None  # MODEL, the second of a pair: `model` is then asked at high noise alone
    part: str = WHOLE  # of the noise, that a `model` without its second is asked at

    @property
    def models(self) -> tuple[Any, ...]:
        """One, or a pair."""
        return (self.model,) if self.low_noise is None else (self.model, self.low_noise)

    @property
    def noise(self) -> NoiseSchedule:
        """Of what it is asked at."""
        return in_its_range(noise_schedule(self.model), self.family, self.part)

    @property
    def name(self) -> str:
        """Its family's."""
        return self.family.name

    @property
    def kind(self) -> PriorKind:
        """Its family's."""
        return self.family.kind

    @property
    def most_frames(self) -> None:
        """They have takes of their own length."""

    @property
    def frame_step(self) -> int:
        """Its family's."""
        return self.family.frame_step

    @property
    def orbit(self) -> Orbit | None:
        """Its family's."""
        return self.family.orbit

    def fingerprint(self) -> str:
        """Change when weights, patches, noise levels or sizes do; a sample of the numbers is looked at."""
        levels = self.noise.sigma_of(torch.linspace(0.1, 0.9, 5))
        parts = [
            type(self.model.model).__name__,
            levels.tolist(),
            self.size,
            self.n_frames,
            *(part for model in self.models for part in _looks(model)),
            _sample(_unpatched(self.clip.patcher)),
            _sample(_adapters(self.clip.patcher)),
            _sample(self.vae.first_stage_model.state_dict()),
        ]
        return digest(parts)

    def n_bytes(self) -> int:
        """Size of the weights, of a pair's larger one: one of them is needed at a time."""
        return max(int(model.model_size()) for model in self.models)

    def describe(self) -> str:
        """What the model is."""
        return f"{self.name} ({type(self.model.model).__name__}) from ComfyUI's nodes"

    def check_prompt(self, prompt: str) -> None:
        """Refuse an empty prompt, where the model is told any."""
        if self.kind != "novel_view":
            check_prompt(self.name, None, prompt)

    def load(self, runtime: Runtime) -> Prior:
        """Prepare the model to be asked, and copy its autoencoder."""
        encoder = Encoder.copied(self.vae, self.model.model.latent_format, runtime.device, runtime.accelerated)
        first = LiveModel(self.model, runtime.device)
        live: LiveModel | Pair = first
        if self.low_noise is not None and self.family.switch is not None:
            live = Pair(first, LiveModel(self.low_noise, runtime.device), self.family.switch)
        # an orbit's images are many, and large: their activations, kept, are more than a card has beside the model
        execution = Execution() if self.orbit is None else Execution(1, images_kept=0, groups_at_once=1)
        denoiser = GraphDenoiser(live, encoder, self.size, self.n_frames, self.noise, is_flow(self.model), execution)

        def guide(
            prompt: str, negative: str | None, config: DistillationConfig, reference: ReferenceView | None = None
        ) -> Guidance:
            if self.kind == "novel_view":
                return _view_guidance(self, denoiser, reference, config)
            return _guidance(self, denoiser, prompt, negative, config)

        return Prior(self.name, self.kind, guide, None, encoder.networks, live.release)


def models_of(priors: Iterable[object]) -> list[Any]:
    """The MODELs that priors ask."""
    return [model for prior in priors if isinstance(prior, GraphPrior) for model in prior.models]


def _looks(model: Any) -> list:
    """A sample of a MODEL's weights and of what was put on them."""
    put = {name: value for name, value in model.object_patches.items() if name != "model_sampling"}  # see the levels
    looks = [_sample(_unpatched(model)), _sample(_adapters(model)), _named(model.model_options)]
    return [*looks, *([_named(put)] if put else [])]  # runs of before these were looked at are found again


def _adapters(patcher: Any) -> dict[str, Any]:
    """What is put on a model's weights, and what works beside them: core's LoRAs in bypass mode."""
    found = _tensors("", patcher.patches)
    for name, injections in patcher.injections.items():
        for i, injection in enumerate(injections):
            for cell in getattr(injection.inject, "__closure__", None) or ():
                with suppress(ValueError):  # nothing is in it
                    found |= _tensors(f"{name}.{i}", getattr(cell.cell_contents, "adapters", None))
    return found


def _unpatched(patcher: Any) -> dict[str, Any]:
    """A model's weights as they were before patches were added to them, which a loaded model keeps aside."""
    found = patcher.model.state_dict()
    for name, kept in patcher.backup.items():
        scaled = hasattr(kept.weight, "state_dict")  # in core's formats with scales, which a state has beside it
        found |= kept.weight.state_dict(name) if scaled else {name: kept.weight}
    return found


def _sample(state: dict[str, Any]) -> list:
    """Names and a few numbers of a few tensors, evenly spread."""
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and value.numel())
    found = []
    for name in names[:: max(1, len(names) // _SAMPLED)]:
        # the data: weights that were moved outside of inference mode have no views
        numbers = state[name].data.flatten()[:_NUMBERS].float().cpu().nan_to_num().tolist()
        found.append([name, list(state[name].shape), numbers])
    return [len(names), found]


_APPLIED = ("transformer_options", "model_function_wrapper")
"""Of a MODEL's options, what has a part in every answer; the others are a sampler's."""


def _named(options: Any, applied: bool = False) -> Any:
    """What stands in a MODEL's options: by name, where it is neither a number nor a word.

    `applied`: functions also by the numbers that they were made with.
    """
    if isinstance(options, dict):
        return {str(key): _named(value, applied or key in _APPLIED) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [_named(value, applied) for value in options]
    if options is None or isinstance(options, bool | int | float | str):
        return options
    if isinstance(options, torch.dtype):
        return str(options)
    name = getattr(options, "__qualname__", type(options).__qualname__)
    made_with = _made_with(options) if applied else {}
    return [name, made_with] if made_with else name


def _made_with(function: Any) -> dict[str, Any]:
    """Numbers and words that a function got where it was defined, and doesn't change itself."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    changes = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
    found = {}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        with suppress(ValueError):  # nothing is in it yet
            if name not in changes and _plain(cell.cell_contents):
                found[name] = _named(cell.cell_contents)
    return found


def _plain(value: Any) -> bool:
    """Whether there are numbers and words in it, and nothing else; None may be a place that is yet to be filled.

    What is noted by other things than these, as FreeU notes devices without some function, comes while the model works.
    """
    if isinstance(value, dict):
        return bool(value) and all(_plain(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return bool(value) and all(_plain(one) for one in value)
    return isinstance(value, bool | int | float | str | torch.dtype)


def _tensors(name: str, tree: Any) -> dict[str, Any]:
    """Every tensor and number of a tree of containers and adapters, by a name that says where it is."""
    if isinstance(tree, Tensor):
        return {name: tree}
    if isinstance(tree, int | float) and not isinstance(tree, bool):
        return {name: torch.tensor([float(tree)])}
    children: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    elif hasattr(tree, "weights"):  # an adapter of ComfyUI
        children = (("weights", tree.weights),)
    else:
        return {}
    found: dict[str, Any] = {}
    for key, value in children:
        found |= _tensors(f"{name}.{key}", value)
    return found


class LiveModel:
    """A MODEL between being prepared for sampling and cleaned up: what a sampler does around its steps."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.patcher, self.device = model, device
        self.options = create_model_options_clone(model.model_options)
        self.options.setdefault("transformer_options", {})
        self.table: list[Any] = []  # what the model can be told, one for each prompt
        self._extra: list[Any] | None = None

    def tell(self, conditionings: Sequence[list], shape: tuple[int, ...]) -> None:
        """Prepare CONDITIONINGs, one for each prompt, for latents of this shape [1, c, ...], and load the model."""
        for conditioning in conditionings:
            parts = [key for key in _PARTS if any(key in one for _, one in conditioning)]
            if len(conditioning) != 1 or parts:
                what = ", ".join(parts) or f"{len(conditioning)} conditionings"
                raise PriorError(
                    f"the CLIP gives a prompt parts of an image or of a sampler's steps ({what}), which training has "
                    "none of: connect the CLIP without what makes them"
                )
        with torch.inference_mode():
            conds = {"positive": [helpers.convert_cond(c)[0] for c in conditionings]}
            helpers.prepare_model_patcher(self.patcher, conds, self.options)
            base, conds, self._extra = helpers.prepare_sampling(self.patcher, shape, conds, self.options)
            samplers.cast_to_load_options(self.options, device=self.device, dtype=self.patcher.model_dtype())
            self.patcher.pre_run()
            noise = torch.zeros(shape, device=self.device)
            self.table = samplers.process_conds(base, noise, conds, self.device, noise, None, 0)["positive"]

    def predict(self, x: Tensor, level: Tensor, told: Sequence[dict]) -> Tensor:
        """Return x0 of noisy latents [n, c, ...] at the model's own noise levels [n], each told its own."""
        with torch.inference_mode(), without_autocast(self.device):  # its number formats are ComfyUI's affair
            if not self._there():
                needed = self.patcher.model.memory_required(list(x.shape))
                management.load_models_gpu([self.patcher, *(self._extra or [])], needed)
                self.patcher.model.current_patcher = self.patcher
            merged = _merged(told)
            if merged is not None:
                found = self._ask(merged, x, level)
            else:
                found = torch.empty_like(x)
                for one in {id(each): each for each in told}.values():
                    mine = torch.tensor([each is one for each in told])
                    found[mine] = self._ask(one, x[mine], level[mine])
        return found.clone().float()  # outside of inference mode a clone is an ordinary tensor

    def _there(self) -> bool:
        """Whether nobody else was given its place, or has asked the same network with other patches, since."""
        model = self.patcher.model
        return (
            model.current_patcher is self.patcher
            and getattr(model, "current_weight_patches_uuid", None) == self.patcher.patches_uuid
            and any(loaded.model is self.patcher for loaded in management.current_loaded_models)
        )

    def _ask(self, told: dict, x: Tensor, level: Tensor) -> Tensor:
        return samplers.calc_cond_batch(self.patcher.model, [[told]], x, level, self.options)[0]

    def release(self) -> None:
        """Clean up as a sampler does at its end."""
        if self._extra is None:
            return
        self.patcher.cleanup()
        helpers.cleanup_models({}, self._extra)
        samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        self.patcher.restore_hook_patches()
        self.table, self._extra = [], None


@dataclass(frozen=True, eq=False)
class Pair:
    """Two experts as one model: each is asked on its own side of the `switch`, at the time t of a flow.

    Which of them lies on the GPU is ComfyUI's affair: it is asked to load the one that is asked next.
    """

    high: LiveModel
    low: LiveModel
    switch: float

    @property
    def device(self) -> torch.device:
        """Where both are asked."""
        return self.high.device

    @property
    def table(self) -> list[Any]:
        """What each of the two can be told, pairs, one for each prompt."""
        return list(zip(self.high.table, self.low.table, strict=True))

    def tell(self, conditionings: Sequence[list], shape: tuple[int, ...]) -> None:
        """See LiveModel; the one for high noise, which is asked first in most recipes, is loaded last."""
        self.low.tell(conditionings, shape)
        self.high.tell(conditionings, shape)

    def predict(self, x: Tensor, level: Tensor, told: Sequence[tuple[dict, dict]]) -> Tensor:
        """Return x0, each latent's by the expert of its noise."""
        found = torch.empty_like(x, dtype=torch.float32)
        above = level >= self.switch
        for i, (expert, mine) in enumerate(((self.high, above), (self.low, ~above))):
            if mine.any():
                rows = [pair[i] for pair, one in zip(told, mine.tolist(), strict=True) if one]
                found[mine] = expert.predict(x[mine], level[mine], rows)
        return found

    def release(self) -> None:
        """Clean up after both."""
        self.low.release()
        self.high.release()


def _merged(conds: Sequence[dict]) -> dict | None:
    """One condition for a batch, whose samples are told different things; None where these can't be stacked."""
    first = conds[0]
    if all(cond is first for cond in conds):
        return first
    together: dict[str, Any] = {}
    for key, value in first["model_conds"].items():
        each = [cond["model_conds"].get(key) for cond in conds]
        whole = (getattr(one, "cond", None) for one in each)
        tensors = [t for t in whole if isinstance(t, Tensor) and t.ndim and len(t) == 1]
        if len(tensors) < len(each):
            if all(_same(one, value) for one in each):
                together[key] = value
                continue
            return None
        if len({t.shape for t in tensors}) > 1:
            return None
        together[key] = type(value)(torch.cat(tensors))
    if any(cond["model_conds"].keys() != together.keys() for cond in conds):
        return None
    return {**first, "model_conds": together}


def _same(one: Any, other: Any) -> bool:
    return one is not None and type(one) is type(other) and one.can_concat(other)


@dataclass(frozen=True, eq=False)
class GraphDenoiser:
    """A MODEL and a private copy of its autoencoder as a Denoiser (see guidance/denoiser.py).

    What it is told, `Conditions.tokens` [B, F, 1, 1], are rows of the live model's table: a prompt's embeddings, pooled
    outputs, masks and the like travel there in whatever form the family needs them. A model of novel views has tokens
    and latents of its own beside the table's only row.
    """

    live: LiveModel | Pair
    encoder: Encoder
    image_size: tuple[int, int]
    n_frames: int | None
    noise: NoiseSchedule
    flow: bool
    execution: Execution

    @property
    def images_apart(self) -> bool:
        """Autoencoders of videos see a take in time."""
        return not self.encoder.of_videos

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1] to [B, f, c, h, w]; differentiable."""
        if self.encoder.of_videos:
            takes = zip(images.movedim(1, 2).split(1), frames_asked_for(carried, len(images)), strict=True)
            return torch.cat([self.encoder.encode(one, self.execution, asked) for one, asked in takes]).movedim(2, 1)
        each = None if carried is None else carried.flatten()
        z = in_slices(self.encoder.encode, images.flatten(0, 1), self.execution, carried=each)
        return z.unflatten(0, images.shape[:2])

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1]."""
        if self.encoder.of_videos:
            return torch.cat([self.encoder.decode(one) for one in z.movedim(1, 2).split(1)]).movedim(2, 1)
        return in_slices(self.encoder.decode, z.flatten(0, 1), self.execution).unflatten(0, z.shape[:2])

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict z from x = z + sigma * eps, [B, f, c, h, w]; sigma [B]."""
        sigma = sigma.to(x.device).float()
        told = self._told(conditions)
        noisy, level = x.float(), sigma
        if self.flow:  # (1 - t) z + t eps with t = sigma / (1 + sigma)
            noisy, level = noisy / (1 + sigma)[:, None, None, None, None], sigma / (1 + sigma)
        # a take is a row of the model's batch; an orbit as many as it has views
        n_rows = 1 if self.encoder.of_videos else x.shape[1]
        noisy = noisy.movedim(1, 2) if self.encoder.of_videos else noisy.flatten(0, 1)
        level = level.repeat_interleave(n_rows)
        at_once = n_rows * (self.execution.groups_at_once or len(x))
        parts = [told[i : i + at_once] for i in range(0, len(told), at_once)]
        pieces = zip(noisy.split(at_once), level.split(at_once), parts, strict=True)
        x0 = torch.cat([self.live.predict(*piece) for piece in pieces])
        return x0.movedim(2, 1) if self.encoder.of_videos else x0.unflatten(0, x.shape[:2])

    def _told(self, conditions: Conditions) -> list:
        """What each row of the model's batch is told; a take what its first frame is."""
        if conditions.concat is None:
            return [self.live.table[row] for row in conditions.tokens[:, 0, 0, 0].long().tolist()]
        (only,) = self.live.table
        forms = only["model_conds"]

        given = {"c_crossattn": conditions.tokens, "c_concat": conditions.concat}
        if conditions.vector is not None:
            given["y"] = conditions.vector

        def one(row: Sequence[Tensor]) -> dict:
            return only | {"model_conds": forms | {n: type(forms[n])(v) for n, v in zip(given, row, strict=True)}}

        rows = zip(*(value.flatten(0, 1).split(1) for value in given.values()), strict=True)
        return [one(row) for row in rows]

    def run_as(self, execution: Execution) -> GraphDenoiser:
        """Return the same, run in this way; where the model's weights lie is ComfyUI's affair."""
        return replace(self, execution=execution)

    def forget(self) -> None:
        """Nothing refers to places of weights."""


def _guidance(
    prior: GraphPrior, denoiser: GraphDenoiser, prompt: str, negative: str | None, config: DistillationConfig
) -> Guidance:
    """Encode the prompts of all views once; CLIP may leave afterwards."""
    if config.perp_neg:
        raise PriorError(
            f"perp-neg mixes the words of views, which {prior.name} from ComfyUI's nodes can't: turn it off"
        )
    prompt = prompt if prior.kind == "image" else without_word(prompt)
    prior.check_prompt(prompt)
    texts = (*view_prompts(prompt), NEGATIVE_PROMPT if negative is None else negative)
    with torch.inference_mode():
        told = [prior.clip.encode_from_tokens_scheduled(prior.clip.tokenize(text)) for text in texts]
    denoiser.live.tell(told, denoiser.encoder.latent_shape(prior.size, prior.n_frames))
    avoided = len(texts) - 1

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        view = view_index(cameras.azimuth, cameras.elevation)
        rows = view[..., None, None].float()
        return Conditions(rows), Conditions(torch.full_like(rows, avoided))

    return Guidance(prior.name, denoiser, conditions, config)


def _view_guidance(
    prior: GraphPrior, denoiser: GraphDenoiser, reference: ReferenceView | None, config: DistillationConfig
) -> Guidance:
    """Tell a model of novel views the reference, as core's StableZero123_Conditioning or SV3D_Conditioning does."""
    if reference is None:
        raise PriorError(f"{prior.name} is told an image, not a prompt: use a recipe that starts from an image")
    encoder, live = denoiser.encoder, denoiser.live
    seen = reference.image[None].to(live.device)
    image = functional.interpolate(seen, prior.size, mode="bilinear", antialias=True)
    with torch.no_grad():
        beside = encoder.latents.process_out(encoder.encode(image))[:, None]  # not scaled
    with torch.inference_mode():
        embedding = prior.clip.encode_image(image.movedim(1, -1))["image_embeds"]
        nothing = [[torch.zeros(1, 1, embedding.shape[-1]), {"concat_latent_image": torch.zeros_like(beside[:, 0])}]]
        live.tell([nothing], encoder.latent_shape(prior.size, prior.n_frames))
    embedding = embedding.clone().to(live.device)
    base, seen_from = prior.model.model, reference.camera.to(live.device)

    def pose_of(cameras: CameraBatch) -> Tensor:
        pose = pose_vector(cameras, seen_from)
        # in the place of the distance Stable Zero123 is told the reference's polar angle, as if seen from the side
        return torch.cat((pose[..., :3], torch.full_like(pose[..., 3:], math.pi / 2)), -1)

    def project(rows: Tensor) -> Tensor:
        with torch.inference_mode():
            projected = base.cc_projection(rows.flatten(0, 1))
        return projected.clone().float().unflatten(0, rows.shape[:2])

    if prior.orbit is not None:
        no_pose, as_it_is = lambda cameras: embedding.new_zeros(*cameras.shape, 0), lambda rows: rows
        vector_of = partial(_orbit_vector, base, seen_from)
        return Guidance(prior.name, denoiser, view_conditions(embedding, beside, no_pose, as_it_is, vector_of), config)
    return Guidance(prior.name, denoiser, view_conditions(embedding, beside, pose_of, project), config)


def _orbit_vector(base: Any, reference: CameraBatch, cameras: CameraBatch) -> Tensor:
    """What SV3D is told of its views [B, F], [B, F, K]: elevations, and azimuths from the reference's on.

    SV3D_u is told of neither.
    """
    n_views = cameras.shape[1]
    # a full turn is told as none: without rounding it could come out as just below one
    turned = torch.rad2deg((cameras.azimuth - reference.azimuth.to(cameras.azimuth)).double()).round(decimals=3)
    angles = zip(torch.rad2deg(cameras.elevation).tolist(), turned.remainder(360).tolist(), strict=True)
    each = (base.encode_adm(elevation=e, azimuth=a, noise=torch.empty(n_views)) for e, a in angles)
    return torch.stack([vector.expand(n_views, -1) for vector in each]).to(reference.azimuth)
