"""Noise-conditioned energies: their Gaussian skeleton, their objective, and the sampler they suit."""

from dataclasses import replace

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.experts.networks.denoiser import Denoiser
from composable_ebm.experts.networks.diffused import DiffusedEnergy
from composable_ebm.experts.store import WEIGHTS
from composable_ebm.sampling.schedule import Curve
from composable_ebm.train import Trainer, read_config
from composable_ebm.train import config as configs
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching
from composable_ebm.train.objectives.recovery import RecoveryLikelihood

SHAPE = (1, 2, 3)


def gaussian_images(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws of a correlated Gaussian over six pixels, with its mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(7)) * 0.3
    mean = torch.linspace(-0.5, 0.5, 6)
    x = mean + torch.randn(num, 6, generator=generator) @ root.T
    return x.reshape(num, *SHAPE), mean, root @ root.T


@pytest.fixture
def skeleton():
    """A network fitted to a Gaussian, whose learned part is silent."""
    torch.manual_seed(0)
    network = DiffusedEnergy(SHAPE, hidden=8, components=5, noise_range=(0.02, 5.0))
    images, mean, covariance = gaussian_images(10_000)
    network.fit(images)
    for head in (network.linear_head, network.quadratic_head):
        torch.nn.init.zeros_(head.weight)
    return network, mean, covariance


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0])
def test_skeleton_is_the_gaussian_of_the_data_plus_noise(skeleton, sigma):
    network, mean, covariance = skeleton
    x = torch.randn(4, *SHAPE).requires_grad_()
    level = torch.tensor(sigma)
    (gradient,) = torch.autograd.grad(network(x, level).sum(), x)
    exact = torch.linalg.solve(covariance + sigma**2 * torch.eye(6), (x.detach().flatten(1) - mean).T).T
    # 10,000 images estimate the covariance to about 1 %.
    assert torch.allclose(gradient.flatten(1), exact, atol=0.06 * float(exact.abs().max()))


def test_denoiser_error_is_the_error_of_the_skeletons_denoiser(skeleton):
    network, _, _ = skeleton
    x, _, _ = gaussian_images(20_000, seed=1)
    for sigma in (0.1, 0.5, 2.0):
        noisy = (x + sigma * torch.randn(x.shape)).requires_grad_()
        level = torch.tensor(sigma)
        (gradient,) = torch.autograd.grad(network(noisy, level).sum(), noisy)
        error = (noisy - sigma**2 * gradient - x).square().mean()
        assert error.item() == pytest.approx(network.denoiser_error(level).item(), rel=0.04)


def test_loss_of_the_skeleton_on_gaussian_data_is_one(skeleton):
    network, _, _ = skeleton
    x, _, _ = gaussian_images(20_000, seed=2)
    setting = Setting(SHAPE, 1, (-1.0, 1.0), len(x), ceb.Langevin(0.1), torch.Generator().manual_seed(0))
    loss, figures = (
        DenoisingScoreMatching().begin(setting).loss(network, network, x, torch.zeros(len(x)).long())
    )
    assert loss.item() == pytest.approx(1, abs=0.03)
    total, count = figures["denoising_2"].tolist()
    assert total / count == pytest.approx(1, abs=0.06)


def test_values_differ_by_their_head_alone_and_one_noise_level_serves_all_rows():
    torch.manual_seed(0)
    network = DiffusedEnergy(SHAPE, num_values=3, hidden=8, components=4)
    x = torch.randn(5, *SHAPE)
    assert network(x).shape == (5, 3)
    assert torch.allclose(network(x, torch.tensor(0.5)), network(x, torch.full((5,), 0.5)))
    assert torch.allclose(network(x), network(x, torch.tensor(0.02)))  # the smallest level, unless told


