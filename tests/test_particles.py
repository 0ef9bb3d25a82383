"""Particles: weights, draws, carriers and verdicts, held to closed forms."""

import math

import pytest
import torch
from helpers import binary
from torch import nn

import composable_ebm as ceb
from composable_ebm import analytic
from composable_ebm.energy import NotCarriedError, carrier, satisfied
from composable_ebm.sampling.particles import chosen, drawn, systematic
from composable_ebm.sampling.request import calibrated_sampler
from composable_ebm.sampling.result import leaf_energies
from composable_ebm.sampling.schedule import Schedule, karras
from composable_ebm.sampling.settings import to_settings

SPREAD = 0.3
WEIGHTS = (0.5, 0.3, 0.2)
SLOPES, SHIFTS = (2.0, -2.0), (0.3, -0.2)
LEVELS = Schedule(noise_level=karras(10, 0.02), noise_power=2, predict=True, num_levels=40)


class Logistic(nn.Module):
    """Logits (batch, 2) of σ(slope xᵢ + shift)."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        yes = SLOPES[self.axis] * x[:, self.axis] + SHIFTS[self.axis]
        return torch.stack([torch.zeros_like(yes), yes], 1)


def means(dimension):
    return torch.randn(3, dimension, generator=torch.Generator().manual_seed(5))


def request(dimension):
    """Three Gaussians, of which two logistic classifiers say yes."""
    mixture = analytic.GaussianMixture(means(dimension), SPREAD**2, WEIGHTS)
    return mixture + sum(ceb.from_classifier(Logistic(i), 1) for i in range(2))


def truth(dimension):
    """log p(yes, yes), and the mean of the first two coordinates given that, by quadrature."""
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    total, moments = 0.0, torch.zeros(2, dtype=torch.float64)
    for weight, mean in zip(WEIGHTS, means(dimension).double(), strict=True):
        along = [mean[i] + SPREAD * z for i in range(2)]
        yes = [density * torch.sigmoid(SLOPES[i] * along[i] + SHIFTS[i]) for i in range(2)]
        mass = [torch.trapezoid(y, z) for y in yes]
        first = [torch.trapezoid(y * x, z) for y, x in zip(yes, along, strict=True)]
        total += weight * mass[0] * mass[1]
        moments += weight * torch.stack([first[0] * mass[1], first[1] * mass[0]])
    return float(torch.log(total)), moments / total


def run(dimension, particles, seed, **options):
    rate = min(0.5, 1.36 * dimension ** (-1 / 3))  # Roberts and Rosenthal (1998): acceptance 0.57
    sampler = ceb.Particles(ceb.MALA(rate), LEVELS, num_particles=particles, **options)
    return ceb.sample(request(dimension), num_chains=particles, num_steps=80, sampler=sampler, seed=seed)


@pytest.mark.parametrize("dimension", [2, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_probability_and_moments_match_quadrature(dimension):
    log_p, mean = truth(dimension)
    runs = [run(dimension, 2000, seed) for seed in range(3)]
    found = torch.tensor([out.log_probability for out in runs])
    assert abs(float(found.mean()) - log_p) < 0.05
    assert all(abs(out.log_probability - log_p) < 4 * out.weighted.error + 0.02 for out in runs)
    # The chains' own states tell the same, with the error that the runs show among each other.
    estimates = torch.stack([out.samples[:, :2].double().mean(0) for out in runs])
    error = estimates.std(0) / math.sqrt(len(runs)) + 0.4 / math.sqrt(6000)
    assert ((estimates.mean(0) - mean).abs() < 3 * error).all()


@pytest.mark.slow
def test_error_falls_like_one_over_the_root_of_the_number_of_particles():
    log_p, _ = truth(2)
    counts, repeats = (125, 500, 2000, 8000), 16
    errors = [
        torch.tensor([run(2, n, seed).log_probability - log_p for seed in range(repeats)])
        .square()
        .mean()
        .sqrt()
        for n in counts
    ]
    x, y = torch.tensor(counts).double().log(), torch.stack(errors).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -0.75 < float(slope) < -0.3


def test_own_error_estimate_is_that_of_repeated_runs():
    runs = [run(2, 200, seed) for seed in range(10)]
    spread = float(torch.tensor([out.log_probability for out in runs]).std())
    stated = sum(out.weighted.error for out in runs) / len(runs)
    assert 0.5 * spread < stated < 2.5 * spread


def test_engine_gives_the_same_particles_as_sample():
    alone = run(2, 64, 3)
    with ceb.Engine() as engine:
        options = {"num_steps": 80, "sampler": alone.sampler}
        runs = [engine.submit(request(2), 64, seed=seed, **options) for seed in (3, 4)]
        shared = [handle.result() for handle in runs]
    torch.testing.assert_close(shared[0].samples, alone.samples, atol=1e-4, rtol=1e-4)
    assert shared[0].log_probability == pytest.approx(alone.log_probability, abs=1e-4)
    assert shared[1].log_probability != shared[0].log_probability


def test_one_seed_gives_one_run():
    assert torch.equal(run(2, 40, 7).samples, run(2, 40, 7).samples)


def test_few_chains_are_drawn_from_more_particles_without_repeats():
    sampler = ceb.Particles(ceb.MALA(0.5), LEVELS)
    out = ceb.sample(request(2), num_chains=5, num_steps=80, sampler=sampler)
    assert len(out.samples) == len(out.energies) == out.trace.energy.shape[1] == 5
    assert len(out.weighted.states) == 32
    assert len(out.weighted.chosen.unique()) == 5
    assert "probability" in out.report()


def test_impossible_request_shows_as_a_collapse():
    class Never(nn.Module):
        def forward(self, x):
            no = 40.0 + 0 * x[:, 0]
            return torch.stack([no, torch.zeros_like(no)], 1)

    mix = analytic.GaussianMixture(means(2), SPREAD**2, WEIGHTS) + ceb.from_classifier(
        Never(), 1, name="never"
    )
    out = ceb.sample(mix, num_chains=8, num_steps=80, sampler=ceb.Particles(ceb.MALA(0.5), LEVELS))
    assert out.log_probability == pytest.approx(-40, abs=0.5)
    assert any("no particle meets the request" in problem for problem in out.problems)


def test_verdict_leaves_out_what_experts_doubt():
    soft = run(2, 400, 0)
    hard = run(2, 400, 0, verdict=True)

    def doubted(out):
        yes = torch.stack([Logistic(i)(out.samples)[:, 1] for i in range(2)])
        return float((yes < 0).any(0).float().mean())

    assert doubted(soft) > 0.15
    assert doubted(hard) == 0
    # P(both logits positive), by quadrature of the same Gaussians.
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    exact = 0.0
    for weight, mean in zip(WEIGHTS, means(2), strict=True):
        edges = [SLOPES[i] * mean[i] + SHIFTS[i] for i in range(2)]
        exact += weight * phi(edges[0] / (2 * SPREAD)) * phi(edges[1] / (2 * SPREAD))
    assert hard.log_probability == pytest.approx(float(torch.log(exact)), abs=3 * hard.weighted.error)


class Slope(nn.Module):
    """Logits 0 and `steepness` times a coordinate."""

    def __init__(self, axis, steepness):
        super().__init__()
        self.axis, self.steepness = axis, steepness

    def forward(self, x):
        return torch.stack([torch.zeros_like(x[:, 0]), self.steepness * x[:, self.axis]], 1)


def test_of_particles_to_spare_those_are_drawn_that_experts_are_surest_of():
    density = analytic.GaussianMixture(means(2), SPREAD**2, WEIGHTS)
    classifier = ceb.from_classifier(Slope(0, 20), 1, name="positive")
    classifier.doubt = 1e-4  # of one picture in ten it would be less sure
    positive = density + classifier
    sampler = ceb.Particles(ceb.MALA(0.5), LEVELS, num_particles=300, verdict=True, surest=True)
    runs = [
        ceb.sample(positive, num_chains=count, num_steps=80, sampler=sampler, seed=0)
        for count in (10, 100, 300)
    ]
    least = [float((20 * run.samples[:, 0]).sigmoid().min()) for run in runs]
    assert least[0] >= 1 - 1e-4  # there are so many to choose from
    assert 0.8 <= least[1] < 1 - 1e-4
    assert 0.5 <= least[2] < least[1]
    # of the request, sure or not
    assert runs[0].log_probability == runs[1].log_probability == runs[2].log_probability


def test_the_surer_side_of_an_or_is_not_drawn_alone():
    density = analytic.GaussianMixture([[0.0, 0.0]], 1.0)
    steep, flat = (ceb.from_classifier(Slope(axis, k), 1) for axis, k in ((0, 200), (1, 4)))
    steep.doubt = flat.doubt = 1e-4
    sampler = ceb.Particles(ceb.MALA(0.5), LEVELS, num_particles=400, verdict=True, surest=True)
    x = ceb.sample(density + (steep | flat), num_chains=100, num_steps=80, sampler=sampler, seed=0).samples
    assert ((x[:, 0] < 0) & (x[:, 1] > 0)).float().mean() > 0.1  # a third of an exact draw


def test_a_chain_that_is_asked_for_is_drawn_from_as_many_particles_as_are_wanted():
    mix = analytic.GaussianMixture(means(2), SPREAD**2, WEIGHTS) + ceb.from_classifier(Logistic(0), 1)
    counts = []
    for chains, per_chain in ((4, 3), (50, 1.35), (50, 3)):
        sampler = ceb.Particles(ceb.MALA(0.5), LEVELS, per_chain=per_chain)
        out = ceb.sample(mix, num_chains=chains, num_steps=40, sampler=sampler, seed=0)
        assert len(out.samples) == chains
        counts.append(len(out.weighted.states))
    assert counts == [32, 68, 150]  # never fewer than 32
    for wrong in (0.5, math.nan):
        with pytest.raises(ValueError, match="`per_chain` must be at least 1"):
            ceb.Particles(ceb.MALA(0.5), LEVELS, per_chain=wrong)


def test_stored_particles_are_the_default_where_something_carries_them():
    """An expert may ask not to go by the verdict; a plain sum, which nothing carries, runs as chains."""
    stored = ceb.Particles(ceb.LeimkuhlerMatthews(0.3), LEVELS, verdict=False)
    one, two = (analytic.GaussianMixture([[shift, 0.0]], 0.1) for shift in (-1.0, 1.0))
    for density in (one, two):
        density.sampler_settings = {**to_settings(stored), "num_steps": 80}
    with_expert, _ = calibrated_sampler(one + ceb.from_classifier(Logistic(0), 1))
    assert with_expert == stored
    of_both, _ = calibrated_sampler(one + two)
    assert of_both == ceb.Annealed(ceb.LeimkuhlerMatthews(0.15), LEVELS)


# -- weights and draws -------------------------------------------------------------------------------


def test_systematic_takes_each_as_often_as_its_weight_says():
    weights = torch.tensor([0.1, 0.25, 0.0, 0.65])
    for u in torch.linspace(0, 0.999, 23):
        counts = torch.bincount(systematic(weights, 20, u), minlength=4)
        assert (counts - 20 * weights).abs().max() < 1 + 1e-5
        assert counts[2] == 0


def test_draw_repeats_none_where_there_are_enough():
    log_weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for u in torch.linspace(0, 0.999, 23):
        index = drawn(log_weights, 30, u)
        assert len(index) == len(index.unique()) == 30


def test_draw_prefers_weight_and_keeps_places():
    log_weights = torch.full((40,), -1e9)
    log_weights[10:] = 0.0
    index = drawn(log_weights, 20, torch.tensor(0.3))
    assert (index >= 10).all()
    stays = (index < 20).nonzero()[:, 0]
    assert torch.equal(index[stays], stays)


def test_draw_repeats_where_too_few_have_weight():
    log_weights = torch.full((10,), -torch.inf)
    log_weights[[2, 7]] = 0.0
    assert set(drawn(log_weights, 6, torch.tensor(0.5)).tolist()) == {2, 7}


def test_what_is_chosen_among_more_stands_for_all_of_them():
    generator = torch.Generator().manual_seed(0)
    log_weights = 2 * torch.randn(200, generator=generator)
    often = torch.zeros(200)
    for u in torch.linspace(0, 0.999, 200):
        index, left = chosen(log_weights, 20, u)
        assert len(index.unique()) == 20
        assert left.exp().mean().item() == pytest.approx(log_weights.exp().mean().item(), rel=1e-4)
        often[index] += left.exp() / 20
    # Each of them, over the draws, with the weight that it came with.
    torch.testing.assert_close(often / 200, log_weights.exp() / 200, rtol=0.25, atol=2e-2)


def test_experts_that_see_through_the_first_noise_cost_no_ancestors():
    """A likelihood that halves the states at the first level: of five candidates a place is filled."""
    mixture = analytic.GaussianMixture([[0.0, 0.0]], 100.0)
    half = mixture + ceb.from_classifier(Logistic(0), 1)
    out = ceb.sample(half, num_chains=200, num_steps=80, sampler=ceb.Particles(ceb.MALA(0.5), LEVELS))
    assert out.num_ancestors > 150
    assert out.log_probability == pytest.approx(-0.69, abs=0.15)


# -- carriers ----------------------------------------------------------------------------------------


def family(noise_conditioned):
    return [
        binary(name, seed, noise_conditioned=noise_conditioned)
        for seed, name in enumerate(("base", "left", "right"))
    ]


def test_carriers_of_bayes_rule():
    base, left, right = family(True)
    assert carrier(ceb.given(base["any"], left, ~right)).key == base["any"].key
    assert carrier(left["yes"]).key == left["any"].key
    assert carrier(base["any"] + 3 * (left["yes"] - left["any"])).key == base["any"].key
    assert carrier(left["yes"] | left["no"]).key == left["any"].key
    either = ceb.given(base["any"], left) | ceb.given(base["any"], right)
    assert carrier(either).key == base["any"].key


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda b, one, two: one["yes"] + two["yes"], r"counts 1\*.* and 1\*"),
        (lambda b, one, two: b["any"] / 2 + one["yes"] - one["any"], "to the power 0.5"),
        (lambda b, one, two: b["any"], "asks for nothing"),
        (lambda b, one, two: one["yes"] | two["yes"], "asks for nothing"),
    ],
)
def test_what_has_no_carrier_says_why(write, reason):
    with pytest.raises(NotCarriedError, match=reason):
        carrier(write(*family(True)))


def test_and_is_met_where_all_terms_are_and_or_where_one_is():
    base, left, right = family(False)
    x = torch.randn(200, *base.event_shape, generator=torch.Generator().manual_seed(1))

    def met(energy):
        energies = leaf_energies(energy, x, None)
        return satisfied(energy, energies, energy.coefficients.float())

    a, b = met(ceb.given(base["any"], left)), met(ceb.given(base["any"], right))
    assert 0 < int(a.sum()) < 200
    assert torch.equal(a, left["yes"](x) <= left["no"](x))
    assert torch.equal(met(ceb.given(base["any"], left, right)), a & b)
    either = ceb.mixture([ceb.given(base["any"], left), ceb.given(base["any"], right)], [0.95, 0.05])
    assert torch.equal(met(either), a | b)
    assert torch.equal(met(~left["yes"]), ~a)
    assert met(base["any"] - (left["yes"] - left["any"])) is None


class Sure(nn.Module):
    """Logits (batch, 2) of a classifier that leaves few states in doubt."""

    def forward(self, x):
        yes = 20 * (x[:, 0] - 0.3)
        return torch.stack([torch.zeros_like(yes), yes], 1)


def test_a_calibrated_or_gives_its_components_in_the_proportions_asked_for():
    """By chance alone a share of 0.8 of 200 scatters by 0.028, and by what log Z is off."""
    base = analytic.GaussianMixture(means(2), SPREAD**2, WEIGHTS)
    either = [base + ceb.from_classifier(Sure(), value) for value in (1, 0)]
    options = {
        "sampler": ceb.Particles(ceb.MALA(0.3), LEVELS, verdict=True),
        "num_steps": 80,
        "num_chains": 200,
    }
    for share in (0.5, 0.8, 0.95):
        calibrated = ceb.calibrate(ceb.Mixture(either, [share, 1 - share]), **options, seed=9)
        for seed in range(3):
            out = ceb.sample(calibrated, **options, seed=seed)
            assert float((out.samples[:, 0] > 0.3).float().mean()) == pytest.approx(share, abs=0.006)


def test_a_calibrated_or_whose_components_overlap_is_drawn_as_it_is_weighed():
    """A state may be of both components: who takes it for the likelier one has too many of the one."""
    base = analytic.GaussianMixture(means(2), SPREAD**2, WEIGHTS)
    either = [base + ceb.from_classifier(Logistic(0), value) for value in (1, 0)]
    options = {"sampler": ceb.Particles(ceb.MALA(0.3), LEVELS), "num_steps": 80, "num_chains": 1500}
    calibrated = ceb.calibrate(ceb.Mixture(either, [0.7, 0.3]), **options, seed=9)
    shifts = []
    for seed in range(4):
        weighted = ceb.sample(calibrated, **options, seed=seed).weighted
        x, w = weighted.states[:, 0], torch.softmax(weighted.log_weights, 0)
        shifts.append((float(x[weighted.chosen].mean()) - float(w @ x)) / float(x.std()))
    assert abs(sum(shifts) / len(shifts)) < 0.03
