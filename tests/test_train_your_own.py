"""A folder of pictures and a table in, experts out that everything else finds by itself."""

import csv
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from run_helpers import DATA

import composable_ebm as ceb
from composable_ebm.cli import main as command_line
from composable_ebm.data import folder
from composable_ebm.experts import Card
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.experts.networks.confined import ConfinedEnergy
from composable_ebm.train import __main__ as training
from composable_ebm.train import trainer
from composable_ebm.train.config import DataConfig, Denoiser, DiffusedPatches, GenerationConfig
from composable_ebm.train.folder import folder_config, folder_digest
from composable_ebm.train.objectives import RecoveryLikelihood
from composable_ebm.train.stages import CONTRAST, stages
from composable_ebm.train.start import start_from
from demos.mixer import mix

TABLE = "attributes.csv"
SMALL = ["--batch-size", "8", "--generation.num-steps", "10", "--generation.noise-levels", "5", "--cpu"]
NETWORK = ["network:diffused-patches", "--network.hidden", "16", "--network.components", "8"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Forty pictures by day and by night, in the working folder; not every one has a label."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my photos"
    root.mkdir()
    rows = [("file", "sky", "taken by")]
    for i in range(40):
        sky = "day" if i % 2 else "late night"
        picture = Image.new("RGB", (40, 32), (150, 200, 240) if i % 2 else (25, 30, 70))
        left, top = 5 + i % 9, 1 + 3 * (i // 9)
        ImageDraw.Draw(picture).ellipse((left, top, left + 10, top + 10), fill=(250, 230, 120))
        picture.save(root / f"{i:02}.png")
        rows.append((f"{i:02}.png", sky if i % 5 else "", f"somebody, {i}"))
    with (root / TABLE).open("w", newline="") as table:
        csv.writer(table).writerows(rows)
    return root


def train(*arguments, num_iterations=3):
    return training.main([*map(str, arguments), "--num-iterations", str(num_iterations), *SMALL, *NETWORK])


def test_from_a_folder_to_an_expert_in_the_catalogue_in_recipes_and_in_the_mixer(photos, capsys):
    assert train(photos.name) == 0
    assert train(photos.name, "sky") == 0
    printed = capsys.readouterr().out

    suggested = re.findall(r'composable-ebm sample "(.*)" --out', printed)
    assert suggested == ["my_photos/base", "my_photos/sky"]
    assert {"my_photos/base", "my_photos/sky"} <= ceb.catalogue().keys()
    expert = ceb.load_expert("my_photos/sky")
    assert expert.card.values == ("day", "late_night")
    assert expert.card.data == f"my photos/train, {folder_labelled(photos)} images"
    flags = " ".join(["--num-iterations", "3", *SMALL, *NETWORK])
    assert expert.card.training["command"] == f"composable-ebm train 'my photos' sky {flags}"

    recipe = "my_photos/base + 2*(my_photos/sky[day] - my_photos/sky[any])"
    assert command_line(["sample", recipe, "--num-chains", "2", "--out", "day.png"]) == 0
    assert Image.open("day.png").text["recipe"] == str(ceb.parse(recipe))

    assert command_line(["models"]) == 0
    assert re.search(r"my_photos/sky +sky +day, late_night", capsys.readouterr().out)

    assert {"my_photos/base", "my_photos/sky"} <= mix.controls(cards()[0]).keys()


def folder_labelled(photos):
    return len(folder.load("train", root=photos, size=8, attributes=["sky"]).where("sky"))


def test_expert_of_an_attribute_starts_from_the_base_of_its_folder(photos, monkeypatch):
    assert folder_config(photos, "sky").init == ""
    assert train(photos.name) == 0
    config = folder_config(photos, "sky")
    assert config.init == "models/my_photos/base"
    assert folder_config(photos).init == ""

    assert train(photos.name, "sky", num_iterations=1) == 0
    base, sky = (ceb.load_expert(f"my_photos/{name}").network for name in ("base", "sky"))
    torch.testing.assert_close(sky.axes, base.axes)
    assert (sky.second.weight - base.second.weight).abs().max() < 0.01


def test_folders_whose_names_become_one_word_do_not_share_an_expert(photos, capsys):
    assert train(photos.name) == 0
    other = photos.parent / "my-photos"
    shutil.copytree(photos, other)
    picture = next(path for path in sorted(other.glob("*.png")) if folder.split_of(path.name) == "train")
    Image.new("RGB", (32, 32), "red").save(picture)
    assert folder_config(other, "sky").family == "my_photos"
    assert folder_config(other, "sky").init == ""  # that base is another folder's
    before = ceb.load_expert("my_photos/base").card
    assert train(other.name) == 1
    assert "my_photos/base holds another training, with digest of the pictures" in capsys.readouterr().err
    assert ceb.load_expert("my_photos/base").card == before
    assert train(other.name, "--family", "others") == 0
    assert ceb.load_expert("others/base").card.data.startswith("my-photos/train")


def test_names_in_other_scripts_stay_apart(tmp_path):
    families = {folder_config(tmp_path / name).family for name in ("кошки", "собаки", "猫", "Żółw", "Zolw")}
    assert len(families) == 5
    assert "Zolw" in families


def test_training_goes_on_where_it_stopped(photos, capsys):
    flags = ["--save-every", "2"]
    assert training.main([photos.name, "--num-iterations", "2", *flags, *SMALL, *NETWORK]) == 0
    assert training.main([photos.name, "--num-iterations", "3", *flags, *SMALL, *NETWORK]) == 0
    assert ceb.load_expert("my_photos/base").card.training["iterations"] == 3
    assert "resuming from" in capsys.readouterr().out


def test_the_command_on_the_card_does_not_say_where_files_went(photos):
    assert train(photos.name, "--models", "here", "--runs=there", num_iterations=1) == 0
    command = ceb.load_expert("here/my_photos/base").card.training["command"]
    assert command.startswith("composable-ebm train 'my photos' --num-iterations 1 ")


@pytest.mark.slow
def test_codec_and_base_are_trained_first_and_once_where_an_attribute_is_learned_on_latents(photos, capsys):
    flags = ["--latents", "--data.size", "16", "--minutes", "0.03", "--generation.noise-levels", "5", "--cpu"]
    small = ["network:noisy-classifier", "--network.width", "8", "--network.hidden", "8"]
    assert training.main([photos.name, "sky", *flags, *small]) == 0
    assert {path.name for path in Path("models/my_photos").iterdir()} == {"codec", "base", "sky"}
    sky = ceb.load_expert("my_photos/sky")
    assert sky.card.values == ("day", "late_night")
    assert ceb.sample(sky, num_chains=2, num_steps=2).images.shape == (2, 3, 16, 16)
    capsys.readouterr()
    assert training.main([photos.name, *flags]) == 0
    said = capsys.readouterr().out
    assert "codec stays as it is, learned from my photos/train" in said
    assert said.count("my_photos/codec") == 1


def test_a_folder_is_learned_on_latents_unless_told_otherwise(tmp_path):
    def described(*flags):
        return training._described([str(tmp_path), "sky", *flags])[0]

    assert described("--minutes", "20").latents
    assert described("--latents", *NETWORK).latents
    assert not described("--no-latents").latents
    assert not described(*NETWORK).latents
    assert described().data.size == 64


def test_a_base_of_pixels_is_not_stood_on_by_an_attribute_on_latents(photos, capsys):
    assert train(photos.name, num_iterations=1) == 0
    assert training.main([photos.name, "sky", "--cpu", "--minutes", "1"]) == 1
    assert "my_photos/base is about pixels" in capsys.readouterr().err
    assert training.main([photos.name, "--no-latents", "--num-iterations", "1", *SMALL, *NETWORK]) == 0


def test_a_codec_starts_from_another_of_its_sizes_whatever_the_colours(tmp_path):
    sizes = {"widths": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1), "channels": 2}
    colour = PictureCodec((3, 16, 16), **sizes)
    made = Card(
        "toys", "codec", "codec", ("image",), (2, 2, 2), None, {**colour.options, "type": "PictureCodec"}
    )
    ceb.save_expert(tmp_path, colour, made)
    grey, same = PictureCodec((1, 32, 32), **sizes), PictureCodec((3, 16, 16), **sizes)
    for codec in (grey, same):
        start_from(codec, str(tmp_path), DATA[0])
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    wide = PictureCodec((3, 32, 32), **sizes)
    wide.load_state_dict(colour.state_dict())
    z = wide.encode(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.encode(x), z)
    torch.testing.assert_close(grey.decode(z), wide.decode(z).mean(1, keepdim=True))
    assert same.encoder[1].weight.equal(colour.encoder[1].weight)
    with pytest.raises(ValueError, match="has other sizes"):
        start_from(PictureCodec((3, 16, 16), **{**sizes, "widths": (4, 8)}), str(tmp_path), DATA[0])


def test_pictures_are_learned_at_the_size_asked_for(photos):
    assert train(photos.name, "--data.size", "16", num_iterations=1) == 0
    expert = ceb.load_expert("my_photos/base")
    assert expert.event_shape == (3, 16, 16)
    assert ceb.sample(expert, num_chains=2, num_steps=2).samples.shape == (2, 3, 16, 16)


def test_names_are_made_fit_for_recipes(tmp_path):
    config = folder_config(tmp_path / "2024 holidays!", "hair colour")
    assert (config.family, config.name, config.data.attribute) == (
        "_2024_holidays",
        "hair_colour",
        "hair colour",
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            ["yes"] * 40,
            "only the value 'yes'; an expert needs images of two or more, and an empty .* write 'no'",
        ),
        ([f"x{i}" for i in range(40)], "'sky' has another value for each of its 40 pictures"),
        (None, "unknown attribute of my photos 'sky'; did you mean 'skye'"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_training(photos, capsys, column, message):
    rows = list(csv.reader((photos / TABLE).open()))
    if column is None:
        rows[0][1] = "skye"
    else:
        rows[1:] = [[row[0], value, row[2]] for row, value in zip(rows[1:], column, strict=True)]
    with (photos / TABLE).open("w", newline="") as table:
        csv.writer(table).writerows(rows)
    assert train(photos.name, "sky") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not Path("models").exists()


def test_split_without_a_label_is_named(photos, capsys):
    rows = list(csv.reader((photos / TABLE).open()))
    rows[1:] = [[r[0], r[1] if folder.split_of(r[0]) == "train" else "", r[2]] for r in rows[1:]]
    with (photos / TABLE).open("w", newline="") as table:
        csv.writer(table).writerows(rows)
    assert train(photos.name, "sky") == 1
    assert "images of my photos/validation has a label for 'sky': add some" in capsys.readouterr().err


def test_neither_configuration_nor_folder_is_said(photos, capsys):
    assert training.main(["phots"]) == 2
    assert "no configuration and no folder of images 'phots'" in capsys.readouterr().err


def test_minutes_are_for_what_a_command_trains_itself(photos):
    command = ["my photos", "sky", "--minutes", "10"]
    config = replace(folder_config("my photos", "sky", latents=True), minutes=10)
    found = stages(config, command)
    assert [stage.name for stage in found] == ["codec", "base", "base", "sky"]
    assert [stage.minutes for stage in found] == [2, 3, 3, 2]
    codec = PictureCodec((3, 16, 16), widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), channels=2)
    base = ConfinedEnergy((2, 2, 2), hidden=8)
    facts = {"folder": folder_digest("my photos"), "command": "composable-ebm train " + shlex.join(command)}
    for name, network, latents in (("codec", codec, ""), ("base", base, "0" * 64)):
        options = {**network.options, "type": type(network).__name__}
        card = Card(
            "my_photos", name, name, ("image",), (2, 2, 2), None, options, codec=latents, training=facts
        )
        ceb.save_expert(Path("models/my_photos") / name, network, card)
    assert [stage.minutes for stage in stages(config, command)] == [2]  # given again: as long as then
    other = replace(folder_config("my photos", "taken by", latents=True), minutes=10)
    assert [stage.minutes for stage in stages(other, ["my photos", "taken by", "--minutes", "10"])] == [10]


def test_a_base_ends_with_contrast_and_its_card_says_so(photos, capsys):
    command = [photos.name, "--no-latents", "--contrast", "0.5", "--largest-gap", "1e6"]
    assert train(*command, num_iterations=4) == 0
    base = ceb.load_expert("my_photos/base")
    training = base.card.training
    assert "unfinished" not in training
    assert training["objective"] == "ContrastiveOverLevels"
    assert training["first_stage"]["objective"] == "DenoisingScoreMatching"
    assert (training["first_stage"]["iterations"], training["iterations"]) == (2, 2)
    assert (Path("runs/contrast/my_photos/base") / "verdict.txt").exists()
    capsys.readouterr()
    assert train(*command, num_iterations=4) == 0
    assert "this training is finished, after 2 iterations: nothing was done" in capsys.readouterr().out
    assert ceb.load_expert("my_photos/base").card == base.card


def two_stages():
    config = replace(folder_config("my photos"), num_iterations=4, batch_size=8, contrast=0.5, cpu=True)
    config = replace(config, generation=GenerationConfig(num_steps=10, noise_levels=5))
    return replace(config, network=DiffusedPatches(hidden=16, components=8))


def test_contrast_that_diverges_leaves_what_the_first_stage_has_learned(photos, capsys):
    first, last = stages(two_stages())
    scored = trainer.train(first, to_come=CONTRAST)
    left = trainer.train(replace(last, largest_gap=1e-6))  # every gap is one too many
    printed = capsys.readouterr().out
    assert "it ends here; what its first stage learned stays" in printed
    assert "verdict:" in printed
    training = left.card.training
    assert (training["first_stage"]["iterations"], training["iterations"]) == (2, 0)
    assert "unfinished" not in training
    for before, after in zip(scored.network.parameters(), left.network.parameters(), strict=True):
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)  # they were stored in 16 bits


