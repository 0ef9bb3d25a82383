"""Captured steps: a replay gives what the step gives, and moving a number captures nothing."""

import pytest
import torch
from helpers import Quadratic, binary, expert, gaussians, points
from torch import nn

import composable_ebm as ceb
from composable_ebm.potential.potential import Potential
from composable_ebm.potential.rows import Plans
from composable_ebm.sampling import graphs
from composable_ebm.sampling.block import Block
from composable_ebm.sampling.graphs import StepGraphs
from composable_ebm.sampling.joint import JointBatch
from composable_ebm.sampling.recorder import CudaRecorder, HostReadError, HostReads
from composable_ebm.sampling.schedule import Schedule, geometric, linear

KERNELS = [
    ceb.Langevin(0.05),
    ceb.Langevin(0.05, noise_scale=0.1, grad_clip=0.5, clamp=(-1, 1)),
    ceb.Langevin(0.05, noise_first=True),
    ceb.MALA(0.05, target_acceptance=0.6),
    ceb.HMC(0.1, num_leapfrog=2),
    ceb.UnderdampedLangevin(0.1),
    ceb.LeimkuhlerMatthews(0.05),
]
SCHEDULE = Schedule(
    temperature=linear(2.0, 1.0), noise_level=geometric(1.0, 0.1), predict=True, noise_power=1.0, num_levels=3
)
a, b, c = gaussians()


def kernel_name(kernel):
    return type(kernel).__name__


class Replayed:
    """A recorder for any device: runs the step over the same buffers again, after one run to warm up."""

    name = "recording"

    def __init__(self, spoil=None):
        self.spoil = spoil

    def capture(self, body, generators):
        body()
        if self.spoil is None:
            return body

        def spoiled():
            body()
            self.spoil(generators)

        return spoiled

    def holds(self, condition):
        return bool(condition)


class Unable(Replayed):
    def capture(self, body, generators):
        body()
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def steps(recorder=None, **options):
    return StepGraphs(recorder or Replayed(), **{"patience": 0, **options})


def chain(energy=None, kernel=KERNELS[0], num=6, x=None, sources=None, **options):
    energy = a + b if energy is None else energy
    x = points(num) if x is None else x
    generators = sources or [(torch.Generator(x.device).manual_seed(7), len(x))]
    return ceb.Chain(energy, x, kernel, ceb.Noise(*generators), **options)


def assert_same(one, other):
    pairs = [*zip((*one.rows.state, *one.rows[1:]), (*other.rows.state, *other.rows[1:]), strict=True)]
    pairs += zip(vars(one.trace()).values(), vars(other.trace()).values(), strict=True)
    for left, right in pairs:
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    for (g, _), (h, _) in zip(one.block.noise.sources, other.block.noise.sources, strict=True):
        assert torch.equal(g.get_state(), h.get_state())
    assert one.block.tally.gradients == other.block.tally.gradients


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
@pytest.mark.parametrize("annealed", [False, True], ids=["plain", "annealed"])
def test_replayed_chain_equals_the_plain_one(kernel, annealed):
    sampler = ceb.Annealed(kernel, SCHEDULE) if annealed else kernel
    energy = expert(seed=1)["0"] + ~binary(seed=2)
    setting = {
        "energy": energy,
        "kernel": sampler,
        "x": points(5, (1, 4, 4)),
        "mask": (points(1, (1, 4, 4), seed=3)[0] > 0).float(),
        "coefficients": energy.coefficients.float() * torch.linspace(0.5, 1.5, 5)[:, None],
        "num_steps": 9,
        "num_warmup": 4,
    }
    cache, runs = steps(), []
    for captured in (None, cache):
        sources = [(torch.Generator().manual_seed(i), n) for i, n in enumerate((2, 3))]
        run = chain(**setting, sources=sources, graphs=captured)
        run.advance(4)
        run.advance(5)
        runs.append(run)
    assert_same(*runs)
    assert runs[1].block.replayed == 8
    levels = annealed and kernel.energy_is_current
    assert cache.captures == len(cache) == 1 + levels
    assert cache.replays == 8 + 2 * levels  # three levels are left, once to be captured


