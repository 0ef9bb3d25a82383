"""The engine's promises: what `sample` and `Chain` do beside stepping."""

import math

import pytest
import torch
from helpers import Quadratic, binary, card, expert, gaussians, points, variance_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import composable_ebm as ceb
from composable_ebm.sampling.fusion import FusedPotential
from composable_ebm.sampling.sample import calibrated_sampler

KERNELS = [
    ceb.Langevin(0.05),
    ceb.Langevin(0.05, noise_first=True),
    ceb.MALA(0.05),
    ceb.HMC(0.1, num_leapfrog=2),
    ceb.UnderdampedLangevin(0.1),
]
a, b, c = gaussians()


def kernel_name(kernel):
    return type(kernel).__name__


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- only input gradients ------------------------------------------------------------------------


class BackwardMasks(TorchDispatchMode):
    """Notes which gradients each convolution's backward pass computes: input, weight, bias."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return function(*args, **(kwargs or {}))


def trainable():
    energy = expert(seed=1)["0"] + binary(seed=2)
    return energy.requires_grad_(True)


@pytest.mark.parametrize("stack", [False, True])
def test_no_parameter_gradient_is_computed(stack):
    energy = trainable()
    potential = FusedPotential(energy, energy.coefficients.float(), stack=stack)
    with BackwardMasks() as noted:
        potential(points(3, (1, 4, 4)))
    assert noted.masks == ([(True, False, False)] if stack else [])  # compiled, it takes no backward at all
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())


def test_parameter_gradients_would_have_been_noticed():
    with BackwardMasks() as noted:
        trainable()(points(3, (1, 4, 4))).sum().backward()
    assert noted.masks == [(False, True, True)] * 2


class Watched(nn.Module):
    """A network with dropout that notes the mode it runs in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.dropout = nn.Dropout(0.5)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.dropout.training)
        return self.dropout(self.layer(x).cos())


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_modules_are_left_as_they_were(kernel):
    energy = ceb.from_classifier(Watched(), 0) + ceb.from_callable(
        nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    )
    modules = list(energy.modules())
    modes = [i % 2 == 0 for i in range(len(modules))]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    flags = [i % 2 == 0 for i, _ in enumerate(energy.parameters())]
    for parameter, flag in zip(energy.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    ceb.sample(energy, init=points(), num_steps=3, sampler=kernel)
    assert [m.training for m in modules] == modes
    assert [p.requires_grad for p in energy.parameters()] == flags
    assert all(p.grad is None for p in energy.parameters())


def test_networks_run_in_evaluation_mode():
    model = Watched().train()
    ceb.sample(ceb.from_classifier(model, 0), init=points(), num_steps=3, sampler=ceb.Langevin(0.1))
    assert not any(model.modes)
    assert model.training


def test_modules_are_left_as_they_were_after_an_exception():
    class Failing(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the third call fails")
            return x.square().sum(1)

    model = nn.Sequential(Failing(), nn.Dropout(0.5)).train()
    model[1].eval()
    with pytest.raises(RuntimeError, match="the third call fails"):
        ceb.sample(ceb.from_callable(model), init=points(), num_steps=5, sampler=ceb.Langevin(0.1))
    assert [m.training for m in model.modules()] == [True, True, False]


def test_given_states_are_not_changed():
    init = points()
    before = init.clone()
    ceb.sample(a, init=init, num_steps=3, sampler=ceb.Langevin(0.1))
    torch.testing.assert_close(init, before, rtol=0, atol=0)


def test_sampling_works_under_no_grad_and_inference_mode():
    expected = ceb.sample(a, num_steps=3, sampler=ceb.Langevin(0.1)).samples
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            got = ceb.sample(a, num_steps=3, sampler=ceb.Langevin(0.1)).samples
        torch.testing.assert_close(got.clone(), expected, rtol=0, atol=0)


# --- reproducible --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_global_random_state_is_neither_read_nor_changed(kernel):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = ceb.sample(a + binaryless(), num_steps=3, sampler=kernel, seed=4).samples
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.manual_seed(2)
    two = ceb.sample(a + binaryless(), num_steps=3, sampler=kernel, seed=4).samples
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def binaryless():
    return ceb.from_callable(lambda x: x[:, 0].cos())


def test_seed_is_zero_unless_given_and_a_generator_does_as_well():
    kwargs = {"num_chains": 5, "num_steps": 3, "sampler": ceb.Langevin(0.1)}
    plain = ceb.sample(a, **kwargs)
    assert plain.seed == 0
    torch.testing.assert_close(ceb.sample(a, seed=0, **kwargs).samples, plain.samples, rtol=0, atol=0)
    given = ceb.sample(a, generator=seeded(0), **kwargs)
    torch.testing.assert_close(given.samples, plain.samples, rtol=0, atol=0)
    assert given.seed is None
    assert (ceb.sample(a, seed=1, **kwargs).samples != plain.samples).any()


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_request_draws_the_same_noise_alone_and_in_company(kernel):
    energy = a + b + (b | c)
    blocks = [
        (3, 7, torch.tensor([1.0, 0.5, 0.2, 0.0, 1.0])),
        (5, 8, torch.tensor([0.3, 0.0, 2.0, 1.0, 0.0])),
    ]
    starts = [points(rows, seed=seed) for rows, seed, _ in blocks]

    def walk(starts, blocks):
        noise = ceb.Noise(*((seeded(seed), rows) for rows, seed, _ in blocks))
        coefficients = torch.cat([w.expand(rows, -1) for rows, _, w in blocks])
        chain = ceb.Chain(energy, torch.cat(starts), kernel, noise, coefficients=coefficients)
        return chain.advance(50)

    together = walk(starts, blocks).split([rows for rows, _, _ in blocks])
    for i in range(2):
        torch.testing.assert_close(
            together[i], walk(starts[i : i + 1], blocks[i : i + 1]), rtol=1e-5, atol=1e-5
        )


def test_coefficients_may_change_while_chains_run():
    target = Quadratic(2.0, -1.0) + Quadratic(2.0, 1.0)
    start = points(20_000, (1,))
    chain = ceb.Chain(target, start, ceb.MALA(0.4), ceb.Noise((seeded(0), 20_000)))
    chain.coefficients = torch.tensor([2.0, 0.0])
    chain.advance(30)
    assert float(chain.x.mean()) == pytest.approx(-1, abs=0.02)
    chain.coefficients = torch.tensor([0.0, 1.0])
    # The state is that of the new target before any step.
    torch.testing.assert_close(chain.state.energy, (chain.x[:, 0] - 1).square())
    torch.testing.assert_close(chain.state.gradient, 2 * (chain.x - 1))
    chain.advance(30)
    assert float(chain.x.mean()) == pytest.approx(1, abs=0.03)
    assert variance_error(chain.x, 1 / 2) < 0.05
    assert chain.coefficients.tolist() == [0, 1]


def test_step_size_and_temperature_may_change_while_chains_run():
    chain = ceb.Chain(Quadratic(), torch.ones(3, 1), ceb.Langevin(0.1), ceb.Noise((seeded(0), 3)))
    chain.advance(1)
    chain.dynamics = chain.dynamics._replace(
        step_size=torch.tensor([0.1, 0.2, 0.5]), temperature=torch.full((3,), 1e-12)
    )
    before = chain.x.clone()
    chain.advance(1)
    torch.testing.assert_close(chain.x, before * torch.tensor([[0.9], [0.8], [0.5]]), rtol=1e-4, atol=1e-4)
    assert chain.trace().step_size.shape == (2, 3)


# --- fused equals plain --------------------------------------------------------------------------


def compositions():
    digit, thick, wide = expert(seed=1), binary("thick", seed=2), binary("wide", seed=3)
    base = expert("base", ("any_digit",), seed=4)
    return {
        "values of one network": digit["0"] + 2 * digit["2"] - 0.5 * digit,
        "networks of one architecture": thick + 0.5 * wide,
        "different numbers of values": digit["2"] + thick - 0.5 * wide + base + digit,
        "negations and mixtures": ~thick + ~digit["1"] + (wide | base | 2 * digit["0"]),
        "with energies alone": thick + wide + ceb.from_callable(lambda x: x.square().flatten(1).sum(1)),
    }


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("name", compositions())
def test_fused_evaluation_equals_the_plain_one(name, stack):
    energy = compositions()[name]
    x = points(7, (1, 4, 4))
    rows = energy.coefficients.float() + torch.randn(7, energy.num_coefficients)
    for coefficients in (energy.coefficients.float(), rows):
        e, gradient = FusedPotential(energy, coefficients, stack=stack)(x)
        torch.testing.assert_close(e, energy(x, coefficients=coefficients), rtol=1e-5, atol=1e-5)
        score = energy.score(x, coefficients=coefficients)
        torch.testing.assert_close(gradient, -score, rtol=1e-4, atol=1e-5)


def test_values_of_one_network_share_one_pass():
    digit = expert()
    calls = []
    digit.network.register_forward_hook(lambda *_: calls.append(1))
    FusedPotential(digit["0"] + digit["1"] + ~digit["2"], stack=False)(points(3, (1, 4, 4)))
    assert len(calls) == 1


def test_networks_of_one_architecture_run_as_one_batched_pass():
    digit, thick = expert(seed=1), binary(seed=2)
    other = binary("large", network={**card().network, "num_values": 2, "hidden": 16})
    plan = FusedPotential(digit["0"] + digit["1"] + thick + other, stack=True).plan
    assert [len(group.networks) for group in plan.groups] == [2, 1]
    assert plan.describe() == "2 ConvEnergy in one batched pass, read by 3 terms; one ConvEnergy"


def test_noise_level_reaches_the_noise_conditioned_networks_of_a_batched_pass():
    class Conditioned(nn.Module):
        architecture = "conditioned"

        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x, noise_level=None):
            level = 1.0 if noise_level is None else noise_level
            return (self.scale * level * x.square()).flatten(1).sum(1, keepdim=True)

    description = card("noisy", ("only",), noise_conditioned=True)
    noisy = [ceb.Expert.standing(Conditioned(scale), description) for scale in (1.0, 3.0)]
    potential = FusedPotential(noisy[0] + noisy[1], torch.ones(2), stack=True)
    potential.noise_level = torch.tensor(0.5)
    x = points(3, (1, 4, 4))
    torch.testing.assert_close(potential(x)[0], 2 * x.square().flatten(1).sum(1))


def test_energy_without_a_path_to_the_states_is_refused():
    detached = ceb.from_callable(lambda x: x.detach().square().sum(1), name="detached")
    with pytest.raises(ValueError, match="energy of detached does not depend on `x` by a path that autograd"):
        ceb.sample(detached, init=points(), num_steps=1, sampler=ceb.Langevin(0.1))


def test_term_that_ignores_the_states_does_no_harm():
    shifted = a + ceb.from_callable(lambda x: x.new_ones(len(x)))
    one, two = (ceb.sample(e, num_steps=3, sampler=ceb.Langevin(0.1)).samples for e in (a, shifted))
    torch.testing.assert_close(one, two)


# --- inpainting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_mask_holds_its_part_exactly(kernel):
    init = points(6)
    out = ceb.sample(a, init=init, mask=torch.tensor([1.0, 0.0]), num_steps=10, sampler=kernel)
    torch.testing.assert_close(out.samples[:, 1], init[:, 1], rtol=0, atol=0)
    assert (out.samples[:, 0] != init[:, 0]).all()


@pytest.mark.parametrize(
    "kernel", [ceb.MALA(0.15), ceb.HMC(0.4, num_leapfrog=3), ceb.UnderdampedLangevin(0.4)], ids=kernel_name
)
def test_free_part_is_sampled_given_the_rest(kernel):
    rho = 0.8
    target = ceb.analytic.Gaussian([0.0, 0.0], [[1.0, rho], [rho, 1.0]])
    init = torch.cat([torch.zeros(50_000, 1), points(50_000, (1,)).clamp(-1.5, 1.5)], dim=1)
    out = ceb.sample(target, init=init, mask=torch.tensor([1, 0]), num_steps=25, sampler=kernel)
    free, held = out.samples.T
    residual = free - rho * held
    assert variance_error(residual[:, None], 1 - rho**2) < 0.02
    assert abs(float((residual * held).mean())) < 4 * math.sqrt((1 - rho**2) / 50_000)


def test_masks_broadcast_over_the_batch_or_differ_by_row():
    init = points(2, (1, 4, 4))
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2], mask[1, :, :, 1] = 1, 1
    out = ceb.sample(expert(), init=init, mask=mask, num_steps=3)
    assert ((out.samples != init) == (mask == 1)).all()
    same = ceb.sample(expert(), init=init, mask=mask[0], num_steps=3)
    assert ((same.samples != init) == (mask[0] == 1)).all()


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


