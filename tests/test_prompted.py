"""Prompted denoisers with known answers: composed samples have the moments of the product."""

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.pipelines import Pipeline, PromptedDenoiser
from composable_ebm.pipelines.denoiser import RECENT
from composable_ebm.sampling.graphs import weights_of

MEANS = {None: (0.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -0.8), "slanted": (0.6, 0.6)}
COVARIANCES = {
    None: ((1.0, 0.0), (0.0, 1.0)),
    "right": ((0.25, 0.0), (0.0, 1.0)),
    "up": ((1.0, 0.0), (0.0, 0.5)),
    "slanted": ((0.6, 0.3), (0.3, 0.6)),
}
CHAINS = 6000


class Normals(PromptedDenoiser):
    """The exact denoiser of a normal distribution for each prompt."""

    event_shape = (2,)
    noise_range = (0.02, 30.0)
    num_steps = 60

    def encode(self, what):
        if what not in MEANS:
            raise KeyError(f"no prompt {what!r}")
        return {"mean": torch.tensor([MEANS[what]]), "covariance": torch.tensor([COVARIANCES[what]])}

    def denoise(self, x, sigma, condition):
        mean, covariance = condition["mean"], condition["covariance"]
        noisy = covariance + sigma[:, None, None].square() * torch.eye(2)
        return mean + (covariance @ torch.linalg.solve(noisy, (x - mean)[..., None]))[..., 0]


@pytest.fixture(scope="module")
def plane():
    return Pipeline(Normals(), "plane")


def product(terms):
    """Mean and covariance of the product of normal densities to powers."""
    precision, shift = torch.zeros(2, 2), torch.zeros(2)
    for what, weight in terms.items():
        inverse = torch.linalg.inv(torch.tensor(COVARIANCES[what]))
        precision += weight * inverse
        shift += weight * inverse @ torch.tensor(MEANS[what])
    covariance = torch.linalg.inv(precision)
    return covariance @ shift, covariance


def check(samples, terms, tolerance):
    mean, covariance = product(terms)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=tolerance)


def test_a_prompt_alone_has_its_own_moments(plane):
    check(ceb.sample(plane["slanted"], num_chains=CHAINS, seed=0).samples, {"slanted": 1}, 0.05)


def test_attributes_that_are_independent_are_composed_exactly_by_the_predictor_alone(plane):
    mix = ceb.given(plane, plane["right"], plane["up"], weight=1)
    out = ceb.sample(mix, num_chains=CHAINS, seed=0)
    check(out.samples, {None: -1, "right": 1, "up": 1}, 0.05)
    assert out.evaluations == 61


def test_corrections_make_up_for_what_summed_scores_get_wrong(plane):
    mix = ceb.given(plane, plane["right"], plane["slanted"], weight=2)
    terms = {None: -3, "right": 2, "slanted": 2}
    alone = ceb.sample(mix, num_chains=CHAINS, seed=0).samples
    sampler = plane.sampler(60, ceb.Langevin(0.1), corrections=8)
    corrected = ceb.sample(mix, num_chains=CHAINS, num_steps=480, sampler=sampler, seed=0).samples
    mean, covariance = product(terms)
    wrong = [float((x.T.cov() - covariance).abs().max()) for x in (alone, corrected)]
    assert wrong[1] < 0.02 < wrong[0]
    off = [float((x.mean(0) - mean).norm()) for x in (alone, corrected)]
    assert off[1] < off[0] / 3


def test_not_divides_by_the_likelihood_of_the_prompt(plane):
    mix = ceb.given(plane, ~plane["up"], weight=0.3)
    sampler = plane.sampler(60, ceb.Langevin(0.1), corrections=8)
    out = ceb.sample(mix, num_chains=CHAINS, num_steps=480, sampler=sampler, seed=0)
    check(out.samples, {None: 1.3, "up": -0.3}, 0.25)  # its mean along y is 0.69
    assert out.samples[:, 1].mean() > 0.4


def test_a_prompt_that_the_network_does_not_know_is_refused_where_it_is_named(plane):
    with pytest.raises(KeyError, match="no prompt 'left'"):
        plane["left"]


def test_steps_of_a_network_that_decides_in_python_are_not_captured(plane):
    mix = ceb.given(plane, plane["right"], weight=2)
    assert "Normals decides anew" in weights_of(mix.modules(), versions=False).refusal


def test_prompts_are_encoded_once_and_forgotten_when_nobody_holds_them_and_others_came():
    encoded = []

    class Any(Normals):
        def encode(self, what):
            encoded.append(what)
            return super().encode(None)

    pipeline = Pipeline(Any(), "any")
    held = pipeline["held"]
    for i in range(2 * RECENT):
        pipeline[f"prompt {i}"]
    assert pipeline["held"] is held
    for what in ("held", f"prompt {2 * RECENT - 1}", "prompt 0"):
        pipeline[what]
    assert encoded == [None, "held", *[f"prompt {i}" for i in range(2 * RECENT)], "prompt 0"]
