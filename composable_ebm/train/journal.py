"""What a training tells while it runs: metrics as lines of JSON and in tensorboard, pictures as PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from composable_ebm.data import LabelledImages
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.files import write_atomic
from composable_ebm.plotting import save_grid
from composable_ebm.train.codec import codec_metrics, codec_sheet
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.export import METRICS, held_out_metrics, sample_values

ROWS = 6

__all__ = ["Journal"]


class Journal:
    """Metrics as lines of JSON and in tensorboard, pictures as PNG; silent on ranks other than 0.

    Args:
        config: Says where.
        active: Whether this process writes.
        resume_at: Lines from later iterations are dropped, and what a killed process wrote half.
    """

    def __init__(self, config: TrainConfig, active: bool, resume_at: int = 0) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to load

        self.folder = config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        lines = path.read_bytes().splitlines() if resume_at and path.exists() else []
        kept = [line for line in lines if 0 <= _step(line) <= resume_at]
        write_atomic(path, b"".join(line + b"\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_at or None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def evaluate(
        self, step: int, expert: Expert, data: LabelledImages, seconds: float, sheet: bool = True
    ) -> dict[str, float]:
        """Held-out metrics, which it returns, and a grid of samples from noise, a column for each value.

        Args:
            step: The iteration.
            expert: As it is now.
            data: Held-out pictures.
            seconds: That the training has taken.
            sheet: Whether to draw: on a base that stands still it costs more than minutes of learning.
        """
        if not self.active:
            return {}
        metrics = held_out_metrics(expert, data)
        self.write(step, {**metrics, "seconds": seconds})
        if not sheet:
            return metrics
        columns = sample_values(expert, ROWS)
        images = expert.images(torch.stack(list(columns.values()), dim=1).flatten(0, 1))
        title = {"expert": expert.card.full_name, "step": str(step)}
        save_grid(images, self.folder / f"samples-{step:06d}.png", columns=len(columns), metadata=title)
        self.board.add_images("samples", (images.cpu() + 1) / 2, step)
        return metrics

    def evaluate_codec(self, step: int, codec: PictureCodec, data: LabelledImages, seconds: float) -> None:
        """Held-out figures of a codec, and a sheet of held-out pictures with what comes back below them."""
        if not self.active:
            return
        self.write(step, {**codec_metrics(codec, data), "seconds": seconds})
        sheet = codec_sheet(codec, data)
        save_grid(
            sheet, self.folder / f"reconstruction-{step:06d}.png", columns=8, metadata={"step": str(step)}
        )

    def close(self) -> None:
        """Flushes everything."""
        if self.active:
            self.file.close()
            self.board.close()


def _step(line: bytes) -> int:
    """The iteration of a line of metrics, -1 where it has none or is cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1
