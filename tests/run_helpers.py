"""Trainings of a few milliseconds on pictures of bright squares."""

import torch

from composable_ebm.data import LabelledImages
from composable_ebm.train import Trainer
from composable_ebm.train.config import ConvEnergy, DataConfig, GenerationConfig, TrainConfig
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence


def squares(seed, size=8, count=64, values=("left", "right")):
    """Bright squares on the left (value 0) or the right (value 1)."""
    labels = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    for value in (0, 1):
        images[labels == value, :, 2:6, 4 * value : 4 * value + 4] = 255
    return LabelledImages(images, {"side": labels}, {"side": values}, "squares")


DATA = (squares(0), squares(1))


def small():
    """The configuration of one."""
    return TrainConfig(
        family="squares",
        name="side",
        data=DataConfig(attribute="side"),
        network=ConvEnergy(widths=(4, 4), hidden=8),
        objective=ContrastiveDivergence(cd_steps=2, buffer_size=64),
        generation=GenerationConfig(num_steps=3),
        batch_size=8,
        num_iterations=8,
        log_every=2,
        save_every=4,
        evaluate_every=100,
        cpu=True,
    )


def run(config, data=DATA):
    trainer = Trainer(config, data=data)
    return trainer.run(), trainer


def weights(expert):
    return torch.cat([p.detach().flatten() for p in expert.network.parameters()])
