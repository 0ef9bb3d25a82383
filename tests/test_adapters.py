"""Diffusion models as energies: the right score, honest refusals, and what corrects summed scores."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.energy import known_by_gradient
from composable_ebm.sampling.schedule import Schedule, geometric, through

STD = 0.03
ANGLES = torch.arange(8) * math.pi / 4
RING = ceb.analytic.GaussianMixture(0.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1), STD**2)
BAR = ceb.analytic.Box([-0.2, -1.0], [0.2, 1.0], softness=0.01)

MIXTURE = ceb.analytic.GaussianMixture([[-1.0, 0.5], [0.5, -0.5]], [[0.3, 0.1], [0.1, 0.2]])
SIGMAS = torch.tensor([0.1, 0.4, 1.0, 3.0])
STATES = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))


def true_score(energy, x, sigma):
    return torch.cat([energy.score(row[None], noise_level=s) for row, s in zip(x, sigma, strict=True)])


def denoiser(x, sigma):
    """Tweedie: the exact denoiser of MIXTURE."""
    return x + sigma[:, None].square() * true_score(MIXTURE, x, sigma)


# -- the leaf --------------------------------------------------------------------------------------


def test_known_by_gradient_has_that_gradient_and_that_value():
    x = torch.randn(3, 2).requires_grad_()
    g, value = torch.randn(3, 2), torch.tensor([1.0, 2.0, 3.0])
    energy = known_by_gradient(x, g, value)
    assert energy.tolist() == value.tolist()
    assert torch.autograd.grad(energy.sum(), x)[0].equal(g)


def test_denoiser_has_the_score_of_tweedies_formula():
    energy = ceb.from_denoiser(denoiser, noise_range=(0.05, 5.0), event_shape=(2,))
    score = energy.score(STATES, noise_level=SIGMAS)
    assert torch.allclose(score, true_score(MIXTURE, STATES, SIGMAS), rtol=1e-3, atol=1e-4)


def test_sums_of_scores_have_the_score_of_the_sum():
    wind = ceb.from_score(lambda x: -2 * x, name="wind", event_shape=(2,))
    learned = ceb.from_denoiser(denoiser, noise_range=(0.05, 5.0), name="learned", event_shape=(2,))
    mix = MIXTURE + 3 * (learned - MIXTURE) + 0.5 * wind
    expected = true_score(MIXTURE, STATES, SIGMAS) - STATES
    assert torch.allclose(mix.score(STATES, noise_level=SIGMAS), expected, rtol=1e-3, atol=1e-3)
    assert not mix.has_value
    assert (MIXTURE + MIXTURE).has_value


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_variance_preserving_network_has_the_score_at_every_noise_level(predicts):
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    seen = []

    def network(x, t):
        """The exact answers for MIXTURE, in the network's own frame."""
        seen.append(t)
        low = t.floor().long().clamp(max=998)
        log_sigma = torch.lerp(*(((1 - alphas[i]) / alphas[i]).log() / 2 for i in (low, low + 1)), t - low)
        sigma = log_sigma.exp()[:, None]
        root = (1 + sigma.square()).rsqrt()
        clean = denoiser(x / root, sigma[:, 0])
        noise = (x / root - clean) / sigma
        answer = {"epsilon": noise, "sample": clean, "v_prediction": root * noise - sigma * root * clean}
        return SimpleNamespace(sample=answer[predicts])

    energy = ceb.from_noise_predictor(network, alphas, predicts=predicts, event_shape=(2,))
    score = energy.score(STATES, noise_level=SIGMAS)
    assert torch.allclose(score, true_score(MIXTURE, STATES, SIGMAS), rtol=1e-3, atol=2e-3)
    assert seen[0].shape == (4,)
    assert seen[0].diff().min() > 0  # more noise, later time


def test_residual_form_is_an_energy_whose_gradient_goes_through_the_network():
    network = nn.Linear(2, 2)
    energy = ceb.from_denoiser(
        lambda x, sigma: network(x), noise_range=(0.1, 2.0), form="residual", event_shape=(2,)
    )
    x = STATES
    residual = x - network(x)
    assert torch.allclose(
        energy(x, noise_level=SIGMAS.clamp(max=2.0)),
        residual.square().sum(1) / (2 * SIGMAS.clamp(max=2.0).square()),
    )
    by_hand = -(residual - residual @ network.weight) / SIGMAS.clamp(max=2.0)[:, None].square()
    assert torch.allclose(energy.score(x, noise_level=SIGMAS), by_hand, atol=1e-4)
    ceb.sample(energy, num_steps=2, sampler=ceb.MALA(0.01))


def test_samples_of_a_score_alone_match_the_closed_form():
    learned = ceb.from_denoiser(denoiser_of_gaussian, noise_range=(0.02, 5.0), event_shape=(1,))
    learned.data_range = None
    out = ceb.sample(learned, num_chains=4000, seed=0)
    assert out.samples.mean().item() == pytest.approx(0.7, abs=0.03)
    assert out.samples.std().item() == pytest.approx(0.5, abs=0.03)
    assert "known only by its gradient" in out.report()
    assert "ESS" not in out.report()


def denoiser_of_gaussian(x, sigma):
    gain = 0.25 / (0.25 + sigma[:, None].square())
    return 0.7 + gain * (x - 0.7)


# -- what refuses ----------------------------------------------------------------------------------


