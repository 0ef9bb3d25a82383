"""A training by the clock that keeps its best, and what it says of itself at the end."""

import re
from dataclasses import replace

import pytest
import torch
from run_helpers import DATA, small, weights
from toy_task import expert, images

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.train import Trainer
from composable_ebm.train.budget import Budget
from composable_ebm.train.checkpoint import checkpoints
from composable_ebm.train.config import DiffusedEnergy, OptimiserConfig
from composable_ebm.train.export import sample_values
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching
from composable_ebm.train.verdict import judge


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A training of the denoising kind that keeps the best."""
    monkeypatch.chdir(tmp_path)
    return replace(
        small(),
        network=DiffusedEnergy(hidden=8, components=4),
        objective=DenoisingScoreMatching(),
        optimiser=OptimiserConfig(ema=0.5),
        evaluate_every=4,
        keep_best=True,
        num_iterations=12,
    )


def test_a_training_by_the_clock_ends_in_time_with_the_rate_at_zero(kept):
    trainer = Trainer(replace(kept, minutes=0.02, num_iterations=1), data=DATA)
    trainer.run()
    assert trainer.step > 1
    assert trainer.seconds >= 1.2
    assert trainer._rate() == 0
    assert Trainer(replace(kept, minutes=0.02), data=DATA).run().card.training["iterations"] == trainer.step


def test_the_average_of_a_short_training_leaves_its_start_behind(kept):
    slow = replace(kept, optimiser=OptimiserConfig(learning_rate=0.01, ema=0.999, hold=0.9), keep_best=False)
    trainer = Trainer(replace(slow, num_iterations=40), data=DATA)
    first = torch.cat([p.detach().flatten().clone() for p in trainer.network.parameters()])
    trainer.run()
    now = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    mine = torch.cat([p.detach().flatten() for p in trainer.average.module.parameters()])
    assert float((mine - now).norm()) < 0.6 * float((first - now).norm())


def test_looking_does_not_eat_the_minutes(kept):
    budget = Budget(replace(kept, minutes=1))
    looks = 0
    seconds = 0.0
    while seconds < 60:
        budget.tick(seconds)
        if budget.due(1, 1):
            looks += 1
            seconds += 6  # a busy machine
            budget.looked(seconds, 6)
        seconds += 0.1
    assert 1 <= looks <= 2


def test_the_best_weights_on_held_out_pictures_are_what_is_written(kept):
    trainer = Trainer(kept, data=DATA)
    evaluate, offered = trainer.best.offer, []

    def worse_at_the_end(step, metrics, network):
        offered.append(weights(trainer.expert()))
        return evaluate(step, {"heldout_loss": 3.0 if step == 8 else 5.0}, network)

    trainer.best.offer = worse_at_the_end
    trainer.run()
    written = ceb.load_expert(kept.model_folder)
    assert weights(written).equal(offered[1])
    assert written.card.training["best_iteration"] == 8
    assert "unfinished" not in written.card.training


def test_the_best_survives_a_stop(kept):
    whole = Trainer(replace(kept, name="whole"), data=DATA).run()
    trainer = Trainer(kept, data=DATA)
    step = trainer._iteration

    class Killed(BaseException):
        pass

    def until_killed():
        if trainer.step == 10:
            raise Killed
        return step()

    trainer._iteration = until_killed
    with pytest.raises(Killed):
        trainer.run()
    assert ceb.load_expert(kept.model_folder).card.training["unfinished"]
    assert checkpoints(kept.run_folder / "checkpoints")[0].name == "step-0000008"
    assert weights(Trainer(kept, data=DATA).run()).equal(weights(whole))


def test_it_ends_with_a_verdict_and_a_sheet(kept, capsys):
    written = Trainer(kept, data=DATA).run()
    said = capsys.readouterr().out
    assert re.search(r"held-out denoising error \d\.\d\d, on pictures it learned from", said)
    assert re.search(r"held-out accuracy \d\.\d\d \(0\.\d\d by always saying the same\)", said)
    assert "verdict: not good yet" in said
    assert (kept.run_folder / "verdict.png").exists()
    assert (kept.run_folder / "verdict.txt").read_text() in said
    assert {"sample_distance", "heldout_distance"} <= written.card.metrics.keys()


def test_advice_depends_on_whether_it_was_still_getting_better(tmp_path):
    metrics = {"heldout_denoising": 0.99}

    def advice(better):
        sheet = tmp_path / "sheet.png"
        return str(judge(expert("base"), images(), images(300, seed=2), metrics, metrics, sheet, better))

    assert "it was still getting better: give it more --minutes" in advice(True)
    assert "it no longer got better: more pictures may help, more minutes do not" in advice(False)


def test_a_value_of_few_pictures_is_named(tmp_path):
    sides = expert("left")
    train = images(300)
    few = train.select(
        torch.cat([torch.where(train.labels["left"] == 0)[0], torch.where(train.labels["left"] == 1)[0][:3]])
    )
    metrics = {"heldout_accuracy": 1.0}
    said = str(judge(sides, few, images(300, seed=2), metrics, metrics, tmp_path / "sheet.png"))
    assert re.search(r"of \w+ \(3\) it has seen too few pictures", said)


def verdict(train, tmp_path):
    return str(judge(expert("base"), train, images(300, seed=2), {}, {}, tmp_path / "sheet.png"))


def pictures(x):
    return LabelledImages(((x.clamp(-1, 1) + 1) * 127.5).round().byte(), {}, {}, "pictures")


def test_samples_of_the_right_density_are_usable_and_copies_and_noise_are_named(tmp_path):
    assert "verdict: usable" in verdict(images(300), tmp_path)
    samples = sample_values(expert("base"), 64)["image"]
    assert "its samples are copies of the 64 pictures" in verdict(pictures(samples), tmp_path)
    far = judge(
        expert("base"),
        pictures(torch.ones(9, 1, 2, 2)),
        pictures(torch.ones(9, 1, 2, 2)),
        {},
        {},
        tmp_path / "x.png",
    )
    assert "its samples are like no picture" in str(far)
