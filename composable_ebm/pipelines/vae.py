"""The autoencoder of a pipeline as the codec of its space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from composable_ebm.energy import Codec

__all__ = ["PipelineCodec"]

PICTURES_AT_ONCE = 4


class PipelineCodec(Codec):
    """Latents of a pipeline's autoencoder, shifted and scaled as its network knows them.

        z = (latents - shift)·scale

    The autoencoder stays the pipeline's own: on its device, in its precision, behind its hooks for
    offloading. Where it overflows in 16 bits and says so (`force_upcast`), it decodes in 32. Pictures
    that the pipeline's safety checker flags come out black, as they do from the pipeline.

    Args:
        vae: The autoencoder.
        image_shape: (channels, height, width) of pictures.
        event_shape: (channels, height, width) of latents.
        check: Pictures -> which of them are flagged, (n,); None for no safety checker.
    """

    def __init__(
        self,
        vae: Any,
        image_shape: tuple[int, ...],
        event_shape: tuple[int, ...],
        check: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.image_shape, self.event_shape = image_shape, event_shape
        object.__setattr__(self, "vae", vae)  # held, not owned
        self.check = check
        config = vae.config
        self.scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        self.channels = None if mean is None or std is None else (tuple(mean), tuple(std))

    vae: Any

    def encode(self, images: Tensor) -> Tensor:
        parts = [self.vae.encode(part.to(self._like(images))) for part in images.split(PICTURES_AT_ONCE)]
        means = [p.latent_dist.mode() if hasattr(p, "latent_dist") else p.latents for p in parts]
        latents = torch.cat(means).to(images)
        if self.channels is not None:
            mean, std = (latents.new_tensor(v).reshape(1, -1, 1, 1) for v in self.channels)
            return (latents - mean) / std * self.scale
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        z = latents / self.scale
        if self.channels is not None:
            mean, std = (z.new_tensor(v).reshape(1, -1, 1, 1) for v in self.channels)
            z = z * std + mean
        z = z + self.shift
        own = self._like(z).dtype
        wide = own == torch.float16 and bool(getattr(self.vae.config, "force_upcast", False))
        if wide:
            self.vae.to(dtype=torch.float32)
        try:
            parts = [self.vae.decode(part.to(self._like(z))).sample for part in z.split(PICTURES_AT_ONCE)]
        finally:
            if wide:
                self.vae.to(dtype=own)
        images = torch.cat(parts).to(latents)
        if self.check is not None:
            flagged = self.check(images.detach()).to(images.device)
            images = torch.where(flagged.reshape(-1, 1, 1, 1), -1.0, images)
        return images

    def _like(self, x: Tensor) -> Tensor:
        """A tensor whose device and precision are those the autoencoder works in."""
        hook = getattr(self.vae, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return x.new_zeros((), dtype=self.vae.dtype, device=self.vae.device if device is None else device)
