"""Chains of convolutions and linear layers as one compiled function of C: energy and input gradient.

An image goes through all layers and back before the next one starts, so nothing leaves the cache.
The function (`native.c`) is one for all networks, and is compiled by the machine's own C compiler,
once, into the user's cache folder. Where there is no compiler, or the variable COMPOSABLE_EBM_NATIVE
is 0, or a network has other layers, `compiled` or autograd does the work.

Compiling takes one or two seconds, which a first small run must not pay: it happens when a process
has spent `PATIENCE` seconds' worth of arithmetic on networks that would gain from it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["NativeNetwork", "NativeUnavailable", "build", "library"]

LANES = 16
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
SOURCE = Path(__file__).with_name("native.c")
ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: 1, nn.ReLU: 2}
SILENT = (nn.Flatten, nn.Identity, nn.Dropout)
MOST_LAYERS = 32
PATIENCE = 4.0
RATE = 30e9  # operations a second before compiling, for the count of seconds

_spent = 0.0


class NativeUnavailable(RuntimeError):
    """The C function cannot be had on this machine."""


@dataclass
class Layer:
    """As `Layer` in native.c, field by field."""

    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride: int
    padding: int
    activation: int = 0
    forward_weight: int = 0
    backward_weight: int = 0
    bias: int = 0

    @property
    def operations(self) -> int:
        """Additions and multiplications of energy and gradient, for one image."""
        taps = self.kernel_height * self.kernel_width * self.in_channels
        return 4 * taps * self.out_channels * self.out_height * self.out_width


def cache_folder() -> Path:
    """Where the compiled function is kept: $XDG_CACHE_HOME/composable_ebm or ~/.cache/composable_ebm."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "composable_ebm"


def _compiled_file() -> Path:
    info = Path("/proc/cpuinfo")
    flags = (
        [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    )
    about = [*FLAGS, platform.machine(), platform.processor(), *flags[:1]]
    digest = hashlib.sha256(SOURCE.read_bytes() + "\n".join(about).encode()).hexdigest()
    return cache_folder() / f"native-{digest[:16]}.so"


def build() -> Path:
    """Compiles the function unless that was done before, and returns the file.

    Raises:
        NativeUnavailable: If there is no C compiler, it fails, or the cache cannot be written.
    """
    path = _compiled_file()
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeUnavailable("no C compiler was found (cc, gcc, clang, or $CC).")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(temporary, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} did not compile {SOURCE.name}: {error}.") from error
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built if need be.

    Raises:
        NativeUnavailable: If it cannot be had.
    """
    try:
        functions = ctypes.CDLL(str(build()))
    except OSError as error:
        raise NativeUnavailable(f"the compiled function does not load: {error}.") from error
    functions.working_memory.restype = ctypes.c_size_t
    functions.energy_and_gradient.restype = None
    return functions


def _wanted() -> bool:
    return os.environ.get("COMPOSABLE_EBM_NATIVE", "1") != "0"


@functools.cache
def _at_hand() -> bool:
    return _compiled_file().exists()


class NativeNetwork:
    """x -> energies and their gradient, of a chain of layers with one output.

    Args:
        layers: `nn.Conv2d`, `nn.Linear`, activations and `nn.Flatten`, as `known_layers` gives them.
        shape: (channels, height, width) of an image.
    """

    def __init__(self, layers: Sequence[nn.Module], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        plan, weights = _packed(layers, shape)
        self.operations = sum(layer.operations for layer in plan)
        self.weights = torch.cat(weights)
        self.count = len(plan)
        numbers = [number for layer in plan for number in astuple(layer)]
        self.plan = (ctypes.c_int * len(numbers))(*numbers)
        self.memory: list[Tensor] = []

    @staticmethod
    def fits(layers: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether it serves such a network and such states: images, and one output."""
        kinds = [type(layer) for layer in layers if type(layer) not in SILENT]
        weighted = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
        if not _wanted() or x.ndim != 4 or not 1 < len(weighted) <= MOST_LAYERS:
            return False
        first, last = weighted[0], weighted[-1]
        convolutions = [layer for layer in weighted if isinstance(layer, nn.Conv2d)]
        return (
            set(kinds) <= {nn.Conv2d, nn.Linear, *ACTIVATIONS}
            and (kinds[0], kinds[-1]) == (nn.Conv2d, nn.Linear)
            and not any(a in ACTIVATIONS and b in ACTIVATIONS for a, b in pairwise(kinds))
            and weighted[: len(convolutions)] == convolutions
            and isinstance(first, nn.Conv2d)
            and first.in_channels == x.shape[1] < LANES
            and isinstance(last, nn.Linear)
            and last.out_features == 1
            and sum(isinstance(layer, nn.Flatten) and layer.start_dim == 1 for layer in layers) == 1
        )

    def allowed(self, rows: int) -> bool:
        """Whether to use it now: it is compiled, or so much was spent without it that it now is."""
        global _spent
        if not _at_hand():
            _spent += self.operations * rows / RATE
            if _spent < PATIENCE:
                return False
        try:
            library()
        except NativeUnavailable:
            return False
        return True

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) and gradient, shape of `x`."""
        functions = library()
        x = x.contiguous()
        energy, gradient = x.new_empty(len(x)), torch.empty_like(x)
        parts = max(1, min(torch.get_num_threads(), len(x) // 4))
        while len(self.memory) < parts:
            self.memory.append(torch.zeros(functions.working_memory(self.plan, self.count)))

        def run(images: Tensor, energies: Tensor, gradients: Tensor, memory: Tensor) -> None:
            pointers = [
                ctypes.c_void_p(t.data_ptr()) for t in (self.weights, images, energies, gradients, memory)
            ]
            functions.energy_and_gradient(
                self.plan, self.count, *pointers[:4], ctypes.c_int(len(images)), pointers[4]
            )

        pieces = [t.tensor_split(parts) for t in (x, energy, gradient)]
        if parts == 1:
            run(x, energy, gradient, self.memory[0])
        else:
            list(_workers(parts).map(run, *pieces, self.memory))
        return energy, gradient


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads for the parts of a batch; the C function runs without Python's lock."""
    return ThreadPoolExecutor(count, thread_name_prefix="composable_ebm-native")


