"""Training: the objective against a known answer, exact resume, divergence, processes, configs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import composable_ebm as ceb
from composable_ebm.data import DATASETS, OF_ANY_SIZE, LabelledImages, shapes
from composable_ebm.train import ContrastiveDivergence, Trainer, TrainingDivergedError, ending, read_config
from composable_ebm.train import trainer as trainer_module
from composable_ebm.train.__main__ import main as command_line
from composable_ebm.train.checkpoint import latest_checkpoint
from composable_ebm.train.config import (
    ConvEnergy,
    DataConfig,
    GenerationConfig,
    OptimiserConfig,
    TrainConfig,
)
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel
from composable_ebm.train.objectives.score_matching import ScoreMatching, SlicedScoreMatching
from composable_ebm.train.readings import Readings
from composable_ebm.train.replay_buffer import ReplayBuffer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny_data(monkeypatch):
    """Bright squares on the left (value 0) or the right (value 1) of 8x8 images."""

    def load(name, split, root=None, **options):
        generator = torch.Generator().manual_seed({"train": 0, "validation": 1}[split])
        labels = torch.randint(2, (256,), generator=generator)
        images = torch.zeros(256, 1, 8, 8, dtype=torch.uint8)
        images[labels == 0, :, 2:6, 0:4] = 255
        images[labels == 1, :, 2:6, 4:8] = 255
        return LabelledImages(images, {"side": labels}, {"side": ("left", "right")}, f"squares/{split}")

    monkeypatch.setattr("composable_ebm.train.config.load_data", load)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        family="squares",
        name="side",
        data=DataConfig(name="squares", attribute="side"),
        network=ConvEnergy(widths=(8, 8), hidden=16),
        objective=ContrastiveDivergence(cd_steps=3, buffer_size=64),
        generation=GenerationConfig(num_steps=10),
        optimiser=OptimiserConfig(ema=0.9),
        batch_size=16,
        num_iterations=8,
        log_every=2,
        save_every=4,
        evaluate_every=8,
        models=str(tmp_path / "models"),
        runs=str(tmp_path / "runs"),
        cpu=True,
    )


def weights(expert) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in expert.network.parameters()])


# -- the objective and its chains ------------------------------------------------------------------


class Parabola(torch.nn.Module):
    """E(x) = (x - θ)²/2 for one value: the likelihood's maximum is θ = mean of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (x - self.theta).square() / 2


@pytest.mark.parametrize("persistent", [True, False])
def test_contrastive_divergence_finds_the_mean_of_a_gaussian(persistent):
    model, generator = Parabola(), torch.Generator().manual_seed(0)
    objective = ContrastiveDivergence(
        cd_steps=5, persistent=persistent, buffer_size=512, energy_l2=0, data_noise=0
    )
    phase = objective.begin(Setting((1,), 1, (-1.0, 1.0), 256, ceb.Langevin(0.3), generator))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    y = torch.zeros(256, dtype=torch.long)
    path = []
    for _ in range(150):
        x = 1.5 + torch.randn(256, 1, generator=generator)
        loss, _ = phase.loss(model, model, x, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        path.append(model.theta.item())
    # 100 iterations of 256 draws; restarts from noise pull persistent chains by up to 5 %.
    assert sum(path[50:]) / 100 == pytest.approx(1.5, abs=0.08)


def test_loss_is_the_formula_of_its_docstring():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x, z = torch.randn(5, 4), torch.randn(6, 4)
    y, t = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 0, 1, 0, 1])
    objective = ContrastiveDivergence(energy_l2=0.3, classification=0.7)
    loss, parts = objective.contrast(model, x, y, z, t)
    e_pos, e_neg = model(x)[torch.arange(5), y], model(z)[torch.arange(6), t]
    log_p = torch.log_softmax(-model(x), dim=1)[torch.arange(5), y]
    expected = e_pos.mean() - e_neg.mean() - 0.7 * log_p.mean()
    expected += 0.3 * (e_pos.square().mean() + e_neg.square().mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert parts["energy_gap"].item() == pytest.approx((e_neg.mean() - e_pos.mean()).item(), abs=1e-6)


def test_replay_buffer_restarts_its_share_of_chains_from_noise_under_fresh_labels():
    buffer = ReplayBuffer(4000, (2,), 10, (-1.0, 1.0), 0.05, torch.Generator().manual_seed(0))
    buffer.states.fill_(7.0)
    buffer.labels.fill_(11)
    places, states, labels = buffer.draw(4000)
    restarted = states[:, 0] != 7.0
    assert places.sort().values.equal(torch.arange(4000))
    # 0.05 ± 4 standard errors
    assert restarted.float().mean().item() == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 4000) ** 0.5)
    assert (labels[restarted] < 10).all()
    assert (labels[~restarted] == 11).all()
    assert states[restarted].abs().max() <= 1
    buffer.put(places, states, labels)
    assert buffer.states[places].equal(states)


