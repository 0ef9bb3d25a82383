"""Every fast form of an energy equals the plain one: energies, gradients, trajectories."""

import copy
import os
import shutil

import hypothesis.strategies as st
import pytest
import torch
from helpers import expert, points
from hypothesis import HealthCheck, example, given, settings
from torch import nn

import composable_ebm as ceb
from composable_ebm.experts.networks.diffused import DiffusedEnergy
from composable_ebm.experts.networks.diffused_native import DiffusedPass
from composable_ebm.potential import native
from composable_ebm.potential.forms.traced import TracedForm
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.schedule import Schedule, geometric

COMPILER = any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang")))
CAN = COMPILER and {"avx2", "asimd"} & set(native._features().split())
needs_compiler = pytest.mark.skipif(not CAN, reason="this machine has no C compiler or only short vectors")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, so that the tests compile what they test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native.library.cache_clear()
        native._at_hand.cache_clear()
        yield
    native.library.cache_clear()
    native._at_hand.cache_clear()


def plain(function, x):
    """Outputs and the gradient of their sum, by autograd."""
    x = x.clone().requires_grad_()
    outputs = function(x)
    (gradient,) = torch.autograd.grad(outputs.sum(), x)
    return outputs.detach(), gradient


def assert_equal(got, expected):
    """To 1e-5 of their size, and the 1e-6 that float32 leaves where terms of order 1 cancel."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-6


# --- networks over noise levels ------------------------------------------------------------------

SHAPE = (2, 4, 4)


def diffused(values, seed, skeleton=0, size=0.4, shape=SHAPE, hidden=16, half=False):
    """An expert around a `DiffusedEnergy` whose heads are not silent, stored ones (float16) if `half`."""
    torch.manual_seed(skeleton)
    images = torch.randn(300, *shape) * torch.rand(shape)
    network = DiffusedEnergy(shape, values, hidden=hidden, components=5, noise_range=(0.02, 5.0))
    network.fit(images)
    torch.manual_seed(100 + seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=size)
    if half:
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.half().float()
    names = ("no", "yes", "maybe")[:values] if values > 1 else ("image",)
    card = ceb.Card(
        family="toys",
        name=f"d{seed}",
        attribute=f"d{seed}",
        values=names,
        event_shape=shape,
        data_range=(-1.0, 1.0),
        network={"type": "DiffusedEnergy", **network.options},
        noise_conditioned=True,
        energy_range=dict.fromkeys((*names, "any"), (-1.0, 1.0)),
    )
    return ceb.Expert.standing(network.eval().requires_grad_(False), card)


def by_autograd(composition, coefficients, level):
    return lambda x: composition(x, coefficients=coefficients, noise_level=level)


def composed(experts):
    """The experts at any value, at their own, and as an OR of both."""
    composition = ceb.energy.Sum([expert["any"] for expert in experts])
    for other in experts:
        if other.value is not None:
            composition = composition + other + (other | other["any"])
    return composition


@given(
    st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=4),
    st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    st.sampled_from(("one", "none", "rows")),
    st.booleans(),
)
@example([2], [0.0, 0.46875, -0.46875, 0.0], "one", False)
@example([1, 2, 2, 3], [1.0, 0.0, -1.0, 2.0], "rows", True)
@settings(max_examples=40)
def test_one_pass_over_noise_conditioned_experts_equals_autograd(values, weights, levels, odd_one):
    experts = [diffused(count, seed) for seed, count in enumerate(values)]
    if odd_one:
        experts.append(diffused(2, 9, skeleton=1))
    composition = composed(experts)
    count, batch = composition.num_coefficients, 3
    coefficients = torch.tensor(weights).repeat(count)[: count * batch].reshape(-1)[:count]
    level = {"one": torch.tensor(0.3), "none": None, "rows": torch.tensor([0.02, 0.4, 3.0])}[levels]
    x = points(batch, SHAPE)
    potential = Potential(composition, coefficients, stack=False).at(noise_level=level)
    # Where weights cancel, autograd in float32 is off by a hundred times as much as the one pass.
    double = composed([copy.deepcopy(e).double() for e in experts])
    level = None if level is None else level.double()
    truth, size = (
        plain(by_autograd(double, c, level), x.double())
        for c in (coefficients.double(), coefficients.double().abs())
    )
    for mine, theirs, whole in zip(potential(x), truth, size, strict=True):
        rounding = 3e-6 * float(whole.norm())  # of float32, in the terms and inside them, before they cancel
        assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-6 + rounding
    assert len(potential.plan.groups) == (2 if odd_one else 1)


@pytest.fixture
def in_c(monkeypatch):
    """Passes in C, where this machine can."""
    if not CAN:
        pytest.skip("this machine has no C compiler or only short vectors")
    monkeypatch.setattr(native, "PATIENCE", 0.0)


@pytest.mark.usefixtures("in_c")
@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_a_pass_in_c_equals_autograd(data):
    values = data.draw(st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=3))
    shape = data.draw(st.sampled_from((SHAPE, (1, 3, 5), (1, 9, 15))))
    hidden, batch = data.draw(st.sampled_from((16, 70))), data.draw(st.sampled_from((1, 2, 3, 5, 8, 11, 38)))
    experts = [
        diffused(count, seed, size=0.2, shape=shape, hidden=hidden, half=True)
        for seed, count in enumerate(values)
    ]
    composition = ceb.energy.Sum(experts)
    if data.draw(st.booleans()):
        composition = composition + (experts[0] | ~experts[-1]["any"])
    count = composition.num_coefficients
    rows = data.draw(st.sampled_from(((), (batch,))))
    coefficients = torch.randn(*rows, count, generator=torch.Generator().manual_seed(len(values)))
    levels = {"one": torch.tensor(0.3), "none": None, "rows": torch.linspace(0.02, 3.0, batch)}
    level = levels[data.draw(st.sampled_from(sorted(levels)))]
    x = points(batch, shape)
    potential = Potential(composition, coefficients, stack=False)
    potential = potential.at(noise_level=level)
    got, expected = potential(x), plain(by_autograd(composition, coefficients, level), x)
    assert "in C" in potential.describe()
    # At small noise levels parts of 10,000 nats cancel, and autograd in float32 is not exact either.
    wide = None if level is None else level.double()
    exact = plain(by_autograd(copy.deepcopy(composition).double(), coefficients.double(), wide), x.double())
    for mine, theirs, true in zip(got, expected, exact, strict=True):
        assert float((mine - true).norm()) <= 1e-5 * float(true.norm()) + 4 * float((theirs - true).norm())


@pytest.mark.usefixtures("in_c")
def test_weights_that_float16_cannot_hold_are_left_to_float32():
    one, two = diffused(2, 0, half=True), diffused(2, 1, half=True)
    mix, x = one + two, points(6, SHAPE)
    potential = Potential(mix, torch.ones(2), stack=False)
    function = by_autograd(mix, torch.ones(2), None)
    for change, path in (
        (lambda: None, "in C"),
        (lambda: two.network.third.weight.mul_(2), "in C"),
        (lambda: two.network.third.weight.mul_(1.001), "by hand"),
        (lambda: two.network.third.weight.copy_(two.network.third.weight.half()), "in C"),
    ):
        change()
        assert_equal(potential(x), plain(function, x))
        assert path in potential.describe()


@pytest.mark.usefixtures("in_c")
def test_changes_through_data_are_seen_by_the_next_potential():
    whole, x = diffused(2, 0, half=True), points(3, SHAPE)
    Potential(whole, stack=False)(x)
    whole.network.from_pixels.weight.data[3, 4] = 0.75
    potential = Potential(whole, stack=False)
    assert_equal(potential(x), plain(by_autograd(whole, None, None), x))
    assert "in C" in potential.describe()


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("rows", [13, 70], ids=["a network each", "half of the rows each"])
def test_passes_in_c_on_two_threads_and_two_at_a_time_agree(rows):
    mix, x = diffused(2, 0, half=True) + diffused(3, 1, half=True), points(rows, SHAPE)
    (group,) = Potential(mix, stack=False).plan.groups
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = (group.ready(states, None)(states, None) for states in (x, -x))
    finally:
        torch.set_num_threads(threads)
    for states, (outputs, pull_back) in ((x, first), (-x, second)):
        cotangent = torch.rand(outputs.shape)
        for _ in range(2):  # pulled back twice
            moved = states.clone().requires_grad_()
            expected = torch.stack(
                [nn.functional.pad(n(moved), (0, 3 - n(moved).shape[1])) for n in group.networks]
            )
            (gradient,) = torch.autograd.grad((expected * cotangent * (expected != 0)).sum(), moved)
            read = cotangent * (expected != 0)
            assert_equal((outputs * (expected != 0), pull_back(read)), (expected.detach(), gradient))


@pytest.mark.usefixtures("in_c")
def test_trajectories_of_fifty_steps_in_c_agree(monkeypatch):
    base, one, two = (diffused(values, seed, size=0.1, half=True) for seed, values in enumerate((1, 2, 2)))
    mix = base + 1.5 * ceb.ratio(one, base) + ceb.ratio(~two, base)
    schedule = Schedule(noise_level=geometric(3.0, 0.05), noise_power=2.0, predict=True, num_levels=25)
    run = {"num_chains": 6, "num_steps": 50, "sampler": ceb.Annealed(ceb.Langevin(0.05), schedule), "seed": 2}
    fast = ceb.sample(mix, **run)
    monkeypatch.setattr(DiffusedPass, "ready", lambda self, x, level: "not today")
    slow = ceb.sample(mix, **run)
    assert "in one pass in C" in fast.report()
    assert "in one pass" not in slow.report()
    torch.testing.assert_close(fast.samples, slow.samples, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("in_c")
def test_what_lies_below_a_floor_in_c_is_lifted_as_by_autograd():
    networks = [diffused(values, seed, half=True).network for seed, values in enumerate((1, 2, 3))]
    x, level = points(12, SHAPE), torch.tensor(0.5)
    for network in networks[1:]:
        lowest = -(-network(x, level)).logsumexp(1)
        network.set_floor([float(lowest.detach().quantile(0.5))] * 2)  # between two
    networks[0].set_floor([-1e9, -1e9])
    x = torch.cat([x, 50 * x])  # where the floor has a slope
    with torch.no_grad():
        evaluate = DiffusedPass(networks).ready(x, level)
        outputs, pull_back = evaluate(x, level)
    cotangent = torch.randn(outputs.shape)
    for i, values in enumerate((1, 2, 3)):
        cotangent[i, :, values:] = 0
    at = x.clone().requires_grad_()
    expected = [network(at, level) for network in networks]
    total = sum((e * c[:, : e.shape[1]]).sum() for e, c in zip(expected, cotangent, strict=True))
    (gradient,) = torch.autograd.grad(total, at)
    for mine, theirs in zip(outputs, expected, strict=True):
        assert_equal([mine[:, : theirs.shape[1]]], [theirs.detach()])
    with torch.no_grad():
        assert_equal([pull_back(cotangent)], [gradient])


# --- sums without a graph ------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(("one", "other", "none of these")), min_size=1, max_size=3, unique=True),
    st.booleans(),
    st.integers(1, 4),
)
def test_weighted_sums_of_outputs_equal_autograd(leaves, a_row, batch):
    conditional = expert(seed=1, values=("one", "other", "third"))
    callable_ = ceb.from_callable(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.SiLU(), nn.Linear(5, 1), nn.Flatten(0)),
        event_shape=(1, 4, 4),
        data_range=(-1, 1),
    )
    terms = [callable_ if name == "none of these" else conditional[name] for name in leaves]
    composition = terms[0] if len(terms) == 1 else ceb.energy.Sum(terms)
    coefficients = torch.randn(*[batch] * a_row, composition.num_coefficients)
    x, mask = points(batch, (1, 4, 4)), (torch.rand(1, 4, 4) < 0.7).float()
    potential = Potential(composition, coefficients, mask=mask, stack=False)
    energy, gradient = plain(by_autograd(composition, coefficients, None), x)
    for _ in range(2):
        result = potential.plan.gradient(x, None, composition, coefficients)
        assert_equal((result[0], result[1] * mask), (energy, gradient * mask))
        assert_equal(potential(x), (energy, gradient * mask))
        coefficients.mul_(2)  # in place, as a slider does
        energy, gradient = (2 * energy, 2 * gradient) if len(terms) > 1 else (energy, gradient)


def test_a_leaf_that_reads_in_its_own_way_is_not_taken_for_a_column():
    class Squared(ceb.Expert):
        def read(self, outputs):
            return super().read(outputs).square()

    known = expert(seed=1)
    leaf, x = Squared(known.network, known.card, 0), points(3, (1, 4, 4))
    potential = Potential(leaf, stack=False)
    assert not potential.plan.is_sum
    assert_equal(potential(x), plain(by_autograd(leaf, None, None), x))


def test_what_cancels_is_exact_for_any_coefficients():
    base, smile = diffused(1, 0), diffused(2, 1)
    mix = ceb.given(base, smile, weight=1.0)
    potential = Potential(mix, torch.zeros(3), stack=False)
    x = points(4, SHAPE)
    for coefficients in (mix.coefficients.float(), torch.tensor([0.3, 2.0, -0.7]), torch.rand(4, 3)):
        potential = potential.at(coefficients=coefficients)
        assert_equal(potential(x), plain(by_autograd(mix, coefficients, None), x))


def test_a_pass_follows_weights_and_levels_that_move():
    one, two = diffused(2, 0), diffused(2, 1)
    mix = one + two
    potential = Potential(mix, torch.ones(2), stack=False)
    x, level = points(3, SHAPE), torch.tensor(0.5)
    potential = potential.at(noise_level=level)
    potential(x)
    for change in (
        lambda: two.network.second.weight.mul_(1.2),
        lambda: one.network.from_pixels.weight.add_(0.1),
        lambda: level.fill_(0.1),
    ):
        change()
        assert_equal(potential(x), plain(by_autograd(mix, torch.ones(2), level), x))


def test_annealed_trajectories_of_fifty_steps_agree(monkeypatch):
    base, one, two = (diffused(values, seed, size=0.1) for seed, values in enumerate((1, 2, 2)))
    mix = ceb.given(base, one, ~two, weight=1.5)
    schedule = Schedule(noise_level=geometric(3.0, 0.05), noise_power=2.0, predict=True, num_levels=25)
    run = {"num_chains": 4, "num_steps": 50, "sampler": ceb.Annealed(ceb.Langevin(0.05), schedule), "seed": 2}
    fast = ceb.sample(mix, **run)
    monkeypatch.setattr(TracedForm, "ready", lambda self, x, level: "not today")
    slow = ceb.sample(mix, **run)
    assert "3 DiffusedEnergy, read by 5 terms (traced, gradients by hand)" in fast.report()
    assert "(by autograd: not today)" in slow.report()
    torch.testing.assert_close(fast.samples, slow.samples, rtol=1e-4, atol=1e-4)


def test_skeletons_that_part_are_noticed():
    one, two = diffused(2, 0), diffused(2, 1)
    potential = Potential(one + two, stack=False)
    potential(points(3, SHAPE))
    two.network.mean.add_(1)
    with pytest.raises(ValueError, match="build a new chain"):
        potential(points(3, SHAPE))


def test_a_hook_is_called():
    whole = diffused(2, 0)
    calls = []
    whole.network.second.register_forward_hook(lambda *inputs: calls.append(1))
    potential = Potential(whole)
    potential(points(3, SHAPE))
    assert calls
    assert "by autograd: it has hooks" in potential.describe()


@pytest.mark.usefixtures("in_c")
def test_moving_coefficients_and_levels_builds_nothing_again():
    mix = ceb.given(diffused(1, 0, half=True), diffused(2, 1, half=True), weight=1.0)
    potential = Potential(mix, mix.coefficients.float(), noise_level=torch.tensor(0.5))
    x = points(4, SHAPE)
    potential(x)
    (group,) = potential.plan.groups
    packed = group.form.product
    assert packed is not None
    for step in range(1, 4):
        potential = potential.at(coefficients=torch.rand(4, 3), noise_level=torch.tensor(0.1 * step))
        potential(x)
        assert group.form.product is packed


@pytest.mark.gpu
def test_evaluation_on_cuda_equals_the_plain_pass():
    mix = ceb.given(diffused(1, 0), diffused(2, 1), weight=1.0)
    x, level = points(4, SHAPE), torch.tensor(0.5)
    expected = plain(by_autograd(mix, None, level), x)
    potential = Potential(mix.cuda(), mix.coefficients.float().cuda())
    potential = potential.at(noise_level=level.cuda())
    got = potential(x.cuda())
    assert "by autograd" in potential.describe()
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-4, atol=1e-4)
