"""Images as the states that an expert describes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_images", "as_states", "rescaled"]


def rescaled(images: Tensor, data_range: tuple[float, float] | None) -> Tensor:
    """Images in [-1, 1] on another range; as they are where there is none."""
    low, high = data_range or (-1.0, 1.0)
    return images if (low, high) == (-1.0, 1.0) else low + (high - low) * (images + 1) / 2


def as_states(
    images: Tensor, data_range: tuple[float, float] | None, binary: bool, generator: torch.Generator
) -> Tensor:
    """Images in [-1, 1] on the range of an expert; for bits, grey levels are the odds of white.

    Drawing the bits anew each time keeps what the grey levels say, and is the usual reading of grey
    images as probabilities.

    Args:
        images: In [-1, 1], (batch, *event).
        data_range: Smallest and largest value of the expert's data; None where unbounded.
        binary: Whether its states are bits.
        generator: Draws the bits, on the device of the images.
    Reference:
        Salakhutdinov and Murray (2008), On the quantitative analysis of deep belief networks,
        section 6, for binarised MNIST.
    """
    if not binary:
        return rescaled(images, data_range)
    if images.device.type == "cpu" and bool((images.abs() == 1).all()):
        return (images + 1) / 2  # black or white for certain; a CPU can look without waiting
    u = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    # Compared as they are: a third of the time of torch.bernoulli on a CPU.
    return torch.lt(u.mul_(2).sub_(1), images, out=u)


def as_images(states: Tensor, data_range: tuple[float, float] | None) -> Tensor:
    """States of an expert as images in [-1, 1]."""
    low, high = data_range or (-1.0, 1.0)
    return (states - low) / (high - low) * 2 - 1
