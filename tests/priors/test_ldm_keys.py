"""The tables of names, at full size: every tensor of a checkpoint is one of the network's, none missing, none left."""

from __future__ import annotations

import ldm_layout as layout
import pytest
import torch

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats import clip_keys, ldm_keys
from dream4d_engine.priors.formats.checkpoints import Checkpoint
from dream4d_engine.priors.formats.single_file import ldm_kind

# what the published folders' unet/config.json hold
_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
_CAMERA = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
UNETS = {
    "sd15": (layout.SD15, _SD1),
    "sd21": (layout.SD21, _SD2),
    "mvdream": (layout.MVDREAM, _SD2 | _CAMERA),
    "zero123": (layout.ZERO123, _SD1 | {"in_channels": 8}),
}


def shapes_of(network: torch.nn.Module) -> layout.Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def meta(network_class, config=None, **arguments):
    with torch.device("meta"):
        return network_class(**arguments) if config is None else network_class(config)


@pytest.mark.parametrize("name", UNETS)
def test_full_size_unets(name):
    from diffusers import UNet2DConditionModel

    size, arguments = UNETS[name]
    there = layout.unet(size)
    published = meta(UNet2DConditionModel, **arguments)
    names = ldm_keys.unet_names(there)
    assert {names[key]: shape for key, shape in there.items()} == shapes_of(published)
    ours = meta(UNet2DConditionModel, **ldm_keys.unet_config(there))
    assert shapes_of(ours) == shapes_of(published)
    heads = {n: m.heads for n, m in published.named_modules() if hasattr(m, "heads")}
    assert {n: m.heads for n, m in ours.named_modules() if hasattr(m, "heads")} == heads and len(heads) == 32


def test_full_size_autoencoder():
    from diffusers import AutoencoderKL

    there = layout.vae()
    published = meta(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    names = ldm_keys.vae_names(there)
    flat = {names[key]: shape[:2] if "mid.attn" in key else shape for key, shape in there.items()}
    assert flat == shapes_of(published)
    assert shapes_of(meta(AutoencoderKL, **ldm_keys.vae_config(there))) == shapes_of(published)


def encoder_shapes(pieces, there):
    """The shapes that the pieces make of those that are there."""
    found = {}
    for name, piece in pieces.items():
        shape = there[piece.source]
        shape = shape if piece.third is None else (shape[0] // 3, *shape[1:])
        found[name] = shape[::-1] if piece.transpose else shape
    return found


def published_names(network) -> layout.Shapes:
    """Newer versions of transformers leave `text_model` out of the names within the text encoder."""
    shapes = {k: v for k, v in shapes_of(network).items() if not k.endswith("position_ids")}
    if type(network).__name__ == "CLIPTextModel":
        return {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in shapes.items()}
    return shapes


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_full_size_text_encoders(kind):
    from transformers import CLIPTextConfig, CLIPTextModel

    there = layout.open_clip_text() if kind == "open_clip" else layout.hf_clip_text()
    assert clip_keys.encoder_layout(there) == kind
    wide, n_layers = (1024, 23) if kind == "open_clip" else (768, 12)
    config = CLIPTextConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=n_layers, num_attention_heads=wide // 64
    )
    published = meta(CLIPTextModel, config)
    pieces = clip_keys.text_pieces(there, kind)
    assert encoder_shapes(pieces, there) == published_names(published)
    ours = clip_keys.text_config(there, kind)
    assert all(getattr(config, k) == ours[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    assert ours["num_attention_heads"] == wide // 64 and ours["vocab_size"] == 49408
    assert ours["hidden_act"] == ("gelu" if kind == "open_clip" else "quick_gelu")
    left = there.keys() - {piece.source for piece in pieces.values()}
    # the last of OpenCLIP's layers, and what no hidden state depends on
    unused = ("resblocks.23.", "text_projection", "logit_scale", "attn_mask", "position_ids")
    assert all(any(part in key for part in unused) for key in left)


def test_full_size_image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    there = layout.clip_image()
    assert clip_keys.encoder_layout(there) == "clip_image"
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    pieces = clip_keys.vision_pieces(there)
    assert encoder_shapes(pieces, there) == published_names(meta(CLIPVisionModelWithProjection, config))
    ours = clip_keys.vision_config(there)
    assert {k: getattr(config, k) for k in ours if k != "hidden_act"} == {k: ours[k] for k in ours if k != "hidden_act"}
    left = {key for key in there if key.startswith("model.visual.")} - {piece.source for piece in pieces.values()}
    assert not left


@pytest.mark.parametrize(
    ("size", "condition", "projection", "kind"),
    [
        (layout.SD15, layout.hf_clip_text(), False, "image"),
        (layout.SD21, layout.open_clip_text(), False, "image"),
        (layout.MVDREAM, layout.open_clip_text(), False, "multiview"),
        (layout.ZERO123, layout.clip_image(), True, "novel_view"),
    ],
)
def test_full_size_checkpoints_are_known_by_their_names(tmp_path, size, condition, projection, kind):
    shapes = layout.checkpoint(layout.unet(size), layout.vae(), condition, projection)
    assert ldm_kind(Checkpoint(tmp_path, shapes, None)) == kind


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_blocks.0.0.weight": (320, 9, 3, 3)}, "9 input channels, not 4"),
        ({"input_blocks.0.0.weight": (320, 8, 3, 3)}, "8 input channels, not 4"),
        ({"label_emb.0.0.weight": (1280, 2816)}, "Stable Diffusion XL"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, words):
    shapes = layout.checkpoint(layout.unet(layout.SD21) | changes, layout.vae(), {})
    with pytest.raises(PriorError, match=words):
        ldm_kind(Checkpoint(tmp_path / "model.ckpt", shapes, None))


def test_unknown_parts_are_named():
    with pytest.raises(PriorError, match="no known model has: input_hint_block.0.weight"):
        ldm_keys.unet_names([*layout.unet(layout.SD21), "input_hint_block.0.weight"])
    with pytest.raises(PriorError, match="no known model has: quantize.embedding.weight"):
        ldm_keys.vae_names([*layout.vae(), "quantize.embedding.weight"])
    assert "loss.logvar" not in ldm_keys.vae_names([*layout.vae(), "loss.logvar"])
