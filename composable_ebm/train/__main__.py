"""`accelerate launch -m composable_ebm.train CONFIG.toml [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from composable_ebm.train.config import TrainConfig, read_config
from composable_ebm.train.trainer import TrainingDivergedError, train

USAGE = "usage: composable-ebm train CONFIG.toml [--num-iterations N] [--optimiser.learning-rate R] ..."


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the expert that a configuration describes; flags override its fields. 0 if all went well."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        if arguments:
            _override(TrainConfig(), ["--help"])
        return 0 if arguments else 2
    try:
        config = read_config(arguments[0])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(arguments) > 1:
        config = _override(config, arguments[1:])
    try:
        expert = train(config)
    except (TrainingDivergedError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{expert.card.full_name} is in {config.model_folder}: {dict(expert.card.metrics)}")
    return 0


def _override(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    import tyro  # only for flags: a machine without it trains from the file alone

    return tyro.cli(TrainConfig, default=config, args=arguments, prog="composable-ebm train CONFIG.toml")


if __name__ == "__main__":
    sys.exit(main())
