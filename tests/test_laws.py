"""The laws of the algebra. Each is checked by its action: energies, and scores."""

import math
import operator

import numpy as np
import pytest
import torch
from helpers import binary, expert, gaussians, points
from hypothesis import given
from hypothesis import strategies as st

import composable_ebm as ceb
from composable_ebm.energy import soft_minimum

WEIGHTS = st.floats(-4, 4).map(lambda w: round(w, 3))
POSITIVE = st.floats(0.05, 4)
NO_MEANING = "has no meaning|operand|concatenate|multiply"  # in our words, Python's and NumPy's

a, b, c = gaussians(torch.float64)
x = points(dtype=torch.float64)


def assert_same(one, other, states=x):
    """Same energies and same scores."""
    torch.testing.assert_close(one(states), other(states), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.score(states), other.score(states), rtol=1e-9, atol=1e-9)


# --- sums ----------------------------------------------------------------------------------------


@given(WEIGHTS, WEIGHTS)
def test_sum_is_commutative(v, w):
    assert_same(v * a + w * b, w * b + v * a)


@given(WEIGHTS, WEIGHTS, WEIGHTS)
def test_sum_is_associative(u, v, w):
    assert_same((u * a + v * b) + w * c, u * a + (v * b + w * c))


@given(WEIGHTS, WEIGHTS)
def test_weights_distribute_over_sums(v, w):
    assert_same(v * (a + w * b), v * a + (v * w) * b)


@given(WEIGHTS, WEIGHTS)
def test_sum_has_the_weighted_energies_and_scores_of_its_terms(v, w):
    mix = v * a + w * b
    torch.testing.assert_close(mix(x), v * a(x) + w * b(x))
    torch.testing.assert_close(mix.score(x), v * a.score(x) + w * b.score(x))


def test_ampersand_is_plus():
    assert (a & 2 * b).key == (a + 2 * b).key


def test_python_sum_needs_no_start():
    assert sum([a, b, c]).key == (a + b + c).key
    assert sum([a]) is a


def test_sum_is_flattened():
    mix = (a + b) + 2 * (c - a)
    assert [str(t) for t in mix.operands] == ["a", "b", "c"]
    assert mix.weights == (-1, 1, 2)


def test_like_terms_merge():
    assert (a + 2 * a).weights == (3,)
    assert str(a + b + a) == "2*a + b"
    assert str((a | b) + (a | b)) == "2*(a | b)"


def test_coefficients_fold():
    assert str(2 * (a + b) / 4) == "0.5*a + 0.5*b"
    assert str(-(a - b)) == "-a + b"


def test_unit_weight_and_unit_temperature_give_the_term_itself():
    assert a / 1 is a
    assert 1 * a is a
    assert a + 0 * b is a
    assert -1 * (-a) is a


def test_zero_weight_contributes_nothing():
    assert (0 * a)(x).abs().max() == 0
    assert (0 * a).score(x).abs().max() == 0
    assert (a - a)(x).abs().max() == 0
    assert_same(b + 0 * a, b)
    assert_same(a - a + b, b)


def test_sum_written_out_keeps_zero_terms_for_sliders():
    assert ceb.Sum([a, b], [0, 1]).num_coefficients == 2


def test_subtraction_is_the_ratio_and_a_negative_weight():
    assert (a - b).key == ceb.ratio(a, b).key == (a + -1 * b).key


@given(WEIGHTS, WEIGHTS)
def test_ratio_form_folds_to_one_sum(v, w):
    mix = a + v * ceb.ratio(b, a) + w * ceb.ratio(c, a)
    assert_same(mix, (1 - v - w) * a + v * b + w * c)


