"""Training configurations: frozen dataclasses, one field for each setting and command line flag."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from composable_ebm.data import OF_ANY_SIZE, LabelledImages, load_data
from composable_ebm.experts.store import CODEC
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.gibbs import Gibbs
from composable_ebm.sampling.kernel import Kernel
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.leimkuhler_matthews import LeimkuhlerMatthews
from composable_ebm.sampling.particles import Particles
from composable_ebm.sampling.schedule import Curve, Schedule, cosine, hold_then
from composable_ebm.sampling.settings import to_settings
from composable_ebm.train.objectives.classification import NoisyClassification
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel, DenoisingScoreMatching
from composable_ebm.train.objectives.over_levels import ContrastiveOverLevels
from composable_ebm.train.objectives.reconstruction import Reconstruction
from composable_ebm.train.objectives.recovery import RecoveryLikelihood
from composable_ebm.train.objectives.score_matching import ScoreMatching, SlicedScoreMatching

__all__ = [
    "RBM",
    "ConfinedEnergy",
    "ConvEnergy",
    "DataConfig",
    "Denoiser",
    "DiffusedEnergy",
    "DiffusedPatches",
    "DiffusedWindows",
    "GenerationConfig",
    "NoisyClassifier",
    "OptimiserConfig",
    "PictureCodec",
    "TrainConfig",
]


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Args:
        name: A data set of `composable_ebm.data`.
        attribute: The attribute to be an expert of; "" learns p(x) from all images, without labels;
            "a+b" has combinations of values for values, see `LabelledImages.jointly`.
        root: Folder of the data; searched for unless given.
        exclude: Combinations to hold out of training, such as "smile+glasses", where the data set
            knows how.
        size: Height and width of the images in pixels, for data sets that can be had in several; 0
            for the size that the data set has of itself.
        between: Learns from the images between two values, too, which have no label because neither
            would be right, such as strokes of middling thickness: they belong to p(x), and to no value
            more than to another. Without them a ratio of values means nothing there. A classifier
            learns them as a value of their own, "between".
        channels: Of a folder's pictures: 3 for colour, 1 for grey, 0 for what they are.
        fit: How a folder's pictures become squares: "crop" takes the middle, "pad" the whole with its
            border's colour around it.
        jitter: Copies of what is learned from, shifted and zoomed a little, up to this number of pictures
            and at most 7 of each; 0 for none.
        mirror: Learns from mirror images, too: for pictures in which left and right are alike.
    Raises:
        ValueError: If the data set has images of one size, or there can be none of that size.
    """

    name: str = "digits"
    attribute: str = ""
    root: str = ""
    exclude: tuple[str, ...] = ()
    size: int = 0
    between: bool = False
    channels: int = 0
    fit: str = "crop"
    jitter: int = 0
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"`size` of the data must be at least 1 pixel, got {self.size}.")
        if self.jitter < 0:
            raise ValueError(f"`jitter` of the data must be at least 0 pictures, got {self.jitter}.")
        if self.size and self.name not in OF_ANY_SIZE:
            raise ValueError(
                f"the images of {self.name!r} have one size; `size` is for {', '.join(OF_ANY_SIZE)}."
            )

    def load(self, split: str) -> LabelledImages:
        """The images of a split, "train" or "validation", with labels for all that the data set knows."""
        options: dict[str, object] = {}
        if self.exclude:
            options["exclude"] = self.exclude
        if self.size:
            options["size"] = self.size
        if self.name == "folder":  # other columns of its table may hold anything
            options["attributes"] = self.attribute.split("+") if self.attribute else ()
            options |= {"channels": self.channels, "fit": self.fit}
        return load_data(self.name, split, self.root or None, **options)


@dataclass(frozen=True)
class ConvEnergy:
    """Sizes of a `experts.networks.ConvEnergy`."""

    widths: tuple[int, ...] = (32, 64, 64)
    patch: int = 2
    hidden: int = 128


@dataclass(frozen=True)
class ConfinedEnergy:
    """Sizes of a `experts.networks.confined.ConfinedEnergy`."""

    hidden: int = 512
    layers: int = 3
    noise_range: tuple[float, ...] = (0.1, 10.0)
    level: float = 0.4


@dataclass(frozen=True)
class NoisyClassifier:
    """Sizes of a `experts.networks.classifier.NoisyClassifier`."""

    width: int = 64
    blocks: int = 2
    hidden: int = 128
    noise_range: tuple[float, ...] = (0.1, 10.0)
    patch: int = 1


@dataclass(frozen=True)
class PictureCodec:
    """Sizes of a `experts.networks.codec.PictureCodec`."""

    channels: int = 8
    widths: tuple[int, ...] = (64, 128)
    encoder_blocks: tuple[int, ...] = (1, 2)
    decoder_blocks: tuple[int, ...] = (2, 3)
    patch: int = 4


