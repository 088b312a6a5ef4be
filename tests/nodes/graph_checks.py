"""Checks of priors of the graph's models, run inside ComfyUI's Python; test_graph_priors.py starts it and reads it.

`graph_checks.py CHECKOUT NAME ...` runs the checks of these names and prints one line of JSON for each: {"name",
"error" (a traceback, or null), "found" (numbers), "seconds"}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

COMFYUI, NAMES = sys.argv[1], sys.argv[2:]
sys.path[:0] = [COMFYUI]
sys.argv = ["checks", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import graph_models as models  # noqa: E402
import torch  # noqa: E402
from graph_pack import pack  # noqa: E402
from torch import Tensor, nn  # noqa: E402

torch.set_num_threads(1)
families, graph_prior, graph_nodes = pack("nodes.graph_families"), pack("nodes.graph_prior"), pack("nodes.graph_nodes")
cameras, distillation = pack("dream4d_engine.cameras"), pack("dream4d_engine.guidance.distillation")
execution, randomness = pack("dream4d_engine.guidance.execution"), pack("dream4d_engine.randomness")
schedules = pack("dream4d_engine.schedules")
Runtime = pack("dream4d_engine.priors.networks.execution").Runtime
Encoder = pack("nodes.graph_encoder").Encoder
Execution = execution.Execution

PROMPT, SHARES = "a red cube is jumping", (0.1, 0.5, 0.9)
VIDEOS = ("wan", "wan22", "ltx", "hunyuan")
NOVEL_VIEWS = ("zero123", "sv3d_u", "sv3d_p")
NAMED = ("sd15", "sdxl", "sd3", "flux", *VIDEOS)
ENCODING_TOLERANCE = 1e-3

CHECKS = {}


def check(function):
    """Make a check known by its name; of one with `families` there is one for each."""
    CHECKS[function.__name__] = function
    return function


def for_each(*names: str):
    """Make a check known for each family."""

    def add(function):
        for name in names:
            CHECKS[f"{function.__name__}[{name}]"] = lambda name=name: function(name)
        return function

    return add


@contextlib.contextmanager
def training():
    """What a node of ours does inside ComfyUI's inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def handle_of(name: str, three: models.Three | None = None, **changes):
    """The prior that the node would make, of the smallest size."""
    three = three or models.FAMILIES[name]()
    kind = "video" if name in VIDEOS else "novel_view" if name in NOVEL_VIEWS else "image"
    size, frames = models.SIZES[name]
    family = families.family_of(three.model, kind)
    families.check_vae(three.model, three.vae, family)
    families.check_clip(three.model, three.clip, family)
    given = {"family": family, "model": three.model, "clip": three.clip, "vae": three.vae}
    return graph_prior.GraphPrior(**given | {"size": size, "n_frames": frames} | changes)


def config(scale: float = 25.0, **changes):
    """Guidance at middle noise."""
    return distillation.DistillationConfig(scale, schedules.constant(0.5), schedules.constant(0.9), **changes)


def views(n: int, size: tuple[int, int], spread: bool = False):
    """Cameras [1, n]: a take seen from the front, or (`spread`) single images from all around [n, 1]."""
    time_of = torch.linspace(0, 1, n)[None]
    if not spread:
        return cameras.make_cameras(torch.zeros(1, n), 0.2, 3.0, 0.7, time_of, *size)
    return cameras.make_cameras(torch.linspace(0, 4.5, n)[:, None], 0.2, 3.0, 0.7, torch.zeros(n, 1), *size)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    assert one.shape == other.shape, (one.shape, other.shape)
    assert one.isfinite().all() and other.isfinite().all()
    return float((one - other).abs().max() / other.abs().max())


def noisy_takes(guidance, prior, n: int, seed: int = 0) -> Tensor:
    """n latents [n, f, c, h, w], of the size that is encoded."""
    shape = guidance.denoiser.encoder.latent_shape(prior.size, prior.n_frames)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((n, *shape[1:]), generator=generator)
    return z.movedim(2, 1) if len(shape) == 5 else z[:, None]


def told(guidance, row: int, like: Tensor):
    """The conditions of a row of the table, for takes like these."""
    return graph_prior.Conditions(torch.full((len(like), 1, 1, 1), float(row)))


def answer_of(handle) -> Tensor:
    """What a prior makes of one noisy take at a share of 0.7 of its noise, loaded and released for that."""
    prior = handle.load(Runtime(torch.device("cpu")))
    guidance = prior.guide(PROMPT, None, config())
    sigma = guidance.denoiser.noise.sigma_of(torch.tensor([0.7]))
    x = noisy_takes(guidance, handle, 1) * sigma
    answer = guidance.denoiser.denoise(x, sigma, told(guidance, 0, x))
    prior.release()
    return answer


# ---- equal to diffusers ------------------------------------------------------------------------------------------


def _embeddings(three: models.Three) -> tuple[Tensor, dict]:
    """What CLIP makes of the first of the prompts, as ordinary tensors."""
    prompt = graph_prior.view_prompts(PROMPT)[0]
    with torch.inference_mode():
        (conditioning,) = three.clip.encode_from_tokens_scheduled(three.clip.tokenize(prompt))
    return conditioning[0].clone().float(), conditioning[1]


def _load(network: nn.Module, state: dict) -> nn.Module:
    missing, unexpected = network.load_state_dict({k: v.clone().float() for k, v in state.items()}, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return network.eval().requires_grad_(False)


def _diffusers_sd(state: dict, config: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    network = UNet2DConditionModel(**config)
    found = convert_ldm_unet_checkpoint(models.prefixed(state, models.UNET_PREFIX), dict(network.config))
    return _load(network, found)


_SD15 = {
    "block_out_channels": (320, 320),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def _sd15(three: models.Three, prior):
    network = _diffusers_sd(models.sd15_unet(), _SD15)
    context, _ = _embeddings(three)

    def x0(x: Tensor, sigma: Tensor, share: float) -> Tensor:
        scaled = x[:, 0] / (1 + sigma**2).sqrt()[:, None, None, None]
        eps = network(scaled, torch.tensor(round(share * 1000)), context.expand(len(x), -1, -1)).sample
        return (x[:, 0] - sigma[:, None, None, None] * eps)[:, None]

    return x0


def _sdxl(three: models.Three, prior):
    network = _diffusers_sd(
        models.sdxl_unet(),
        {
            "block_out_channels": (320, 320, 320),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 5, 5),
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 10],
            "reverse_transformer_layers_per_block": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    )
    context, others = _embeddings(three)
    pooled = others["pooled_output"].clone().float()
    sizes = torch.tensor([[*prior.size, 0, 0, *prior.size]], dtype=torch.float32)

    def x0(x: Tensor, sigma: Tensor, share: float) -> Tensor:
        scaled = x[:, 0] / (1 + sigma**2).sqrt()[:, None, None, None]
        added = {"text_embeds": pooled.expand(len(x), -1), "time_ids": sizes.expand(len(x), -1)}
        step = torch.tensor(round(share * 1000))
        eps = network(scaled, step, context.expand(len(x), -1, -1), added_cond_kwargs=added).sample
        return (x[:, 0] - sigma[:, None, None, None] * eps)[:, None]

    return x0


def _flow_x0(x: Tensor, sigma: Tensor, velocity) -> Tensor:
    """x0 of a flow's velocity at z_t [n, c, ...] and times [n]; x [n, f, c, h, w]."""
    t = sigma / (1 + sigma)
    z_t = x / (1 + sigma)[:, None, None, None, None]
    v = velocity(z_t.movedim(2, 1), t).movedim(1, 2)
    return z_t - t[:, None, None, None, None] * v


def _wan(three: models.Three, prior):
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    network = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, ffn_dim=256, num_layers=2)
    _load(network, convert_wan_transformer_to_diffusers(models.wan_transformer()))
    context, _ = _embeddings(three)

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        return network(z_t, t * 1000, context.expand(len(z_t), -1, -1)).sample

    return lambda x, sigma, share: _flow_x0(x, sigma, velocity)


def _ltx(three: models.Three, prior):
    from diffusers import LTXVideoTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

    network = LTXVideoTransformer3DModel(attention_head_dim=4, cross_attention_dim=128, num_layers=2)
    _load(
        network,
        convert_ltx_transformer_checkpoint_to_diffusers(models.prefixed(models.ltx_transformer(), models.UNET_PREFIX)),
    )
    context, others = _embeddings(three)
    mask = others["attention_mask"].clone()

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        n, _, frames, height, width = z_t.shape
        out = network(
            z_t.flatten(2).movedim(1, 2),
            context.expand(n, -1, -1),
            t[:, None] * 1000,
            mask.expand(n, -1),
            frames,
            height,
            width,
            rope_interpolation_scale=(8 / 25, 32, 32),  # frames of a latent by frames of a second; pixels of a latent
        ).sample
        return out.movedim(2, 1).unflatten(2, (frames, height, width))

    return lambda x, sigma, share: _flow_x0(x, sigma, velocity)


class _Splitting:
    """torch, that splits by another width than it is told."""

    def __init__(self, told: int, width: int) -> None:
        self.told, self.width = told, width

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def split(self, tensor: Tensor, sizes: tuple, dim: int):
        """Split at multiples of the width; the last piece is the rest."""
        known = [self.width if size == self.told else size for size in sizes[:-1]]
        return torch.split(tensor, [*known, tensor.shape[dim] - sum(known)], dim)


def _hunyuan(three: models.Three, prior):
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    network = HunyuanVideoTransformer3DModel(num_attention_heads=1, num_layers=1, num_single_layers=1)
    width = 128  # the converter knows one width
    with mock.patch.dict(
        convert_hunyuan_video_transformer_to_diffusers.__globals__, {"torch": _Splitting(3072, width)}
    ):
        found = convert_hunyuan_video_transformer_to_diffusers(models.hunyuan_transformer())
    _load(network, found)
    context, others = _embeddings(three)
    pooled = others["pooled_output"].clone().float()

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        n = len(z_t)
        mask = torch.ones(n, context.shape[1], dtype=torch.bool)
        guidance = torch.full((n,), 6000.0)
        return network(
            z_t, t * 1000, context.expand(n, -1, -1), mask, pooled.expand(n, -1), guidance, return_dict=False
        )[0]

    return lambda x, sigma, share: _flow_x0(x, sigma, velocity)


def _sd3(three: models.Three, prior):
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    network = SD3Transformer2DModel(
        sample_size=128,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        pos_embed_max_size=192,
    )
    found = convert_sd3_transformer_checkpoint_to_diffusers(
        models.prefixed(models.sd3_transformer(), models.UNET_PREFIX)
    )
    _load(network, found)
    context, others = _embeddings(three)
    pooled = others["pooled_output"].clone().float()

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        n = len(z_t)
        given = (context.expand(n, -1, -1), pooled.expand(n, -1), t * 1000)
        return network(z_t[:, :, 0], *given).sample[:, :, None]

    return lambda x, sigma, share: _flow_x0(x, sigma, velocity)


@for_each("sd15", "sdxl", "wan", "ltx", "sd3", "hunyuan")
def equal_to_diffusers(name: str) -> dict:
    """x0 of three noise levels is that of diffusers' network of the same weights, told the same."""
    three = models.FAMILIES[name]()
    handle, found = handle_of(name, three), {}
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config())
        reference = globals()[f"_{name}"](three, handle)
        for share in SHARES:
            sigma = guidance.denoiser.noise.sigma_of(torch.full((2,), share))
            x = noisy_takes(guidance, handle, 2) * (1 + sigma**2).sqrt()[:, None, None, None, None]
            mine = guidance.denoiser.denoise(x, sigma, told(guidance, 0, x))
            with torch.no_grad():
                theirs = reference(x, sigma, share)
            scale = float(theirs.abs().max())
            found[f"x0 at {share}"] = float((mine - theirs).abs().max()) / max(1.0, scale)
            found[f"moved at {share}"] = float((mine - x).abs().max())
        prior.release()
    assert all(value < 1e-3 for key, value in found.items() if key.startswith("x0")), found
    return found


