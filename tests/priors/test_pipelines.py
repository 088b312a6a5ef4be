"""Folders of today's models: the same answers as their own pipelines', and what is refused of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pipeline_folders import MAKERS, SIZES, flux, pipeline_folder, sd3

from dream4d_engine.cameras import make_cameras
from dream4d_engine.guidance.distillation import DistillationConfig, distill
from dream4d_engine.guidance.windows import Windows, windowed
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import prior_files
from dream4d_engine.priors.formats.identify import identify
from dream4d_engine.priors.formats.pipelines import flow_shift, open_pipeline
from dream4d_engine.priors.networks.execution import Runtime
from dream4d_engine.randomness import Draw
from dream4d_engine.schedules import constant

CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a red cube is jumping", "ugly"
CONFIG = DistillationConfig(5.0, constant(0.5), constant(0.9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines and their folders, each made once."""
    made: dict = {}

    def get(name):
        if name not in made:
            made[name] = pipeline_folder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def cameras(n_frames: int, height: int, width: int):
    times = torch.linspace(0, 1, n_frames)[None]
    return make_cameras(torch.full((1, n_frames), 1.5), torch.full((1, n_frames), 0.2), 3.0, 0.7, times, height, width)


def asked(pipeline, name: str, n_steps: int = 5, **more):
    """Run the pipeline and return what its network was given and answered at each step: [(input, time, output)]."""
    network, calls = pipeline.unet if name == "sdxl" else pipeline.transformer, []
    forward = network.forward

    def spy(*given, **named):
        out = forward(*given, **named)
        noisy = named.get("hidden_states", named.get("sample", given[0] if given else None))
        time = named.get("timestep", given[1] if len(given) > 1 else None)
        calls.append((noisy.clone(), time.clone(), out[0].clone()))
        return out

    network.forward = spy
    (height, width), n_frames = SIZES[name]
    size = {"height": height, "width": width} | ({} if n_frames is None else {"num_frames": n_frames})
    try:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        # the words that a camera at the side is told
        pipeline(f"{PROMPT}, side view", num_inference_steps=n_steps, generator=generator, output_type="latent",
                 **size, **more)  # fmt: skip
    finally:
        del network.forward
    return calls


