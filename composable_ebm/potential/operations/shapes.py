"""Operations that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.potential.operations.rule import Pullback, Rule, Step, one
from composable_ebm.potential.trace import Value

__all__ = ["RULES"]

aten = torch.ops.aten


def reshaped(self: Value, shape: Sequence[int]) -> Step:
    """To the shape of a tensor as it was traced."""
    before, after = tuple(self.shape), tuple(shape)
    channels_last = len(before) == 4

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        kept = channels_last and x.is_contiguous(memory_format=torch.channels_last)

        def pull(g: Tensor) -> Tensor:
            g = g.reshape(before)
            return g.contiguous(memory_format=torch.channels_last) if kept else g

        return x.reshape(after), pull

    return step


def _view(self: Value, size: Sequence[int]) -> Step:
    return reshaped(self, torch.empty(self.shape, device="meta").reshape(size).shape)


def _like(function: Callable[..., Tensor]) -> Rule:
    """A reshape whose target is what `function` makes of the shape."""

    def rule(self: Value, **options: Any) -> Step:
        return reshaped(self, function(torch.empty(self.shape, device="meta"), **options).shape)

    return rule


def _squeeze(self: Value, dim: int | Sequence[int] | None = None) -> Step:
    x = torch.empty(self.shape, device="meta")
    return reshaped(self, (x.squeeze() if dim is None else x.squeeze(dim)).shape)  # type: ignore[arg-type]


def _permute(self: Value, dims: Sequence[int]) -> Step:
    there = [dim % len(dims) for dim in dims]
    back = [there.index(axis) for axis in range(len(there))]
    return one(lambda x: x.permute(there), lambda g, x, y: g.permute(back))


def _transpose(self: Value, dim0: int = -1, dim1: int = -2) -> Step:
    if len(self.shape) < 2:
        return same(self)
    return one(lambda x: x.transpose(dim0, dim1), lambda g, x, y: g.transpose(dim0, dim1))


def same(self: Value, **options: object) -> Step:
    """Copies and whatever else gives the numbers it gets."""
    return lambda x: (x, lambda g: g)


def _slice(
    self: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Step:
    axis = dim % len(self.shape)
    place = (slice(None),) * axis + (slice(start, end, step),)
    return _part(place)


def _part(place: Any) -> Step:
    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        whole = torch.zeros_like(x)
        whole[place] = g
        return whole

    return one(lambda x: x[place], backward)


def _select(self: Value, dim: int, index: int) -> Step:
    if self.shape[dim] == 1:
        return reshaped(self, torch.empty(self.shape, device="meta").select(dim, index).shape)
    return _part((slice(None),) * (dim % len(self.shape)) + (index,))


def _concatenate(tensors: Sequence[Any], dim: int = 0) -> Step:
    sizes = [each.shape[dim] for each in tensors]
    return _joined(tensors, lambda parts: torch.cat(parts, dim), lambda g: g.split(sizes, dim))


def _stack(tensors: Sequence[Any], dim: int = 0) -> Step:
    return _joined(tensors, lambda parts: torch.stack(parts, dim), lambda g: g.unbind(dim))


def _joined(
    tensors: Sequence[Any],
    join: Callable[[list[Tensor]], Tensor],
    cut: Callable[[Tensor], Sequence[Tensor]],
) -> Step:
    changing = [isinstance(each, Value) for each in tensors]

    def step(*inputs: Tensor) -> tuple[Tensor, Pullback]:
        given = iter(inputs)
        parts = [next(given) if changes else each for each, changes in zip(tensors, changing, strict=True)]

        def pull(g: Tensor) -> Any:
            kept = tuple(piece for piece, changes in zip(cut(g), changing, strict=True) if changes)
            return kept if len(kept) > 1 else kept[0]

        return join(parts), pull

    return step


def _pixel_unshuffle(self: Value, downscale_factor: int) -> Step:
    """Channels last without a further copy, where `F.pixel_unshuffle` is channels first."""
    block = downscale_factor
    if len(self.shape) != 4:
        raise NotImplementedError
    batch, channels, height, width = self.shape
    rows, columns = height // block, width // block

    def forward(x: Tensor) -> Tensor:
        x = x.reshape(batch, channels, rows, block, columns, block).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, rows, columns, channels * block**2).permute(0, 3, 1, 2)

    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = g.permute(0, 2, 3, 1).reshape(batch, rows, columns, channels, block, block)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)

    return one(forward, backward)


def _unfold(
    self: Value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Step:
    options = (list(kernel_size), list(dilation), list(padding), list(stride))
    side = list(self.shape[-2:])

    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return aten.col2im(g, side, *options)

    if set(dilation) != {1}:
        return one(lambda x: aten.im2col(x, *options), backward)
    (high, wide), (down, across), (above, left) = kernel_size, stride, padding

    def forward(x: Tensor) -> Tensor:
        # Windows side by side in memory, as the layer that looks at each reads them: one copy of a view.
        views = F.pad(x, (left, left, above, above)).unfold(2, high, down).unfold(3, wide, across)
        return views.permute(0, 2, 3, 1, 4, 5).reshape(len(x), -1, x.shape[1] * high * wide).mT

    return one(forward, backward)


RULES: dict[str, Rule] = {
    "view": _view,
    "_unsafe_view": _view,
    "reshape": lambda self, shape: _view(self, shape),
    "unsqueeze": _like(lambda x, dim: x.unsqueeze(dim)),
    "squeeze": _squeeze,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "clone": same,
    "alias": same,
    "slice": _slice,
    "select": _select,
    "cat": _concatenate,
    "stack": _stack,
    "pixel_unshuffle": _pixel_unshuffle,
    "im2col": _unfold,
}