def test_replay_buffer_refuses_a_batch_that_does_not_fit():
    buffer = ReplayBuffer(4, (2,), 1, (-1.0, 1.0), 0.05, torch.Generator())
    with pytest.raises(ValueError, match="does not fit a replay buffer of 4 chains"):
        buffer.draw(5)


# -- the run ---------------------------------------------------------------------------------------


def test_training_writes_an_expert_that_tells_its_values_apart(tiny_data, config):
    expert = Trainer(replace(config, num_iterations=60, evaluate_every=60)).run()
    loaded = ceb.load_expert(config.model_folder)
    assert weights(loaded).equal(weights(expert))
    assert loaded.card.metrics["heldout_accuracy"] > 0.95
    assert loaded.card.metrics["heldout_cd"] < 0
    assert set(loaded.card.energy_range) == {"left", "right", "any"}
    assert loaded.sampler_settings["num_steps"] == 10
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert {"energy_gap", "loss", "chains_diverged"} <= set(lines[0])
    assert (config.run_folder / "samples-000060.png").exists()
    assert (config.model_folder / "metrics.jsonl").exists()


def test_a_resumed_training_is_the_uninterrupted_one(tiny_data, config, tmp_path):
    whole = Trainer(config).run()
    other = replace(config, runs=str(tmp_path / "other"), models=str(tmp_path / "other_models"))
    first = Trainer(replace(other, num_iterations=8))
    first.config = replace(other, evaluate_every=1000)

    class Killed(BaseException):
        pass

    iterations = iter(range(6))
    step = first._iteration

    def until_killed():
        if next(iterations, None) is None:
            raise Killed
        return step()

    first._iteration = until_killed
    with pytest.raises(Killed):
        first.run()
    resumed = Trainer(other)
    expert = resumed.run()
    assert latest_checkpoint(other.run_folder / "checkpoints").name == "step-0000008"
    assert weights(expert).equal(weights(whole))


def test_figures_of_which_nothing_was_seen_are_left_out_and_others_are_means():
    readings = Readings(Accelerator(cpu=True))
    assert readings.read() == {}
    for loss, rare in ((1.0, [0.0, 0.0]), (3.0, [6.0, 3.0])):
        never = torch.tensor([0.0, 0.0])
        readings.add({"loss": torch.tensor(loss), "rare": torch.tensor(rare), "never": never})
    assert readings.read() == {"loss": 2.0, "rare": 2.0}
    assert readings.read() == {}


