"""`sample`: what comes back, calibrated settings, and requests that make no sense."""

import pytest
import torch
from helpers import Quadratic, expert, gaussians, points, seeded

import composable_ebm as ceb
from composable_ebm.sampling.request import calibrated_sampler

a, b, c = gaussians()

# --- what comes back -----------------------------------------------------------------------------


def test_result_holds_states_energies_and_a_trace_of_every_step():
    out = ceb.sample(a + b, num_chains=5, num_steps=7, num_warmup=2, sampler=ceb.MALA(0.3), seed=3)
    assert out.samples.shape == (5, 2)
    torch.testing.assert_close(out.energies, (a + b)(out.samples))
    trace = out.trace
    assert trace.energy.shape == trace.gradient_norm.shape == trace.acceptance.shape == (9, 5)
    assert trace.step_size.shape == (9,)
    torch.testing.assert_close(trace.energy[-1], out.energies)
    torch.testing.assert_close(trace.gradient_norm[-1], (a + b).score(out.samples).norm(dim=1))
    assert (out.recipe, out.num_steps, out.warmup, out.seed) == ("a + b", 9, 2, 3)
    assert out.evaluations == 10
    assert not out.samples.requires_grad


def test_unadjusted_kernels_have_no_acceptance():
    out = ceb.sample(a, num_steps=2, sampler=ceb.Langevin(0.1))
    assert out.trace.acceptance is None
    assert out.acceptance_rate is None
    assert "acceptance  " not in out.report()


def test_zero_steps_give_the_starting_states():
    init = points()
    out = ceb.sample(a, init=init, num_steps=0, sampler=ceb.Langevin(0.1))
    torch.testing.assert_close(out.samples, init, rtol=0, atol=0)
    assert out.trace.energy.shape == (0, 8)
    assert "nan" in out.report()


def test_trajectory_holds_every_so_many_states_and_the_start():
    init = points()
    out = ceb.sample(a, init=init, num_steps=10, keep_every=3, sampler=ceb.Langevin(0.1))
    assert out.trajectory.shape == (4, 8, 2)
    torch.testing.assert_close(out.trajectory[0], init, rtol=0, atol=0)
    short = ceb.sample(a, init=init, num_steps=6, sampler=ceb.Langevin(0.1))
    torch.testing.assert_close(out.trajectory[2], short.samples, rtol=0, atol=0)
    assert short.trajectory is None


def test_callback_sees_the_chain_at_its_steps_and_at_the_end():
    seen = []
    ceb.sample(
        a,
        num_steps=10,
        sampler=ceb.Langevin(0.1),
        keep_every=3,
        callback=lambda step, chain: seen.append((step, chain.num_steps, tuple(chain.x.shape))),
        callback_every=4,
    )
    assert seen == [(s, s, (16, 2)) for s in (4, 8, 10)]


def test_callback_that_returns_true_ends_the_run():
    out = ceb.sample(a, num_steps=10, sampler=ceb.Langevin(0.1), callback=lambda step, _: step == 4)
    assert out.num_steps == 4
    assert len(out.trace.energy) == 4
    whole = ceb.sample(a, num_steps=4, sampler=ceb.Langevin(0.1))
    torch.testing.assert_close(out.samples, whole.samples, rtol=0, atol=0)


def test_callback_may_return_anything_else():
    for value in (None, 1, "yes", torch.tensor(True)):
        out = ceb.sample(a, num_steps=3, sampler=ceb.Langevin(0.1), callback=lambda *_, v=value: v)
        assert out.num_steps == 3


def test_callback_may_steer_the_chain():
    def move(step, chain):
        chain.coefficients = torch.tensor([0.0, 1.0])

    out = ceb.sample(
        Quadratic(2.0, -9.0) + Quadratic(2.0, 9.0), num_steps=60, sampler=ceb.Langevin(0.2), callback=move
    )
    assert out.samples.mean() > 8


def test_report_says_how_it_went():
    out = ceb.sample(0.1 * a + b, num_chains=8, num_steps=40, sampler=ceb.MALA(0.2, temperature=0.5))
    report = out.report()
    for line in (
        "recipe  0.1*a + b",
        "8 chains, 40 steps",
        "temperature  0.5",
        f"acceptance  {out.acceptance_rate:.3f}",
        f"ESS {out.ess:.0f} of 160, R-hat {out.r_hat:.3f}",
        "diverged  0 of 8",
        "term  0.1*a: ",
    ):
        assert line in report, line
    assert "PROBLEM" not in report