# --- divergence ----------------------------------------------------------------------------------


class Cliff(ceb.Energy):
    """A parabola, and beyond x = 5 nothing that is a number."""

    event_shape = (1,)

    def energy(self, x, noise_level=None):
        return torch.where(x > 5, math.nan, x.square() / 2).sum(1)


def from_the_left(num):
    return torch.tensor([0.0, 4.9, -1.0, 4.9])[:num, None]


def over_the_cliff(**options):
    away = ceb.from_callable(lambda x: -6 * x.sum(1))  # pulls to x = 6
    kernel = ceb.Langevin(0.1, temperature=1e-6)
    coefficients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return ceb.sample(
        Cliff() + away,
        init=from_the_left(4),
        coefficients=coefficients,
        num_steps=6,
        sampler=kernel,
        **options,
    )


def test_divergence_says_when_how_many_and_what_to_do():
    expected = (
        r"2 of 4 chains diverged, the first at step 0: an energy or gradient was not finite\. "
        r"Largest finite gradient norm 1\.1, step size 0\.1\. Likely causes: .*on_divergence=\"report\"\."
    )
    with pytest.raises(ceb.ChainDivergedError, match=expected):
        over_the_cliff()


def test_only_the_chains_that_diverge_are_frozen():
    out = over_the_cliff(on_divergence="report")
    assert out.divergence.chains.tolist() == [False, True, False, True]
    assert out.divergence.step.tolist() == [-1, 0, -1, 0]
    torch.testing.assert_close(out.samples[[1, 3]], from_the_left(4)[[1, 3]], rtol=0, atol=0)
    torch.testing.assert_close(out.samples[2], torch.tensor([-(0.9**6)]), rtol=0, atol=0.01)
    assert out.samples.isfinite().all()
    assert out.energies.isfinite().all()
    assert "diverged  2 of 4" in out.report()
    assert "PROBLEM  2 of 4 chains diverged and were frozen" in out.report()


