"""Images and operations as convolutions.c knows them, and their places in working memory."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence

__all__ = [
    *("ACTIVATION", "BLOCK", "CONCATENATION", "CONVOLUTION", "MIXING", "NORMALISATION", "POOLING", "SCALING"),
    *("SUM", "UPSAMPLING", "Image", "Operation", "Unfit", "lay_out"),
]

BLOCK = 16
CONVOLUTION, ACTIVATION, SUM, NORMALISATION, POOLING, CONCATENATION, UPSAMPLING, SCALING, MIXING = range(9)
TWO = (SUM, CONCATENATION)


class Image(ctypes.Structure):
    """As `Image` in images.h."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("height", "width", "channels", "border", "gradient_border", "at", "gradient_at")
    )


class Operation(ctypes.Structure):
    """As `Operation` in images.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("kind", "first", "second", "out", "adds")),
        *((name, ctypes.c_int) for name in ("kernel_height", "kernel_width", "stride", "padding")),
        *((name, ctypes.c_int) for name in ("weight", "backward_weight", "bias", "by_tiles", "thin", "kept")),
        *((name, ctypes.c_int) for name in ("function", "groups", "real")),
        ("number", ctypes.c_float),
    )


class Unfit(Exception):
    """Images and operations that look as if C could do them, and do not fit."""


def lay_out(
    images: Sequence[Image],
    operations: Sequence[Operation],
    paddings: Mapping[int, int],
    shared: Mapping[int, int],
) -> tuple[int, int]:
    """Gives images and operations their places, and says which gradients have parts already.

    Args:
        images: All images, the one that comes in first.
        operations: In the order in which they run forward.
        paddings: Of the images that convolutions read, by number.
        shared: Flat images, and whose place they share.
    Returns:
        How many floats are kept until the way back, and how many are not.
    """
    users = Counter(read for operation in operations for read in _reads(operation))
    producers = {operation.out: operation for operation in operations}
    for number, image in enumerate(images):
        image.border = paddings.get(number, 0)
        producer = producers.get(number)
        if producer is not None and producer.kind == CONVOLUTION and not producer.thin:
            sides = (producer.kernel_height, producer.kernel_width)
            image.gradient_border = max((side - 1) // producer.stride + (side > 1) for side in sides)
    if any(images[i].border or images[i].gradient_border for i in shared.values()):
        raise Unfit
    kept = 0
    over: set[int] = set()  # images whose values are overwritten with slopes
    for operation in operations:
        number = operation.first
        image = images[number]
        area = image.height * image.width * image.channels
        if operation.kind in (ACTIVATION, NORMALISATION):
            operation.kept = kept
            kept += _up(area + (image.channels if operation.kind == NORMALISATION else 0))
            lonely = users[number] == 1 and number not in (0, *shared, *shared.values())
            if operation.kind == ACTIVATION and lonely and not image.border:
                image.at = operation.kept
                over.add(number)
    written: set[int] = set()
    for operation in reversed(operations):
        for bit, read in enumerate(_reads(operation)):
            whole = shared.get(read, read)
            operation.adds |= (whole in written) << bit
            written.add(whole)
    return kept, _place_the_rest(images, operations, shared, over, kept) - kept + BLOCK


def _place_the_rest(
    images: Sequence[Image],
    operations: Sequence[Operation],
    shared: Mapping[int, int],
    over: Container[int],
    start: int,
) -> int:
    """Places of what nobody needs on the way back, and of gradients: used again by what comes later.

    Times are those of the operations forward, 0 to n - 1, and back, n to 2n - 1. Returns where they end.
    """
    n = len(operations)
    spans: list[tuple[int, int, int, Callable[[int], None]]] = []  # from, until, size, and who is told

    def reserve(thing: Image | Operation, name: str, start: int, end: int, size: int) -> None:
        spans.append((start, end, size, lambda place: setattr(thing, name, place)))

    made = {shared.get(o.out, o.out): k for k, o in enumerate(operations)}
    readers: dict[int, list[int]] = {}
    for k, operation in enumerate(operations):
        for read in _reads(operation):
            readers.setdefault(shared.get(read, read), []).append(k)
        if operation.thin:
            image = images[operation.first]
            planes = images[operation.out].channels * _planes(operation, image)
            reserve(operation, "thin", 2 * n - 1 - k, 2 * n - 1 - k, planes)
    for number, image in enumerate(images):
        if number in shared:
            continue
        first, last = made.get(number, 0), max(readers.get(number, [n]))
        sizes = [
            (image.height + 2 * border) * (image.width + 2 * border) * image.channels
            for border in (image.border, image.gradient_border)
        ]
        if number not in over:
            reserve(image, "at", first, last, sizes[0])
        back = max(n, 2 * n - 1 - last)
        reserve(image, "gradient_at", back, 2 * n - 1 - first if number else 2 * n, sizes[1])
    end = _packed(spans, start)
    for flat, source in shared.items():
        images[flat].at = images[source].at
        images[flat].gradient_at = images[source].gradient_at
    return end


def _reads(operation: Operation) -> tuple[int, ...]:
    return (operation.first, operation.second) if operation.kind in TWO else (operation.first,)


def _packed(spans: list[tuple[int, int, int, Callable[[int], None]]], start: int) -> int:
    """Gives every span of time a place that no other has meanwhile, the largest first; returns the end."""
    placed: list[tuple[int, int, int, int]] = []  # from, until, place, end
    for begin, end, size, tell in sorted(spans, key=lambda span: -span[2]):
        size = _up(size)
        place = start
        for _, _, low, high in sorted(
            (p for p in placed if p[0] <= end and begin <= p[1]), key=lambda p: p[2]
        ):
            if place + size <= low:
                break
            place = max(place, high)
        placed.append((begin, end, place, place + size))
        tell(place)
    return max((p[3] for p in placed), default=start)


def _planes(operation: Operation, image: Image) -> int:
    """Floats of a channel in planes, as `planes_of` in products.h has it, and some to spare."""
    s, border = operation.stride, operation.padding
    sides = []
    for side, kernel in ((image.height, operation.kernel_height), (image.width, operation.kernel_width)):
        low = -((kernel - 1 - border) // s)
        sides.append(-(-side // s) + (s - 1 + border) // s - low + 1)
    return sides[0] * sides[1] + 2 * BLOCK


def _up(size: int) -> int:
    """Rounded up, so that what comes next starts on a cache line."""
    return -(-size // BLOCK) * BLOCK
