"""Pictures as bytes and addresses: the one place where the page turns pictures in [-1, 1] into files."""

from __future__ import annotations

import base64
import binascii
import io
import zipfile
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from composable_ebm.plotting import image_grid

GAP = 1  # pixels between the pictures of a montage

__all__ = ["GAP", "data_uri", "from_uri", "montage", "packed", "png"]


def montage(images: Tensor) -> Image.Image:
    """Pictures in [-1, 1], (batch, 1 or 3, height, width), as one, about square.

    Raises:
        ValueError: If they are no pictures.
    """
    return Image.fromarray(image_grid(images, padding=GAP, background=128)[GAP:-GAP, GAP:-GAP])


def png(picture: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG that carries `texts`."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    # Level 1: a live frame is thrown away 60 ms later.
    picture.save(buffer, "PNG", pnginfo=info, compress_level=6 if texts else 1)
    return buffer.getvalue()


def data_uri(content: bytes | Image.Image, kind: str = "png") -> str:
    """Bytes of a picture as an address."""
    content = content if isinstance(content, bytes) else png(content)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def from_uri(uri: Any) -> bytes:
    """The bytes of a data URI.

    Raises:
        ValueError: If it is none.
    """
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except (AttributeError, binascii.Error, ValueError) as error:
        raise ValueError("The page sent a picture that cannot be read; choose it again.") from error


def packed(pictures: Mapping[str, bytes]) -> bytes:
    """Files as one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    return buffer.getvalue()
