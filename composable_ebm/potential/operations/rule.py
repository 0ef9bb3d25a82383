"""What a rule is, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from composable_ebm.energy.gradient import pulled_back
from composable_ebm.potential.trace import Node, Value

__all__ = ["Pullback", "Rule", "Step", "axes_of", "by_autograd", "fitted", "once", "one", "sharing", "sides"]

Pullback = Callable[[Tensor], Any]
"""The cotangent of the result -> that of the input, or a tuple of those of several inputs."""
Step = Callable[..., tuple[Tensor, Pullback]]
Rule = Callable[..., Step]


_shared: ContextVar[dict[Hashable, Any] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing(store: dict[Hashable, Any]) -> Iterator[None]:
    """Rules that copy weights into other layouts find there what was copied before."""
    token = _shared.set(store)
    try:
        yield
    finally:
        _shared.reset(token)


def once(kind: Hashable, tensors: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
    """What `make` makes of some constants, made once where programs share; the constants are kept with it."""
    store = _shared.get()
    if store is None:
        return make()
    places = (None if t is None else (t.data_ptr(), t.shape, t.stride()) for t in tensors)
    key = (kind, *places)
    if key not in store:
        store[key] = (make(), tensors)
    return store[key][0]


def fitted(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The cotangent of what was broadcast to the shape of `gradient`."""
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def one(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """A step of one input; `backward` takes the cotangent, the input and the output."""

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        y = forward(x)
        return y, lambda g: backward(g, x, y)

    return step


def sides(self: object, other: object, both: Callable[[Any, Any], tuple[Tensor, Pullback]]) -> Step:
    """A step of an operation of two sides, of which one may be constant.

    `both` gives the result and pulls back to both sides, None where it cannot.
    """
    if isinstance(self, Value) and isinstance(other, Value):
        return both

    first = isinstance(self, Value)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        y, pull = both(x, other) if first else both(self, x)
        return y, lambda g: pull(g)[0 if first else 1]

    return step


def by_autograd(node: Node) -> Step:
    """An operation without a rule: autograd through it alone, which takes some 20 us longer than by hand."""
    live = [value.live for value in node.inputs]
    node = replace(node, arguments={name: _ordinary(each) for name, each in node.arguments.items()})

    def step(*inputs: Tensor) -> tuple[Tensor, Pullback]:
        with torch.enable_grad():
            given = [x.detach().requires_grad_(own) for x, own in zip(inputs, live, strict=True)]
            y = node(*given)

        def pull(g: Tensor) -> Any:
            found = pulled_back(g, y, given) if y.requires_grad else [None] * len(given)
            parts = [
                torch.zeros_like(x) if part is None and own else part
                for x, part, own in zip(given, found, live, strict=True)
            ]
            return parts if len(parts) > 1 else parts[0]

        return y.detach(), pull

    return step


def _ordinary(thing: Any) -> Any:
    """Constants that were computed while the network was read, as tensors that autograd takes."""
    if isinstance(thing, list):
        return [_ordinary(each) for each in thing]
    return thing.clone() if isinstance(thing, Tensor) and thing.is_inference() else thing


def axes_of(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    """Axes counted from the front; all for None or an empty list."""
    if dim is None or dim == []:
        return list(range(ndim))
    return [axis % ndim for axis in ([dim] if isinstance(dim, int) else dim)]
