"""What the page's script sends beside the recipe: pictures, as data URIs in JSON."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from composable_ebm import Energy

from . import render
from .heat import pushes
from .live import Start
from .starts import MAX_BYTES, from_upload, mask_from
from .state import clamp

MAX_LEVEL = 10.0  # of noise, at which a picture is forgotten

__all__ = ["MAX_LEVEL", "chain_of", "heat_map", "started"]


def started(text: Any, level: Any, energy: Energy) -> Start | None:
    """What chains start from: JSON {"picture": data URI, "mask": data URI or ""}, or "" for noise.

    Args:
        text: What the page sent.
        level: How much noise is put on the picture, in data units.
        energy: What is to be sampled.
    Raises:
        ValueError: If it is no such JSON, or holds no pictures.
    """
    if not text:
        return None
    sent = _read(text)
    shape = _shape(energy)
    picture = from_upload(_bytes(sent.get("picture")), shape, energy.data_range or (-1.0, 1.0))
    mask = mask_from(_bytes(sent["mask"]), shape) if sent.get("mask") else None
    return Start(picture, mask, clamp(level, 0.0, MAX_LEVEL, 2.0))


def heat_map(text: Any, energy: Energy) -> str:
    """Where each term pushes one picture, JSON {"chain": index, "picture": data URI}, as HTML.

    Raises:
        ValueError: As `started`.
    """
    sent = _read(text)
    device = next(energy.parameters()).device
    x = from_upload(_bytes(sent.get("picture")), _shape(energy), energy.data_range or (-1.0, 1.0))
    return render.heat_maps(pushes(energy, x[None].to(device)), int(clamp(sent.get("chain"), 0, 10**6, 0)))


def chain_of(text: Any) -> int | None:
    """The chosen sample, where one is chosen."""
    return int(clamp(_read(text).get("chain"), 0, 10**6, 0)) if text else None


def _shape(energy: Energy) -> tuple[int, ...]:
    if energy.event_shape is None:
        raise ValueError(f"{energy} does not know the shape of its pictures.")
    return energy.event_shape


def _read(text: Any) -> dict:
    try:
        sent = json.loads(text if len(text) <= 2 * MAX_BYTES else "")
    except (TypeError, ValueError, RecursionError):
        sent = None
    if not isinstance(sent, dict):
        raise ValueError("The page sent a picture that cannot be read; choose it again.")
    return sent


def _bytes(uri: Any) -> bytes:
    """The bytes of a data URI."""
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except (AttributeError, binascii.Error, ValueError) as error:
        raise ValueError("The page sent a picture that cannot be read; choose it again.") from error
