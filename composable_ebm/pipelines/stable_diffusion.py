"""Stable Diffusion 1, 2 and XL: a U-Net that attends to a text."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor

from composable_ebm.pipelines.adapter import PipelineDenoiser
from composable_ebm.pipelines.denoiser import Condition

__all__ = ["StableDiffusion", "StableDiffusionXL"]


class StableDiffusion(PipelineDenoiser):
    """`StableDiffusionPipeline`."""

    short_name: ClassVar[str] = "sd"
    weight = 7.5
    num_steps = 50

    def encode(self, what: Hashable) -> Condition:
        text = "" if what is None else what
        asked, nothing = self.pipe.encode_prompt(text, self.device, 1, what is None)
        return {"text": nothing if what is None else asked}

    def call(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(
            x,
            time,
            encoder_hidden_states=condition["text"],
            timestep_cond=self._guidance(x),
            added_cond_kwargs=self._added(condition),
            return_dict=False,
        )[0]

    def _added(self, condition: Condition) -> dict[str, Tensor] | None:
        return None

    def _guidance(self, x: Tensor) -> Tensor | None:
        """What a network that was distilled with a guidance scale is told of it."""
        size = self.network.config.time_cond_proj_dim
        if size is None:
            return None
        scale = torch.full((len(x),), self.embedded_guidance - 1)
        return self.pipe.get_guidance_scale_embedding(scale, embedding_dim=size).to(x)


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`, without its refiner. Pictures are asked for uncropped."""

    short_name: ClassVar[str] = "sdxl"
    weight = 5.0

    def encode(self, what: Hashable) -> Condition:
        text = "" if what is None else what
        asked, nothing, pooled, pooled_nothing = self.pipe.encode_prompt(
            text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=what is None
        )
        assert self.codec is not None
        size = self.codec.image_shape[-2:]
        ids = torch.tensor([[*size, 0, 0, *size]], device=self.device)
        if what is None:
            return {"text": nothing, "pooled": pooled_nothing, "time_ids": ids}
        return {"text": asked, "pooled": pooled, "time_ids": ids}

    def _added(self, condition: Condition) -> dict[str, Tensor]:
        pooled = condition["pooled"]
        return {"text_embeds": pooled, "time_ids": condition["time_ids"].to(pooled.dtype)}