def test_frozen_chains_stay_frozen_in_a_replay():
    class Cliff(Quadratic):
        def energy(self, x, noise_level=None):
            return torch.where(x.square().sum(1) > 4, torch.nan, 1.0) * super().energy(x)

    runs = [chain(Cliff(dimension=2), ceb.Langevin(0.3), num=64, graphs=g) for g in (None, steps())]
    for run in runs:
        run.advance(20)
    assert_same(*runs)
    assert runs[1].block.replayed == 19
    assert runs[1].divergence().any
    assert runs[1].divergence().step.max() > 2


def test_autocast_is_another_structure_and_replays_alike():
    cache, runs = steps(), []
    energy = ceb.from_callable(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)))
    for captured in (None, cache):
        run = chain(energy, graphs=captured)
        run.advance(3)
        with torch.autocast("cpu", torch.bfloat16):
            run.advance(3)
        runs.append(run)
    assert_same(*runs)
    assert (cache.captures, cache.replays) == (2, 4)


def test_states_handed_out_are_not_changed_by_later_steps():
    run = chain(graphs=steps())
    run.advance(2)
    kept, copy = run.x, run.x.clone()
    run.advance(3)
    assert torch.equal(kept, copy)
    assert not torch.equal(run.x, copy)


def test_chains_that_take_turns_do_not_disturb_each_other():
    cache = steps()
    runs, alone = ([chain(x=points(6, seed=i), graphs=g) for i in range(2)] for g in (cache, None))
    for _ in range(3):
        for run in (*runs, *alone):
            run.advance(2)
    for run, expected in zip(runs, alone, strict=True):
        assert_same(run, expected)
    assert cache.captures == 1


@pytest.mark.parametrize("kernel", [KERNELS[1], KERNELS[3], KERNELS[5]], ids=kernel_name)
def test_joint_batch_replayed_equals_the_plain_one(kernel):
    thick, wide = binary("thick", seed=2), binary("wide", seed=3)
    x, results, cache = points(4, (1, 4, 4)), [], steps()
    mask = (points(1, (1, 4, 4), seed=5)[0] > 0).float()
    for captured in (None, cache):
        batch = JointBatch(None, x[:1], Plans())
        batch.graphs = captured
        for seed, (mix, held) in enumerate(
            [(thick + wide, None), (ceb.given(thick, wide), mask), (thick, None)]
        ):
            noise = ceb.Noise((torch.Generator().manual_seed(seed), 4))
            sampler = ceb.Annealed(kernel, SCHEDULE)
            block = Block(mix, x, sampler, noise, num_steps=9 + seed % 2, mask=held)
            batch.join(block, batch.begin(block, x))
        batch.advance(4)
        gone = batch.leave(batch.blocks[0])
        batch.advance(5)
        results.append(
            (gone, batch.rows, [(block.tally.gradients, len(block.history)) for block in batch.blocks])
        )
    (gone, rows, counts), (other_gone, other_rows, other_counts) = results
    for one, other in ((gone, other_gone), (rows, other_rows)):
        torch.testing.assert_close(one.state.x, other.state.x, rtol=0, atol=0)
        torch.testing.assert_close(one.state.energy, other.state.energy, rtol=0, atol=0)
    assert counts == other_counts
    assert cache.captures == 4  # levels alike or not, before and after one block leaves
    assert cache.replays == 5


# --- coefficients are data -----------------------------------------------------------------------


def test_moving_a_number_captures_nothing():
    cache = steps()
    runs = [chain(graphs=g) for g in (None, cache)]
    for run in runs:
        run.advance(3)
        run.coefficients = torch.tensor([0.5, 2.0])
        run.advance(2)
        run.coefficients.mul_(0.9)
        run.advance(2)
        run.dynamics = run.dynamics._replace(step_size=torch.tensor(0.02), temperature=torch.tensor(0.5))
        run.advance(2)
    assert_same(*runs)
    assert cache.captures == 1
    for weight in (0.1, 3.0):
        chain(weight * a + b, graphs=cache).advance(2)
        chain(a + b, ceb.Langevin(0.01 * weight, temperature=weight), graphs=cache).advance(2)
    assert cache.captures == 1