def test_predictor_and_langevin_corrector_carry_noise_to_the_data():
    target = ceb.analytic.GaussianMixture([[-2.0], [2.0]], 0.04, weights=[0.3, 0.7])
    levels = Curve(((0, 8.0), (1, 0.02)), "karras")
    schedule = ceb.Schedule(noise_level=levels, noise_power=2.0, predict=True, num_levels=60)
    out = ceb.sample(
        target, num_chains=4000, num_steps=120, sampler=ceb.Annealed(ceb.Langevin(0.3), schedule), seed=0
    )
    right = out.samples > 0
    assert right.float().mean().item() == pytest.approx(0.7, abs=0.04)
    assert out.samples[right].var().item() == pytest.approx(0.04, rel=0.12)
    # One gradient a step, one for each change of level and for the last move, one to start.
    assert out.evaluations == 120 + 60 + 1


def test_the_last_predictor_step_removes_the_noise_that_is_left():
    target = ceb.analytic.Gaussian([0.0], 1e-6)
    sigma = 0.3
    schedule = ceb.Schedule(noise_level=Curve(((0, sigma), (1, sigma))), noise_power=2.0, predict=True)
    sampler = ceb.Annealed(ceb.Langevin(0.1), schedule)
    out = ceb.sample(target, num_chains=500, num_steps=30, sampler=sampler, seed=0)
    assert out.samples.std().item() < 0.01


def test_a_predictor_step_to_nowhere_freezes_the_chain():
    def energy(x, noise_level):
        # From the second level on, the gradient of the first chain is too large to square.
        steep = torch.where(noise_level < 0.5, 1e30, 1.0) * torch.tensor([1.0, 0.0])
        return (x[:, 0] * steep) + x[:, 0].square() / 2

    target = ceb.from_callable(energy, name="cliff", event_shape=(1,), noise_conditioned=True)
    schedule = ceb.Schedule(noise_level=ceb.schedules.geometric(1.0, 0.1), predict=True, num_levels=2)
    out = ceb.sample(
        target,
        num_chains=2,
        num_steps=4,
        sampler=ceb.Annealed(ceb.Langevin(0.1), schedule),
        on_divergence="report",
    )
    assert out.divergence.chains.tolist() == [True, False]
    assert out.samples.isfinite().all()


def test_noise_power_and_predict_need_noise_levels():
    with pytest.raises(ValueError, match="need a `noise_level` curve"):
        ceb.Schedule(predict=True)


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def config(monkeypatch, tmp_path):
    def load(name, split, root=None, **options):
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.randint(2, (512,), generator=generator)
        images = torch.randint(0, 60, (512, 1, 4, 4), generator=generator, dtype=torch.uint8)
        images[labels == 1, :, :, 2:] += 180
        return LabelledImages(images, {"side": labels}, {"side": ("dark", "bright")}, f"sides/{split}")

    monkeypatch.setattr("composable_ebm.train.config.load_data", load)
    return configs.TrainConfig(
        family="sides",
        name="base",
        data=configs.DataConfig(name="sides"),
        network=configs.DiffusedEnergy(hidden=32, components=8),
        objective=DenoisingScoreMatching(),
        optimiser=configs.OptimiserConfig(learning_rate=3e-3, beta1=0.9, grad_clip=1.0, ema=0.95),
        generation=configs.GenerationConfig(num_steps=30, noise_levels=15),
        num_iterations=120,
        evaluate_every=120,
        models=str(tmp_path / "models"),
        runs=str(tmp_path / "runs"),
        cpu=True,
    )


def test_an_attribute_expert_starts_from_the_base_and_composes_with_it(config):
    base = Trainer(config).run()
    fine = replace(
        config,
        name="side",
        data=configs.DataConfig(name="sides", attribute="side"),
        init=str(config.model_folder),
    )
    start = Trainer(fine)
    assert start.network.second.weight.equal(base.network.second.weight)
    side = start.run()
    assert side.card.temperature == 1
    assert side.card.metrics["heldout_accuracy"] > 0.95
    for value, above in (("dark", False), ("bright", True)):
        mix = base + ceb.ratio(side[value], side["any"])
        out = ceb.sample(mix, num_chains=64, seed=0)
        bright = out.samples[:, :, :, 2:].mean(dim=(1, 2, 3)) > -0.1
        assert (bright == above).float().mean() > 0.9


