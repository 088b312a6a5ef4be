"""Diffusers' transformers of videos (Wan, LTX-Video, HunyuanVideo) and images (Stable Diffusion 3, Flux), seen as
`denoise(x, sigma, conditions) -> x0`.

They are rectified flows (2209.03003): they see (1 - t) z + t eps = x / (1 + sigma), with t = sigma / (1 + sigma), and
they predict the velocity eps - z. Autoencoders of videos put several frames into one latent, the first one alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.denoiser import Conditions, split_conditions
from ...guidance.execution import Execution
from ...guidance.noise import NoiseSchedule
from ...transfers import send
from .checkpointing import frames_asked_for
from .denoisers import WORTH_COMPILING, flow_input, predicted_clean
from .execution import PLAIN, Capture, Runtime, can_compile, compile_blocks, in_slices, without_autocast
from .frozen import speed_up
from .video_encoders import encode_video, encodes_whole, lay_out

LTX_FRAMES_A_SECOND = 25  # of the videos that LTX-Video was trained on; its positions in time are seconds
FLUX_GUIDANCE = 3.5
"""What a Flux that was distilled from guided answers is told of how much they were guided: its pipeline's own."""
HUNYUAN_GUIDANCE = 6.0
"""Likewise, a HunyuanVideo."""


@dataclass(frozen=True, eq=False)
class TransformerDenoiser:
    """A frozen transformer, one of _RUNS, with its autoencoder, as a Denoiser.

    `n_frames`: of a take; None for single images.
    """

    transformer: nn.Module
    vae: Any  # torch's stubs know none of a module's own calls
    noise: NoiseSchedule
    image_size: tuple[int, int]  # (height, width), pixels
    n_frames: int | None
    execution: Execution = field(default_factory=Execution)
    capture: Capture = PLAIN
    device: torch.device = torch.device("cpu")
    fused: bool = False  # videos are encoded in one piece, by fewer passes over memory

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.transformer.parameters() if p.ndim > 1)  # small ones may be wider

    @property
    def images_apart(self) -> bool:
        """Autoencoders of videos see a take in time."""
        return self.n_frames is None

    def _scaling(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of the channels of a video's latents, [c, 1, 1, 1] each."""
        config = self.vae.config
        factor = getattr(config, "scaling_factor", None) or 1.0
        source = config if "latents_mean" in config else self.vae  # numbers of Wan, buffers of LTX-Video
        mean, deviation = (  # HunyuanVideo's has neither
            send(torch.as_tensor(getattr(source, f"latents_{name}", otherwise)), z.device).to(z).expand(z.shape[1])
            for name, otherwise in (("mean", 0.0), ("std", 1.0))
        )
        return mean[:, None, None, None], (deviation / factor)[:, None, None, None]

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1] to [B, f, c, h, w]; differentiable. The mean of the autoencoder's guess."""
        dtype = next(self.vae.parameters()).dtype
        with without_autocast(self.device):
            if self.n_frames is None:
                each = None if carried is None else carried.flatten()
                z = in_slices(self._encode_images, images.flatten(0, 1), self.execution, self.capture, each)
                return z.unflatten(0, images.shape[:2])
            videos = (2 * images - 1).to(dtype).movedim(1, 2).split(1)
            takes = zip(videos, frames_asked_for(carried, len(videos)), strict=True)
            z = torch.cat([encode_video(self.vae, *one, self.execution, self.fused) for one in takes]).float()
        mean, deviation = self._scaling(z)
        return ((z - mean) / deviation).movedim(2, 1)

    def _encode_images(self, images: Tensor) -> Tensor:
        """Encode [n, 3, H, W] in [0, 1], scaled."""
        z = self.vae.encode((2 * images - 1).to(next(self.vae.parameters()).dtype)).latent_dist.mode().float()
        config = self.vae.config  # numbers: a CUDA graph can't copy tensors from the CPU
        return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1] (not clamped)."""
        with without_autocast(self.device):
            if self.n_frames is None:
                images = in_slices(self._decode_images, z.flatten(0, 1), self.execution, self.capture)
                return images.unflatten(0, z.shape[:2])
            z = z.movedim(1, 2)
            mean, deviation = self._scaling(z)
            self.vae.decoder.to(self.device)  # it may have waited, see prepared_transformer
            images = self.vae.decode((z * deviation + mean).to(next(self.vae.parameters()).dtype)).sample
        return (images.float() / 2 + 0.5).movedim(2, 1)

    def _decode_images(self, z: Tensor) -> Tensor:
        """Decode [n, c, h, w]."""
        config = self.vae.config
        plain = z / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.vae.decode(plain.to(next(self.vae.parameters()).dtype)).sample.float() / 2 + 0.5

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict z [B, f, c, h, w] from x = z + sigma * eps; sigma [B]. A take is told what its first frame is."""
        at_once = self.execution.groups_at_once or len(x)
        pieces = zip(x.split(at_once), sigma.split(at_once), split_conditions(conditions, at_once), strict=True)
        with without_autocast(self.device):
            return torch.cat([self._denoise(*piece) for piece in pieces])

    def _denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        noisy, time = flow_input(x, sigma)
        noisy = noisy[:, 0] if self.n_frames is None else noisy.movedim(1, 2)  # [B, c, h, w] or [B, c, f, h, w]
        inputs = [noisy.to(self.dtype), time, conditions.tokens[:, 0].to(self.dtype)]
        if conditions.vector is not None:
            inputs.append(conditions.vector[:, 0].to(self.dtype))
        if conditions.mask is not None:
            inputs.append(conditions.mask[:, 0])
        velocity = self.capture(self._forward, *inputs).float()
        velocity = velocity[:, None] if self.n_frames is None else velocity.movedim(2, 1)
        return predicted_clean(velocity, x.float(), sigma.to(x.device).float(), "flow")

    def _forward(self, noisy: Tensor, time: Tensor, tokens: Tensor, *more: Tensor) -> Tensor:
        """Run the network; `more`: pooled words [B, K], then a mask of the tokens [B, L], as far as it reads them."""
        return _RUNS[type(self.transformer).__name__](self.transformer, self.vae, noisy, time, tokens, *more)

    def run_as(self, execution: Execution) -> TransformerDenoiser:
        """Return the denoiser run in this way. Weights stay where they are: an `offload` is left out."""
        return replace(self, execution=execution)

    def forget(self) -> None:
        """Drop the graphs that were captured with the weights' old places."""
        self.capture.forget()


