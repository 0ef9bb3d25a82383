"""Every part of the evaluation on a family whose answers are known."""

import json
import math
from dataclasses import replace

import pytest
import torch
import toy_task

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.data.combinations import satisfying
from composable_ebm.evaluation import choice, family, rivals
from composable_ebm.evaluation.agreement import agreement, stability
from composable_ebm.evaluation.choice import alternatives, negation
from composable_ebm.evaluation.composition import sample_row
from composable_ebm.evaluation.diversity import diversity, marginals, matched
from composable_ebm.evaluation.family import Evaluation, Progress, evaluate_family
from composable_ebm.evaluation.report import curve, table
from composable_ebm.evaluation.rows import bounds, evaluate_row
from composable_ebm.evaluation.task import held_out_combinations, requests, task_of

JUDGE = toy_task.Measure()


@pytest.fixture(scope="module")
def pool():
    return toy_task.images()


@pytest.fixture
def task():
    return toy_task.task()


# -- requests, seen and held out -------------------------------------------------------------------


def test_held_out_requests_ask_for_all_of_the_combination():
    askable = dict.fromkeys("abcde", (0, 1))
    asked = requests(askable, 4, 60, torch.Generator().manual_seed(0), held_out=[{"b": 1, "d": 0}])
    assert all(r["b"] == 1 and r["d"] == 0 and len(r) == 4 for r in asked)
    assert {n for r in asked for n in r} == set("abcde")
    assert requests(askable, 1, 60, torch.Generator(), held_out=[{"b": 1, "d": 0}]) == []


def test_requests_of_more_subsets_than_samples_take_random_ones():
    asked = requests({f"at_{i}": (1,) for i in range(16)}, 5, 200, torch.Generator().manual_seed(0))
    assert all(len(r) == 5 and set(r.values()) == {1} for r in asked)
    assert len({n for r in asked for n in r}) == 16


def test_a_combination_is_held_out_if_every_card_says_so():
    cards = [
        toy_task.expert("left").card,
        ceb.Card("a", "b", "c", ("d",), (1,), (0, 1), {}, training={"data": {"exclude": ["x+y", "z"]}}),
        ceb.Card("a", "b", "c", ("d",), (1,), (0, 1), {}, training={"exclude": ["x+y"]}),
    ]
    assert held_out_combinations(cards[1:]) == ["x+y"]
    assert held_out_combinations(cards) == []


def test_rows_are_split_into_combinations_seen_and_held_out(pool):
    task = toy_task.task(held_out=[{"left": 1, "right": 1}])
    asked = requests(task.askable, 2, 80, torch.Generator().manual_seed(0))
    row = sample_row("ratio", asked, task, None, seed=0)
    found = evaluate_row(row, task, {"measure": JUDGE}, pool, task.seen_in_training(pool))
    held_out = sum(r == {"left": 1, "right": 1} for r in asked)
    assert found["held_out_measure"]["samples"] == held_out > 0
    assert found["seen_measure"]["samples"] == 80 - held_out
    assert found["accuracy_measure"]["value"] > 0.95
    # 20 steps, 20 predictor steps and the start; a request of 20 chains is drawn from 32 particles.
    assert 41 < found["evaluations"] <= 41 * 32 / 18
    assert not satisfying({"left": 1, "right": 1}, task.seen_in_training(pool)).any()


# -- the table's bounds and its figures ------------------------------------------------------------


def test_real_images_score_everything_when_asked_for_what_they_have_and_chance_otherwise(task, pool):
    ceiling, floor = bounds(JUDGE, task, pool)
    assert ceiling == {"1": 1.0, "2": 1.0}
    assert floor["1"] == pytest.approx(0.5, abs=0.06)
    assert floor["2"] == pytest.approx(0.25, abs=0.06)


def test_matched_images_satisfy_the_requests_and_serve_once(pool):
    asked = requests({"left": (0, 1), "right": (0, 1)}, 2, 200, torch.Generator().manual_seed(0))
    rows, first, second = matched(asked, pool, torch.Generator().manual_seed(0))
    assert len(rows) == 200
    assert len(torch.cat([first, second]).unique()) == 400
    for row, *both in zip(rows.tolist(), first.tolist(), second.tolist(), strict=True):
        assert all(int(pool.labels[n][i]) == v for i in both for n, v in asked[row].items())


