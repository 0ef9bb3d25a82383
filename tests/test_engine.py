"""The engine's promises: what runs in the loop, and what it leaves alone."""

import math

import pytest
import torch
from helpers import (
    KERNELS,
    Quadratic,
    binary,
    card,
    expert,
    gaussians,
    kernel_name,
    points,
    seeded,
    variance_error,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import composable_ebm as ceb
from composable_ebm.potential.potential import Potential

a, b, c = gaussians()

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
    potential = Potential(energy, energy.coefficients.float(), stack=stack)
    with BackwardMasks() as noted:
        potential(points(3, (1, 4, 4)))
    assert set(noted.masks) == {(True, False, False)}
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
        e, gradient = Potential(energy, coefficients, stack=stack)(x)
        torch.testing.assert_close(e, energy(x, coefficients=coefficients), rtol=1e-5, atol=1e-5)
        score = energy.score(x, coefficients=coefficients)
        torch.testing.assert_close(gradient, -score, rtol=1e-4, atol=1e-5)


def test_values_of_one_network_share_one_pass():
    digit = expert()
    calls = []
    digit.network.register_forward_hook(lambda *_: calls.append(1))
    Potential(digit["0"] + digit["1"] + ~digit["2"], stack=False)(points(3, (1, 4, 4)))
    assert len(calls) == 1


def test_networks_of_one_architecture_run_as_one_batched_pass():
    digit, thick = expert(seed=1), binary(seed=2)
    other = binary("large", network={**card().network, "num_values": 2, "hidden": 16})
    plan = Potential(digit["0"] + digit["1"] + thick + other, stack=True).plan
    assert [len(group.networks) for group in plan.groups] == [2, 1]
    assert plan.describe() == "2 ConvEnergy, read by 3 terms (in one batched pass); one ConvEnergy"


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
    potential = Potential(noisy[0] + noisy[1], torch.ones(2), stack=True)
    potential = potential.at(noise_level=torch.tensor(0.5))
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
        expected = Potential(energy, energy.coefficients.float())(x)
        moved = energy.cuda()
        got = Potential(moved, moved.coefficients.float().cuda(), stack=True)(x.cuda())
        for one, two in zip(expected, got, strict=True):
            torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-4, msg=name)
