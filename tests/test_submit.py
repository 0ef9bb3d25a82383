"""Many requests at once: what `Engine` gives each is what it would get alone."""

import threading
import time

import pytest
import torch
from helpers import Counted, Quadratic, Wide, binary, expert, gaussians, points
from submit_helpers import TIMEOUT, Gate, same_as_alone, submit_together, wait_for
from torch import nn

import composable_ebm as ceb
from composable_ebm.potential.rows import as_one_batch
from composable_ebm.sampling.schedule import Schedule, geometric, linear

KERNELS = [
    ceb.Langevin(0.05),
    ceb.Langevin(0.05, noise_scale=0.1, grad_clip=1.0, noise_first=True),
    ceb.MALA(0.05),
    ceb.HMC(0.1, num_leapfrog=2),
    ceb.UnderdampedLangevin(0.1),
    ceb.LeimkuhlerMatthews(0.05),
]
a, b, c = gaussians()


def kernel_name(kernel):
    return type(kernel).__name__


@pytest.fixture
def engine():
    with ceb.Engine() as engine:
        yield engine


# --- equal to `sample` ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_requests_in_company_give_what_they_give_alone(engine, kernel):
    compositions = [a + b, 2 * a - 0.5 * c, c, a + (b | c), a + ceb.negate(c, 1.0)]
    requests = [
        (e, {"num_chains": 2 + i, "num_steps": 20 + 3 * i, "seed": i, "sampler": kernel})
        for i, e in enumerate(compositions)
    ]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs)
    assert all("in a batch with other requests" in run.result().report() for run in runs)


def test_step_size_temperature_and_noise_may_differ_within_a_batch(engine):
    samplers = [
        ceb.Langevin(0.05, noise_scale=0.3),
        ceb.Langevin(0.1, noise_scale=0.01),
        ceb.MALA(0.2, temperature=2.0),
        ceb.MALA(0.1, temperature=0.5),
    ]
    requests = [(a + b, {"num_steps": 15, "sampler": sampler}) for sampler in samplers]
    same_as_alone(requests, submit_together(engine, requests))


def test_each_run_is_at_its_own_place_in_its_own_schedule(engine):
    schedules = [
        Schedule(noise_level=geometric(2.0, 0.1), noise_power=2.0, predict=True, num_levels=5),
        Schedule(noise_level=geometric(3.0, 0.2), noise_power=2.0, predict=True),
        Schedule(noise_level=geometric(3.0, 0.2), num_levels=3),
        Schedule(temperature=linear(3.0, 1.0), step_scale=linear(1.0, 0.2)),
        Schedule(temperature=linear(2.0, 1.0)),
    ]
    requests = [
        (
            mix,
            {
                "num_chains": 3,
                "num_steps": 11 + 4 * i,
                "seed": i,
                "sampler": ceb.Annealed(ceb.Langevin(0.02), schedule),
            },
        )
        for i, (mix, schedule) in enumerate(zip([a + b, a, b + c, a + c, b], schedules, strict=True))
    ]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs)
    # Those that anneal a noise level are one batch, the others another one.
    assert all("in a batch" in run.result().path for run in runs)


def test_runs_along_axes_of_their_own_and_of_others_share_nothing(engine):
    levels = Schedule(noise_level=geometric(10.0, 0.5), noise_power=2.0, predict=True, num_levels=4)
    sampler = ceb.Annealed(ceb.LeimkuhlerMatthews(0.3), levels)
    one, other = Wide([90.0, 1.0, 4.0]), Wide([1.0, 40.0, 70.0])
    options = {"num_chains": 3, "num_steps": 12, "sampler": sampler}
    requests = [
        (one, options),
        (one, {**options, "num_steps": 9, "seed": 1}),
        (one, {**options, "mask": torch.tensor([1.0, 1.0, 0.0]), "init": points(3, (3,))}),
        (other, {**options, "seed": 2}),
        (Wide([1.0, 1.0, 1.0]), {**options, "seed": 3}),
    ]
    same_as_alone(requests, submit_together(engine, requests))