def test_starting_states_are_uniform_over_the_data_range_or_standard_normal():
    images = ceb.sample(expert(), num_chains=500, num_steps=0).samples
    assert -1 <= images.min() < -0.99
    assert 0.99 < images.max() <= 1
    assert float(images.var()) == pytest.approx(1 / 3, abs=0.02)
    vectors = ceb.sample(a, num_chains=5_000, num_steps=0, sampler=ceb.Langevin(0.1)).samples
    assert float(vectors.var()) == pytest.approx(1, abs=0.06)


def test_chains_may_start_from_a_data_set():
    class Images:
        def __len__(self):
            return 3

        def batch(self, index):
            return index.float()[:, None, None, None].expand(-1, 1, 4, 4) / 10

    out = ceb.sample(expert(), init=Images(), num_chains=40, num_steps=0)
    assert sorted(out.samples[:, 0, 0, 0].unique().tolist()) == pytest.approx([0, 0.1, 0.2])


# --- calibrated settings -------------------------------------------------------------------------


def test_calibrated_settings_are_used_by_default():
    out = ceb.sample(expert())
    assert out.sampler == ceb.Langevin(0.1)
    assert out.num_steps == 12
    assert ceb.sample(expert(), num_steps=3).num_steps == 3


@pytest.mark.parametrize(
    ("build", "total"),
    [
        (lambda e, f: e + f, 2),
        (lambda e, f: 2 * e - 0.5 * f, 2.5),
        (lambda e, f: 0.25 * e, 1),
        (lambda e, f: 3 * (e | 2 * f), 6),
        (lambda e, f: e + 2 * ceb.negate(3 * f, 1.0), 7),
        (lambda e, f: torch.tensor([1.0, -4.0]) * e + f, 5),
    ],
)
def test_calibrated_step_is_divided_by_the_sum_of_the_absolute_weights(build, total):
    kernel, _ = calibrated_sampler(build(expert("one"), expert("two")))
    assert kernel.step_size == pytest.approx(0.1 / total)


def test_settings_of_the_expert_with_the_most_steps_decide():
    slow = expert("slow", sampler={"kernel": "Langevin", "step_size": 0.01, "num_steps": 99})
    kernel, num_steps = calibrated_sampler(expert("fast") | slow)
    assert (kernel.step_size, num_steps) == (0.01, 99)


def test_experts_without_settings_or_with_different_kernels_need_a_sampler():
    with pytest.raises(
        ValueError, match=r"a was not calibrated with a sampler; give one, e\.g\. sampler=Lang"
    ):
        ceb.sample(a)
    other = expert("other", sampler={"kernel": "MALA", "step_size": 0.01})
    with pytest.raises(
        ValueError, match=r"calibrated with different kernels, \['Langevin', 'MALA'\]: give one"
    ):
        ceb.sample(expert() + other)