@for_each(*NOVEL_VIEWS)
def novel_views(name: str) -> dict:
    """x0 is that of another's network, told what core's own conditioning node says of the same views."""
    return _single_views() if name == "zero123" else _orbit(name)


def _single_views() -> dict:
    """Stable Zero123 against diffusers."""
    import math

    from comfy_extras.nodes_stable3d import StableZero123_Conditioning

    three = models.FAMILIES["zero123"]()
    handle = handle_of("zero123", three)
    image = torch.rand(1, *handle.size, 3, generator=torch.Generator().manual_seed(8))
    azimuth, elevation = (40.0, -110.0), (25.0, -5.0)
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        front = cameras.make_cameras(torch.zeros(1, 1), 0.0, 3.0, 0.7, torch.zeros(1, 1), *handle.size)
        seen = cameras.make_cameras(
            torch.tensor([[math.radians(a)] for a in azimuth]),
            torch.tensor([[math.radians(e)] for e in elevation]),
            3.0,
            0.7,
            torch.zeros(2, 1),
            *handle.size,
        )
        shown = pack("dream4d_engine.priors.handle").ReferenceView(image[0].movedim(-1, 0), front)
        guidance = prior.guide("", None, config(), shown)
        network = _diffusers_sd(models.sd15_unet(in_channels=8), _SD15 | {"in_channels": 8})
        text, negative = guidance.conditions(seen)
        found = {}
        for share in SHARES:
            sigma = guidance.denoiser.noise.sigma_of(torch.full((2,), share))
            x = noisy_takes(guidance, handle, 2) * (1 + sigma**2).sqrt()[:, None, None, None, None]
            for word, conditions in (("text", text), ("negative", negative)):
                mine = guidance.denoiser.denoise(x, sigma, conditions)
                for i in range(2):
                    with torch.inference_mode():
                        given = (three.clip, image.clone(), three.vae, handle.size[1], handle.size[0], 1)
                        told_by_core = StableZero123_Conditioning.execute(*given, elevation[i], azimuth[i]).result
                        tokens, others = told_by_core[0 if word == "text" else 1][0]
                        if word == "text":
                            tokens = three.model.model.cc_projection(tokens)
                    tokens, beside = tokens.clone(), others["concat_latent_image"].clone()
                    scaled = x[i] / (1 + sigma[i] ** 2).sqrt()
                    with torch.no_grad():
                        both = torch.cat((scaled, beside), 1)
                        eps = network(both, torch.tensor(round(share * 1000)), tokens).sample
                    key = f"{word} at {share}"
                    found[key] = max(found.get(key, 0.0), difference(mine[i], x[i] - sigma[i] * eps))
        images = torch.rand(2, 1, 3, *handle.size, generator=torch.Generator().manual_seed(9)).requires_grad_()
        out = distillation.distill(guidance, images, seen, 0.5, randomness.Draw(0))
        norms = torch.autograd.grad(out.loss, images)[0].flatten(2).norm(dim=-1)
        prior.release()
    assert all(value < 1e-3 for value in found.values()) and norms.min() > 0, (found, norms)
    assert len({handle.fingerprint(), handle_of("zero123", three, size=(64, 64)).fingerprint()}) == 2
    return found


# ---- whole orbits --------------------------------------------------------------------------------------------------

_SV3D_RES = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
_SV3D_RES |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
_SV3D_ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
_SV3D_ENDS |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_SV3D_ENDS |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}


def _sv3d_names() -> dict[str, str]:
    """The beginnings of names in SV3D's checkpoints, and diffusers' for them."""
    names, levels = dict(_SV3D_ENDS), models.SV3D_LEVELS
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions = {"middle_block.1": "mid_block.attentions.0"}
    down = up = 0
    for level, count in enumerate(levels):
        for i in range(count):
            down += 1
            resnets[f"input_blocks.{down}.0"] = f"down_blocks.{level}.resnets.{i}"
            attentions[f"input_blocks.{down}.1"] = f"down_blocks.{level}.attentions.{i}"
        down += 1
        names[f"input_blocks.{down}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, count in enumerate(reversed(levels)):
        for i in range(count + 1):
            resnets[f"output_blocks.{up}.0"] = f"up_blocks.{level}.resnets.{i}"
            names[f"output_blocks.{up}.1.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            up += 1
    for theirs, ours in resnets.items():
        names[f"{theirs}.time_mixer"] = f"{ours}.time_mixer"
        for part, name in _SV3D_RES.items():
            names[f"{theirs}.{part}"] = f"{ours}.spatial_res_block.{name}"
            names[f"{theirs}.time_stack.{part}"] = f"{ours}.temporal_res_block.{name}"
    for theirs, ours in attentions.items():
        names |= {f"{theirs}.{part}": f"{ours}.{part}" for part in ("norm", "proj_in", "proj_out", "time_mixer")}
        names |= {f"{theirs}.transformer_blocks": f"{ours}.transformer_blocks"}
        names |= {f"{theirs}.time_stack": f"{ours}.temporal_transformer_blocks"}
        names |= {f"{theirs}.time_pos_embed.{i}": f"{ours}.time_pos_embed.linear_{i // 2 + 1}" for i in (0, 2)}
    return names


def _sv3d_of_diffusers(weights: dict[str, Tensor]) -> nn.Module:
    """Diffusers' network of SVD with the weights of a small SV3D_u."""
    from diffusers import UNetSpatioTemporalConditionModel

    network = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) * 3,
        block_out_channels=(320, 320, 320),
        projection_class_embeddings_input_dim=256,
        layers_per_block=models.SV3D_LEVELS,
        num_attention_heads=(5, 5, 5),
    )
    names, found = sorted(_sv3d_names().items(), key=lambda pair: -len(pair[0])), {}
    for key, value in weights.items():
        theirs, ours = next(pair for pair in names if key.startswith(f"{pair[0]}."))
        found[ours + key.removeprefix(theirs)] = value
    return _load(network, found)


def _cores_x0(model, x: Tensor, sigma: Tensor, conditioning: list) -> Tensor:
    """What a core sampler's model answers to x [f, c, h, w], told a CONDITIONING."""
    import comfy.samplers

    def once(denoise, noisy: Tensor, sigmas: Tensor, **given) -> Tensor:
        return denoise(noisy, sigmas[:1].expand(len(noisy)), **given["extra_args"])

    sampler, sigmas = comfy.samplers.KSAMPLER(once), torch.cat((sigma.reshape(1), torch.zeros(1)))
    with torch.inference_mode():
        x0 = comfy.sample.sample_custom(
            model, x / sigma, 1.0, sampler, sigmas, conditioning, conditioning, torch.zeros_like(x)
        )
    return model.model.process_latent_in(x0.clone())


def _orbit(name: str) -> dict:
    """SV3D against a core sampler, SV3D_u also against diffusers, and what a node and a run make of it."""
    from comfy_extras.nodes_stable3d import SV3D_Conditioning

    three = models.FAMILIES[name]()
    handle, found = handle_of(name, three), {}
    n_views, image = handle.n_frames, torch.rand(1, *handle.size, 3, generator=torch.Generator().manual_seed(8))
    azimuth, elevation = [130.0, 250.0, 360.0], [35.0, -5.0, 12.0]  # from the reference's, which ends the orbit
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        ends = cameras.make_cameras(0.4, 0.2, 3.0, 0.7, torch.zeros(1, 1), *handle.size)
        turned = torch.tensor([azimuth]).deg2rad() + 0.4
        seen = cameras.make_cameras(turned, torch.tensor([elevation]).deg2rad(), 3.0, 0.7, 0.0, *handle.size)
        shown = pack("dream4d_engine.priors.handle").ReferenceView(image[0].movedim(-1, 0), ends)
        guidance = prior.guide("", None, config(), shown)
        with torch.inference_mode():
            given = (three.clip, image.clone(), three.vae, handle.size[1], handle.size[0], n_views, 12.0)
            cores = [
                [[t, o | {"azimuth": azimuth, "elevation": elevation}]]
                for ((t, o),) in SV3D_Conditioning.execute(*given).result[:2]
            ]
        weights = three.model.model.diffusion_model.state_dict()
        network = _sv3d_of_diffusers(weights) if name == "sv3d_u" else None
        shape = guidance.denoiser.encoder.latent_shape(handle.size, n_views)
        z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
        for share in (0.4, 0.55, 0.75):  # sigma 0.3, 2 and 29: what its recipe asks at
            sigma = guidance.denoiser.noise.sigma_of(torch.full((1,), share))
            x = z * (1 + sigma**2).sqrt()
            for word, mine, theirs in zip(("text", "negative"), guidance.conditions(seen), cores, strict=True):
                if word == "negative" and (network is None or share != 0.55):  # once is enough
                    continue
                x0 = guidance.denoiser.denoise(x, sigma, mine)
                found[f"{word} at {share}"] = difference(x0[0], _cores_x0(three.model, x[0], sigma, theirs))
                if network is None:
                    continue
                tokens, others = theirs[0]
                beside = others["concat_latent_image"].clone().expand(n_views, -1, -1, -1)
                both = torch.cat((x / (1 + sigma**2).sqrt(), beside[None]), 2)
                with torch.no_grad():
                    v = network(both, 0.25 * sigma.log(), tokens.clone(), torch.zeros(1, 1)).sample
                direct = x / (1 + sigma**2) - v * sigma / (1 + sigma**2).sqrt()
                found[f"diffusers, {word} at {share}"] = difference(x0, direct)
        prior.release()
    assert all(value < 1e-3 for value in found.values()), found
    if name == "sv3d_u":
        _orbit_refused(three)
        return found | _orbit_trains(three, shown, seen)
    return found