@pytest.mark.parametrize(
    "objective",
    [
        DenoisingAtOneLevel(noise_level=0.3),
        ScoreMatching(data_noise=0.3, classification=0.1),
        SlicedScoreMatching(data_noise=0.3),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_cheap_first_stage_is_followed_by_contrastive_divergence(tiny_data, config, objective):
    first = Trainer(replace(config, name="first", objective=objective)).run()
    second = Trainer(replace(config, name="second", init=str(config.model_folder.parent / "first")))
    assert weights(second.expert()).equal(weights(first))
    assert "energy_gap" in second._iteration()
    assert not weights(second.expert()).equal(weights(first))


def test_a_finished_expert_is_pushed_where_the_configuration_says(tiny_data, config, monkeypatch):
    pushed = []
    monkeypatch.setattr(trainer_module, "hub_token", lambda: "hf_secret")
    monkeypatch.setattr(ending, "push_to_hub", lambda *arguments: pushed.append(arguments) or "there")
    Trainer(replace(config, push_to_hub="alice/side")).run()
    assert pushed == [(config.model_folder, "alice/side")]

    def unreachable(*arguments):
        raise OSError("no connection.")

    monkeypatch.setattr(ending, "push_to_hub", unreachable)
    with pytest.raises(OSError, match=r"the Hub did not take it: no connection\. To try again: .*alice/side"):
        Trainer(replace(config, push_to_hub="alice/side")).run()
    assert ceb.load_expert(config.model_folder)


def test_pushing_without_a_token_is_refused_before_the_training(tiny_data, config, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a Hugging Face token"):
        Trainer(replace(config, push_to_hub="alice/side"))
    with pytest.raises(ValueError, match="named user/name"):
        Trainer(replace(config, push_to_hub="side"))


def test_a_training_that_diverges_rolls_back_then_gives_up_with_the_last_good_expert(tiny_data, config):
    trainer = Trainer(replace(config, num_iterations=40))
    step = trainer._iteration

    def poisoned():
        figures = dict(step())
        if trainer.step >= 6:
            for p in trainer.network.parameters():
                p.data.fill_(float("nan"))
            figures["energy_gap"] = torch.tensor(float("nan"))
        return figures

    trainer._iteration = poisoned
    with pytest.raises(
        TrainingDivergedError, match=r"at iteration 8.*higher --objective.energy-l2.*cd-steps"
    ):
        trainer.run()
    assert trainer.rollbacks == 4
    assert weights(ceb.load_expert(config.model_folder)).isfinite().all()


def test_the_energy_gap_that_counts_as_divergence_can_be_set(tiny_data, config):
    def trainer(name, **changes):
        made = Trainer(replace(config, name=name, num_iterations=4, log_every=2, **changes))
        step = made._iteration
        made._iteration = lambda: {**step(), "energy_gap": torch.tensor(60.0)}
        return made

    with pytest.raises(TrainingDivergedError, match="energy gap 60"):
        trainer("strict").run()
    patient = trainer("patient", largest_gap=100.0)
    patient.run()
    assert patient.rollbacks == 0


def test_an_unconditional_expert_learns_without_labels(tiny_data, config):
    expert = Trainer(replace(config, name="base", data=DataConfig(name="squares"))).run()
    assert expert.card.values == ("image",)
    assert str(expert) == "squares/base"


# -- processes -------------------------------------------------------------------------------------

FOLDER_CONFIG = """
family = "sides"
name = "side"
batch_size = 8
num_iterations = {iterations}
log_every = 2
save_every = 2
evaluate_every = 1000
cpu = true
models = "{folder}/models"
runs = "{folder}/runs"
[data]
name = "folder"
root = "{root}"
attribute = "class"
size = 8
[network]
widths = [4, 4]
hidden = 8
[objective]
cd_steps = 2
buffer_size = 64
[generation]
num_steps = 2
"""


@pytest.fixture
def write_config(tmp_path):
    """Writes the configuration of a training on forty files, which other processes can read too."""
    root = tmp_path / "sides"
    for i in range(40):
        left = Image.new("L", (4, 8), 255)
        picture = Image.new("L", (8, 8), 5 * i)
        picture.paste(left, (0, 0) if i % 2 else (4, 0))
        path = root / ("left" if i % 2 else "right") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    def write(folder, iterations):
        folder.mkdir(exist_ok=True)
        path = folder / "config.toml"
        path.write_text(FOLDER_CONFIG.format(iterations=iterations, folder=folder, root=root))
        return path

    return write


def test_a_training_killed_in_the_middle_resumes_exactly(write_config, tmp_path):
    whole = Trainer(read_config(write_config(tmp_path / "whole", 60))).run()
    config = write_config(tmp_path / "killed", 60)
    process = subprocess.Popen(
        [sys.executable, "-m", "composable_ebm.train", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "killed/runs/sides/side/checkpoints"
    deadline = time.monotonic() + 180
    while latest_checkpoint(checkpoints) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still running
    assert not (tmp_path / "killed/models").exists()
    resumed = Trainer(read_config(config)).run()
    assert weights(resumed).equal(weights(whole))


def launched(*program, processes="--multi_gpu --num_processes 2"):
    """What `accelerate launch` starts, ended."""
    launch = f"accelerate.commands.launch {processes} --num_machines 1 --mixed_precision no"
    command = [sys.executable, "-m", *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, program)], env=environment, capture_output=True, text=True, timeout=240
    )


def test_two_processes_share_parameters_and_draw_different_noise(write_config, tmp_path):
    config = write_config(tmp_path, 4)
    out = tmp_path / "found.json"
    done = launched(ROOT / "tests/train_two_processes.py", config, out)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["num_processes"] == 2
    first, second = found["ranks"]
    assert first["weights"] == second["weights"]
    assert first["first"] == second["first"]
    assert first["chains"] != second["chains"]


@pytest.mark.slow
def test_two_processes_of_the_command_line_speak_once_and_end_well(write_config, tmp_path):
    config = write_config(tmp_path, 4)
    done = launched("-m", "composable_ebm.train", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sides/side is in") == 1
    command = ceb.load_expert(tmp_path / "models/sides/side").card.training["command"]
    assert command == (
        f"accelerate launch --multi_gpu --num_processes 2 -m composable_ebm.train {config} --cpu"
    )


def test_a_launch_that_silently_starts_one_process_is_refused_with_the_command_that_works(
    write_config, tmp_path, monkeypatch, capsys
):
    config = write_config(tmp_path, 4)
    # What `accelerate launch --cpu --num_processes 2` gives the only process that it starts.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert command_line([str(config), "--models", "here"]) == 2
    works = f"accelerate launch --multi_gpu --num_processes 2 -m composable_ebm.train {config} --cpu"
    assert works in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


# -- configs and files -----------------------------------------------------------------------------


def test_every_shipped_config_reads():
    paths = sorted((ROOT / "configs").glob("*/*.toml"))
    assert paths
    for path in paths:
        config = read_config(path)
        # A later stage, of a codec its decoder, of a base by contrast, has a file of its own.
        expected = {"decoder": "codec", "contrast": "base"}.get(path.stem, path.stem)
        assert config.name == expected.removesuffix("_full")
        # Variants that are not shipped stand in a folder of their own, and go to another place.
        shipped = config.family == path.parent.name
        assert shipped or (path.parent.name.startswith(f"{config.family}_") and config.models != "models")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise = 4", "unknown setting 'batch_sise'; did you mean 'batch_size'"),
        ("[optimiser]\nlearning_rat = 1", "did you mean 'optimiser.learning_rate'"),
        ("batch_size = 'many'", "batch_size must be int, got 'many'"),
        ("batch_size = 0", "`batch_size` must be at least 1, got 0"),
        ("objective = 3", r"objective is a table: write \[objective\]"),
        ("[objective]\nreinit_prob = 2", "`reinit_prob` must be between 0 and 1"),
        ("[sampler]\nstep_size = -1", "`step_size` of Langevin must be positive"),
        ("[data]\nsize = 64", "images of 'digits' have one size; `size` is for celeba, faces, folder"),
        ("[data]\nsize = -1", "must be at least 1 pixel, got -1"),
        ("this is not toml", "is no TOML"),
        (b"family = '\xe9'", "config.toml is no TOML: 'utf-8' codec"),
        (b"\xef\xbb\xbfbatch_size = 0\r\n", "`batch_size` must be at least 1, got 0"),
    ],
)
def test_a_config_with_a_mistake_says_where(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_the_size_of_images_reaches_the_data_sets_that_have_one(tmp_path, monkeypatch):
    for name in DATASETS:
        load = import_module(f"composable_ebm.data.{name}").load
        assert ("size" in signature(load).parameters) == (name in OF_ANY_SIZE), name
    path = tmp_path / "config.toml"
    path.write_text('data = { name = "shapes", size = 16 }')
    monkeypatch.setattr(shapes, "SIZES", dict.fromkeys(shapes.SIZES, 3))
    assert read_config(path).data.load("validation").event_shape == (3, 16, 16)
