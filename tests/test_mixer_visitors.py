"""Several visitors of the mixer on one engine: what they share, and what one of them cannot do to another."""

import dataclasses
import json
import re
import shutil
import threading
import time

import pytest
import torch
from helpers import card, network
from mixer_toys import diffused, write_models
from PIL import Image

import composable_ebm as ceb
from composable_ebm.experts import catalogue
from composable_ebm.experts.library import Library
from demos.mixer import pictures
from demos.mixer import runs as runs_module
from demos.mixer.answers import Answers
from demos.mixer.explore import Axis
from demos.mixer.runs import Runs
from demos.mixer.state import Limits, Request
from demos.mixer.visitors import MAX_TAUGHT, MAX_VISITORS, Visitors

RECIPE = "Toys/digit[3] + 0.5*Toys/slanted"
OTHER = "Toys/digit[3] + 2*~Toys/slanted"
TIMEOUT = 30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_models(tmp_path_factory.mktemp("models"))
    base = diffused("base", ("image",), 0, attribute="image", family="Noisy")
    options = {**base.network.options, "type": "DiffusedEnergy"}
    ceb.save_expert(folder / "Noisy/base", base.network, dataclasses.replace(base.card, network=options))
    return folder


@pytest.fixture
def runs(models, monkeypatch):
    monkeypatch.setattr(catalogue, "model_folders", lambda: [models])
    runs = Runs(Library(), Limits())
    yield runs
    runs.close()


