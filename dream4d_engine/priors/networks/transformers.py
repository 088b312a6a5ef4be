"""Diffusers' transformers of videos (Wan, LTX-Video), seen as `denoise(x, sigma, conditions) -> x0`.

They are rectified flows (2209.03003): they see (1 - t) z + t eps = x / (1 + sigma), with t = sigma / (1 + sigma), and
they predict the velocity eps - z. Their autoencoders put several frames into one latent, the first one alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.denoiser import Conditions, split_conditions
from ...guidance.execution import Execution
from ...guidance.noise import NoiseSchedule
from .checkpointing import checkpointing
from .denoisers import WORTH_COMPILING, predicted_clean
from .execution import PLAIN, Capture, Runtime, can_compile, compile_blocks, without_autocast
from .video_encoders import encode_whole, encodes_whole, lay_out

LTX_FRAMES_A_SECOND = 25  # of the videos that LTX-Video was trained on; its positions in time are seconds
FEW_AT_ONCE = 4
"""Frames: where no more are to be encoded at once, they are as the library does it, Wan's four by four."""


@dataclass(frozen=True, eq=False)
class TransformerDenoiser:
    """A frozen WanTransformer3DModel or LTXVideoTransformer3DModel with its autoencoder, as a Denoiser."""

    transformer: nn.Module
    vae: Any  # torch's stubs know none of a module's own calls
    noise: NoiseSchedule
    image_size: tuple[int, int]  # (height, width), pixels
    n_frames: int
    execution: Execution = field(default_factory=Execution)
    capture: Capture = PLAIN
    device: torch.device = torch.device("cpu")
    fused: bool = False  # videos are encoded in one piece, by fewer passes over memory

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    @property
    def _is_ltx(self) -> bool:
        return type(self.transformer).__name__.startswith("LTX")

    def _scaling(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of the latents' channels, [c, 1, 1, 1] each."""
        source = self.vae if self._is_ltx else self.vae.config  # buffers there, numbers here
        scaling = getattr(self.vae.config, "scaling_factor", 1.0)
        mean, deviation = (torch.as_tensor(getattr(source, f"latents_{name}")).to(z) for name in ("mean", "std"))
        return mean[:, None, None, None], (deviation / scaling)[:, None, None, None]

    def encode(self, images: Tensor) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1] to [B, f, c, h, w]; differentiable. The mean of the autoencoder's guess."""
        dtype = next(self.vae.parameters()).dtype
        videos = (2 * images - 1).to(dtype).movedim(1, 2).split(1)
        with without_autocast(self.device):
            z = torch.cat([self._encode(one) for one in videos]).float()
        mean, deviation = self._scaling(z)
        return ((z - mean) / deviation).movedim(2, 1)

    def _encode(self, video: Tensor) -> Tensor:
        """Encode [1, 3, F, H, W] in [-1, 1] to [1, c, f, h, w], not scaled."""
        checkpointed, at_once = self.execution.images_kept is not None, self.execution.images_at_once
        if self.fused and (at_once is None or at_once > FEW_AT_ONCE):
            return encode_whole(self.vae, video, checkpointed)
        try:
            with checkpointing(self.vae, checkpointed):
                return self.vae.encode(video).latent_dist.mode()
        finally:
            if hasattr(self.vae, "clear_cache"):  # Wan's: where memory ran out it would hold the features of before
                self.vae.clear_cache()

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1] (not clamped)."""
        z = z.movedim(1, 2)
        mean, deviation = self._scaling(z)
        with without_autocast(self.device):
            images = self.vae.decode((z * deviation + mean).to(next(self.vae.parameters()).dtype)).sample
        return (images.float() / 2 + 0.5).movedim(2, 1)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict z [B, f, c, h, w] from x = z + sigma * eps; sigma [B]. A take is told what its first frame is."""
        at_once = self.execution.groups_at_once or len(x)
        pieces = zip(x.split(at_once), sigma.split(at_once), split_conditions(conditions, at_once), strict=True)
        with without_autocast(self.device):
            return torch.cat([self._denoise(*piece) for piece in pieces])

    def _denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        x, sigma = x.float(), sigma.to(x.device).float()
        noisy = (x / (1 + sigma)[:, None, None, None, None]).movedim(1, 2)  # [B, c, f, h, w]
        time = 1000 * sigma / (1 + sigma)
        inputs = [noisy.to(self.dtype), time, conditions.tokens[:, 0].to(self.dtype)]
        if conditions.mask is not None:
            inputs.append(conditions.mask[:, 0])
        velocity = self.capture(self._forward, *inputs).float().movedim(2, 1)
        return predicted_clean(velocity, x, sigma, "flow")

    def _forward(self, noisy: Tensor, time: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the network. noisy [B, c, f, h, w], time [B] in [0, 1000], tokens [B, L, D], mask [B, L] or None."""
        if not self._is_ltx:
            return self.transformer(noisy, time, tokens, return_dict=False)[0]
        _, _, f, h, w = noisy.shape
        side, frames = self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio
        # a token for every place of the latents, which are that much smaller than the video
        velocity = self.transformer(
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

    def run_as(self, execution: Execution) -> TransformerDenoiser:
        """Return the denoiser run in this way. Weights stay where they are: an `offload` is left out."""
        return replace(self, execution=execution)

    def forget(self) -> None:
        """Drop the graphs that were captured with the weights' old places."""
        self.capture.forget()


def prepared_transformer(denoiser: TransformerDenoiser, runtime: Runtime) -> TransformerDenoiser:
    """Return the denoiser as it is to run; on a GPU fast, its networks changed in place and keeping their weights."""
    if not runtime.accelerated:
        return denoiser
    fused = encodes_whole(denoiser.vae)
    if fused:
        lay_out(denoiser.vae)
    n_parameters = sum(p.numel() for p in denoiser.transformer.parameters())
    if runtime.compiled and n_parameters >= WORTH_COMPILING and can_compile(denoiser.device):
        compile_blocks(denoiser.transformer)
    torch.backends.cudnn.benchmark = True  # shapes don't change from step to step
    return replace(denoiser, capture=runtime.capture, fused=fused)
