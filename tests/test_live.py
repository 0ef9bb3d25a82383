"""Live chains: after every change they land, the others stay, and none is lost for good."""

import time

import pytest
import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm import analytic
from composable_ebm.sampling.schedule import Schedule, karras

SPREAD = 0.2
CORNERS = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
SAMPLER = ceb.Annealed(
    ceb.Langevin(0.2), Schedule(noise_level=karras(10, 0.05), noise_power=2, predict=True, num_levels=30)
)


class Side(nn.Module):
    """Logits (batch, 2) of being on the positive side of an axis, exact at every noise level."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x, noise_level=None):
        sigma = x.new_tensor(0.0) if noise_level is None else noise_level
        variance = (SPREAD**2 + sigma.square()).reshape(-1, 1, 1)
        logits = -(x[:, None] - CORNERS).square().sum(-1, keepdim=True) / (2 * variance)
        yes = CORNERS[:, self.axis] > 0
        return torch.stack([logits[:, ~yes].logsumexp(1)[:, 0], logits[:, yes].logsumexp(1)[:, 0]], 1)


BASE = analytic.GaussianMixture(CORNERS, SPREAD**2)
RIGHT, LEFT = (ceb.from_classifier(Side(0), label, noise_conditioned=True) for label in (1, 0))
UP = ceb.from_classifier(Side(1), 1, noise_conditioned=True)


def followed(run, until, seconds=20.0):
    """The first frame for which `until` holds."""
    end = time.monotonic() + seconds
    for frame in run.frames():
        if until(frame):
            return frame
        assert time.monotonic() < end, f"not reached after {frame.step} steps"
    raise AssertionError("the run ended")


def all_met(composition):
    def met(frame):
        same = frame.composition is composition and frame.met is not None
        return same and bool(frame.met.all()) and frame.noise_level.ndim == 0

    return met


@pytest.fixture
def engine():
    with ceb.Engine() as engine:
        yield engine


def begin(engine, composition, **options):
    settings = {"num_steps": None, "sampler": SAMPLER, "schedule_steps": 60, "live": True, **options}
    return engine.submit(composition, 24, **settings)


def test_chains_land_after_each_change(engine):
    run = begin(engine, BASE + RIGHT)
    followed(run, lambda f: f.met is not None)
    for wanted, axes in (
        (BASE + LEFT, [(0, -1)]),
        (BASE + LEFT + UP, [(0, -1), (1, 1)]),
        (BASE + RIGHT, [(0, 1)]),
    ):
        run.steer(wanted)
        frame = followed(run, all_met(wanted))
        for axis, sign in axes:
            assert (sign * frame.denoised[:, axis] > 1).all()
    run.cancel()


def test_chains_that_already_meet_a_change_hardly_move(engine):
    run = begin(engine, BASE + RIGHT)
    before = followed(run, lambda f: f.met is not None and f.noise_level.ndim == 0 and f.step > 60)
    wanted = BASE + RIGHT + UP
    run.steer(wanted)
    after = followed(run, all_met(wanted))
    met = before.denoised[:, 1] > 0
    assert 0 < int(met.sum()) < 24
    moved = (after.denoised - before.denoised).norm(dim=1)
    # A fresh start would put them anywhere in the corner: two draws lie 1.8 spreads apart.
    assert float(moved[met].median()) < 4 * SPREAD
    assert float(moved[~met].median()) > 2


class Cliff(nn.Module):
    """No preference, and no number at all beyond x₀ = 3.5."""

    def forward(self, x, noise_level=None):
        outside = (x[:, 0] > 3.5) & (torch.as_tensor(0.0 if noise_level is None else noise_level) < 0.06)
        level = torch.where(outside, torch.nan, 0.0) + 0 * x[:, 0]
        return torch.stack([level, level], 1)


def test_chains_that_stop_being_finite_begin_again(engine):
    cliff = ceb.from_classifier(Cliff(), 0, noise_conditioned=True)
    start = torch.tensor([[3.6, 2.0]]).repeat(24, 1)
    start[8:] = torch.tensor([2.0, 2.0])
    run = begin(engine, BASE + cliff, init=start)
    frame = followed(run, lambda f: f.step > 150)
    assert frame.alive.all()
    assert frame.states.isfinite().all()
    assert (frame.denoised[:, 0] < 3.5).all()


def test_start_that_is_given_stays_where_it_meets_the_composition(engine):
    start = torch.tensor([[2.0, 2.0]]).repeat(24, 1)
    run = begin(engine, BASE + RIGHT + UP, init=start)
    frame = followed(run, lambda f: f.step > 60)
    assert ((frame.denoised - start).norm(dim=1) < 6 * SPREAD).all()


def test_live_chains_have_no_end(engine):
    with pytest.raises(ValueError, match="num_steps=None"):
        engine.submit(BASE + RIGHT, 4, num_steps=10, sampler=SAMPLER, live=True)


def test_live_chains_need_noise_levels(engine):
    with pytest.raises(ValueError, match="annealed over a `noise_level`"):
        engine.submit(BASE, 4, num_steps=None, sampler=ceb.Langevin(0.1), live=True)


@pytest.mark.parametrize(
    ("setting", "value"), [("level", 0.0), ("chance", 1.0), ("look_every", 0), ("stride", 0)]
)
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        ceb.Live(**{setting: value})
