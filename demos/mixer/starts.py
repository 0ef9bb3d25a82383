"""What chains may start from other than noise: an uploaded picture, or one of the data; and the mask
that says which part of it may change.

Uploads come from anyone. A picture is judged by its header before a pixel of it is decoded, nothing
is written to a file, and whatever is wrong with it is a ValueError that says so.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from composable_ebm import Energy
from composable_ebm.data import DATASETS, LabelledImages, load_data

from .live import STIR, Start
from .mix import clamp
from .pictures import from_uri

MAX_BYTES = 20 * 10**6
MAX_PIXELS = 20 * 10**6
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SPLIT = "test"  # which no expert has seen
PAINTED = 0.25  # of a pixel, from which on it may change

MAX_LEVEL = 10.0  # of noise, at which a picture is forgotten
MAX_PICTURES = 64

_MODES = {1: "L", 3: "RGB"}

# Data sets that draw their pictures need not draw many.
_FEW: dict[str, dict[str, Any]] = {"faces": {"num_images": 256}, "shapes": {"num_images": 256}}

__all__ = ["MAX_LEVEL", "from_data", "from_upload", "image_shape", "mask_from", "started", "state_of"]


def started(sent: Any, energy: Energy, num_chains: int) -> Start | None:
    """What chains start from, as the page sends it; None for noise.

    Args:
        sent: {"pictures": data URIs, one or one a chain, "mask": data URI or "", "level": noise in data
            units, "keep": chains that stay as they are}.
        energy: What is to be sampled.
        num_chains: How many chains.
    Raises:
        ValueError: If it is nothing like it, or holds no pictures.
    """
    if not sent:
        return None
    try:
        uris, keep = list(sent["pictures"])[:MAX_PICTURES], [int(i) for i in sent.get("keep") or ()]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError("The page sent a picture that cannot be read; choose it again.") from error
    if not uris:
        return None
    states = torch.cat([state_of(from_uri(uri), energy)[None] for uri in uris])
    picture = states[0] if len(states) == 1 else states[torch.arange(num_chains) % len(states)]
    mask = None
    if keep:
        mask = torch.ones(num_chains, 1, 1, 1)
        mask[[i for i in keep if 0 <= i < num_chains]] = 0
    elif sent.get("mask"):
        mask = mask_from(from_uri(sent["mask"]), image_shape(energy))
        mask = mask if energy.codec is None else energy.codec.encode_mask(mask)
    return Start(picture, mask, clamp(sent.get("level"), 0.0, MAX_LEVEL, STIR))


def state_of(data: bytes, energy: Energy) -> Tensor:
    """A picture's file as a state of an energy: encoded, where its states are latents."""
    data_range = (-1.0, 1.0) if energy.codec is not None else energy.data_range or (-1.0, 1.0)
    return energy.states(from_upload(data, image_shape(energy), data_range)[None])[0]


def image_shape(energy: Energy) -> tuple[int, ...]:
    """The shape of an energy's pictures, (channels, height, width).

    Raises:
        ValueError: If it does not know.
    """
    shape = energy.codec.image_shape if energy.codec is not None else energy.event_shape
    if shape is None:
        raise ValueError(f"{energy} does not know the shape of its pictures.")
    return tuple(shape)


def from_upload(
    data: bytes, event_shape: Sequence[int], data_range: tuple[float, float] = (-1.0, 1.0)
) -> Tensor:
    """An uploaded picture as a state: upright, the middle of it, resized.

    Args:
        data: The bytes of a file: PNG, JPEG, WebP, GIF or BMP.
        event_shape: Shape of the states, (1 or 3, height, width).
        data_range: Black and white of the states.
    Returns:
        One state, of shape `event_shape`.
    Raises:
        ValueError: If it is no such picture, is animated, or is larger than 20 MB or 20 megapixels.
    """
    channels, height, width = _image_shape(event_shape)
    image = _opened(data)
    try:
        image.draft(_MODES[channels], (2 * width, 2 * height))  # a JPEG is decoded no larger than needed
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert(_MODES[channels]), (width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"This picture is damaged: {error}") from error
    low, high = data_range
    return _unit(image) * (high - low) + low


