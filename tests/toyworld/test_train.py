"""What a training of a toy prior shows and keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dream4d_engine.toyworld import models, train
from dream4d_engine.toyworld.datasets import TextBatch

CPU = torch.device("cpu")


def batches(n: int, generator: torch.Generator) -> TextBatch:
    """Examples of one pixel, at any noise."""
    timestep = torch.randint(models.N_TIMESTEPS, (n,), generator=generator)
    clean = torch.randn(n, 1, 3, 1, 1, generator=generator)
    return TextBatch(clean, torch.zeros_like(clean), timestep, torch.zeros(n, 1), torch.ones(n, 1), None)


def test_a_share_of_the_examples_is_at_much_noise():
    """Of all levels 0.49 are there: with half of the examples drawn there alone, three quarters."""
    plain = batches(20_000, torch.Generator().manual_seed(0))
    for share, expected in ((1.0, 1.0), (0.5, 0.745)):
        found = train.at_more_noise(batches, share)(20_000, torch.Generator().manual_seed(0))
        there = (found.timestep >= 500) & (found.timestep < 990)
        assert there.float().mean() == pytest.approx(expected, abs=0.01)
        changed = found.timestep != plain.timestep
        assert changed.float().mean() == pytest.approx(share, abs=0.01)
        assert torch.equal(found.clean, plain.clean)


def test_a_share_of_the_weights_that_it_started_from_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "video", models.ToySize((8, 16, 16), (1, 1, 1)))
    models.save_prior(models.build_prior("video"), "video", tmp_path / "start" / "video")
    weights = {"start": load_file(tmp_path / "start/video/unet/diffusion_pytorch_model.safetensors")}
    for keep in (0.0, 0.25, 1.0):
        training = train.Training("video", steps=2, batch=2, bank=4, lr=1e-2, noisy=0.5, keep=keep)
        folder = train.train(training, tmp_path / str(keep), CPU, tmp_path / "start", log=lambda line: None)
        weights[keep] = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    went = max(float((weights[0.0][n] - w).abs().max()) for n, w in weights["start"].items())
    assert went > 1e-3
    for name, start in weights["start"].items():
        between = 0.75 * weights[0.0][name].float() + 0.25 * start.float()
        torch.testing.assert_close(weights[0.25][name].float(), between, rtol=2e-3, atol=1e-4)
        assert torch.equal(weights[1.0][name], start)


@pytest.mark.parametrize("name", ["noisy", "keep"])
def test_shares_are_shares(name):
    with pytest.raises(ValueError, match=f"{name} is a share, from 0 to 1, got 1.5"):
        replace(train.TRAININGS["video"], **{name: 1.5})
