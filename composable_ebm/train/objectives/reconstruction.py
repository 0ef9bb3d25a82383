"""Reconstruction: what a codec is trained for, and what makes its latents fit to be sampled.

    L = mean[|x̂ - x| + 2 (x̂ - x)² + ½ |∇x̂ - ∇x|],      x̂ = decode(z + s ξ),  s uniform on [0, noise]

z are the latents of the batch at unit scale, ξ is standard normal. The noise makes codes smooth, and leaves
to the decoder what a model of the latents cannot get right below that level; differences between neighbouring
pixels keep thin frames from fading into what is likeliest.

A decoder may be trained further while the encoder stands still, so that energies of its latents stay true:

    L + f mean (encode(x̂) - z)²

The last term asks that what comes back still shows what the latents said, as the encoder sees it.

Reference:
    Vincent et al. (2008), Extracting and composing robust features with denoising autoencoders.
    Mathieu, Couprie and LeCun (2016), arXiv 1511.05440, eq. 6, for differences of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting

__all__ = ["Reconstruction"]


@dataclass(frozen=True)
class Reconstruction(Objective):
    """Reconstruction of pictures from noisy latents.

    Args:
        latent_noise: Largest standard deviation of the noise on latents of unit scale.
        squares: Weight of squared errors.
        edges: Weight of errors of differences between neighbouring pixels.
        decoder_only: Whether the encoder stands still; start from a codec's folder, `init`. Experts beside
            the codec then stay its experts.
        latents: Weight f of squared errors of the latents of what comes back, for a decoder alone.
    """

    latent_noise: float = 0.3
    squares: float = 2.0
    edges: float = 0.5
    decoder_only: bool = False
    latents: float = 0.0

    def __post_init__(self) -> None:
        if min(self.latent_noise, self.squares, self.edges, self.latents) < 0:
            raise ValueError(
                "`latent_noise`, `squares`, `edges` and `latents` must be at least 0, got "
                f"{self.latent_noise}, {self.squares}, {self.edges} and {self.latents}."
            )
        if self.latents and not self.decoder_only:
            raise ValueError(
                "`latents` compares with an encoder that stands still, or they would shrink together: set "
                "objective.decoder_only = true, or leave `latents` out."
            )

    def prepare(self, network: nn.Module) -> None:
        if self.decoder_only:
            network.encoder.requires_grad_(False)

    def begin(self, setting: Setting) -> Phase:
        return _ReconstructionPhase(self, setting)


class _ReconstructionPhase(Phase):
    def __init__(self, objective: Reconstruction, setting: Setting) -> None:
        self.objective = objective
        self.generator = setting.generator

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        strength = torch.rand(len(x), 1, 1, 1, generator=self.generator, device=x.device)
        shape = (len(x), *network.event_shape)  # type: ignore[misc]
        noise = torch.randn(shape, generator=self.generator, device=x.device)
        back, z = model(x, self.objective.latent_noise * strength * noise)
        d = back.float() - x
        edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
        squares = d.square().mean()
        loss = d.abs().mean() + self.objective.squares * squares + self.objective.edges * edges
        figures = {"squared_error": squares.detach()}
        if self.objective.latents:
            again = (network.encode(back).float() - z.float()).square().mean()  # type: ignore[operator]
            loss = loss + self.objective.latents * again
            figures["latent_error"] = again.detach()
        return loss, {"loss": loss.detach(), **figures}
