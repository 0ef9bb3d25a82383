"""Stable Diffusion 3 and Flux: transformers that learned the velocity of a flow."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from composable_ebm.pipelines.adapter import PipelineDenoiser
from composable_ebm.pipelines.denoiser import Condition

__all__ = ["Flux", "StableDiffusion3"]


class StableDiffusion3(PipelineDenoiser):
    """`StableDiffusion3Pipeline`."""

    short_name: ClassVar[str] = "sd3"
    network_part: ClassVar[str] = "transformer"
    weight = 7.0
    num_steps = 28

    def encode(self, what: Hashable) -> Condition:
        text = "" if what is None else what
        asked, nothing, pooled, pooled_nothing = self.pipe.encode_prompt(
            text, None, None, device=self.device, do_classifier_free_guidance=what is None
        )
        if what is None:
            return {"text": nothing, "pooled": pooled_nothing}
        return {"text": asked, "pooled": pooled}

    def call(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def schedule_options(self, num_steps: int) -> Mapping[str, Any]:
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = int(self.network.config.patch_size)
        return {"mu": self._shift((self.event_shape[1] // patch) * (self.event_shape[2] // patch))}

    def _shift(self, tokens: int) -> float:
        """How much larger pictures are given more noise, linear in their number of patches."""
        config = self.pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return least + (most - least) * (tokens - few) / (many - few)

    def _multiple(self, factor: int) -> int:
        return factor * int(self.network.config.patch_size)


class Flux(StableDiffusion3):
    """`FluxPipeline`: latents in patches of 2 × 2, and the guidance scale as an input of the network.

    Networks that were distilled with a guidance scale follow a prompt at weight 1.
    """

    short_name: ClassVar[str] = "flux"
    time_scale: ClassVar[float] = 1.0
    weight = 1.0
    num_steps = 28

    def encode(self, what: Hashable) -> Condition:
        text = "" if what is None else what
        embeds, pooled, ids = self.pipe.encode_prompt(prompt=text, prompt_2=None, device=self.device)
        return {"text": embeds, "pooled": pooled, "text_ids": ids[None].float()}

    def call(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        rows, columns = torch.meshgrid(
            torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij"
        )
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x.dtype)
        told = None
        if self.network.config.guidance_embeds:
            told = torch.full((len(x),), self.embedded_guidance, device=x.device)
        answer = self.network(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            timestep=time,
            guidance=told,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["text"],
            txt_ids=condition["text_ids"][0],
            img_ids=ids,
            return_dict=False,
        )[0]
        return rearrange(answer, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)

    def schedule_options(self, num_steps: int) -> Mapping[str, Any]:
        options: dict[str, Any] = {"mu": self._shift((self.event_shape[1] // 2) * (self.event_shape[2] // 2))}
        if not self.pipe.scheduler.config.get("use_flow_sigmas"):
            options |= {"num_inference_steps": None, "sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}
        return options

    def _channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    def _multiple(self, factor: int) -> int:
        return 2 * factor

    def _sample_size(self) -> int:
        return self.pipe.default_sample_size