def test_requests_do_not_leave_others_what_they_have_not_taken(pool):
    """When each image served once, those on the right were used up before any side was asked for alone."""
    share = float(pool.labels["right"][satisfying({"left": 1}, pool)].float().mean())
    asked = [{"left": 1}] * 100 + [{"left": 1, "right": 1}] * 60
    rows, first, second = matched(asked, pool, torch.Generator().manual_seed(0))
    alone = rows < 100
    seen = pool.labels["right"][torch.cat([first[alone], second[alone]])].float().mean()
    assert float(seen) == pytest.approx(share, abs=0.1)
    assert len(rows) == 160
    others = first[~alone]
    assert len(set(others.tolist()) & set(first[alone].tolist())) < len(others)  # drawn anew for each request


def test_requests_without_two_real_images_are_left_out():
    few = toy_task.images(count=10)
    fitting = int(satisfying({"left": 1}, few).sum())
    rows, first, second = matched([{"left": 1}] * 20, few, torch.Generator().manual_seed(0))
    assert 0 < len(rows) <= fitting // 2
    assert len(torch.cat([first, second]).unique()) == 2 * len(rows)
    assert "fid_attr" not in diversity(torch.zeros(20, *toy_task.SHAPE), [{"left": 1}] * 20, JUDGE, few)


def test_real_images_are_as_far_from_real_images_as_the_reference_says(pool):
    other = toy_task.images(seed=1)
    asked = [{"left": int(other.labels["left"][i])} for i in range(300)]
    x = other.batch(torch.arange(300))
    found = diversity(x, asked, JUDGE, pool, train=other)
    assert 0.2 < found["fid_attr_ratio"] < 5
    assert found["precision"] > 0.9
    assert found["duplicates"] > 0.9  # in four pixels everything is closer than 1
    assert found["nearest_training_image"]["samples"]["median"] == 0
    assert found["nearest_training_image"]["held_out"]["median"] > 0
    # The same values without their variety are further away.
    narrow = diversity(x.sign() * toy_task.CENTRE, asked, JUDGE, pool)
    assert narrow["fid_attr_ratio"] > 3 * found["fid_attr_ratio"]


