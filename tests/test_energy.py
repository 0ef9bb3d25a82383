"""What every energy promises, how expressions look inside, and what is said about wrong input."""

import copy
import math
import re

import pytest
import torch
from helpers import binary, card, expert, gaussians, network, points
from torch import nn

import composable_ebm as ceb
from composable_ebm import analytic

# --- one contract for every energy ---------------------------------------------------------------

IMAGE = (1, 4, 4)


def every_energy():
    """Each kind of energy once, by a name for the test's id."""
    a, b, c = gaussians()
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 3))
    digit, thick = expert(), binary()
    return {
        "gaussian": a,
        "gaussian_1d": analytic.Gaussian(0.3, 2.0),
        "gaussian_mixture": analytic.GaussianMixture([[0.0, 1.0], [1.0, -1.0]], 0.5, weights=[1, 3]),
        "box": analytic.Box([-1.0, -0.5], [1.0, 1.5], softness=0.3),
        "double_well": analytic.DoubleWell(barrier=2.0, dimension=2),
        "rings": analytic.Rings([1.0, 2.0], width=0.3),
        "callable": ceb.from_callable(lambda x: x.square().sum(1) + x[:, 0].sin(), event_shape=(2,)),
        "classifier": ceb.from_classifier(logits, 2, event_shape=(2,)),
        "expert_value": digit["1"],
        "expert_any": digit,
        "binary_expert": thick,
        "binary_expert_negated": ~thick,
        "sum": a + 2 * b - 0.5 * c,
        "zero": 0 * a,
        "mixture": ceb.mixture([a, b, c], weights=[1, 2, 3], log_z=[0, 1, 2]),
        "not": ~a,
        "nested": a + ~(b | c) / 3 - ceb.negate(2 * c, 4.0),
        "images": digit["0"] + 0.5 * thick + ~digit["2"],
    }


ENERGIES = every_energy()


@pytest.fixture(params=ENERGIES)
def energy(request):
    return ENERGIES[request.param]


def states(energy, num=6, dtype=torch.float32):
    return points(num, energy.event_shape, dtype=dtype)


def test_energies_are_one_float_per_state(energy):
    e = energy(states(energy))
    assert e.shape == (6,)
    assert e.dtype == torch.float32
    assert e.isfinite().all()


def test_single_state_has_the_energy_it_has_in_a_batch(energy):
    x = states(energy)
    torch.testing.assert_close(energy(x[:1]), energy(x)[:1])


def test_permuted_states_have_permuted_energies(energy):
    x = states(energy)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(energy(x[order]), energy(x)[order])


def test_double_precision_states_have_the_same_energies(energy):
    x = states(energy, dtype=torch.float64)
    e = copy.deepcopy(energy).double()(x)
    torch.testing.assert_close(e.float(), energy(x.float()), rtol=1e-4, atol=1e-4)


def test_score_is_minus_the_numerical_gradient(energy):
    x, direction = states(energy), points(6, energy.event_shape, seed=1)
    h = 3e-3
    difference = (energy(x + h * direction) - energy(x - h * direction)) / (2 * h)
    along = (energy.score(x) * direction).flatten(1).sum(1)
    torch.testing.assert_close(along, -difference, rtol=1e-2, atol=1e-3)


