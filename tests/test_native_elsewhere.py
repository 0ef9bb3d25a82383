"""The functions in C are right on other processors: on ARM by an emulator, with short vectors here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import points
from test_forms import ZOO, Tokens, assert_equal, plain

from composable_ebm.experts.networks import ConvEnergy
from composable_ebm.potential import native
from composable_ebm.potential.forms.native import NativeNetwork, part_for_c
from composable_ebm.potential.operations import stays_whole
from composable_ebm.potential.program import Program
from composable_ebm.potential.trace import Trace, record

HERE = Path(__file__).parent
ARM = ("aarch64-linux-gnu-gcc", "-static"), ("qemu-aarch64",)
SHORT = ("gcc", "-msse2"), ()


@pytest.fixture(scope="module", params=[ARM, SHORT], ids=["arm", "four lanes"])
def elsewhere(request, tmp_path_factory):
    """A program of the C functions for another processor, and what runs it."""
    (compiler, *options), runner = request.param
    for tool in (compiler, *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if request.param is SHORT and sys.platform != "linux":
        pytest.skip("for x86 processors")
    program = tmp_path_factory.mktemp("elsewhere") / "native"
    source = str(HERE / "native_elsewhere.c")
    flags = ["-O2", "-ffp-contract=fast", f"-I{native.FOLDER}", "-lm"]
    subprocess.run([compiler, source, *options, *flags, "-o", str(program)], check=True, capture_output=True)
    return [*runner, str(program)]


def part_of(network, x):
    return part_for_c(record(network, [network], x, None, stays_whole).needed())


def there(elsewhere, part, x, cotangents):
    """Outputs and gradients as the program gives them."""
    ours = NativeNetwork(part)
    found = ours._network
    sizes = [len(ours._operations), len(ours._images), found.channels, found.outputs, found.result]
    sizes += [found.kept, found.memory, found.thin, found.tokens, len(x), len(ours.weights), x[0].numel()]
    blocks = [torch.tensor(sizes, dtype=torch.int32), ours.weights.detach(), x, cotangents]
    first, *rest = (block.contiguous().numpy().tobytes() for block in blocks)
    given = b"".join([first, bytes(ours._operations), bytes(ours._images), *rest])
    done = subprocess.run(elsewhere, input=given, check=True, capture_output=True)
    numbers = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    count = cotangents.numel()
    return numbers[:count].view_as(cotangents), numbers[count:].view_as(x)


@pytest.mark.parametrize(
    "name",
    ["a sequence in a class", "resnet", "residual sum", "pools", "bottleneck", "gains and biases"],
)
def test_networks_are_right_on_other_processors(elsewhere, name):
    x = points(3, (3, 8, 8))
    part = part_of(ZOO[name], x)
    outputs, pull_back = Program(Trace(part.input, None, part.output, part.nodes), in_c=False)(x, None)
    cotangents = points(3, (outputs.numel() // 3,))
    expected = outputs.reshape(3, -1), pull_back(cotangents.reshape(outputs.shape))
    assert_equal(there(elsewhere, part, x, cotangents), expected, 3e-5)


def test_several_outputs_are_right_on_other_processors(elsewhere):
    network, x, cotangents = (
        ConvEnergy((1, 14, 14), 5, widths=(16, 20), hidden=24),
        points(4, (1, 14, 14)),
        points(4, (5,)),
    )
    inner = torch.nn.Sequential(
        *network.features, torch.nn.Flatten(), network.hidden, torch.nn.SiLU(), network.head
    )
    states = torch.nn.functional.pixel_unshuffle(x, 2).contiguous()
    assert_equal(
        there(elsewhere, part_of(inner, states), states, cotangents), plain(inner, states, cotangents), 3e-5
    )


def test_tokens_are_right_on_other_processors(elsewhere):
    network, x, cotangents = Tokens(32, 11), points(3, (11, 32)), points(3, (11, 32))
    outputs, gradients = there(elsewhere, part_of(network, x), x, cotangents.flatten(1))
    assert_equal((outputs.view_as(x), gradients), plain(network, x, cotangents), 3e-5)
