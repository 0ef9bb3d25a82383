"""Showing states to networks that expect pictures of their own size, range and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.data.ranges import as_images
from composable_ebm.energy.space import Codec

__all__ = ["Normalisation", "Shown", "shown_to"]


@dataclass(frozen=True)
class Normalisation:
    """How a network wants its pictures: (p - mean)/std for p in [0, 1], at a size.

    Args:
        mean: For each channel.
        std: For each channel, positive.
        size: (height, width) that pictures are resized to; None takes them as they come.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(
                f"`mean` and positive `std` are given for each channel, got {self.mean} and {self.std}."
            )

    @classmethod
    def of(cls, source: Any) -> Self:
        """As told by a pair (mean, std), or by what comes with a pretrained network.

        Args:
            source: A `Normalisation`; (mean, std); `weights.transforms()` of `torchvision`; a model of
                `timm`, or its `pretrained_cfg`; an image processor of `transformers`.
        Raises:
            TypeError: If it tells of no normalisation.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, (tuple, list)) and len(source) == 2:
            return cls(*(tuple(map(float, part)) for part in source))  # type: ignore[arg-type]
        source = getattr(source, "image_processor", source)
        source = getattr(source, "pretrained_cfg", source)

        def told(*names: str) -> Any:
            get = source.get if isinstance(source, dict) else lambda name: getattr(source, name, None)
            return next((value for name in names if (value := get(name)) is not None), None)

        mean, std = told("mean", "image_mean"), told("std", "image_std")
        if mean is None or std is None:
            raise TypeError(
                "`normalise` must be (mean, std), torchvision's weights.transforms(), a model of timm or an "
                f"image processor of transformers, got {type(source).__name__}."
            )
        size = told("crop_size", "input_size", "size")
        return cls(tuple(map(float, mean)), tuple(map(float, std)), _pair(size))


class Shown(nn.Module):
    """A network of pictures as one of states.

    Args:
        model: Takes pictures as `how` says.
        how: Size and normalisation.
        data_range: Of the states, black and white of a picture; [-1, 1] where None.
        codec: Decodes states that are latents.
    """

    def __init__(
        self,
        model: nn.Module,
        how: Normalisation,
        data_range: tuple[float, float] | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.how = how
        self.data_range = data_range
        object.__setattr__(self, "codec", codec)  # held, not owned

    codec: Codec | None

    def forward(self, x: Tensor, *others: Tensor | None) -> Tensor:
        images = as_images(x, self.data_range) if self.codec is None else self.codec.decode(x)
        pictures = (images + 1) / 2
        if self.how.size is not None and tuple(pictures.shape[-2:]) != self.how.size:
            pictures = F.interpolate(pictures, self.how.size, mode="bicubic", antialias=True)
        shape = (1, -1, *[1] * (pictures.ndim - 2))
        mean, std = (pictures.new_tensor(part).reshape(shape) for part in (self.how.mean, self.how.std))
        return self.model((pictures - mean) / std, *others)


_kept: WeakValueDictionary[tuple, Shown] = WeakValueDictionary()


def shown_to(
    model: nn.Module,
    how: Normalisation,
    data_range: tuple[float, float] | None = None,
    codec: Codec | None = None,
) -> Shown:
    """The same `Shown` for the same arguments while it is in use, so that labels share a forward pass."""
    key = (id(model), how, data_range, None if codec is None else codec.key)
    found = _kept.get(key)
    if found is None:
        _kept[key] = found = Shown(model, how, data_range, codec)
    return found


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, dict):
        size = [size[name] for name in ("height", "width") if name in size] or [size["shortest_edge"]]
    if isinstance(size, int):
        size = [size]
    numbers: Sequence[int] = [int(number) for number in size][-2:]
    return (numbers[0], numbers[-1])
