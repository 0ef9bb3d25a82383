"""Run by test_train.py under `accelerate launch` with two gloo processes; prints what it found."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from composable_ebm.train import Trainer, leave, read_config


def main(config_path: str, out: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(read_config(config_path), accelerator)
    trainer.run()
    weights = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    found = gather_object(
        [
            {
                "weights": weights.double().sum().item(),
                "first": weights[:5].tolist(),
                "chains": trainer.phase.buffer.states.double().sum().item(),
            }
        ]
    )
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps({"num_processes": accelerator.num_processes, "ranks": found}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:3])
    leave(0)
