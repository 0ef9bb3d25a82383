"""Bars and stripes: the smallest images with something to learn that single pixels do not tell."""

import torch
from torch import Tensor

__all__ = ["bars_and_stripes"]


def bars_and_stripes(side: int = 3) -> Tensor:
    """All images whose columns are each all on or all off (bars), or whose rows are (stripes).

    Each once: 2^(side+1) - 2 images, as the blank and the full one are both.

    Args:
        side: Height and width in pixels.
    Returns:
        Bits, (2^(side+1) - 2, 1, side, side).
    Reference:
        MacKay (2003), Information theory, inference, and learning algorithms, section 43.3;
        Hinton and Sejnowski (1986), the shifter and line problems.
    """
    lines = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * side).reshape(-1, side)
    columns = lines[:, None, :].expand(-1, side, -1)
    both = torch.cat([columns, columns.mT])
    return both.flatten(1).unique(dim=0).reshape(-1, 1, side, side)
