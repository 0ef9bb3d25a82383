"""What is said about chains that diverge, and about requests that cannot be met."""

import math

import pytest
import torch
from helpers import KERNELS, Quadratic, kernel_name, seeded

import composable_ebm as ceb

# --- divergence ----------------------------------------------------------------------------------


class Cliff(ceb.Energy):
    """A parabola, and beyond x = 5 nothing that is a number."""

    event_shape = (1,)

    def energy(self, x, noise_level=None):
        return torch.where(x > 5, math.nan, x.square() / 2).sum(1)


def from_the_left(num):
    return torch.tensor([0.0, 4.9, -1.0, 4.9])[:num, None]


def over_the_cliff(**options):
    away = ceb.from_callable(lambda x: -6 * x.sum(1))  # pulls to x = 6
    kernel = ceb.Langevin(0.1, temperature=1e-6)
    coefficients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return ceb.sample(
        Cliff() + away,
        init=from_the_left(4),
        coefficients=coefficients,
        num_steps=6,
        sampler=kernel,
        **options,
    )


def test_divergence_says_when_how_many_and_what_to_do():
    expected = (
        r"2 of 4 chains diverged, the first at step 0: an energy or gradient was not finite\. "
        r"Largest finite gradient norm 1\.1, step size 0\.1\. Likely causes: .*on_divergence=\"report\"\."
    )
    with pytest.raises(ceb.ChainDivergedError, match=expected):
        over_the_cliff()


def test_only_the_chains_that_diverge_are_frozen():
    out = over_the_cliff(on_divergence="report")
    assert out.divergence.chains.tolist() == [False, True, False, True]
    assert out.divergence.step.tolist() == [-1, 0, -1, 0]
    torch.testing.assert_close(out.samples[[1, 3]], from_the_left(4)[[1, 3]], rtol=0, atol=0)
    torch.testing.assert_close(out.samples[2], torch.tensor([-(0.9**6)]), rtol=0, atol=0.01)
    assert out.samples.isfinite().all()
    assert out.energies.isfinite().all()
    assert "diverged  2 of 4" in out.report()
    assert "PROBLEM  2 of 4 chains diverged and were frozen" in out.report()


def test_too_large_a_step_is_noticed_and_its_step_counted():
    with pytest.raises(ceb.ChainDivergedError, match=r"16 of 16 chains diverged, the first at step (\d+)"):
        ceb.sample(Quadratic(100.0), num_steps=50, sampler=ceb.Langevin(1.0))


def test_infinite_gradients_are_noticed_where_the_energy_is_finite():
    root = ceb.from_callable(lambda x: x.abs().sqrt().sum(1))
    start = torch.tensor([[0.0], [1.0]])
    out = ceb.sample(root, init=start, num_steps=0, sampler=ceb.Langevin(0.1), on_divergence="report")
    assert out.divergence.chains.tolist() == [True, False]


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_states_without_a_finite_energy_are_reported_from_the_start(kernel):
    init = torch.tensor([[0.0], [6.0]])
    out = ceb.sample(Cliff(), init=init, num_steps=3, sampler=kernel, on_divergence="report")
    assert out.divergence.chains.tolist() == [False, True]
    assert out.samples[1] == 6


@pytest.mark.parametrize("kernel", [ceb.MALA(0.5), ceb.HMC(0.7, num_leapfrog=2)], ids=kernel_name)
def test_adjusted_kernels_reject_what_is_not_finite(kernel):
    init = torch.full((500, 1), 4.5)
    out = ceb.sample(Cliff(), init=init, num_steps=5, sampler=kernel)
    assert not out.divergence.any
    assert out.trace.acceptance.min() == 0


def test_step_size_of_each_row_may_be_reported():
    chain_sizes = torch.tensor([1.0, 2.0])

    def own_steps(step, chain):
        chain.dynamics = chain.dynamics._replace(step_size=chain_sizes)

    with pytest.raises(ceb.ChainDivergedError, match="step size 2"):
        ceb.sample(
            Quadratic(100.0), num_chains=2, num_steps=60, sampler=ceb.Langevin(1e-3), callback=own_steps
        )


# --- requests that cannot be met -----------------------------------------------------------------


def box(low, high):
    return ceb.analytic.Box([low, -1.0], [high, 1.0], softness=0.15)


left, right, small, large = (box(-3.0, -1.5), box(1.5, 3.0), box(-1.0, 1.0), box(-3.0, 3.0))


def problems(energy):
    start = large.draw(50, seeded(0))
    out = ceb.sample(energy, init=start, num_steps=250, sampler=ceb.Langevin(0.01))
    assert ("PROBLEM" in out.report()) == bool(out.problems)
    # So few steps in a box do not mix, which is said, and another matter.
    return [problem for problem in out.problems if "have not mixed" not in problem]


@pytest.mark.parametrize(
    "build",
    [
        lambda: left & right,
        lambda: small & ~large,
        lambda: small - large,
        lambda: left.named("left") + right.named("right"),
    ],
    ids=["disjoint", "minus its superset by NOT", "minus its superset by ratio", "sum"],
)
def test_impossible_requests_are_noticed(build):
    assert problems(build())


@pytest.mark.parametrize(
    "build",
    [
        lambda: left,
        lambda: large & small,
        lambda: large & ~small,
        lambda: left | right,
        lambda: left & ~right,
        lambda: large + ceb.ratio(left, large),
        lambda: 2 * large + 0.5 * right,
    ],
    ids=["one", "subset", "superset minus subset", "either", "one not other", "ratio", "weights"],
)
def test_possible_requests_are_not_complained_about(build):
    assert problems(build()) == []


def test_problems_name_the_terms_and_the_share():
    first, second = left.named("first"), right.named("second")
    found = problems(first & second)
    assert "% of the samples do not satisfy" in found[0]
    assert found[-1] == "the request may be impossible, or its weights too far apart, or the run too short"
    avoided = problems(box(-1.0, 1.0) - ceb.analytic.Box([-3.0, -3.0], [3.0, 3.0]).named("out"))
    assert any("of the samples lie where out is likely, which -out asks to avoid" in p for p in avoided)
