"""One contract for every energy and every kernel of the toolkit, whoever wrote it.

The subjects are in `contract_subjects`. What is defined in the package and has no subject there fails
the first tests of this file.
"""

import copy
import importlib
import inspect
import json
import pkgutil
import re

import pytest
import torch
from bit_helpers import machine
from contract_subjects import PRECISION, SIZES, energies, states, subjects
from helpers import Quadratic, points

import composable_ebm as ceb
from composable_ebm.energy.text_image import Similarity
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.sampling import Annealed, Noise, from_settings, to_settings
from composable_ebm.sampling.settings import KERNELS
from composable_ebm.testing import ENERGY_RULES, KERNEL_RULES

ENERGIES = energies()
SUBJECTS = subjects()

ROWS_OF_THEIR_OWN = {
    "Labelled": "every row has its own label",
    "AtLevels": "every row has its own label and noise level",
    "Recovery": "every row has its own label and noisier state",
    "JointRequests": "every row has its own request",
    "LogZ": "a constant a noise level, of which a calibrated mixture is made",
    "_Bits": "what `check_kernel` holds kernels of bits to",
    "_Path": "moves between two energies inside the estimate of log Z",
}
"""Energies that are parts of an algorithm and not composed by users: class and reason."""

NO_NEW_KIND = {
    "load_expert": "an Expert, from a file",
    "parse": "what is written, which the round trip covers",
    "calibrate": "a Mixture, with its constants",
}
"""Functions that return energies of a kind that another subject has."""


# --- nothing is left out -------------------------------------------------------------------------


def defined(base: type) -> set[type]:
    """The concrete classes below `base` that the package defines."""
    for module in pkgutil.walk_packages(ceb.__path__, "composable_ebm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    below, waiting = set(), [base]
    while waiting:
        waiting += (found := waiting.pop().__subclasses__())
        below |= set(found)
    return {c for c in below if c.__module__.startswith("composable_ebm.") and not inspect.isabstract(c)}


def is_energy(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, ceb.Energy)


def test_every_class_of_energies_has_a_subject():
    present = {type(part) for energy in ENERGIES.values() for part in energy.modules()}
    missing = {c.__name__ for c in defined(ceb.Energy) - present}
    assert missing == set(ROWS_OF_THEIR_OWN)


def test_every_network_has_a_subject():
    assert {kind.split()[0] for kind in SIZES} == set(NETWORKS)


def test_every_constructor_of_energies_has_a_subject():
    functions = {name: getattr(ceb, name) for name in ceb.__all__ if inspect.isfunction(getattr(ceb, name))}
    returned = {name: str(inspect.signature(f).return_annotation) for name, f in functions.items()}
    constructors = {name for name, kind in returned.items() if is_energy(getattr(ceb, kind, None))}
    missing = {name for name in constructors if not any(subject.startswith(name) for subject in ENERGIES)}
    assert missing == set(NO_NEW_KIND)


def test_every_kernel_has_a_subject_and_a_name_in_settings():
    samplers = {type(subject.kernel) for subject in SUBJECTS.values()}
    assert samplers == set(KERNELS) - {ceb.Still}  # which moves nothing
    assert defined(ceb.Kernel) == set(KERNELS)
    assert all(getattr(ceb, kernel.__name__) is kernel for kernel in KERNELS)


# --- every energy --------------------------------------------------------------------------------


@pytest.fixture(params=ENERGIES)
def energy(request):
    return ENERGIES[request.param]


def levels(energy):
    """Noise levels to ask an energy at."""
    return (None, torch.tensor(0.5)) if energy.noise_conditioned else (None,)


def gradients_only(energy):
    return not energy.has_value


@pytest.mark.parametrize("rule", ENERGY_RULES)
def test_energy_keeps_the_contract(energy, rule):
    for level in levels(energy):
        ENERGY_RULES[rule](energy, states(energy).float(), level, 1e-3)


def test_score_of_a_multiple_is_the_multiple_of_the_score(energy):
    x = states(energy).float()
    for level in levels(energy):
        once, thrice = (e.score(x, noise_level=level) for e in (energy, 3 * energy))
        torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-3)