@given(POSITIVE, POSITIVE)
def test_weighted_product_of_gaussians_has_the_weighted_sum_of_their_precisions(v, w):
    covariance = [torch.tensor([[1.0, 0.3], [0.3, 0.5]]), torch.tensor([[0.6, -0.2], [-0.2, 0.8]])]
    means = torch.tensor([[0.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    precision = [m.double().inverse() for m in covariance]
    total = v * precision[0] + w * precision[1]
    mean = torch.linalg.solve(total, v * precision[0] @ means[0] + w * precision[1] @ means[1])
    product = v * a + w * b
    torch.testing.assert_close(product.score(x), -(x - mean) @ total, rtol=1e-5, atol=1e-5)
    offset = product(x) - (((x - mean) @ total) * (x - mean)).sum(1) / 2
    assert offset.std() < 1e-5  # equal up to a constant


@given(POSITIVE)
def test_temperature_divides_the_energy(temperature):
    torch.testing.assert_close((a / temperature)(x), a(x) / temperature)


def test_bayes_combines_a_base_and_a_classifier():
    # Two unit Gaussians at ±1 with equal priors: p(k|x) is a logistic function of 2x.
    logits = torch.nn.Linear(1, 2)
    with torch.no_grad():
        logits.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        logits.bias.zero_()
    base = ceb.analytic.GaussianMixture([[-1.0], [1.0]])
    posterior = base + ceb.from_classifier(logits, 1)
    states = points(event_shape=(1,))
    expected = ceb.analytic.Gaussian(1.0)(states) - math.log(0.5)
    torch.testing.assert_close(posterior(states), expected)


# --- mixtures ------------------------------------------------------------------------------------


@given(POSITIVE, POSITIVE, st.floats(-3, 3), st.floats(-3, 3))
def test_mixture_has_the_density_of_its_weighted_components(v, w, y, z):
    mix = ceb.mixture([a, b], weights=[v, w], log_z=[y, z])
    density = v * (-a(x) - y).exp() + w * (-b(x) - z).exp()
    torch.testing.assert_close(mix(x), -density.log())


@given(POSITIVE, POSITIVE)
def test_mixture_score_is_the_softmax_weighted_score(v, w):
    share = torch.softmax(torch.stack([math.log(v) - a(x), math.log(w) - b(x)]), dim=0)
    expected = share[0, :, None] * a.score(x) + share[1, :, None] * b.score(x)
    torch.testing.assert_close(ceb.mixture([a, b], weights=[v, w]).score(x), expected)


def test_score_of_a_mixture_keeps_its_digits_at_energies_far_from_zero():
    """The squares below are exact in float32 beside 20,000, so that only the mixture can lose digits."""
    near = [ceb.from_callable(lambda x, m=m: (x - m).square().sum(1), event_shape=(2,)) for m in (0, 1)]
    far = [ceb.from_callable(lambda x, e=e: 20_000 + e(x), event_shape=(2,)) for e in near]
    states = torch.tensor([[0.25, 0.5], [-0.75, 1.25], [0.5, 0.75]])
    torch.testing.assert_close((far[0] | far[1]).score(states), (near[0] | near[1]).score(states))


def test_the_least_of_large_energies_keeps_the_digits_of_its_derivative():
    near = torch.tensor([[0.25, 1.5], [-0.5, 0.0], [3.0, 3.0]])  # exact beside 20,000 in float32
    far = (near + 20_000).requires_grad_()
    soft_minimum(far).sum().backward()
    torch.testing.assert_close(far.grad, torch.softmax(-near, dim=1))
    torch.testing.assert_close(soft_minimum(near), -torch.logsumexp(-near, dim=1))


def test_mixture_of_normalised_energies_is_the_analytic_mixture():
    two = ceb.analytic.GaussianMixture([[0.0, 0.5], [1.0, -0.5]], 0.5, weights=[3, 1]).double()
    parts = [ceb.analytic.Gaussian(m, 0.5).double() for m in two.means]
    mix = ceb.mixture(parts, weights=[0.75, 0.25])
    torch.testing.assert_close(mix(x), two(x), rtol=1e-5, atol=1e-5)


def test_or_is_commutative_and_associative():
    assert_same(a | b, b | a)
    assert_same((a | b) | c, a | (b | c))
    assert len(((a | b) | (c | a)).operands) == 4


def test_or_keeps_the_weights_and_constants_of_a_mixture():
    mix = ceb.mixture([a, b], weights=[2, 3], log_z=[0.5, -0.5]) | c
    assert mix.weights == (2, 3, 1)
    assert mix.log_z == (0.5, -0.5, 0)


# --- negation ------------------------------------------------------------------------------------


def negatable():
    digit = expert("digit")
    return [a, a | b, ceb.analytic.Box([-1.0, -1.0], [1.0, 1.0], softness=0.1), digit, digit["2"]]


@pytest.mark.parametrize("energy", negatable(), ids=str)
def test_negation_is_finite_and_bounded_below_everywhere(energy):
    """-E falls without end; ~E does not, wherever one looks."""
    event = energy.event_shape
    states = torch.cat([s * points(40, event, seed=1) for s in (0.1, 1, 10, 100)])
    energies, scores = (~energy)(states), (~energy).score(states)
    assert energies.isfinite().all()
    assert scores.isfinite().all()
    floor = (
        0 if isinstance(~energy, ceb.Not) else torch.stack([e(states) for e in (~energy).operands]).min() - 5
    )
    assert (energies >= floor).all()


@pytest.mark.parametrize("threshold", [-2.0, 0.5, 3.0])
def test_not_is_minus_the_log_of_the_other_outcome(threshold):
    belongs = torch.sigmoid(threshold - a(x))
    torch.testing.assert_close(ceb.negate(a, threshold)(x), -(1 - belongs).log())


def test_not_pushes_away_where_likely_and_is_flat_elsewhere():
    gaussian = ceb.analytic.Gaussian([0.0, 0.0])
    near, far = torch.tensor([[0.5, 0.0]]), torch.tensor([[9.0, 0.0]])
    assert (~gaussian).score(near)[0, 0] > 0.4
    assert (~gaussian).score(far).abs().max() < 1e-8


def test_double_negation_is_the_energy_itself():
    assert ~~a is a
    assert (~~(a | b)).key == (a | b).key
    thick = binary()
    assert (~~thick).key == thick.key


def test_not_of_a_binary_expert_is_the_expert_of_the_other_value():
    thick = binary()
    states = points(5, (1, 4, 4))
    torch.testing.assert_close((~thick)(states), thick.network(states)[:, 0])
    assert isinstance(~thick, ceb.Expert)


def test_not_of_a_value_is_the_mixture_of_the_others():
    digit = expert()
    states = points(5, (1, 4, 4))
    expected = -torch.logsumexp(-digit.network(states)[:, [0, 2]], dim=1)
    torch.testing.assert_close((~digit["1"])(states), expected)


# --- likelihood ratios ---------------------------------------------------------------------------


def test_log_ratio_is_exact():
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.4], [0.4, 2.0]]))
    energy = 1.0 * ceb.analytic.Gaussian([0.0, 0.0], [[1.0, 0.4], [0.4, 2.0]])
    one, two = points(6), points(6, seed=1)
    expected = normal.log_prob(one) - normal.log_prob(two)
    torch.testing.assert_close(ceb.log_ratio(energy, one, two), expected)


