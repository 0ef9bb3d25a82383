"""Options of `Engine.submit`: parts held with noise, pace, shares, batches of their own, frames."""

import time

import pytest
import torch
from helpers import binary, expert, gaussians, points
from submit_helpers import TIMEOUT, Gate, same_as_alone, submit_together, wait_for

import composable_ebm as ceb
from composable_ebm.sampling.schedule import Schedule, geometric, linear

a, b, c = gaussians()


@pytest.fixture
def engine():
    with ceb.Engine() as engine:
        yield engine


# --- a part held with noise ----------------------------------------------------------------------


class Held(ceb.Energy):
    """The plain reference of held="noisy": E(x, σ) = E'(m x + (1 - m)(x₀ + σ ε), σ)."""

    noise_conditioned = True

    def __init__(self, whole, states, mask, noise):
        super().__init__()
        self.whole, self.states_, self.mask, self.noise = whole, states, mask, noise
        self.event_shape = whole.event_shape

    def states(self, x, noise_level=None):
        held = self.states_ if noise_level is None else self.states_ + noise_level * self.noise
        return self.mask * x + (1 - self.mask) * held

    def energy(self, x, noise_level=None):
        return self.whole.energy(self.states(x, noise_level), noise_level)


HELD = {
    "init": points(5),
    "mask": torch.tensor([0.0, 1.0]),
    "held": "noisy",
    "num_steps": 12,
    "seed": 3,
    "sampler": ceb.Annealed(
        ceb.Langevin(0.3),
        Schedule(noise_level=geometric(2.0, 0.1), noise_power=2.0, predict=True, num_levels=6),
    ),
}


def test_what_is_held_with_noise_is_the_energy_of_the_free_part_given_the_rest():
    out = ceb.sample(a + b, keep_every=1, **HELD)
    generator = torch.Generator().manual_seed(3)
    held = Held(a + b, HELD["init"], HELD["mask"], torch.randn(5, 2, generator=generator))
    noise = ceb.Noise((generator, 5))
    chain = ceb.Chain(held, HELD["init"], HELD["sampler"], noise, num_steps=12)
    for states in out.trajectory[1:-1]:
        chain.advance(1)
        expected = held.states(chain.x, chain.block.noise_level)
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    chain.advance(1)
    torch.testing.assert_close(out.samples[:, 1], chain.x[:, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.trace.energy, chain.trace().energy, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.samples[:, 0], HELD["init"][:, 0])  # clean again, to the last bit


def test_what_is_held_with_noise_is_drawn_from_the_conditional():
    """Two correlated Gaussians: given the second at 1.5, the first has mean ρ 1.5 and variance 1 - ρ²."""
    energy = ceb.analytic.Gaussian([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]])
    init = torch.stack([3 * points(1000, ()), torch.full((1000,), 1.5)], dim=1)
    sampler = ceb.Annealed(ceb.MALA(0.2), Schedule(noise_level=geometric(3.0, 0.05), predict=True))
    mask = torch.tensor([1.0, 0.0])
    out = ceb.sample(energy, init=init, mask=mask, held="noisy", num_steps=100, sampler=sampler, seed=0)
    assert torch.all(out.samples[:, 1] == 1.5)
    assert float(out.samples[:, 0].mean()) == pytest.approx(0.8 * 1.5, abs=0.06)
    assert float(out.samples[:, 0].var()) == pytest.approx(1 - 0.8**2, rel=0.15)


def test_rows_that_are_held_with_noise_share_a_batch_with_others(engine):
    free = {key: value for key, value in HELD.items() if key not in ("mask", "held")}
    requests = [(a + b, HELD), (a + c, {**free, "seed": 4}), (b, {**HELD, "held": "clean"})]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs, tolerance=1e-4)
    assert all(run.shared for run in runs)


def test_frames_show_what_is_held_without_its_noise(engine):
    schedule = Schedule(noise_level=linear(0.7, 0.7))
    options = {**HELD, "num_steps": None, "sampler": ceb.Annealed(ceb.Langevin(0.05), schedule)}
    run = engine.submit(a + b, **options)
    wait_for(lambda: run.num_steps > 5)
    frame = next(run.frames())
    run.steer(a, ceb.Annealed(ceb.Langevin(0.05), Schedule(noise_level=linear(0.2, 0.2))))
    wait_for(lambda: run.frame.composition is a)
    steered = run.frame
    run.cancel()
    noise = [(f.states - HELD["init"])[:, 0] / level for f, level in ((frame, 0.7), (steered, 0.2))]
    torch.testing.assert_close(noise[0], noise[1])  # one draw, at the level of the moment
    for each in (frame, steered):
        assert torch.equal(each.denoised[:, 0], HELD["init"][:, 0])


# --- weights inside terms ------------------------------------------------------------------------