def _orbit_refused(three: models.Three) -> None:
    """What a node makes of SV3D, and what doesn't go with it."""
    with mock.patch.object(graph_nodes, "say_on_node") as said:
        made = graph_nodes._make("novel_view", three.model, three.clip, three.vae, (0, 0, 0), None)[0]
    assert (made.size, made.n_frames, made.orbit) == ((576, 576), 21, "static")
    assert said.call_args.args[0].startswith("SV3D_u sees 576x576, 21 views at once (it was trained on orbits of 21")
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

    for node, expected, given in (
        ("novel_view", "by CLIP ViT-H, 1024 numbers, not by one of 768", replace(three, clip=models.clip_vision())),
        ("novel_view", "has 16 channels", replace(three, vae=models.vae(models.tiny_image_vae("taesd3")))),
        ("novel_view", "latents have the scale 0.13", replace(three, vae=models.vae(models.tiny_image_vae("taesdxl")))),
    ):
        _refused(node, expected, given)
    for kind in ("edm", "eps"):
        (other,) = ModelSamplingContinuousEDM().patch(three.model, kind, 120.0, 0.002)
        _refused("novel_view", "noise levels are of the class", replace(three, model=other))


def _orbit_trains(three: models.Three, shown, seen) -> dict:
    """The gradient of every view, the same however much is done at once; two steps of the recipe for orbits."""
    engine = "dream4d_engine.training"
    config, static, told_of = (pack(f"{engine}.{name}") for name in ("config", "static", "guidance"))
    three, found = replace(three, vae=models.vae(models.tiny_image_vae())), {}
    with training():
        images = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(9)).requires_grad_()
        prior = handle_of("sv3d_u", three).load(Runtime(torch.device("cpu")))
        guidance = prior.guide("", None, config.IMAGE_TO_3D_ORBIT.guidance[0].distillation, shown)
        assert guidance.denoiser.execution == execution.Execution(1, images_kept=0, groups_at_once=1)
        gradients = []
        for way in (guidance.denoiser.execution, execution.Execution()):
            told = replace(guidance, denoiser=guidance.denoiser.run_as(way))
            out = distillation.distill(told, images, seen, 0.5, randomness.Draw(0))
            gradients.append(torch.autograd.grad(out.loss, images)[0])
        prior.release()
    assert gradients[0].flatten(2).norm(dim=-1).min() > 0
    found["gradient"] = difference(*gradients)
    assert found["gradient"] < 1e-4, found
    published = config.IMAGE_TO_3D_ORBIT
    alone = replace(published.reference, rgb=0.0, mask=0.0, entropy=0.0, phases=(config.ReferencePhase(0.0, 16),))
    recipe = replace(
        published,
        steps=2,
        scene=replace(config.TOY_STATIC.scene, background=published.scene.background),
        phases=(config.Phase(0.0, 1, 16, 16),),
        regularizers=config.RegularizerWeights(),  # the prior alone moves anything
        reference=alone,
        loop=config.TOY_STATIC.loop,
    )
    handle = handle_of("sv3d_u", three, n_frames=5)  # of 21: quicker
    recipe = told_of.with_views_of(recipe, {"novel_view": handle})
    assert (recipe.orbit, recipe.n_views) == ("static", 5)
    disc = torch.ones(32, 32, 1)
    reference = pack(f"{engine}.reference").Reference(torch.rand(32, 32, 3), disc, "noise")
    train = partial(static.train_static, reference=reference)
    scene, losses = _trained("novel_view", handle, recipe, train, reference)
    before = static.first_scene(recipe, 3).state_dict()
    moved = [n for n, value in scene.state_dict().items() if n in before and not value.equal(before[n])]
    assert len(losses) == 2 and min(losses) > 0 and any("grid" in n for n in moved), (losses, moved)
    assert all(value.isfinite().all() for value in scene.state_dict().values() if value.is_floating_point())
    return found | {"losses": losses}


# ---- the toys ------------------------------------------------------------------------------------------------------


def _trained(kind: str, handle, recipe, train, reference=None) -> tuple:
    """The scene and the losses of a few steps by a prior."""
    cpu, losses, held = torch.device("cpu"), [], []
    told_of, loop = pack("dream4d_engine.training.guidance"), pack("dream4d_engine.training.loop")
    control = loop.RunControl(on_step=lambda report, _: losses.append(report.loss))
    with training():
        runtime = told_of.runtime_for(recipe, cpu)
        told = told_of.load_guidance(recipe, {kind: handle}, PROMPT, runtime, reference, "a blue cone", held.append)
        scene, _ = train(recipe, told, seed=3, device=cpu, control=control)
        for prior in held:
            prior.release()
    return scene, losses


@for_each("image", "video")
def the_toys(kind: str) -> dict:
    """A toy prior as the graph's MODEL, CLIP and VAE gives the scene that its folder gives, with the same draws."""
    import graph_toys

    engine = "dream4d_engine"
    conditioning, loading = pack(f"{engine}.priors.conditioning"), pack(f"{engine}.priors.loading")
    config, static, motion = (pack(f"{engine}.training.{name}") for name in ("config", "static", "motion"))
    folder, plain = pack(f"{engine}.priors.files").toy_folder(kind), conditioning.frame_time_vector
    three = graph_toys.toy(folder, loading.load_prior, plain)
    direct = pack(f"{engine}.priors.files").PriorFiles("toy", kind, folder)
    if kind == "image":
        node = graph_nodes.ImagePriorFromModel
        # as ComfyUI calls it
        given = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(
            model=three.model, clip=three.clip, vae=three.vae, width=32, height=32
        )[0]
        # a recipe of the image prior alone, at the toys' size
        term = replace(config.TOY_STATIC.guidance[0], prior="image")
        recipe, train = replace(config.TOY_STATIC, steps=2, guidance=(term,)), static.train_static
    else:
        given = handle_of("wan", three, size=(32, 32), n_frames=8)  # the toy's takes are no 4n + 1 frames
        recipe = replace(config.TOY_MOTION, steps=2)
        still = static.first_scene(replace(config.TOY_STATIC, steps=1), 3)
        train = lambda *what, **how: motion.train_motion(still, *what, deformation_scale=1.0, **how)  # noqa: E731

    given = replace(given, family=replace(given.family, name=f"toy {kind}"))  # a prior's draws go by its name

    def by_places(time_of: Tensor) -> Tensor:  # a graph's model is told no times
        return plain(torch.linspace(0, 1, time_of.shape[1]).expand_as(time_of))

    with mock.patch.object(conditioning, "frame_time_vector", by_places):
        expected, losses = _trained(kind, direct, recipe, train)
        scene, mine = _trained(kind, given, recipe, train)
    found = {"losses": max(abs(m / e - 1) for m, e in zip(mine, losses, strict=True))}
    for name, value in expected.state_dict().items():
        if value.is_floating_point() and value.numel() > 1:
            found[name] = float((scene.state_dict()[name] - value).norm() / value.norm().clamp(min=1e-12))
    # the body's gradient is a sum over all points of what nearly cancels: rounding counts ten times as much
    allowed = {name: 1e-4 if name == "deformation.body.knots" else 1e-5 for name in found}
    off = {name: value for name, value in found.items() if not value < allowed[name]}
    assert len(losses) == 2 and min(losses) > 0 and not off, (losses, found)
    return found


# ---- a Gaussian ----------------------------------------------------------------------------------------------------

MEAN, SPREAD = 0.3, 0.7


class Exact(nn.Module):
    """A network that answers exactly for data of N(MEAN, SPREAD^2), in what its model's sampling predicts."""

    dtype = torch.float32

    def __init__(self, predicts: str, sigma_of_timestep) -> None:
        super().__init__()
        self.predicts, self.sigma_of_timestep = predicts, sigma_of_timestep
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, timestep: Tensor, **_) -> Tensor:
        """Return eps, v or the velocity; x as the model sees it."""
        sigma = self.sigma_of_timestep(timestep).view(-1, *[1] * (x.ndim - 1))
        if self.predicts == "flow":  # x = (1 - t) z + t eps
            scale = 1 - sigma
            sigma = sigma / scale
        else:  # x = (z + sigma eps) / sqrt(1 + sigma^2)
            scale = 1 / (1 + sigma**2).sqrt()
        noisy = x / scale
        x0 = (SPREAD**2 * noisy + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)
        eps = (noisy - x0) / sigma
        return {"eps": eps, "v": scale * eps - scale * sigma * x0, "flow": eps - x0}[self.predicts]


@for_each("eps", "v", "flow")
def gaussian(predicts: str) -> dict:
    """x0 and the gradient of score distillation are those of the closed form."""
    from comfy_extras import nodes_model_advanced as advanced

    three = models.FAMILIES["sd15"]()
    model = three.model.clone()
    if predicts == "v":
        (model,) = advanced.ModelSamplingDiscrete().patch(model, "v_prediction", False)
    if predicts == "flow":
        (model,) = advanced.ModelSamplingSD3().patch(model, 3.0)
    levels = model.get_model_object("model_sampling")

    def sigma_of_timestep(timestep: Tensor) -> Tensor:
        return timestep / levels.multiplier if predicts == "flow" else levels.sigmas[timestep.long()]

    model.model.diffusion_model = Exact(predicts, sigma_of_timestep)
    handle = handle_of("sd15", replace(three, model=model))
    found = {"gradient": 0.0, "x0": 0.0}
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config(100.0))
        seen = views(2, handle.size, spread=True)
        images = torch.rand(2, 1, 3, *handle.size, generator=torch.Generator().manual_seed(3))
        z = guidance.denoiser.encode(images)
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
        for share in SHARES:
            sigma = guidance.denoiser.noise.sigma_of(torch.full((2,), share))[:, None, None, None, None]
            x0 = (SPREAD**2 * (z + sigma * eps) + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)
            out = distillation.distill_at(
                guidance, images, seen, torch.full((2,), share, dtype=torch.double), lambda shape: eps
            )
            weight = 1 + sigma if predicts == "flow" else sigma**2 / (1 + sigma**2)
            gradient = weight * ((z + sigma * eps - x0) / sigma - eps)
            expected = gradient.square().sum().sqrt() / 2
            found["x0"] = max(found["x0"], difference(out.x0, x0))
            found["gradient"] = max(found["gradient"], float((out.terms["gradient_norm"] / expected - 1).abs()))
        prior.release()
    assert found["x0"] < 1e-4 and found["gradient"] < 1e-3, found
    return found


# ---- encoders ------------------------------------------------------------------------------------------------------

VAES = {
    "kl": (lambda: models.vae(models.kl_vae()), "sd15"),
    "kl of 16 channels": (lambda: models.vae(models.kl_vae(16, False)), "flux"),
    "kl with a decoder of videos": (lambda: models.vae(models.temporal_vae()), "sd15"),
    "taesd": (lambda: models.vae(models.tiny_image_vae()), "sd15"),
    "wan": (lambda: models.vae(models.wan_vae()), "wan"),
    "wan with opacity": (lambda: models.vae(models.wan_vae(channels=4)), "wan"),
    "wan 2.2": (models.wan22_vae, "wan22"),
    "taew": (lambda: models.vae(models.tiny_video_vae()), "wan"),
    "ltx": (lambda: models.vae(*models.ltx_vae_state()), "ltx"),
    "ltx 0.9": (lambda: models.vae(*models.ltx_vae_state(version=0)), "ltx"),
    "ltx 0.9.1": (lambda: models.vae(*models.ltx_vae_state(version=1)), "ltx"),
    "ltx 0.9.5": (lambda: models.vae(*models.ltx_vae_state(version=2)), "ltx"),
    "hunyuan": (models.hunyuan_vae, "hunyuan"),
}
FORMATS = {"sd15": "SD15", "flux": "Flux", "wan": "Wan21", "wan22": "Wan22", "ltx": "LTXV", "hunyuan": "HunyuanVideo"}


