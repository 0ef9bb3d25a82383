"""The speed benchmarks: contestants do the same work, and the arithmetic of the tables is right."""

from pathlib import Path

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.sampling.schedule import Schedule, constant


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    pytest.importorskip("ebm")
    pytest.importorskip("torchebm")
    import rivals

    return rivals


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import timing

    return timing


def seeded(run, *arguments):
    torch.manual_seed(0)
    return run(*arguments)


def test_contestants_walk_the_same_chain(rivals, timing):
    network, x = rivals.textbook(), timing.uniform((4, 1, 32, 32), torch.device("cpu"))
    energy = ceb.from_callable(network, event_shape=(1, 32, 32), data_range=(-1, 1))
    ours = rivals.chain(energy, x, 8)
    for theirs in (rivals.plain_loop, rivals.in_ebmkit):
        torch.testing.assert_close(ours, seeded(theirs, network, x, 8), rtol=1e-4, atol=1e-4)
    # Without the clip, but these gradients are far from it.
    torch.testing.assert_close(ours, seeded(rivals.in_torchebm, network, x, 8), rtol=1e-4, atol=1e-4)
    assert float((ours - x).abs().max()) > 1e-2


@pytest.mark.parametrize("given", [False, True])
def test_products_of_faces_are_the_same_energy(rivals, timing, given):
    device = torch.device("cpu")
    base = ceb.load_expert("faces/base") if given else None
    product = rivals.Product(rivals.face_experts(2, device), base, 0.3)
    x = timing.uniform((2, 3, 32, 32), device)
    level = torch.tensor(0.3)
    torch.testing.assert_close(product.ours(x, noise_level=level), product.theirs(x), rtol=1e-5, atol=0.1)
    kernel = ceb.Langevin(1e-3, noise_scale=0.005, grad_clip=0.03, clamp=(-1.0, 1.0))
    sampler = ceb.Annealed(kernel, Schedule(noise_level=constant(0.3), num_levels=1))
    chain = rivals.chain(product.ours, x, 3, sampler)
    assert chain.shape == x.shape
    assert float((chain - x).abs().max()) > 1e-3


def test_operations_of_the_textbook_network_are_counted(rivals):
    # Output places x kernel x channels in x channels out, for value and gradient, two operations each.
    convolutions = 256 * 25 * 16 + 64 * 9 * 16 * 32 + 16 * 9 * 32 * 64 + 4 * 9 * 64 * 64
    expected = 4 * (convolutions + 256 * 64 + 64)
    assert rivals.operations(rivals.textbook(), torch.zeros(3, 1, 32, 32)) == 3 * expected


def test_ratios_are_taken_within_rounds(timing):
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 6.0, 12.0]}
    table = timing.relative(seconds, "ours")
    assert table["theirs"] == {
        "seconds": 6.0,
        "fastest": 3.0,
        "ours_is_faster_by": 3.0,
        "quartiles": [3.0, 3.0],
    }
    assert table["ours"]["ours_is_faster_by"] == 1.0


def test_contestants_take_turns(timing):
    order = []
    timing.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, torch.device("cpu"))
    assert "".join(order) == "ababab"  # the first round warms up


def test_exponent_is_the_slope_of_a_power_law(timing):
    assert timing.exponent([1, 2, 4, 8], [0.1 * n**0.7 for n in (1, 2, 4, 8)]) == 0.7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_gpu_benchmark_says_so(rivals, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    import gpu

    with pytest.raises(SystemExit, match="sees no card"):
        gpu.main()