def from_data(family: str, index: int, event_shape: Sequence[int] | None = None) -> tuple[Tensor, str]:
    """A picture of the data that a family of experts was tested on.

    Args:
        family: Name of the family, which is that of its data set.
        index: Which picture; counted from the start again past the end.
        event_shape: Shape of the states; what the data set has unless given.
    Returns:
        The picture in [-1, 1], (channels, height, width), and a line that describes it.
    Raises:
        ValueError: If there is no such data set, it is not on this machine, or has another shape.
    """
    if family not in DATASETS:
        raise ValueError(f"there is no data of {family}; there is of {', '.join(DATASETS)}.")
    images = _images(family)
    if event_shape is not None and images.event_shape != tuple(event_shape):
        raise ValueError(f"pictures of {family} have shape {images.event_shape}, not {tuple(event_shape)}.")
    index %= len(images)
    labels = {name: int(label[index]) for name, label in images.labels.items()}
    known = [images.values[name][label] for name, label in labels.items() if label >= 0]
    described = f"{images.name} {index}: {', '.join(value.replace('_', ' ') for value in known)}"
    return images.batch(torch.tensor([index]))[0], described


def mask_from(picture: Image.Image | bytes, event_shape: Sequence[int]) -> Tensor:
    """The mask that somebody painted.

    Args:
        picture: What was painted, of any size, or the bytes of its file. Where it is transparent,
            nothing was painted; of a picture without transparency, what is white was.
        event_shape: Shape of the states, (channels, height, width).
    Returns:
        1 where states may change and 0 where they are held, (1, height, width).
    Raises:
        ValueError: If it is no picture, or nothing is painted.
    """
    _, height, width = _image_shape(event_shape)
    image = _opened(picture) if isinstance(picture, bytes) else picture
    try:
        layer = image.convert("RGBA").getchannel("A") if image.has_transparency_data else image.convert("L")
        covered = _unit(layer.resize((width, height), Image.Resampling.BOX))
    except Exception as error:  # as in `from_upload`
        raise ValueError(f"This picture is damaged: {error}") from error
    mask = (covered >= PAINTED).float()
    if not mask.any():
        raise ValueError("Nothing is painted. Paint over the part that may change.")
    return mask


def _image_shape(event_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(event_shape) != 3 or event_shape[0] not in _MODES:
        raise ValueError(f"states of shape {tuple(event_shape)} are no pictures.")
    channels, height, width = event_shape
    return channels, height, width


def _unit(image: Image.Image) -> Tensor:
    """A picture in [0, 1], (channels, height, width)."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).float() / 255


def _opened(data: bytes) -> Image.Image:
    """The picture, its header read and no more.

    Raises:
        ValueError: If it is none, is animated or too large.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"This file is too large: {len(data) / 1e6:.0f} MB of {MAX_BYTES // 10**6} at most.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, by its size
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        animated = getattr(image, "is_animated", False)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_many_pixels()) from error
    except Exception as error:  # headers of hostile files raise nearly anything
        raise ValueError(f"This file is no picture that can be read; give a {', '.join(FORMATS)}.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(_too_many_pixels(f", {width} by {height} pixels"))
    if animated:
        raise ValueError("This picture is animated; give a still one.")
    return image


def _too_many_pixels(size: str = "") -> str:
    return f"This picture is too large{size}; at most {MAX_PIXELS // 10**6} megapixels are read."


@functools.lru_cache(maxsize=4)
def _images(family: str) -> LabelledImages:
    try:
        return load_data(family, SPLIT, **_FEW.get(family, {}))
    except (FileNotFoundError, ImportError, TypeError) as error:
        raise ValueError(f"the data of {family} is not on this machine: {error}") from error
