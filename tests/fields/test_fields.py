"""Fields: golden encodings of directions, blobs, the warp's identities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from places import GOLDEN

from dream4d_engine.fields.background import Background, BackgroundConfig
from dream4d_engine.fields.deformation import SEAM, DeformationConfig, DeformationField
from dream4d_engine.fields.encodings import HashGrid, HashGridConfig, spherical_harmonics
from dream4d_engine.fields.mlp import MLP, ask_together, together
from dream4d_engine.fields.radiance import RadianceConfig, RadianceField
from dream4d_engine.kernels import select_kernels, torch_kernels

GRID = HashGridConfig(n_levels=4, log2_entries=8, base_resolution=4, growth=1.5)
KERNELS = select_kernels("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_spherical_harmonics_equal_golden() -> None:
    golden = np.load(GOLDEN / "encodings.npz")
    x = torch.from_numpy(golden["sh3.x"]).requires_grad_()
    y = spherical_harmonics(2 * x - 1)
    (y * torch.from_numpy(golden["sh3.w"])).sum().backward()
    assert np.abs(y.detach().numpy() - golden["sh3.y"]).max() < 1e-6
    assert np.abs(x.grad.numpy() - golden["sh3.dx"]).max() < 1e-5


def test_published_sizes() -> None:
    assert HashGridConfig().layout(3).n_parameters == 12_599_920
    assert DeformationConfig().grid.layout(4).n_parameters == 7_488_736
    assert HashGridConfig().layout(3).levels[-1].resolution == 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"log2_entries": 60}, "log2_entries must lie in"),
        ({"n_levels": 0}, "n_levels must lie in"),
        ({"growth": float("nan")}, "growth must lie in"),
        ({"n_levels": 32, "growth": 4.0}, "finest level"),
    ],
)
def test_absurd_grids_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HashGridConfig(**changes)


def test_starts_come_from_the_generator_alone() -> None:
    torch.manual_seed(0)
    first = RadianceField(RadianceConfig(GRID), 1.0)
    first.reset(generator(3))
    torch.manual_seed(1)
    second = RadianceField(RadianceConfig(GRID), 1.0)
    second.reset(generator(3))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert 0.9e-4 < first.grid.table.abs().max() <= 1e-4
    assert first.density_mlp.layers[0].abs().max() <= GRID.n_levels**-0.5


def test_mlp_is_relu_without_bias() -> None:
    mlp = MLP(3, 2, 5, 2)
    mlp.reset(generator())
    x = torch.randn(4, 3, generator=generator(1))
    a, b, c = mlp.layers
    assert torch.allclose(mlp(x), ((x @ a.T).relu() @ b.T).relu() @ c.T, atol=1e-6)
    assert (mlp(torch.zeros(1, 3)) == 0).all()
    assert torch.allclose(mlp(3 * x), 3 * mlp(x), atol=1e-5)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: there networks are asked one by one")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("layers", [1, 2])
def test_networks_asked_together_give_what_each_gives(device: str, layers: int) -> None:
    networks = [MLP(5, n_outputs, 8, layers) for n_outputs in (1, 3)]
    for seed, network in enumerate(networks):
        network.reset(generator(seed))
        network.to(device)
    x = torch.rand(50, 5, generator=generator(7)).to(device).requires_grad_()
    pulls = [torch.rand(50, n, generator=generator(8)).to(device) for n in (1, 3)]
    wanted = [x, *(weight for network in networks for weight in network.layers)]
    found = []
    ways = [lambda: [network(x) for network in networks], lambda: ask_together(x, networks)]
    if layers == 1:
        ways.append(lambda: torch_kernels.mlp(x, together(networks)).split((1, 3), -1))
    for ask in ways:
        outputs = ask()
        found.append([*outputs, *torch.autograd.grad(outputs, wanted, pulls)])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("blob", ["magic3d", "dreamfusion"])
@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_a_fresh_field_is_its_blob(blob: str, radius: float) -> None:
    field = RadianceField(RadianceConfig(GRID, blob=blob), radius)
    field.reset(generator())
    points = (torch.rand(50, 3, generator=generator(1)) * 2 - 1) * radius
    distance = points.norm(dim=-1)
    logit = 10 * (1 - distance / 0.5) if blob == "magic3d" else 10 * torch.exp(-(distance**2) / (2 * 0.5**2))
    density, rgb = field((points / radius + 1) / 2, KERNELS)
    assert torch.allclose(density, torch.nn.functional.softplus(logit), rtol=1e-3, atol=1e-6)
    assert torch.allclose(rgb, torch.full_like(rgb, 0.5), atol=1e-3)
    assert torch.equal(field.density((points / radius + 1) / 2, KERNELS), density)


def test_the_blob_has_a_gradient_at_the_origin() -> None:
    field = RadianceField(RadianceConfig(GRID), 1.0)
    u = torch.full((1, 3), 0.5, requires_grad=True)
    field.density(u, KERNELS).backward()
    assert u.grad.isfinite().all()


def test_no_displacement_at_the_start_but_a_gradient() -> None:
    field = DeformationField(DeformationConfig(GRID, hidden_width=8, hidden_layers=2))
    field.reset(generator())
    u, times = torch.rand(30, 3, generator=generator(1)), torch.rand(30, generator=generator(2))
    displacement = field.displacement(u, times, KERNELS)
    assert torch.equal(displacement, torch.zeros(30, 3))
    assert torch.equal(field.warp(u, displacement), (u - 0.5) + 0.5)
    displacement.sum().backward()
    assert (field.mlp.layers[-1].grad != 0).any()


def drawn_field(loop: bool) -> DeformationField:
    """A field of random numbers, in float64: its slopes are to be measured.

    Between cells slopes jump, at any time; no level of this grid has a border where a loop closes.
    """
    grid = replace(GRID, growth=1.4)
    field = DeformationField(DeformationConfig(grid, hidden_width=8, hidden_layers=1, loop=loop)).double()
    field.reset(generator())
    with torch.no_grad():
        for number, parameter in enumerate(field.parameters()):
            parameter.normal_(generator=generator(number))
    return field


def test_a_loop_closes_in_value_and_in_slope() -> None:
    u, moment = torch.rand(40, 3, generator=generator(1)).double(), torch.linspace(0, 1, 40).double()

    @torch.no_grad()
    def gap(field: DeformationField, step: float = 1e-4) -> tuple[float, float]:
        """How far values and slopes at time 1 are from those at time 0."""
        at = [field.displacement(u, torch.full((40,), t).double(), KERNELS) for t in (0, step, 1 - step, 1)]
        slopes = (at[1] - at[0]) / step, (at[3] - at[2]) / step
        return float((at[3] - at[0]).abs().max()), float((slopes[1] - slopes[0]).abs().max())

    field = drawn_field(loop=True)
    value, slope = gap(field)
    # over the step before the end b is still 3 (step / SEAM)^2 from 1
    assert value == 0 and slope < 0.5
    assert min(gap(drawn_field(loop=False))) > 1, "which no other field does"
    for turns in (-1, 1, 2):
        assert torch.allclose(field.displacement(u, moment + turns, KERNELS), field.displacement(u, moment, KERNELS))
    (field.displacement(u, moment, KERNELS).square().sum()).backward()
    assert field.grid.table.grad.isfinite().all() and (field.grid.table.grad != 0).float().mean() > 0.1


def test_what_a_loop_goes_over_to_is_what_it_holds_before_its_beginning() -> None:
    field, u = drawn_field(loop=True), torch.rand(4, 3, generator=generator(1)).double()
    times = torch.tensor([0.0, 1 - SEAM, 1 - SEAM / 2, 1 - SEAM / 4]).double()  # b: 0, 0, 1/2, 27/32

    def held(at: torch.Tensor) -> torch.Tensor:
        return field.grid(torch.cat((u, (at[:, None] + SEAM) / (1 + SEAM)), -1), KERNELS)

    blend = torch.tensor([0, 0, 1 / 2, 27 / 32])[:, None].double()
    features = (1 - blend) * held(times) + blend * held((times - 1).clamp_min(-SEAM))
    expected = 2 * torch.sigmoid(field.mlp(features).float()) - 1
    assert torch.allclose(field.displacement(u, times, KERNELS), expected, atol=1e-6)


def test_scale_enlarges() -> None:
    field = DeformationField(DeformationConfig(GRID, scale=2.0))
    u = torch.tensor([[0.0, 0.5, 1.0]])
    assert torch.allclose(field.warp(u, torch.zeros(1, 3)), torch.tensor([[0.25, 0.5, 0.75]]))
    assert torch.allclose(field.warp(u, torch.ones(1, 3)), torch.tensor([[0.75, 1.0, 1.25]]))


def test_coarse_to_fine() -> None:
    field = DeformationField(DeformationConfig(GRID, hidden_width=8, hidden_layers=1))
    field.reset(generator())
    assert int(field.active_levels) == GRID.n_levels
    with torch.no_grad():
        field.mlp.layers[-1].normal_(generator=generator(5))
    u, times = torch.rand(30, 3, generator=generator(1)), torch.rand(30, generator=generator(2))
    field.set_active_levels(2)
    coarse = field.displacement(u, times, KERNELS)
    with torch.no_grad():
        field.grid.table[field.grid.layout.levels[2].offset * 2 :] += 1.0
    assert torch.equal(field.displacement(u, times, KERNELS), coarse)
    field.set_active_levels(99)
    assert int(field.active_levels) == GRID.n_levels
    assert not torch.equal(field.displacement(u, times, KERNELS), coarse)


def test_backgrounds() -> None:
    directions = torch.nn.functional.normalize(torch.randn(20, 3, generator=generator()), dim=-1)
    learned = Background(BackgroundConfig())
    learned.reset(generator())
    assert [tuple(w.shape) for w in learned.mlp.layers] == [(16, 9), (16, 16), (3, 16)]
    rgb = learned(directions)
    assert ((rgb > 0) & (rgb < 1)).all() and rgb.std() > 0
    solid = Background(BackgroundConfig(color=(1.0, 0.5, 0.0)))
    assert torch.equal(solid(directions), torch.tensor([1.0, 0.5, 0.0]).expand(20, 3))
    assert not list(solid.parameters())
    with pytest.raises(ValueError, match="color must lie in"):
        BackgroundConfig(color=(2.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="degree 3"):
        BackgroundConfig(degree=4)


def test_a_grid_of_six_levels_learns_a_function() -> None:
    grid = HashGrid(HashGridConfig(6, 2, 10, 4, 1.4), 3)
    grid.reset(generator())
    mlp = MLP(12, 1, 16, 1)
    mlp.reset(generator(1))
    optimiser = torch.optim.Adam([*grid.parameters(), *mlp.parameters()], lr=0.01)
    x = torch.rand(512, 3, generator=generator(2))
    target = (x * 6).sin().prod(-1)
    for _ in range(80):
        loss = (mlp(grid(x, KERNELS))[:, 0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05 * target.var()