# --- requests that make no sense -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "options", "error", "message"),
    [
        (a, {"num_steps": -1}, ValueError, "`num_steps` must be a whole number of at least 0, got -1"),
        (a, {"num_steps": 1.5}, ValueError, "`num_steps` must be a whole number"),
        (a, {"num_warmup": -1}, ValueError, "`num_warmup` must be a whole number"),
        (a, {"num_chains": 0}, ValueError, "`num_chains` must be a whole number of at least 1, got 0"),
        (a, {"keep_every": 0}, ValueError, "`keep_every` must be at least 1, got 0"),
        (a, {"callback_every": 0}, ValueError, "`callback_every` must be at least 1, got 0"),
        (
            a,
            {"on_divergence": "stop"},
            ValueError,
            '`on_divergence` must be "raise" or "report", got \'stop\'',
        ),
        (a, {"seed": 1, "generator": torch.Generator()}, ValueError, "a `seed` or a `generator`, not both"),
        (a, {"mask": torch.ones(2)}, ValueError, "holds part of given states: give them as `init`"),
        (a, {"init": points(), "mask": torch.ones(3)}, ValueError, r"must broadcast .* \(8, 2\), got \(3,\)"),
        (a, {"init": points(), "num_chains": 3}, ValueError, "`num_chains` is 3 but `init` holds 8 states"),
        (a, {"init": points(8, (3,))}, ValueError, r"`x` must have shape \(batch, 2\) for a, got \(8, 3\)"),
        (a, {"init": points() / 0}, ValueError, "`init` holds values that are not finite"),
        (
            expert(),
            {"init": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)},
            ValueError,
            r"floating point in \[-1, 1\], got torch.uint8. From bytes: init.float\(\) / 255 \* 2 \+ -1",
        ),
        (a, {"init": torch.zeros(2, 2, device="meta")}, ValueError, r"on several devices, \['cpu', 'meta'\]"),
        (ceb.from_callable(lambda x: x.sum(1), name="f"), {}, ValueError, "f does not know the shape of its"),
        ("a", {}, TypeError, "`energy` must be an Energy, got str; wrap it with from_callable"),
        (-a, {}, ValueError, "-a has no term with a positive weight, .* or use ~a for a bounded NOT"),
        (-a - 2 * b, {}, ValueError, "no term with a positive weight"),
        (0 * a, {}, ValueError, "no term with a positive weight"),
        (a + b, {"coefficients": torch.tensor([-1.0, 0.0])}, ValueError, "no term with a positive weight"),
        (
            a + b,
            {"num_chains": 2, "coefficients": torch.tensor([[1.0, 0.0], [-1.0, -1.0]])},
            ValueError,
            "no term with a positive weight",
        ),
        (torch.tensor([1.0, -1.0]) * a, {"num_chains": 2}, ValueError, "no term with a positive weight"),
    ],
)
def test_requests_that_make_no_sense_are_refused(energy, options, error, message):
    with pytest.raises(error, match=message):
        ceb.sample(energy, sampler=ceb.Langevin(0.1), **{"num_steps": 2, **options})


def test_chain_refuses_coefficients_that_do_not_fit():
    chain = ceb.Chain(a + b, points(), ceb.Langevin(0.1), ceb.Noise((seeded(0), 8)))
    with pytest.raises(ValueError, match=r"`coefficients` must have shape \(2,\) or \(batch, 2\)"):
        chain.coefficients = torch.ones(3)


def test_ratio_inside_a_sum_with_a_base_is_sampled():
    out = ceb.sample(a + ceb.ratio(b, c), num_steps=1, sampler=ceb.Langevin(0.1))
    assert out.samples.isfinite().all()


def test_report_names_modes_between_which_chains_do_not_travel():
    modes = ceb.analytic.GaussianMixture([[-8.0], [8.0]], 1.0)
    out = ceb.sample(modes, num_chains=32, num_steps=400, sampler=ceb.MALA(0.5), seed=1, init=_both_modes(32))
    assert out.r_hat > 1.5
    assert any("have not mixed" in problem for problem in out.problems)


def _both_modes(count):
    signs = torch.tensor([-1.0, 1.0]).repeat(count // 2)
    return 8 * signs[:, None]


def test_report_says_nothing_of_chains_that_mix():
    out = ceb.sample(Quadratic(), num_chains=32, num_steps=400, sampler=ceb.MALA(1.0), seed=1)
    assert out.r_hat < 1.05
    assert out.problems == []


def test_report_names_a_kernel_that_never_moves():
    out = ceb.sample(Quadratic(1e4), num_chains=16, num_steps=50, sampler=ceb.MALA(1.0), seed=0)
    assert any("hardly moves" in problem for problem in out.problems)


def test_report_names_samples_outside_the_data():
    away = Quadratic(1.0, mean=9.0)
    away.data_range = (-1.0, 1.0)
    out = ceb.sample(away, num_chains=8, num_steps=60, sampler=ceb.Langevin(0.1), seed=0)
    assert any("lie far outside the data" in problem for problem in out.problems)


def test_report_names_temperatures_that_differ():
    cold, warm = expert("cold", temperature=1e-6), expert("warm", seed=1, temperature=1.0)
    out = ceb.sample(cold["0"] + warm["0"], num_chains=4, num_steps=5, seed=0)
    assert any("different temperatures" in problem for problem in out.problems)
    same = ceb.sample(warm["0"] + warm["1"], num_chains=4, num_steps=5, seed=0)
    assert not any("temperatures" in problem for problem in same.problems)