@given(WEIGHTS)
def test_log_ratio_ignores_additive_constants(shift):
    shifted = ceb.from_callable(lambda s: a.energy(s) + shift)
    y = points(seed=1, dtype=torch.float64)
    torch.testing.assert_close(ceb.log_ratio(shifted, x, y), ceb.log_ratio(a, x, y))


# --- coefficients are data -----------------------------------------------------------------------


@given(st.lists(WEIGHTS, min_size=3, max_size=3))
def test_coefficients_given_at_call_time_are_the_weights_of_the_expression(w):
    structure = a + b + c
    written = ceb.Sum([a, b, c], w)
    given_late = structure(x, coefficients=torch.tensor(w, dtype=torch.float64))
    torch.testing.assert_close(given_late, written(x))


def test_coefficients_of_nested_nodes_are_their_own_first_then_their_children():
    nested = 2 * ceb.mixture([a, 3 * b], weights=[1, 4], log_z=[0, 1]) - ceb.negate(c, threshold=5)
    expected = [2, -1, 0, math.log(4) - 1, 3, 5]
    torch.testing.assert_close(nested.coefficients, torch.tensor(expected, dtype=torch.float64))
    changed = torch.tensor([1.5, 0.5, 0.1, 0.2, -1, 2], dtype=torch.float64)
    inner = ceb.mixture([a, -b], weights=[math.exp(0.1), math.exp(0.2)])
    late = nested(x, coefficients=changed)
    torch.testing.assert_close(late, (1.5 * inner + 0.5 * ceb.negate(c, threshold=2))(x))


