"""Spaces: what states are, and how they become pictures.

Energies compose where they speak of the same states. Most speak of pictures, some of bits, and some of
the latents z of a *codec*, a pair of an encoder and a decoder,

    z = encode(x),    x ≈ decode(z),    x a picture in [-1, 1],

which are far fewer numbers than pixels, and leave to the decoder what is the same in all pictures. Chains,
masks and weights work on z as they do on x; only what a person sees or paints passes through the codec.

Latents are meant to be sampled: of unit scale in each channel, and such that a little noise on them changes
little of the picture.

Reference:
    Kingma and Welling (2014), arXiv 1312.6114, for latents that stand noise.
    Rombach et al. (2022), arXiv 2112.10752, for models of the latents of a codec trained before.
    Pang et al. (2020), arXiv 2006.08205, and Nie et al. (2021), arXiv 2110.10873, for energies of latents.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Codec"]

CHUNK = 128
"""Pictures that pass a codec at once."""


class Codec(nn.Module, ABC):
    """An encoder and a decoder between pictures and latents.

    A subclass sets the two shapes and defines `encode` and `decode`, which are differentiable and take
    batches as they come. `latents` and `pictures` are for all who want the result alone: they take no
    gradient, go to the codec's device and back, and work in chunks.

    Attributes:
        image_shape: (channels, height, width) of a picture.
        event_shape: (channels, height, width) of its latents.
        digest: What tells this codec from others wherever it is loaded, such as the hash of its weights;
            empty for one that is the same only as itself.
    Example:
        >>> z = codec.latents(pictures)        # (n, 8, 8, 8)
        >>> x = codec.pictures(z)              # (n, 3, 64, 64) in [-1, 1]
    """

    image_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    digest: str = ""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents (batch, *event_shape) of pictures in [-1, 1], (batch, *image_shape)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, *image_shape), about in [-1, 1], of latents (batch, *event_shape)."""

    def features(self, latents: Tensor) -> Tensor:
        """What is to be seen in the pictures of latents, in its place, (batch, features, rows, columns): the
        pictures themselves, unless the decoder knows better."""
        return self.decode(latents)

    def encode_mask(self, mask: Tensor) -> Tensor:
        """A mask painted on the picture as one on the latents.

        A latent may move where any pixel of its cell may, so what is held is at least as small as what was
        painted.

        Args:
            mask: 1 where the picture may change, 0 where it is held; shape (..., height, width) of the
                picture, with one channel or all of them before, and a batch before that.
        Returns:
            The same for latents, (..., 1, height, width) of the latents.
        Raises:
            ValueError: If the latents are no grid of cells of the picture.
        """
        height, width = self.image_shape[-2:]
        if len(self.event_shape) != 3 or height % self.event_shape[1] or width % self.event_shape[2]:
            raise ValueError(
                f"a mask needs latents that are a grid over the picture: pictures of {height}x{width} have "
                f"latents of shape {self.event_shape}. Paint a mask on the latents instead."
            )
        if tuple(mask.shape[-2:]) != (height, width):
            raise ValueError(
                f"`mask` must have shape (..., {height}, {width}), as the picture, got {tuple(mask.shape)}."
            )
        pixels = mask.float() if mask.ndim > 2 else mask.float()[None]
        pixels = pixels.amax(dim=-3, keepdim=True)
        lead = pixels.shape[:-3]
        cells = (height // self.event_shape[1], width // self.event_shape[2])
        held = F.max_pool2d(pixels.reshape(-1, 1, height, width), cells)
        return held.reshape(*lead, 1, *self.event_shape[1:]).to(mask.dtype)

    @property
    def key(self) -> Hashable:
        """Equal keys mean the same space; a copy has the key of what it is a copy of."""
        if not self.digest and "_own_key" not in self.__dict__:
            object.__setattr__(self, "_own_key", uuid.uuid4().hex)
        return ("codec", self.digest or self.__dict__["_own_key"])

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Latents (n, *event_shape) of pictures in [-1, 1], (n, *image_shape), on the pictures' device.

        Raises:
            ValueError: If the pictures have another shape.
        """
        return self._through(self.encode, images, self.image_shape, "images")

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1], (n, *image_shape), of latents (n, *event_shape), on the latents' device.

        Raises:
            ValueError: If the latents have another shape.
        """
        return self._through(self.decode, latents, self.event_shape, "latents").clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """What is left of pictures in [-1, 1] after encoding and decoding, the same shape."""
        return self.pictures(self.latents(images))

    def _through(self, function, x: Tensor, shape: Sequence[int], name: str) -> Tensor:
        if tuple(x.shape[1:]) != tuple(shape):
            raise ValueError(
                f"`{name}` must have shape (n, {', '.join(map(str, shape))}), got {tuple(x.shape)}."
            )
        like = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), x)
        parts = [function(part.to(like)).to(x) for part in x.split(CHUNK)]
        return torch.cat(parts) if parts else x.new_zeros((0, *function(like.new_zeros(1, *shape)).shape[1:]))