def test_score_leaves_the_states_and_parameters_alone(energy):
    x = states(energy)
    before = x.clone()
    energy.score(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert not x.requires_grad
    assert all(p.grad is None for p in energy.parameters())


def test_score_is_available_without_a_graph_around_it(energy):
    x = states(energy)
    with torch.no_grad():
        quiet = energy.score(x)
    torch.testing.assert_close(quiet, energy.score(x))
    assert not quiet.requires_grad


def test_evaluation_leaves_the_global_random_state_alone(energy):
    before = torch.get_rng_state()
    energy.score(states(energy))
    str(energy), energy.tree(), energy.energy_range
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_terms_add_up_or_are_the_components(energy):
    x = states(energy)
    parts = torch.stack(list(energy.terms(x).values()))
    if isinstance(energy, ceb.Mixture):
        assert len(parts) == len(energy.operands)
    else:
        torch.testing.assert_close(parts.sum(0), energy(x))


def test_wrong_event_shape_is_refused_by_name(energy):
    expected = re.escape(f"must have shape (batch, {', '.join(map(str, energy.event_shape))}) for {energy}")
    with pytest.raises(ValueError, match=expected):
        energy(torch.zeros(6, 7, 5))


def test_leaves_are_distinct_and_every_key_is_hashable(energy):
    keys = [leaf.key for leaf in energy.leaves()]
    assert len(set(keys)) == len(keys)
    assert hash(energy.key) == hash(energy.key)


def test_energies_move_with_their_module(energy):
    moved = copy.deepcopy(energy).to("meta")
    assert {t.device.type for t in moved.state_dict().values()} <= {"meta"}


# --- adapters ------------------------------------------------------------------------------------


def test_classifier_is_minus_log_softmax():
    model = nn.Linear(2, 5)
    x = points()
    for label in (0, 4, -1):
        expected = -torch.log_softmax(model(x), dim=1)[:, label]
        torch.testing.assert_close(ceb.from_classifier(model, label)(x), expected)


def test_labels_of_one_classifier_are_evaluated_once():
    calls = []
    model = nn.Linear(2, 3)
    model.register_forward_hook(lambda *_: calls.append(1))
    both = ceb.from_classifier(model, 0) + 2 * ceb.from_classifier(model, 1)
    ceb.sample(both, init=points(), num_steps=0, sampler=ceb.Langevin(0.1))
    assert len(calls) == 2  # the gradient at the start; the final energies, and with them the check of terms


def test_callable_module_brings_its_parameters():
    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    energy = ceb.from_callable(model)
    assert sum(p.numel() for p in energy.parameters()) == 3
    assert str(energy) == "Sequential"


def test_callable_is_named_after_its_function():
    def bright(x):
        return -x.sum(1)

    assert str(ceb.from_callable(bright)) == "bright"
    assert str(ceb.from_callable(lambda x: x.sum(1))) == "function"
    assert str(ceb.from_callable(bright, name="light")) == "light"


def test_noise_conditioned_callable_is_given_the_noise_level():
    energy = ceb.from_callable(lambda x, level: x.square().sum(1) * level, noise_conditioned=True)
    mix = 2 * energy + ceb.from_callable(lambda x: x[:, 0])
    x = points()
    expected = 2 * x.square().sum(1) * 0.5 + x[:, 0]
    torch.testing.assert_close(mix(x, noise_level=torch.tensor(0.5)), expected)
    assert mix.noise_conditioned


# --- structure -----------------------------------------------------------------------------------


def test_leaf_that_occurs_twice_is_evaluated_once():
    calls = []
    energy = ceb.from_callable(lambda x: calls.append(1) or x.square().sum(1))
    mix = energy + (energy | 2 * energy)
    mix(points())
    assert len(calls) == 1


def test_tree_shows_kinds_weights_and_parameters():
    digit, thick = expert(), binary()
    text = (2 * digit["1"] - (thick | ~digit["0"])).tree()
    assert text.splitlines() == [
        "Sum  613 parameters",
        "  2 * toys/digit[1]  (Expert, 311 parameters)",
        "  -1 * Mixture  613 parameters",
        "    1 of toys/thick  (Expert, 302 parameters)",
        "    1 of toys/digit[1]  (Expert, 311 parameters)",
        "    1 of toys/digit[2]  (Expert, 311 parameters)",
    ]


def test_terms_of_one_name_are_all_there():
    one, two = analytic.Gaussian(0.0), analytic.Gaussian(1.0)
    x = points(event_shape=(1,))
    parts = (one + two).terms(x)
    assert list(parts) == ["Gaussian", "Gaussian #2"]
    torch.testing.assert_close(parts["Gaussian #2"], two(x))


def test_terms_carry_their_weights():
    a, b, _ = gaussians()
    assert list((2 * a - b / 2).terms(points())) == ["2*a", "-0.5*b"]


def test_range_of_a_mixture_covers_its_components():
    thick, digit = binary(), expert(energy_range={"0": (-3.0, 2.0)})["0"]
    mix = ceb.mixture([thick, digit], weights=[1, math.e])
    assert mix.energy_range == (pytest.approx(-4 - math.log(2)), pytest.approx(1.0))
    assert (thick | expert(energy_range={})["0"]).energy_range is None


def test_unlike_is_further_above_the_range_than_it_is_wide():
    thick = binary(energy_range={"yes": (1.0, 3.0)})
    assert thick.unlike(torch.tensor([0.0, 3.0, 4.9, 5.1])).tolist() == [False, False, False, True]
    assert binary(energy_range={}).unlike(torch.zeros(1)) is None


# --- what is said about wrong input --------------------------------------------------------------

a, b, c = gaussians()


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((1, 4, 4), r"got \(1, 4, 4\)\. Add the batch axis: x\[None\]\."),
        ((5, 4, 4, 1), r"Images are channels first: x\.permute\(0, 3, 1, 2\)\."),
        ((4, 4, 1), r"Images are channels first: x\.permute\(2, 0, 1\)\[None\]\."),
        ((5, 3, 4, 4), r"for toys/thick, got \(5, 3, 4, 4\)\.$"),
        ((), r"got \(\)\.$"),
    ],
)
def test_wrong_shape_of_states_gets_a_hint(shape, hint):
    with pytest.raises(ValueError, match=hint):
        binary()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (3,), (8, 3), (7, 2), (1, 8, 2)])