def test_a_first_stage_that_started_from_the_base_is_the_first_stage_all_the_same(photos):
    assert train(photos.name, "--no-latents", num_iterations=2) == 0
    command = [photos.name, "sky", "--no-latents", "--contrast", "0.5", "--largest-gap", "1e6"]
    assert train(*command, num_iterations=4) == 0
    base, sky = (ceb.load_expert(f"my_photos/{name}").card for name in ("base", "sky"))
    assert sky.training["first_stage"]["objective"] == "DenoisingScoreMatching"
    assert sky.training["started_from"] != base.weights["sha256"]  # but the weights of its first stage


def test_a_training_stopped_between_its_stages_goes_on_with_the_second(photos):
    config = two_stages()
    first, last = stages(config)
    trainer.train(first, to_come=CONTRAST)
    assert ceb.load_expert("my_photos/base").card.training["unfinished"] == CONTRAST
    assert stages(config) == [last]
    assert stages(replace(config, fresh=True)) == [replace(s, fresh=True) for s in (first, last)]
    with pytest.raises(ValueError, match="has two stages"):
        trainer.train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast": 1.0}, "`contrast` must be at least 0 and less than 1, got 1.0"),
        ({"contrast": 0.5, "network": Denoiser()}, r"leave it out \(--contrast 0\)"),
        ({"contrast": 0.5, "objective": RecoveryLikelihood()}, "leave it out"),
        ({"contrast": 0.5, "data": DataConfig()}, "a configuration of its own"),
    ],
)
def test_a_contrastive_end_is_refused_where_there_can_be_none(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(folder_config("my photos"), **changes)


def test_experts_of_a_folder_on_latents_choose_from_three_particles_a_chain():
    for attribute in ("", "sky"):
        stored = folder_config("my photos", attribute, latents=True).sampler_settings["particles"]
        assert (stored["per_chain"], stored["surest"], stored["verdict"]) == (3.0, True, True)
    assert "particles" not in folder_config("my photos").sampler_settings
