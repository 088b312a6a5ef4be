"""Models in diffusers' format: a folder with a model_index.json and a folder for each part.

Beside the usual entries, `model_index.json` may hold one of ours that says what the other files leave open:

    "dream4d": {"kind": "multiview", "n_frames": 4, "image_size": [32, 32], "vector": "camera",
                "group_attention": true, "known_words": [...], "negative_prompt": "", "license": "Apache-2.0"}

Without it the kind is guessed from the networks' configurations, the other values from the kind and the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...documents import as_object, describe, field, printable, read_document, shortened
from ...guidance.noise import NoiseSchedule
from ..errors import PriorError, reason
from ..networks.denoisers import PredictionType
from ..networks.text import Tokenizer, read_tokenizer
from .checkpoints import SUFFIXES, Checkpoint, first_bytes, open_checkpoint
from .configurations import built, encoder_config, noise_of
from .loaders import (
    FRAMES,
    ORBITS,
    Device,
    Metadata,
    PriorKind,
    check_kind,
    declared,
    empty_network,
    encoder_state,
    filled,
    frozen,
    latents_of,
    shapes_of,
)

INDEX = "model_index.json"
NETWORK, ENCODER = "diffusion_pytorch_model", "model"
MOST_PIXELS = 4096
_UNETS, _VAE = ("UNet2DConditionModel", "UNet3DConditionModel"), "AutoencoderKL"
_ENCODERS = {"clip": ("CLIPTextModel", "CLIPTextConfig"), "t5": ("T5EncoderModel", "T5Config")}
_VECTOR = 16  # numbers of a camera or a moment
# every part that has weights, and how their file is named
_WEIGHTS = {
    "unet": NETWORK,
    "vae": NETWORK,
    "text_encoder": ENCODER,
    "image_encoder": ENCODER,
    "clip_camera_projection": NETWORK,
}
# ZeroScope's folder repeats ModelScope's image size; what it was trained on is in its description only
_ZEROSCOPE, _ZEROSCOPE_SIZE, _ZEROSCOPE_FRAMES = "zeroscope", (320, 576), 24


@dataclass(frozen=True)
class FolderLoader:
    """A folder in diffusers' format; loaders.Loader says what each method gives."""

    path: Path

    def metadata(self, kind: PriorKind | None = None) -> Metadata:
        """Say what the model is, by its files of text alone."""
        index, unet = read_json(self.path, INDEX), read_json(self.path, "unet/config.json")
        ours = field(index, "dream4d", dict, self.path / INDEX, PriorError, {})
        where = f"{self.path / INDEX}: dream4d"
        kind = check_kind(
            kind or field(ours, "kind", str, where, PriorError, "") or guess_kind(self.path, unet), self.path
        )
        path = self.path.resolve()
        named = (*path.parts[-4:], str(unet.get("_name_or_path", "")))
        is_zeroscope = kind == "video" and any(_ZEROSCOPE in name.lower() for name in named)
        if ours.get("image_size") is not None:
            image_size = _size(ours["image_size"], 1, f"{where}: image_size")
        else:
            image_size = _ZEROSCOPE_SIZE if is_zeroscope else self._image_size(unet)
        assumed = Metadata(
            # in the hub's cache a folder's name is a number, and the repository's is models--OWNER--NAME above
            name=path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name,
            kind=kind,
            image_size=image_size,
            n_frames=_ZEROSCOPE_FRAMES if is_zeroscope else FRAMES.get(kind),
            vector="camera" if kind == "multiview" else None,
            group_attention=kind == "multiview",
            # folders of our own are of models that were trained that way, the published Zero123 was not
            image_resize="antialiased" if ours else "corners",
        )
        return declared(ours, where, assumed)

    def _image_size(self, unet: Mapping[str, Any]) -> tuple[int, int]:
        """Return (height, width) in pixels: the UNet's sample size times the autoencoder's factor."""
        latents = self.latents()
        factor = 1 if latents is None else latents[1]
        size = unet.get("sample_size") or 64
        size = [size, size] if isinstance(size, int) else size
        return _size(size, factor, f"{self.path / 'unet/config.json'}: sample_size")

    @property
    def _has_vae(self) -> bool:
        return (self.path / "vae").is_dir()

    def check(self) -> None:
        """Raise PriorError, which names the file, unless all parts that the model needs of those listed are there."""
        index = read_json(self.path, INDEX)
        listed = {part for part, value in index.items() if isinstance(value, list) and any(value)}
        ours = index.get("dream4d")
        if "text_encoder" in listed and not (isinstance(ours, dict) and ours.get("kind") == "novel_view"):
            listed -= {"image_encoder"}  # of pipelines that take images too: where prompts are read nobody asks for it
        read_schedule(self.path)
        if "tokenizer" in listed and not (self.path / "tokenizer").is_dir():
            raise _incomplete(self.path, "tokenizer/")
        self._check_unet()
        for part, stem in _WEIGHTS.items():
            if part in listed or part == "unet":
                if part != "clip_camera_projection":  # of one layer, which its weights describe
                    part_config(self.path, part)
                weight_files(self.path, part, stem)

    def schedule(self) -> tuple[NoiseSchedule, PredictionType]:
        return read_schedule(self.path)

    def _check_unet(self) -> str:
        """The class of its UNet; PriorError where it can't be used."""
        config, where = part_config(self.path, "unet")
        name = field(config, "_class_name", str, where, PriorError, _UNETS[0])
        if "SpatioTemporal" in name:
            raise PriorError(f"{self.path} is {ORBITS}")
        if name not in _UNETS:
            raise PriorError(
                f"{self.path}/unet is a {shortened(printable(name), 60)}; {' and '.join(_UNETS)} can be used "
                "(from the model's original checkpoint, dream4d convert makes such a folder)"
            )
        return name

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        self.check()
        name, where = self._check_unet(), self.path / "unet/config.json"
        network = load_network(self.path, "unet", name, dtype, device)
        self._check_inputs(network, where)
        return network

    def _check_inputs(self, network: Any, where: Path) -> None:
        """Refuse a UNet that wants other inputs than it will get; a run without memory or time shows it."""
        metadata, config, latents = self.metadata(), network.config, self.latents()
        n_latents = 3 if latents is None else latents[0]  # colors, where nothing is encoded
        # Zero123's reads the reference image's latents beside the noisy ones (2303.11328, section 3.2)
        n_given = n_latents * (2 if metadata.kind == "novel_view" else 1)
        if config.in_channels != n_given:
            raise PriorError(
                f"{where}: in_channels is {config.in_channels}, but a model of kind {metadata.kind!r} is given "
                f"{n_given} here: models for inpainting, depth or other inputs can't be used"
            )
        width = config.get("encoder_hid_dim") or config.cross_attention_dim
        width = width[0] if isinstance(width, list | tuple) else width
        if (self.path / "text_encoder/config.json").is_file():
            encoder, place = part_config(self.path, "text_encoder")
            made = next((encoder[name] for name in ("d_model", "hidden_size") if name in encoder), None)  # T5, CLIP
            if isinstance(made, int) and isinstance(width, int) and made != width:
                raise PriorError(
                    f"{where}: this UNet reads tokens {width} wide, {place} says the text encoder makes them "
                    f"{made} wide: they are not of one model"
                )
        is_3d = type(network).__name__ == _UNETS[1]
        side = 2 ** (len(config.block_out_channels) + 2)  # every level can halve it, and something is left
        noisy = torch.empty(1, n_given, *([2] if is_3d else []), side, side, dtype=network.dtype, device="meta")
        tokens = torch.empty(1, 8, width or 1, dtype=network.dtype, device="meta")
        more = {} if is_3d or metadata.vector is None else {"class_labels": tokens.new_empty(1, _VECTOR)}
        tensors = {n: t.to("meta") for n, t in (*network.named_parameters(), *network.named_buffers())}
        inputs = (noisy, torch.empty(1, device="meta"), tokens)
        try:
            with torch.no_grad():
                answer = torch.func.functional_call(network, tensors, inputs, {**more, "return_dict": False})[0]
        except Exception as error:  # whatever the network misses
            raise PriorError(
                f"{where}: a network of this configuration can't be run as a model of kind {metadata.kind!r} "
                f"({reason(error)})"
            ) from error
        # more channels than latents: IF's UNets answer a variance too, which is left
        if answer.shape[2:] != noisy.shape[2:] or answer.shape[1] < n_latents:
            raise PriorError(
                f"{where}: of {tuple(noisy.shape[1:])} this network makes {tuple(answer.shape[1:])}; it must answer "
                f"{n_latents} channels of the same size"
            )

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        if not self._has_vae:
            return None
        config, where = part_config(self.path, "vae")
        name = field(config, "_class_name", str, where, PriorError, _VAE)
        if name != _VAE:
            raise PriorError(f"{where}: _class_name is {describe(name)}; an {_VAE} can be used")
        return load_network(self.path, "vae", name, dtype, device)

    def latents(self) -> tuple[int, int] | None:
        if not self._has_vae:
            return None
        return latents_of(*part_config(self.path, "vae"))

    def vae_scaling(self) -> float | None:
        if not self._has_vae:
            return None
        config, where = part_config(self.path, "vae")
        scaling = field(config, "scaling_factor", float, where, PriorError, 0.18215)
        if not 1e-4 <= scaling <= 1e4:
            raise PriorError(f"{where}: scaling_factor is {scaling}: no autoencoder's latents are scaled so")
        return scaling

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Load CLIP's or T5's text encoder, as the folder's configuration names it."""
        config, where = part_config(self.path, "text_encoder")
        names = field(config, "architectures", list, where, PriorError, [])
        name = names[0] if names else field(config, "model_type", str, where, PriorError, "clip")
        chosen = next((k for k in ("t5", "clip") if isinstance(name, str) and name.lower().startswith(k)), None)
        if chosen is None:
            raise PriorError(
                f"{where}: architectures names {describe(name)}; the text encoders of CLIP and T5 can be used"
            )
        tokenizer = read_tokenizer(self.path / "tokenizer")
        return tokenizer, load_encoder(self.path, "text_encoder", *_ENCODERS[chosen], dtype, device)

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        names = ("CLIPVisionModelWithProjection", "CLIPVisionConfig")
        return load_encoder(self.path, "image_encoder", *names, dtype, device)

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        file = part_weights(self.path, "clip_camera_projection", NETWORK)
        names = ("proj.weight", "proj.bias")
        if not set(names) <= file.shapes.keys():
            raise PriorError(f"{file.path} holds {sorted(file.shapes)}, not proj.weight and proj.bias")
        shapes = tuple(file.shapes[name] for name in names)
        if (len(shapes[0]), len(shapes[1])) != (2, 1) or shapes[0][0] != shapes[1][0]:
            raise PriorError(f"{file.path}: proj.weight {shapes[0]} and proj.bias {shapes[1]} are no layer's")
        weight, bias = (file.tensor(name).float().to(device) for name in names)
        return weight, bias


