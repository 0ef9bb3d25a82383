"""Training configurations: frozen dataclasses, read from TOML, with a command line flag per field."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

from composable_ebm.data.dataset import unknown_name
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.settings import to_settings
from composable_ebm.schedules import Curve, Schedule, cosine, hold_then
from composable_ebm.train.objectives import ContrastiveDivergence
from composable_ebm.train.score_matching import DenoisingScoreMatching

__all__ = [
    "ConvEnergy",
    "DataConfig",
    "DiffusedEnergy",
    "GenerationConfig",
    "OptimiserConfig",
    "TrainConfig",
    "read_config",
]


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Args:
        name: A data set of `composable_ebm.data`.
        attribute: The attribute to be an expert of; "" learns p(x) from all images, without labels.
        root: Folder of the data; searched for unless given.
        exclude: Combinations to hold out of training, such as "smile+glasses", where the data set
            knows how.
    """

    name: str = "digits"
    attribute: str = ""
    root: str = ""
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvEnergy:
    """Sizes of a `experts.networks.ConvEnergy`."""

    widths: tuple[int, ...] = (32, 64, 64)
    patch: int = 2
    hidden: int = 128


@dataclass(frozen=True)
class DiffusedEnergy:
    """Sizes of a `experts.diffused.DiffusedEnergy`."""

    hidden: int = 512
    components: int = 128
    noise_range: tuple[float, ...] = (0.02, 10.0)


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam, its rate held and then falling to zero.

    Args:
        learning_rate: Rate while held.
        hold: Share of the run at the full rate, before the linear fall.
        beta1: Decay of the first moment; 0 is usual where chains and weights chase each other.
        beta2: Decay of the second moment.
        grad_clip: Largest norm of the weight gradient.
        ema: Decay of the weight average that is shipped.
    """

    learning_rate: float = 1e-3
    hold: float = 0.3
    beta1: float = 0.0
    beta2: float = 0.999
    grad_clip: float = 0.1
    ema: float = 0.995


@dataclass(frozen=True)
class GenerationConfig:
    """How samples are drawn from noise with the finished expert: stored with it.

    Args:
        num_steps: Steps of the training sampler.
        cooldown: Share of them, at the end, in which step and noise fall to 2 %.
        noise_levels: For noise-conditioned experts: levels from the network's largest to its
            smallest, a predictor step between them, and Langevin steps at temperature 1 at each.
        step_size: Of those steps, in units of the squared noise level.
    """

    num_steps: int = 300
    cooldown: float = 0.25
    noise_levels: int = 40
    step_size: float = 0.3


@dataclass(frozen=True)
class TrainConfig:
    """One expert's training.

    Args:
        family: Family of the expert.
        name: Its name; the expert is written to <models>/<family>/<name>.
        batch_size: Images, and chains, of an iteration, on each process.
        num_iterations: Optimiser steps.
        seed: Seeds weights, data order and chains.
        models: Folder of experts.
        runs: Folder for metrics, sample grids and checkpoints.
        log_every: Iterations between lines of metrics.
        evaluate_every: Iterations between held-out metrics and sample grids.
        save_every: Iterations between checkpoints.
        mixed_precision: "no" or "bf16".
        accumulate: Batches whose gradients are summed into one optimiser step.
        cpu: Stays on the CPU.
        licence: Licence of the expert and its data.
        weight: Weight of the expert's ratio in `composable_ebm.given`.
        init: Name or folder of an expert whose weights to start from, where they fit.
        half: Stores the weights in 16 bits.
    """

    family: str = "digits"
    name: str = "digit"
    data: DataConfig = field(default_factory=DataConfig)
    network: ConvEnergy | DiffusedEnergy = field(default_factory=ConvEnergy)
    objective: ContrastiveDivergence | DenoisingScoreMatching = field(default_factory=ContrastiveDivergence)
    sampler: Langevin = field(
        default_factory=lambda: Langevin(
            step_size=10.0, noise_scale=0.005, grad_clip=0.03, clamp=(-1.0, 1.0), noise_first=True
        )
    )
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    batch_size: int = 64
    num_iterations: int = 2000
    seed: int = 0
    models: str = "models"
    runs: str = "runs"
    log_every: int = 20
    evaluate_every: int = 250
    save_every: int = 250
    mixed_precision: str = "no"
    accumulate: int = 1
    cpu: bool = False
    licence: str = ""
    weight: float = 1.0
    init: str = ""
    half: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_iterations", "log_every", "evaluate_every", "save_every", "accumulate")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if isinstance(self.network, DiffusedEnergy) != self.objective.noise_conditioned:
            raise ValueError(
                f"{type(self.objective).__name__} does not train a {type(self.network).__name__}: score "
                "matching over noise levels needs a DiffusedEnergy, contrastive divergence a ConvEnergy."
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f'`mixed_precision` must be "no" or "bf16", got {self.mixed_precision!r}.')

    @property
    def model_folder(self) -> Path:
        """Where the expert goes."""
        return Path(self.models) / self.family / self.name

    @property
    def run_folder(self) -> Path:
        """Where metrics, pictures and checkpoints go."""
        return Path(self.runs) / self.family / self.name

    @property
    def sampler_settings(self) -> dict:
        """What is stored with the expert, see `sampling.from_settings`."""
        if isinstance(self.network, DiffusedEnergy):
            low, high = self.network.noise_range
            levels = Curve(((0.0, high), (1.0, low)), "karras")
            schedule = Schedule(
                noise_level=levels, noise_power=2.0, predict=True, num_levels=self.generation.noise_levels
            )
            diffusing = Annealed(Langevin(self.generation.step_size), schedule)
            return {**to_settings(diffusing), "num_steps": self.generation.num_steps}
        cooling = Schedule(step_scale=hold_then(cosine(1.0, 0.02), 1 - self.generation.cooldown))
        annealed = Annealed(self.sampler, cooling)
        sampler = annealed if self.generation.cooldown else self.sampler
        return {**to_settings(sampler), "num_steps": self.generation.num_steps}


def read_config(path: str | Path) -> TrainConfig:
    """Reads a TOML file; tables are the nested dataclasses.

    Raises:
        ValueError: If the file is no TOML, or a name or type is wrong; the message says where.
        FileNotFoundError: If there is no such file.
    """
    try:
        content = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error
    try:
        return _build(TrainConfig, content, TrainConfig(), "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _build(kind: type, content: dict, defaults: object, where: str):
    hints = typing.get_type_hints(kind)
    known = {f.name: getattr(defaults, f.name) for f in fields(kind)}
    values = {}
    for name, value in content.items():
        if name not in known:
            raise ValueError(unknown_name("setting", f"{where}{name}", [where + n for n in known]))
        default = known[name]
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            if not isinstance(value, dict):
                raise ValueError(f"{where}{name} is a table: write [{where}{name}].")
            default = _choose(
                hints[name], value.pop("type", type(default).__name__), default, f"{where}{name}"
            )
            values[name] = _build(type(default), value, default, f"{where}{name}.")
        else:
            values[name] = _convert(value, hints[name], f"{where}{name}")
    return dataclasses.replace(defaults, **values)  # type: ignore[type-var]


def _choose(hint: object, name: str, default: object, where: str) -> object:
    """The defaults of the dataclass called `name` among those that a table may be."""
    options = {kind.__name__: kind for kind in (typing.get_args(hint) or (type(default),))}
    if name not in options:
        raise ValueError(unknown_name(f"type of {where}", name, options))
    return default if type(default) is options[name] else options[name]()


def _convert(value: object, hint: object, where: str) -> object:
    """The TOML value as the annotated type; whole numbers may stand for decimals, lists for tuples."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, list):
            return tuple(_convert(v, typing.get_args(option)[0], where) for v in value)
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and type(value) is origin:
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{where} must be {names}, got {value!r}.")
