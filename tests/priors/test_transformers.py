"""Flow models of videos: their encoders, their velocities and what is kept for the backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_cases import kept_bytes

from dream4d_engine.cameras import make_cameras
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.distillation import DistillationConfig, distill
from dream4d_engine.guidance.execution import Execution
from dream4d_engine.guidance.noise import rectified_flow, variance_preserving
from dream4d_engine.priors import architectures
from dream4d_engine.priors.networks import video_encoders
from dream4d_engine.priors.networks.denoisers import UNetDenoiser
from dream4d_engine.priors.networks.execution import GraphCapture, Runtime
from dream4d_engine.priors.networks.transformers import TransformerDenoiser, prepared_transformer
from dream4d_engine.randomness import Draw
from dream4d_engine.schedules import constant

CPU = torch.device("cpu")
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 16}
WAN |= {"freq_dim": 32}
LTX = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
LTX |= {"caption_channels": 16, "cross_attention_dim": 16}
LTX_VAE = {"block_out_channels": (8, 8, 16, 16), "decoder_block_out_channels": (8, 8, 16, 16)}
LTX_VAE |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
LTX95_VAE = LTX_VAE | {"block_out_channels": (8, 16, 16, 32, 32), "layers_per_block": (1, 1, 1, 1, 1)}
LTX95_VAE |= {"down_block_types": ("LTXVideo095DownBlock3D",) * 4, "spatio_temporal_scaling": (True,) * 4}
LTX95_VAE |= {"downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal")}
LTX95_VAE |= {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
WAN_VAE = {"base_dim": 8, "z_dim": 16}
WAN22_VAE = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12}
WAN22_VAE |= {"out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.1] * 48, "latents_std": [2.0] * 48}
FAMILIES = {  # transformer, its numbers, autoencoder, its numbers, height and width
    "wan": ("WanTransformer3DModel", WAN, "AutoencoderKLWan", WAN_VAE, (32, 48)),
    "wan 2.2": (
        *("WanTransformer3DModel", WAN | {"in_channels": 48, "out_channels": 48}),
        *("AutoencoderKLWan", WAN22_VAE, (64, 96)),
    ),
    "ltx 0.9.5": ("LTXVideoTransformer3DModel", LTX, "AutoencoderKLLTXVideo", LTX95_VAE, (64, 96)),
    "ltx": ("LTXVideoTransformer3DModel", LTX, "AutoencoderKLLTXVideo", LTX_VAE, (64, 96)),
}


@pytest.fixture(params=list(FAMILIES))
def denoiser(request) -> TransformerDenoiser:
    transformer, numbers, vae, vae_numbers, size = FAMILIES[request.param]
    return TransformerDenoiser(
        architectures.random_network(transformer, numbers, CPU, torch.float32),
        architectures.random_network(vae, vae_numbers, CPU, torch.float32),
        rectified_flow(3.0),
        size,
        n_frames=9,
    )


def told(n: int) -> Conditions:
    tokens = torch.randn(n, 1, 7, 16, generator=torch.Generator().manual_seed(5))
    return Conditions(tokens.expand(-1, 9, -1, -1), mask=torch.ones(n, 9, 7))


def test_videos_are_encoded_as_the_library_scales_them(denoiser):
    images = torch.rand(2, 9, 3, *denoiser.image_size, generator=torch.Generator().manual_seed(1))
    z = denoiser.encode(images)
    vae, config = denoiser.vae, denoiser.vae.config
    plain = vae.encode(2 * images.movedim(1, 2) - 1).latent_dist.mode()
    of = config if "latents_mean" in config else vae
    mean, deviation = (torch.as_tensor(v).view(1, -1, 1, 1, 1) for v in (of.latents_mean, of.latents_std))
    # as WanPipeline and LTXPipeline prepare latents
    expected = (plain - mean) * getattr(config, "scaling_factor", 1.0) / deviation
    torch.testing.assert_close(z.movedim(1, 2), expected, rtol=1e-4, atol=1e-4)
    assert z.shape[1] < 9, "frames are put together"
    back = denoiser.decode(z)
    assert back.shape == images.shape
    torch.testing.assert_close(back, vae.decode(plain).sample.movedim(2, 1) / 2 + 0.5, rtol=1e-3, atol=1e-3)


def test_an_encoder_that_fails_keeps_nothing(denoiser):
    """A plan that doesn't fit into memory must not take the memory of the next one."""
    images = torch.rand(1, 9, 3, *denoiser.image_size).requires_grad_()
    whole, calls = denoiser.vae.encoder.forward, []

    def forward(*given, **named):
        calls.append(1)
        if len(calls) > 1 or "feat_cache" not in named:
            raise torch.OutOfMemoryError("no more")
        return whole(*given, **named)

    denoiser.vae.encoder.forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        denoiser.encode(images)
    assert not any(isinstance(kept, torch.Tensor) for kept in getattr(denoiser.vae, "_enc_feat_map", []))