def test_scores_leave_states_parameters_and_global_randomness_alone(energy):
    mine = copy.deepcopy(energy).requires_grad_(True)
    x = states(energy).float()
    before, random = x.clone(), torch.get_rng_state()
    mine.score(x)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(p.grad is None for p in mine.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_terms_of_a_sum_add_up_and_others_are_one_term(energy):
    x = states(energy).float()
    terms = energy.terms(x)
    assert all(value.shape == (6,) for value in terms.values())
    if isinstance(energy, ceb.Sum):
        torch.testing.assert_close(sum(terms.values()), energy(x), rtol=1e-4, atol=1e-3)
    elif not isinstance(energy, ceb.Mixture):
        (value,) = terms.values()
        torch.testing.assert_close(value, energy(x))


def companion(energy):
    """Another energy of the same states."""
    return ceb.from_callable(lambda x: x.square().flatten(1).sum(1), name="plain")


def test_nothing_of_it_contributes_nothing(energy):
    x, other = states(energy).float(), companion(energy)
    assert str(other + 0 * energy) == "plain"
    slider = ceb.Sum([other, energy], [1.0, 0.0])
    torch.testing.assert_close(slider(x), other(x))
    torch.testing.assert_close(slider.score(x), other.score(x))


def test_adding_and_taking_away_gives_the_other_back(energy):
    x, other = states(energy).float(), companion(energy)
    assert str(energy + other - energy) == "plain"
    assert (energy / 1).key == energy.key or isinstance(energy, ceb.Sum)
    torch.testing.assert_close((energy + other)(x), energy(x) + other(x), rtol=1e-4, atol=1e-4)


def test_coefficients_may_be_given_for_each_row(energy):
    x = states(energy).float()
    rows = energy.coefficients + 0.3 * torch.arange(6.0, dtype=torch.float64)[:, None]
    together = energy(x, coefficients=rows)
    torch.testing.assert_close(energy(x, coefficients=energy.coefficients), energy(x))
    for i in (0, 4):
        alone = energy(x[i : i + 1], coefficients=rows[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def vocabulary(energy):
    """What the names in the recipe of an energy stand for."""
    names: dict[str, ceb.Energy] = {}
    for part in energy.modules():
        if isinstance(part, ceb.Expert):
            names[part.card.full_name] = ceb.Expert.standing(part.network, part.card, base=part.base)
    for leaf in energy.leaves():
        leaf = getattr(leaf, "inner", leaf)
        leaf = getattr(leaf, "pipeline", leaf)  # that a prompt belongs to
        if isinstance(leaf, Similarity):
            names[leaf.model_name] = {"; ".join(leaf.words): leaf}
        elif not isinstance(leaf, ceb.Expert):
            names[str(leaf)] = leaf
    return names


def test_text_reads_back_as_the_same_energy(energy):
    x, text = states(energy).float(), str(energy)
    again = ceb.parse(text, vocabulary(energy))
    assert str(again) == text
    assert again.key == energy.key
    torch.testing.assert_close(again(x), energy(x))
    assert isinstance(energy, ceb.Expert) or energy.tree().count("\n") >= len(list(energy.leaves())) - 1


def test_wrong_shape_is_refused_by_name(energy):
    with pytest.raises(ValueError, match=re.escape(f"for {energy}, got (2, 3, 5)")):
        energy(torch.zeros(2, 3, 5))


def test_what_compares_values_works_or_says_why_not(energy):
    x = states(energy).float()
    asks = {
        "log ratio": lambda: ceb.log_ratio(energy, x, x.flip(0)),
        "OR": lambda: (energy | energy)(x),
        "NOT": lambda: ceb.negate(energy, 1.0)(x),
    }
    for ask in asks.values():
        if gradients_only(energy):
            with pytest.raises(ValueError, match="known only by its gradient"):
                ask()
        else:
            assert ask().isfinite().all()


def test_a_mere_negative_is_refused(energy):
    leaves = list(energy.leaves())
    negative = ceb.Sum(leaves, [-1.0] * len(leaves))
    kernel = ceb.DMALA(0.2) if energy.binary else ceb.Langevin(0.01)
    with pytest.raises(ValueError, match="no term with a positive weight"):
        ceb.sample(negative, num_chains=2, sampler=kernel)


def test_every_kernel_samples_it_or_names_one_that_does(energy):
    if str(energy) == "0*a":
        pytest.skip("refused by every kernel, see above")
    mine = copy.deepcopy(energy).requires_grad_(True).train()
    start, random = states(energy, 3).float(), torch.get_rng_state()
    takers, refusals = set(), {}
    steps = {ceb.Gibbs: (), ceb.DMALA: (0.2,)}
    for kernel in (kind(*steps.get(kind, (0.01,))) for kind in KERNELS):
        try:
            out = ceb.sample(mine, init=start, num_steps=2, sampler=kernel, seed=1)
        except ValueError as error:
            refusals[type(kernel).__name__] = str(error)
            continue
        takers.add(type(kernel).__name__)
        assert out.samples.shape == start.shape
        assert out.samples.dtype == torch.float32
        assert not energy.binary or ((out.samples == 0) | (out.samples == 1)).all()
        torch.testing.assert_close(out.energies, energy(out.samples), rtol=1e-4, atol=5e-3)
    for name, reason in refusals.items():
        offered = set(re.findall(r"\b(DMALA|MALA|HMC|Langevin|Gibbs)\b", reason)) - {name}
        assert offered, f"{name} offers nothing in its place: {reason}"
        assert offered & takers, f"{name} offers what refuses as well: {reason}"
    assert ("DMALA" if energy.binary else "Langevin") in takers
    assert ("MALA" in takers) == (energy.has_value and not energy.binary)
    assert all(p.requires_grad and p.grad is None for p in mine.parameters())
    assert all(module.training for module in mine.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(start, states(energy, 3).float())


@pytest.mark.gpu
def test_energies_on_a_gpu_are_those_of_the_cpu(energy):
    x = states(energy).float()
    there = copy.deepcopy(energy).cuda()
    for level in levels(energy):
        e = there(x.cuda(), noise_level=None if level is None else level.cuda())
        assert e.is_cuda
        torch.testing.assert_close(e.cpu(), energy(x, noise_level=level), rtol=1e-3, atol=1e-2)


# --- every kernel --------------------------------------------------------------------------------


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]


def target(subject):
    """An energy that the kernel samples at any temperature, as a sum, so that it has coefficients."""
    if subject.variance is None:
        return machine(0, 3, 2) + 0.5 * machine(1, 3, 2)
    return Quadratic(PRECISION, 0.3, dimension=2) + 0.5 * ceb.from_callable(
        lambda x: x.cos().sum(1), name="ripple"
    )


def chain(subject, x, *, seed=0, sources=None, num_steps=20, **options):
    noise = Noise(*(sources or [(torch.Generator().manual_seed(seed), len(x))]))
    return ceb.Chain(target(subject), x, subject.sampler, noise, num_steps=num_steps, **options)


def start_of(subject, num=6, seed=0):
    return states(target(subject), num, seed).float() if subject.variance is None else points(num, (2,), seed)


@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_kernel_keeps_the_contract(subject, rule):
    # Stationary variances of subjects are given on a target of the same precision.
    KERNEL_RULES[rule](subject.sampler, subject.variance)


def test_settings_survive_a_file(subject):
    stored = json.loads(json.dumps({**to_settings(subject.sampler), "num_steps": 7}))
    assert from_settings(stored) == (subject.sampler, 7)


def test_a_schedule_that_stands_still_is_the_kernel_itself(subject):
    if not isinstance(subject.sampler, Annealed):
        pytest.skip("has no schedule")
    x = start_of(subject)
    noise = Noise((torch.Generator().manual_seed(0), len(x)))
    plain = ceb.Chain(target(subject), x, subject.kernel, noise).advance(20)
    assert torch.equal(chain(subject, x).advance(20), plain)
