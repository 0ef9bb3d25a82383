"""A convolutional codec: pictures to a grid of latents and back.

The encoder sees patches of 4x4 pixels as channels, the decoder mirrors it; both think in residual blocks, at
a quarter of the resolution and at an eighth of it. There is no normalisation layer, so that a picture's
latents depend on that picture alone.

    z = (encoder(x) - m)/s      m, s    mean and standard deviation of each channel over the data
    x ≈ decoder(z)

Reference:
    He et al. (2016), arXiv 1603.05027, for blocks that begin with their activation.
    Shi et al. (2016), arXiv 1609.05158, for pixels as channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy import Codec
from composable_ebm.experts.networks.sized import Sized

__all__ = ["CODECS", "PictureCodec"]

MOMENTUM = 0.01
"""Share that a batch has in the moments of the channels."""


class _Block(nn.Module):
    """x + conv(silu(conv(silu(x)))), which begins as x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class PictureCodec(Sized, Codec):
    """Latents of unit scale on a grid of one cell for 2·`patch` pixels a side.

    Args:
        image_shape: (channels, height, width), the sides divisible by 2·`patch`.
        channels: Channels of the latents.
        widths: Channels at the first and at the second resolution.
        encoder_blocks: Residual blocks of the encoder at each.
        decoder_blocks: Residual blocks of the decoder at each.
        patch: Pixels a side of what the first layer sees as one.
    Raises:
        ValueError: If the picture does not divide into cells.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int = 8,
        widths: Sequence[int] = (64, 128),
        encoder_blocks: Sequence[int] = (1, 2),
        decoder_blocks: Sequence[int] = (2, 3),
        patch: int = 4,
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        if height % (2 * patch) or width % (2 * patch):
            raise ValueError(
                f"pictures of {height}x{width} do not divide into cells of {2 * patch} pixels: crop or "
                f"resize them, for instance to {max(1, height // (2 * patch)) * 2 * patch} pixels."
            )
        self.made_with(locals())
        self.image_shape = tuple(image_shape)
        self.event_shape = (channels, height // (2 * patch), width // (2 * patch))
        fine, coarse = widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch),
            nn.Conv2d(colours * patch**2, fine, 3, padding=1),
            *[_Block(fine) for _ in range(encoder_blocks[0])],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            *[_Block(coarse) for _ in range(encoder_blocks[1])],
            nn.SiLU(),
            nn.Conv2d(coarse, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, coarse, 3, padding=1),
            *[_Block(coarse) for _ in range(decoder_blocks[1])],
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            *[_Block(fine) for _ in range(decoder_blocks[0])],
            nn.SiLU(),
            nn.Conv2d(fine, colours * patch**2, 3, padding=1),
            nn.PixelShuffle(patch),
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        return (self.encoder(images) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def features(self, latents: Tensor) -> Tensor:
        return self.decoder[:-3](latents)  # what the last layer makes pixels of

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of a batch, with noise (batch, *event_shape) on its latents, and those latents.

        For training. An encoder whose weights stand still keeps its moments too.
        """
        if next(self.encoder.parameters()).requires_grad:
            z = self.encode_batch(images)
        else:
            with torch.no_grad():
                z = self.encode(images)
        return self.decoder(z + noise), z

    def encode_batch(self, images: Tensor) -> Tensor:
        """Latents of unit scale over this batch, for training; their moments join the running ones."""
        z = self.encoder(images).float()
        mean = z.mean((0, 2, 3)).reshape(-1, 1, 1)
        std = z.var((0, 2, 3)).sqrt().reshape(-1, 1, 1) + 1e-4
        with torch.no_grad():
            self.mean.lerp_(mean, MOMENTUM)
            self.std.lerp_(std, MOMENTUM)
        return (z - mean) / std


CODECS: dict[str, type[PictureCodec]] = {"PictureCodec": PictureCodec}
"""The codecs that a checkpoint may name."""