def test_moving_a_weight_inside_an_or_makes_no_new_potential(engine):
    def mix(w):
        return a + (w * b | c) + ceb.negate(w * c, w)

    requests = [
        (mix(0.5), {"num_chains": 2}),
        (mix(2.0), {"num_chains": 3}),
        (b + (c | 3 * b), {"num_chains": 2}),
    ]
    # Two terms that differ in these weights only, one of them equal to a term of another request.
    requests.append(((0.5 * b | c) + (4 * b | c), {"num_chains": 2}))
    requests.append(((4 * b | c) + (0.5 * b | c), {"num_chains": 2}))
    options = {"num_steps": 9, "sampler": ceb.Langevin(0.05)}
    requests = [(energy, {**options, **own, "seed": i}) for i, (energy, own) in enumerate(requests)]
    same_as_alone(requests, submit_together(engine, requests))
    run = engine.submit(mix(1.0), 3, None, sampler=ceb.Langevin(0.05))
    frames = run.frames()
    next(frames)
    before = engine.potentials_made
    for w in (1.5, 2.5):
        run.steer(moved := mix(w))
        frame = next(frame for frame in frames if frame.composition is moved)
        torch.testing.assert_close(frame.energies, moved(frame.states))
    assert engine.potentials_made == before
    run.cancel()


# --- frames --------------------------------------------------------------------------------------


def test_who_looks_late_sees_the_end(engine):
    run = engine.submit(a, 3, 4, sampler=ceb.MALA(0.1))
    out = run.result(TIMEOUT)
    (frame,) = run.frames()
    assert frame.step == 4
    assert torch.equal(frame.states, out.samples)
    gate = Gate()
    first = engine.submit(gate, 1, 1, sampler=ceb.Langevin(0.1))
    run = engine.submit(a, 3, None, sampler=ceb.MALA(0.1))
    run.cancel()  # before it could begin
    gate.opened.set()
    assert first.result(TIMEOUT).num_steps == 1
    assert [frame.step for frame in run.frames()] == [run.result(TIMEOUT).num_steps] == [0]


def test_frames_tell_what_they_follow(engine):
    run = engine.submit(a, 3, None, sampler=ceb.Langevin(0.1))
    frames = run.frames()
    assert next(frames).composition is a
    run.steer(b)
    frame = next(frame for frame in frames if frame.composition is b)
    torch.testing.assert_close(frame.energies, b(frame.states))


def test_the_last_frame_carries_no_noise_once_the_predictor_has_taken_it_away(engine):
    run = engine.submit(a, 3, 6, sampler=HELD["sampler"])
    run.result(TIMEOUT)
    assert run.frame.noise_level is None
    assert run.frame.denoised is run.frame.states


# --- time ----------------------------------------------------------------------------------------


def test_runs_are_due_their_share(engine):
    def slow(x):
        time.sleep(0.01)
        return x.square().sum(1)

    energy = ceb.from_callable(slow)
    options = {"init": points(2), "num_steps": None, "alone": True, "sampler": ceb.Langevin(0.1)}
    small = engine.submit(energy, **options, share=0.1)
    whole = engine.submit(energy, **options)
    wait_for(lambda: small.num_steps >= 5)
    assert whole.num_steps > 4 * small.num_steps


def test_paced_runs_take_no_more_steps_than_asked_for_and_leave_the_time_to_others(engine):
    start = time.perf_counter()
    paced = [engine.submit(a, 2, 10, sampler=ceb.MALA(0.1), steps_per_second=20) for _ in range(2)]
    other = engine.submit(b, 2, None, sampler=ceb.MALA(0.1))
    for run in paced:
        assert run.result(TIMEOUT).num_steps == 10
    assert time.perf_counter() - start > 9 / 20
    assert all(run.shared for run in paced)
    assert not other.shared
    wait_for(lambda: other.num_steps > 20)


def test_a_paced_run_waits_between_its_steps_without_working(engine):
    run = engine.submit(a, 2, None, sampler=ceb.MALA(0.1), steps_per_second=0.01)
    wait_for(lambda: run.num_steps == 1)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.15
    run.cancel()  # and is ended at once
    assert run.result(TIMEOUT).num_steps == 1


def test_a_run_alone_is_sample_to_the_last_bit(engine):
    digit, thick = expert(seed=1), binary("thick", seed=2)
    mix = digit["0"] + 3 * (thick - thick["any"])
    options = {"num_chains": 3, "num_steps": 12, "seed": 1}
    runs = submit_together(
        engine, [(mix, {**options, "alone": True}), (mix, options), (digit["1"] | thick, options)]
    )
    out, alone = runs[0].result(TIMEOUT), ceb.sample(mix, **options)
    assert torch.equal(out.samples, alone.samples)
    assert torch.equal(out.trace.energy, alone.trace.energy)
    assert [run.shared for run in runs] == [False, True, True]
