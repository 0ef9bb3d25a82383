"""Running chains as an animation: frames kept while they run, saved when asked for."""

from __future__ import annotations

import io
import math
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from composable_ebm.plotting import image_grid

MAX_BYTES = 8 * 2**20
MILLISECONDS = 60
LAST_MILLISECONDS = 1200  # the last frame stays, before it begins again
_PIXELS = 192

__all__ = ["Recorder"]


class Recorder:
    """Frames of running chains, as bytes, no more than a given number.

    When it is full, every second frame is dropped, and from then on only every second one that
    comes is kept: what is left is the whole run, in larger steps.

    Args:
        limit_frames: Most frames to keep, 2 at least; fewer are kept of chains so many that these
            would take more than `MAX_BYTES`.
    """

    def __init__(self, limit_frames: int) -> None:
        self.limit_frames = limit_frames
        self.clear()

    def __len__(self) -> int:
        return len(self._frames)

    def clear(self) -> None:
        """Forgets all frames."""
        self._frames: list[Tensor] = []
        self._last: Tensor | None = None
        self._stride = 1
        self._seen = 0

    def add(self, states: Tensor) -> None:
        """Takes the next frame, images (chains, 1 or 3, height, width). Other chains than before,
        in number or shape, begin anew."""
        if self._last is not None and self._last.shape != states.shape:
            self.clear()
        pixels = (states.detach().float().nan_to_num(0.0, 1.0, -1.0) + 1) / 2
        self._last = pixels.mul(255).round().clamp(0, 255).byte().cpu()
        if self._seen % self._stride == 0:
            if len(self._frames) >= max(2, min(self.limit_frames, MAX_BYTES // self._last.numel())):
                self._frames = self._frames[::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                self._frames.append(self._last)
        self._seen += 1

    def save(self, chain: int | None = None, format: Literal["gif", "webp"] = "gif") -> bytes:
        """One chain as an animation that ends where the chains are now and begins anew.

        Args:
            chain: Which one; all of them side by side unless given.
            format: "gif", which everything shows, or "webp", which is smaller and keeps all colours.
        Raises:
            ValueError: If there are no frames, or no such chain.
        """
        if self._last is None:
            raise ValueError("there is nothing to save yet: press Play first.")
        if chain is not None and not 0 <= chain < len(self._last):
            raise ValueError(f"`chain` must be from 0 to {len(self._last) - 1}, got {chain}.")
        frames = self._frames if self._frames[-1] is self._last else [*self._frames, self._last]
        pictures = [_picture(frame if chain is None else frame[chain : chain + 1]) for frame in frames]
        buffer = io.BytesIO()
        options: dict = {"method": 3, "quality": 85} if format == "webp" else {"optimize": False}
        pictures[0].save(
            buffer,
            format,
            save_all=True,
            append_images=pictures[1:],
            duration=[MILLISECONDS] * (len(pictures) - 1) + [LAST_MILLISECONDS],
            loop=0,
            **options,
        )
        return buffer.getvalue()


def _picture(frame: Tensor) -> Image.Image:
    across = frame.shape[-1] * math.ceil(math.sqrt(len(frame)))
    grid = image_grid(frame.to(torch.float32) / 127.5 - 1, padding=0, scale=max(1, _PIXELS // across))
    return Image.fromarray(grid)
