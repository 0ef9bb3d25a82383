"""`accelerate launch -m composable_ebm.train CONFIG.toml [--field value ...]`, or a folder of images."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from composable_ebm.processes import check_launch, is_first, leave
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.folder import folder_config
from composable_ebm.train.reading import read_config
from composable_ebm.train.stages import CONTRAST, stages
from composable_ebm.train.stopping import TrainingStoppedError
from composable_ebm.train.trainer import TrainingDivergedError, accelerator_for, train

USAGE = """usage: composable-ebm train CONFIG.toml [--num-iterations N] [--optimiser.learning-rate R] ...
       composable-ebm train FOLDER [ATTRIBUTE] [--minutes M] ...   your own images at 64 pixels, by a codec
       composable-ebm train FOLDER [ATTRIBUTE] --no-latents ...    at 32, without one
       composable-ebm train FOLDER --contrast 0 ...                score matching alone, no contrast"""

PLACES = ("--models", "--runs", "--push-to-hub")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the expert that a configuration describes, or one of a folder of images.

    Flags override the fields of the configuration. Returns 0 if all went well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        if arguments:
            _override(TrainConfig(), ["--help"])
        return 0 if arguments else 2
    if is_first():
        return _train(arguments)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the first process speaks for all
        return _train(arguments)


def _train(arguments: list[str]) -> int:
    try:
        check_launch(_what_is_trained(arguments))
        config, flags = _described(arguments)
    except (OSError, ValueError) as error:
        return _complain(error, 2)
    if flags:
        config = _override(config, flags)
    try:
        command = _what_is_trained(arguments)
        *before, config = stages(config, command)
        for i, (stage, following) in enumerate(pairwise((*before, config))):
            _train_before(stage, following, command, told=i > 0)
        expert = train(config, arguments=command, told=bool(before))
    except TrainingStoppedError as stopped:
        if is_first():
            print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        if is_first():
            print("stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except (TrainingDivergedError, ValueError, OSError) as error:
        return _complain(error, 1)
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in expert.card.metrics.items())
    print(f"{expert.card.full_name} is in {config.model_folder}: {metrics}")
    print(f"samples and metrics along the way are in {config.run_folder}; to draw more:")
    print(f'  composable-ebm sample "{expert[expert.card.values[-1]]}" --out {config.name}.png')
    return 0


def _train_before(stage: TrainConfig, following: TrainConfig, arguments: Sequence[str], told: bool) -> None:
    """Trains one stage in the group of processes which the last ends."""
    accelerator = accelerator_for(stage)
    to_come = CONTRAST if stage.model_folder == following.model_folder else ""
    train(stage, accelerator, arguments=arguments, told=told, to_come=to_come)
    accelerator.free_memory()


def _complain(error: Exception, status: int) -> int:
    if is_first():
        print(f"error: {error}", file=sys.stderr)
    else:
        print(f"error in process {os.environ['RANK']}: {error}", file=sys.stderr)
    return status


def _described(arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that the first arguments describe, and the flags that follow."""
    if not Path(arguments[0]).exists():
        raise FileNotFoundError(f"there is no configuration and no folder of images {arguments[0]!r}.")
    if not Path(arguments[0]).is_dir():
        return read_config(arguments[0]), arguments[1:]
    attribute = arguments[1] if arguments[1:] and not arguments[1].startswith("-") else ""
    flags = arguments[2 if attribute else 1 :]
    config = folder_config(arguments[0], attribute, latents=_on_latents(flags))
    own = any(flag.startswith("objective:") for flag in flags)
    return replace(config, contrast=0.0) if own else config, flags


def _on_latents(flags: Sequence[str]) -> bool:
    """Whether a folder is learned on latents: unless told otherwise, or told a network of pixels."""
    own = any(flag.startswith(("network:", "objective:")) for flag in flags)
    return "--latents" in flags or not (own or "--no-latents" in flags)


def _what_is_trained(arguments: list[str]) -> list[str]:
    """The arguments without those that only say where the expert goes."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag not in (*PLACES, "--fresh"):
            kept.append(argument)
        elif not equals and flag != "--fresh":
            next(rest, None)  # its value
    return kept


def _override(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    import tyro  # only for flags: a machine without it trains from the file alone

    return tyro.cli(TrainConfig, default=config, args=arguments, prog="composable-ebm train CONFIG.toml")


if __name__ == "__main__":
    try:
        STATUS = main()
    except Exception:
        traceback.print_exc()
        STATUS = 1
    leave(STATUS)