def _size(size: Any, factor: int, where: str) -> tuple[int, int]:
    """A size (height, width) times a factor, in pixels."""
    plain = isinstance(size, list | tuple) and len(size) == 2
    if not plain or any(isinstance(s, bool) or not isinstance(s, int) for s in size):
        raise PriorError(f"{where} must be a whole number, or height and width, got {describe(size)}")
    if not all(1 <= s * factor <= MOST_PIXELS for s in size):
        raise PriorError(f"{where} is {describe(size)}; images of up to {MOST_PIXELS} pixels a side can be meant")
    return size[0] * factor, size[1] * factor


def read_schedule(folder: Path) -> tuple[NoiseSchedule, PredictionType]:
    """Return the noise levels that the folder's scheduler says, and what the model predicts."""
    name = "scheduler/scheduler_config.json"
    return noise_of(read_json(folder, name), Path(folder) / name)


def _incomplete(folder: Path, name: str) -> PriorError:
    return PriorError(f"{folder} is not a complete diffusers folder: {name} is missing")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the folder's JSON files; PriorError where it is missing or broken."""
    path = Path(folder) / name
    if not Path(folder).is_dir():
        raise PriorError(f"there is no model folder {folder}")
    if not path.is_file():
        raise _incomplete(folder, name)
    return as_object(read_document(path, PriorError), path, PriorError)