@pytest.mark.parametrize("build", [lambda: a + b, lambda: a | 2 * b, lambda: a + ceb.negate(b, 1.0)])
def test_coefficients_per_row_equal_evaluation_row_by_row(build):
    energy = build()
    rows = torch.randn(len(x), energy.num_coefficients, dtype=torch.float64)
    together = energy(x, coefficients=rows)
    alone = [energy(x[i : i + 1], coefficients=rows[i]) for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_weights_may_be_tensors_with_one_value_per_row():
    rows = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    torch.testing.assert_close((rows * a + b / 2)(x), rows * a(x) + b(x) / 2)
    torch.testing.assert_close((torch.tensor(3.0) * (rows * a + b))(x), 3 * (rows * a(x) + b(x)))


# --- what does not compose -----------------------------------------------------------------------


@pytest.mark.parametrize("array", [np.ones((2, 2)), np.array([a]), np.array(["2"])])
@pytest.mark.parametrize("op", [operator.mul, operator.add, operator.sub, operator.truediv, operator.or_])
def test_numpy_array_beside_an_energy_raises_instead_of_making_an_array_of_energies(array, op):
    with pytest.raises(TypeError, match=NO_MEANING):
        op(array, a)
    with pytest.raises(TypeError, match=NO_MEANING):
        op(a, array)


@pytest.mark.parametrize("number", [np.float64(2), np.float32(2), np.int64(2), 2, 2.0])
def test_numpy_scalars_are_numbers(number):
    assert (number * a).key == (a * number).key == (2 * a).key
    assert (np.array(number) * a).key == (a * np.array(number)).key == (2 * a).key


def test_numpy_arrays_are_weights_of_rows():
    rows = np.linspace(-1, 2, len(x))
    for mix in (rows * a + b, a * rows + b):
        torch.testing.assert_close(mix(x), torch.from_numpy(rows) * a(x) + b(x))
    torch.testing.assert_close((a / (rows + 2))(x), a(x) / torch.from_numpy(rows + 2))


@pytest.mark.parametrize(
    ("build", "fix"),
    [
        (lambda: a + 1, r"a \+ 1 has no meaning. A constant changes no density; a weight multiplies, 2\*a"),
        (lambda: 1 - a, r"1 - a has no meaning. A constant changes no density"),
        (lambda: torch.nn.Linear(2, 1) + a, r"<Linear> \+ a has no meaning. Make an energy .* from_callable"),
        (lambda: a | (lambda x: x), r"from_callable\(it\)"),
        (lambda: a * b, r"The AND of energies is a sum, a \+ b; a weight is a number"),
        (lambda: 1 / a, r"a weight is a number|A weight is a number or one a state"),
        (lambda: a * torch.ones(2, 2), r"<Tensor of shape \(2, 2\)> has no meaning. A weight is a number"),
    ],
)
def test_operators_without_a_meaning_say_what_is_meant(build, fix):
    with pytest.raises(TypeError, match=fix):
        build()


def test_sums_may_start_from_any_zero():
    assert sum([a, b], start=0.0).key == (a + b).key


@pytest.mark.parametrize("partner", ["a", None, 1, 1.5, True, [1], torch.ones(2, 2), 1j, abs])
@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.or_, operator.and_])
def test_energies_add_only_to_energies(partner, op):
    with pytest.raises(TypeError, match=NO_MEANING):
        op(a, partner)
    with pytest.raises(TypeError, match=NO_MEANING):
        op(partner, a)


@pytest.mark.parametrize("partner", ["a", None, True, [1], torch.ones(2, 2), 1j, b])
@pytest.mark.parametrize("op", [operator.mul, operator.truediv])
def test_weights_are_numbers(partner, op):
    with pytest.raises(TypeError, match=NO_MEANING):
        op(a, partner)


def test_a_number_divided_by_an_energy_has_no_meaning():
    with pytest.raises(TypeError, match=NO_MEANING):
        1 / a


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_weights_are_finite(weight):
    with pytest.raises(ValueError, match=r"a weight must be finite, got (nan|-?inf)"):
        weight * a
    with pytest.raises(ValueError, match="a weight must be finite"):
        ceb.Sum([a, b], [1, weight])


def test_weights_that_overflow_are_refused_where_they_are_multiplied():
    with pytest.raises(ValueError, match="a weight must be finite, got inf"):
        1e200 * (1e200 * a)


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match=r"a temperature must not be zero, got \(a \+ b\) / 0"):
        (a + b) / 0


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.or_, operator.and_])
def test_different_image_spaces_fail_where_the_operator_is_written(op):
    line = ceb.analytic.Gaussian(0.0).named("line")
    with pytest.raises(ValueError, match=r"compose only in one image space: a has event_shape \(2,\), line"):
        op(a, line)
    with pytest.raises(ValueError, match="one image space"):
        op(a, 0 * line)


def test_different_data_ranges_fail_where_the_operator_is_written():
    bytes_, floats = binary("bytes", data_range=(0.0, 255.0)), binary("floats")
    with pytest.raises(ValueError, match=r"one data range: toys/bytes has data_range \(0.0, 255.0\)"):
        bytes_ + floats


def test_energies_of_any_shape_compose_with_all():
    anything = ceb.from_callable(lambda s: s.flatten(1).sum(1), name="brightness")
    assert (anything + a).event_shape == (2,)
    assert (binary() | anything).data_range == (-1.0, 1.0)
