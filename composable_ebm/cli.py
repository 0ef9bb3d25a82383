"""The command line, `composable-ebm`.

Each subcommand is a frozen dataclass, from which its options are made. What is slow to import is
imported by the subcommand that needs it.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from composable_ebm.energy import Energy
from composable_ebm.experts import page as models_page
from composable_ebm.experts.hub import push_to_hub
from composable_ebm.experts.library import Library
from composable_ebm.experts.recipe import parse
from composable_ebm.pipelines import load_pipeline
from composable_ebm.processes import leave
from composable_ebm.sampling import Chain, ChainDivergedError, sample
from composable_ebm.sampling.request import calibrated_sampler

__all__ = ["main"]


@dataclass(frozen=True)
class Sample:
    """Draw samples from a recipe and save them as a picture.

    Example: composable-ebm sample "contrastive_digits/digit[3]" --out threes.png

    Args:
        recipe: What to sample, as text: 2*smile + glasses - 0.5*beard.
        num_chains: Number of samples.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
        seed: Seeds the noise.
        out: Picture to write, a .png; recipe, seed and settings are stored in it as text.
        device: Where to run, such as cpu or cuda.
        num_threads: Threads of the CPU.
        report: Whether to print what the run says about itself.
        pipeline: A pipeline of diffusers that the recipe may name, a folder or a name on the Hub; it is
            called by its kind, sd, sdxl, sd3, flux, dit or unet, and its prompts are quoted.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    num_chains: int = 16
    num_steps: int | None = None
    seed: int = 0
    out: Path = Path("grid.png")
    device: str = "cpu"
    num_threads: int | None = None
    report: bool = True
    pipeline: str | None = None

    def run(self) -> int:
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"`--out` must name a .png file, got {self.out}.")
        if self.num_threads is not None:
            if self.num_threads < 1:
                raise ValueError(f"`--num-threads` must be at least 1, got {self.num_threads}.")
            torch.set_num_threads(self.num_threads)
        device = _device(self.device)
        names: Mapping[str, Energy] | None = None
        if self.pipeline is not None:
            own = load_pipeline(self.pipeline, device)
            names = Library(device, {own.name: own})
        energy = parse(self.recipe, names).to(device)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        total = calibrated_sampler(energy)[1] if self.num_steps is None else self.num_steps
        with tqdm(total=max(total, 0), unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
            result = sample(
                energy,
                num_chains=self.num_chains,
                num_steps=total,
                seed=self.seed,
                callback=_follow(bar),
                callback_every=10,
            )
        result.save(self.out)
        if self.report:
            print(result.report())
        print(self.out)
        return 0


@dataclass(frozen=True)
class Models:
    """List the experts, and those that are damaged.

    Args:
        folder: A folder of experts; wherever experts are looked for unless given.
        markdown: Write the page MODELS.md instead of a table.
    """

    folder: Path | None = None
    markdown: bool = False

    def run(self) -> int:
        cards, damaged = models_page.read(self.folder)
        if self.markdown and damaged:
            raise ValueError(
                f"a page lists only experts that can be loaded, but: {'; '.join(damaged.values())}"
            )
        if self.markdown:
            sys.stdout.write(models_page.page(cards))
        else:
            print(models_page.table(cards, damaged))
        return 1 if damaged else 0


@dataclass(frozen=True)
class Train:
    """Train one expert: composable-ebm train CONFIG.toml [options]. Its options: train --help."""

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()

    def run(self) -> int:
        # accelerate is slow to load
        return import_module("composable_ebm.train.__main__").main(list(self.arguments))


@dataclass(frozen=True)
class Generate:
    """Draw many samples into a folder, in shards: generate RECIPE --out DIR. Options: generate --help."""

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()

    def run(self) -> int:
        # accelerate is slow to load
        return import_module("composable_ebm.generate").main(list(self.arguments))


@dataclass(frozen=True)
class Evaluate:
    """Say how well the experts of a family compose: tables, plots, and a file of results.

    What is done is kept, so that the same command goes on where it was stopped.
    Example: composable-ebm evaluate digits --parts rows --samples 200

    Args:
        family: Family of experts, such as faces.
        out: File of results, a .json; results/FAMILY.json unless given. The plots go beside it.
        parts: What to measure: rows, negation, alternatives, detection, agreement, stability.
        forms: Ways to compose, ratio, chains, weight 3, sum, base ratio; rivals ebmkit, diffusion,
            contrastive, joint.
        weight: Weight of every ratio; what each expert was calibrated with unless given.
        samples: Samples of each row of the first form.
        other_samples: Samples of each row of the other forms, and of each NOT and OR.
        chains: Chains of each test of one expert alone.
        seeds: Rows are repeated for each.
        sizes: Numbers of attributes asked for at once; all unless given.
        held_out: Ask only for combinations that no expert saw; results go to FAMILY_held_out.json.
        combinations: Those combinations, such as glasses+beard; what the experts' cards say unless given.
        num_threads: Threads of the CPU.
    """

    family: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FAMILY")]
    out: Path | None = None
    parts: tuple[str, ...] = ("rows", "negation", "alternatives", "detection", "agreement", "stability")
    forms: tuple[str, ...] = (
        *("ratio", "chains", "weight 3", "sum", "base ratio"),
        *("ebmkit", "diffusion", "contrastive", "joint"),
    )
    weight: float | None = None
    samples: int = 1000
    other_samples: int = 400
    chains: int = 64
    seeds: tuple[int, ...] = (0,)
    sizes: tuple[int, ...] = ()
    held_out: bool = False
    combinations: tuple[str, ...] = ()
    num_threads: int | None = None

    def run(self) -> int:
        family = import_module("composable_ebm.evaluation.family")  # slow to load
        report = import_module("composable_ebm.evaluation.report")
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        name = f"{self.family}_held_out" if self.held_out else self.family
        out = self.out or Path("results") / f"{name}.json"
        wanted = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("out", "num_threads")}
        if self.held_out:
            wanted["parts"] = ("rows",)
        result = family.evaluate_family(family.Evaluation(**wanted), out)
        print(report.table(result))
        print(out)
        return 0


