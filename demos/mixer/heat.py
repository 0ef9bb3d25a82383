"""Where each term of a recipe pushes a picture.

A term w·E moves the chains along its share of the score, -w ∂E/∂x. Drawn over the faint picture:
red where it makes pixels brighter, blue where it makes them darker.

Of a clean picture an expert that has got its way says nothing: where p(a | x) is near 1 its gradient
is near 0. Energies that know noise levels are therefore asked at one where things are still undecided.

Where states are latents, a push is shown by what it does to the picture: the decoder's change along it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.plotting import image_grid
from composable_ebm.potential.rows import Plans

from .terms import parts

UNDECIDED = 1.5  # noise level in data units: from it down glasses come and go

# The far ends and the middle of the scale: blue darker, red brighter, white not at all.
_DARKER, _BRIGHTER, _STILL = (33, 102, 172), (178, 24, 43), (247, 247, 247)
_PICTURE_PIXELS = 160
_FAINT = 0.25
_POWER = 0.7  # below 1: weak pushes show too
_SMALL = 0.05  # root mean square of the step in latents along which a decoder is looked at
_QUANTILE = 0.995  # of all pushes: beyond it the colours are full

__all__ = ["UNDECIDED", "Push", "pushes"]


class Push(NamedTuple):
    """Where one term pushes.

    Attributes:
        name: Its text, without its weight.
        picture: The push, drawn over the picture.
        strength: Root mean square of -w ∂E/∂x over the pixels, in nats per data unit.
    """

    name: str
    picture: Image.Image
    strength: float


def pushes(energy: Energy, x: Tensor) -> list[Push]:
    """Where each term pushes one picture, all on one symmetric scale of colours.

    A value and its marginal count as one term, as in `terms`. Channels are averaged, so that only
    changes of brightness show.

    Args:
        energy: A recipe of images, or of their latents.
        x: One state, (1, *event). Of chains that carry noise on purpose, the denoised picture: at
            the noisy state the push against the noise outshines everything else.
    Raises:
        ValueError: If `x` is not one state of pictures.
    """
    picture = energy.images(x.detach()) if len(x) == 1 else x
    if picture.ndim != 4 or len(picture) != 1 or picture.shape[1] not in (1, 3):
        raise ValueError(f"`x` must be one picture, (1, 1 or 3, height, width), got {tuple(x.shape)}.")
    found = parts(energy)
    states = x.detach().repeat(len(found), *[1] * (x.ndim - 1))  # a row for each part
    potential = Plans().potential_of_rows([part.whole for part in found], [1] * len(found), x)
    _, gradients = potential.at(noise_level=x.new_full((), UNDECIDED))(states)
    moves = -gradients.nan_to_num(0.0, 0.0, 0.0)
    strengths = moves.flatten(1).square().mean(1).sqrt()
    changes = moves
    if energy.codec is not None:
        steps = moves * (_SMALL / strengths.max().clamp(min=1e-12))
        changes = energy.images(x.detach() + steps) - picture
    brightness = changes.mean(1).cpu()
    scale = float(brightness.abs().flatten().quantile(_QUANTILE)) or 1.0
    behind = (picture.mean(1).cpu()[0] + 1) / 2
    return [
        Push(part.name, _overlay(behind, push / scale), float(strength))
        for part, push, strength in zip(found, brightness, strengths, strict=True)
    ]


def _overlay(behind: Tensor, push: Tensor) -> Image.Image:
    """A push (height, width) in [-1, 1] over a picture in [0, 1], as colours."""
    strength = push.clamp(-1, 1)[None]
    ends = [torch.tensor(colour)[:, None, None] / 255 for colour in (_DARKER, _BRIGHTER, _STILL)]
    ground = ends[2] * (1 - _FAINT) + _FAINT * behind.clamp(0, 1)
    end = torch.where(strength < 0, ends[0], ends[1])
    opacity = strength.abs() ** _POWER
    image = ground * (1 - opacity) + end * opacity
    scale = max(1, round(_PICTURE_PIXELS / image.shape[-1]))
    return Image.fromarray(image_grid(image[None] * 2 - 1, padding=0, scale=scale))
