"""Kernels of bits against sums over all states, and what each kernel refuses."""

import math

import pytest
import torch
from bit_helpers import BITS, Network, exact, frequencies, machine, rbm
from helpers import Quadratic, expert

import composable_ebm as ceb
from composable_ebm.energy.bits import bit_states, log_pseudo_likelihood
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.potential.potential import Potential, Tally
from composable_ebm.sampling import Dynamics, Noise

CHAINS = 4_000


def run(energy, kernel, num_steps, start=None, seed=0, chains=CHAINS, **options):
    """Where chains from fair coins stand after some steps."""
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        start = torch.randint(2, (chains, *energy.event_shape), generator=generator).float()
    chain = ceb.Chain(energy, start, kernel, Noise((generator, len(start))), **options)
    return chain, chain.advance(num_steps)


def worst_z(found, truth, draws):
    """The largest deviation of a frequency from its probability, in standard errors.

    A state that is expected less than once is given an error of one draw.
    """
    variance = (truth * (1 - truth) / draws).clamp(min=draws**-2)
    return float(((found - truth).abs() / variance.sqrt()).max())


def energies():
    a, b = rbm(0).free_energy(name="a"), rbm(1, hidden=2).free_energy(name="b")
    return {
        "rbm": a,
        "sum of two": a + b,
        "each hidden unit twice": 2 * a + b,
        "with a coupling": a + machine(4),
        "couplings of two": machine(0) + 0.5 * machine(1) - 0.3 * machine(2, lateral=False),
        "machine": machine(),
        "without lateral couplings": machine(lateral=False),
        "value of an attribute": rbm(2, values=3).free_energy(1),
        "network": Network(),
        "rbm and network": a + Network(),
        "mixture": a | b,
        "weighted": 0.7 * a - 0.2 * b,
    }


GIBBS = ["rbm", "sum of two", "each hidden unit twice", "with a coupling", "couplings of two", "machine"]
GIBBS += ["without lateral couplings", "value of an attribute"]


@pytest.mark.parametrize("name", GIBBS)
def test_gibbs_frequencies_match_enumeration(name):
    energy = energies()[name]
    _, x = run(energy, ceb.Gibbs(), 40)
    assert worst_z(frequencies(x), exact(energy), CHAINS) < 4.5


@pytest.mark.parametrize("name", ["rbm", "machine", "network", "rbm and network", "mixture", "weighted"])
def test_dmala_frequencies_match_enumeration(name):
    energy = energies()[name]
    chain, x = run(energy, ceb.DMALA(0.7), 120)
    assert worst_z(frequencies(x), exact(energy), CHAINS) < 4.5
    assert 0.3 < float(chain.trace().acceptance[20:].mean()) < 0.999


@pytest.mark.parametrize(
    ("kernel", "temperature"),
    [(ceb.DMALA(0.7, temperature=2.0), 2.0), (ceb.Gibbs(temperature=0.5), 0.5)],
    ids=["DMALA", "Gibbs"],
)
def test_temperature_is_that_of_the_whole_energy(kernel, temperature):
    energy = energies()["rbm"]
    _, x = run(energy, kernel, 120)
    truth = exact(energy, temperature)
    assert worst_z(frequencies(x), truth, CHAINS) < 4.5
    assert worst_z(frequencies(x), exact(energy), CHAINS) > 20


def test_one_step_keeps_the_exact_distribution():
    # From exact samples, one step of a kernel with a large, often refused move changes nothing.
    energy = energies()["network"]
    truth = exact(energy)
    generator = torch.Generator().manual_seed(5)
    index = torch.multinomial(truth, 100_000, replacement=True, generator=generator)
    chain, x = run(energy, ceb.DMALA(50.0), 1, start=bit_states(BITS)[index])
    assert float(chain.trace().acceptance.mean()) < 0.95
    assert float((x != bit_states(BITS)[index]).any(1).float().mean()) > 0.3
    assert worst_z(frequencies(x), truth, 100_000) < 4.5