def unpacked(pipeline, name: str, latents):
    """Latents as [n, 1, c, h, w] or [n, f, c, h, w]."""
    (height, width), n_frames = SIZES[name]
    if name == "flux":
        return pipeline._unpack_latents(latents, height, width, 8)[:, None]
    if name == "ltx":
        f = (n_frames - 1) // 8 + 1
        return pipeline._unpack_latents(latents, f, height // 32, width // 32).movedim(2, 1)
    return latents.movedim(2, 1) if name in ("wan", "hunyuan") else latents[:, None]


@pytest.mark.parametrize("name", [*MAKERS, "sd3 without t5", "flux dev"])
def test_answers_are_those_of_the_pipeline_at_every_noise_level(name, folders, tmp_path):
    """From the prompt on: its encoders, the networks, the noise levels."""
    made = {"sd3 without t5": lambda: sd3(False), "flux dev": lambda: flux(True)}.get(name)
    name = name.split()[0]
    pipeline, folder = folders(name) if made is None else pipeline_folder(name, tmp_path, made())
    more = {"wan": {"max_sequence_length": 512}, "flux": {"max_sequence_length": 256 if made is None else 512}}
    # what these are told of guidance is a number of their own
    guided = {"true_cfg_scale": 3.0} if name in ("flux", "hunyuan") else {"guidance_scale": 3.0}
    if name == "flux" and made is not None:
        guided |= {"guidance_scale": 3.5}
    calls = asked(pipeline, name, negative_prompt=NEGATIVE, **more.get(name, {}), **guided)
    handle = prior_files(folder)
    guidance = handle.load(Runtime(CPU)).guide(PROMPT, NEGATIVE, CONFIG)
    (height, width), n_frames = SIZES[name]
    text, negative = guidance.conditions(cameras(n_frames or 1, height, width))
    levels, n_compared = set(), 0
    if len(calls[0][0]) == 1:  # one call for each condition, the text first
        calls = [(torch.cat((n[0], t[0])), torch.cat((n[1], t[1])), torch.cat((n[2], t[2])))
                 for t, n in zip(calls[::2], calls[1::2], strict=True)]  # fmt: skip
    for noisy, time, output in calls:
        noisy, output = (unpacked(pipeline, name, latents) for latents in (noisy, output))
        if name == "sdxl":
            alpha_bar = pipeline.scheduler.alphas_cumprod[time.flatten()[0].round().long()]
            sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
            x = noisy * (1 + sigma**2).sqrt()
            expected = x - sigma * output
        else:
            share = time.flatten()[0].double() / (1 if name == "flux" else 1000)
            if share > 0.999:  # noise alone
                continue
            sigma = (share / (1 - share)).float()
            x, expected = noisy * (1 + sigma), noisy - share.float() * output
        levels.add(round(float(sigma), 4))
        # the pipeline asks for the negative prompt first
        for conditions, i in ((negative, 0), (text, 1)):
            found = guidance.denoiser.denoise(x[i : i + 1], sigma[None], conditions)
            n_compared += 1
            assert (found - expected[i : i + 1]).norm() < 1e-5 * expected[i : i + 1].norm(), (name, float(sigma))
    assert len(levels) >= 3 and n_compared >= 6


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_gradient_reaches_the_images(name, folders):
    _, folder = folders(name)
    handle = prior_files(folder)
    (height, width), n_frames = SIZES[name]
    assert handle.n_frames == n_frames and identify(folder).kind == handle.kind
    guidance = handle.load(Runtime(CPU)).guide(PROMPT, None, CONFIG)
    seen = cameras(n_frames or 2, height, width)
    images = torch.rand(1, n_frames or 2, 3, height // 2, width // 2, requires_grad=True)
    found = distill(guidance, images, seen, 0.5, Draw(0))
    found.loss.backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(2).norm(dim=-1) > 0).all(), "every frame gets one"


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_takes_longer_than_the_models_own_are_seen_through_windows_of_latents(name, folders):
    handle, ((height, width), n_frames) = prior_files(folders(name)[1]), SIZES[name]
    assert handle.frame_step == {"wan": 4, "ltx": 8}[name]
    windows = Windows(n_frames + 8, n_frames, handle.frame_step)
    guidance = windowed(handle.load(Runtime(CPU)).guide(PROMPT, None, CONFIG), windows)
    images = torch.rand(1, windows.n_frames, 3, height // 2, width // 2, requires_grad=True)
    found = distill(guidance, images, cameras(windows.n_frames, height, width), 0.5, Draw(0))
    assert found.x0.shape[1] == windows.n_encoded == {"wan": 5, "ltx": 3}[name] and len(windows.starts) == 2
    found.loss.backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(2).norm(dim=-1) > 0).all(), "every frame gets one"


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_noise_is_shifted_as_the_scheduler_says(name, folders):
    folder = folders(name)[1]
    shift = 3.0
    if name == "ltx":  # 2 x 2 x 3 tokens
        mu = 0.95 + (2.05 - 0.95) * (12 - 1024) / (4096 - 1024)
        shift = float(torch.tensor(mu).exp())
    half = open_pipeline(folder).noise().sigma_of(torch.tensor([0.5]))
    torch.testing.assert_close(half, torch.tensor([shift]))  # t = s / (s + 1), sigma = t / (1 - t)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"_class_name": "UniPCMultistepScheduler"}, "use_flow_sigmas"),
        ({"shift": 0}, "the shift is 0"),
        ({"shift": "much"}, "shift"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 9, "max_image_seq_len": 9}, "must differ"),
    ],
)
def test_a_schedule_that_is_no_flows_is_refused(config, said):
    with pytest.raises(PriorError, match=said):
        flow_shift(config, 100, "scheduler_config.json")


def changed(folder, place, file, **changes):
    """A copy of a folder of which one file says something else."""
    shutil.copytree(folder, place, copy_function=lambda a, b: shutil.os.symlink(a, b))
    content = json.loads((place / file).read_text()) | changes
    (place / file).unlink()
    (place / file).write_text(json.dumps(content))
    return place