class Handle:
    """Of an allocator: to be copied would be its end."""

    def __deepcopy__(self, memo: dict) -> Handle:
        """Refuse."""
        raise TypeError("ctypes objects containing pointers can't be copied")


def _hang_on(network: nn.Module):
    """Hang on modules what ComfyUI's memory management does on a GPU; return what takes it off."""
    network.dynamic_pins, network.dynamic_vbars = {"cuda": (Handle(), [], {})}, {"cuda": Handle()}
    hung = [module for module in network.modules() if hasattr(module, "comfy_cast_weights")]
    for module in hung:
        module._v, module._v_signature, module._pin_state = (Handle(), 0, 0), None, {"weights": Handle()}
        module.comfy_cast_weights = True

    def take_off() -> None:
        for module in hung:
            for name in ("_v", "_v_signature", "_pin_state", "comfy_cast_weights"):
                delattr(module, name)
        del network.dynamic_pins, network.dynamic_vbars

    return take_off


@for_each(*VAES)
def encoder(name: str) -> dict:
    """The same latents as ComfyUI's own encoding; the gradient is there, and the same where less is kept."""
    import comfy.latent_formats

    make, family = VAES[name]
    vae, latents = make(), getattr(comfy.latent_formats, FORMATS[family])()
    size, frames = models.SIZES[family]
    traces = _hang_on(vae.first_stage_model)
    with training():
        private = Encoder.copied(vae, latents)
        shape = (2, 3, *size) if frames is None else (1, 3, 2 * frames - 1, *size)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
        found, gradients, encoded = {}, [], []
        for way in (Execution(), Execution(images_kept=0)):
            z = private.encode(pixels, way)
            weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(6))
            gradients.append(torch.autograd.grad((z * weights).sum(), pixels)[0])
            encoded.append(z.detach())
        if frames:  # the second half alone is asked for
            half = shape[2] // 2
            late = private.encode(pixels, frames=range(half, shape[2]))
            (pulled,) = torch.autograd.grad((late * weights).sum(), pixels)
            found["late latents"] = difference(late.detach(), encoded[0])
            found["late gradient"] = difference(pulled[:, :, half:], gradients[0][:, :, half:])
            assert max(found.values()) < ENCODING_TOLERANCE, found
        expected = private.latent_shape(size, shape[2] if frames else None)
        assert tuple(z.shape[1:]) == tuple(expected[1:]), (z.shape, expected)
    traces()
    assert not any(isinstance(value, Handle) for m in private.network.modules() for value in vars(m).values())
    own = vae.encode(pixels.detach().movedim(1, -1)[0 if frames else slice(None)].clone())
    found["other than ComfyUI's"] = difference(encoded[0], latents.process_in(own).clone())
    found["checkpointed latents"] = difference(encoded[1], encoded[0])
    found["checkpointed gradient"] = difference(gradients[1], gradients[0])
    found["gradient"] = float(gradients[0].norm())
    found["frames without"] = int((gradients[0].flatten(3).norm(dim=-1).sum(1) == 0).sum()) if frames else 0
    torch.manual_seed(0)  # LTX-Video 0.9.1 adds noise
    with training(), torch.no_grad():
        decoded = private.decode(encoded[0])
    assert decoded.shape == pixels.shape, (decoded.shape, pixels.shape)
    torch.manual_seed(0)
    theirs = vae.decode(own)
    theirs = theirs.reshape(-1, *theirs.shape[-3:]).movedim(-1, 1)[:, :3].clamp(0, 1).clone()
    mine = (decoded[0].movedim(0, 1) if frames else decoded).clamp(0, 1)
    found["decoded other"] = float((mine - theirs).abs().max())
    assert found["gradient"] > 0 and not found["frames without"], found
    for key in ("other than ComfyUI's", "checkpointed latents", "checkpointed gradient", "decoded other"):
        assert found[key] < ENCODING_TOLERANCE, found
    return found


@for_each(*(name for name in VAES if name not in ("taesd", "taew", "hunyuan")))
def fused_encoder(name: str) -> dict:
    """As on a GPU: the same latents and gradient as core's layers give, in every way, and no weight twice."""
    import comfy.latent_formats

    make, family = VAES[name]
    latents = getattr(comfy.latent_formats, FORMATS[family])()
    size, frames = models.SIZES[family]
    found = {}
    with training():
        plain, fast = (Encoder.copied(make(), latents, None, accelerated) for accelerated in (False, True))
        assert fast.fused is not None and plain.fused is None
        n_weights = sum(p.numel() for network in fast.networks for p in network.parameters())
        quantised = sum(p.numel() for n, p in fast.fused.named_parameters() if n.startswith("quant_conv."))
        assert n_weights == sum(p.numel() for p in plain.network.parameters()) + quantised
        assert all(list(part.modules()) for part in (fast.fused.encoder, fast.fused.decoder))  # diffusers 0.33 counts
        shape = (2, 3, *size) if frames is None else (1, 3, 2 * frames - 1, *size)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
        z = plain.encode(pixels)
        weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(6))
        (pulled,) = torch.autograd.grad((z * weights).sum(), pixels)
        few = Execution(images_at_once=2, images_kept=0)
        for way in (Execution(), Execution(images_kept=0), *((few,) if frames else ())):
            ours = fast.encode(pixels, way)
            (gradient,) = torch.autograd.grad((ours * weights).sum(), pixels)
            found[f"latents, {way}"] = difference(ours.detach(), z.detach())
            found[f"gradient, {way}"] = difference(gradient, pulled)
        decoded = []
        for one in (fast, plain):
            torch.manual_seed(0)  # LTX-Video 0.9.1 adds noise
            with torch.no_grad():
                decoded.append(one.decode(z))
        found["decoded"] = difference(*decoded)
    assert max(found.values()) < ENCODING_TOLERANCE, found
    return found


def _mirrored(module: nn.Module) -> None:
    """Layers of another version."""
    plain = type(module)
    forward = lambda self, x, *given, **named: plain.forward(self, x, *given, **named).flip(-1)  # noqa: E731
    module.__class__ = type("Mirrored", (plain,), {"forward": forward})


def _spoilt(module: nn.Module) -> None:
    """A file that is damaged."""
    module.weight.data = module.weight.data.clone()
    module.weight.data[0] = math.nan


def _hooked(module: nn.Module) -> None:
    """Another pack's tiles of large images."""
    module.register_forward_hook(lambda module, given, out: out.flip(-1) if out.shape[-1] > 100 else out)


def _edgeless(module: nn.Module) -> None:
    """Another pack's images without a seam."""
    module._conv_forward = module._conv_forward


def _tiled(module: nn.Module) -> None:
    """Tiles again, otherwise."""
    module.forward = module.forward