@pytest.mark.parametrize(
    "other",
    [
        {"energy": a + b + c},
        {"kernel": ceb.MALA(0.05)},
        {"kernel": ceb.Langevin(0.05, clamp=(-1, 1))},
        {"num": 7},
        {"mask": torch.ones(2)},
        {"coefficients": torch.ones(6, 2)},
        {"sources": [(torch.Generator().manual_seed(i), 3) for i in range(2)]},
    ],
    ids=str,
)
def test_another_structure_is_captured_by_itself(other):
    cache = steps()
    chain(graphs=cache).advance(2)
    chain(**other, graphs=cache).advance(2)
    assert cache.captures == 2


def test_weights_changed_in_place_are_seen():
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    energy = ceb.from_callable(network, event_shape=(2,))
    cache = steps()
    run, twin = chain(energy, graphs=cache), chain(energy)
    for change in (lambda p: p.mul_(2), lambda p: p.copy_(p.flip(0))):
        for chains in (run, twin):
            chains.advance(2)
        with torch.no_grad():
            for parameter in network.parameters():
                change(parameter)
    for chains in (run, twin):
        chains.advance(2)
    assert_same(run, twin)
    assert cache.captures == 1


def test_weights_that_lie_elsewhere_are_captured_again():
    network = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    energy = ceb.from_callable(network, event_shape=(2,))
    cache = steps()
    run = chain(energy, graphs=cache)
    run.advance(2)
    kept = network[0].weight.data
    network[0].weight.data = kept + 1
    run.advance(2)
    assert cache.captures == 2
    assert len(cache) == 1


def test_stacked_networks_take_over_weights_changed_in_place():
    experts = [binary("thick", seed=2), binary("wide", seed=3)]
    energy = experts[0] + experts[1]
    x = points(3, (1, 4, 4))
    potential = Potential(energy, energy.coefficients.float(), stack=True)
    before, _ = potential(x)
    assert potential.copies_weights
    with torch.no_grad():
        for parameter in experts[0].parameters():
            parameter.mul_(1.5)
    after, _ = potential(x)
    torch.testing.assert_close(after, energy(x))
    assert not torch.allclose(before, after)


def test_steps_are_captured_only_once_they_have_been_seen_often_enough():
    cache = steps(patience=3)
    run = chain(graphs=cache)
    run.advance(3)
    assert (cache.captures, cache.replays) == (0, 0)
    run.advance(3)
    assert (cache.captures, cache.replays) == (1, 2)
    assert run.block.stepping.startswith("2 of 6 steps replayed from a captured graph; the others one by one")


def test_cache_keeps_no_more_than_its_capacity():
    cache = steps(capacity=2)
    for num in (2, 3, 4, 2):
        chain(num=num, graphs=cache).advance(2)
        assert len(cache) <= 2
    assert cache.captures == 4  # the first was dropped


# --- falling back --------------------------------------------------------------------------------


def assert_plain(cache, reason, **setting):
    runs = [chain(**setting, graphs=g) for g in (None, cache)]
    for run in runs:
        run.advance(3)
    assert_same(*runs)
    assert cache.captures == runs[1].block.replayed == 0
    assert reason in runs[1].block.stepping


def test_what_cannot_be_captured_runs_plainly_and_says_so():
    assert_plain(steps(Unable()), "not permitted when stream is capturing")


def test_refused_steps_are_not_tried_again():
    tried = []

    class Noting(Unable):
        def capture(self, body, generators):
            tried.append(1)
            super().capture(body, generators)

    run = chain(graphs=steps(Noting()))
    run.advance(4)
    assert len(tried) == 1


def test_replay_that_gives_something_else_is_refused():
    cache = steps(Replayed(spoil=lambda generators: torch.rand(1, generator=generators[0])))
    assert_plain(cache, "did not give what the step gives")


def test_hooks_and_functions_are_not_captured():
    network = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    network.register_forward_hook(lambda *_: None)
    assert_plain(steps(), "hooks of Sequential", energy=ceb.from_callable(network, event_shape=(2,)))
    function = ceb.from_callable(lambda x: x.square().sum(1), name="bowl", event_shape=(2,))
    assert_plain(steps(), "bowl calls a Python function", energy=function)