def part_config(folder: Path, part: str) -> tuple[dict[str, Any], Path]:
    """Return a part's configuration, and the file that it is, for messages."""
    return read_json(folder, f"{part}/config.json"), folder / part / "config.json"


def guess_kind(folder: Path, unet_config: dict[str, Any]) -> PriorKind:
    """Return the kind that the networks' configurations suggest, for folders that don't say it themselves."""
    if unet_config.get("_class_name") == "UNet3DConditionModel":
        return "video"
    if (folder / "image_encoder").is_dir() and not (folder / "text_encoder").is_dir():
        return "novel_view"
    if unet_config.get("class_embed_type") == "projection":
        return "multiview"
    return "image" if (folder / "vae").is_dir() else "pixel"


def weight_files(folder: Path, part: str, stem: str) -> list[Path]:
    """Return the files that hold the weights of a part: full precision before "fp16", .safetensors before .bin.

    A form that is there in part (its list without its pieces, pointers in place of files) is passed over where another
    one is whole. PriorError names what is missing or wrong, be it one of several files that together hold the weights.
    """
    place = folder / part
    names = {path.name for path in place.glob("*")}
    stems = (stem, "pytorch_model") if stem == ENCODER else (stem,)  # transformers' name for torch's own format
    wrong: PriorError | None = None
    for infix in ("", ".fp16"):
        for suffix in (".safetensors", ".bin"):
            for name in stems:
                lists = (name + end for end in list_endings(suffix, infix))
                for file in dict.fromkeys((f"{name}{infix}{suffix}", *lists)):
                    if file not in names:
                        continue
                    try:
                        found = _pieces(folder, part, file, names) if file.endswith(".json") else [place / file]
                        for path in found:
                            first_bytes(path)
                        return found
                    except PriorError as error:
                        wrong = wrong or error
    raise wrong or _incomplete(folder, f"{part}/{stem}.safetensors")