@for_each("kl", "wan")
def another_encoder(name: str) -> dict:
    """What doesn't give the same as diffusers' class, or might not, stays; out of memory is no reason for it."""
    import comfy.latent_formats

    make, family = VAES[name]
    latents = getattr(comfy.latent_formats, FORMATS[family])()
    lines, said = [], {}
    changes = {_mirrored: "differs by", _spoilt: "is not finite", _hooked: "hung on", _edgeless: "hung on"}
    with training(), mock.patch.object(logging, "info", lambda text, *given: lines.append(text % given)):
        for change, words in (changes | {_tiled: "hung on"}).items():
            vae = make()
            layers = vae.first_stage_model.encoder.modules()
            change(next(m for m in layers if isinstance(m, nn.Conv2d | nn.Conv3d)))
            assert Encoder.copied(vae, latents, None, True).fused is None, change
            said[change.__name__] = lines.pop()
            assert words in said[change.__name__], said
        vae = make()
        taken = vae.first_stage_model.encoder
        with mock.patch.dict(sys.modules, {"diffusers": None}):  # not there, or too old
            assert Encoder.copied(vae, latents, None, True).fused is None
        said["without diffusers"] = lines.pop()
        assert "slower: import of diffusers" in said["without diffusers"], said

        def out_of_memory(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

        taken.__class__ = type("Large", (type(taken),), {"forward": out_of_memory})
        try:
            Encoder.copied(vae, latents, None, True)
        except torch.OutOfMemoryError:
            return said
    raise AssertionError("out of memory was hidden")


@check
def choices_of_convolutions() -> dict:
    """Whatever a run lets cuDNN do is over with the last run, however it ends."""
    gradients, cudnn = pack("nodes.session").gradients, torch.backends.cudnn
    before = cudnn.benchmark
    for error in (None, ValueError, torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException):
        for wanted in (False, True):
            cudnn.benchmark = wanted
            with contextlib.suppress(error or ()), gradients():
                cudnn.benchmark = not wanted
                with gradients():
                    pass
                assert cudnn.benchmark != wanted  # by what a run renders in between
                if error is not None:
                    raise error
            assert cudnn.benchmark == wanted, error
    cudnn.benchmark = False
    first, second = gradients(), gradients()  # in two threads
    first.__enter__()
    cudnn.benchmark = True
    second.__enter__()
    first.__exit__(None, None, None)
    assert cudnn.benchmark
    second.__exit__(None, None, None)
    assert not cudnn.benchmark
    cudnn.benchmark = before
    return {}


@check
def what_was_taken_for_trials_is_given_back() -> dict:
    """By the pool that keeps it, and seldom: a step after it asks the GPU for its memory again."""
    memory = pack("nodes.memory")
    found: dict[str, list[int]] = {}
    cases = {"cudaMallocAsync": (True, "cuda"), "native": (True, "cuda")}
    cases |= {"cudaMallocAsync untried": (False, "cuda"), "cudaMallocAsync elsewhere": (True, "cpu")}
    for name, (tried, device) in cases.items():
        held, found[name] = memory.HeldPriors(torch.device(device), 0), []
        with (
            torch.backends.cudnn.flags(benchmark=tried),
            mock.patch.object(torch.cuda, "get_allocator_backend", lambda name=name: name.split()[0]),
            mock.patch.object(torch.cuda, "empty_cache") as emptied,
            mock.patch.object(torch.cuda, "reset_peak_memory_stats") as forgotten,
        ):
            for step in range(1, 40):
                emptied.reset_mock()
                forgotten.reset_mock()
                held.give_back(step)
                found[name] += [step] * emptied.call_count
                assert forgotten.call_count == emptied.call_count
    assert found.pop("cudaMallocAsync") == [1, 2, 4, 8, 16, 32] and not any(found.values()), found
    return found


class _Loaded:
    """A MODEL of so many weights that lie in a file in full precision, in ComfyUI's dynamic memory or not."""

    def __init__(self, n_weights: int, dynamic: bool) -> None:
        self.model, self.dynamic = torch.nn.Linear(n_weights, 1, bias=False), dynamic

    def is_dynamic(self) -> bool:
        return self.dynamic

    def model_size(self) -> int:
        return comfy.model_management.module_size(self.model)

    def model_patches_models(self) -> list:
        return []

    def get_nested_additional_models(self) -> list:
        return []


@check
def budgets_count_what_lies_beside_the_allocator() -> dict:
    """The models in ComfyUI's dynamic memory, once each; what ComfyUI's usual allocator keeps above a budget goes."""
    memory = pack("nodes.memory")
    lazy, plain, encoder = _Loaded(3, True), _Loaded(5, False), _Loaded(7, True)
    cuda = torch.device("cuda")
    assert memory.HeldPriors(cuda, 0, 10, [lazy, lazy, plain]).beside == 12
    lazy.model.weight_comfy_model_dtype = torch.float16
    assert memory.HeldPriors(cuda, 0, 10, [lazy, lazy, plain]).beside == 6, "as they are used"
    assert memory.HeldPriors(torch.device("cpu"), 0, None, [lazy]).beside == 0
    emptied: dict[str, list[int]] = {}
    for backend, budget in (("cudaMallocAsync", 13), ("native", 13), ("cudaMallocAsync", None)):
        held = memory.HeldPriors(cuda, 0, budget, [lazy])
        with (
            torch.backends.cudnn.flags(benchmark=False),
            mock.patch.object(torch.cuda, "get_allocator_backend", lambda backend=backend: backend),
            mock.patch.object(torch.cuda, "empty_cache") as gone,
        ):
            for kept in (6, 7, 8, 9):
                with mock.patch.object(torch.cuda, "memory_reserved", lambda _, kept=kept: kept):
                    gone.reset_mock()
                    held.give_back(3)
                    emptied.setdefault(f"{backend}, {budget}", []).extend([kept] * gone.call_count)
    assert emptied.pop("cudaMallocAsync, 13") == [8, 9] and not any(emptied.values()), emptied
    # and once the prompts are known, text encoders leave; the run's own models stay
    management = comfy.model_management
    there = [mock.Mock(model=one) for one in (lazy, encoder, plain)]
    for budget in (10, None):
        held = memory.HeldPriors(cuda, 0, budget, [lazy, plain])
        with (
            mock.patch.object(management, "current_loaded_models", there),
            mock.patch.object(management, "free_memory", _in_inference_mode()) as freed,
            mock.patch.object(management, "soft_empty_cache"),
            torch.inference_mode(False),
        ):
            held.settle()
            kept = [[loaded.model for loaded in call.args[2]] for call in freed.call_args_list]
            assert kept == ([[lazy, plain]] if budget else []), kept
    return {}


def _in_inference_mode() -> mock.Mock:
    def look(*_) -> list:
        assert torch.is_inference_mode_enabled()
        return []

    return mock.Mock(side_effect=look)


@check
def others_are_unloaded_in_inference_mode() -> dict:
    """For a run's beginning, its own models and a rendering; the run's networks are loaded outside of it."""
    memory, management, cuda = pack("nodes.memory"), comfy.model_management, torch.device("cuda")
    with (
        mock.patch.object(management, "free_memory", _in_inference_mode()) as freed,
        mock.patch.object(management, "load_models_gpu") as loaded,
        mock.patch.object(management, "soft_empty_cache"),
        torch.inference_mode(False),
    ):
        loaded.side_effect = lambda *_, **__: loaded.modes.append(torch.is_inference_mode_enabled())
        loaded.modes = []
        held = memory.HeldPriors(cuda, 5, None, [_Loaded(3, False)])
        held.make_room(7)
        prior = mock.Mock(networks=(torch.nn.Linear(2, 2),))
        held.hold(prior)
        held.release()
        memory.make_room(9, cuda)
        beside = management.minimum_inference_memory()
        asked = [call.args[0] for call in freed.call_args_list]
        assert asked == [12 + beside, 5 + beside, 9] and loaded.modes == [False], (asked, loaded.modes)
    return {}


@check
def tiny_autoencoders() -> dict:
    """Each as core loads it: taken by its family with the scale that the family reads, refused by the others."""
    import comfy.latent_formats

    def halved(state: dict) -> dict:
        return {name: value.half() for name, value in state.items()}

    made = {name: models.vae(models.tiny_image_vae(name)) for name in models.TINY_SCALES}
    made |= {"lighttaew2_1": models.vae(models.tiny_video_vae()), "taehv": models.vae(halved(models.tiny_video_vae()))}
    made |= {"lighttaew2_2": models.vae(models.tiny_video_vae(48)), "taeltx_2": models.vae(models.tiny_video_vae(128))}
    reads = {"SD15": ("BaseModel", "taesd"), "SDXL": ("SDXL", "taesdxl"), "SD3": ("SD3", "taesd3")}
    reads |= {"Flux": ("Flux", "taef1"), "Wan21": ("WAN21", "lighttaew2_1"), "Wan22": ("WAN22", "lighttaew2_2")}
    reads |= {"HunyuanVideo": ("HunyuanVideo", "taehv"), "LTXV": ("LTXV", None)}
    found = {}
    for form, (family, wanted) in reads.items():
        latents = getattr(comfy.latent_formats, form)()
        model = SimpleNamespace(model=SimpleNamespace(latent_format=latents))
        for name, vae in made.items():
            try:
                families.check_vae(model, vae, families.FAMILIES[family])
                taken = True
            except pack("dream4d_engine.priors.errors").PriorError as error:
                found[f"{name} for {form}"] = str(error)
                taken = False
            assert taken == (name == wanted), (name, form)
        if wanted is None:
            continue
        vae = made[wanted]
        with training():
            private = Encoder.copied(vae, latents)
            shape = (1, 3, 32, 32) if vae.latent_dim == 2 else (1, 3, 5, 32, 32)
            pixels = torch.rand(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
            z = private.encode(pixels)
            z.square().sum().backward()
            assert pixels.grad.flatten(2).norm(dim=-1).min() > 0, name
            given = pixels.detach().to(next(private.network.parameters()).dtype)
            with torch.no_grad():
                if wanted in models.TINY_SCALES or wanted == "taehv":  # made for the latents that the model reads
                    network = private.network
                    raw = (
                        network.taesd_encoder(given)
                        if vae.latent_dim == 2
                        else network.encode(given) * latents.scale_factor
                    )
                else:  # for those of the family's autoencoder
                    raw = (private.network.encode(given).float() - latents.latents_mean) / latents.latents_std
        found[f"{wanted} read"] = difference(z.detach(), raw.float())
    assert max(value for value in found.values() if isinstance(value, float)) < 5e-3, found
    return found


class _Shortage:
    """Counts the convolutions of a network, and lets the memory run out at one of them."""

    def __init__(self, network: nn.Module) -> None:
        self.calls, self.forwards, self.at = 0, 0, None
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


def _tensor_bytes() -> int:
    """What all tensors that are alive take."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@for_each("wan", "ltx", "hunyuan")
def out_of_memory_in_the_encoder(name: str) -> dict:
    """Wherever it happens, forwards or backwards: nothing is held afterwards, and the next encoding is as ever."""
    import comfy.latent_formats

    make, family = VAES[name]
    size, frames = models.SIZES[family]
    with training():
        latents = getattr(comfy.latent_formats, FORMATS[family])()
        private = Encoder.copied(make(), latents)
        pixels = torch.rand((1, 3, frames, *size), generator=torch.Generator().manual_seed(5)).requires_grad_()
        shortage = _Shortage(private.network)

        def encoded(at: int | None = None) -> list[Tensor]:
            shortage.calls, shortage.at = 0, at
            z = private.encode(pixels, Execution(images_kept=0))
            shortage.forwards = shortage.calls
            return [z.detach(), torch.autograd.grad(z.square().sum(), pixels)[0]]

        def runs_out(at: int) -> None:
            try:
                encoded(at)
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)
                return
            raise AssertionError(f"call {at} was not reached")

        expected = encoded()
        forwards, calls = shortage.forwards, shortage.calls
        before = _tensor_bytes()
        for moment in (forwards // 2, forwards + 1, (forwards + calls) // 2):
            runs_out(moment)
            torch.ones(1, requires_grad=True).backward()  # PyTorch drops what its last backward pass has left undone
            assert _tensor_bytes() == before, moment
            assert not any(getattr(m, "temporal_cache_state", None) for m in private.network.modules()), moment
            assert all(one.equal(other) for one, other in zip(encoded(), expected, strict=True)), moment
        z = private.encode(pixels, Execution(images_kept=0))
        del z  # it ran out elsewhere: what the graph holds goes with it
        assert _tensor_bytes() == before
    return {"forwards": forwards, "calls": calls}


# ---- prompts -------------------------------------------------------------------------------------------------------


@for_each(*NAMED)
def different_prompts_in_one_batch(name: str) -> dict:
    """What takes are told in one batch changes nothing of what each is answered alone."""
    handle = handle_of(name)
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config())
        denoiser = guidance.denoiser
        rows = torch.tensor([0, 4, 2, 4, 0])  # texts have other lengths, too
        assert len(denoiser.live.table) == 5
        x = noisy_takes(guidance, handle, len(rows)) * 3
        sigma = denoiser.noise.sigma_of(torch.linspace(0.2, 0.9, len(rows)))
        together = denoiser.denoise(x, sigma, graph_prior.Conditions(rows[:, None, None, None].float()))
        alone = [
            denoiser.denoise(x[i : i + 1], sigma[i : i + 1], told(guidance, int(rows[i]), x[:1])) for i in range(5)
        ]
        other = denoiser.denoise(x, sigma, told(guidance, 1, x))
        pieces = denoiser.run_as(execution.Execution(groups_at_once=2))
        halves = pieces.denoise(x, sigma, graph_prior.Conditions(rows[:, None, None, None].float()))
        merged = graph_prior._merged([denoiser.live.table[row] for row in rows.tolist()]) is not None
        prior.release()
    found = {"alone": difference(torch.cat(alone), together), "halves": difference(halves, together)}
    found |= {"other words": difference(other, together), "in one pass": float(merged)}
    assert found["alone"] < 1e-4 and found["halves"] < 1e-4 and found["other words"] > 1e-4, found
    return found


@for_each(*NAMED)
def a_step(name: str) -> dict:
    """The loss of a step has a gradient for every image, with everything kept and with nothing kept."""
    handle, gradients = handle_of(name), []
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config())
        n = handle.n_frames or 2
        seen = views(n, handle.size, spread=handle.n_frames is None)
        images = torch.rand(*seen.shape, 3, *handle.size, generator=torch.Generator().manual_seed(7)).requires_grad_()
        for way in (execution.Execution(), execution.Execution(images_kept=0, images_at_once=1, groups_at_once=1)):
            run = replace(guidance, denoiser=guidance.denoiser.run_as(way))
            out = distillation.distill(run, images, seen, 0.5, randomness.Draw(0))
            gradients.append(torch.autograd.grad(out.loss, images)[0])
        prior.release()
    norms = gradients[0].flatten(2).norm(dim=-1)
    found = {"least": float(norms.min()), "most": float(norms.max()), "same": difference(*gradients)}
    assert found["least"] > 0 and found["same"] < 1e-3, found
    return found


@check
def where_and_in_which_numbers() -> dict:
    """The autoencoder is copied to where the run works; a run's mixed precision is not the model's affair."""
    three = models.FAMILIES["wan"]()
    handle, answers = handle_of("wan", three), []
    there = handle.load(Runtime(torch.device("meta"))).networks[0]
    assert {p.device.type for p in (*there.parameters(), *there.buffers())} == {"meta"}
    assert {p.device.type for p in three.vae.first_stage_model.parameters()} == {"cpu"}
    halved = models.vae(models.wan_vae())
    halved.first_stage_model.half()  # as in its file, until it is used: with dynamic memory
    copied = handle_of("wan", replace(three, vae=halved)).load(Runtime(torch.device("cpu"))).networks[0]
    assert {p.dtype for p in copied.parameters()} == {halved.vae_dtype} != {torch.float16}
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config())
        x, sigma = noisy_takes(guidance, handle, 1) * 3, torch.tensor([2.0])
        for mixed in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                answers.append(guidance.denoiser.denoise(x, sigma, told(guidance, 0, x)))
        prior.release()
    assert answers[0].equal(answers[1])
    return {}


@for_each("sd15", "ltx")
def cancel_in_the_middle(name: str) -> dict:
    """Cancel is pressed while ComfyUI's layers work: the step ends as ever, and the wish is there after it."""
    import comfy.ops

    handle, gradients, count = handle_of(name), [], []
    session, management = pack("nodes.session"), comfy.model_management
    with training():
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config())
        run = replace(guidance, denoiser=guidance.denoiser.run_as(execution.Execution(images_kept=0)))
        n = handle.n_frames or 2
        seen = views(n, handle.size, spread=handle.n_frames is None)
        images = torch.rand(*seen.shape, 3, *handle.size, generator=torch.Generator().manual_seed(7)).requires_grad_()
        look = comfy.ops.run_every_op
        for moment in (None, 0.03, 0.4, 0.75, 0.95):  # of the layers' calls in a step
            calls = 0

            def looked(moment=moment) -> None:
                nonlocal calls
                calls += 1
                if moment is not None and calls == int(count[0] * moment) + 1:
                    management.interrupt_current_processing()
                look()

            with mock.patch.object(comfy.ops, "run_every_op", looked), session.steps_end_first():
                out = distillation.distill(run, images, seen, 0.5, randomness.Draw(0))
                gradients.append(torch.autograd.grad(out.loss, images)[0])
            count.append(calls)
            assert management.processing_interrupted() == (moment is not None), moment
            management.interrupt_current_processing(False)
        prior.release()
    assert len(set(count)) == 1 and all(gradient.equal(gradients[0]) for gradient in gradients)
    return {"calls": count[0]}


# ---- what stands before us in the graph ----------------------------------------------------------------------------


@check
def a_lora_before_it() -> dict:
    """A core LoRA changes the answer and the fingerprint; the model without it keeps its own."""
    three = models.FAMILIES["sd15"]()
    state = models.attention_lora(three.model)
    with_lora = [comfy.sd.load_lora_for_models(three.model, three.clip, state, s, 0.0) for s in (1.0, 1.0, 0.5)]
    handles = [handle_of("sd15", three)]
    handles += [handle_of("sd15", replace(three, model=m, clip=c)) for m, c in with_lora]
    prints = [handle.fingerprint() for handle in handles]
    assert prints[1] == prints[2] and len(set(prints)) == 3, prints
    answers = []
    with training():
        for handle in (handles[0], handles[1], handles[3], handles[0]):
            answers.append(answer_of(handle))
            assert [h.fingerprint() for h in handles] == prints  # weights stay patched until somebody else wants others
    found = {f"change {i}": difference(answers[i], answers[0]) for i in (1, 2)}
    assert answers[3].equal(answers[0]) and min(found.values()) > 1e-4, found
    assert difference(answers[1], answers[2]) > 1e-4
    return found


@check
def a_lora_beside_it() -> dict:
    """In bypass mode a LoRA gives the same answer as in the weights, and its strength is part of the fingerprint."""
    three = models.FAMILIES["wan"]()
    state, answers = models.attention_lora(three.model), []
    load, beside = comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models
    given = [(beside, 1.0), (load, 1.0), (beside, 1.0), (beside, 0.3)]
    handles = [handle_of("wan", three)]
    for loader, strength in given:
        model, clip = loader(three.model, three.clip, dict(state), strength, 0.0)
        handles.append(handle_of("wan", replace(three, model=model, clip=clip)))
    prints = [handle.fingerprint() for handle in handles]
    assert prints[1] == prints[3] and len(set(prints)) == 4, prints
    with training():
        for handle in handles:
            answers.append(answer_of(handle))
    assert [handle.fingerprint() for handle in handles] == prints
    found = {"the same": difference(answers[1], answers[2]), "weaker": difference(answers[4], answers[1])}
    assert found["the same"] < 1e-4 < found["weaker"] and difference(answers[1], answers[0]) > 1e-2, found
    return found


@check
def another_precision_before_it() -> dict:
    """Weights and computing in other number formats change the answer a little, and the fingerprint."""
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    three, answers, prints = models.FAMILIES["wan"](), {}, {}
    made = {"plain": three.model, "default": ModelComputeDtype().patch(three.model, "default")[0]}
    made |= {name: ModelComputeDtype().patch(three.model, name)[0] for name in ("bf16", "fp16")}
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):  # as UNETLoader does for its weight_dtype
        options = {"dtype": dtype}
        made[str(dtype)] = comfy.sd.load_diffusion_model_state_dict(models.wan_transformer(), model_options=options)
    with training():
        for name, model in made.items():
            handle = handle_of("wan", replace(three, model=model))
            prints[name] = handle.fingerprint()
            answers[name] = answer_of(handle)
            assert handle.fingerprint() == prints[name], name
    found = {name: difference(answer, answers["plain"]) for name, answer in answers.items()}
    assert found.pop("plain") == found.pop("default") == 0
    assert all(0 < value < 0.2 for value in found.values()), found
    assert len({value for name, value in prints.items() if name != "default"}) == len(prints) - 1, prints
    return found