def test_recovery_likelihood_goes_on_from_denoising_score_matching(config):
    first = Trainer(config).run()
    objective = RecoveryLikelihood(langevin_steps=3, num_levels=20)
    slow = replace(config.optimiser, learning_rate=1e-4)
    second = replace(config, name="second", objective=objective, optimiser=slow, num_iterations=20)
    start = Trainer(replace(second, init=str(config.model_folder)))
    assert start.network.second.weight.equal(first.network.second.weight)
    expert = start.run()
    assert start.rollbacks == 0
    assert expert.card.temperature == 1
    bright = expert.card.metrics["heldout_denoising"]
    assert bright == pytest.approx(first.card.metrics["heldout_denoising"], rel=0.2)


def test_a_denoiser_learns_scores_as_the_energy_does(config):
    """The same objective and data; the network has no energy, so nothing that needs one is stored."""
    attribute = configs.DataConfig(name="sides", attribute="side")
    network = configs.Denoiser(hidden=32, components=8)
    side = Trainer(replace(config, data=attribute, network=network, num_iterations=240)).run()
    assert not side.has_value
    assert side.card.energy_range == {}
    assert "heldout_energy" not in side.card.metrics
    assert side.card.metrics["heldout_denoising"] < 0.9
    assert side.card.metrics["heldout_accuracy"] > 0.95
    for value, above in (("dark", False), ("bright", True)):
        samples = ceb.sample(ceb.load_expert(config.model_folder)[value], num_chains=64, seed=0).samples
        bright = samples[:, :, :, 2:].mean(dim=(1, 2, 3)) > -0.1
        assert (bright == above).float().mean() > 0.9
    with pytest.raises(ValueError, match="known only by its gradient"):
        side["dark"] | side["bright"]


def test_denoiser_without_its_learned_part_is_the_skeletons():
    torch.manual_seed(0)
    network = Denoiser(SHAPE, hidden=8, components=5, noise_range=(0.02, 5.0))
    images, mean, covariance = gaussian_images(10_000)
    network.fit(images)
    x = torch.randn(4, *SHAPE)
    for sigma in (0.02, 0.3, 2.0):
        denoised, _ = network.denoise(x, torch.full((4,), sigma))
        gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(6))
        exact = mean + (x.flatten(1) - mean) @ gain.T
        assert torch.allclose(denoised.flatten(1), exact, atol=0.05)