def list_endings(suffix: str, infix: str) -> tuple[str, str]:
    """How the names of lists end that say which of several files holds which tensor: newer and older versions' way."""
    return f"{suffix}.index{infix}.json", f"{suffix}{infix}.index.json"


def _pieces(folder: Path, part: str, name: str, names: Iterable[str]) -> list[Path]:
    """Return the files that a list names. They lie beside it; one that is not there is an error."""
    where = folder / part / name
    pieces = field(read_json(folder, f"{part}/{name}"), "weight_map", dict, where, PriorError, {}).values()
    for piece in pieces:
        # a path would lead out of the folder
        if not isinstance(piece, str) or re.search(r"[/\\:]", piece) or not piece.endswith(SUFFIXES):
            raise PriorError(f"{where}: weight_map must name files of weights beside it, got {describe(piece)}")
    missing = sorted(set(pieces) - set(names))
    if missing or not pieces:
        piece = missing[0] if missing else "what weight_map should list"
        raise _incomplete(folder, f"{part}/{piece}")
    return [folder / part / piece for piece in sorted(set(pieces))]


def part_weights(folder: Path, part: str, stem: str) -> Checkpoint:
    """Open the weights of a part, be they in one file or in several."""
    files = [open_checkpoint(path) for path in weight_files(folder, part, stem)]
    owner = {name: file for file in files for name in file.shapes}
    shapes = {name: file.shapes[name] for name, file in owner.items()}
    return Checkpoint(files[0].path, shapes, lambda name: owner[name].tensor(name))


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_network(folder: Path, part: str, class_name: str, dtype: torch.dtype, device: Device) -> nn.Module:
    """Load a frozen diffusers network from one of the folder's parts."""
    config, where = part_config(folder, part)
    weights = part_weights(folder, part, NETWORK)
    network = empty_network(class_name, config, len(weights.shapes), where)
    wanted = shapes_of(network.state_dict())
    state = {}
    for old in weights.shapes:
        # older files name the layers of an autoencoder's attention otherwise, and keep them as 1x1 convolutions
        *above, layer, kind = old.rsplit(".", 2) if old.count(".") > 1 else ("", "", old)
        modern = ".".join((*above, _OLD_ATTENTION.get(layer, layer), kind))
        name = modern if modern in wanted else old
        tensor = weights.tensor(old).to(device, dtype)
        flat = name != old and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        state[name] = tensor.flatten(1) if flat else tensor
    what = f"{folder / part}: what the weights hold and config.json says"
    return frozen(filled(network, state, what), device, folder / part)


def load_encoder(
    folder: Path, part: str, class_name: str, config_name: str, dtype: torch.dtype, device: Device
) -> nn.Module:
    """Load one of transformers' encoders from one of the folder's parts."""
    import transformers

    weights = part_weights(folder, part, ENCODER)
    said, where = part_config(folder, part)
    config = encoder_config(config_name, said, len(weights.shapes), where)
    encoder = built(lambda: getattr(transformers, class_name)(config), class_name, where)
    names = encoder_state(encoder, {name: name for name in weights.shapes})
    # T5's outputs overflow in half precision: as in transformers, that layer stays in float32 then
    wide = (".wo.weight",) if dtype == torch.float16 else ()
    # what else is stored there, another tower or layers beyond those that are read, has no place here
    state = {
        name: weights.tensor(names[name]).to(device, torch.float32 if name.endswith(wide) else dtype)
        for name in encoder.state_dict()
        if name in names
    }
    what = f"{folder / part}: what the weights hold and config.json says"
    return frozen(filled(encoder, state, what), device, folder / part)