class _Weights:
    """Weights in the layouts of native.c, one after another."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.size = 0

    def keep(self, block: Tensor) -> int:
        """Adds a block, and returns its place."""
        self.blocks.append(block.reshape(-1))
        self.size += block.numel()
        return self.size - block.numel()


def _packed(layers: Sequence[nn.Module], shape: Sequence[int]) -> tuple[list[Layer], list[Tensor]]:
    """The layers as native.c knows them, and their weights."""
    plan: list[Layer] = []
    weights = _Weights()
    image = tuple(shape)  # channels as the network counts them, height, width
    stored = image[0]  # channels as native.c does
    for layer in layers:
        if type(layer) in ACTIVATIONS:
            plan[-1].activation = ACTIVATIONS[type(layer)]
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            if isinstance(layer, nn.Linear):
                # From channels first, as flattened, to channels last, as stored.
                weight = layer.weight.detach().unflatten(1, image).permute(0, 2, 3, 1)
                weight = _pad(weight, 3, stored).flatten(1)[:, :, None, None]
                stored, image, stride, padding = weight.shape[1], (weight.shape[1], 1, 1), 1, 0
            else:
                weight = _pad(layer.weight.detach(), 1, stored)
                stride, padding = layer.stride[0], int(layer.padding[0])
            outputs = -(-len(weight) // LANES) * LANES
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
            weight, bias = _pad(weight, 0, outputs), _pad(bias, 0, outputs)
            rows, columns = weight.shape[2:]
            high = (image[1] + 2 * padding - rows) // stride + 1
            wide = (image[2] + 2 * padding - columns) // stride + 1
            new = Layer(stored, image[1], image[2], outputs, high, wide, rows, columns, stride, padding)
            new.forward_weight = weights.keep(weight.permute(2, 3, 1, 0))
            new.backward_weight = weights.keep(torch.cat(_backward_blocks(weight, stride, padding, not plan)))
            new.bias = weights.keep(bias)
            plan.append(new)
            stored, image = outputs, (len(layer.weight), high, wide)
    return plan, weights.blocks


def _backward_blocks(weight: Tensor, stride: int, padding: int, thin: bool) -> list[Tensor]:
    """For each place of a pixel modulo the stride, the taps that reach it, by rising output."""
    blocks = []
    for a in range(stride):
        for b in range(stride):
            taps = weight[:, :, (a + padding) % stride :: stride, (b + padding) % stride :: stride].flip(2, 3)
            order = (1, 2, 3, 0) if thin else (2, 3, 0, 1)
            blocks.append(taps.permute(*order).reshape(-1))
    return blocks


def _pad(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