def test_too_large_a_step_is_noticed_and_its_step_counted():
    with pytest.raises(ceb.ChainDivergedError, match=r"16 of 16 chains diverged, the first at step (\d+)"):
        ceb.sample(Quadratic(100.0), num_steps=50, sampler=ceb.Langevin(1.0))


def test_infinite_gradients_are_noticed_where_the_energy_is_finite():
    root = ceb.from_callable(lambda x: x.abs().sqrt().sum(1))
    start = torch.tensor([[0.0], [1.0]])
    out = ceb.sample(root, init=start, num_steps=0, sampler=ceb.Langevin(0.1), on_divergence="report")
    assert out.divergence.chains.tolist() == [True, False]


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_states_without_a_finite_energy_are_reported_from_the_start(kernel):
    init = torch.tensor([[0.0], [6.0]])
    out = ceb.sample(Cliff(), init=init, num_steps=3, sampler=kernel, on_divergence="report")
    assert out.divergence.chains.tolist() == [False, True]
    assert out.samples[1] == 6


@pytest.mark.parametrize("kernel", [ceb.MALA(0.5), ceb.HMC(0.7, num_leapfrog=2)], ids=kernel_name)
def test_adjusted_kernels_reject_what_is_not_finite(kernel):
    init = torch.full((500, 1), 4.5)
    out = ceb.sample(Cliff(), init=init, num_steps=5, sampler=kernel)
    assert not out.divergence.any
    assert out.trace.acceptance.min() == 0


