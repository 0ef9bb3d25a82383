"""Networks of pixels, without a condition or with a class."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor

from composable_ebm.pipelines.adapter import PipelineDenoiser, pair
from composable_ebm.pipelines.denoiser import Condition
from composable_ebm.pipelines.transformer import class_number

__all__ = ["PixelNetwork"]


class PixelNetwork(PipelineDenoiser):
    """`DDPMPipeline` and `DDIMPipeline`, or a `UNet2DModel` under an EDM scheduler in either.

    Prompts are classes, by number, where the network has any. Where it was trained without a class for
    none, p(x) is told the first class, and says nothing useful: compose its classes instead.
    """

    short_name: ClassVar[str] = "unet"
    data_range = (-1.0, 1.0)
    num_steps = 50

    def _describe_space(self, height: int | None, width: int | None) -> None:
        config = self.network.config
        sizes = pair(config.sample_size) if height is None or width is None else (height, width)
        self.event_shape = (int(config.in_channels), *sizes)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None without any."""
        table = getattr(self.network, "class_embedding", None)
        return getattr(table, "num_embeddings", None)

    def recognised(self, what: object) -> Hashable:
        count = self.num_classes
        if count is None:
            raise KeyError(f"this network takes no prompt: it has no classes, and got {what!r}")
        return class_number(what, count)

    def encode(self, what: Hashable) -> Condition:
        if self.num_classes is None:
            return {}
        return {"label": torch.tensor([0 if what is None else what], device=self.device)}

    def call(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        options = {"class_labels": condition["label"]} if condition else {}
        return self.network(x, time, return_dict=False, **options)[0]