def test_a_video_encoded_in_one_piece_is_what_the_library_makes_of_it(denoiser):
    """Wan's own code takes a few frames after the other and hands features on."""
    fast = replace(denoiser, fused=True)
    more = (3, 7) if type(denoiser.vae).__name__ == "AutoencoderKLWan" else ()  # the last frames are left out
    for n_frames in (1, 9, 17, *more):
        images = torch.rand(1, n_frames, 3, *denoiser.image_size).requires_grad_()
        z = denoiser.encode(images)
        pull = torch.randn_like(z)
        (gradient,) = torch.autograd.grad(z, images, pull)
        for way in (fast, fast.run_as(Execution(images_kept=0))):
            found = way.encode(images)
            (pulled,) = torch.autograd.grad(found, images, pull)
            for ours, theirs in ((found, z), (pulled, gradient)):
                assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_other_autoencoders_are_left_to_the_library(denoiser):
    assert video_encoders.encodes_whole(denoiser.vae)
    odd = replace(denoiser, vae=architectures.random_network("AutoencoderKL", {}, CPU, torch.float32))
    assert not video_encoders.encodes_whole(odd.vae)
    if type(denoiser.vae).__name__ == "AutoencoderKLWan":
        denoiser.vae.register_to_config(attn_scales=[0.5])
        assert not video_encoders.encodes_whole(denoiser.vae)


def test_in_one_piece_less_is_kept(denoiser):
    images, kept = torch.rand(1, 9, 3, *denoiser.image_size).requires_grad_(), []
    ways = (Execution(), Execution(images_kept=0))
    for way in (denoiser, *(replace(denoiser, fused=True, execution=execution) for execution in ways)):
        sizes: dict[int, int] = {}

        def keep(t, sizes=sizes):
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            held = way.encode(images)
        kept.append(sum(sizes.values()))
        del held
    assert kept[2] < kept[1] < kept[0]