def soon(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Visitor:
    """A page that takes its messages in a thread of its own, as the server does."""

    def __init__(self, runs, name, recipe=RECIPE, num_chains=2, does="play", given=()):
        self.runs, self.name = runs, name
        asked = Request(recipe, num_chains, 10, 0)
        axes, sent = given if does == "grid" else (), given if does != "grid" else ()
        self.updates = getattr(runs, does)(asked, *axes, name, *sent)
        self.shown = []
        self.thread = threading.Thread(target=lambda: self.shown.extend(map(received, self.updates)))
        self.thread.start()

    @property
    def run(self):
        session = self.runs.visitors[self.name].session
        return session.live.run if session and session.live else None

    def steer(self, recipe):
        """What the page is answered when it asks for another recipe."""
        return Answers(self.runs, True).read({"recipe": recipe}, self.name)

    def end(self):
        """What the page is left with after Stop."""
        self.runs.stop(self.name)
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()
        return self.shown[-1]

    def said(self):
        return " ".join(str(each.get("problem", "")) + str(each.get("said", "")) for each in self.shown)


def received(message):
    """A message as a page gets it."""
    return json.loads(json.dumps(message))


def stopped(message):
    """Whether a message is the end of a run that was stopped, with a picture."""
    return message["kind"] == "end" and message["stopped"] and message["picture"].startswith("data:image/png")


def playing(*visitors):
    soon(lambda: all(each.run is not None and each.run.num_steps > 2 for each in visitors))
    return [each.run for each in visitors]


def test_visitors_with_the_same_experts_share_a_batch_and_its_potential(runs):
    visitors = [Visitor(runs, name) for name in "abc"]
    started = playing(*visitors)
    assert all(run.shared for run in started)
    assert runs.engine.potentials_made == 1
    assert runs.running() == 3
    for visitor in visitors:
        assert stopped(visitor.end())
    assert runs.running() == 0
    soon(lambda: runs.engine.runs == ())


def test_a_visitor_who_leaves_does_not_disturb_the_others(runs):
    stays, leaves = Visitor(runs, "stays"), Visitor(runs, "leaves")
    run, gone = playing(stays, leaves)
    runs.stop(leaves.name)
    leaves.thread.join(TIMEOUT)
    assert gone.done
    before = run.num_steps
    soon(lambda: run.num_steps > before + 3)
    assert run.frame.alive.all()
    assert stopped(stays.end())


def test_closing_the_stream_of_frames_ends_the_run(runs):
    updates = runs.play(Request(RECIPE, 2, 10, 0), "a")
    next(updates)
    updates.close()
    soon(lambda: runs.engine.runs == ())
    assert runs.running() == 0


class Scripted(ceb.Energy):
    """An energy of the toys' states that does something of its own at its calls with a gradient."""

    event_shape, data_range = (1, 16, 16), (-1.0, 1.0)

    def __init__(self, script):
        super().__init__()
        self.sampler_settings = {"kernel": "Langevin", "step_size": 0.1, "num_steps": 12}
        self.script, self.calls = script, 0

    def energy(self, x, noise_level=None):
        if torch.is_grad_enabled():
            self.calls += 1
            self.script(self.calls)
        return x.square().flatten(1).sum(1)


def scripted(monkeypatch, script):
    """From now on the recipe "scripted" is this energy."""
    energy, real = Scripted(script), runs_module.understood
    monkeypatch.setattr(
        runs_module,
        "understood",
        lambda recipe, library: energy if recipe == "scripted" else real(recipe, library),
    )
    return energy


def test_an_error_of_one_visitor_is_told_to_that_visitor_alone(runs, monkeypatch):
    def fail(call):
        if call > 5:
            raise RuntimeError("the network is broken")

    scripted(monkeypatch, fail)
    fine, wrong = Visitor(runs, "fine"), Visitor(runs, "wrong", "scripted")
    wrong.thread.join(TIMEOUT)
    assert wrong.shown[-1]["kind"] == "error"
    assert wrong.shown[-1]["problem"].startswith("the network is broken")
    before = playing(fine)[0].num_steps
    soon(lambda: fine.run.num_steps > before + 3)
    assert "broken" not in fine.said()
    assert stopped(fine.end())


def test_stop_ends_a_run_with_the_step_that_is_being_taken(runs, monkeypatch):
    reached, opened = threading.Event(), threading.Event()

    def wait(call):
        if call == 6:
            reached.set()
            assert opened.wait(TIMEOUT)

    scripted(monkeypatch, wait)
    visitor = Visitor(runs, "a", "scripted")
    assert reached.wait(TIMEOUT)
    run = visitor.run
    runs.stop(visitor.name)
    opened.set()
    assert run.result(TIMEOUT).num_steps == 5  # the first call was for the states that it began with
    assert visitor.end()["step"] == 5


def test_stop_reaches_a_run_that_waits_in_the_queue_which_says_its_place(runs):
    first = runs.sample(Request(RECIPE, 2, 10**6, 0), "a")
    next(first)
    for does in ("sample", "alone"):
        waiting = getattr(runs, does)(Request(RECIPE, 2, 10**6, 0), "b")
        assert next(waiting) == {"kind": "wait", "place": 1}
        runs.stop("b")
        assert [message["said"] for message in waiting] == ["Stopped before it began."]
    assert len(runs.engine.runs) == 1
    first.close()
    assert runs.running() == 0


def test_a_grid_runs_from_the_opposite_of_an_expert_to_as_much_as_is_asked_for(runs):
    said = Answers(runs, True).read({"recipe": "Yard/body + 4*ratio(Yard/hat, Yard/hat[any])"}, "a")
    assert said["parts"] == [{"name": "Yard/hat", "low": -4.0, "high": 4.0}]


def test_energies_of_running_chains_say_through_which_noise_they_are_seen(runs):
    for message in runs.play(Request("Noisy/base", 2, 10, 0), "a"):
        if message["kind"] == "frame" and "terms" in message:
            assert message["level"] > 0
            runs.stop("a")
    *_, last = runs.sample(Request("Noisy/base", 2, 10, 0), "a")
    assert last["terms"]
    assert "level" not in last


def test_a_weight_that_moves_reads_no_file_and_no_recipe(runs, monkeypatch):
    answers, parsed, opened = Answers(runs, True), [], []
    answers.world({}, "a")
    visitor = Visitor(runs, "a")
    (run,) = playing(visitor)
    picks = {"Toys/digit": {"values": {"3": 1}}, "Toys/slanted": {"values": {"slanted": 2.25}}}
    with monkeypatch.context() as counted:
        counted.setattr(runs_module, "parse", lambda *_: parsed.append(1))
        for place in ("builtins.open", "io.open", "os.scandir", "os.listdir"):
            counted.setattr(place, lambda *_, **__: opened.append(1))
        said = answers.read({"mix": {"family": "Toys", "picks": picks}}, "a")
    assert said["recipe"] == "Toys/digit[3] + 2.25*Toys/slanted"
    soon(lambda: "2.25*Toys/slanted" in str(run.frame.composition))
    assert stopped(visitor.end())
    assert (parsed, opened) == ([], [])


def test_nothing_on_is_said_and_no_defect(runs):
    (message,) = runs.play(Request("", 2, 10, 0), "a")
    assert message["problem"].startswith("Nothing is on")


def test_an_early_stop_is_unfinished_and_not_unsatisfied(runs):
    visitor = Visitor(runs, "a", "Toys/digit[3] + 12*Toys/slanted", does="sample")
    visitor.thread.join(TIMEOUT)
    early = runs.sample(Request(RECIPE, 2, 10**6, 0), "b")
    next(early)
    runs.stop("b")
    *_, last = early
    assert last["said"].startswith("Stopped at step")
    assert "satisf" not in last["said"]
    assert last["misses"] is None


def test_a_second_run_of_a_visitor_takes_the_place_of_the_first(runs):
    first = runs.play(Request(RECIPE, 2, 10, 0), "a")
    next(first)
    second = Visitor(runs, "a", OTHER)
    playing(second)
    assert [message for message in first if message["kind"] == "end"] == []
    assert runs.running() == 1
    second.end()


def test_shaken_chains_begin_anew_from_other_noise(runs):
    assert not runs.shake(None, "a")  # nothing runs
    visitor = Visitor(runs, "a")
    (run,) = playing(visitor)
    assert runs.shake(None, "a") == 2  # of neither is known what it misses
    soon(lambda: visitor.run is not run)
    playing(visitor)
    assert run.done
    assert stopped(visitor.end())


def test_the_chosen_picture_is_shaken_and_all_others_stay(runs):
    visitor = Visitor(runs, "a", "Noisy/base", num_chains=4)
    (run,) = playing(visitor)
    soon(lambda: run.frame is not None)
    live = runs.visitors["a"].session.live
    assert runs.shake(2, "a") == 1
    soon(lambda: visitor.run is not run and run.done)
    renewed = live.renewed(torch.arange(4) == 2, runs.engine.submit, 1)
    assert torch.equal(renewed[[0, 1, 3]], run.frame.denoised[[0, 1, 3]])
    assert not torch.allclose(renewed[2], run.frame.denoised[2], atol=0.1)
    assert stopped(visitor.end())


def test_chains_follow_the_recipe_and_where_they_cannot_others_begin(runs):
    visitor = Visitor(runs, "a")
    (run,) = playing(visitor)
    visitor.steer(OTHER)
    soon(lambda: "2*~Toys/slanted" in str(run.frame.composition))
    said = visitor.steer("Toys/digit[3] + Toys/slantd")  # a slip of the pen does not stop the chains
    assert "did you mean Toys/slanted" in said["problem"]
    before = run.num_steps
    soon(lambda: run.num_steps > before + 3)
    visitor.steer(RECIPE)
    soon(lambda: "0.5*Toys/slanted" in str(run.frame.composition))
    assert visitor.run is run
    assert "no term with a positive weight" in visitor.steer("Yard/body - 2*Yard/body")["problem"]
    before = run.num_steps
    soon(lambda: run.num_steps > before + 3)
    visitor.steer("Yard/body")  # of its own sampler, but of the same states
    soon(lambda: "Yard/body" in str(run.frame.composition))
    assert visitor.run is run
    described = [message["recipe"] for message in visitor.shown if message["kind"] == "frame"]
    last = visitor.end()
    assert last["recipe"] == "Yard/body"
    assert OTHER in described


def test_states_of_another_shape_are_begun_anew(runs, models):
    small = card("tiny", ("tiny",), "Tiny", (1, 8, 8))
    ceb.save_expert(models / small.full_name, network(small), small)
    visitor = Visitor(runs, "a")
    (run,) = playing(visitor)
    visitor.steer("Tiny/tiny")
    soon(lambda: visitor.run is not run)
    assert run.done
    playing(visitor)
    assert visitor.run.frame.states.shape == (2, 1, 8, 8)
    assert visitor.end()["recipe"] == "Tiny/tiny"


def test_sampling_from_a_start_ends_by_itself(runs):
    uri = pictures.data_uri(Image.new("L", (16, 16), 255))
    visitor = Visitor(runs, "a", does="sample", given=({"pictures": [uri]},))
    visitor.thread.join(TIMEOUT)
    assert visitor.shown[-1]["step"] == 10
    assert not visitor.shown[-1]["stopped"]
    assert runs.engine.runs == ()


def test_a_grid_and_a_strip_run_beside_chains_that_play(runs):
    player = Visitor(runs, "player")
    (run,) = playing(player)
    axes = (Axis("Toys/digit[3]", 1, 2, 2), Axis("Toys/slanted", 1, 2, 2))
    drawn = Visitor(runs, "drawn", does="grid", given=(lambda: axes,))
    alone = Visitor(runs, "alone", does="alone")
    for visitor in (drawn, alone):
        visitor.thread.join(TIMEOUT)
    assert drawn.shown[-1]["done"]
    assert [each["label"] for each in alone.shown[-1]["pictures"]] == ["mix", "digit 3", "slanted"]
    assert not run.done
    player.end()


def test_visitors_are_forgotten_but_never_while_something_runs():
    known = Visitors()
    known["busy"].session = object()
    known["taught"].taught["a/b"] = object()
    for i in range(2 * MAX_VISITORS):
        known[f"visitor {i}"].film.add(torch.zeros(1, 1, 4, 4))
    assert known.running == 1
    assert known["taught"].taught == {}  # somebody else by now


def test_warming_up_makes_all_that_the_first_visitor_needs(runs):
    runs.warm_up(RECIPE)
    made = runs.engine.potentials_made
    assert made == 1
    visitor = Visitor(runs, "a")
    playing(visitor)
    visitor.end()
    assert runs.engine.potentials_made == made


def test_chains_that_nobody_moves_end_by_themselves(runs, monkeypatch):
    monkeypatch.setattr(runs_module, "MAX_PLAY_SECONDS", 0)
    visitor = Visitor(runs, "a")
    visitor.thread.join(TIMEOUT)
    assert "nothing was moved for a while" in visitor.shown[-1]["said"]
    assert runs.engine.runs == ()


def test_chains_that_diverge_are_told_of_and_start_over_with_another_recipe(runs, monkeypatch):
    energy = scripted(monkeypatch, lambda call: None)
    energy.sampler_settings["step_size"] = 1e30
    visitor = Visitor(runs, "a", "scripted")
    (run,) = playing(visitor)
    soon(lambda: not run.frame.alive.any())
    soon(lambda: "2 of 2 chains diverged" in visitor.said())
    visitor.steer(RECIPE)
    soon(lambda: bool(run.frame.alive.all()))
    visitor.end()


# -- what visitors teach ------------------------------------------------------------------------------


def marks(count=3, **changes):
    shades = {"yes": 250, "no": 5}
    uris = {
        kind: [pictures.data_uri(Image.new("L", (4, 4), shade + i % 5)) for i in range(count)]
        for kind, shade in shades.items()
    }
    return {"family": "Noisy", "name": "So bright!", **uris, **changes}


def test_a_visitor_teaches_an_expert_that_composes_is_theirs_alone_and_can_be_kept(runs, models):
    *_, last = runs.teach(marks(), "a")
    assert (last["kind"], last["name"]) == ("taught", "so_bright")
    assert "told right while they were left out" in last["sure"]
    answers = Answers(runs, keeps=True)
    recipe = "Noisy/base + 3*ratio(Noisy/so_bright, Noisy/so_bright[any])"
    assert answers.read({"recipe": recipe}, "a")["words"] == "so bright"
    visitor = Visitor(runs, "a", recipe)
    playing(visitor)
    assert stopped(visitor.end())
    assert "unknown expert" in answers.read({"recipe": recipe}, "b")["problem"]
    *_, more = runs.teach(marks(5), "a")  # more marks, in place of the first
    assert more["kind"] == "taught"
    assert len(runs.visitors["a"].taught) == 1
    with pytest.raises(ValueError, match="saves nothing"):
        Answers(runs, keeps=False).keep({"name": "Noisy/so_bright"}, "a")
    said = answers.keep({"name": "Noisy/so_bright"}, "a")["said"]
    try:
        assert str(models / "Noisy/so_bright") in said
        answers.world({}, "b")
        assert answers.read({"recipe": recipe}, "b")["words"] == "so bright"
        with pytest.raises(ValueError, match="saved already"):
            answers.keep({"name": "Noisy/so_bright"}, "a")
    finally:
        shutil.rmtree(models / "Noisy/so_bright")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yes": []}, "Mark 3 pictures as yes"),
        ({"no": "data:"}, "Mark 3 pictures as yes"),
        ({"yes": ["x", "y", "z"]}, "no picture that can be read"),
        ({"name": "../.."}, "begins with a letter"),
        ({"name": None}, "begins with a letter"),
        ({"name": "base"}, "There is an expert Noisy/base already"),
        ({"family": "Toys"}, "has no base to teach beside"),
        ({"family": "Yard"}, "nothing to teach beside"),
    ],
)
def test_what_cannot_be_taught_is_said(runs, changes, message):
    *_, last = runs.teach(marks(**changes), "a")
    assert last["kind"] == "error"
    assert re.search(message, last["problem"])


def test_a_visitor_teaches_so_many_experts_and_no_more(runs):
    for i in range(MAX_TAUGHT):
        runs.visitors["a"].taught[f"Noisy/own{i}"] = object()
    *_, last = runs.teach(marks(), "a")
    assert "forget one first" in last["problem"]