def test_wrong_shape_of_coefficients_is_refused(shape):
    expected = r"`coefficients` must have shape \(2,\) or \(batch, 2\) for a \+ b and a batch of 8, got"
    with pytest.raises(ValueError, match=expected):
        (a + b)(points(), coefficients=torch.ones(shape))
    with pytest.raises(ValueError, match=expected):
        ceb.sample(a + b, init=points(), sampler=ceb.Langevin(0.1), coefficients=torch.ones(shape))


def test_wrong_length_of_row_weights_is_refused():
    with pytest.raises(ValueError, match=r"and a batch of 8, got \(3, 2\)"):
        (torch.ones(3) * a + b)(points())


def broken(x):
    raise RuntimeError("no such layer")


BROKEN = ceb.from_callable(broken)
PAIR = ceb.from_callable(lambda x: x[:, :2], name="pair")
MEAN = ceb.from_callable(lambda x: x.mean(), name="mean")
NUMBER = ceb.from_callable(lambda x: 1.0, name="number")


def evaluate(energy):
    return energy(points())


def run(energy):
    return ceb.sample(energy, init=points(), num_steps=1, sampler=ceb.Langevin(0.1))


@pytest.mark.parametrize("use", [evaluate, run])
def test_errors_name_the_leaf_they_came_from(use):
    with pytest.raises(RuntimeError, match="no such layer") as caught:
        use(2 * a + (b | BROKEN))
    assert caught.value.__notes__ == ["while evaluating leaf 3 of 3, broken, of 2*a + (b | broken)"]


@pytest.mark.parametrize("use", [evaluate, run])
def test_errors_inside_a_network_name_its_expert(use):
    description = card()
    net = network(description)
    net.head.bias = nn.Parameter(torch.zeros(7))
    digit = ceb.Expert(net, description, 1)
    digit.event_shape = None
    with pytest.raises(RuntimeError) as caught:
        use(digit + ceb.from_callable(lambda x: x.sum(1)))
    assert "leaf 1 of 2, toys/digit[1]" in caught.value.__notes__[0]


