"""A latent family from nothing: codec, base, attribute, by the shared trainer."""

import dataclasses
import json
import shutil

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.train import TrainConfig, train
from composable_ebm.train.config import (
    ConfinedEnergy,
    DataConfig,
    GenerationConfig,
    NoisyClassifier,
    OptimiserConfig,
)
from composable_ebm.train.config import PictureCodec as CodecSizes
from composable_ebm.train.objectives import DenoisingScoreMatching, NoisyClassification, Reconstruction

OPTIMISER = OptimiserConfig(learning_rate=3e-3, beta1=0.9, beta2=0.99, grad_clip=1.0, ema=0.9)


def squares(num, seed):
    """A white square on the left or on the right of a picture of 16x16."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(num, 1, 16, 16, dtype=torch.uint8)
    right = torch.randint(2, (num,), generator=generator)
    rows = torch.randint(10, (num,), generator=generator)
    for image, side, row in zip(images, right.tolist(), rows.tolist(), strict=True):
        image[0, row : row + 6, 1 + 8 * side : 7 + 8 * side] = 255
    return LabelledImages(images, {"side": right}, {"side": ("left", "right")}, f"squares/{seed}")


DATA = (squares(400, 0), squares(100, 1))


def config(folder, name, network, objective, iterations, **changes):
    return TrainConfig(
        family="squares",
        name=name,
        network=network,
        objective=objective,
        num_iterations=iterations,
        optimiser=OPTIMISER,
        generation=GenerationConfig(num_steps=20, noise_levels=10),
        models=str(folder / "models"),
        runs=str(folder / "runs"),
        evaluate_every=1000,
        save_every=1000,
        half=True,
        cpu=True,
        **changes,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """What three trainings leave behind."""
    folder = tmp_path_factory.mktemp("latents")
    sizes = CodecSizes(channels=2, widths=(16, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), patch=2)
    train(config(folder, "codec", sizes, Reconstruction(), 300, batch_size=32), data=DATA)
    base = ConfinedEnergy(hidden=64)
    train(config(folder, "base", base, DenoisingScoreMatching(), 300, batch_size=64, latents=True), data=DATA)
    side = {"data": DataConfig(attribute="side"), "latents": True, "batch_size": 64}
    train(config(folder, "side", NoisyClassifier(8, 1, 16), NoisyClassification(), 150, **side), data=DATA)
    return folder / "models" / "squares"


def test_a_trained_codec_gives_pictures_back(family):
    card = json.loads((family / "codec" / "config.json").read_text())
    x = DATA[1].batch(torch.arange(100))
    back = ceb.load_expert(family / "base").codec.reconstruct(x)
    assert float((back - x).square().mean()) < 0.3 * float(x.var())
    assert card["metrics"]["heldout_squared_error"] == pytest.approx(
        float((back - x).square().mean()), rel=0.05
    )
    assert card["metrics"]["latent_scale"] == pytest.approx(1, abs=0.15)


def test_an_attribute_is_learned_beside_a_base_that_stands_still(family):
    base, side = ceb.load_expert(family / "base"), ceb.load_expert(family / "side")
    assert side.card.base == base.card.weights["sha256"]
    assert side.codec is base.codec
    assert side.card.metrics["heldout_accuracy"] > 0.95
    # Nine in ten held-out pictures are doubted less, which draws from particles go by.
    data = DATA[1]
    with torch.no_grad():
        p = torch.softmax(-side.network(side.codec.latents(data.batch(torch.arange(len(data))))), 1)
    right = p.gather(1, data.labels["side"][:, None])[:, 0]
    assert side.doubt == pytest.approx(float((1 - right).quantile(0.9)), rel=0.3, abs=1e-4)
    assert [leaf.doubt for leaf in ceb.given(base, side).leaves()][1:] == [side.doubt]


def test_a_base_has_a_floor_below_its_data(family):
    base = ceb.load_expert(family / "base")
    z = base.codec.latents(DATA[1].batch(torch.arange(100)))
    for level in (0.1, 1.0):
        sigma = torch.tensor(level)
        energies = base.network(z, sigma)[:, 0]
        pit = base.network(base.network.mean.reshape(1, *base.event_shape), sigma).item()
        assert pit > energies.min() - 51
    assert len(base.network.floor) == 81


def test_what_is_asked_for_is_what_comes(family):
    side = ceb.load_expert(family / "side")
    means = [
        ceb.sample(side[value], num_chains=32, seed=1).images.mean((0, 1, 2)) for value in ("left", "right")
    ]
    for mean, other in zip(means, means[::-1], strict=True):
        assert not torch.allclose(mean, other)
    assert means[0][:8].mean() > means[0][8:].mean()
    assert means[1][:8].mean() < means[1][8:].mean()


def test_latents_are_encoded_once_for_all_attributes(family):
    kept = list((family.parents[1] / "runs" / "squares").glob("latents-*.safetensors"))
    assert len(kept) == 2  # of the pictures to learn from, and of those held out


def test_a_base_may_go_on_from_another_of_its_latents(family, tmp_path):
    for name in ("codec", "base"):
        shutil.copytree(family / name, tmp_path / "models" / "squares" / name)
    base = ConfinedEnergy(hidden=64)
    started = {"batch_size": 64, "latents": True, "init": str(family / "base")}
    wanted = config(tmp_path, "base", base, DenoisingScoreMatching(), 1, **started)
    slow = OptimiserConfig(learning_rate=1e-6, beta1=0.9, beta2=0.99)
    expert = train(dataclasses.replace(wanted, optimiser=slow), data=DATA)
    first = ceb.load_expert(family / "base")
    z = first.codec.latents(DATA[1].batch(torch.arange(50)))
    with torch.no_grad():
        assert torch.allclose(first(z), expert(z), rtol=0.02)
    assert expert.card.codec == first.card.codec


def test_what_lies_between_two_values_has_a_value_of_its_own_for_a_classifier():
    images = DATA[0]
    labels = torch.where(torch.arange(400) < 200, images.labels["side"], -1)
    thirds = LabelledImages(images.images, {"side": labels}, images.values, "thirds")
    known = thirds.with_between("side")
    assert known.values["side"] == ("left", "right", "between")
    assert known.labels["side"].tolist() == labels.where(labels >= 0, 2).tolist()


def test_an_attribute_without_a_base_is_refused(tmp_path, family):
    (tmp_path / "models" / "squares").mkdir(parents=True)
    (tmp_path / "models" / "squares" / "codec").symlink_to(family / "codec")
    changes = {"data": DataConfig(attribute="side"), "latents": True}
    with pytest.raises(ValueError, match="Train squares/base first"):
        train(
            config(tmp_path, "side", NoisyClassifier(8, 1, 16), NoisyClassification(), 5, **changes),
            data=DATA,
        )


@pytest.mark.parametrize(
    ("network", "objective", "changes", "message"),
    [
        (
            NoisyClassifier(),
            DenoisingScoreMatching(),
            {},
            "does not train a NoisyClassifier",
        ),
        (ConfinedEnergy(), Reconstruction(), {}, "Reconstruction does not train a ConfinedEnergy"),
        (CodecSizes(), Reconstruction(), {"latents": True}, "a PictureCodec does not learn on latents"),
        (CodecSizes(), Reconstruction(), {"name": "base"}, "the codec of a family is named 'codec'"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(network, objective, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"name": "codec", "network": network, "objective": objective, **changes})


def test_a_decoder_goes_on_alone_and_keeps_its_experts(family, tmp_path):
    kept = tmp_path / "models" / "squares"
    shutil.copytree(family, kept)
    before = ceb.load_expert(kept / "side")
    sizes = CodecSizes(channels=2, widths=(16, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), patch=2)
    alone = Reconstruction(latent_noise=0.1, decoder_only=True, latents=1.0)
    train(config(tmp_path, "codec", sizes, alone, 100, batch_size=32, init=str(kept / "codec")), data=DATA)
    after = ceb.load_expert(kept / "side")
    x = DATA[1].batch(torch.arange(100))
    torch.testing.assert_close(after.codec.latents(x), before.codec.latents(x), atol=0, rtol=0)
    errors = [float((e.codec.reconstruct(x) - x).square().mean()) for e in (before, after)]
    assert errors[1] < 0.9 * errors[0]


def test_latents_are_compared_only_with_an_encoder_that_stands_still():
    with pytest.raises(ValueError, match=r"set objective\.decoder_only = true"):
        Reconstruction(latents=1.0)