@pytest.mark.parametrize("kernel", [ceb.Gibbs(), ceb.DMALA(0.7)], ids=["Gibbs", "DMALA"])
@pytest.mark.parametrize("name", ["rbm", "machine"])
def test_held_bits_stay_and_the_others_follow_their_conditional(kernel, name):
    energy = energies()[name]
    mask = torch.tensor([0.0, 1, 1, 0, 1])
    start = torch.tensor([1.0, 0, 0, 0, 0]).expand(CHAINS, -1)
    _, x = run(energy, kernel, 60, start=start, mask=mask)
    assert (x[:, mask == 0] == start[:, mask == 0]).all()
    states = bit_states(BITS)
    fits = (states[:, mask == 0] == start[0, mask == 0]).all(1)
    truth = exact(energy) * fits / (exact(energy) * fits).sum()
    found = frequencies(x)
    assert worst_z(found[fits], truth[fits], CHAINS) < 4.5


# --- the contract of every kernel, for these two ------------------------------------------------

KERNELS = [ceb.Gibbs(), ceb.DMALA(0.5)]


@pytest.fixture(params=KERNELS, ids=lambda k: type(k).__name__)
def kernel(request):
    return request.param


def test_step_keeps_shape_dtype_and_bits(kernel):
    net = RBM((1, 2, 3), hidden=4).double()
    start = torch.zeros(7, 1, 2, 3, dtype=torch.float64)
    chain, x = run(net.free_energy(), kernel, 3, start=start)
    assert x.shape == start.shape
    assert {t.dtype for t in chain.state if t is not None} == {torch.float64}
    assert ((x == 0) | (x == 1)).all()


def test_step_takes_as_many_gradients_as_it_says(kernel):
    tally = Tally()
    potential = Potential(energies()["sum of two"], tallies=[tally])
    noise = Noise((torch.Generator().manual_seed(0), 4))
    state = kernel.init(potential, torch.zeros(4, BITS), noise)
    before = tally.gradients
    kernel.step(potential, state, noise, kernel.dynamics(state.x))
    assert tally.gradients - before == kernel.gradients_per_step


def test_trace_has_the_energies_of_the_states(kernel):
    energy = energies()["each hidden unit twice"]
    start = bit_states(BITS)
    chain, x = run(energy, kernel, 1, start=start)
    seen = x if kernel.energy_is_current else start
    torch.testing.assert_close(chain.trace().energy[0], energy(seen).detach())