def test_noise_of_another_class_is_not_captured():
    class Halved(ceb.Noise):
        def normal(self, like):
            return super().normal(like) / 2

    cache = steps()
    run = ceb.Chain(a + b, points(), ceb.Langevin(0.1), Halved((torch.Generator(), 8)), graphs=cache)
    run.advance(3)
    assert cache.captures == 0
    assert "noise is of a class of its own" in run.block.stepping


def test_report_says_how_steps_ran(monkeypatch):
    cache = steps()
    setting = {"num_steps": 5, "init": points(), "sampler": ceb.Langevin(0.1)}
    plain = ceb.sample(a + b, **setting)
    assert "stepped as" not in plain.report()
    monkeypatch.setattr(graphs, "shared", lambda device: cache)
    out = ceb.sample(a + b, **setting)
    assert "stepped as  4 of 5 steps replayed from a captured graph" in out.report()
    assert torch.equal(out.samples, plain.samples)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.to("meta"), lambda x: bool(x.any())]
)
def test_reads_by_the_host_are_noticed(read):
    with HostReads(), pytest.raises(HostReadError):
        read(points())


@pytest.mark.parametrize("stack", [False, True])
def test_evaluation_of_experts_reads_nothing_on_the_host(stack):
    energy = (expert(seed=1)["0"] + ~binary(seed=2) + (binary("wide", seed=3) | expert(seed=1)["2"])).double()
    x = points(3, (1, 4, 4), dtype=torch.float64)
    potential = Potential(energy, energy.coefficients, stack=stack)
    expected = potential(x)
    with HostReads():
        got = potential(x)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_nothing_is_captured_on_a_cpu():
    assert graphs.shared(torch.device("cpu")) is None


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_name)
@pytest.mark.parametrize("annealed", [False, True], ids=["plain", "annealed"])
def test_cuda_graph_gives_the_plain_chain(kernel, annealed):
    energy = (expert(seed=1)["0"] + ~binary(seed=2)).cuda()
    sampler = ceb.Annealed(kernel, SCHEDULE) if annealed else kernel
    x, mask = points(5, (1, 4, 4)).cuda(), (points(1, (1, 4, 4), seed=3)[0] > 0).float().cuda()
    cache, runs = StepGraphs(CudaRecorder(x.device), patience=3), []
    for captured in (None, cache):
        sources = [(torch.Generator("cuda").manual_seed(i), n) for i, n in enumerate((2, 3))]
        run = chain(energy, sampler, x=x, mask=mask, num_steps=30, sources=sources, graphs=captured)
        run.advance(30)
        runs.append(run)
    torch.testing.assert_close(runs[1].x, runs[0].x, rtol=1e-3, atol=1e-3)
    assert cache.captures >= 1, runs[1].block.stepping
    assert runs[1].block.replayed == 26
    for (g, _), (h, _) in zip(runs[0].block.noise.sources, runs[1].block.noise.sources, strict=True):
        assert torch.equal(g.get_state(), h.get_state())


@pytest.mark.gpu
def test_replays_and_captures_never_wait_by_accident_and_moving_numbers_captures_nothing():
    energy = (expert(seed=1)["0"] + ~binary(seed=2)).cuda()
    x = points(5, (1, 4, 4)).cuda()
    cache = StepGraphs(CudaRecorder(x.device), patience=3)
    run = chain(energy, ceb.Langevin(0.01), x=x, graphs=cache)
    weights = torch.tensor([0.5, 1.5], device="cuda")
    eta = torch.tensor(0.02, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.advance(6)
        run.coefficients = weights
        run.dynamics = run.dynamics._replace(step_size=eta)
        run.advance(6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.captures == 1, run.block.stepping
    assert cache.replays == 8


@pytest.mark.gpu
def test_host_read_on_a_gpu_falls_back_and_leaves_random_state_usable():
    class Reading(Quadratic):
        def energy(self, x, noise_level=None):
            return super().energy(x) * float(x.new_ones(()).sum())

    out = ceb.sample(
        Reading(dimension=2).cuda(), init=points().cuda(), num_steps=20, sampler=ceb.Langevin(0.1)
    )
    assert "reads a value on the host" in out.report()
    assert torch.rand(3, device="cuda").isfinite().all()