@pytest.mark.parametrize(
    ("name", "file", "changes", "said"),
    [
        ("wan", "transformer/config.json", {"in_channels": 36}, "inpainting, editing or continuing images"),
        ("wan", "transformer/config.json", {"text_dim": 64}, "not of one model"),
        ("wan", "vae/config.json", {"_class_name": "AutoencoderKLLTXVideo"}, "has a AutoencoderKLWan"),
        ("wan", "model_index.json", {"dream4d": {"n_frames": 8}}, "multiple of 4 and one more"),
        ("wan", "model_index.json", {"dream4d": {"image_size": [33, 48]}}, "multiples of 16"),
        ("wan", "model_index.json", {"transformer_2": ["diffusers", "W"], "boundary_ratio": 0.9}, "two experts"),
        ("wan", "model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "made to continue an image"),
        ("hunyuan", "model_index.json", {"_class_name": "HunyuanVideo15Pipeline"}, "another model"),
        ("hunyuan", "transformer/config.json", {"image_condition_type": "latent_concat"}, "for continuing images"),
        ("hunyuan", "transformer/config.json", {"in_channels": 33}, "inpainting, editing or continuing images"),
        ("hunyuan", "transformer/config.json", {"text_embed_dim": 64}, "not of one model"),
        ("flux", "transformer/config.json", {"in_channels": 384}, "inpainting, editing or continuing images"),
    ],
)
def test_what_can_not_be_used_is_named_at_the_door(name, file, changes, said, folders, tmp_path):
    folder = changed(folders(name)[1], tmp_path / "changed", file, **changes)
    with pytest.raises(PriorError, match=said):
        open_pipeline(folder).check()
        prior_files(folder)


def test_the_kind_is_the_familys(folders):
    with pytest.raises(PriorError, match="of the kind 'video' and not 'image'"):
        prior_files(folders("wan")[1], "image")


def test_a_part_that_is_missing_is_named(folders, tmp_path):
    folder = changed(folders("flux")[1], tmp_path / "changed", "model_index.json")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(PriorError, match=r"text_encoder_2/config\.json is missing"):
        open_pipeline(folder).check()


def test_loras_and_tiny_autoencoders_are_not_taken(folders, tmp_path):
    from dataclasses import replace

    handle = replace(prior_files(folders("wan")[1]), tiny_vae=tmp_path)
    with pytest.raises(PriorError, match="a tiny autoencoder in ComfyUI only"):
        handle.load(Runtime(CPU))


def test_hunyuan_videos_longer_than_a_part_are_encoded_in_one_piece(folders):
    """The library cuts takes of more than 16 frames into parts that overlap, and blends them."""
    vae = open_pipeline(folders("hunyuan")[1]).vae(torch.float32, "cpu")
    video = torch.rand(1, 3, 21, 16, 16)
    expected = vae.quant_conv(vae.encoder(video))[:, :16]
    torch.testing.assert_close(vae.encode(video).latent_dist.mode(), expected)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "text_encoder/config.json",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters is of type 'llama3'",
        ),
        (
            "text_encoder/config.json",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is of type 'linear'",
        ),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "padding_side is 'left'"),
        ("tokenizer/tokenizer_config.json", {"add_bos_token": True, "bos_token": "<unk>"}, "puts no bos_token before"),
    ],
)
def test_llamas_that_would_read_otherwise_are_refused(file, changes, said, folders, tmp_path):
    folder = changed(folders("hunyuan")[1], tmp_path / "changed", file, **changes)
    with pytest.raises(PriorError, match=said):
        open_pipeline(folder).text_encoder("text_encoder", torch.float32, "cpu")


def test_older_and_newer_ways_to_write_the_turns_of_places_mean_the_same(folders, tmp_path):
    from dream4d_engine.priors.formats.configurations import encoder_config

    config = json.loads((folders("hunyuan")[1] / "text_encoder/config.json").read_text())
    config.pop("rope_parameters", None)
    old, new = config | {"rope_theta": 500.0}, config | {"rope_parameters": {"rope_theta": 500.0}}
    found = [encoder_config("LlamaConfig", one, 100, "config.json").to_dict() for one in (old, new)]
    assert found[0] == found[1] and "500.0" in str(found[0])
