"""A run is its own: what it goes on from, what it refuses, and what a cut file or a full disk costs."""

import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_helpers import DATA, run, small, squares, weights
from safetensors.torch import save

import composable_ebm as ceb
from composable_ebm.train import Trainer
from composable_ebm.train.checkpoint import checkpoints
from composable_ebm.train.config import ConvEnergy, DataConfig, DiffusedEnergy, PictureCodec
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel, DenoisingScoreMatching
from composable_ebm.train.objectives.reconstruction import Reconstruction
from composable_ebm.train.stopping import TrainingStoppedError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small()


# -- whose run it is -------------------------------------------------------------------------------


def test_the_same_training_again_is_finished_and_does_nothing(config, capsys):
    first, _ = run(config)
    written = (config.model_folder / "model.safetensors").stat().st_mtime_ns
    again, _ = run(config)
    assert "this training is finished, after 8 iterations" in capsys.readouterr().out
    assert weights(again).equal(weights(first))
    assert (config.model_folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_finished_codec_is_recognised(config, capsys):
    sizes = PictureCodec(channels=2, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    codec = replace(
        config, name="codec", data=DataConfig(), network=sizes, objective=Reconstruction(), num_iterations=2
    )
    data = squares(0, size=16), squares(1, size=16)
    run(codec, data)
    written = (codec.model_folder / "model.safetensors").stat().st_mtime_ns
    run(codec, data)
    assert "this training is finished, after 2 iterations" in capsys.readouterr().out
    assert (codec.model_folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_finished_training_whose_expert_is_gone_writes_it_again(config):
    first, _ = run(config)
    (config.model_folder / "model.safetensors").unlink()
    run(config)
    assert weights(ceb.load_expert(config.model_folder)).equal(weights(first))


def test_more_iterations_go_on_and_places_may_move(config, capsys):
    run(config)
    _, longer = run(replace(config, num_iterations=12, save_every=3, licence="CC0"))
    assert longer.step == 12
    assert "to 12 iterations instead of 8 iterations" in capsys.readouterr().out


OTHERS = {
    "network": ({"network": ConvEnergy(widths=(4, 4), hidden=16)}, r"network\.hidden = 8 \(now 16\)"),
    "objective": ({"objective": DenoisingAtOneLevel()}, r"objective\.type = 'ContrastiveDivergence'"),
    "setting of it": ({"objective": ContrastiveDivergence(cd_steps=3)}, r"objective\.cd_steps = 2 \(now 3\)"),
    "seed": ({"seed": 1}, r"seed = 0 \(now 1\)"),
    "batch": ({"batch_size": 16}, r"batch_size = 8 \(now 16\)"),
}


@pytest.mark.parametrize(("changes", "named"), OTHERS.values(), ids=OTHERS)
def test_a_run_with_other_settings_is_refused_by_name(config, changes, named):
    run(config)
    with pytest.raises(ValueError, match=named + ".*--fresh"):
        run(replace(config, num_iterations=12, **changes))


OTHER_DATA = {
    "renamed value": ((squares(0, values=("links", "right")), DATA[1]), r"values = \['left', 'right'\]"),
    "added picture": ((squares(0, count=65), DATA[1]), r"pictures = 64 \(now 65\)"),
    "other pictures": ((squares(2), DATA[1]), "digest of the pictures and their labels"),
    "other held-out pictures": ((DATA[0], squares(3)), "digest of the pictures and their labels"),
}


@pytest.mark.parametrize(("data", "named"), OTHER_DATA.values(), ids=OTHER_DATA)
def test_a_run_on_other_data_is_refused_by_name(config, data, named):
    before, _ = run(config)
    with pytest.raises(ValueError, match=named):
        run(replace(config, num_iterations=12), data)
    assert weights(ceb.load_expert(config.model_folder)).equal(weights(before))


def test_fresh_throws_the_other_training_away(config):
    run(config)
    other = replace(config, seed=1)
    anew, trainer = run(replace(other, fresh=True))
    assert trainer.step == 8
    assert weights(anew).equal(weights(run(replace(other, name="elsewhere"))[0]))


def test_an_expert_of_other_pictures_is_not_written_over(config):
    before, _ = run(config)
    elsewhere = replace(config, runs="other_runs")
    with pytest.raises(ValueError, match=r"holds an expert that was trained on other pictures \(squares"):
        run(elsewhere, (squares(2), DATA[1]))
    assert weights(ceb.load_expert(config.model_folder)).equal(weights(before))
    run(replace(elsewhere, fresh=True), (squares(2), DATA[1]))
    assert not weights(ceb.load_expert(config.model_folder)).equal(weights(before))


def test_another_expert_to_start_from_is_another_run(config):
    for seed in (1, 2):
        run(replace(config, name=f"base{seed}", seed=seed))
    run(replace(config, init="squares/base1"))
    with pytest.raises(ValueError, match="digest of the expert it starts from"):
        run(replace(config, init="squares/base2", num_iterations=12))


def test_a_base_of_another_size_or_network_is_refused_not_half_loaded(config):
    base = replace(
        config,
        name="base",
        data=DataConfig(),
        network=DiffusedEnergy(hidden=8, components=4),
        objective=DenoisingScoreMatching(),
        num_iterations=1,
    )
    run(base)
    start = replace(base, name="side", data=config.data, init="squares/base")
    with pytest.raises(ValueError, match=r"base is an expert of images 1×8×8.*1×16×16.*--data.size 8"):
        run(start, (squares(0, size=16), squares(1, size=16)))
    with pytest.raises(ValueError, match=r"modulate.weight has the shape \(96, 64\).*is \(48, 64\) there"):
        run(replace(start, network=DiffusedEnergy(hidden=16, components=4)))
    with pytest.raises(ValueError, match=r"`init`: no expert named 'squares/bas'.*Did you mean squares/base"):
        run(replace(start, init="squares/bas"))
    run(start)  # the same with values


def test_a_network_that_does_not_fit_into_memory_is_refused_before_it_is_built(config):
    huge = replace(config, network=ConvEnergy(widths=(100_000, 100_000), hidden=8))
    with pytest.raises(ValueError, match=r"million weights for images 1×8×8.* GB where .* free.*--data.size"):
        run(huge)


def test_an_expert_that_is_not_finite_is_neither_written_nor_read(config):
    expert, _ = run(config)
    state = {
        n: v.clone(memory_format=torch.contiguous_format) for n, v in expert.network.state_dict().items()
    }
    first = next(iter(state))
    state[first].fill_(float("nan"))
    expert.network.load_state_dict(state)
    with pytest.raises(ValueError, match=rf"squares/side is not finite in {first}, so it is not written"):
        ceb.save_expert(config.model_folder, expert.network, expert.card)
    content = save(state)
    (config.model_folder / "model.safetensors").write_bytes(content)
    card = json.loads((config.model_folder / "config.json").read_text())
    card["weights"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    card.pop("digest", None)
    (config.model_folder / "config.json").write_text(json.dumps(card))
    with pytest.raises(ceb.CheckpointError, match="weights that are no numbers"):
        ceb.load_expert(config.model_folder)


# -- files that were cut, changed, or in use --------------------------------------------------------


def test_a_cut_last_line_of_metrics_does_not_stop_a_resume(config):
    run(config)
    metrics = config.run_folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    run(replace(config, num_iterations=12))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 12


def flip_a_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank0.safetensors", "state.json"])
def test_a_changed_checkpoint_is_passed_over_for_the_one_before(config, name, capsys):
    whole, _ = run(config)
    newest, before = checkpoints(config.run_folder / "checkpoints")
    flip_a_bit(newest / name)
    (config.model_folder / "model.safetensors").unlink()
    resumed, _ = run(config)
    said = capsys.readouterr().out
    assert re.search(rf"passed over a damaged checkpoint: .*{newest.name}/{name} (was|cannot be)", said)
    assert f"resuming from {before}" in said
    assert weights(resumed).equal(weights(whole))


def test_a_step_of_a_billion_is_not_believed(config):
    run(config)
    newest, _ = checkpoints(config.run_folder / "checkpoints")
    facts = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**facts, "step": 10**9}))
    _, trainer = run(replace(config, num_iterations=12))
    assert trainer.step == 12


def test_a_run_without_a_whole_checkpoint_is_refused(config):
    run(config)
    for path in checkpoints(config.run_folder / "checkpoints"):
        (path / "rank0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*rank0.* cannot be read.*--fresh"):
        run(replace(config, num_iterations=12))


def test_two_trainings_do_not_share_a_folder(config):
    second = Trainer(config, data=DATA)
    first = Trainer(config, data=DATA)
    first.folder.enter()
    try:
        with pytest.raises(ValueError, match=rf"another training works in .* \(process {os.getpid()}\)"):
            second.run()
    finally:
        first.folder.leave()
    second.run()


def test_what_a_killed_training_left_behind_is_cleared_away(config):
    run(config)
    left = [
        config.model_folder / ".model.safetensors.x1y2",
        config.model_folder / ".config.json.z",
        config.run_folder / "checkpoints/.step-0000012/rank0.safetensors",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    run(replace(config, num_iterations=12))
    assert not any(path.exists() for path in left)
    assert sorted(path.name for path in config.model_folder.iterdir()) == [
        *("config.json", "metrics.jsonl", "model.safetensors"),
    ]


def test_only_the_newest_checkpoints_are_kept(config):
    run(replace(config, num_iterations=12))
    kept = [path.name for path in checkpoints(config.run_folder / "checkpoints")]
    assert kept == ["step-0000012", "step-0000008"]


# -- stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_a_training_that_is_asked_to_stop_says_where_and_goes_on_as_if_not(config, number):
    config = replace(config, num_iterations=100, save_every=50)
    whole, _ = run(replace(config, name="whole"))
    trainer = Trainer(config, data=DATA)
    threading.Thread(target=_signal_after, args=(trainer, 3, number), daemon=True).start()
    with pytest.raises(TrainingStoppedError) as caught:
        trainer.run()
    said = str(caught.value)
    assert re.search(r"squares/side stopped at iteration (\d+) of 100", said)
    assert f"goes on from iteration {trainer.step}, as if" in said
    assert caught.value.signal_number == number
    assert 3 <= trainer.step < 100
    resumed, _ = run(config)
    assert weights(resumed).equal(weights(whole))


def _signal_after(trainer, step, number):
    while trainer.step < step:
        time.sleep(0.001)
    os.kill(os.getpid(), number)


def write_pictures(root):
    for i in range(40):
        picture = Image.new("L", (8, 8), 5 * i)
        picture.paste(255, (0, 0, 4, 8) if i % 2 else (4, 0, 8, 8))
        path = root / ("left" if i % 2 else "right") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def test_a_full_disk_is_said_and_the_checkpoint_before_serves(config, monkeypatch):
    run(config)
    before = checkpoints(config.run_folder / "checkpoints")

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    longer = replace(config, num_iterations=12)
    with monkeypatch.context() as disk:
        disk.setattr("composable_ebm.train.checkpoint.write_atomic", full)
        with pytest.raises(OSError, match=r"no room left.*after iteration 8: make"):
            run(longer)
    assert checkpoints(config.run_folder / "checkpoints") == before
    assert not list((config.run_folder / "checkpoints").glob(".*"))
    assert run(longer)[1].step == 12


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(config, tmp_path):
    write_pictures(tmp_path / "pictures")
    flags = "--data.size 8 --batch-size 4 --save-every 2 --evaluate-every 100 --generation.num-steps 3 --cpu"
    network = "network:conv-energy --network.widths 4 4 --network.hidden 8 objective:denoising-at-one-level"
    command = [sys.executable, "-m", "composable_ebm.train", "pictures", "class"]

    def train(iterations, room=None):
        def limit():  # files of at most so many bytes stand in for a full disk
            if room:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        arguments = [*command, "--num-iterations", str(iterations), *flags.split(), *network.split()]
        return subprocess.run(arguments, env=environment, preexec_fn=limit, capture_output=True, text=True)

    assert train(2).returncode == 0
    before = checkpoints(tmp_path / "runs/pictures/class/checkpoints")
    full = train(4, room=5_000)
    assert full.returncode == 1
    assert "there is no room left to write to" in full.stderr
    assert "what came after iteration 2: make room" in full.stderr
    assert "Traceback" not in full.stderr
    assert checkpoints(tmp_path / "runs/pictures/class/checkpoints") == before
    assert train(4).returncode == 0