@check
def weights_with_scales() -> dict:
    """A model in the files' fp8 with scales is nearly the plain one; a LoRA in use changes no fingerprint."""
    three = models.FAMILIES["wan"]()
    scaled = models.diffusion_model(models.scaled_fp8(models.wan_transformer()))
    state = models.attention_lora(scaled)
    changed, clip = comfy.sd.load_lora_for_models(scaled, three.clip, state, 1.0, 0.0)
    handles = [handle_of("wan", replace(three, model=model)) for model in (three.model, scaled)]
    handles.append(handle_of("wan", replace(three, model=changed, clip=clip)))
    prints, answers = [handle.fingerprint() for handle in handles], []
    assert len(set(prints)) == 3, prints
    with training():
        for handle in (*handles, handles[1]):
            answers.append(answer_of(handle))
            assert [h.fingerprint() for h in handles] == prints
    found = {"scaled": difference(answers[1], answers[0]), "lora": difference(answers[2], answers[1])}
    assert 0 < found["scaled"] < 0.1 < found["lora"] and answers[3].equal(answers[1]), found
    return found


@for_each(*NAMED)
def shares_of_noise(name: str) -> dict:
    """Shares are places in the family's own schedule, its shift included, as core's samplers count them."""
    from comfy_extras import nodes_lt
    from comfy_extras import nodes_model_advanced as advanced

    three, found = models.FAMILIES[name](), {}
    made = {"as loaded": three.model}
    if name == "flux":
        (made["shifted"],) = advanced.ModelSamplingFlux().patch(three.model, 1.3, 0.5, 512, 768)
    elif name == "ltx":
        made["shifted"] = nodes_lt.ModelSamplingLTXV.execute(three.model, 2.3, 0.95).result[0]
    elif name in ("sd15", "sdxl"):
        (made["v"],) = advanced.ModelSamplingDiscrete().patch(three.model, "v_prediction", False)
    else:
        (made["shifted"],) = advanced.ModelSamplingSD3().patch(three.model, 5.0)
    for word, model in made.items():
        handle, levels = handle_of(name, replace(three, model=model)), model.get_model_object("model_sampling")
        for share in (0.02, *SHARES, 0.98):
            sigma = float(handle.noise.sigma_of(torch.tensor(share)))
            mine = sigma / (1 + sigma) if families.is_flow(model) else sigma
            found[f"{word} at {share}"] = abs(mine / float(levels.percent_to_sigma(1 - share)) - 1)
    # core looks discrete levels up at the 999 and not at the 1000 parts of the schedule
    allowed = 1e-6 if families.is_flow(three.model) else 1e-2
    assert max(found.values()) < allowed, found
    return found


@for_each(*NAMED)
def ten_steps(name: str) -> dict:
    """Ten steps of the stage that a family serves, with a core LoRA before it: a gradient in each, and a scene."""
    engine = "dream4d_engine.training"
    recipes, static, motion = (pack(f"{engine}.{part}") for part in ("config", "static", "motion"))
    three = models.FAMILIES[name]()
    lora = models.attention_lora(three.model)
    model, clip = comfy.sd.load_lora_for_models(three.model, three.clip, lora, 0.5, 0.0)
    handle, gradients = handle_of(name, replace(three, model=model, clip=clip)), []
    still = static.first_scene(replace(recipes.TOY_STATIC, steps=1), 3)
    if name in VIDEOS:
        kind, told_by, trained = "video", recipes.MODEL_VIDEO, "deformation.mlp"
        recipe = replace(recipes.TOY_MOTION, name=told_by.name, steps=10, guidance=told_by.guidance)
        recipe = pack(f"{engine}.guidance").with_frames_of(recipe, {kind: handle})
        assert recipe.n_frames == handle.n_frames
        before = motion.motion_stage(still, recipe, 3, 1.0).scene.state_dict()
        train = lambda *what, **how: motion.train_motion(still, *what, deformation_scale=1.0, **how)  # noqa: E731
    else:
        kind, told_by, trained, before = "image", recipes.MODEL_IMAGE, "grid", still.state_dict()
        recipe = replace(recipes.TOY_STATIC, name=told_by.name, steps=10, guidance=told_by.guidance, n_views=2)
        train = static.train_static
    encode = Encoder.encode

    def watched(self, pixels: Tensor, *given, **named) -> Tensor:
        if pixels.requires_grad:
            pixels.register_hook(lambda gradient: gradients.append(float(gradient.norm())))
        return encode(self, pixels, *given, **named)

    with mock.patch.object(Encoder, "encode", watched):
        scene, losses = _trained(kind, handle, recipe, train)
    after = scene.state_dict()
    assert len(losses) == 10 and all(map(math.isfinite, losses)), losses
    assert len(gradients) >= 10 and min(gradients) > 0, gradients
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    assert any(trained in key and not after[key].equal(value) for key, value in before.items() if key in after)
    return {"losses": losses, "gradients": [min(gradients), max(gradients)]}