@dataclass(frozen=True)
class Push:
    """Upload an expert to the Hugging Face Hub, from where `load_expert("user/name")` loads it.

    Example: composable-ebm push faces/smile alice/smile

    Args:
        expert: A name, such as faces/smile, or a folder that holds an expert.
        repository: user/name on the Hub; made if there is none.
        private: Whether a repository that is made can be seen by its owner alone.
    """

    expert: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERT")]
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPOSITORY")]
    private: bool = False

    def run(self) -> int:
        try:
            print(push_to_hub(self.expert, self.repository, private=self.private))
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        return 0


@dataclass(frozen=True)
class Mixer:
    """Open the mixer, a page in the browser, until interrupted.

    Args:
        host: Address to serve on. One that others can reach needs --auth.
        port: Port to serve on.
        auth: user:password that a visitor must give.
        max_chains: Most samples that a visitor may ask for at once.
        device: Where to run, such as cpu or cuda.
        num_threads: Threads of the CPU.
        root_path: Where a proxy shows the page, such as /mixer.
        pipeline: A pipeline of diffusers whose prompts can be typed and mixed, a folder or a name on the Hub.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: str | None = None
    max_chains: int = 64
    device: str = "cpu"
    num_threads: int | None = None
    root_path: str = ""
    pipeline: str | None = None

    def run(self) -> int:
        user, colon, password = (self.auth or "").partition(":")
        if self.auth is not None and not (user and colon and password):
            raise ValueError("`--auth` must be user:password.")
        if self.auth is None and not _is_loopback(self.host):
            raise ValueError(
                f"{self.host} can be reached by others: give --auth user:password, or serve on 127.0.0.1."
            )
        if self.max_chains < 1:
            raise ValueError(f"`--max-chains` must be at least 1, got {self.max_chains}.")
        if not 0 < self.port < 65536:
            raise ValueError(f"`--port` must be between 1 and 65535, got {self.port}.")
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        device = _device(self.device)
        print("Loading the mixer.", flush=True)
        _mixer_page().serve(
            host=self.host,
            port=self.port,
            auth=None if self.auth is None else (user, password),
            max_chains=self.max_chains,
            device=device,
            root_path=self.root_path,
            pipeline=None if self.pipeline is None else load_pipeline(self.pipeline, device),
        )
        return 0


Command = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Push, tyro.conf.subcommand("push")]
    | Annotated[Mixer, tyro.conf.subcommand("mixer")]
)

AnyCommand = Sample | Models | Train | Generate | Evaluate | Push | Mixer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 2 for a request that makes no sense."""
    if own_process := argv is None:
        # What the imports made lives to the end of the process. Looking through it for garbage once
        # more, at exit, takes half a second.
        gc.freeze()
    argv = list(sys.argv[1:] if argv is None else argv)
    # These have options of their own, one for each field of their configuration.
    own: dict[str, type[Train | Generate]] = {"train": Train, "generate": Generate}
    command = own[argv[0]](tuple(argv[1:])) if argv and argv[0] in own else _read(argv)
    status = _status_of(command)
    if own_process and "WORLD_SIZE" in os.environ:
        leave(status)  # a launcher started it
    return status


def _status_of(command: AnyCommand) -> int:
    try:
        return command.run()
    except (ValueError, OSError, ImportError) as error:
        return _complain(error, 2)
    except ChainDivergedError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 130


def _read(argv: list[str]) -> AnyCommand:
    return tyro.cli(Command, prog="composable-ebm", description="Compose energy-based models.", args=argv)


def _complain(error: Exception, status: int) -> int:
    print(f"composable-ebm: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"  {note}", file=sys.stderr)
    return status


def _follow(bar: tqdm) -> Callable[[int, Chain], None]:
    def callback(step: int, chain: Chain) -> None:
        bar.update(step - bar.n)

    return callback


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot run on device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _mixer_page() -> ModuleType:
    """The page: a part of the installed package, beside the package in a checkout."""
    try:
        return import_module("composable_ebm.demos.mixer.app")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("composable_ebm.demos"):
            raise
    return import_module("demos.mixer.app")


if __name__ == "__main__":
    sys.exit(main())