def test_same_seed_gives_the_same_samples_and_another_seed_others(kernel):
    energy = energies()["sum of two"]
    one, same, other = (run(energy, kernel, 5, seed=s, start=torch.zeros(8, BITS))[1] for s in (1, 1, 2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert (one != other).any()


def test_rows_with_their_own_coefficients_and_noise_run_as_if_alone(kernel):
    energy = energies()["sum of two"]
    coefficients = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    start = torch.zeros(3, BITS)

    def walk(rows):
        noise = Noise(*((torch.Generator().manual_seed(int(i)), 1) for i in rows))
        return ceb.Chain(energy, start[rows], kernel, noise, coefficients=coefficients[rows]).advance(10)

    together = walk(torch.arange(3))
    for i in range(3):
        torch.testing.assert_close(walk(torch.tensor([i]))[0], together[i])


def test_a_row_without_a_term_is_sampled_as_if_it_were_not_there():
    a, b = rbm(0).free_energy(name="a"), rbm(1).free_energy(name="b")
    start = torch.zeros(CHAINS, BITS)
    coefficients = torch.tensor([1.0, 0.0]).expand(CHAINS, 2)
    _, x = run(a + b, ceb.Gibbs(), 30, start=start, coefficients=coefficients)
    assert worst_z(frequencies(x), exact(a), CHAINS) < 4.5


def test_rows_with_their_own_temperature(kernel):
    if isinstance(kernel, ceb.Gibbs):
        energy, rows = energies()["couplings of two"], torch.tensor([0.5, 3.0])
    else:
        energy, rows = energies()["network"], torch.tensor([0.5, 3.0])
    temperature = rows.repeat_interleave(CHAINS)
    start = torch.zeros(2 * CHAINS, BITS)
    potential = Potential(energy, energy.coefficients.float())
    noise = Noise((torch.Generator().manual_seed(0), 2 * CHAINS))
    state = kernel.init(potential, start, noise)
    for _ in range(80):
        state, _ = kernel.step(potential, state, noise, Dynamics(torch.tensor(0.5), temperature))
    for value, x in zip(rows.tolist(), state.x.split(CHAINS), strict=True):
        assert worst_z(frequencies(x), exact(energy, value), CHAINS) < 4.5


def test_settings_describe_the_kernel_and_build_it_again(kernel):
    again, num_steps = ceb.sampling.from_settings({**kernel.settings(), "num_steps": 7}, factor=1.0)
    assert again == kernel
    assert num_steps == 7


def test_parameters_get_no_gradient_and_keep_their_mode(kernel):
    net = rbm(0).train()
    run(net.free_energy(), kernel, 3, start=torch.zeros(4, BITS))
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "langevin", [ceb.Langevin(0.1), ceb.MALA(0.1), ceb.HMC(0.1, num_leapfrog=2), ceb.UnderdampedLangevin(0.1)]
)
def test_steps_of_real_size_refuse_bits_and_name_the_relaxation(langevin):
    with pytest.raises(ValueError, match=r"takes real steps, and rbm lives on bits.*relaxation DMALA"):
        ceb.sample(rbm().free_energy(), sampler=langevin, num_steps=1)


def test_gibbs_refuses_what_has_no_conditionals():
    a = energies()["rbm"]
    for energy, culprit in ((a + Network(), "network"), (a | rbm(1).free_energy(), r"a \| rbm")):
        with pytest.raises(ValueError, match=rf"those of {culprit} have no closed form.*DMALA"):
            ceb.sample(energy, sampler=ceb.Gibbs(), num_steps=1)
    with pytest.raises(ValueError, match=r"those of Quadratic have no closed form; use a kernel.*MALA"):
        ceb.sample(Quadratic(), sampler=ceb.Gibbs(), num_steps=1)


@pytest.mark.parametrize("weight", [0.5, -1.0, 1.5])
def test_gibbs_refuses_a_part_of_a_hidden_unit(weight):
    a, b = rbm(0).free_energy(name="a"), rbm(1).free_energy(name="b")
    with pytest.raises(ValueError, match=r"whole number of each hidden unit, and a has .* DMALA"):
        ceb.sample(b + weight * a, sampler=ceb.Gibbs(), num_steps=1)
    with pytest.raises(ValueError, match=r"weight/temperature 0\.5"):
        ceb.sample(a, sampler=ceb.Gibbs(temperature=2.0), num_steps=1)


def test_a_weight_moved_to_no_whole_number_stops_its_chains():
    energy = rbm(0).free_energy(name="a") + rbm(1).free_energy(name="b")
    chain, _ = run(energy, ceb.Gibbs(), 2, start=torch.zeros(4, BITS))
    before = chain.x.clone()
    chain.coefficients = torch.tensor([1.0, 0.5])
    chain.advance(2)
    assert chain.divergence().chains.all()
    torch.testing.assert_close(chain.x, before)


def test_dmala_refuses_real_states():
    with pytest.raises(ValueError, match=r"DMALA flips bits.*on_bits\(Quadratic\)"):
        ceb.sample(Quadratic(), sampler=ceb.DMALA(0.1), num_steps=1)


def test_grey_levels_are_no_bits():
    with pytest.raises(ValueError, match=r"lives on bits, and `init` holds other values.*torch.bernoulli"):
        ceb.sample(rbm().free_energy(), init=torch.full((2, BITS), 0.5), sampler=ceb.Gibbs(), num_steps=1)


def test_bits_carry_no_noise_level():
    schedule = ceb.Schedule(noise_level=ceb.schedules.geometric(1.0, 0.1))
    with pytest.raises(ValueError, match="carry no noise level"):
        ceb.sample(
            rbm().free_energy(), sampler=ceb.Annealed(ceb.DMALA(0.5), schedule), num_steps=2, num_chains=2
        )


# --- real experts asked about bits ---------------------------------------------------------------


def test_on_bits_is_the_energy_at_the_ends_of_its_range():
    digit = expert(values=("0", "1"), event_shape=(1, 4, 4))
    bits = torch.randint(2, (6, 1, 4, 4)).float()
    torch.testing.assert_close(ceb.on_bits(digit)(bits), digit(2 * bits - 1))
    once = ceb.on_bits(digit)
    assert ceb.on_bits(once) is once
    assert str(ceb.on_bits(digit)) == f"on_bits({digit})"
    assert ceb.on_bits(digit).key == ceb.on_bits(digit).key


def test_energies_of_bits_and_of_grey_levels_compose_only_by_on_bits():
    digit = expert(values=("0", "1"), event_shape=(1, 4, 4))
    free = RBM((1, 4, 4), hidden=3).free_energy()
    with pytest.raises(ValueError, match=r"one data range: rbm .* on_bits\(toys/digit\)"):
        free + digit
    out = ceb.sample(free + ceb.on_bits(digit), num_chains=8, num_steps=5, sampler=ceb.DMALA(0.5))
    assert ((out.samples == 0) | (out.samples == 1)).all()


def test_recipes_ask_experts_about_bits():
    names = {"rbm": RBM((1, 4, 4), hidden=3).free_energy(), "digit": expert(values=("0", "1"))}
    mix = ceb.parse("rbm + 2*on_bits(digit)", names)
    assert mix.binary
    assert str(ceb.parse(str(mix), {**names, "toys/digit": names["digit"]})) == str(mix)


def test_all_states_of_a_few_bits():
    assert bit_states(3).tolist()[5] == [1, 0, 1]
    assert len(bit_states(10).unique(dim=0)) == 2**10
    with pytest.raises(ValueError, match="at most 22 bits"):
        bit_states(23)


def test_dmala_adapts_its_step_to_the_acceptance_asked_for():
    energy = energies()["network"]
    kernel = ceb.DMALA(5.0, target_acceptance=0.8)
    out = ceb.sample(energy, num_chains=500, num_steps=50, num_warmup=150, sampler=kernel)
    assert math.isclose(out.acceptance_rate, 0.8, abs_tol=0.07)


def test_pseudo_likelihood_matches_the_conditionals_by_enumeration():
    energy, states = energies()["rbm and network"], bit_states(BITS)
    p = exact(energy)
    found = log_pseudo_likelihood(energy, states[:6])
    for x, value in zip(states[:6], found, strict=True):
        total = 0.0
        for i in range(BITS):
            rest = torch.arange(BITS) != i
            pair = (states[:, rest] == x[rest]).all(1)
            total += float((p[(states == x).all(1)] / p[pair].sum()).log())
        assert float(value) == pytest.approx(total, abs=1e-4)


def test_requests_in_one_batch_get_what_they_get_alone(kernel):
    a, b = rbm(0).free_energy(name="a"), rbm(1).free_energy(name="b")
    asked = [a, a + b, 2 * b]
    with ceb.Engine(device="cpu") as engine:
        runs = [
            engine.submit(e, num_chains=3, num_steps=12, seed=i, sampler=kernel) for i, e in enumerate(asked)
        ]
        together = [run.result(30).samples for run in runs]
    for i, e in enumerate(asked):
        alone = ceb.sample(e, num_chains=3, num_steps=12, seed=i, sampler=kernel).samples
        torch.testing.assert_close(together[i], alone, rtol=0, atol=0)


def test_the_relaxation_takes_the_place_of_gibbs_where_no_sampler_is_asked_for():
    a, b = rbm(0).free_energy(name="a"), rbm(1).free_energy(name="b")
    for energy in (a, b):
        energy.sampler_settings = {"kernel": "Gibbs", "num_steps": 3}
    kernels = {
        text: type(ceb.sample(energy, num_chains=2).kernel).__name__
        for text, energy in {
            "a": a,
            "sum": a + 2 * b,
            "weighted": a + 0.5 * b,
            "mixture": a | b,
            "network": a + Network(),
        }.items()
    }
    assert kernels == dict.fromkeys(("a", "sum"), "Gibbs") | dict.fromkeys(
        ("weighted", "mixture", "network"), "DMALA"
    )


@pytest.mark.gpu
def test_steps_never_wait_for_the_device(kernel):
    energy = (rbm(0).free_energy(name="a") + rbm(1).free_energy(name="b") + machine(4)).to("cuda")
    noise = Noise((torch.Generator("cuda").manual_seed(0), 64))
    chain = ceb.Chain(energy, torch.zeros(64, BITS, device="cuda"), kernel, noise)
    chain.advance(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = chain.advance(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ((x == 0) | (x == 1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["2*a + b", "machine"])
def test_frequencies_on_a_gpu_match_enumeration(name):
    energy = {"2*a + b": energies()["each hidden unit twice"], "machine": energies()["machine"]}[name]
    truth = exact(energy)
    energy = energy.to("cuda")
    noise = Noise((torch.Generator("cuda").manual_seed(0), CHAINS))
    x = ceb.Chain(energy, torch.zeros(CHAINS, BITS, device="cuda"), ceb.Gibbs(), noise).advance(40)
    assert worst_z(frequencies(x.cpu()), truth, CHAINS) < 4.5
