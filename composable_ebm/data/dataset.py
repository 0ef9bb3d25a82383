"""Images and what is known about them, held in memory.

A data set of n images has attributes, each with a few named values: `digit` is one of "0" to "9",
`thick` is "thin" or "thick". A label is the position of the value, or -1 where an image has none:
an expert of an attribute learns from the images that have a label for it, the base from all.
"""

import difflib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

UNLABELLED = -1

BETWEEN = "between"
"""Name of the value of what lies between two, see `LabelledImages.with_between`."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images as bytes, with any number of partly known attributes.

    Bytes keep a data set four times smaller than floats, so that it fits on the device and an
    index is all that a training step needs; `batch` gives the floats.

    Args:
        images: Bytes (uint8), shape (n, channels, height, width).
        labels: For each attribute an int64 tensor of shape (n,): a position in its values, or
            -1 where the image has no label.
        values: For each attribute the names of its values, in the order of the labels.
        name: What to call the data set in messages, such as "digits/train".
        notes: What was skipped or changed when it was read, in sentences.
    Raises:
        TypeError: If a tensor has the wrong type.
        ValueError: If shapes, attributes or labels do not fit together.
    Example:
        >>> train = digits.load("train")
        >>> thick = train.where("thick")  # those that are clearly thin or thick
        >>> x = thick.batch(torch.arange(64))  # (64, 1, 28, 28) in [-1, 1]
    """

    images: Tensor
    labels: dict[str, Tensor]
    values: dict[str, tuple[str, ...]]
    name: str
    notes: tuple[str, ...] = ()

    dtype: ClassVar[torch.dtype] = torch.uint8

    def __post_init__(self) -> None:
        if self.images.dtype != self.dtype:
            raise TypeError(
                f"`images` of {self.name!r} must be {self._kind}, got {self.images.dtype}. "
                "For floats in [-1, 1]: ((x + 1) * 127.5).round().clamp(0, 255).byte()."
            )
        if self.images.ndim != 4:
            raise ValueError(
                f"`images` of {self.name!r} must have shape (n, channels, height, width), "
                f"got {tuple(self.images.shape)}."
            )
        if self.labels.keys() != self.values.keys():
            raise ValueError(
                f"`labels` and `values` of {self.name!r} must name the same attributes, "
                f"got {sorted(self.labels)} and {sorted(self.values)}."
            )
        for attribute in self.labels:
            self._check_labels(attribute)

    _kind: ClassVar[str] = "bytes (uint8)"

    def _check_labels(self, attribute: str) -> None:
        labels, values = self.labels[attribute], self.values[attribute]
        where = f"`labels[{attribute!r}]` of {self.name!r}"
        if labels.dtype != torch.int64:
            raise TypeError(f"{where} must be int64, got {labels.dtype}: use labels.long().")
        if labels.shape != (len(self),):
            raise ValueError(
                f"{where} must have shape ({len(self)},), one label an image, got {tuple(labels.shape)}."
            )
        if labels.device != self.images.device:
            raise ValueError(f"{where} must be on {self.images.device} like the images, got {labels.device}.")
        if len(set(values)) != len(values):
            raise ValueError(f"`values[{attribute!r}]` of {self.name!r} repeats a name: {values}.")
        if len(self) and not -1 <= int(labels.min()) <= int(labels.max()) < len(values):
            raise ValueError(
                f"{where} must lie between -1 (unlabelled) and {len(values) - 1} ({values[-1]!r}), "
                f"got {int(labels.min())} to {int(labels.max())}."
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    def __repr__(self) -> str:
        return f"LabelledImages({self.name!r}, {len(self)} of {self.event_shape}: {self.values})"

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one image, (channels, height, width)."""
        return tuple(self.images.shape[1:])

    def attribute(self, name: str) -> tuple[str, ...]:
        """The names of an attribute's values, in the order of its labels.

        Raises:
            ValueError: If there is no such attribute; the message lists the near ones.
        """
        if name not in self.values:
            raise ValueError(unknown_name(f"attribute of {self.name!r}", name, self.values))
        return self.values[name]

    def batch(self, index: Tensor) -> Tensor:
        """Images as floats.

        Args:
            index: Positions (int64) of shape (batch,), on the images' device or the CPU.
        Returns:
            Images in [-1, 1], shape (batch, channels, height, width).
        """
        return self.images[index].float() / 127.5 - 1

    def select(self, index: Tensor) -> "LabelledImages":
        """The images at the given positions.

        Args:
            index: Positions (int64) of any number, or a mask (bool) of shape (n,).
        Raises:
            ValueError: If a mask does not have one element an image.
        """
        if index.dtype == torch.bool and index.shape != (len(self),):
            raise ValueError(
                f"a mask for {self.name!r} must have shape ({len(self)},), got {tuple(index.shape)}."
            )
        labels = {attribute: label[index] for attribute, label in self.labels.items()}
        return replace(self, images=self.images[index], labels=labels)

    def where(self, attribute: str) -> "LabelledImages":
        """The images that have a label for an attribute."""
        self.attribute(attribute)
        return self.select(self.labels[attribute] != UNLABELLED)

    def with_between(self, attribute: str) -> "LabelledImages":
        """The same images with one value more, "between", which those without a label have.

        Where two values are the ends of a measure, a probability of either is one only if what lies
        between them has its own.
        """
        values = self.attribute(attribute)
        labels = self.labels[attribute]
        labels = torch.where(labels == UNLABELLED, len(values), labels)
        return replace(
            self,
            labels={**self.labels, attribute: labels},
            values={**self.values, attribute: (*values, BETWEEN)},
        )

    def jointly(self, attributes: str) -> "LabelledImages":
        """The same images with one attribute more, whose values are combinations of several.

        Args:
            attributes: Names joined by "+", each with at most ten values.
        Returns:
            Images with an attribute of that name: its values are the labels written one after the
            other, "00", "01", ...; images that lack one of the labels have none.
        Raises:
            ValueError: If an attribute is unknown or has more than ten values.
        Example:
            >>> faces.jointly("smile+glasses").values["smile+glasses"]
            ('00', '01', '10', '11')
        """
        names = attributes.split("+")
        counts = [len(self.attribute(name)) for name in names]
        if max(counts) > 10:
            raise ValueError(f"an attribute of {attributes!r} has more than ten values: {counts}.")
        label = torch.zeros_like(self.labels[names[0]])
        known = torch.ones_like(label, dtype=torch.bool)
        for name, count in zip(names, counts, strict=True):
            label = label * count + self.labels[name]
            known &= self.labels[name] != UNLABELLED
        values = tuple("".join(map(str, digits)) for digits in itertools.product(*map(range, counts)))
        return replace(
            self,
            labels={**self.labels, attributes: torch.where(known, label, UNLABELLED)},
            values={**self.values, attributes: values},
        )

    def to(self, device: torch.device | str) -> "LabelledImages":
        """The same data set with its tensors on another device."""
        labels = {attribute: label.to(device) for attribute, label in self.labels.items()}
        return replace(self, images=self.images.to(device), labels=labels)


@dataclass(frozen=True, eq=False)
class LabelledLatents(LabelledImages):
    """Latents of images in 16 bits, with their labels: what experts of a latent space learn from.

    Args:
        images: Latents (float16), shape (n, channels, height, width).
    """

    dtype: ClassVar[torch.dtype] = torch.float16
    _kind: ClassVar[str] = "latents (float16)"

    def batch(self, index: Tensor) -> Tensor:
        """Latents as floats, (batch, channels, height, width)."""
        return self.images[index].float()


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that nobody knows, with the near ones.

    Example:
        >>> unknown_name("split", "tarin", ["train", "test"])
        "unknown split 'tarin'; did you mean 'train'? There are: train, test."
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {kind} {name!r}{hint} There are: {', '.join(known) or 'none'}."