def test_step_size_of_each_row_may_be_reported():
    chain_sizes = torch.tensor([1.0, 2.0])

    def own_steps(step, chain):
        chain.dynamics = chain.dynamics._replace(step_size=chain_sizes)

    with pytest.raises(ceb.ChainDivergedError, match="step size 2"):
        ceb.sample(
            Quadratic(100.0), num_chains=2, num_steps=60, sampler=ceb.Langevin(1e-3), callback=own_steps
        )


# --- requests that cannot be met -----------------------------------------------------------------


def box(low, high):
    return ceb.analytic.Box([low, -1.0], [high, 1.0], softness=0.15)


left, right, small, large = (box(-3.0, -1.5), box(1.5, 3.0), box(-1.0, 1.0), box(-3.0, 3.0))


def problems(energy):
    start = large.draw(50, seeded(0))
    out = ceb.sample(energy, init=start, num_steps=250, sampler=ceb.Langevin(0.01))
    assert ("PROBLEM" in out.report()) == bool(out.problems)
    return out.problems


@pytest.mark.parametrize(
    "build",
    [
        lambda: left & right,
        lambda: small & ~large,
        lambda: small - large,
        lambda: left.named("left") + right.named("right"),
    ],
    ids=["disjoint", "minus its superset by NOT", "minus its superset by ratio", "sum"],
)
def test_impossible_requests_are_noticed(build):
    assert problems(build())