# ---- How each is called: noisy [B, c, (f,) h, w], time [B] in [0, 1000], tokens [B, L, D] -> velocity ----


def _run_wan(network: Any, _vae: Any, noisy: Tensor, time: Tensor, tokens: Tensor, *_more: Tensor) -> Tensor:
    return network(noisy, time, tokens, return_dict=False)[0]


def _run_ltx(network: Any, vae: Any, noisy: Tensor, time: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    _, _, f, h, w = noisy.shape
    side, frames = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    # a token for every place of the latents, which are that much smaller than the video
    velocity = network(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=tokens,
        timestep=time,
        encoder_attention_mask=mask,
        num_frames=f,
        height=h,
        width=w,
        rope_interpolation_scale=(frames / LTX_FRAMES_A_SECOND, side, side),
        return_dict=False,
    )[0]
    return velocity.transpose(1, 2).unflatten(2, (f, h, w))


def _run_hunyuan(
    network: Any, _vae: Any, noisy: Tensor, time: Tensor, tokens: Tensor, pooled: Tensor, mask: Tensor
) -> Tensor:
    # a thousand times as much in the network's own numbers, as its pipeline has it
    guidance = noisy.new_full((len(noisy),), HUNYUAN_GUIDANCE) * 1000
    return network(
        hidden_states=noisy,
        timestep=time,
        encoder_hidden_states=tokens,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        guidance=guidance if network.config.guidance_embeds else None,
        return_dict=False,
    )[0]


def _run_sd3(network: Any, _vae: Any, noisy: Tensor, time: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    return network(noisy, tokens, pooled, time, return_dict=False)[0]


def _run_flux(network: Any, _vae: Any, noisy: Tensor, time: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    n, c, h, w = noisy.shape
    rows, columns = torch.meshgrid(
        torch.arange(h // 2, device=noisy.device), torch.arange(w // 2, device=noisy.device), indexing="ij"
    )
    places = torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).to(noisy.dtype)
    # squares of 2x2 places are one token
    squares = noisy.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    velocity = network(
        hidden_states=squares.reshape(n, -1, 4 * c),
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=time / 1000,
        img_ids=places,
        txt_ids=places.new_zeros(tokens.shape[1], 3),
        guidance=time.new_full((n,), FLUX_GUIDANCE) if network.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    squares = velocity.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(n, c, h, w)


_RUNS: dict[str, Callable[..., Tensor]] = {
    "WanTransformer3DModel": _run_wan,
    "LTXVideoTransformer3DModel": _run_ltx,
    "HunyuanVideoTransformer3DModel": _run_hunyuan,
    "SD3Transformer2DModel": _run_sd3,
    "FluxTransformer2DModel": _run_flux,
}
"""By the class's name."""


def prepared_transformer(denoiser: TransformerDenoiser, runtime: Runtime) -> TransformerDenoiser:
    """Return the denoiser as it is to run; on a GPU fast, its networks changed in place and keeping their weights."""
    if not runtime.accelerated:
        return denoiser
    fused = encodes_whole(denoiser.vae)
    if fused:
        lay_out(denoiser.vae)
    if denoiser.n_frames is None:
        speed_up(denoiser.vae)
    else:  # most recipes never decode a video
        denoiser.vae.decoder.to("cpu")
    n_parameters = sum(p.numel() for p in denoiser.transformer.parameters())
    if runtime.compiled and n_parameters >= WORTH_COMPILING and can_compile(denoiser.device):
        compile_blocks(denoiser.transformer)
    torch.backends.cudnn.benchmark = True  # shapes don't change from step to step
    return replace(denoiser, capture=runtime.capture, fused=fused)
