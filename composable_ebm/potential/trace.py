"""Reads a network: which operations it does on states, with everything else of it as constants.

The network is run once, on states of one shape, while every operation that PyTorch executes is written down.
So classes, functions, shape arithmetic and Python's own control flow need no understanding: what is
left is a straight list of operations on values of three kinds:

    live        depends on the states, and has a gradient to pull back
    level       depends on the noise level alone
    constant    depends on neither: weights, and whatever was computed from them

What PyTorch makes of others is read as those, unless it stays whole. What cannot be read so raises
`Unreadable` with the operation that stopped it: results that steer Python (`.item()`, `if x.sum() > 0`),
random numbers, changes of buffers, operations with several results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Node", "Trace", "Unreadable", "Value", "record"]


aten = torch.ops.aten


class Unreadable(Exception):
    """The network does something that cannot be written down as operations on its states."""


@dataclass(eq=False)
class Value:
    """A result of an operation, or an input.

    Attributes:
        shape: Of the tensor.
        dtype: Of the tensor.
        of_states: Whether it depends on the states, not on the noise level alone.
        live: Whether it does so by a path that has a gradient.
    """

    shape: torch.Size
    dtype: torch.dtype
    of_states: bool
    live: bool


@dataclass(eq=False)
class Node:
    """An operation: `operation(**arguments) -> output`.

    Attributes:
        operation: Its name in ATen, without the overload: "silu", "conv2d".
        function: The operation itself.
        arguments: By name; values stand for the tensors that change from call to call.
        output: What it gives.
    """

    operation: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    output: Value

    @property
    def inputs(self) -> list[Value]:
        """The values among the arguments, in order."""
        return list(_of(Value, self.arguments.values()))

    def __call__(self, *given: Tensor) -> Any:
        """The operation itself, with tensors in place of its values."""
        tensors = iter(given)

        def filled(thing: object) -> object:
            if isinstance(thing, Value):
                return next(tensors)
            if isinstance(thing, (list, tuple)):
                return [filled(each) for each in thing]
            return thing

        return self.function(**{name: filled(thing) for name, thing in self.arguments.items()})


@dataclass
class Trace:
    """A network as a list of operations.

    Attributes:
        x: The states.
        noise_level: The noise level, or None where the network was given none.
        output: The result.
        nodes: What leads to it, in order.
    """

    x: Value
    noise_level: Value | None
    output: Value
    nodes: list[Node] = field(default_factory=list)

    def reads_only(self, tensors: set[int]) -> bool:
        """Whether all constants are tensors of those ids, not what was computed from them."""
        nodes = self.needed()
        return all(id(t) in tensors for node in nodes for t in _of(Tensor, node.arguments.values()))

    def needed(self) -> list[Node]:
        """The operations that the output depends on."""
        wanted, kept = {self.output}, []
        for node in reversed(self.nodes):
            if node.output in wanted:
                wanted.update(node.inputs)
                kept.append(node)
        return kept[::-1]


def _of(kind: type, things: object) -> Iterator[Any]:
    """What is of that kind among arguments: themselves or in lists."""
    for thing in things:  # type: ignore[attr-defined]
        if isinstance(thing, kind):
            yield thing
        elif isinstance(thing, (list, tuple)):
            yield from _of(kind, thing)


SHAPE_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"),
}
"""Operations that look at the shape and type of a tensor, not at its values."""
RANDOM_AT_TIMES = {"dropout", "feature_dropout", "alpha_dropout", "scaled_dot_product_attention"}
"""Operations that draw random numbers by an option."""
PARTS = {"split", "split_with_sizes", "unbind"}
"""Operations that cut a tensor into views of it: each part is an operation of its own."""
CHANGES = {"copy", "fill", "zero", "index_put", "set", "resize", "index_copy", "scatter"}
"""Changes in place that need more than the operation of that name on a whole tensor."""


class _Recorder(TorchDispatchMode):
    """Writes down what is done with tensors that depend on the inputs."""

    def __init__(self, inputs: Sequence[tuple[Tensor, Value]], held: set[int], known: Callable[[str], bool]):
        super().__init__()
        self.nodes: list[Node] = []
        self.values = {id(tensor): value for tensor, value in inputs}
        self.kept: list[Tensor] = [tensor for tensor, _ in inputs]  # so that no id is given twice
        self.inputs = {id(tensor) for tensor, _ in inputs}
        self.held = held  # where the network's own tensors lie
        self.stale: set[int] = set()
        self.known = known

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports the compiler, which takes 2.5 s

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = list(_of(Tensor, (*args, *kwargs.values())))
        if any(id(tensor) in self.stale for tensor in tensors):
            raise Unreadable(f"{name} reads a tensor that was changed in place through a view")
        dynamic = [tensor for tensor in tensors if id(tensor) in self.values]
        if torch.Tag.nondeterministic_seeded in func.tags and not (dynamic and name in RANDOM_AT_TIMES):
            raise Unreadable(f"{name} draws random numbers")
        if func._schema.is_mutable:
            return self._in_place(func, name, args, kwargs, dynamic)
        if not dynamic or name in SHAPE_ONLY:
            return func(*args, **kwargs)
        if not self.known(name) and func._can_decompose():
            count = len(self.nodes)
            try:
                with self:
                    return func.decompose(*args, **kwargs)
            except Unreadable as reason:
                if torch.Tag.nondeterministic_seeded in func.tags:
                    raise Unreadable(f"{name} draws random numbers") from reason
                del self.nodes[count:]  # it is one operation then
        result = func(*args, **kwargs)
        self._write(func, name, args, kwargs, result)
        return result

    def _write(self, func, name, args, kwargs, result) -> None:
        arguments = self._arguments(func, args, kwargs)
        if name in PARTS:
            self._write_parts(arguments, result)
            return
        if isinstance(result, (list, tuple)):
            raise Unreadable(f"{name} has several results")
        if not isinstance(result, Tensor):
            raise Unreadable(f"{name} gives {type(result).__name__}, which steers the network by its states")
        self._append(func, name, arguments, result)

    def _write_parts(self, arguments: dict[str, Any], parts: Sequence[Tensor]) -> None:
        whole, axis, start = arguments["self"], arguments["dim"], 0
        for part in parts:
            if part.ndim < len(whole.shape):
                self._append(aten.select.int, "select", {"self": whole, "dim": axis, "index": start}, part)
                start += 1
            else:
                end = start + part.shape[axis]
                place = {"self": whole, "dim": axis, "start": start, "end": end, "step": 1}
                self._append(aten.slice.Tensor, "slice", place, part)
                start = end

    def _append(self, function, name: str, arguments: dict[str, Any], result: Tensor) -> None:
        inputs = list(_of(Value, arguments.values()))
        live = result.is_floating_point() and name != "detach" and any(value.live for value in inputs)
        of_states = any(value.of_states for value in inputs)
        node = Node(name, function, arguments, Value(result.shape, result.dtype, of_states, live))
        self.nodes.append(node)
        self.values[id(result)] = node.output
        self.kept.append(result)

    def _in_place(self, func, name, args, kwargs, dynamic):
        """A change of a tensor, taken for the operation that gives the changed one."""
        target = args[0] if args else next(iter(kwargs.values()))
        place = target.untyped_storage().data_ptr()
        if place in self.held:
            raise Unreadable(f"{name} changes a tensor of the network")
        if not dynamic:
            return func(*args, **kwargs)
        plain = name.removesuffix("_")
        function = getattr(getattr(aten, plain, None), func._overloadname, None)
        if id(target) not in self.values or plain == name or plain in CHANGES or function is None:
            raise Unreadable(f"{name} changes a tensor in place")
        if id(target) in self.inputs:
            raise Unreadable(f"{name} changes the states in place")
        arguments = self._arguments(func, args, kwargs)
        result = func(*args, **kwargs)
        for other in self.kept:
            if other is not target and other.untyped_storage().data_ptr() == place:
                self.stale.add(id(other))
        self._append(function, plain, arguments, target)
        return result

    def _arguments(self, func, args, kwargs) -> dict[str, Any]:
        """Arguments by name, with defaults, and values in place of tensors that change."""

        def place(thing):
            if isinstance(thing, Tensor):
                return self.values.get(id(thing), thing)
            if isinstance(thing, (list, tuple)):
                return [place(each) for each in thing]
            return thing

        names = func._schema.arguments
        bound = {a.name: place(value) for a, value in zip(names, args, strict=False)}
        bound |= {name: place(value) for name, value in kwargs.items()}
        return {a.name: bound.get(a.name, a.default_value) for a in names}


def record(
    network: Callable[..., Tensor],
    modules: Sequence[nn.Module],
    x: Tensor,
    noise_level: Tensor | None,
    known: Callable[[str], bool],
) -> Trace:
    """The operations of a network at states like `x`.

    Args:
        network: Called with `x`, and with the noise level unless it is None.
        modules: Whose tensors are constants.
        x: States, (batch, *event).
        noise_level: () or (batch,), or None.
        known: Whether an operation of that name stays whole.
    Raises:
        Unreadable: If it does what cannot be written down; says which operation.
    """
    held = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    with torch.inference_mode():
        states = x.detach().clone()
        level = None if noise_level is None else noise_level.detach().clone()
        trace = Trace(
            Value(x.shape, x.dtype, True, True),
            None if level is None else Value(level.shape, level.dtype, False, False),
            Value(x.shape, x.dtype, True, True),
        )
        inputs = [(states, trace.x)]
        arguments = [states]
        if level is not None and trace.noise_level is not None:
            inputs.append((level, trace.noise_level))
            arguments.append(level)
        recorder = _Recorder(inputs, held, known)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # transformer layers operation by operation
        try:
            with recorder:
                output = network(*arguments)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    if not isinstance(output, Tensor):
        raise Unreadable(f"it gives {type(output).__name__}, not a tensor")
    found = recorder.values.get(id(output))
    if found is None or not found.live:
        raise Unreadable("its result does not depend on the states by operations that have a gradient")
    trace.output, trace.nodes = found, recorder.nodes
    return trace
