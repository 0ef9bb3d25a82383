"""Several visitors of the mixer on one engine: what they share, and what one of them cannot do to another."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import card, network
from mixer_toys import write_models
from PIL import Image

import composable_ebm as ceb
from composable_ebm.experts import catalogue
from composable_ebm.experts.library import Library
from demos.mixer import render
from demos.mixer import runs as runs_module
from demos.mixer.explore import Axis
from demos.mixer.runs import Runs
from demos.mixer.state import Limits, Request

RECIPE = "Toys/digit[3] + 0.5*Toys/slanted"
OTHER = "Toys/digit[3] + 2*~Toys/slanted"
TIMEOUT = 30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


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
    """A page that takes its frames in a thread of its own, as Gradio's workers do."""

    def __init__(self, runs, name, recipe=RECIPE, num_chains=2, does="play", given=(), **options):
        self.runs, self.request = runs, SimpleNamespace(session_hash=name)
        runs.begin(self.request)
        asked = Request(recipe, num_chains, 10, 0)
        self.updates = getattr(runs, does)(asked, *given, name, **options)
        self.shown = []
        self.thread = threading.Thread(target=lambda: self.shown.extend(self.updates))
        self.thread.start()

    @property
    def run(self):
        session = self.runs._sessions.get(self.request.session_hash)
        return session.live.run if session and session.live else None

    def steer(self, recipe):
        self.runs.steer(recipe, self.request.session_hash)

    def end(self):
        """What the page is left with after Stop."""
        self.runs.stop(self.request)
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()
        return self.shown[-1]


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
        assert "stopped at step" in visitor.end().picture
    assert runs.running() == 0
    soon(lambda: runs.engine.runs == ())


def test_a_visitor_who_leaves_does_not_disturb_the_others(runs):
    stays, leaves = Visitor(runs, "stays"), Visitor(runs, "leaves")
    run, gone = playing(stays, leaves)
    runs.leave(leaves.request)  # the tab is closed
    leaves.thread.join(TIMEOUT)
    assert gone.done
    before = run.num_steps
    soon(lambda: run.num_steps > before + 3)
    assert run.frame.alive.all()
    assert "stopped at step" in stays.end().picture


def test_closing_the_stream_of_frames_ends_the_run(runs):
    runs.begin(SimpleNamespace(session_hash="a"))
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
    assert "the network is broken" in wrong.shown[-1].problem
    before = playing(fine)[0].num_steps
    soon(lambda: fine.run.num_steps > before + 3)
    assert all("broken" not in str(update.problem) for update in fine.shown)
    assert "stopped at step" in fine.end().picture


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
    runs.stop(visitor.request)
    opened.set()
    assert run.result(TIMEOUT).num_steps == 5  # the first call was for the states that it began with
    assert "stopped at step 5" in visitor.end().picture


def test_stop_reaches_a_run_that_still_waits_in_the_queue(runs):
    request = SimpleNamespace(session_hash="a")
    for does in ("play", "watch", "strip"):
        runs.begin(request)
        runs.stop(request)
        *_, last = getattr(runs, does)(Request(RECIPE, 2, 10**6, 0), "a")
        assert last.halt is not None
        assert runs.engine.runs == ()
    assert runs.running() == 0


def test_chains_follow_the_recipe_and_where_they_cannot_others_begin(runs):
    visitor = Visitor(runs, "a")
    (run,) = playing(visitor)
    visitor.steer(OTHER)
    soon(lambda: "2*~Toys/slanted" in str(run.frame.composition))
    visitor.steer("Toys/digit[3] + Toys/slantd")  # a slip of the pen does not stop the chains
    before = run.num_steps
    soon(lambda: run.num_steps > before + 3)
    visitor.steer(RECIPE)
    soon(lambda: "0.5*Toys/slanted" in str(run.frame.composition))
    assert visitor.run is run
    visitor.steer("Yard/body - 2*Yard/body")
    before = run.num_steps
    soon(lambda: run.num_steps > before + 3)
    visitor.steer("Yard/body")  # of its own sampler, but of the same states
    soon(lambda: "Yard/body" in str(run.frame.composition))
    assert visitor.run is run
    described = [update.picture for update in visitor.shown]
    last = visitor.end()
    said = " ".join(str(update.problem) for update in visitor.shown)
    assert "did you mean Toys/slanted" in said
    assert "no term with a positive weight" in said
    assert "samples of Yard/body" in last.picture
    assert any(f"running chains of {OTHER}" in picture for picture in described)


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
    assert "samples of Tiny/tiny" in visitor.end().picture


def test_sampling_from_a_start_ends_by_itself(runs):
    uri = render.data_uri(Image.new("L", (16, 16), 255))
    visitor = Visitor(runs, "a", does="watch", start=json.dumps({"picture": uri, "mask": ""}))
    visitor.thread.join(TIMEOUT)
    assert "step 10" in visitor.shown[-1].picture
    assert runs.engine.runs == ()


def test_a_grid_and_a_strip_run_beside_chains_that_play(runs):
    player = Visitor(runs, "player")
    (run,) = playing(player)
    axes = (Axis("Toys/digit[3]", 1, 2, 2), Axis("Toys/slanted", 1, 2, 2))
    drawn = Visitor(runs, "drawn", does="grid", given=(lambda: axes,))
    alone = Visitor(runs, "alone", does="strip")
    for visitor in (drawn, alone):
        visitor.thread.join(TIMEOUT)
    assert "<img" in drawn.shown[-1].grid
    assert "<img" in alone.shown[-1].strip
    assert not run.done
    player.end()


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
    assert "nothing was moved for a while" in visitor.shown[-1].problem
    assert runs.engine.runs == ()


def test_chains_that_diverge_are_told_of_and_start_over_with_another_recipe(runs, monkeypatch):
    energy = scripted(monkeypatch, lambda call: None)
    energy.sampler_settings["step_size"] = 1e30
    visitor = Visitor(runs, "a", "scripted")
    (run,) = playing(visitor)
    soon(lambda: not run.frame.alive.any())
    soon(lambda: any("2 of 2 chains diverged" in str(update.problem) for update in visitor.shown))
    visitor.steer(RECIPE)
    soon(lambda: bool(run.frame.alive.all()))
    visitor.end()