@pytest.mark.parametrize("use", [evaluate, run])
@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        (
            PAIR,
            ValueError,
            r"pair must return one energy per state, shape \(8,\), got \(8, 2\)\. Sum over",
        ),
        (MEAN, ValueError, r"mean must return one energy per state, shape \(8,\), got \(\)\."),
        (NUMBER, TypeError, "number must return a tensor of energies, got float"),
    ],
)
def test_leaf_must_give_one_energy_per_state(use, energy, error, message):
    with pytest.raises(error, match=message):
        use(energy)
    with pytest.raises(error, match=message):
        use(a + energy)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ceb.Sum([]), ValueError, "a Sum needs at least one energy, got none"),
        (lambda: ceb.mixture([]), ValueError, "a Mixture needs at least one energy"),
        (lambda: ceb.Sum([a, b], [1]), ValueError, "a Sum of 2 terms needs as many weights, got 1"),
        (lambda: ceb.Sum([a], ["1"]), TypeError, "a weight is a number or a tensor .* got str"),
        (lambda: ceb.Sum([a], [True]), TypeError, "got bool"),
        (lambda: ceb.Sum([a], [torch.ones(2, 2)]), TypeError, r"got Tensor of shape \(2, 2\)"),
        (lambda: ceb.Sum([abs]), TypeError, "made of energies, got builtin.* Wrap a function with"),
        (lambda: ceb.mixture([a, 1]), TypeError, "a Mixture is made of energies, got int"),
        (lambda: ceb.mixture([a, b], weights=[1]), ValueError, "needs as many `weights`, got 1"),
        (lambda: ceb.mixture([a, b], log_z=[1, 2, 3]), ValueError, "needs as many `log_z`, got 3"),
        (lambda: ceb.mixture([a, b], weights=[1, 0]), ValueError, "must be positive and `log_z` finite"),
        (lambda: ceb.mixture([a, b], weights=[1, math.inf]), ValueError, "must be positive"),
        (lambda: ceb.mixture([a, b], log_z=[0, math.nan]), ValueError, "`log_z` finite, got .*nan"),
        (lambda: ceb.negate(a, math.inf), ValueError, "`threshold` of a Not must be finite, got inf"),
        (
            lambda: ~(a + b),
            ValueError,
            r"~\(a \+ b\) needs an energy above which .*negate\(a \+ b",
        ),
        (lambda: ceb.from_callable(3), TypeError, "`function` must be callable, got int"),
        (lambda: analytic.GaussianMixture([0.0]), ValueError, r"shape \(components, dimension\), got \(1,\)"),
        (lambda: analytic.GaussianMixture([[0.0]], weights=[1, 2]), ValueError, "must be 1 positive numbers"),
        (lambda: analytic.GaussianMixture([[0.0]], weights=[0]), ValueError, "must be 1 positive numbers"),
        (lambda: analytic.Gaussian([0.0, 0.0], [1.0, -1.0]), ValueError, "must be positive definite"),
        (lambda: analytic.Gaussian([0.0, 0.0], [[1, 2], [0, 1]]), ValueError, "must be symmetric"),
        (lambda: analytic.Gaussian([0.0, 0.0], [1, 1, 1]), ValueError, "2 variances or a 2 by 2 matrix, got"),
        (lambda: analytic.Box([0.0], [0.0]), ValueError, "`low` must lie below `high`"),
        (lambda: analytic.Box([0.0], [1.0], softness=0), ValueError, "`softness` must be positive, got 0"),
    ],
)
def test_energies_that_make_no_sense_are_refused_where_they_are_written(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 3, 4)])
def test_classifier_without_that_label_is_refused(shape):
    energy = ceb.from_classifier(nn.Flatten(0) if len(shape) == 1 else nn.Identity(), 3)
    with pytest.raises(ValueError, match=r"logits \(batch, labels\) with more than 3 labels, got \("):
        energy(torch.zeros(shape))
