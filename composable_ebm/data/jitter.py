"""Copies of pictures, shifted and zoomed a little: few pictures teach more so than by being seen again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.data.dataset import LabelledImages

MOST = 7  # copies of a picture
SHIFT = 0.06  # of a picture's side, either way
ZOOM = (0.95, 1.15)
CHUNK = 512

__all__ = ["mirrored", "with_jitter"]


def mirrored(data: LabelledImages) -> LabelledImages:
    """The pictures and their mirror images, with the same labels."""
    labels = {name: label.repeat(2) for name, label in data.labels.items()}
    return replace(data, images=torch.cat([data.images, data.images.flip(-1)]), labels=labels)


def with_jitter(data: LabelledImages, wanted: int) -> LabelledImages:
    """The pictures and copies of each, shifted by up to 6 % of their side and zoomed by -5 to 15 %.

    What a copy lacks at its edges goes on as its border does. Labels are those of the picture. For pictures
    in which things lie anywhere: where they have their place, such copies blur it.

    Args:
        data: Pictures.
        wanted: How many there should be with the copies; no picture gets more than 7.
    Example:
        >>> len(with_jitter(photos, 20_000))  # of 2,500 pictures
        20000
    """
    each = min(MOST, round(wanted / max(len(data), 1)) - 1)
    if each < 1:
        return data
    generator = torch.Generator().manual_seed(0)
    copies = [_copy(data.images, generator) for _ in range(each)]
    labels = {name: label.repeat(each + 1) for name, label in data.labels.items()}
    return replace(data, images=torch.cat([data.images, *copies]), labels=labels)


def _copy(images: Tensor, generator: torch.Generator) -> Tensor:
    """One copy of each picture (n, channels, height, width), as bytes."""
    n = len(images)
    low, high = ZOOM
    scale = 1 / (low + (high - low) * torch.rand(n, generator=generator))
    shift = 2 * SHIFT * (2 * torch.rand(n, 2, generator=generator) - 1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale, scale, shift
    parts = []
    for some, where in zip(images.split(CHUNK), theta.split(CHUNK), strict=True):
        grid = F.affine_grid(where, list(some.shape), align_corners=False)
        moved = F.grid_sample(some.cpu().float(), grid, padding_mode="border", align_corners=False)
        parts.append(moved.round().clamp(0, 255).byte())
    return torch.cat(parts).to(images.device)
