"""The product with a known answer, in its quick form: the sampler that the benchmark recommends."""

from pathlib import Path

import pytest
import torch

from composable_ebm.energy.analytic import Box
from composable_ebm.sampling.schedule import through


@pytest.fixture
def yardstick(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import yardstick

    return yardstick


def test_true_samples_reach_the_goal(yardstick):
    figures = yardstick.measure(yardstick.TRUTH.draw(20_000, torch.Generator().manual_seed(0)))
    assert yardstick.reaches_goal(figures)
    assert figures["in_place"] == pytest.approx(yardstick.TRUE_SHARE, abs=0.002)
    assert figures["excess"] == pytest.approx(1.0, abs=0.05)
    assert figures["variance"] == pytest.approx(1.0, abs=0.05)


def test_samples_on_a_wrong_gaussian_or_on_one_mode_only_fail_the_goal(yardstick):
    x = yardstick.TRUTH.draw(2_000, torch.Generator().manual_seed(0))
    strays = torch.cat([x[:1_900], x[1_900:] + torch.tensor([0.2, -0.1])])
    assert not yardstick.reaches_goal(yardstick.measure(strays))
    assert not yardstick.reaches_goal(
        yardstick.measure(x * torch.tensor([1.0, -1.0]).where(x[:, 1:] < 0, 1.0))
    )


def test_the_product_is_two_gaussians(yardstick):
    axis = torch.linspace(-1, 1, 801)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)
    product, truth = ((-e(points)).softmax(0) for e in (yardstick.PRODUCT, yardstick.TRUTH))
    assert float((product - truth).abs().sum()) < 1e-3


def test_annealed_sampling_reaches_the_goal_on_half_the_budget(yardstick):
    out, figures = yardstick.run(yardstick.BEST, num_chains=500, seed=0, budget=yardstick.BUDGET // 2)
    assert out.evaluations <= yardstick.BUDGET // 2
    assert yardstick.reaches_goal(figures), figures


def test_following_summed_scores_does_not(yardstick):
    _, figures = yardstick.run(yardstick.ROWS[0], num_chains=500, seed=0, budget=300)
    assert 0.5 < figures["in_place"] < 0.75


def test_the_gradient_of_a_box_is_right_far_outside():
    box = Box([-0.2], [0.2], softness=0.01)
    x = torch.tensor([[0.4], [3.0], [30.0], [1000.0]])
    # -log Φ(-u) ~ u²/2 + log u for large u, so the force is u/s, and 1/(u s) more.
    u = (x - 0.2) / 0.01
    torch.testing.assert_close(-box.score(x), u / 0.01 + 1 / (u * 0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(box.score(-x), -box.score(x))


def test_a_box_agrees_with_torch_where_the_expansion_begins():
    box = Box([-0.2], [0.2], softness=0.01)
    x = torch.linspace(0.39, 0.41, 41, dtype=torch.float64)[:, None]  # u from 19 to 21
    exact = -torch.special.log_ndtr((0.2 - x[:, 0]) / 0.01) + torch.tensor(0.4, dtype=torch.float64).log()
    torch.testing.assert_close(box.double()(x), exact, rtol=1e-6, atol=0)


def test_a_curve_goes_through_its_knots():
    curve = through((0, 1.0), (0.25, 0.04), (1, 0.01))
    assert [curve(t) for t in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([1.0, 0.2, 0.04, 0.02, 0.01])


@pytest.mark.parametrize("knots", [((0, 1.0),), ((0, 1.0), (0.5, 2.0)), ((0, 1.0), (0, 2.0), (1, 3.0))])
def test_a_curve_refuses_times_that_do_not_rise_from_0_to_1(knots):
    with pytest.raises(ValueError, match="must rise from 0 to 1"):
        through(*knots)


def test_particles_carried_by_one_factor_are_true_samples_on_a_tenth_of_the_budget(yardstick):
    row = next(row for row in yardstick.ROWS if row.name.startswith("particles"))
    out, figures = yardstick.run(row, num_chains=2_000, seed=0, budget=300)
    assert out.evaluations <= yardstick.BUDGET / 10
    assert figures["in_place"] == pytest.approx(yardstick.TRUE_SHARE, abs=0.006)
    assert figures["variance"] == pytest.approx(1.0, abs=0.12)
    assert figures["upper"] == pytest.approx(0.5, abs=0.05)
