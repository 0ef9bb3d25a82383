"""Any module as a list of operations with gradients by hand: no graph, weights in the fastest layouts.

The module is read again when its weights, modes or attributes change, and for states of another shape.
The first time, the result is held against autograd on other states, so that what tracing cannot see
(values that leave PyTorch and come back, gradients of a module's own making) is noticed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from composable_ebm.energy import with_gradient
from composable_ebm.potential.forms import Evaluate
from composable_ebm.potential.native import wanted
from composable_ebm.potential.operations import stays_whole
from composable_ebm.potential.operations.rule import sharing
from composable_ebm.potential.packed import Watch, hooked
from composable_ebm.potential.program import Program
from composable_ebm.potential.trace import Trace, Unreadable, record

__all__ = ["TracedForm"]

SHAPES_KEPT = 16
"""For how many shapes of states programs are kept; they share what they copy of the weights."""
MOST_PARAMETERS = 1 << 25
"""Larger networks are not read: copies of their weights would take more memory than time is gained."""
RESTLESS = "it changes its own attributes when it is called"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest distance from autograd, relative to its size, that rounding explains; 0.1 for narrower types."""


@dataclass
class _Known:
    """What was read of a network.

    Attributes:
        version: The network as it was then, see `Watch`.
        structure: The same but for the values of weights.
        refusal: Why the network is not read, whatever the states.
        programs: By shape of states, or why there is none.
        traces: Those that hold while only weights change.
        copies: Of weights, in the layouts of their operations.
        checked: Lists of operations that were held against autograd.
        restless: Whether each call changes its own attributes, so that it must really be called.
    """

    version: tuple[object, ...] = ()
    structure: tuple[object, ...] = ()
    refusal: str | None = None
    programs: OrderedDict[Hashable, Program | str] = field(default_factory=OrderedDict)
    traces: dict[Hashable, Trace] = field(default_factory=dict)
    copies: dict[Hashable, object] = field(default_factory=dict)
    checked: set[Hashable] = field(default_factory=set)
    restless: bool = False


class _Store(threading.local):
    """What a thread knows of networks, so that a new chain reads none again and no threads share buffers."""

    def __init__(self) -> None:
        self.known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


_store = _Store()


class TracedForm:
    """One network, traced.

    Args:
        network: Any module.
        owner: What is known of the network is known as long as this lives; the network unless given.
    """

    def __init__(self, network: nn.Module, owner: nn.Module | None = None) -> None:
        self.network = network
        self._served: Program | None = None
        self._owner = network if owner is None else owner
        self._watch = Watch(self._owner, attributes=True)
        self._compiled = next(filter(None, map(_compiled, network.modules())), None)

    @property
    def path(self) -> str:
        """How the last states were evaluated, in words."""
        return "" if self._served is None else self._served.path

    def ready(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | str:
        """The program for such states, or what stopped it from serving them."""
        if x.device.type != "cpu":
            return ""  # there autograd is the form: a step is captured whole
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if self._compiled is not None:
            return self._compiled
        known = self._known()
        if known.restless:
            return RESTLESS
        version = self._watch()
        if version != known.version:
            known.version = version
            known.programs.clear()
            known.copies.clear()
            if self._watch.structure != known.structure:
                known.structure = self._watch.structure
                known.traces.clear()
                known.refusal = _unreadable(self.network)
        if known.refusal is not None:
            return known.refusal
        found = self._program(x, noise_level)
        if not isinstance(found, str):
            self._served = found
        return found

    def _known(self) -> _Known:
        if (known := _store.known.get(self._owner)) is None:
            known = _store.known[self._owner] = _Known()
        return known

    def _program(self, x: Tensor, noise_level: Tensor | None) -> Program | str:
        """The program for states of this shape, or why there is none."""
        level = None if noise_level is None else noise_level.shape
        key = (x.shape, x.dtype, level, wanted())
        programs = self._known().programs
        if key in programs:
            programs.move_to_end(key)
            return programs[key]
        try:
            found: Program | str = self._traced(key, x, noise_level)
        except Unreadable as reason:
            found = str(reason)
        programs[key] = found
        if len(programs) > SHAPES_KEPT:
            programs.popitem(last=False)
        return found

    def _traced(self, key: Hashable, x: Tensor, noise_level: Tensor | None) -> Program:
        known = self._known()
        trace = known.traces.get(key) or self._read(x, noise_level)
        tensors = {id(tensor) for tensor in (*self.network.parameters(), *self.network.buffers())}
        if trace.reads_only(tensors) and len(known.traces) < SHAPES_KEPT:
            known.traces[key] = trace
        with sharing(known.copies):
            program = Program(trace)
        operations = tuple(node.operation for node in trace.nodes)
        if operations not in known.checked:
            self._check(program, x, noise_level)
            known.checked.add(operations)
        return program

    def _read(self, x: Tensor, noise_level: Tensor | None) -> Trace:
        known = self._known()
        for _ in range(2):  # the first call may make what others find
            try:
                trace = record(self.network, [self.network], x, noise_level, stays_whole)
            except Unreadable:
                raise
            except Exception as error:  # the module's own, which the plain call will show
                raise Unreadable(f"reading it failed with {type(error).__name__}: {error}") from error
            before, known.version = known.version, self._watch.again()
            if known.version == before:
                return trace
            _make_ordinary(self._owner)
            known.version = self._watch.again()
            known.structure = self._watch.structure
        known.restless = True
        raise Unreadable(RESTLESS)

    def _check(self, program: Program, x: Tensor, noise_level: Tensor | None) -> None:
        """Raises Unreadable unless the program equals autograd, on the states turned around and shrunk."""
        states = x.detach().flip(tuple(range(x.ndim))).mul_(0.9)
        level = () if noise_level is None else (noise_level,)
        try:
            outputs, gradient = with_gradient(lambda states: self.network(states, *level), states)
            gradient = torch.zeros_like(states) if gradient is None else gradient
        except Exception as error:
            reason = f"it could not be held against autograd: {type(error).__name__}: {error}"
            raise Unreadable(reason) from error
        with torch.no_grad():
            ours, pull_back = program(states, noise_level)
            pairs = ((ours, outputs), (pull_back(torch.ones_like(ours)), gradient))
        tolerance = TOLERANCE.get(x.dtype, 0.1)
        for mine, theirs in pairs:
            finite = torch.isfinite(theirs)
            mine, theirs = mine[finite].double(), theirs[finite].double()
            if float((mine - theirs).norm()) > tolerance * float(theirs.norm()) + 1e-6:
                raise Unreadable("its result or its gradient is not that of its operations")


def _make_ordinary(module: nn.Module) -> None:
    """Tensors that a module keeps from being read, as tensors that its own gradients can pass."""
    for part in module.modules():
        for held in (vars(part), part._buffers):
            kept = {name: each for name, each in held.items() if isinstance(each, Tensor)}
            held.update({name: each.clone() for name, each in kept.items() if each.is_inference()})


def _unreadable(network: nn.Module) -> str | None:
    """Why a network must really be called."""
    if hooked(network):
        return "it has hooks"
    tensors = (*network.parameters(), *network.buffers())
    if (count := sum(tensor.numel() for tensor in tensors)) > MOST_PARAMETERS:
        return f"it has {count:,} parameters, more than are copied"
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "weights on another device than the CPU"
    return None


def _compiled(module: nn.Module) -> str | None:
    """That a module is compiled by others, if it is."""
    compiled = isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"
    return f"it is compiled already ({type(module).__name__})" if compiled else None