@check
def two_at_once() -> dict:
    """Two priors that share a model, one with a LoRA: asked in turn, each keeps its own answer."""
    three = models.FAMILIES["sd15"]()
    changed, clip = comfy.sd.load_lora_for_models(three.model, three.clip, models.attention_lora(three.model), 1.0, 0.0)
    with training():
        live = []
        for handle in (handle_of("sd15", three), handle_of("sd15", replace(three, model=changed, clip=clip))):
            prior = handle.load(Runtime(torch.device("cpu")))
            live.append((prior, prior.guide(PROMPT, None, config())))
        sigma = live[0][1].denoiser.noise.sigma_of(torch.tensor([0.7]))
        x = noisy_takes(live[0][1], handle, 1) * sigma
        answers = [g.denoiser.denoise(x, sigma, told(g, 0, x)) for _ in range(2) for _, g in live]
        for prior, _ in live:
            prior.release()
    assert answers[0].equal(answers[2]) and answers[1].equal(answers[3])
    change = difference(answers[1], answers[0])
    assert change > 1e-4
    assert three.model.model is changed.model
    return {"change": change}


@check
def two_experts() -> dict:
    """Each of a pair answers on its side of the switch, as it does alone; a batch may have both."""
    high = models.FAMILIES["wan"]()
    second = models.diffusion_model(models.wan_transformer(seed=9))
    cpu, family = torch.device("cpu"), families.FAMILIES["WAN21"]
    with training():
        live = []
        for handle in (
            handle_of("wan", high),
            handle_of("wan", replace(high, model=second)),
            handle_of("wan", high, low_noise=second),
        ):
            prior = handle.load(Runtime(cpu))
            live.append((prior, prior.guide(PROMPT, None, config()).denoiser, handle))
        time_of = torch.tensor([0.2, family.switch - 1e-3, family.switch + 1e-3, 0.97])
        sigma = time_of / (1 - time_of)
        x = (
            noisy_takes(live[0][0].guide(PROMPT, None, config()), live[0][2], 4)
            * (1 + sigma**2).sqrt()[:, None, None, None, None]
        )
        rows = graph_prior.Conditions(torch.tensor([0, 4, 2, 4])[:, None, None, None].float())
        alone, other, both = (denoiser.denoise(x, sigma, rows) for _, denoiser, _ in live)
        assert difference(alone[:2], other[:2]) > 1e-3 and difference(alone[2:], other[2:]) > 1e-3
        found = {"low": difference(both[:2], other[:2]), "high": difference(both[2:], alone[2:])}
        pixels = torch.rand(1, 5, 3, 32, 48, requires_grad=True)
        pair = live[2][0].guide(PROMPT, None, config())
        distillation.distill(pair, pixels, views(5, (32, 48)), 0.5, randomness.Draw(0)).loss.backward()
        assert pixels.grad.norm() > 0
        for prior, _, _ in live:
            prior.release()
    assert max(found.values()) < 1e-5, found
    assert len({handle.fingerprint() for _, _, handle in live}) == 3
    return found


@check
def one_expert() -> dict:
    """Alone, an expert is asked in its own range: shares are of that."""
    three, found = models.FAMILIES["wan"](), {}
    for part in (families.HIGH, families.LOW):
        noise = handle_of("wan", three, part=part).noise
        share = torch.linspace(0, 1, 101)
        sigma = noise.sigma_of(share)
        times = sigma / (1 + sigma)
        found[part] = [float(times[0]), float(times[-1])]
        inside = share[1:90]  # times above 0.999 are cut
        assert torch.allclose(noise.share_of(noise.sigma_of(inside)), inside, atol=1e-4)
    (lowest, middle), (switch, highest) = found[families.LOW], found[families.HIGH]
    assert lowest == 0 and highest > 0.998 and abs(middle - 0.875) < 1e-5 and abs(switch - 0.875) < 1e-5, found
    prints = {
        handle_of("wan", three, part=part).fingerprint() for part in (families.WHOLE, families.HIGH, families.LOW)
    }
    assert len(prints) == 3
    return found


@check
def room_is_made_in_the_middle_of_a_step() -> dict:
    """A MODEL that makes room for itself in the run's own thread doesn't take the run's autoencoders away."""
    memory, management = pack("nodes.memory"), comfy.model_management

    def registered() -> list:
        return [one.model for one in management.current_loaded_models if type(one.model).__name__ == "_WholePatcher"]

    handle = handle_of("wan")
    with training():
        held = memory.HeldPriors(torch.device("cpu"), 0)
        prior = handle.load(Runtime(torch.device("cpu")))
        guidance = prior.guide(PROMPT, None, config())
        held.hold(prior)
        (patcher,) = registered()
        management.unload_all_models()
        assert patcher.loaded_size() == patcher.model_size() and not registered()
        leaf = torch.rand(1, 5, 3, 32, 48, requires_grad=True)
        distillation.distill(guidance, leaf, views(5, handle.size), 0.5, randomness.Draw(0)).loss.backward()
        assert leaf.grad.norm() > 0
        assert not held.bring_back() and registered() == [patcher]
        held.release()
    return {}


@check
def weights_moved_outside_of_inference_mode() -> dict:
    """As when models are unloaded between two runs: they have no views, and the run by them is still found again."""
    three = models.FAMILIES["sd15"]()
    handle = handle_of("sd15", three)
    before, latents = handle.fingerprint(), three.model.model.latent_format
    gradients = pack("nodes.session").gradients
    with gradients():
        pixels = torch.rand(1, 3, 32, 48, requires_grad=True)
        z = Encoder.copied(three.vae, latents).encode(pixels)
    for network in (three.model.model, three.clip.cond_stage_model, three.vae.first_stage_model):
        for module in network.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    moved = torch.nn.Parameter(torch.ones(0), requires_grad=False)
                    with torch.inference_mode(False):
                        moved.data = weight.data.clone()
                    module._parameters[name] = moved
        try:
            raise AssertionError(next(p for p in network.parameters() if p.ndim)[:1])
        except RuntimeError as error:
            assert "version counter" in str(error)
    assert handle.fingerprint() == before
    with gradients():
        again = Encoder.copied(three.vae, latents).encode(pixels)
        again.sum().backward()
    assert torch.equal(again, z) and pixels.grad.abs().max() > 0
    return {}


@check
def fingerprints() -> dict:
    """Equal for the same, other for another size, number of frames, text encoder, sampling or numbers of a patch."""
    from comfy_extras import nodes_model_advanced as advanced
    from comfy_extras.nodes_freelunch import FreeU
    from comfy_extras.nodes_tomesd import TomePatchModel

    one, again = models.FAMILIES["wan"](), models.FAMILIES["wan"]()
    (shifted,) = advanced.ModelSamplingSD3().patch(one.model, 3.0)
    seconds = time.monotonic()
    first = handle_of("wan", one).fingerprint()
    seconds = time.monotonic() - seconds
    assert handle_of("wan", again).fingerprint() == first
    sd15 = models.FAMILIES["sd15"]()
    freed = [replace(sd15, model=FreeU.execute(sd15.model, b, 1.2, 0.9, 0.2).result[0]) for b in (1.1, 1.1, 1.3)]
    freed = [handle_of("sd15", three).fingerprint() for three in (sd15, *freed)]
    assert freed[1] == freed[2] and len(set(freed)) == 3, freed
    noting = replace(sd15, model=FreeU.execute(sd15.model, 1.1, 1.2, 0.9, 0.2).result[0])
    (patch,) = noting.model.model_options["transformer_options"]["patches"]["output_block_patch"]
    channels = 4 * sd15.model.model.model_config.unet_config["model_channels"]
    filtered = mock.Mock(side_effect=[RuntimeError("no FFT here"), torch.zeros(1, channels, 4, 4)])
    with mock.patch("comfy_extras.nodes_freelunch.Fourier_filter", filtered):
        patch(*torch.zeros(2, 1, channels, 4, 4), {})
    assert filtered.call_count == 2 and handle_of("sd15", noting).fingerprint() == freed[1]
    merged = replace(sd15, model=TomePatchModel.execute(sd15.model, 0.3).result[0])
    before = handle_of("sd15", merged).fingerprint()
    _sampled(merged, "sd15")  # its functions hand each other what they have found
    assert handle_of("sd15", merged).fingerprint() == before
    others = {
        "size": handle_of("wan", one, size=(48, 32)),
        "frames": handle_of("wan", one, n_frames=9),
        "shift": handle_of("wan", replace(one, model=shifted)),
        "tiny": handle_of("wan", replace(one, vae=models.vae(models.tiny_video_vae()))),
        "weights": handle_of("wan", replace(one, model=models.diffusion_model(models.wan_transformer(seed=9)))),
    }
    prints = {name: handle.fingerprint() for name, handle in others.items()}
    assert len({first, *prints.values()}) == 1 + len(others), prints
    levels = [handle.load(Runtime(torch.device("cpu"))) for handle in (handle_of("wan", one), others["shift"])]
    time_of = []
    for prior in levels:
        with training():
            noise = prior.guide(PROMPT, None, config()).denoiser.noise
        sigma = noise.sigma_of(torch.tensor(0.5))
        time_of.append(float(sigma / (1 + sigma)))
        prior.release()
    run, recipes = pack("nodes.session").Run, pack("dream4d_engine.training.config")
    motion, start = recipes.TOY_MOTION, recipes.TOY_STATIC.scene
    made = [run("motion", replace(motion, gradient_frames=n), {}, "x", "", 0, {}, start) for n in (None, 3)]
    identity = [one.identity(torch.device("cpu")) for one in made]
    # a run of before there was a choice is found again
    assert [one["recipe"].get("gradient_frames", "not there") for one in identity] == ["not there", 3]
    made = [run("motion", r, {}, "x", "", 0, {}, start) for r in (recipes.ZEROSCOPE, recipes.MODEL_VIDEO)]
    told = [one.identity(torch.device("cpu"))["recipe"]["guidance"][0]["distillation"] for one in made]
    assert [one.get("last_guidance_scale", "not there") for one in told] == ["not there", 12.0]
    made = [run("static", r, {}, "x", "", 0, {}, start) for r in (recipes.IMAGE_TO_3D, recipes.IMAGE_TO_3D_ORBIT)]
    identity = [one.identity(torch.device("cpu")) for one in made]
    assert [one["recipe"].get("orbit", "not there") for one in identity] == ["not there", "dynamic"]
    assert abs(time_of[0] - 8 / 9) < 1e-5 and abs(time_of[1] - 3 / 4) < 1e-5, time_of  # s / (1 + s) at a half
    return {"seconds": seconds}


def _sampled(three: models.Three, name: str) -> Tensor:
    """A few steps of a core sampler."""
    size, frames = models.SIZES[name]
    shape = graph_prior.Encoder.copied(three.vae, three.model.model.latent_format).latent_shape(size, frames)
    conds = [three.clip.encode_from_tokens_scheduled(three.clip.tokenize(text)) for text in (PROMPT, "bad")]
    latent = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latent, 5)
    return comfy.sample.sample(three.model, noise, 3, 4.0, "euler", "normal", *conds, latent, seed=5)