def test_step_sizes_adapt_for_each_run_by_itself(engine):
    kernel = ceb.MALA(0.5, target_acceptance=0.6)
    requests = [
        (e, {"num_chains": 50, "num_steps": 5, "num_warmup": 40, "seed": i, "sampler": kernel})
        for i, e in enumerate([a, 9 * a])
    ]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs, tolerance=1e-3)
    wide, narrow = (float(run.result().trace.step_size[-1].mean()) for run in runs)
    assert wide > 4 * narrow


def test_masks_hold_the_rows_of_their_run_alone(engine):
    init = points(6)
    common = {"num_steps": 10, "sampler": ceb.UnderdampedLangevin(0.2)}
    requests = [
        (a, {"init": init, "mask": torch.tensor([1.0, 0.0]), **common}),
        (a + b, {"init": init, **common}),
    ]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs)
    assert (runs[0].result().samples[:, 1] == init[:, 1]).all()
    assert (runs[1].result().samples != init).all()


def test_runs_join_between_the_steps_of_others(engine):
    seen = threading.Event()
    options = {"num_chains": 3, "num_steps": 150, "sampler": ceb.MALA(0.1)}
    long = engine.submit(a + b, **options, on_frame=lambda _: seen.set())
    assert seen.wait(TIMEOUT)
    requests = [(m, {**options, "num_steps": 20, "seed": i}) for i, m in enumerate([a + c, b])]
    runs = [engine.submit(m, **o) for m, o in requests]
    same_as_alone(requests, runs)
    same_as_alone([(a + b, options)], [long], tolerance=1e-4)


def test_experts_of_one_family_share_a_batch(engine):
    digit, thick, wide = expert(seed=1), binary("thick", seed=2), binary("wide", seed=3)
    mixes = [digit["0"] + thick, ~thick + 0.5 * wide, ceb.given(digit["1"], wide), digit["2"] | thick]
    requests = [(m, {"num_chains": 3, "num_steps": 12, "seed": i}) for i, m in enumerate(mixes)]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs, tolerance=1e-4)
    assert all("other requests" in run.result().path for run in runs)


def test_rows_of_one_batch_may_have_weights_of_their_own(engine):
    weights = torch.tensor([0.5, 1.0, 2.0])
    requests = [
        (weights * a + b, {"num_chains": 3, "num_steps": 9, "sampler": ceb.Langevin(0.1)}),
        (a + 2 * b, {"num_chains": 2, "num_steps": 9, "sampler": ceb.Langevin(0.1)}),
    ]
    same_as_alone(requests, submit_together(engine, requests))


def test_calibrated_settings_are_used_by_default(engine):
    out = engine.submit(expert(), 2).result(TIMEOUT)
    assert (out.num_steps, out.sampler) == (12, ceb.Langevin(0.1))


