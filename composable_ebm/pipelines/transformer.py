"""DiT: a transformer over latents that was told one of the classes of ImageNet."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor

from composable_ebm.pipelines.adapter import PipelineDenoiser
from composable_ebm.pipelines.denoiser import Condition

__all__ = ["ClassTransformer"]


class ClassTransformer(PipelineDenoiser):
    """`DiTPipeline`: prompts are classes, by number or by one of the pipeline's labels."""

    short_name: ClassVar[str] = "dit"
    network_part: ClassVar[str] = "transformer"
    answers_variance: ClassVar[bool] = True
    weight = 4.0
    num_steps = 50

    def recognised(self, what: object) -> Hashable:
        return class_number(what, int(self.network.config.num_embeds_ada_norm), self.pipe.labels)

    def encode(self, what: Hashable) -> Condition:
        # The class after the last is the one that stands for none.
        number = int(self.network.config.num_embeds_ada_norm) if what is None else what
        return {"label": torch.tensor([number], device=self.device)}

    def call(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x, timestep=time, class_labels=condition["label"], return_dict=False)[0]


def class_number(what: object, count: int, labels: dict[str, int] | None = None) -> int:
    """The number of a class given by number, as text or not, or by label.

    Raises:
        KeyError: If there is no such class; it names the near ones.
    """
    if isinstance(what, str) and labels and what in labels:
        return int(labels[what])
    number = int(what) if isinstance(what, int) or (isinstance(what, str) and what.isdigit()) else None
    if number is not None and 0 <= number < count:
        return number
    near = difflib.get_close_matches(str(what), list(labels or ()), 3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise KeyError(
        f"there is no class {what!r}: classes are 0 to {count - 1}, or labels of the pipeline.{hint}"
    )