def test_prepared_it_answers_the_same(denoiser, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # given back afterwards
    images = torch.rand(1, 9, 3, *denoiser.image_size)
    z, back = denoiser.encode(images), denoiser.decode(denoiser.encode(images))
    x, sigma, given = torch.randn_like(z), torch.tensor([2.0]), told(1)
    answer = denoiser.denoise(x, sigma, given)
    ready = prepared_transformer(denoiser, Runtime(CPU, accelerated=True))
    assert ready.fused and not denoiser.fused and prepared_transformer(denoiser, Runtime(CPU)) is denoiser
    for ours, theirs in (
        (ready.encode(images), z),
        (ready.decode(z), back),
        (ready.denoise(x, sigma, given), answer),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_recorded_flows_are_known_by_their_networks(denoiser):
    """A method is another object at every call, and what is freed makes room for others."""
    first, again = (GraphCapture._key(way._forward, ()) for way in (denoiser, denoiser.run_as(Execution())))
    other = replace(denoiser, transformer=denoiser.vae)
    assert first == again != GraphCapture._key(other._forward, ())


def test_the_velocity_becomes_the_clean_latents(denoiser):
    z = torch.randn(2, *denoiser.encode(torch.rand(1, 9, 3, *denoiser.image_size)).shape[1:])
    noise, sigma = torch.randn_like(z), torch.tensor([0.5, 4.0])
    wide = sigma.view(-1, 1, 1, 1, 1)
    time = wide / (1 + wide)
    x = z + wide * noise
    seen = (1 - time) * z + time * noise
    given = told(2)
    velocity = denoiser._forward(seen.movedim(1, 2), 1000 * time.flatten(), given.tokens[:, 0], given.mask[:, 0])
    expected = seen - time * velocity.movedim(2, 1)
    torch.testing.assert_close(denoiser.denoise(x, sigma, given), expected, rtol=1e-4, atol=1e-4)


def test_checkpointed_activations_change_memory_and_nothing_else(denoiser, monkeypatch):
    architecture = replace(
        architectures.WAN_13B, image_size=denoiser.image_size, n_frames=9, token_width=16, n_tokens=7
    )
    monkeypatch.setattr(architectures, "random_denoiser", lambda *_: denoiser)
    config = DistillationConfig(25.0, constant(0.5), constant(0.9))
    guidance = architectures.random_guidance(architecture, config, Runtime(CPU))
    cameras = make_cameras(torch.zeros(1, 9), 0.2, 3.0, 0.7, torch.linspace(0, 1, 9)[None], *denoiser.image_size)
    images = torch.rand(1, 9, 3, *denoiser.image_size).requires_grad_()
    kept, gradients = [], []
    for execution in (Execution(), Execution(images_kept=0)):
        sizes: list[int] = []
        way = replace(guidance, denoiser=denoiser.run_as(execution))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = distill(way, images, cameras, 0.5, Draw(0)).loss
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, images)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.7 * kept[0], "what is kept for the backward pass"


def wan() -> TransformerDenoiser:
    vae = architectures.random_network("AutoencoderKLWan", WAN_VAE, CPU, torch.float32)
    return TransformerDenoiser(torch.nn.Linear(1, 1), vae, rectified_flow(3.0), (16, 16), n_frames=9)


def of_images() -> UNetDenoiser:
    """An autoencoder of single images, as video models of before have."""
    vae = architectures.random_network(
        "AutoencoderKL", {"block_out_channels": (8,), "norm_num_groups": 4}, CPU, torch.float32
    )
    return UNetDenoiser(torch.nn.Linear(1, 1), variance_preserving(torch.linspace(0.99, 0.01, 10)), "epsilon",
                        (32, 32), n_frames=9, vae=vae)  # fmt: skip


@pytest.mark.parametrize("execution", [Execution(), Execution(images_at_once=2, images_kept=0)])
@pytest.mark.parametrize("make", [wan, of_images])
def test_encoders_give_the_frames_that_are_asked_for_their_gradient(make, execution):
    denoiser = make().run_as(execution)
    images = torch.rand(2, 9, 3, 16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    z, most = kept_bytes(lambda: denoiser.encode(images))
    pull = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    (whole,) = torch.autograd.grad(z, images, pull)
    carried = torch.zeros(2, 9, dtype=torch.bool)
    carried[0, 1:4] = carried[1, 6:9] = True
    found, kept = kept_bytes(lambda: denoiser.encode(images, carried))
    torch.testing.assert_close(found, z)
    (some,) = torch.autograd.grad(found, images, pull)
    assert (some - whole)[carried].norm() < 1e-5 * whole[carried].norm()
    # Wan keeps four of nine frames, the other one three
    assert kept < (0.6 if make is wan else 0.45) * most or execution.images_kept is not None
    assert not denoiser.encode(images, torch.zeros(2, 9, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("checkpointed", [False, True])
def test_which_pieces_of_a_video_are_computed_again(checkpointed):
    way = Execution(images_kept=0 if checkpointed else None)
    denoiser, calls = wan().run_as(way), []
    denoiser.vae.encoder.conv_in.register_forward_hook(lambda *_: calls.append(1))
    # pieces of 1, 4 and 4 frames: those before what is asked for never, those after and half of it always
    for asked, expected in (((2, 5), 5), ((1, 5), 5 if checkpointed else 4), ((5, 9), 4 if checkpointed else 3)):
        calls.clear()
        carried = torch.zeros(1, 9, dtype=torch.bool)
        carried[:, slice(*asked)] = True
        denoiser.encode(torch.rand(1, 9, 3, 16, 16).requires_grad_(), carried).sum().backward()
        assert len(calls) == expected, asked
    assert "forward" not in vars(denoiser.vae.encoder), "given back"
