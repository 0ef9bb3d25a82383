"""Pictures that are copies of held-out ones: learned from, they would let a memory pass for knowledge."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from composable_ebm.data.dataset import LabelledImages

COARSE = 8  # pixels a side, at which pictures are compared first
NEAR = 8 / 255  # root of the mean squared difference of two copies, which may have been compressed
SPREAD = 0.1  # of the pictures' own standard deviation, where that is less
MOST = 0.5  # of the pictures to learn from, that are left out
CHUNK = 2048

__all__ = ["copies", "without_copies"]


def copies(train: Tensor, held_out: Tensor) -> Tensor:
    """Which pictures are like a held-out one, or like its mirror image, to within compression.

    Args:
        train: Bytes, shape (n, channels, height, width).
        held_out: Bytes, (m, channels, height, width).
    Returns:
        Booleans, (n,).
    """
    both = torch.cat([held_out, held_out.flip(-1)])
    mine, theirs = _coarse(train), _coarse(both)
    near = min(NEAR, SPREAD * float(mine.std()) if len(mine) > 1 else NEAR)
    found = torch.zeros(len(train), dtype=torch.bool)
    for index in torch.arange(len(train)).split(CHUNK):
        distance, place = torch.cdist(mine[index], theirs).min(1)
        some = index[distance <= near * mine.shape[1] ** 0.5]
        other = both[place[distance <= near * mine.shape[1] ** 0.5]].float()
        apart = (train[some].float() - other).div(255).square().flatten(1).mean(1).sqrt()
        found[some[apart <= near]] = True
    return found


def without_copies(train: LabelledImages, held_out: LabelledImages) -> LabelledImages:
    """The pictures to learn from without those that are copies of held-out ones, and a note of it.

    Where most are, or a value would have none left, they stay and the note says what that means.
    """
    copied = copies(train.images, held_out.images)
    count = int(copied.sum())
    if not count:
        return train
    kept = train.select(~copied)
    gone = [
        name
        for name, labels in train.labels.items()
        if len(labels.unique()) > len(kept.labels[name].unique())
    ]
    if count > MOST * len(train) or gone:
        note = (
            f"{count} pictures are copies or mirror images of held-out ones: held-out figures say more good "
            "of the expert than they should"
        )
        return replace(train, notes=(*train.notes, note))
    note = f"{count} pictures were left out, for they are copies or mirror images of held-out ones"
    return replace(kept, notes=(*train.notes, note))


def _coarse(images: Tensor) -> Tensor:
    """Small pictures in [0, 1] as rows."""
    parts = [adaptive_avg_pool2d(part.float() / 255, COARSE).flatten(1) for part in images.split(CHUNK)]
    return torch.cat(parts)
