"""Evaluation: figures against known answers, requests and compositions against their definitions."""

import math
from collections import Counter

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.evaluation import judge as judges
from composable_ebm.evaluation.composition import compose
from composable_ebm.evaluation.detection import auroc
from composable_ebm.evaluation.judge import KINDS, Judge, load_judge
from composable_ebm.evaluation.metrics import (
    entropy,
    frechet_distance,
    kolmogorov_smirnov,
    nearest_distance,
    precision_recall,
    wilson_interval,
)
from composable_ebm.evaluation.rows import right
from composable_ebm.evaluation.task import requests

SHAPE = (1, 8, 8)


def expert(name: str, *values: str) -> ceb.Expert:
    network = ceb.experts.ConvEnergy(SHAPE, len(values), widths=(4, 4), hidden=8)
    return ceb.Expert.standing(network, ceb.Card("toy", name, name, values, SHAPE, (-1.0, 1.0), {}))


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return {"side": expert("side", "left", "right"), "size": expert("size", "s", "m", "l")}


# -- figures ---------------------------------------------------------------------------------------


def test_wilson_interval_matches_the_published_example():
    # 81 of 263: Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40_000, 2, generator=generator) * torch.tensor([1.0, 2.0])
    b = torch.randn(40_000, 2, generator=generator) * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, 0.0])
    # Diagonal covariances: ‖Δμ‖² + Σ (σ_a - σ_b)²
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 2.25, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_tell_poor_samples_from_narrow_ones():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(600, 2, generator=generator)
    narrow, wide = (
        0.2 * torch.randn(600, 2, generator=generator),
        6 * torch.randn(600, 2, generator=generator),
    )
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.95
    assert recall < 0.3
    precision, recall = precision_recall(real, wide)
    assert precision < 0.4
    assert recall > 0.5


def test_nearest_distance_is_zero_for_a_copy_and_the_norm_otherwise():
    reference = torch.zeros(3, *SHAPE)
    reference[1] = 1
    x = torch.cat([reference[1:2], torch.full((1, *SHAPE), 0.25)])
    assert nearest_distance(x, reference).tolist() == pytest.approx([0, 0.25 * 8])


def test_entropy_of_a_fair_coin_is_log_two():
    assert entropy(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(math.log(2))


def test_kolmogorov_smirnov_is_the_largest_gap_between_the_steps():
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.5, 3.5])
    assert kolmogorov_smirnov(a, b) == 0.5
    assert kolmogorov_smirnov(a, a) == 0
    assert kolmogorov_smirnov(a, a + 10) == 1


def test_auroc_is_the_share_of_ordered_pairs():
    positive, negative = torch.tensor([3.0, 2.0, 2.0]), torch.tensor([1.0, 2.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(float(sum(pairs)) / 6)


# -- requests --------------------------------------------------------------------------------------


def test_requests_cover_every_subset_evenly_and_every_value():
    askable = {"a": (0, 1), "b": (0, 1), "c": (0, 1, 2)}
    asked = requests(askable, 2, 100, torch.Generator().manual_seed(0))
    counts = Counter(tuple(request) for request in asked)
    assert sorted(counts) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {request["c"] for request in asked if "c" in request} == {0, 1, 2}


def test_right_needs_every_value_asked_for():
    seen = {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([1, 1, -1])}
    asked = [{"a": 0, "b": 1}, {"a": 0}, {"a": 1, "b": 0}]
    assert right(seen, asked).tolist() == [True, False, False]


def test_the_sum_form_adds_experts_and_the_ratio_form_counts_the_base_once(experts):
    terms = {name: {i: e[v] for i, v in enumerate(e.card.values)} for name, e in experts.items()}
    request, base = {"side": 1, "size": 2}, expert("base", "image")
    right_side, large = experts["side"]["right"], experts["size"]["l"]
    x = torch.rand(3, *SHAPE)
    plain = compose("sum", request, terms, base, 2.0)
    assert torch.allclose(plain(x), right_side(x) + large(x))
    ratio = compose("ratio", request, terms, base, 2.0)
    log_p = [experts[n]["any"](x) - e(x) for n, e in (("side", right_side), ("size", large))]
    assert torch.allclose(ratio(x), base(x) - 2 * sum(log_p), atol=1e-5)
    taste = compose("weight 3", request, terms, base)
    assert torch.allclose(taste(x), base(x) - 3 * sum(log_p), atol=1e-5)
    # Without a base, the last attribute brings p(x) along.
    carried = compose("ratio", request, terms, None, 1.0)
    assert torch.allclose(carried(x), large(x) - log_p[0], atol=1e-5)
    with pytest.raises(ValueError, match="`form` must be one of ratio, chains, weight 3, sum"):
        compose("base ratio", request, terms, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_learns_what_it_is_shown(kind):
    torch.manual_seed(0)
    labels = torch.randint(2, (64,))
    x = torch.where(labels[:, None, None, None] == 1, 1.0, -1.0) * torch.rand(64, *SHAPE)
    judge = Judge(SHAPE, {"bright": ("no", "yes")}, kind)
    optimiser = torch.optim.Adam(judge.parameters(), 3e-3)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(judge(x)["bright"], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert judge.labels(x)["bright"].equal(labels)
    assert judge.features(x).shape == (64, 128)


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_of_large_pictures_knows_them_shifted_softened_and_mirrored(kind, tmp_path, monkeypatch):
    """A bright square high or low, anywhere along the row; its training is cut to a few seconds."""
    generator = torch.Generator().manual_seed(0)

    def squares(name, split, root):
        low = torch.randint(2, (200,), generator=generator)
        images = torch.zeros(200, 1, 40, 40, dtype=torch.uint8)
        for image, row, column in zip(images, low.tolist(), torch.randint(28, (200,)).tolist(), strict=True):
            image[0, 4 + 20 * row : 16 + 20 * row, column : column + 12] = 255
        return LabelledImages(images, {"low": low}, {"low": ("no", "yes")}, f"{name}/{split}")

    monkeypatch.setattr(judges, "load_data", squares)
    monkeypatch.setitem(judges.LARGE, "iterations", 40)
    judge, accuracy = load_judge("portraits", kind, cache=tmp_path)
    assert accuracy["low"] == 1
    again, _ = load_judge("portraits", kind, cache=tmp_path)
    x = torch.rand(4, 1, 40, 40)
    assert torch.equal(judge.features(x), again.features(x))


def test_an_unknown_kind_of_judge_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of convolutional, mixer, got 'tree'"):
        Judge(SHAPE, {"a": ("b", "c")}, "tree")