@for_each("sd15", "wan")
def the_model_stays_usable(name: str) -> dict:
    """A sampler gives the same before, between and after two runs, also when one is released in the middle."""
    three = models.FAMILIES[name]()
    before = _sampled(three, name)
    handle, answers = handle_of(name, three), []
    for _ in range(2):
        with training():
            prior = handle.load(Runtime(torch.device("cpu")))
            guidance = prior.guide(PROMPT, None, config())
            n = handle.n_frames or 2
            seen = views(n, handle.size, spread=handle.n_frames is None)
            images = torch.rand(*seen.shape, 3, *handle.size, generator=torch.Generator().manual_seed(7))
            for step in range(2):
                leaf = images.clone().requires_grad_()
                out = distillation.distill(guidance, leaf, seen, 0.5, randomness.Draw(0, step))
                out.loss.backward()
            answers.append(leaf.grad)
        with torch.inference_mode():
            assert _sampled(three, name).equal(before)  # beside a run
        with training():
            leaf = images.clone().requires_grad_()
            distillation.distill(guidance, leaf, seen, 0.5, randomness.Draw(0, 1)).loss.backward()
            assert leaf.grad.equal(answers[-1])
            prior.release()
            prior.release()
        assert _sampled(three, name).equal(before)
    assert answers[0].equal(answers[1])
    assert not any(p.requires_grad for p in three.model.model.parameters())
    return {}


# ---- bad input -----------------------------------------------------------------------------------------------------


def _refused(node: str, expected: str, three: models.Three, **more) -> str:
    """What a node says of three things; it has to have these words."""
    with mock.patch.object(graph_nodes, "say_on_node", lambda *_: None):
        try:
            graph_nodes._make(node, three.model, three.clip, three.vae, (0, 0, 0), None, **more)
        except pack("nodes.session").RunError as error:
            assert expected in str(error), (expected, str(error))
            return str(error)
    raise AssertionError(f"not refused: {expected}")


class _Wrapper:
    """A model of another pack, which says nothing of itself."""

    class model:
        """Its network."""


def _controlled(three: models.Three) -> dict:
    """What would have to apply to one image, and what only looks like a MODEL: refused before a step."""
    from comfy_extras import nodes_model_patch

    said = {}
    controlled, patch = three.model.clone(), object.__new__(nodes_model_patch.DiffSynthCnetPatch)
    patch.encoded_image = torch.zeros(1)  # moved along with the model
    controlled.set_model_double_block_patch(patch)
    said["control image"] = _refused(
        "image", "carries an image that controls it (DiffSynthCnetPatch)", replace(three, model=controlled)
    )
    bare = SimpleNamespace(model=three.model.model, model_options={})  # a network with its sampling, and no patcher
    said["no patcher"] = _refused(
        "image", "a wrapper (SimpleNamespace) without get_model_object and patches", replace(three, model=bare)
    )
    for part in ("area", "control", "mask", "hooks"):
        clip = three.clip.clone()
        plain = clip.encode_from_tokens_scheduled
        clip.encode_from_tokens_scheduled = lambda tokens, plain=plain, part=part: [
            [c, d | {part: 1}] for c, d in plain(tokens)
        ]
        with training():
            prior = handle_of("sd15", replace(three, clip=clip)).load(Runtime(torch.device("cpu")))
            try:
                prior.guide(PROMPT, None, config())
            except pack("dream4d_engine.priors.errors").PriorError as error:
                said[part] = str(error)
                assert f"({part})" in said[part], said
                prior.release()
    assert len(said) == 6, said
    return said


def _of_others(sd15: models.Three, wan: models.Three) -> dict:
    """What other nodes and packs have put in the way of a step."""
    from comfy_extras import nodes_context_windows as windows
    from comfy_extras import nodes_model_advanced as advanced

    context = windows.WanContextWindowsManualNode.execute(
        wan.model, 81, 30, "standard_static", 1, False, "pyramid", False
    )
    (scaled,) = advanced.ModelNoiseScale().patch(wan.model, 2.0)
    (edm,) = advanced.ModelSamplingContinuousEDM().patch(sd15.model, "v_prediction", 120.0, 0.002)
    lacking = SimpleNamespace(first_stage_model=nn.Linear(1, 1), latent_channels=4, latent_dim=2)
    no_channels = SimpleNamespace(**vars(lacking), downscale_ratio=8, vae_dtype=torch.float32)
    no_channels.process_input = no_channels.process_output = lambda pixels: pixels
    xl = models.FAMILIES["sdxl"]()
    cases = [
        ("video", "(context windows), which training does by itself: remove", replace(wan, model=context.result[0])),
        (
            "video",
            "noise is scaled by 2, which has not been tried: remove Model Noise Scale",
            replace(wan, model=scaled),
        ),
        ("image", "of the class ModelSamplingContinuousEDM and V_PREDICTION", replace(sd15, model=edm)),
        ("image", "a wrapper (SimpleNamespace) without downscale_ratio and vae_dtype", replace(sd15, vae=lacking)),
        ("image", "a wrapper (SimpleNamespace) without output_channels: load it", replace(sd15, vae=no_channels)),
        ("image", "(SDXLRefinerClipModel) is the refiner's, or one of", replace(xl, clip=models.refiner_clip())),
    ]
    return {expected: _refused(node, expected, three) for node, expected, three in cases}


@check
def bad_input() -> dict:
    """What can't be a prior is refused with the reason, before anything is loaded."""
    sd15, wan = models.FAMILIES["sd15"](), models.FAMILIES["wan"]()
    hunyuan_vae, flux_vae = models.hunyuan_vae(), models.vae(models.kl_vae(16, False))
    inpainting = models.checkpoint_model(models.sd15_unet(in_channels=9))
    editing = models.checkpoint_model(models.sd15_unet(in_channels=8))
    i2v = models.diffusion_model(models.wan_transformer(in_dim=36))
    fill = models.diffusion_model(models.flux_transformer(in_channels=96))
    vace_like = models.diffusion_model(models.hunyuan_transformer(in_channels=33))
    empty = comfy.sd.VAE(sd={})
    hooked = sd15.clip.clone()
    hooked.use_clip_schedule = True
    cases = [
        ("image", "Wan makes videos: connect it to Video Prior from Model", wan),
        ("video", "Stable Diffusion 1 or 2 makes images: connect it to Image Prior from Model", sd15),
        ("image", "has 16 channels for images, Stable Diffusion 1 or 2 reads 4", replace(sd15, vae=flux_vae)),
        ("image", "has 16 channels for videos", replace(sd15, vae=wan.vae)),
        ("video", "has 4 channels for images", replace(wan, vae=sd15.vae)),
        ("video", "belongs to another family than Wan", replace(wan, vae=hunyuan_vae)),
        ("video", "48 channels", replace(wan, vae=models.wan22_vae())),
        ("image", "vae is None: it must be what", replace(sd15, vae=None)),
        ("image", "holds no autoencoder", replace(sd15, vae=empty)),
        ("image", "clip is None: it must be what", replace(sd15, clip=None)),
        ("image", "reads those of SD1Tokenizer", replace(sd15, clip=wan.clip)),
        ("video", "reads those of WanT5Tokenizer", replace(wan, clip=models.ltx_clip())),
        ("image", "changes over the steps", replace(sd15, clip=hooked)),
        ("image", "model is None: it must be what", replace(sd15, model=None)),
        (
            "image",
            "a wrapper (type) that doesn't say its noise levels (model_sampling)",
            replace(sd15, model=_Wrapper()),
        ),
        ("image", "reads 5 channels beside", replace(sd15, model=inpainting)),
        ("image", "editing", replace(sd15, model=editing)),
        ("video", "reads 20 channels beside", replace(wan, model=i2v)),
        ("image", "reads 80 channels beside", replace(sd15, model=fill)),
        ("video", "made to continue an image", replace(wan, model=vace_like)),
    ]
    said = {
        f"{i} {node}: {expected}": _refused(node, expected, three) for i, (node, expected, three) in enumerate(cases)
    }
    from comfy_extras import nodes_model_advanced as advanced

    second = models.diffusion_model(models.wan_transformer(seed=9))
    (shifted,) = advanced.ModelSamplingSD3().patch(second, 3.0)
    ltx = models.FAMILIES["ltx"]()
    for expected, three, more in (
        ("Wan 2.2 5B is one model for all noise: leave", models.FAMILIES["wan22"](), {"low_noise": second}),
        ("LTX-Video is one model for all noise, not a pair", ltx, {"noise": families.HIGH}),
        ("are the same model", wan, {"low_noise": wan.model}),
        ("model_low_noise is LTX-Video, model is Wan", wan, {"low_noise": ltx.model}),
        ("have other noise levels", wan, {"low_noise": shifted}),
        ("there are both experts", wan, {"low_noise": second, "noise": families.LOW}),
        ("model_low_noise is 5: it must be", wan, {"low_noise": 5}),
        ("made to continue an image", wan, {"low_noise": vace_like}),
    ):
        said[expected] = _refused("video", expected, three, **more)
    zero123 = models.FAMILIES["zero123"]()
    cases = [
        ("image", "Stable Zero123 makes novel views: connect it to Novel-View", replace(zero123, clip=sd15.clip)),
        ("novel_view", "makes images: connect it to Image Prior", replace(sd15, clip=zero123.clip)),
        ("novel_view", "clip_vision is", replace(zero123, clip=sd15.clip)),
        ("novel_view", "clip_vision is None", replace(zero123, clip=None)),
        ("novel_view", "768 numbers, not by one of 1024", replace(zero123, clip=models.clip_vision(1024))),
        ("novel_view", "has 16 channels", replace(zero123, vae=flux_vae)),
    ]
    said |= {f"{node}: {expected}": _refused(node, expected, three) for node, expected, three in cases}
    said |= _controlled(sd15) | _of_others(sd15, wan)
    for name, words in (
        ("NunchakuFlux", "not among those that have been tried"),
        (
            "SDXLRefiner",
            "finishes images of another model: connect one of Stable Diffusion 1 or 2, Stable Diffusion XL",
        ),
        ("SV3D_p", "SV3D_p makes novel views: connect it to Novel-View Prior"),
        ("SVD_img2vid", "no words"),
    ):
        odd = sd15.model.clone()
        odd.model = type(name, (), {"model_sampling": 1, "latent_format": 1})()
        said[name] = _refused("image", words, replace(sd15, model=odd))
    return said


# ---- run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    for name in NAMES or CHECKS:
        began, error, found = time.monotonic(), None, None
        try:
            with torch.inference_mode():  # as ComfyUI runs nodes
                found = CHECKS[name]()
        except BaseException:
            error = traceback.format_exc()
        seconds = round(time.monotonic() - began, 2)
        print("CHECK " + json.dumps({"name": name, "error": error, "found": found, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
