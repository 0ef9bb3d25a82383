"""Image files of any size and colour as one tensor of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

MODES = {1: "L", 3: "RGB"}
FITS = ("crop", "pad")
LOOKED_AT = 64
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

__all__ = ["channels_of", "check_options", "cut_off", "read_images", "read_what_can_be"]


def check_options(size: int, channels: int, fit: str = "crop") -> None:
    """Refuses what pictures cannot be.

    Raises:
        ValueError: If so.
    """
    if channels not in (0, *MODES):
        raise ValueError(f"`channels` must be 1 (grey) or 3 (colour), got {channels}.")
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    if fit not in FITS:
        raise ValueError(f"`fit` must be one of {', '.join(FITS)}, got {fit!r}.")


def read_images(paths: Sequence[Path], size: int, channels: int, name: str, fit: str = "crop") -> Tensor:
    """Image files as one tensor.

    Args:
        paths: The files.
        size: Height and width in pixels.
        channels: 3 for colour, 1 for grey.
        name: What to call them beside the progress bar.
        fit: "crop" takes the middle square, "pad" the whole picture with its border's colour around it.
    Returns:
        Bytes of shape (n, channels, size, size).
    Raises:
        ValueError: If a file is not an image of 8 bits a channel, or `size` or `channels` cannot be.
    """
    images, unreadable = read_what_can_be(paths, size, channels, name, fit)
    for i, reason in unreadable.items():
        raise ValueError(f"{paths[i]} cannot be read as an image: {reason}")
    return images


def read_what_can_be(
    paths: Sequence[Path], size: int, channels: int, name: str, fit: str = "crop"
) -> tuple[Tensor, dict[int, str]]:
    """As `read_images`, but files that cannot be read are left black, and returned: position -> why."""
    check_options(size, channels, fit)
    images = torch.zeros((len(paths), channels, size, size), dtype=torch.uint8)
    unreadable: dict[int, str] = {}
    for i, path in enumerate(tqdm(paths, desc=f"reading {name}", unit="image", disable=None, delay=2)):
        try:
            images[i] = pil_to_tensor(_read(path, size, MODES[channels], fit))
        except UNREADABLE as error:
            unreadable[i] = str(error)
    return images, unreadable


def channels_of(paths: Sequence[Path]) -> int:
    """1 if pictures are grey, 3 if not, going by some of them, the same whatever their order."""
    some = sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())[:LOOKED_AT]
    for path in some:
        try:
            picture = pil_to_tensor(_read(path, 32, "RGB", "pad"))
        except UNREADABLE:
            continue
        if not (picture == picture[:1]).all():
            return 3
    return 1


def cut_off(paths: Sequence[Path]) -> float:
    """The share of pictures that lies outside their middle squares, going by some of them."""
    shares = []
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        try:
            with Image.open(path) as image:
                shares.append(1 - min(image.size) / max(image.size))
        except UNREADABLE:
            continue
    return sum(shares) / max(len(shares), 1)


def _read(path: Path, size: int, mode: str, fit: str) -> Image.Image:
    """A square of an image, upright, on white where it is transparent."""
    with Image.open(path) as opened:
        opened.draft(mode, (2 * size, 2 * size))  # a JPEG is decoded no larger than needed
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            image = _of_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        square = _padded(image) if fit == "pad" else _middle(image)
        return square.resize((size, size), Image.Resampling.LANCZOS)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits in 8: scaled, not cut."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(f"it has pixels of type {image.mode!r}; convert it to 8 bits a channel")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


def _middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _padded(image: Image.Image) -> Image.Image:
    """The whole image in the middle of a square of the mean colour of its border."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    border = Image.new("L", image.size, 255)
    if min(image.size) > 2:
        border.paste(0, (1, 1, image.width - 1, image.height - 1))
    colour = tuple(round(mean) for mean in ImageStat.Stat(image, border).mean)
    square = Image.new(image.mode, (side, side), colour if len(colour) > 1 else colour[0])
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
