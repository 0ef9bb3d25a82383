"""Autoencoders that somebody else trained, as codecs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from composable_ebm.energy.space import Codec

__all__ = ["AutoencoderCodec", "from_autoencoder"]


class AutoencoderCodec(Codec):
    """An autoencoder of `diffusers` as a codec: its own latents, shifted and scaled to unit size.

        z = (latents - shift)·scale

    Args:
        autoencoder: With `encode` and `decode` as `AutoencoderKL` and `AutoencoderTiny` have them.
        image_shape: (channels, height, width) of the pictures.
        scale: Of the latents; the autoencoder's own `scaling_factor` unless given, else 1.
        shift: The autoencoder's own `shift_factor` unless given, else 0.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        image_shape: Sequence[int],
        scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.image_shape = tuple(image_shape)
        config = getattr(autoencoder, "config", {})
        self.scale = float(scale if scale is not None else config.get("scaling_factor") or 1.0)
        self.shift = float(shift if shift is not None else config.get("shift_factor") or 0.0)
        parameter = next(autoencoder.parameters())
        with torch.no_grad():
            self.event_shape = tuple(self.encode(parameter.new_zeros(1, *image_shape)).shape[1:])

    def encode(self, images: Tensor) -> Tensor:
        out: Any = self.autoencoder.encode(images)  # type: ignore[operator]
        # AutoencoderKL gives a distribution, of which the mean is the one answer without noise.
        found = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return (found - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents / self.scale + self.shift).sample  # type: ignore[operator]


def from_autoencoder(
    autoencoder: nn.Module,
    image_shape: Sequence[int],
    *,
    scale: float | None = None,
    shift: float | None = None,
) -> AutoencoderCodec:
    """A pretrained `AutoencoderKL` or `AutoencoderTiny` of `diffusers` as a codec.

    Args:
        autoencoder: The module, on its device; it is put in evaluation mode.
        image_shape: (channels, height, width) of the pictures.
        scale: What its latents are multiplied by; its own `scaling_factor` unless given.
        shift: What is taken off before; its own `shift_factor` unless given.
    Raises:
        TypeError: If it cannot encode and decode.
    Example:
        >>> taesd = AutoencoderTiny.from_pretrained("madebyollin/taesd")
        >>> codec = from_autoencoder(taesd, (3, 512, 512))     # latents (4, 64, 64)
        >>> energy = from_diffusers(unet, scheduler, ...).in_space(codec)
    """
    for method in ("encode", "decode"):
        if not callable(getattr(autoencoder, method, None)):
            raise TypeError(
                f"`autoencoder` must have `encode` and `decode`, as those of diffusers, and "
                f"{type(autoencoder).__name__} has no `{method}`."
            )
    return AutoencoderCodec(autoencoder.eval().requires_grad_(False), image_shape, scale, shift)