def test_marginals_are_those_of_real_images_of_the_same_requests(pool):
    asked = [{"left": 1}] * 200
    seen = {"left": torch.ones(200, dtype=torch.int64), "right": torch.arange(200) % 4 // 3}
    found = marginals(seen, asked, JUDGE, pool, ["left", "right"])
    assert set(found) == {"right"}
    assert found["right"]["shares"] == [0.75, 0.25]
    assert found["right"]["largest_difference"] == pytest.approx(0.25, abs=0.08)
    assert found["right"]["entropy_data"] == pytest.approx(math.log(2), abs=0.02)
    # Labels that only one value has: the judge sees the other in the rest, as it does in samples.
    right = pool.labels["right"]
    bare = replace(pool, labels={**pool.labels, "right": torch.where(right == 1, -1, right)})
    assert marginals(seen, asked, JUDGE, bare, ["right"]) == {"right": found["right"]}


# -- NOT and OR ----------------------------------------------------------------------------------


def test_what_is_denied_is_absent(task):
    found = negation(task, JUDGE, samples=60, seed=0)
    assert found["~b"]["value"] > 0.95
    assert found["a, ~b"]["value"] > 0.9
    assert found["a / p(b|x)"]["value"] > 0.9
    assert set(found) == {"~b", "a - b", "a / p(b|x)", "a, ~b"}


def test_a_calibrated_or_has_the_proportions_asked_for(task, monkeypatch):
    pair = ({"left": 1, "right": 0}, {"left": 0, "right": 1})
    monkeypatch.setitem(choice.ALTERNATIVES, "folder", (pair,))
    # Each component brings one network in, with constants of its own at every noise level.
    plain = {"left": toy_task.expert("left"), "right": toy_task.expert("right", offset=4.0)}

    def component(form, request, terms, base, weight=1.0):
        (name,) = [n for n, v in request.items() if v]
        (other,) = set(plain) - {name}
        return plain[name]["bright"] + task.terms[other][0] - task.experts[other]["any"]

    monkeypatch.setattr(choice, "compose", component)
    monkeypatch.setattr(choice, "PROPORTIONS", (0.5,))
    monkeypatch.setattr(choice, "CALIBRATION_CHAINS", 1000)
    found = {r["method"]: r for r in alternatives(task, JUDGE, samples=1000, seed=0)}
    assert abs(found["random choice"]["error_points"]) < 4
    assert abs(found["calibrated"]["error_points"]) < 6
    assert abs(found["uncalibrated"]["error_points"]) > 15
    assert found["calibrated"]["accuracy"]["value"] > 0.95


# -- temperature -----------------------------------------------------------------------------------


def test_exact_energies_are_calibrated_and_energies_at_another_temperature_are_not(pool):
    right = agreement(toy_task.task(), "base", JUDGE, pool, chains=100, seed=0)
    assert right["calibrated"]
    assert right["ks_samplers"] < 0.3
    wrong = agreement(toy_task.task(factor=12.0), "base", JUDGE, pool, chains=100, seed=0)
    assert not wrong["calibrated"]
    assert wrong["runs"]["MALA from data"]["ks"] > 0.5
    assert right["quantiles"]["data"] == sorted(right["quantiles"]["data"])


def test_longer_runs_of_an_exact_expert_stay_right(task, pool, monkeypatch):
    monkeypatch.setattr("composable_ebm.evaluation.agreement.MULTIPLES", (1, 4))
    found = stability(task, "left", JUDGE, pool, chains=64, seed=0)
    assert [f["num_steps"] for f in found.values()] == [20, 80]
    assert all(f["accuracy"]["value"] > 0.95 for f in found.values())
    assert found["4"]["fid_attr_ratio"] < 10


# -- rivals --------------------------------------------------------------------------------------


def test_ebmkit_samples_the_same_sum(task):
    pytest.importorskip("ebm")
    asked = [{"left": 1, "right": i % 2} for i in range(40)]
    state = torch.random.get_rng_state()
    row = rivals.sample_rival("ebmkit", asked, task, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert row.samples.shape == (40, *toy_task.SHAPE)
    assert row.evaluations == 40  # as many as the engine's 41, in whole steps a level
    seen = JUDGE.labels(row.samples)
    right = [int(seen["left"][i]) == 1 and int(seen["right"][i]) == i % 2 for i in range(40)]
    assert sum(right) > 30


def test_a_joint_model_answers_for_any_part_of_its_attributes():
    class Table(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4]

    card = ceb.Card(
        "folder", "joint", "left+right", ("00", "01", "10", "11"), toy_task.SHAPE, (-1.0, 1.0), {}, weight=2.0
    )
    joint = ceb.Expert(Table(), card)
    x = torch.randn(3, *toy_task.SHAPE)
    energies = x.flatten(1)
    energy = rivals.JointRequests(joint, [{"left": 1}, {"right": 0}, {"left": 0, "right": 1}])
    whole = -torch.logsumexp(-energies, 1)
    part = torch.stack(
        [
            -torch.logsumexp(-energies[0, [2, 3]], 0),
            -torch.logsumexp(-energies[1, [0, 2]], 0),
            energies[2, 1],
        ]
    )
    assert torch.allclose(energy(x), whole + 2 * (part - whole))
    with pytest.raises(ValueError, match="knows left, right, not top"):
        rivals.JointRequests(joint, [{"top": 1}])


def test_a_rival_that_is_absent_says_how_to_get_it(task, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(tmp_path))
    with pytest.raises(rivals.Missing, match="no diffusion experts were set up for folder"):
        rivals.sample_rival("diffusion", [{"left": 1}], task, 0)
    monkeypatch.setitem(rivals.OTHERS["contrastive"], "folder", ("nowhere", "ratio"))
    with pytest.raises(rivals.Missing, match="the family 'nowhere' has no experts to compose"):
        rivals.sample_rival("contrastive", [{"left": 1}], task, 0)
    with pytest.raises(rivals.Missing, match="no joint model was set up for folder"):
        rivals.sample_rival("joint", [{"left": 1}], task, 0)
    monkeypatch.setitem(rivals.JOINT, "folder", tmp_path / "joint")
    with pytest.raises(rivals.Missing, match=r"configs/folder/joint\.toml"):
        rivals.sample_rival("joint", [{"left": 1}], task, 0)
    with pytest.raises(ValueError, match="must be one of ebmkit, diffusion, contrastive, joint"):
        rivals.sample_rival("magic", [{"left": 1}], task, 0)


# -- the whole -------------------------------------------------------------------------------------


def test_an_evaluation_writes_everything_and_reads_as_a_table(task, pool, monkeypatch, tmp_path):
    monkeypatch.setattr(family, "task_of", lambda name, combinations: task)
    monkeypatch.setattr(toy_task.Task, "reference", lambda self, root: pool)
    monkeypatch.setattr(family, "load_data", lambda *args: pool)
    monkeypatch.setattr(family, "load_judge", lambda name, kind, *_: (JUDGE, {"left": 1.0}))
    monkeypatch.setattr("composable_ebm.evaluation.agreement.MULTIPLES", (1, 2))
    evaluation = Evaluation(
        "folder",
        forms=("ratio", "chains", "joint"),
        samples=70,
        other_samples=60,
        seeds=(0, 1),
        sizes=(2,),
        chains=50,
        progress=str(tmp_path / "kept"),
    )
    found = evaluate_family(evaluation, tmp_path / "toy.json")
    assert json.loads((tmp_path / "toy.json").read_text())["rows"] == found["rows"]
    assert (tmp_path / "toy.png").exists()
    assert (tmp_path / "toy_agreement.png").exists()
    assert not any((tmp_path / "kept").iterdir())
    assert set(found["missing"]) == {"joint"}
    assert [(row["form"], row["seed"]) for row in found["rows"]] == [
        ("ratio", 0),
        ("ratio", 1),
        ("chains", 0),
        ("chains", 1),
    ]
    assert min(curve(found, "ratio", "accuracy_convolutional", [2])) > 0.9
    text = table(found)
    for words in ("spread over seeds", "NOT, %", "chains at T = 1", "steps, times", "AUROC"):
        assert words in text


def test_held_out_rows_need_something_held_out(task, monkeypatch, tmp_path):
    monkeypatch.setattr(family, "task_of", lambda name, combinations: task)
    with pytest.raises(ValueError, match="name no combination that all were trained without"):
        evaluate_family(Evaluation("folder", held_out=True), tmp_path / "toy.json")


def test_parts_that_are_done_are_not_done_again(tmp_path):
    def compute():
        calls.append(1)
        return {"value": (1, 2)}

    calls = []
    progress = Progress(tmp_path / "kept", 2, "test")
    assert progress.part("one", compute) == {"value": [1, 2]}
    assert Progress(tmp_path / "kept", 2, "test").part("one", compute) == {"value": [1, 2]}
    assert len(calls) == 1
    progress.finish()
    assert not (tmp_path / "kept").exists()


def test_unknown_parts_and_forms_are_refused():
    with pytest.raises(ValueError, match=r"`parts` are rows, negation, .* got 'colours'"):
        Evaluation("faces", parts=("colours",))
    with pytest.raises(ValueError, match=r"`forms` are ratio, .* got 'product'"):
        Evaluation("faces", forms=("product",))


def test_a_family_without_experts_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(tmp_path))
    with pytest.raises(ValueError, match="'cats' has no experts to compose; families with experts"):
        task_of("cats")


# -- the joint model's labels ------------------------------------------------------------------------


def test_a_joint_attribute_has_the_combinations_for_values(pool):
    joint = pool.jointly("left+right")
    assert joint.values["left+right"] == ("00", "01", "10", "11")
    assert torch.equal(joint.labels["left+right"], 2 * pool.labels["left"] + pool.labels["right"])
    partly = LabelledImages(
        pool.images[:2],
        {"left": torch.tensor([1, -1]), "right": torch.tensor([1, 1])},
        toy_task.VALUES,
        "partly",
    )
    assert partly.jointly("right+left").labels["right+left"].tolist() == [3, -1]
    with pytest.raises(ValueError, match="unknown attribute of 'toy' 'top'"):
        pool.jointly("left+top")