def test_given_states_and_global_random_state_are_left_alone(engine):
    before, init = torch.get_rng_state(), points(3)
    with torch.inference_mode():
        run = engine.submit(a, num_steps=3, init=init, sampler=ceb.Langevin(0.1))
    assert run.result(TIMEOUT).samples.shape == (3, 2)
    torch.testing.assert_close(init, points(3), rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


# --- who pays for what ---------------------------------------------------------------------------


class Root(ceb.Energy):
    """√x: left of 0 neither its energy nor its gradient is a number."""

    event_shape = (1,)

    def energy(self, x, noise_level=None):
        return x.sqrt().sum(1)


def test_a_term_that_is_no_number_elsewhere_does_not_reach_the_rows_without_it(engine):
    quadratic, root, left = Quadratic(), Root(), torch.full((4, 1), -3.0)
    common = {"num_steps": 10, "sampler": ceb.Langevin(0.01, temperature=1e-6)}
    requests = [
        (quadratic, {"init": left, **common}),
        (quadratic + root, {"init": -left, **common}),
        (0.5 * quadratic, {"init": left, **common}),
    ]
    same_as_alone(requests, submit_together(engine, requests))


def test_networks_see_only_the_rows_that_ask_for_them(engine):
    thick, wide, tall = binary("thick", seed=2), binary("wide", seed=3), binary("tall", seed=4)
    rows = {"thick": set(), "wide": set(), "tall": set()}
    for other in (thick, wide, tall):
        name = other.card.name
        other.network.register_forward_pre_hook(lambda _, x, name=name: rows[name].add(len(x[0])))
        other.network.features.append(nn.Identity())  # no chain of known layers, so that hooks run
    requests = [
        (thick + wide, {"num_chains": 3, "num_steps": 4}),
        (thick + 2 * tall, {"num_chains": 5, "num_steps": 4}),
    ]
    runs = submit_together(engine, requests)
    for run in runs:
        run.result(TIMEOUT)
    assert max(rows["thick"]) == 8
    assert max(rows["wide"]) == 3
    assert max(rows["tall"]) == 5


def test_moving_a_weight_makes_no_new_potential(engine):
    run = engine.submit(a + b, 3, None, sampler=ceb.Langevin(0.1))
    frames = run.frames()
    next(frames)
    before = engine.potentials_made
    for i in range(20):
        run.steer(a + (1 + i / 10) * b)
        next(frames)
    assert engine.potentials_made == before
    run.steer(a + b + c)
    next(frames)
    next(frames)
    assert engine.potentials_made > before
    run.cancel()


def test_several_compositions_are_one_with_a_row_of_coefficients_each():
    x = points(4)
    expressions = [a + 2 * b, c, b - 0.5 * (a | c), a + ceb.negate(b, 0.3) + (a | c)]
    whole, coefficients = as_one_batch(expressions)
    for i, expression in enumerate(expressions):
        torch.testing.assert_close(whole(x, coefficients=coefficients[i]), expression(x))
    with pytest.raises(ValueError, match=r"the weights of .* differ from chain to chain; here an expression"):
        as_one_batch([torch.tensor([1.0, 2.0]) * a])


# --- steering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_steering_moves_its_own_chains_and_no_others(engine, kernel):
    left, right = Quadratic(4.0, -5.0), Quadratic(4.0, 5.0)
    requests = [(left, {"num_chains": 20, "num_steps": 500, "seed": 1, "sampler": kernel})]
    (other,) = submit_together(engine, requests)
    run = engine.submit(left, 20, None, seed=2, sampler=kernel)
    wait_for(lambda: run.num_steps > 20)
    run.steer(0.1 * left + right)
    assert str(run.composition) == str(0.1 * left + right)
    now = run.num_steps
    wait_for(lambda: run.num_steps > now + 150)
    run.cancel()
    assert float(run.result(TIMEOUT).samples.mean()) > 3
    same_as_alone(requests, [other], tolerance=1e-4)


def test_steering_restarts_the_step_size_that_experts_were_calibrated_with(engine):
    one, two = expert("one"), expert("two", seed=1)
    run = engine.submit(one, 2, None)
    run.steer(one + 3 * two)
    wait_for(lambda: run.num_steps > 5)
    run.cancel()
    assert float(run.result(TIMEOUT) and run.block.dynamics.step_size) == pytest.approx(0.1 / 4)


def test_steering_twice_before_a_step_keeps_the_sampler():
    gate = Gate()
    with ceb.Engine() as engine:
        run = engine.submit(gate, 1, None, sampler=ceb.Langevin(0.1))
        run.steer(Quadratic(2.0), ceb.MALA(0.2))
        run.steer(Quadratic(3.0))
        gate.opened.set()
        wait_for(lambda: run.num_steps > 3)
        run.cancel()
        out = run.result(TIMEOUT)
    assert out.sampler == ceb.MALA(0.2)
    torch.testing.assert_close(out.energies, 1.5 * out.samples[:, 0].square())


def test_steering_with_a_sampler_stirs_and_then_stays_at_its_last_level(engine):
    kernel = ceb.Langevin(0.3)

    def annealed(start):
        schedule = Schedule(noise_level=geometric(start, 0.2), noise_power=2.0, predict=True)
        return ceb.Annealed(kernel, schedule)

    run = engine.submit(Quadratic(25.0), 200, None, sampler=annealed(5.0), schedule_steps=10)
    levels = [float(frame.noise_level) for frame, _ in zip(run.frames(), range(30), strict=False)]
    wait_for(lambda: run.num_steps > 40)
    frame = next(run.frames())
    assert levels == sorted(levels, reverse=True)
    assert float(frame.noise_level) == pytest.approx(0.2)
    run.steer(Quadratic(25.0, 1.0), annealed(2.0), schedule_steps=1000)
    steered = next(f for f in run.frames() if float(f.noise_level) > 0.3)
    assert float(steered.states.std()) > 1.5
    run.cancel()


def test_denoised_frames_are_the_mean_of_what_is_behind_the_noise(engine):
    schedule = Schedule(noise_level=linear(0.5, 0.5))
    target = ceb.analytic.Gaussian([1.0, 2.0], [1e-4, 1e-4])
    sampler = ceb.Annealed(ceb.Langevin(0.05), schedule)
    run = engine.submit(target, 200, None, sampler=sampler)
    wait_for(lambda: run.num_steps > 40)
    frame = next(run.frames())
    run.cancel()
    assert float(frame.states.std(dim=0).mean()) > 0.3
    torch.testing.assert_close(frame.denoised, torch.tensor([1.0, 2.0]).expand(200, 2), atol=0.01, rtol=0)


def test_steering_to_another_kernel_moves_the_run_to_another_batch(engine):
    run = engine.submit(a, 4, None, sampler=ceb.Langevin(0.1))
    run.steer(a + b, ceb.HMC(0.2, num_leapfrog=3))
    wait_for(lambda: run.num_steps > 30)
    run.cancel()
    assert run.result(TIMEOUT).sampler == ceb.HMC(0.2, num_leapfrog=3)


def test_chains_that_diverged_go_on_after_steering(engine):
    run = engine.submit(Quadratic(1e4), 4, None, sampler=ceb.Langevin(0.1), on_divergence="report")
    wait_for(lambda: run.num_steps > 60)
    assert not next(run.frames()).alive.any()
    run.steer(Quadratic(1.0))
    wait_for(lambda: bool(next(run.frames()).alive.all()))
    run.cancel()
    assert not run.result(TIMEOUT).divergence.any


@pytest.mark.parametrize(
    ("composition", "error", "message"),
    [
        (Quadratic(dimension=3), ValueError, r"a run keeps its states: .* Submit it as a run of its own"),
        (-1 * a, ValueError, "no term with a positive weight"),
        (torch.ones(7) * a, ValueError, "`coefficients` must have shape"),
        ("a", TypeError, "`composition` must be an Energy, got str"),
    ],
)
def test_steering_that_makes_no_sense_is_refused_and_the_run_goes_on(engine, composition, error, message):
    run = engine.submit(a, 4, None, sampler=ceb.Langevin(0.1))
    with pytest.raises(error, match=message):
        run.steer(composition)
    now = run.num_steps
    wait_for(lambda: run.num_steps > now + 3)
    assert run.composition is a


# --- frames --------------------------------------------------------------------------------------


def test_frames_come_at_their_own_rate_and_the_last_one_always_comes(engine):
    steps = {"every": [], "seventh": [], "slow": []}
    options = {"num_steps": 100, "sampler": ceb.MALA(0.1)}

    def slow(frame):
        steps["slow"].append(frame.step)
        time.sleep(0.05)

    requests = [
        (a, {**options, "on_frame": lambda f: steps["every"].append(f.step)}),
        (a, {**options, "on_frame": lambda f: steps["seventh"].append(f.step), "frame_every": 7}),
        (a, {**options, "on_frame": slow}),
        (a, {**options, "on_frame": lambda _: None, "frames_per_second": 1e-3}),
    ]
    for run in submit_together(engine, requests):
        run.result(TIMEOUT)
    for seen in steps.values():
        assert seen[-1] == 100
        assert seen == sorted(set(seen))
    assert {step % 7 for step in steps["seventh"][:-1]} <= {0}
    assert len(steps["slow"]) < len(steps["every"])


def test_a_frame_is_what_the_run_has_reached(engine):
    frames = []
    run = engine.submit(a + b, 3, 20, sampler=ceb.MALA(0.1), on_frame=lambda f: frames.append(f))
    out = run.result(TIMEOUT)
    last = frames[-1]
    torch.testing.assert_close(last.states, out.samples, rtol=0, atol=0)
    torch.testing.assert_close(last.energies, out.energies)
    torch.testing.assert_close(last.gradients, -(a + b).score(out.samples))
    assert last.noise_level is None
    assert last.denoised is last.states
    assert [f.step for f in run.frames()] == [20]


def test_on_frame_that_returns_true_ends_the_run(engine):
    run = engine.submit(a, 3, None, sampler=ceb.MALA(0.1), on_frame=lambda f: f.step >= 5)
    assert run.result(TIMEOUT).num_steps >= 5
    assert run.cancelled


# --- the end -------------------------------------------------------------------------------------


def test_a_cancelled_run_gives_what_it_has_reached(engine):
    options = {"num_chains": 3, "sampler": ceb.MALA(0.1), "seed": 4}
    run = engine.submit(a + b, num_steps=10**6, **options)
    wait_for(lambda: run.num_steps > 10)
    assert not run.done
    run.cancel()
    out = run.result(TIMEOUT)
    assert run.done
    assert 10 < out.num_steps < 10**6
    alone = ceb.sample(a + b, num_steps=out.num_steps, **options)
    torch.testing.assert_close(out.samples, alone.samples, rtol=1e-4, atol=1e-4)
    assert len(out.trace.energy) == out.num_steps
    run.cancel()  # once more does no harm


def test_run_without_end_keeps_no_trace(engine):
    run = engine.submit(a, 3, None, sampler=ceb.MALA(0.1))
    wait_for(lambda: run.num_steps > 20)
    run.cancel()
    out = run.result(TIMEOUT)
    assert out.trace.energy.shape == (0, 3)
    assert "20" in str(out.num_steps) or out.num_steps > 20
    assert out.report()


def test_result_says_how_far_it_is_when_time_runs_out(engine):
    run = engine.submit(a, 3, None, sampler=ceb.MALA(0.1))
    with pytest.raises(TimeoutError, match=r"the run has not ended after 0\.01 s; it is at step \d+"):
        run.result(0.01)


def test_closing_ends_all_runs_and_refuses_new_ones():
    before = threading.active_count()
    with ceb.Engine() as engine:
        runs = [engine.submit(a, 3, None, sampler=ceb.MALA(0.1), on_frame=lambda _: None) for _ in range(3)]
        assert set(engine.runs) == set(runs)
    assert all(run.result(TIMEOUT).samples.isfinite().all() for run in runs)
    assert engine.runs == ()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.submit(a, 3, 1, sampler=ceb.MALA(0.1))
    assert threading.active_count() == before


# --- fairness ------------------------------------------------------------------------------------


def test_a_long_request_does_not_starve_a_short_one():
    with ceb.Engine(max_batch=8) as engine:
        long = engine.submit(a + b, 8, None, sampler=ceb.MALA(0.1))  # its batch is full
        wait_for(lambda: long.num_steps > 3)
        before = long.num_steps
        engine.submit(a + c, 2, 20, sampler=ceb.MALA(0.1)).result(TIMEOUT)
        assert long.num_steps - before < 120
        assert long.num_steps > before


def test_batches_that_cost_more_get_as_much_time_and_fewer_steps(engine):
    def slow(x):
        time.sleep(0.1)
        return x.square().sum(1)

    heavy = engine.submit(ceb.from_callable(slow), init=points(2), num_steps=None, sampler=ceb.Langevin(0.1))
    light = engine.submit(a, 2, None, sampler=ceb.MALA(0.1))
    wait_for(lambda: heavy.num_steps >= 6)
    assert light.num_steps > 2 * heavy.num_steps


def test_what_does_not_fit_one_batch_takes_turns():
    with ceb.Engine(max_batch=5) as engine:
        requests = [
            (m, {"num_chains": 3, "num_steps": 20, "seed": i, "sampler": ceb.Langevin(0.1)})
            for i, m in enumerate([a, b, a + c])
        ]
        requests.append((a, {"num_chains": 2, "num_steps": 20, "sampler": ceb.HMC(0.1)}))
        requests.append(
            (Quadratic(dimension=3), {"num_steps": 9, "num_chains": 4, "sampler": ceb.Langevin(0.1)})
        )
        same_as_alone(requests, submit_together(engine, requests))
        with pytest.raises(
            ValueError, match=r"`num_chains` is 6, more than this engine steps together \(5\)"
        ):
            engine.submit(a, 6, 1, sampler=ceb.Langevin(0.1))


def test_batches_that_shrink_become_one():
    def asked(num_chains, num_steps, seed):
        kernel = ceb.Langevin(0.1)
        return a + b, {"num_chains": num_chains, "num_steps": num_steps, "seed": seed, "sampler": kernel}

    with ceb.Engine(max_batch=5) as engine:
        # 4 + 1 chains fill the first batch; of the second, 3 + 1 that end together, one would fit once
        # the first has lost its 1.
        requests = [asked(4, 60, 0), asked(1, 5, 1), asked(3, 20, 2), asked(1, 20, 3), asked(1, 40, 4)]
        same_as_alone(requests, submit_together(engine, requests))


# --- errors --------------------------------------------------------------------------------------


def failing(after, rows=None):
    """An energy whose calls fail after so many, if given only on batches of so many rows or more."""
    calls = []

    def energy(x):
        calls.append(len(x))
        if len(calls) > after and len(x) >= (rows or 0):
            raise RuntimeError("the network is broken")
        return x.square().sum(1)

    return ceb.from_callable(energy, name="broken", event_shape=(2,))


def test_an_error_reaches_only_the_request_that_has_it(engine):
    requests = [
        (m, {"num_chains": 3, "num_steps": 30, "seed": i, "sampler": ceb.UnderdampedLangevin(0.1)})
        for i, m in enumerate([a + b, b + c, a])
    ]
    broken = (a + failing(10), {"num_chains": 2, "num_steps": 30, "sampler": ceb.UnderdampedLangevin(0.1)})
    *runs, bad = submit_together(engine, [*requests, broken])
    with pytest.raises(RuntimeError, match="the network is broken"):
        bad.result(TIMEOUT)
    assert bad.done
    same_as_alone(requests, runs)
    # The engine goes on.
    same_as_alone(requests[:1], [engine.submit(requests[0][0], **requests[0][1])])


def test_an_error_in_the_last_step_of_others_leaves_them_their_results(engine):
    options = {"num_chains": 3, "num_steps": 10, "sampler": ceb.Langevin(0.1)}
    *runs, bad = submit_together(engine, [(a + b, options), (c, options), (a + failing(10), options)])
    with pytest.raises(RuntimeError, match="the network is broken"):
        bad.result(TIMEOUT)
    same_as_alone([(a + b, options), (c, options)], runs)


def test_an_error_before_the_first_step_reaches_the_request(engine):
    bad = engine.submit(failing(0), 2, 30, sampler=ceb.Langevin(0.1))
    with pytest.raises(RuntimeError, match="the network is broken") as caught:
        bad.result(TIMEOUT)
    assert caught.value is not None


def test_a_batch_that_fails_only_as_a_whole_goes_on_in_parts(engine):
    crowded = failing(0, rows=8)
    requests = [
        (crowded, {"num_chains": 5, "num_steps": 10, "seed": i, "sampler": ceb.Langevin(0.1)})
        for i in range(2)
    ]
    runs = submit_together(engine, requests)
    same_as_alone(requests, runs)
    assert engine.max_batch == 5


def test_an_error_of_on_frame_reaches_its_request(engine):
    def wrong(frame):
        raise ZeroDivisionError("on_frame is wrong")

    run = engine.submit(a, 3, None, sampler=ceb.MALA(0.1), on_frame=wrong)
    with pytest.raises(ZeroDivisionError, match="on_frame is wrong"):
        run.result(TIMEOUT)


def test_divergence_reaches_only_the_request_that_has_it(engine):
    steep = {"num_chains": 3, "num_steps": 60, "sampler": ceb.Langevin(0.1)}
    requests = [(Quadratic(), steep)]
    runs = submit_together(
        engine, [*requests, (Quadratic(1e3), steep), (Quadratic(1e3), {**steep, "on_divergence": "report"})]
    )
    with pytest.raises(ceb.ChainDivergedError, match=r"3 of 3 chains diverged, the first at step (\d+)"):
        runs[1].result(TIMEOUT)
    with pytest.raises(ceb.ChainDivergedError) as alone:
        ceb.sample(Quadratic(1e3), **steep)
    with pytest.raises(ceb.ChainDivergedError) as together:
        runs[1].result()
    assert str(together.value) == str(alone.value)
    assert runs[2].result(TIMEOUT).divergence.chains.all()
    same_as_alone(requests, runs[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "`num_steps` must be a whole number of at least 0, got -1"),
        ({"num_steps": 1.5}, "`num_steps` must be a whole number"),
        ({"num_chains": 0}, "`num_chains` must be a whole number of at least 1, got 0"),
        ({"frame_every": 0}, "`frame_every` must be at least 1, got 0"),
        ({"frames_per_second": 0}, "`frames_per_second` must be positive, got 0"),
        ({"steps_per_second": -1}, "`steps_per_second` must be positive, got -1"),
        ({"share": 0}, "`share` must be positive, got 0"),
        ({"held": "fast"}, '`held` must be "clean" or "noisy", got'),
        ({"held": "noisy"}, 'held="noisy" needs a `mask` of zeros and ones'),
        ({"held": "noisy", "mask": 0.5 * torch.ones(2), "init": points(2)}, "`mask` of zeros and ones"),
        ({"schedule_steps": 0}, "`schedule_steps` must be at least 1, got 0"),
        ({"mask": torch.ones(2)}, "holds part of given states: give them as `init`"),
        ({"on_divergence": "stop"}, '`on_divergence` must be "raise" or "report"'),
    ],
)
def test_requests_that_make_no_sense_are_refused_at_once(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(a, **{"num_steps": 1, "sampler": ceb.Langevin(0.1), **options})
    assert engine.runs == ()


def test_an_engine_of_no_chains_and_energies_elsewhere_are_refused():
    with pytest.raises(ValueError, match="`max_batch` must be at least 1, got 0"):
        ceb.Engine(max_batch=0)
    with (
        ceb.Engine(device="meta") as engine,
        pytest.raises(ValueError, match=r"a is on cpu, this engine on meta"),
    ):
        engine.submit(a, 1, 1, sampler=ceb.Langevin(0.1))


def test_noise_conditioned_energies_see_the_level_of_their_rows(engine):
    class Noted(Counted):
        def energy(self, x, noise_level=None):
            self.levels.append(noise_level)
            return self.inner.energy(x, noise_level)

    noted = Noted(a)
    schedules = [Schedule(noise_level=linear(3.0, 1.0)), Schedule(noise_level=linear(2.0, 0.5))]
    requests = [
        (noted, {"num_chains": 2, "num_steps": 3, "sampler": ceb.Annealed(ceb.Langevin(0.01), schedule)})
        for schedule in schedules
    ]
    for run in submit_together(engine, requests):
        run.result(TIMEOUT)
    rows = [level.tolist() for level in noted.levels if level is not None and level.ndim]
    assert [3.0, 3.0, 2.0, 2.0] in rows
    assert [1.0, 1.0, 0.5, 0.5] in rows


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_requests_on_a_gpu_give_what_they_give_alone(kernel):
    digit, thick, wide = (e.cuda() for e in (expert(seed=1), binary(seed=2), binary("wide", seed=3)))
    mixes = [digit["0"] + thick, ~thick + 0.5 * wide, ceb.given(digit["1"], wide)]
    schedule = Schedule(noise_level=geometric(1.0, 0.1), temperature=linear(2.0, 1.0), num_levels=4)
    requests = [
        (m, {"num_chains": 3, "num_steps": 12, "seed": i, "sampler": ceb.Annealed(kernel, schedule)})
        for i, m in enumerate(mixes)
    ]
    with ceb.Engine("cuda") as engine:
        same_as_alone(requests, submit_together(engine, requests), tolerance=1e-3)


@pytest.mark.gpu
def test_steps_of_a_joint_batch_never_wait_for_the_device():
    from composable_ebm.potential.rows import Plans
    from composable_ebm.sampling.block import Block
    from composable_ebm.sampling.joint import JointBatch

    thick, wide = binary("thick", seed=2).cuda(), binary("wide", seed=3).cuda()
    schedule = Schedule(noise_level=geometric(1.0, 0.1), noise_power=2.0, predict=True, num_levels=3)
    sampler, x = ceb.Annealed(ceb.Langevin(0.01), schedule), points(4, (1, 4, 4)).cuda()
    batch = JointBatch(None, x[:1], Plans())
    for seed, (mix, num_steps) in enumerate([(thick + wide, 7), (ceb.given(thick, wide), 9)]):
        noise = ceb.Noise((torch.Generator("cuda").manual_seed(seed), 4))
        block = Block(mix, x, sampler, noise, num_steps=num_steps)
        batch.join(block, batch.begin(block, x))
    batch.advance(1)
    batch.blocks[0].place = batch.blocks[1].place = 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in batch.blocks:
            batch.potential_of([block])
        batch.advance(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.rows.alive.all()