@pytest.mark.parametrize(
    "build",
    [
        lambda: left,
        lambda: large & small,
        lambda: large & ~small,
        lambda: left | right,
        lambda: left & ~right,
        lambda: large + ceb.ratio(left, large),
        lambda: 2 * large + 0.5 * right,
    ],
    ids=["one", "subset", "superset minus subset", "either", "one not other", "ratio", "weights"],
)
def test_possible_requests_are_not_complained_about(build):
    assert problems(build()) == []


def test_problems_name_the_terms_and_the_share():
    first, second = left.named("first"), right.named("second")
    found = problems(first & second)
    assert "% of the samples do not satisfy" in found[0]
    assert found[-1] == "the request may be impossible, or its weights too far apart, or the run too short"
    avoided = problems(box(-1.0, 1.0) - ceb.analytic.Box([-3.0, -3.0], [3.0, 3.0]).named("out"))
    assert any("of the samples lie where out is likely, which -out asks to avoid" in p for p in avoided)


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
def test_loop_never_waits_for_the_device(kernel):
    energy = (expert(seed=1)["0"] + ~binary(seed=2) + (binary("wide", seed=3) | expert(seed=1)["2"])).cuda()
    schedule = ceb.Schedule(
        step_scale=ceb.schedules.linear(1.0, 0.5), noise_level=ceb.schedules.constant(0.1)
    )
    noise = ceb.Noise(
        (torch.Generator("cuda").manual_seed(0), 3), (torch.Generator("cuda").manual_seed(1), 5)
    )
    x = points(8, (1, 4, 4)).cuda()
    rows = energy.coefficients.float().cuda().expand(8, -1) * torch.rand(8, 1, device="cuda")
    chain = ceb.Chain(energy, x, ceb.Annealed(kernel, schedule), noise, num_steps=6, num_warmup=3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain.advance(3)
        chain.coefficients = rows
        chain.advance(3)
        trace, divergence = chain.trace(), chain.divergence()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trace.energy.shape == (6, 8)
    assert not divergence.any


@pytest.mark.gpu
def test_gpu_and_cpu_agree_on_energies_and_gradients():
    x = points(7, (1, 4, 4))
    for name, energy in compositions().items():
        expected = FusedPotential(energy, energy.coefficients.float())(x)
        moved = energy.cuda()
        got = FusedPotential(moved, moved.coefficients.float().cuda(), stack=True)(x.cuda())
        for one, two in zip(expected, got, strict=True):
            torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-4, msg=name)
