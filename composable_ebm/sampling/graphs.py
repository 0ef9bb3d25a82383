"""Steps captured once and replayed: on CUDA a whole step of a batch is one launch.

A step is a function of tensors: states and what belongs to them, step size, temperature, noise
scale, coefficients, noise levels, masks and the count of steps. `StepGraphs` gives each of them a
buffer of its own, captures the step over those buffers (energy, input gradient, clip, update, noise,
clamp, frozen chains) as a CUDA graph, and from then on copies in what has changed and replays it. So moving a
weight, a temperature, a step size or a noise level captures nothing; another composition, kernel,
shape or type does.

Noise comes from generators that belong to the graph. Before a replay they take over the state of the
run's own generators, and give it back after, so a seed gives the chain that it gives step by step.

A capture is held against the step that it repeats, and what cannot be captured (a step that reads a
value on the host, an operation that CUDA refuses) runs one step after another for good, with the
reason in the report. What a Python function or a hook does is not repeated by a replay, so energies
with those are not captured. COMPOSABLE_EBM_GRAPHS=0 in the environment turns all of it off.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy, flat
from composable_ebm.energy.closures import Function
from composable_ebm.potential.packed import version_of
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.block import MaskedNoise, Rows
from composable_ebm.sampling.kernel import Dynamics, Kernel, Noise, State
from composable_ebm.sampling.recorder import CudaRecorder, Recorder

PATIENCE = 8
"""Steps of a kind that run before it is captured; twice as many each time its weights have moved."""

Tensors = tuple[Tensor | None, ...]

__all__ = [
    "Moved",
    "Step",
    "StepGraphs",
    "evaluate_rows",
    "settings_of",
    "shared",
    "step_rows",
    "weights_of",
]


class Moved(NamedTuple):
    """What a step leaves: chains, their gradient norms (batch,), and probabilities of acceptance."""

    rows: Rows
    norm: Tensor
    acceptance: Tensor | None = None


Clock = int | Tensor
Move = Callable[[Kernel, Potential, Rows, Tensors, Noise, Clock], Moved]


def step_rows(
    kernel: Kernel, potential: Potential, rows: Rows, numbers: Tensors, noise: Noise, clock: Clock
) -> Moved:
    """One step of every chain, `numbers` being its `Dynamics`; those not finite after it stay."""
    dynamics = numbers if isinstance(numbers, Dynamics) else Dynamics(*numbers)  # type: ignore[arg-type]
    state, info = kernel.step(potential, rows.state, noise, dynamics)
    norm = torch.linalg.vector_norm(flat(state.gradient), dim=1)
    return Moved(rows.moved(state, clock, norm), norm, info.acceptance)


def evaluate_rows(
    kernel: Kernel, potential: Potential, rows: Rows, numbers: Tensors, noise: Noise, clock: Clock
) -> Moved:
    """The chains moved to the states that `numbers` holds, with their energies and gradients."""
    (x,) = numbers
    assert x is not None
    energy, gradient = potential(x)
    norm = torch.linalg.vector_norm(flat(gradient), dim=1)
    return Moved(rows.moved(rows.state._replace(x=x, energy=energy, gradient=gradient), clock, norm), norm)


class Step(NamedTuple):
    """A step that may be captured: `move` of all rows, with what it reads.

    Attributes:
        move: `step_rows` or `evaluate_rows`.
        kernel: The kernel.
        potential: Energies and gradients.
        rows: The chains.
        numbers: Step size, temperature and noise scale, or the states to evaluate.
        noise: Draws for the rows.
        clock: Steps taken.
        noise_is_normal: Whether `noise` is plain noise, zero where the potential holds states.
    """

    move: Move
    kernel: Kernel
    potential: Potential
    rows: Rows
    numbers: Tensors
    noise: Noise
    clock: Clock
    noise_is_normal: bool = True

    def taken(self) -> Moved:
        """What the step leaves."""
        return self.move(self.kernel, self.potential, self.rows, self.numbers, self.noise, self.clock)

    @property
    def gradients(self) -> int:
        """How many gradients it takes."""
        return self.kernel.gradients_per_step if self.move is step_rows else 1

    @property
    def refusal(self) -> str:
        """Why such steps are never captured, or nothing."""
        if not self.gradients:
            return f"{type(self.kernel).__name__} takes no gradient"
        return "" if self.noise_is_normal else "its noise is of a class of its own"

    @property
    def key(self) -> Hashable:
        """Equal for steps that differ in the values of tensors only."""
        tensors = (*_columns(self.rows), *self.numbers, *self.potential.inputs)
        device = self.rows.alive.device.type
        return (
            self.move,
            settings_of(self.kernel),
            self.potential.structure,
            tuple(None if t is None else (tuple(t.shape), t.dtype, t.device) for t in tensors),
            tuple(count for _, count in self.noise.sources),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
        )


def settings_of(kernel: Kernel) -> Hashable:
    """What two kernels must have alike for their chains to step together."""
    others = [f.name for f in fields(kernel) if f.name not in Dynamics._fields]
    return type(kernel), *((name, getattr(kernel, name)) for name in others)


class Weights(NamedTuple):
    """Where the tensors of some modules lie, and why a step with these modules is not captured."""

    places: Hashable
    refusal: str


def weights_of(modules: Iterable[nn.Module], versions: bool) -> Weights:
    """What tells whether a captured step still reads the weights of these modules.

    Args:
        modules: All of them, parts included.
        versions: Whether changes in place count as well, and not only weights that lie elsewhere.
    """
    places: list[Hashable] = []
    refusal = ""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            refusal = f"hooks of {type(module).__name__} are Python, which a replay would leave out"
        if not getattr(module, "may_be_captured", True):
            refusal = f"{type(module).__name__} decides anew at every step what it does"
        if isinstance(module, Energy) and any(map(_is_function, _held(module))):
            refusal = f"{module} calls a Python function, whose state a replay would not see"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                places.append(version_of(tensor) if versions else tensor.data_ptr())
    return Weights(tuple(places), refusal)


def _held(module: nn.Module) -> Iterator[object]:
    yield from vars(module).values()
    yield from module._modules.values()


def _is_function(value: object) -> bool:
    return callable(value) and (isinstance(value, Function) or not isinstance(value, nn.Module))


# -- one captured step -------------------------------------------------------------------------------


class _Slot:
    """A buffer, and what it was last filled with."""

    def __init__(self, value: Tensor) -> None:
        self.buffer = value.clone()
        self._filled_with: tuple[Tensor, int] | None = None

    def fill(self, value: Tensor) -> None:
        version = -1 if value.is_inference() else value._version
        if self._filled_with is None or self._filled_with[0] is not value or self._filled_with[1] != version:
            self.buffer.copy_(value)
            self._filled_with = value, version


class _Captured:
    """A step over buffers of its own.

    Args:
        recorder: Captures it.
        step: The step, as it is now.
        states: Of its generators, before it.
        places: Where the weights are.
    """

    def __init__(self, recorder: Recorder, step: Step, states: Sequence[Tensor], places: Hashable) -> None:
        self.places = places
        self.rows = _copied(step.rows)
        self._handed: Rows | None = None
        self._numbers = [None if t is None else _Slot(t) for t in step.numbers]
        self._inputs = [None if t is None else _Slot(t) for t in step.potential.inputs]
        self._clock = torch.zeros((), dtype=torch.long, device=step.rows.alive.device)
        self._results: Tensors | None = None
        sources = step.noise.sources
        self.generators = [torch.Generator(generator.device) for generator, _ in sources]
        own = Noise(*((g, count) for g, (_, count) in zip(self.generators, sources, strict=True)))
        bound = step.potential.reading(_buffers(self._inputs))
        over_buffers = Step(
            step.move,
            step.kernel,
            bound,
            self.rows,
            _buffers(self._numbers),
            own if bound.mask is None else MaskedNoise(own, bound.mask),
            self._clock,
        )

        device = self._clock.device.type
        kind, casts = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def body() -> None:
            # Casts of weights that autocast keeps would be gone when a later replay reads them.
            with torch.autocast(device, kind, enabled=casts, cache_enabled=False):
                moved = over_buffers.taken()
            if self._results is None:
                self._results = tuple(None if t is None else t.clone() for t in moved[1:])
            _copy_into((*_columns(self.rows), *self._results), (*_columns(moved.rows), *moved[1:]))

        self._load(step, states)
        self._replay = recorder.capture(body, self.generators)

    def __call__(self, step: Step, states: Sequence[Tensor]) -> Moved:
        """The step, from its rows and these states of its generators on."""
        self._load(step, states)
        self._handed = None
        self._replay()
        assert self._results is not None
        norm, acceptance = (None if t is None else t.clone() for t in self._results)
        assert norm is not None
        self._handed = _copied(self.rows)  # still in the buffers when the next step asks for them
        return Moved(self._handed, norm, acceptance)

    def _load(self, step: Step, states: Sequence[Tensor]) -> None:
        if step.rows is not self._handed:
            _copy_into(_columns(self.rows), _columns(step.rows))
        slots = (*self._numbers, *self._inputs)
        for slot, value in zip(slots, (*step.numbers, *step.potential.inputs), strict=True):
            if slot is not None and value is not None:
                slot.fill(value)
        self._clock.fill_(step.clock)
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


def _columns(rows: Rows) -> Tensors:
    return *rows.state, *rows[1:]


def _types(rows: Rows) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in _columns(rows)]


def _copied(rows: Rows) -> Rows:
    columns = [None if t is None else t.clone() for t in _columns(rows)]
    width = len(rows.state)
    return Rows(State(*columns[:width]), *columns[width:])  # type: ignore[arg-type]


def _copy_into(buffers: Tensors, values: Tensors) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)


def _buffers(slots: Sequence[_Slot | None]) -> Tensors:
    return tuple(None if slot is None else slot.buffer for slot in slots)


# -- all of them -------------------------------------------------------------------------------------


class StepGraphs:
    """Captured steps, by their structure, for one thread. The energies of a step stay in memory with it.

    Args:
        recorder: Captures them.
        capacity: How many are kept; those not used for longest are dropped.
        patience: Steps of a kind that run before it is captured.
    Attributes:
        captures: How many steps were captured.
        replays: How many steps were replayed.
    """

    def __init__(self, recorder: Recorder, capacity: int = 16, patience: int = PATIENCE) -> None:
        self.recorder = recorder
        self.capacity = capacity
        self.patience = patience
        self.captures = 0
        self.replays = 0
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()  # steps seen, captures lost
        self._refused: OrderedDict[Hashable, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def take(self, step: Step, weights: Weights) -> tuple[Moved, str]:
        """A step, replayed where that can be.

        Args:
            step: What to do.
            weights: Of the modules of its potential.
        Returns:
            What the step leaves, and why it was not replayed, or nothing.
        """
        if refusal := weights.refusal or step.refusal:
            return step.taken(), refusal
        key = step.key
        if key in self._refused:
            return step.taken(), self._refused[key]
        captured = self._captured.get(key)
        if captured is not None and captured.places != weights.places:
            del self._captured[key]
            self._seen[key] = 0, self._seen.get(key, (0, 0))[1] + 1
            captured = None
        states = [generator.get_state() for generator, _ in step.noise.sources]
        if captured is None:
            moved = step.taken()
            if self._is_due(key):
                self._capture(key, step, states, weights.places, moved)
            return moved, self._refused.get(key, "steps of a new kind run before they are captured")
        self._captured.move_to_end(key)
        moved = captured(step, states)
        for (generator, _), own in zip(step.noise.sources, captured.generators, strict=True):
            generator.set_state(own.get_state())
        for tally in step.potential.tallies:
            tally.gradients += step.gradients
        self.replays += 1
        return moved, ""

    def _is_due(self, key: Hashable) -> bool:
        steps, lost = self._seen.get(key, (0, 0))
        self._seen[key] = steps + 1, lost
        _keep_newest(self._seen, 16 * self.capacity, key)
        return steps >= self.patience * 2 ** min(lost, 16)

    def _capture(
        self, key: Hashable, step: Step, states: Sequence[Tensor], places: Hashable, expected: Moved
    ) -> None:
        """Captures a step that was taken, and holds a replay against what that gave."""
        if _types(expected.rows) != _types(step.rows):
            return  # the next step starts from what its buffers can hold
        try:
            captured = _Captured(self.recorder, step, states, places)
            got = captured(step, states)
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            self._refuse(key, f"no {self.recorder.name} of it, {reason.splitlines()[0]}")
            return
        pairs = zip(captured.generators, step.noise.sources, strict=True)
        drew_alike = all(own.get_state().equal(run.get_state()) for own, (run, _) in pairs)
        if not (drew_alike and self.recorder.holds(_agree(got, expected))):
            self._refuse(key, f"a replay of its {self.recorder.name} did not give what the step gives")
            return
        self.captures += 1
        self._captured[key] = captured
        _keep_newest(self._captured, self.capacity, key)

    def _refuse(self, key: Hashable, reason: str) -> None:
        self._refused[key] = reason
        _keep_newest(self._refused, 16 * self.capacity, key)


def _keep_newest(kept: OrderedDict, capacity: int, key: Hashable) -> None:
    kept.move_to_end(key)
    while len(kept) > capacity:
        kept.popitem(last=False)


def _agree(got: Moved, expected: Moved) -> Tensor:
    """Whether two results of one step are equal up to rounding, (), on their device."""
    pairs = zip((*_columns(got.rows), got.norm), (*_columns(expected.rows), expected.norm), strict=True)
    close = [
        torch.isclose(a, b, rtol=_rounding(b), atol=_rounding(b), equal_nan=b.is_floating_point()).all()
        for a, b in pairs
        if a is not None and b is not None
    ]
    return torch.stack(close).all()


def _rounding(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps ** 0.5 if tensor.is_floating_point() else 0.0


_local = threading.local()


def shared(device: torch.device) -> StepGraphs | None:
    """The captured steps of this thread on a CUDA device; None elsewhere."""
    if device.type != "cuda" or os.environ.get("COMPOSABLE_EBM_GRAPHS") == "0":
        return None
    by_device: dict[torch.device, StepGraphs] = _local.__dict__.setdefault("by_device", {})
    if device not in by_device:
        by_device[device] = StepGraphs(CudaRecorder(device))
    return by_device[device]
