"""Takes that are longer than a prior's, on priors whose answer is known."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from guidance_cases import plain
from torch import Tensor

from dream4d_engine.cameras import CameraBatch, fixed_take
from dream4d_engine.guidance.denoiser import Conditions, stack_conditions
from dream4d_engine.guidance.distillation import Guidance, distill
from dream4d_engine.guidance.execution import Execution
from dream4d_engine.guidance.windows import WindowedDenoiser, Windows, windowed
from dream4d_engine.priors.conditioning import frame_time_vector
from dream4d_engine.priors.files import toy_prior
from dream4d_engine.priors.networks.execution import Runtime
from dream4d_engine.randomness import Draw
from dream4d_engine.toyworld.ideal import IdealDenoiser
from dream4d_engine.training.config import TOY_MOTION

FILM = Windows(24, 8)
SIZE = (4, 4)


def frames_of(n: int, seed: int = 0, groups: int = 1) -> Tensor:
    return torch.rand(groups, n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def told(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
    """What each frame is told is its own time; of the negative branch, the negative one."""
    blank = torch.zeros(*cameras.shape, 1, 1)
    return Conditions(blank, cameras.time[..., None]), Conditions(blank, -cameras.time[..., None])


@dataclass(frozen=True, eq=False)
class Recording:
    """A model of W frames whose guess is what it is told; it keeps what it was shown."""

    n_frames: int = 8
    image_size: tuple[int, int] = SIZE
    shown: list[Tensor] = field(default_factory=list)
    noise = IdealDenoiser(frames_of(2)).noise

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        return 2 * images - 1

    def decode(self, z: Tensor) -> Tensor:
        return z / 2 + 0.5

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.shown.append(x)
        assert x.shape[:2] == conditions.vector.shape[:2]
        return conditions.vector[..., None, None].expand_as(x)

    def run_as(self, execution: Execution) -> Recording:
        return replace(self, image_size=(1, execution.groups_at_once))

    def forget(self) -> None:
        self.shown.clear()


# ---- the cut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "starts"),
    [
        (FILM, (0, 5, 11, 16)),
        (Windows(8, 8), (0,)),
        (Windows(9, 8), (0, 1)),
        (Windows(24, 8, overlap=0.0), (0, 8, 16)),
        (Windows(24, 8, overlap=0.5), (0, 4, 8, 12, 16)),
        (Windows(41, 17, frame_step=4), (0, 3, 6)),  # of 11 latents, 5 at once
        (Windows(17, 9, frame_step=8), (0, 1)),  # two latents at once still overlap
    ],
)
def test_windows_reach_over_a_take_and_their_weights_sum_to_one(windows: Windows, starts: tuple[int, ...]):
    assert windows.starts == starts and starts[-1] + windows.size == windows.n_encoded
    weights = windows.weights()
    assert weights.shape == (len(starts), windows.n_encoded) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(windows.n_encoded))
    seen = torch.zeros(weights.shape, dtype=torch.bool)
    for row, start in zip(seen, starts, strict=True):
        row[start : start + windows.size] = True
    assert torch.equal(weights > 0, seen)
    shared = min((a + windows.size - b for a, b in itertools.pairwise(starts)), default=windows.size)
    assert shared >= (1 if windows.overlap else 0) and shared >= round(windows.overlap * windows.size)


def test_the_change_from_window_to_window_is_smooth():
    assert FILM.weights()[0, 4:9].tolist() == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4, 0])


def test_a_window_is_told_the_time_as_a_take_of_its_own_length_would_be():
    cameras = fixed_take(24, *SIZE)
    parts = FILM.cut(cameras)
    assert parts.shape == (4, 8) and FILM.length == pytest.approx(23 / 7)
    torch.testing.assert_close(parts.time[0], torch.linspace(0, 1, 8))
    torch.testing.assert_close(parts.time[:, 0] * 7, torch.tensor(FILM.starts).float())
    # the toy prior is told turns of the time: of the next take it knows no other than of this one
    place = frame_time_vector(parts.time[:1]) - frame_time_vector(parts.time[:1] + 1)
    assert place.abs().max() < 1e-5


def test_the_windows_of_latents_are_cut_where_the_autoencoder_puts_frames_together():
    windows = Windows(41, 17, frame_step=4)
    cameras = fixed_take(41, *SIZE)
    first = (windows.cut(cameras).time[:, 0] / windows.length * 40).round().long()
    assert first.tolist() == [0, 12, 24] and windows.cut(cameras).shape == (3, 17)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((5, 8), "5 frames are fewer than the 8 that the model sees at once"),
        ((40, 17, 4), "ask for 37 or 41 frames, not 40"),
        ((24, 8, 4), "a window of 8 frames is none that a model of videos sees"),
        ((24, 1), "a window of 1 frames"),
        ((24, 8, 1, 0.9), "overlap is a share of a window and must lie in"),
    ],
)
def test_what_no_windows_reach_is_refused(given, expected):
    with pytest.raises(ValueError, match=expected):
        Windows(*given)


def test_another_take_is_refused():
    with pytest.raises(ValueError, match="takes of 24 frames are cut into windows, got 8"):
        FILM.cut(fixed_take(8, *SIZE))
    denoiser = WindowedDenoiser(Recording(), Windows(25, 9, frame_step=4))
    with pytest.raises(ValueError, match="25 frames were encoded to 25, not 7"):
        denoiser.denoise(frames_of(25), torch.ones(1), told(fixed_take(25, *SIZE))[0])


# ---- denoising ---------------------------------------------------------------------------------------------------


def test_an_exact_model_of_windows_gives_back_the_film():
    film = 2 * frames_of(24, groups=2) - 1
    bank = torch.cat([film[:, start : start + 8] for start in range(17)])
    denoiser = WindowedDenoiser(IdealDenoiser(bank / 2 + 0.5), FILM)
    x = film + 0.5 * torch.randn(film.shape, generator=torch.Generator().manual_seed(1))
    conditions = Conditions(torch.zeros(8, 8, 1, 1))
    torch.testing.assert_close(denoiser.denoise(x, torch.full((2,), 0.5), conditions), film, atol=1e-4, rtol=0)


def test_every_window_of_every_take_is_told_its_own_and_what_lies_in_two_is_their_mean():
    model = Recording()
    guidance = windowed(Guidance("g", model, told, plain(1.0)), FILM)
    cameras = fixed_take(24, *SIZE)
    both = cameras.groups(torch.tensor([0, 0]))
    both = both.at_time(torch.stack((cameras.time[0], cameras.time[0] / 2)))
    together = stack_conditions(guidance.conditions(both))
    x0 = guidance.denoiser.denoise(torch.zeros(4, 24, 3, *SIZE), torch.ones(4), together)[:, :, 0, 0, 0]
    # all are told the same time of a frame, so the mean is that, of text and negative, of each take
    time = both.time * FILM.length
    torch.testing.assert_close(x0, torch.cat((time, -time)))
    assert [x.shape[:2] for x in model.shown] == [(4, 8)] * 4, "one window after the other"


def test_windows_share_the_noise_where_they_overlap():
    model = Recording()
    guidance = windowed(Guidance("g", model, told, plain(1.0, loss="x0")), FILM)
    distill(guidance, frames_of(24), fixed_take(24, *SIZE), 0.5, Draw(0))
    first, second = model.shown[0][:1], model.shown[1][:1]
    assert torch.equal(first[:, 5:], second[:, :3]) and not torch.equal(first[:, :3], second[:, :3])


@pytest.mark.parametrize("loss", ["x0", "sds", "multistep"])
def test_the_gradient_is_that_of_the_blended_guess(loss: str):
    images = frames_of(24).requires_grad_()
    guidance = windowed(Guidance("g", Recording(), told, plain(1.0, loss=loss, n_steps=2)), FILM)
    out = distill(guidance, images, fixed_take(24, *SIZE), 0.5, Draw(0))
    (grad,) = torch.autograd.grad(out.loss, images)
    assert grad.isfinite().all() and (grad.abs().amax((0, 2, 3, 4)) > 0).all(), "of every frame"
    if loss == "x0":
        torch.testing.assert_close(grad, 2 * (2 * images.detach() - 1 - out.x0) / 24)


def test_one_window_is_the_model_itself():
    """Bit for bit, of the toy prior."""
    prior = toy_prior("video").load(Runtime(torch.device("cpu")))
    guidance = prior.guide("a red cube is jumping", "", TOY_MOTION.guidance[0].distillation)
    cameras, images = fixed_take(8, 32, 32), torch.rand(1, 8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for one in (guidance, windowed(guidance, Windows(8, 8))):
        leaf = images.clone().requires_grad_()
        out = distill(one, leaf, cameras, 0.3, Draw(0))
        found.append((out.loss, out.x0, *torch.autograd.grad(out.loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_is_run_and_forgets_as_its_model_does():
    denoiser = WindowedDenoiser(Recording(), FILM)
    denoiser.model.shown.append(torch.zeros(1))
    denoiser.forget()
    assert not denoiser.model.shown and denoiser.n_frames == 24
    assert denoiser.run_as(Execution(groups_at_once=3)).image_size == (1, 3)


def test_a_prior_of_single_images_stays():
    guidance = Guidance("g", replace(Recording(), n_frames=None), told, plain(1.0))
    assert windowed(guidance, FILM) is guidance
