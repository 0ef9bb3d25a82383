"""Teaching an expert from a handful of marked pictures."""

import shutil
from pathlib import Path

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.experts.store import load_folder, save_expert
from composable_ebm.experts.teach import Lesson, teach
from composable_ebm.sampling import Annealed
from composable_ebm.sampling.request import calibrated_sampler

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def faces():
    return load_data("faces", "test", num_images=300)


@pytest.fixture(scope="module")
def base():
    return ceb.load_expert("faces/base")


def marked(data, attribute, count, seed=0):
    """(yes, no, all others, their labels)"""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    labels = data.labels[attribute][order]
    yes, no = (order[labels == value][:count] for value in (1, 0))
    rest = torch.tensor([i for i in order.tolist() if i not in {*yes.tolist(), *no.tolist()}])
    return data.batch(yes), data.batch(no), data.batch(rest), data.labels[attribute][rest]


def accuracy(expert, x, labels, level=None):
    chosen = expert.network(x, level).argmin(1)
    return float((chosen == labels).float().mean())


def test_an_expert_taught_from_twelve_and_twelve_knows_pictures_it_has_not_seen(faces, base):
    yes, no, rest, labels = marked(faces, "curly", 12)
    curly = teach(base, "curls", yes, no)
    told = curly.card.metrics
    assert accuracy(curly, rest, labels) > 0.85
    noisy = rest + torch.randn(rest.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy(curly, noisy, labels, torch.tensor(1.0)) > 0.8  # through noise as large as the picture
    assert told["heldout_low"] < told["heldout_accuracy"] < told["heldout_high"] <= 1
    assert abs(told["heldout_accuracy"] - accuracy(curly, rest, labels)) < 0.2
    assert curly.card.training["seconds"] < 10


def test_small_things_are_learned_from_twelve_and_twelve_too(faces, base):
    yes, no, rest, labels = marked(faces, "smile", 12)
    glad = teach(base, "glad", yes, no)
    assert accuracy(glad, rest, labels) > 0.8
    judged = ceb.load_expert("faces/smile")
    samples = ceb.sample(ceb.given(base, glad), num_chains=16, num_steps=40, seed=0).samples
    assert (judged.network(samples, None).argmin(1) == 1).float().mean() > 0.7


def test_more_marks_make_it_surer(faces, base):
    found = []
    for count in (4, 24):
        yes, no, rest, labels = marked(faces, "beard", count, seed=1)
        found.append(accuracy(teach(base, "bearded", yes, no), rest, labels))
    assert found[1] > found[0] + 0.05
    assert found[1] > 0.85


def test_it_composes_and_is_saved_as_any_other(faces, base, tmp_path):
    yes, no, *_ = marked(faces, "grey_hair", 12)
    grey = teach(base, "silver", yes, no, Lesson(copies=8))
    x = faces.batch(torch.arange(4))
    level = torch.tensor(0.1)
    assert grey["any"] is base  # its density stands still
    likely = torch.stack([base(x, noise_level=level) - e(x, noise_level=level) for e in (grey, ~grey)]).exp()
    assert torch.allclose(likely.sum(0), torch.ones(4), atol=1e-2)  # -log p(y | x)
    mix = ceb.given(base, grey, ceb.load_expert("faces/smile"))
    out = ceb.sample(mix, num_chains=4, num_steps=40, seed=0)
    shutil.copytree(MODELS / "faces/base", tmp_path / "faces/base")  # what it stands on
    judged = ceb.load_expert("faces/grey_hair").network(out.samples, None).argmin(1)
    assert judged.float().mean() >= 0.5
    save_expert(tmp_path / "faces/silver", grey.network, grey.card)
    again = load_folder(tmp_path / "faces/silver")
    assert torch.equal(again(x), grey(x))
    assert str(again) == "faces/silver"
    assert again.card.data == "12 pictures marked yes and 12 marked no"


def test_the_same_marks_teach_the_same(faces, base):
    yes, no, *_ = marked(faces, "smile", 4)
    first, second = (teach(base, "glad", yes, no, Lesson(copies=4)) for _ in range(2))
    assert torch.equal(first.network.weight, second.network.weight)


def test_what_cannot_be_taught_is_refused(faces, base):
    yes, no, *_ = marked(faces, "smile", 3)
    with pytest.raises(ValueError, match="`yes` must hold 3 pictures at least, got 2"):
        teach(base, "glad", yes[:2], no)
    with pytest.raises(ValueError, match=r"`no` must have shape \(n, \*\(3, 32, 32\)\)"):
        teach(base, "glad", yes, no[:, :1])
    with pytest.raises(ValueError, match="named by letters"):
        teach(base, "so glad", yes, no)
    with pytest.raises(ValueError, match="nothing to teach beside"):
        teach(ceb.load_expert("faces/smile"), "glad", yes, no)


def test_latents_are_learned_from_what_the_decoder_sees_and_pictures_that_nobody_marked(tmp_path):
    """The trained expert says what has glasses; twelve and twelve marks of it reach most of what it knows."""
    base, judge = (ceb.load_expert(f"portraits/{name}") for name in ("base", "glasses"))
    sampler, _ = calibrated_sampler(base)
    plain = Annealed(sampler.kernel, sampler.schedule)
    drawn = ceb.sample(base, num_chains=192, num_steps=12, sampler=plain, seed=0).samples
    labels = judge.network(drawn, torch.tensor(0.1)).argmin(1)
    yes, no = (drawn[labels == value] for value in (1, 0))
    specs = teach(base, "specs", yes[:12], no[:12], unmarked=drawn)
    rest, truth = torch.cat([yes[12:], no[12:]]), torch.tensor([1] * len(yes[12:]) + [0] * len(no[12:]))
    assert accuracy(specs, rest, truth) > 0.8
    noisy = rest + torch.randn(rest.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy(specs, noisy, truth, torch.tensor(1.0)) > 0.75
    assert specs.card.metrics["heldout_accuracy"] > 0.7
    x, level = rest[:4], torch.tensor(0.4)
    close = {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(specs["any"](x, noise_level=level), base(x, noise_level=level), **close)
    assert specs.network.axes.data_ptr() == base.network.axes.data_ptr()  # held once for all who are taught
    shutil.copytree(MODELS / "portraits/codec", tmp_path / "portraits/codec")
    save_expert(tmp_path / "portraits/specs", specs.network, specs.card)
    assert torch.equal(load_folder(tmp_path / "portraits/specs")(x), specs(x))
    with pytest.raises(ValueError, match="`unmarked` must have shape"):
        teach(base, "specs", yes[:3], no[:3], unmarked=drawn[:, :2])
