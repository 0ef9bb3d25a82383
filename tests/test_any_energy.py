"""Any energy is welcome: what users have is taken as it is, and what they mix up is answered with the fix."""

import copy
import functools
import threading

import numpy as np
import pytest
import torch
from helpers import binary, expert, gaussians
from torch import nn

import composable_ebm as ceb

a, b, _ = gaussians()
PLANE = {"event_shape": (2,)}
MALA = ceb.MALA(0.05)


def network(outputs=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, outputs))


def drawn(energy, sampler=MALA, **options):
    return ceb.sample(energy, **{"num_chains": 4, "num_steps": 3, "sampler": sampler, **options})


# --- modules as they are ---------------------------------------------------------------------------

FORMS = {
    "column": lambda net: net,
    "flat": lambda net: nn.Sequential(net, nn.Flatten(0)),
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, torch.zeros(3, 2)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "wrapped": nn.DataParallel,
    "function": lambda net: lambda x: net(x).squeeze(-1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_module_is_the_same_energy_with_the_same_samples(form):
    plain = network().requires_grad_(True)
    energy = ceb.from_callable(form(plain), name="net", **PLANE)
    x = torch.randn(5, 2)
    torch.testing.assert_close(energy(x), plain(x)[:, 0])
    assert len(list(energy.parameters())) == 4
    expected = drawn(a + ceb.from_callable(plain, name="net", **PLANE))
    torch.testing.assert_close(drawn(a + energy).samples, expected.samples)
    assert all(module.training for module in plain.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sampler", [MALA, ceb.Langevin(0.05), ceb.HMC(0.1)])
def test_chains_start_in_the_type_of_the_parameters(dtype, sampler):
    out = drawn(ceb.from_callable(network().to(dtype), **PLANE), sampler)
    assert out.samples.dtype == dtype
    assert out.energies.dtype == torch.promote_types(dtype, torch.float32)
    given = drawn(
        ceb.from_callable(network().to(dtype), **PLANE), sampler, init=torch.zeros(4, 2), num_chains=None
    )
    assert given.samples.dtype == dtype


def test_coefficients_keep_their_digits_beside_states_of_16_bits():
    energy = 0.3 * ceb.from_callable(network().bfloat16(), **PLANE)
    chain = ceb.Chain(energy, torch.zeros(2, 2).bfloat16(), MALA, ceb.Noise((torch.Generator(), 2)))
    assert chain.coefficients.item() == pytest.approx(0.3, rel=1e-6)


def test_two_precisions_in_one_composition_are_named_with_the_fix():
    one, two = (
        ceb.from_callable(network().to(t), name=n, **PLANE)
        for t, n in ((torch.float32, "one"), (torch.float64, "two"))
    )
    with pytest.raises(
        ValueError, match=r"one is torch.float32, two is torch.float64. .*\(one \+ two\).to\(torch.float32"
    ):
        drawn(one + two)
    with pytest.raises(RuntimeError) as caught:
        two(torch.zeros(3, 2))
    assert "give x.to(torch.float64)" in caught.value.__notes__[0]


@pytest.mark.parametrize("sampler", [MALA, ceb.HMC(0.2), ceb.Langevin(0.05), ceb.UnderdampedLangevin(0.3)])
def test_states_may_be_single_numbers(sampler):
    energy = ceb.from_callable(lambda x: (x - 1).square() / 2, event_shape=(), name="parabola")
    out = ceb.sample(energy, num_chains=4000, num_steps=150, sampler=sampler)
    assert out.samples.shape == (4000,)
    assert float(out.samples.mean()) == pytest.approx(1, abs=0.08)
    assert float(out.samples.var()) == pytest.approx(1, abs=0.1)
    assert energy.score(torch.zeros(3)).tolist() == [1.0] * 3
    assert "4000" in out.report()


def test_arrays_of_numpy_are_states_and_masks():
    x = np.zeros((3, 2))
    torch.testing.assert_close(a(x), a(torch.zeros(3, 2)))
    out = drawn(ceb.from_callable(network(), **PLANE), init=x, mask=np.array([1.0, 0.0]), num_chains=None)
    assert out.samples.dtype == torch.float32
    assert (out.samples[:, 1] == 0).all()
    assert drawn(a, num_chains=np.int64(3), num_steps=np.int64(2), seed=np.int64(5)).samples.shape == (3, 2)
    with ceb.Engine() as engine:
        assert engine.submit(a, init=x, num_steps=np.int64(2), sampler=MALA).result().samples.shape == (3, 2)


def test_classifier_with_one_logit_is_a_sigmoid():
    logit, x = network(), torch.randn(5, 2)
    for model in (logit, lambda x: logit(x)[:, 0]):
        yes, no = (ceb.from_classifier(model, label, **PLANE) for label in (1, 0))
        torch.testing.assert_close(yes(x), -logit(x)[:, 0].sigmoid().log())
        torch.testing.assert_close((-yes(x)).exp() + (-no(x)).exp(), torch.ones(5))
    with pytest.raises(ValueError, match="more than 2 labels"):
        ceb.from_classifier(logit, 2, **PLANE)(x)


def test_sampling_takes_all_but_the_energy_by_name():
    with pytest.raises(TypeError, match=r"sample\(energy, num_chains=16\)"):
        ceb.sample(a, 16)


# --- parameters in functions -----------------------------------------------------------------------

GLOBAL = network()
SCALE = nn.Parameter(torch.ones(()))


class Wrapped:
    def __init__(self, net):
        self.nets = [net]

    def __call__(self, x):
        return self.nets[0](x)

    def method(self, x):
        return self(x)


def by_global(x):
    return GLOBAL(x)


def decorated(net):
    def inner(x):
        return net(x)

    @functools.wraps(inner)
    def outer(x, also=None):
        return SCALE * inner(x)[:, 0]

    return outer


HOLDERS = {
    "closure": lambda net: lambda x: net(x),
    "global": lambda net: by_global,
    "default": lambda net: lambda x, net=net: net(x),
    "partial": lambda net: functools.partial(lambda n, x: n(x), net),
    "keyword of a partial": lambda net: functools.partial(lambda x, n: n(x), n=net),
    "object": Wrapped,
    "method": lambda net: Wrapped(net).method,
    "bound forward": lambda net: net.forward,
    "decorated": decorated,
    "two of them": lambda net: lambda x: net(x) + GLOBAL(x),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_parameters_do_not_get_lost_in_a_function(hold):
    net = GLOBAL if hold is HOLDERS["global"] else network()
    energy = ceb.from_callable(hold(net), **PLANE)
    assert {id(p) for p in net.parameters()} <= {id(p) for p in energy.parameters()}
    x = torch.randn(4, 2)
    wide = copy.deepcopy(energy).double()  # the copy works with copies
    assert wide(x.double()).dtype == torch.float64
    torch.testing.assert_close(wide(x.double()).float(), energy(x))
    assert next(net.parameters()).dtype == torch.float32


def test_parameters_of_scores_denoisers_and_classifiers_are_found_in_functions():
    net, wide = network(2), network(2).double()
    made = [
        ceb.from_score(lambda x: net(x), **PLANE),
        ceb.from_denoiser(lambda x, s: net(x), noise_range=(0.1, 2.0), **PLANE),
        ceb.from_noise_predictor(lambda x, t: net(x), torch.linspace(0.99, 0.1, 5), **PLANE),
        ceb.from_classifier(lambda x: net(x), 1, **PLANE),
    ]
    for energy in made:
        assert set(net.parameters()) <= set(energy.parameters())
        moved = (energy + a).double()
        assert moved(torch.zeros(3, 2).double()).dtype == torch.float64
        assert next(net.parameters()).dtype == torch.float32
    assert ceb.from_score(lambda x: wide(x), **PLANE).state_dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_diffusion_networks_in_16_bits_are_shown_16_bits_and_states_keep_32(kind):
    net = network(2)
    coarse = copy.deepcopy(net).to(kind)
    sigma = torch.tensor(0.5)
    for make in (
        lambda f: ceb.from_score(f, **PLANE),
        lambda f: ceb.from_denoiser(lambda y, s: f(y), noise_range=(0.1, 2.0), **PLANE),
        lambda f: ceb.from_noise_predictor(lambda y, t: f(y), torch.linspace(0.99, 0.1, 5), **PLANE),
    ):
        plain, energy = make(net), make(coarse)
        assert energy.state_dtype == torch.float32
        x = torch.randn(4, 2)
        expected = plain.score(x, noise_level=sigma)
        torch.testing.assert_close(energy.score(x, noise_level=sigma), expected, rtol=0.05, atol=0.05)
        assert drawn(energy, ceb.Langevin(0.01)).samples.dtype == torch.float32
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    with pytest.raises(ValueError, match="which it does not in 16 bits: give it in float32"):
        ceb.from_noise_predictor(lambda x, t: x, alphas.half())


def test_not_of_a_score_advises_what_works():
    wind = ceb.from_score(lambda x: -x, name="wind", **PLANE)
    for energy in (wind, 2 * wind + a):
        with pytest.raises(ValueError, match=r"known only by its gradient.*2\*base - "):
            _ = ~energy
    assert drawn(2 * a - 0.5 * wind, ceb.Langevin(0.01)).samples.isfinite().all()


def test_bare_parameters_of_a_function_are_found():
    assert SCALE in set(ceb.from_callable(decorated(network()), **PLANE).parameters())


def test_names_that_recipes_cannot_read_are_refused():
    with pytest.raises(ValueError, match=r"named by letters, digits and underscores.*got 'my energy!'"):
        ceb.from_callable(network(), name="my energy!")
    with pytest.raises(ValueError, match="named by letters"):
        ceb.analytic.Gaussian().named("a+b")
    mix = ceb.from_classifier(network(3), 2, **PLANE) + a
    assert str(ceb.parse(str(mix), {"classifier[2]": mix.operands[0], "a": a})) == str(mix)


# --- states in the hands of user code --------------------------------------------------------------


class Counted(ceb.Energy):
    """Changes its states by an operation that PyTorch counts."""

    event_shape = (2,)

    def energy(self, x, noise_level=None):
        with torch.no_grad():
            x.clamp_(-0.1, 0.1)
        return x.square().sum(1)


class Hidden(ceb.Energy):
    """Changes its states past what PyTorch counts."""

    event_shape = (2,)

    def energy(self, x, noise_level=None):
        x.data.clamp_(-0.1, 0.1)
        return x.square().sum(1)


class Tracked(ceb.Energy):
    """Changes its states by an operation that autograd refuses."""

    event_shape = (2,)

    def energy(self, x, noise_level=None):
        return x.clamp_(-0.1, 0.1).square().sum(1)


@pytest.mark.parametrize("kind", [Counted, Hidden, Tracked])
@pytest.mark.parametrize("sampler", [MALA, ceb.HMC(0.1), ceb.Langevin(0.1, noise_first=True)])
def test_energy_that_changes_its_states_is_named(kind, sampler):
    if kind is Hidden and sampler.__class__ is ceb.Langevin:
        pytest.skip("takes no gradient where the chains stand")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        drawn(a + 2 * kind(), sampler)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert f"{kind.__name__} changes the states that it is given in place" in said
    assert "x.clone()" in said


def test_energy_that_changes_its_states_fails_its_own_run_only():
    with ceb.Engine() as engine:
        good, bad = (engine.submit(e, num_chains=2, num_steps=20, sampler=MALA) for e in (a, Counted()))
        with pytest.raises(ValueError, match="Counted changes the states"):
            bad.result()
        assert good.result().num_steps == 20


class Interrupted(ceb.Energy):
    event_shape = (2,)
    calls = 0

    def energy(self, x, noise_level=None):
        self.calls += 1
        if self.calls > 3:
            raise KeyboardInterrupt
        return x.square().sum(1)


def test_interrupt_in_one_energy_ends_that_run_and_no_other():
    with ceb.Engine() as engine:
        good, bad = (engine.submit(e, num_chains=2, num_steps=20, sampler=MALA) for e in (a, Interrupted()))
        with pytest.raises(KeyboardInterrupt):
            bad.result()
        assert good.result().num_steps == 20
        assert engine.submit(b, num_chains=2, num_steps=2, sampler=MALA).result().num_steps == 2


class Lost(ceb.Energy):
    """Finite at the start, and nowhere else."""

    event_shape = (2,)

    def energy(self, x, noise_level=None):
        return torch.where((x == 0).all(1), 0.0, torch.nan) + x.sum(1)


def test_warm_up_in_which_every_chain_is_lost_leaves_a_step_to_go_on_with():
    with ceb.Engine() as engine:
        run = engine.submit(
            Lost(),
            num_steps=None,
            init=torch.zeros(4, 2),
            num_warmup=50,
            sampler=ceb.MALA(0.1, target_acceptance=0.6),
            on_divergence="report",
        )
        next(frame for frame in run.frames() if frame.step > 20)
        run.steer(ceb.analytic.Gaussian([3.0, 3.0]).named("good"))
        before = next(frame for frame in run.frames() if str(frame.composition) == "good")
        after = next(frame for frame in run.frames() if frame.step > before.step + 50)
        run.cancel()
        assert not torch.equal(before.states, after.states)
        assert run.result().trace.step_size.isfinite().all()


def test_threads_that_sample_one_module_leave_it_in_training_mode():
    net = network().train()
    inside, wait = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        wait.wait(5)
        return net(x)

    modes = []
    first = threading.Thread(target=lambda: drawn(ceb.from_callable(slow, **PLANE)))
    first.start()
    inside.wait(5)

    def look(step, chain):
        modes.append(net.training)

    ceb.sample(ceb.from_callable(net, **PLANE), num_chains=2, num_steps=2, sampler=MALA, callback=look)
    assert not net.training  # the other thread is still at it
    wait.set()
    first.join()
    assert net.training
    assert all(module.training for module in net.modules())


def test_mirrors_keep_the_law_where_clamping_piles_states_on_the_wall():
    """exp(-2x) on [0, 1] has the mean ½ - 1/(e² - 1) = 0.3435."""
    slope = ceb.from_callable(lambda x: 2 * x.sum(1), event_shape=(1,), data_range=(0.0, 1.0), name="slope")
    mirrored, clamped = (
        ceb.sample(slope, num_chains=4000, num_steps=400, sampler=ceb.Langevin(0.002, **{how: (0, 1)}))
        for how in ("reflect", "clamp")
    )
    assert ((mirrored.samples >= 0) & (mirrored.samples <= 1)).all()
    assert float(mirrored.samples.mean()) == pytest.approx(0.3435, abs=0.02)
    assert (mirrored.samples == 0).float().mean() < 0.001
    assert (clamped.samples == 0).float().mean() > 0.02
    with pytest.raises(ValueError, match="`clamp` or `reflect`, not both"):
        ceb.Langevin(0.1, clamp=(0, 1), reflect=(0, 1))


# --- one energy in several hands -------------------------------------------------------------------


@pytest.fixture
def models(tmp_path, monkeypatch):
    made = expert("digit", tuple("0123")), binary("smile")
    for one in made:
        ceb.save_expert(tmp_path / "toys" / one.card.name, one.network, one.card)
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(tmp_path))
    return tmp_path


def test_two_parses_of_one_recipe_are_the_same_energy(models):
    one, two = (ceb.parse("toys/digit[3] + 2*toys/smile | ~toys/smile") for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert str(one - two) == "0*(toys/digit[3] + 2*toys/smile | ~toys/smile)"
    assert ceb.parse(str(one)) == one != ceb.parse("toys/digit[2]")
    assert ceb.load_expert("toys/digit")[3] == ceb.parse("toys/digit[3]")


def test_expert_that_was_trained_on_is_another_energy(models):
    trained, stored = ceb.load_expert("toys/digit"), ceb.load_expert("toys/digit")
    x = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        next(trained.network.parameters()).mul_(1.5)
    assert trained != stored
    assert not torch.allclose((trained["0"] - stored["0"])(x), torch.zeros(3))
    assert copy.deepcopy(stored) != stored  # a copy may be trained


@pytest.mark.parametrize(
    "move", [lambda e: e.double(), lambda e: e.to(torch.float64), lambda e: e.to("meta")]
)
@pytest.mark.parametrize(
    "make", [lambda d, s: d[3] + d[1] + 2 * s, lambda d, s: ~d[2] | s, lambda d, s: d[0]]
)
def test_moving_a_composition_leaves_the_experts_of_others_alone(models, move, make):
    digit, smile = ceb.load_expert("toys/digit"), ceb.load_expert("toys/smile")
    x = torch.randn(3, 1, 4, 4)
    before = [e(x) for e in (digit, smile)]
    mix = make(digit, smile)
    plain, moved = mix(x), move(mix)
    assert moved is mix
    assert all(torch.equal(e(x), old) for e, old in zip((digit, smile), before, strict=True))
    if mix.state_dtype == torch.float64:
        torch.testing.assert_close(mix(x.double()).float(), plain)
        networks = {id(leaf.network) for leaf in mix.leaves()}
        assert len(networks) == 1 + ("smile" in str(mix))  # values of one expert still share it


def test_moving_to_where_it_is_copies_nothing(models):
    digit = ceb.load_expert("toys/digit")
    mix = (digit[1] + digit[2]).to("cpu").float()
    assert all(leaf.network is digit.network for leaf in mix.leaves())


def test_values_are_chosen_by_name_and_words_by_their_place_too():
    digit, smile, odd = expert(values=("1", "2", "9")), binary("smile"), expert(values=("few", "10"))
    assert digit[9] == digit["9"] == digit[np.int64(9)]
    assert smile[1] == smile["yes"] == ceb.parse("s[1]", {"s": smile})
    assert smile[0] == smile["no"] == ~smile == ceb.parse("s[0]", {"s": smile})
    assert odd[10] == odd["10"]
    for energy, wrong in ((digit, 0), (digit, 3), (smile, 2), (smile, -1), (odd, 0), (odd, 1), (smile, 0.5)):
        with pytest.raises(KeyError, match=f"has no value {wrong}; it has .* and any"):
            energy[wrong]