def test_marginal_of_a_denoiser_mixes_scores_by_how_likely_values_are():
    torch.manual_seed(0)
    network = Denoiser(SHAPE, num_values=3, hidden=8, components=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    options = {"type": "Denoiser", **network.options}
    card = ceb.Card("toys", "a", "kind", ("u", "v", "w"), SHAPE, (-1.0, 1.0), options, noise_conditioned=True)
    expert = ceb.Expert(network.requires_grad_(False), card)
    x, sigma = torch.randn(5, *SHAPE), torch.tensor(0.4)
    shares = torch.softmax(-network(x, sigma), dim=1)
    scores = torch.stack([expert[v].score(x, noise_level=sigma) for v in "uvw"], dim=1)
    expected = (shares.reshape(5, 3, 1, 1, 1) * scores).sum(1)
    assert torch.allclose(expert["any"].score(x, noise_level=sigma), expected, rtol=1e-4, atol=1e-4)
    denoised, _ = network.denoise(x, sigma.expand(5))
    assert torch.allclose(scores[:, 1], (denoised[:, 1] - x) / sigma.square(), rtol=1e-4, atol=1e-4)


def test_init_from_another_kind_of_network_is_refused(config):
    other = ceb.experts.ConvEnergy((1, 4, 4), 1, widths=(4,), hidden=8)
    card = ceb.Card(
        "sides", "conv", "image", ("image",), (1, 4, 4), (-1.0, 1.0), {"type": "ConvEnergy", **other.options}
    )
    ceb.save_expert(config.model_folder, other, card)
    with pytest.raises(ValueError, match=r"another kind of network \(ConvEnergy\) than this Diffused"):
        Trainer(replace(config, init=str(config.model_folder)))


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    torch.manual_seed(0)
    network = DiffusedEnergy(SHAPE, hidden=64, components=4)
    card = ceb.Card(
        "toys", "a", "image", ("image",), SHAPE, (-1.0, 1.0), {"type": "DiffusedEnergy", **network.options}
    )
    ceb.save_expert(tmp_path / "full", network, card)
    ceb.save_expert(tmp_path / "half", network, card, half=True)
    sizes = {name: (tmp_path / name / WEIGHTS).stat().st_size for name in ("full", "half")}
    assert sizes["half"] < 0.6 * sizes["full"]
    loaded = ceb.load_expert(tmp_path / "half").network
    assert loaded.second.weight.dtype == torch.float32
    assert torch.allclose(loaded.second.weight, network.second.weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[network]\ntype = "DifusedEnergy"', "did you mean 'DiffusedEnergy'"),
        ('[network]\ntype = "DiffusedEnergy"', "does not train a DiffusedEnergy"),
        ('[objective]\ntype = "DenoisingScoreMatching"', "does not train a ConvEnergy"),
        (
            '[objective]\ntype = "DenoisingScoreMatching"\ncd_steps = 3',
            "unknown setting 'objective.cd_steps'",
        ),
    ],
)
def test_a_config_names_its_network_and_objective(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)


# -- images between two values -----------------------------------------------------------------------


def test_an_image_between_the_values_counts_for_their_common_density():
    torch.manual_seed(0)
    network = DiffusedEnergy(SHAPE, num_values=2, hidden=8, components=5, noise_range=(0.02, 5.0))
    network.fit(gaussian_images(1000)[0])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = gaussian_images(64, seed=1)[0]

    def figures(model, y):
        phase = DenoisingScoreMatching(classification=1.0).begin(
            Setting(SHAPE, 2, (-1, 1), 64, None, torch.Generator().manual_seed(0))
        )
        return phase.loss(model, network, x, y)[1]

    def common(x, noise_level):
        return -torch.logsumexp(-network(x, noise_level).double(), dim=1, keepdim=True).float()

    between = figures(network, torch.full((64,), -1))
    alone = figures(common, torch.zeros(64, dtype=torch.long))
    torch.testing.assert_close(between["denoising"], alone["denoising"])
    labelled = [figures(network, torch.full((64,), value))["cross_entropy"] for value in (0, 1)]
    torch.testing.assert_close(between["cross_entropy"], sum(labelled) / 2)
    assert between["cross_entropy"] > torch.tensor(2.0).log()  # the least, where both values are alike


@pytest.mark.parametrize("between", [False, True])
def test_training_takes_images_between_the_values_if_told_to(between, monkeypatch, tmp_path):
    images = (torch.rand(40, *SHAPE) * 255).to(torch.uint8)
    labels = torch.arange(40) % 4 - 1  # a quarter has none
    data = LabelledImages(images, {"size": labels}, {"size": ("small", "middle", "large")}, "toys")
    monkeypatch.setattr(configs.DataConfig, "load", lambda self, split: data)
    config = configs.TrainConfig(
        data=configs.DataConfig(attribute="size", between=between),
        network=configs.DiffusedEnergy(hidden=4, components=2),
        objective=DenoisingScoreMatching(),
        runs=str(tmp_path),
        cpu=True,
    )
    trainer = Trainer(config)
    assert len(trainer.data) == (40 if between else 30)
    assert len(trainer.held_out) == 30


def test_images_between_the_values_are_refused_where_each_needs_a_label():
    with pytest.raises(ValueError, match="RecoveryLikelihood needs a label for every image"):
        configs.TrainConfig(
            data=configs.DataConfig(attribute="thick", between=True),
            network=configs.DiffusedEnergy(),
            objective=RecoveryLikelihood(),
        )