@dataclass(frozen=True)
class DiffusedEnergy:
    """Sizes of a `experts.diffused.DiffusedEnergy`."""

    hidden: int = 512
    components: int = 128
    noise_range: tuple[float, ...] = (0.02, 10.0)


@dataclass(frozen=True)
class DiffusedPatches:
    """Sizes of a `experts.patches.DiffusedPatches`."""

    patch: int = 8
    hidden: int = 128
    components: int = 48
    context: int = 64
    noise_range: tuple[float, ...] = (0.02, 10.0)


@dataclass(frozen=True)
class DiffusedWindows:
    """Sizes of a `experts.windows.DiffusedWindows`."""

    hidden: int = 128
    blocks: int = 3
    stride: int = 4
    overlap: int = 2
    components: int = 96
    noise_range: tuple[float, ...] = (0.02, 10.0)


@dataclass(frozen=True)
class Denoiser:
    """Sizes of a `experts.denoiser.Denoiser`."""

    hidden: int = 288
    components: int = 96
    noise_range: tuple[float, ...] = (0.02, 10.0)


@dataclass(frozen=True)
class RBM:
    """Sizes of a `experts.rbm.RBM`."""

    hidden: int = 500
    visible: str = "bits"
    scale: float = 1.0
    learn_scale: bool = False


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
            smallest, a predictor step between them, and `LeimkuhlerMatthews` steps at each.
        step_size: Of those steps, in units of the squared noise level.
        per_chain: Of noise-conditioned experts: particles for each chain that a composition is asked for,
            see `Particles`.
        surest: Draws first what all experts of a composition are sure of, see `Particles`.
    """

    num_steps: int = 300
    cooldown: float = 0.25
    noise_levels: int = 40
    step_size: float = 0.3
    per_chain: float = Particles.per_chain
    surest: bool = False


Network = (
    ConvEnergy
    | ConfinedEnergy
    | DiffusedEnergy
    | DiffusedPatches
    | DiffusedWindows
    | Denoiser
    | NoisyClassifier
    | PictureCodec
    | RBM
)
NOISE_CONDITIONED = (
    ConfinedEnergy,
    DiffusedEnergy,
    DiffusedPatches,
    DiffusedWindows,
    Denoiser,
    NoisyClassifier,
)

AnyObjective = (
    ContrastiveDivergence
    | DenoisingScoreMatching
    | DenoisingAtOneLevel
    | ScoreMatching
    | SlicedScoreMatching
    | RecoveryLikelihood
    | ContrastiveOverLevels
    | NoisyClassification
    | Reconstruction
)


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
        largest_gap: Energy gap, in nats either way, from which a training counts as diverged and goes back
            to its last good state. Free energies of hundreds of reals need more than the default.
        accumulate: Batches whose gradients are summed into one optimiser step.
        cpu: Stays on the CPU.
        licence: Licence of the expert and its data.
        weight: Weight of the expert's ratio in `composable_ebm.given`.
        words: What people say of each value, such as "not smiling" and "smiling".
        init: Name or folder of an expert whose weights to start from, where they fit.
        half: Stores the weights in 16 bits.
        latents: Learns on the latents of the family's codec, <models>/<family>/codec, which is trained first.
        push_to_hub: Repository of the Hugging Face Hub, user/name, that the finished expert is
            uploaded to; "" for none.
        fresh: Throws away what an earlier training left in the run's folder, and may replace an expert
            that was trained on other pictures.
        minutes: Ends after so many, whatever `num_iterations` says, with the rate at zero; 0 for no limit.
        contrast: Share of a folder's training, at its end, that goes to contrastive divergence down the noise
            levels, from where score matching ended, see `train.stages`; 0 for none.
        keep_best: Ends with the weights that did best on held-out pictures, and writes the expert each time
            they do better.
    """

    family: str = "digits"
    name: str = "digit"
    data: DataConfig = field(default_factory=DataConfig)
    network: Network = field(default_factory=ConvEnergy)
    objective: AnyObjective = field(default_factory=ContrastiveDivergence)
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
    largest_gap: float = 50.0
    accumulate: int = 1
    cpu: bool = False
    licence: str = ""
    weight: float = 1.0
    words: tuple[str, ...] = ()
    init: str = ""
    half: bool = False
    latents: bool = False
    push_to_hub: str = ""
    fresh: bool = False
    minutes: float = 0.0
    contrast: float = 0.0
    keep_best: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_iterations", "log_every", "evaluate_every", "save_every", "accumulate")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.minutes < 0:
            raise ValueError(f"`minutes` must be at least 0, got {self.minutes}.")
        if not 0 <= self.contrast < 1:
            raise ValueError(f"`contrast` must be at least 0 and less than 1, got {self.contrast}.")
        if self.contrast and not self._can_end_with_contrast():
            raise ValueError(
                "`contrast` is for a density of a folder's pictures that learns by DenoisingScoreMatching: "
                "leave it out (--contrast 0), or give its stage a configuration of its own, with "
                'objective.type = "ContrastiveOverLevels" and `init`.'
            )
        if not self._is_trainable():
            raise ValueError(
                f"{type(self.objective).__name__} does not train a {type(self.network).__name__}: "
                "DenoisingScoreMatching needs a network over noise levels (ConfinedEnergy, DiffusedEnergy, "
                "DiffusedPatches, DiffusedWindows or Denoiser), NoisyClassification a NoisyClassifier, "
                "Reconstruction a PictureCodec, RecoveryLikelihood and ContrastiveOverLevels one that is an "
                "energy (not a Denoiser), all others a ConvEnergy; an RBM learns by ContrastiveDivergence."
            )
        objective = self.objective
        if self.data.between and not isinstance(objective, (DenoisingScoreMatching, NoisyClassification)):
            raise ValueError(
                f"{type(objective).__name__} needs a label for every image: leave `data.between` out, or "
                "train by DenoisingScoreMatching or NoisyClassification."
            )
        contrastive = objective if isinstance(objective, ContrastiveDivergence) else None
        if contrastive and self.binary and (contrastive.data_noise or contrastive.energy_l2):
            raise ValueError(
                "an RBM of bits takes no noise, and its free energies are right as they are: set "
                "objective.data_noise = 0 and objective.energy_l2 = 0."
            )
        if self.latents and not isinstance(self.network, (ConfinedEnergy, DiffusedEnergy, NoisyClassifier)):
            raise ValueError(
                f"a {type(self.network).__name__} does not learn on latents: leave `latents` out, or take a "
                "ConfinedEnergy, a DiffusedEnergy or a NoisyClassifier."
            )
        if isinstance(self.network, PictureCodec) and self.name != CODEC:
            raise ValueError(f"the codec of a family is named {CODEC!r}, got name = {self.name!r}.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f'`mixed_precision` must be "no" or "bf16", got {self.mixed_precision!r}.')

    def _is_trainable(self) -> bool:
        """Whether the objective suits the network."""
        if isinstance(self.network, NoisyClassifier):
            return isinstance(self.objective, NoisyClassification)
        if isinstance(self.network, PictureCodec):
            return isinstance(self.objective, Reconstruction)
        if isinstance(self.objective, (NoisyClassification, Reconstruction)):
            return False
        if isinstance(self.network, RBM):
            return isinstance(self.objective, ContrastiveDivergence)
        if isinstance(self.network, Denoiser):
            return isinstance(self.objective, DenoisingScoreMatching)
        return isinstance(self.network, NOISE_CONDITIONED) == self.objective.noise_conditioned

    def _can_end_with_contrast(self) -> bool:
        scored = isinstance(self.objective, DenoisingScoreMatching) and not isinstance(self.network, Denoiser)
        return scored and self.data.name == "folder"

    @property
    def model_folder(self) -> Path:
        """Where the expert goes."""
        return Path(self.models) / self.family / self.name

    @property
    def run_folder(self) -> Path:
        """Where metrics, pictures and checkpoints go."""
        return Path(self.runs) / self.family / self.name

    @property
    def binary(self) -> bool:
        """Whether the expert's states are bits."""
        return isinstance(self.network, RBM) and self.network.visible == "bits"

    @property
    def data_range(self) -> tuple[float, float] | None:
        """Smallest and largest value of the expert's data; None for latents."""
        if self.latents:
            return None
        return (0.0, 1.0) if self.binary else (-1.0, 1.0)

    @property
    def kernel(self) -> Kernel:
        """What chains move by: `sampler`, or `Gibbs` where conditionals have a closed form."""
        return Gibbs() if isinstance(self.network, RBM) else self.sampler

    @property
    def sampler_settings(self) -> dict:
        """What is stored with the expert, see `sampling.from_settings`."""
        if isinstance(self.network, RBM):
            return {**self.kernel.settings(), "num_steps": self.generation.num_steps}
        if isinstance(self.network, NOISE_CONDITIONED):
            low, high = self.network.noise_range
            levels = Curve(((0.0, high), (1.0, low)), "karras")
            schedule = Schedule(
                noise_level=levels, noise_power=2.0, predict=True, num_levels=self.generation.noise_levels
            )
            kernel, generation = LeimkuhlerMatthews(self.generation.step_size), self.generation
            diffusing = Annealed(kernel, schedule)
            if generation.surest or generation.per_chain != Particles.per_chain:
                diffusing = Particles(
                    kernel, schedule, verdict=True, per_chain=generation.per_chain, surest=generation.surest
                )
            return {**to_settings(diffusing), "num_steps": generation.num_steps}
        cooling = Schedule(step_scale=hold_then(cosine(1.0, 0.02), 1 - self.generation.cooldown))
        annealed = Annealed(self.sampler, cooling)
        sampler = annealed if self.generation.cooldown else self.sampler
        return {**to_settings(sampler), "num_steps": self.generation.num_steps}