@pytest.fixture
def wind():
    return ceb.from_score(lambda x: -x, name="wind", event_shape=(2,))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: ceb.sample(e, num_steps=1, sampler=ceb.MALA(0.1)), "MALA accepts steps by differences"),
        (lambda e: ceb.sample(MIXTURE + e, num_steps=1, sampler=ceb.HMC(0.1)), "HMC accepts steps by diff"),
        (lambda e: e | MIXTURE, "an OR weighs its components by their energies, and wind is known only"),
        (lambda e: ceb.negate(e, threshold=1.0), "a bounded NOT compares"),
        (lambda e: ceb.log_ratio(2 * e, STATES, STATES), "a log ratio is a difference of energies"),
        (lambda e: ceb.log_z_difference(e, MIXTURE, ceb.Langevin(0.1)), "log Z is estimated from energies"),
    ],
)
def test_what_compares_energies_refuses_a_score_with_the_reason(wind, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(wind)


def test_a_score_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"a score must return .* shape \(4, 2\), got shape \(4,\)"):
        ceb.from_score(lambda x: x.sum(1), name="sum")(STATES)


def test_wrong_descriptions_are_refused():
    with pytest.raises(ValueError, match="`form` must be one of score, residual, got 'energy'"):
        ceb.from_denoiser(denoiser, noise_range=(0.1, 1.0), form="energy")
    with pytest.raises(ValueError, match="`noise_range` must be"):
        ceb.from_denoiser(denoiser, noise_range=(1.0, 0.1))
    with pytest.raises(ValueError, match="must fall with time"):
        ceb.from_noise_predictor(denoiser, [0.1, 0.5])
    with pytest.raises(ValueError, match="`predicts` must be one of"):
        ceb.from_noise_predictor(denoiser, [0.9, 0.5], predicts="noise")
    with pytest.raises(ValueError, match="SimpleNamespace has no `alphas_cumprod`"):
        ceb.from_diffusers(nn.Identity(), SimpleNamespace())


def test_a_network_of_diffusers_becomes_an_expert():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    energy = ceb.from_diffusers(unet, scheduler, name="tiny")
    assert energy.event_shape == (1, 8, 8)
    x = torch.randn(2, 1, 8, 8)
    t = 40
    sigma = ((1 - scheduler.alphas_cumprod[t]) / scheduler.alphas_cumprod[t]).sqrt()
    with torch.no_grad():
        epsilon = unet(x * scheduler.alphas_cumprod[t].sqrt(), t).sample
    score = energy.score(x, noise_level=sigma)
    assert torch.allclose(score, -epsilon / sigma, atol=1e-3)
    assert ceb.sample(energy, num_chains=2, num_steps=4).samples.isfinite().all()


# -- summed scores, and what corrects them ---------------------------------------------------------


def in_place(x):
    """Share of samples within 3 standard deviations of the two Gaussians that are the product."""
    modes = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    return ((x[:, None] - modes).abs() < 3 * STD).all(-1).any(1).float().mean().item()


def test_summed_scores_alone_go_astray_and_adjusted_steps_put_them_right():
    def exact_score(energy):
        return ceb.from_score(
            lambda x, sigma: true_score_shared(energy, x, sigma), noise_conditioned=True, event_shape=(2,)
        )

    scores, energies = exact_score(RING) + exact_score(BAR), RING + BAR
    levels = Schedule(noise_level=geometric(1.0, 0.003), predict=True)
    predictor = ceb.Annealed(ceb.Langevin(1e-8), levels)
    naive = ceb.sample(scores, num_chains=200, num_steps=80, sampler=predictor, seed=0)

    def annealed(kernel, power):
        slow = through((0, 0.5), (0.1, 0.06), (0.9, 0.02), (1, 0.003))
        width = Schedule(
            noise_level=slow,
            step_scale=lambda t: (1 / (STD**2 + slow(t) ** 2) + 1 / (1e-4 + slow(t) ** 2)) ** (-power / 2),
            num_levels=40,
        )
        return ceb.Annealed(kernel, width)

    corrected = {
        "MALA": ceb.sample(
            energies, num_chains=200, num_steps=400, sampler=annealed(ceb.MALA(1.0), 2), seed=0
        ),
        "HMC": ceb.sample(
            energies, num_chains=200, num_steps=200, sampler=annealed(ceb.HMC(1.5, num_leapfrog=2), 1), seed=0
        ),
    }
    shares = {name: in_place(out.samples) for name, out in corrected.items()}
    assert in_place(naive.samples) < 0.75
    assert min(shares.values()) > 0.85, shares


def true_score_shared(energy, x, sigma):
    return energy.score(x, noise_level=sigma)


# -- classifiers that know noise -------------------------------------------------------------------


def test_a_noise_conditioned_classifier_is_given_the_level():
    class Logits(nn.Module):
        def forward(self, x, noise_level):
            return torch.stack([x[:, 0] / noise_level, -x[:, 0] / noise_level], dim=1)

    energy = ceb.from_classifier(Logits(), 1, noise_conditioned=True, event_shape=(2,))
    sigma = torch.tensor(0.5)
    expected = -torch.log_softmax(torch.stack([STATES[:, 0], -STATES[:, 0]], 1) / 0.5, 1)[:, 1]
    assert torch.allclose(energy(STATES, noise_level=sigma), expected)
