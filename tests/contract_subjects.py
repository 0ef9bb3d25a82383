"""What the contract is held against: each kind of energy of the toolkit, small, and each kernel."""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from bit_helpers import machine, rbm
from helpers import gaussians, points
from torch import nn

import composable_ebm as ceb
from composable_ebm import analytic
from composable_ebm.energy.text_image import TextImages
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.pipelines import Pipeline, PromptedDenoiser
from composable_ebm.sampling import Annealed
from composable_ebm.sampling.schedule import Schedule, constant, linear

IMAGE = (1, 4, 4)
NOISE_RANGE = (0.3, 10.0)
SIZES = {
    "ConvEnergy": {"widths": [4], "patch": 2, "hidden": 8},
    "DiffusedEnergy": {"hidden": 8, "components": 4, "noise_range": NOISE_RANGE},
    "DiffusedPatches": {"patch": 2, "hidden": 8, "components": 3, "context": 4, "noise_range": NOISE_RANGE},
    "DiffusedWindows": {
        "hidden": 8,
        "blocks": 1,
        "stride": 2,
        "overlap": 1,
        "components": 3,
        "noise_range": NOISE_RANGE,
    },
    "Denoiser": {"hidden": 8, "components": 4, "noise_range": NOISE_RANGE},
    "ConfinedEnergy": {"hidden": 8, "layers": 2, "noise_range": NOISE_RANGE},
    "NoisyClassifier": {"width": 4, "blocks": 1, "hidden": 8, "noise_range": NOISE_RANGE},
    "RegionClassifier": {"regions": 3, "components": 4, "squares": 2, "noise_range": NOISE_RANGE},
    "RBM": {"hidden": 3},
    "RBM of reals": {"hidden": 3, "visible": "reals", "scale": 0.7},
}
"""Of every network that a checkpoint may name, the arguments of a small one."""
ON_A_BASE = ("NoisyClassifier", "RegionClassifier")  # which tell values apart


def expert(kind: str, values: int, seed: int = 0) -> ceb.Expert:
    """A small expert of a kind of `SIZES`, with weights that matter."""
    options = {"event_shape": list(IMAGE), "num_values": values, **SIZES[kind]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NETWORKS[kind.split()[0]](**options)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    names = tuple(str(value) for value in range(values))
    card = ceb.Card(
        family="toys",
        name=f"{kind.replace(' ', '_')}_{values}",
        attribute="toy",
        values=names,
        event_shape=IMAGE,
        data_range=getattr(network, "data_range", (-1.0, 1.0)),
        network={"type": kind.split()[0], **options},
        noise_conditioned="noise_level" in inspect.signature(network.forward).parameters,
        energy_range=dict.fromkeys((*names, "any"), (-1.0, 1.0)),
    )
    base = expert("ConfinedEnergy", 1) if kind in ON_A_BASE else None
    return ceb.Expert.standing(network.eval().requires_grad_(False), card, base=base)


def _experts() -> dict[str, ceb.Energy]:
    made: dict[str, ceb.Energy] = {}
    for kind in SIZES:
        three = expert(kind, 3)
        if kind not in ON_A_BASE:
            made[f"{kind} alone"] = expert(kind, 1)
        made |= {f"{kind} at a value": three["1"], f"{kind} at any": three}
        if three.has_value:
            made[f"not a value of {kind}"] = ~three["1"]
    return made


def _shrunk(x: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """The denoiser of standard normal data."""
    return x / (1 + noise_level.square().reshape(-1, *[1] * (x.ndim - 1)))


class Shifted(PromptedDenoiser):
    """The denoiser of normal data, around a number for a prompt."""

    event_shape = (2,)
    noise_range = NOISE_RANGE

    def encode(self, what):
        return {"mean": torch.tensor([[float(what or 0)]])}

    def denoise(self, x, sigma, condition):
        mean = condition["mean"].to(x)
        return mean + (x - mean) / (1 + sigma.square()[:, None])


class Towers(nn.Module):
    """Pictures and texts of two numbers each."""

    def get_image_features(self, pictures):
        return torch.cat([pictures, pictures.square() + 1], dim=1)

    def get_text_features(self, numbers):
        return torch.stack([numbers, 1 - numbers, numbers * 0, numbers * 0 + 2], dim=1)


class Words(dict):
    def to(self, device):
        return self


def _clip() -> TextImages:
    def words(texts, **options):
        return Words(numbers=torch.tensor([len(text) / 8 for text in texts]))

    model = Towers()
    model.weight = nn.Parameter(torch.zeros(()))
    return ceb.from_clip(
        model, words, normalise=([0.5], [1.0]), event_shape=(2,), data_range=(-4, 4), scale=3
    )


def _adapted() -> dict[str, ceb.Energy]:
    a, _, _ = gaussians()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 3))
    plane = {"event_shape": (2,)}
    alphas = torch.linspace(0.99, 0.1, 8)
    unet = nn.Conv2d(1, 1, 3, padding=1)
    unet.forward = lambda x, t: SimpleNamespace(sample=0.3 * x)  # type: ignore[method-assign]
    unet.config = SimpleNamespace(sample_size=4, in_channels=1)  # type: ignore[assignment]
    scheduler = SimpleNamespace(alphas_cumprod=alphas, config=SimpleNamespace(prediction_type="epsilon"))
    conv = expert("ConvEnergy", 3)
    prompted = Pipeline(Shifted(), "prompted")
    return {
        "from_pipeline": prompted,
        "prompt": prompted["1"],
        "not a prompt": ~prompted["1"],
        "from_callable": ceb.from_callable(lambda x: x.square().sum(1) + x[:, 0].sin(), name="wave", **plane),
        "from_callable at noise": ceb.from_callable(
            lambda x, s: x.square().sum(1) / (1 + (0 if s is None else s.square())),
            name="wide",
            noise_conditioned=True,
            **plane,
        ),
        "from_classifier": ceb.from_classifier(logits, 2, name="third", **plane),
        "from_joint_classifier": ceb.from_joint_classifier(nn.Flatten(), 2, (2, 1, 1), energy_range=(-2, 2)),
        "from_clip": _clip()["a castle"],
        "from_clip among texts": _clip()["a castle", "a moon"],
        "from_score": ceb.from_score(lambda x: -x, name="wind", **plane),
        "from_denoiser": ceb.from_denoiser(_shrunk, noise_range=NOISE_RANGE, name="calm", **plane),
        "from_denoiser as an energy": ceb.from_denoiser(
            _shrunk, noise_range=NOISE_RANGE, form="residual", name="bowl", **plane
        ),
        "from_noise_predictor": ceb.from_noise_predictor(
            lambda x, t: 0.3 * x, alphas, name="predicted", **plane
        ),
        "from_diffusers": ceb.from_diffusers(unet, scheduler, name="unet"),
        "on_bits": ceb.on_bits(conv["1"]),
        "negate": ceb.negate(a, 3.0),
        "ratio": ceb.Sum([a, ceb.ratio(gaussians()[1], gaussians()[2])], [2.0, 0.5]),
        "mixture": ceb.mixture(gaussians(), weights=[1, 2, 3], log_z=[0, 1, 2]),
        "given prompts": ceb.given(prompted, prompted["1"], ~prompted["2"], weight=0.5) + 0.5 * a,
        "given": ceb.given(expert("DiffusedEnergy", 1), expert("DiffusedEnergy", 3)["2"], weight=1.5),
    }


def _compositions() -> dict[str, ceb.Energy]:
    a, b, c = gaussians()
    conv, diffused, denoiser = (expert(k, 3) for k in ("ConvEnergy", "DiffusedEnergy", "Denoiser"))
    bits = expert("RBM", 1)
    one, other = (rbm(seed, hidden=2 + seed).free_energy(name=f"rbm_{seed}") for seed in (0, 1))
    wind = ceb.from_score(lambda x: -x, name="wind", event_shape=(2,))
    return {
        "sum": a + 2 * b - 0.5 * c,
        "nothing": 0 * a,
        "nested": a + ~(b | c) / 3 - ceb.negate(2 * c, 4.0),
        "sum with a score": a + 0.5 * wind,
        "values of one network": conv["0"] + 0.5 * conv["1"] + ~conv["2"],
        "networks of all kinds": conv["0"] + diffused["1"] + expert("DiffusedPatches", 3)["2"],
        "network and denoiser": conv["0"] + 2 * (denoiser["1"] - denoiser["any"]) + denoiser["any"],
        "RBM of reals and network": expert("RBM of reals", 1) + conv["0"],
        "RBM and network": bits + 2 * (ceb.on_bits(conv["0"]) - ceb.on_bits(conv["any"])),
        "RBM or network": bits | ceb.on_bits(conv["0"]),
        "free energies": one + 2 * other,
        "free energies or": one | other,
        "free energy and machine": one + 0.5 * machine(2),
    }


def energies() -> dict[str, ceb.Energy]:
    """Each kind of energy, by a name for the test's id; that of a constructor begins with its name."""
    a, _, _ = gaussians()
    return {
        "Gaussian": a,
        "GaussianMixture": analytic.GaussianMixture([[0.0, 1.0], [1.0, -1.0]], 0.5).named("two"),
        "Box": analytic.Box([-1.0, -0.5], [1.0, 1.5], softness=0.3).named("box"),
        "DoubleWell": analytic.DoubleWell(barrier=2.0, dimension=2).named("well"),
        "Rings": analytic.Rings([1.0, 2.0], width=0.3).named("rings"),
        "BoltzmannMachine": machine(),
        "BoltzmannMachine without lateral couplings": machine(lateral=False),
        "free energy": rbm(0).free_energy(),
        "free energy of a value": rbm(1, values=3).free_energy(2),
        **_experts(),
        **_adapted(),
        **_compositions(),
    }


def states(energy: ceb.Energy, num: int = 6, seed: int = 0) -> torch.Tensor:
    """States of an energy, in float64."""
    x = points(num, energy.event_shape, seed, torch.float64)
    return (x > 0).double() if energy.binary else x


@dataclass(frozen=True)
class Subject:
    """A sampler, and the law that it claims to leave invariant on N(mean, 1/precision) at temperature T.

    Attributes:
        sampler: A kernel, or an annealed one whose curves stand still.
        variance: Of its stationary states, in units of T/precision; None for kernels of bits, which are
            held to enumeration.
    """

    sampler: ceb.Kernel | Annealed
    variance: float | None = 1.0

    @property
    def kernel(self) -> ceb.Kernel:
        return self.sampler.kernel if isinstance(self.sampler, Annealed) else self.sampler


PRECISION, TEMPERATURE = 2.0, 0.7
STILL = Schedule(temperature=constant(1.0))


def subjects() -> dict[str, Subject]:
    """Each kernel, by a name for the test's id, its steps large enough for a mistake to show."""
    eta, options = 0.3, {"temperature": TEMPERATURE}
    bias = 1 / (1 - eta * PRECISION / 2)
    short = {"noise_scale": (2 * eta * TEMPERATURE) ** 0.5, "noise_first": True}
    return {
        "Langevin": Subject(ceb.Langevin(eta, **options), bias),
        # Noise that is decoupled, at the scale that T asks for; states are seen after the drift.
        "Langevin, short runs": Subject(ceb.Langevin(eta, **short), bias * (1 - eta * PRECISION) ** 2),
        "LeimkuhlerMatthews": Subject(ceb.LeimkuhlerMatthews(0.3, **options)),
        "MALA": Subject(ceb.MALA(0.35, **options)),
        "HMC": Subject(ceb.HMC(0.7, num_leapfrog=3, **options)),
        "UnderdampedLangevin": Subject(ceb.UnderdampedLangevin(0.8, friction=1.5, **options)),
        "Gibbs": Subject(ceb.Gibbs(**options), None),
        "DMALA": Subject(ceb.DMALA(0.4, **options), None),
        "Annealed Langevin": Subject(Annealed(ceb.Langevin(eta, **options), STILL), bias),
        "Annealed HMC": Subject(Annealed(ceb.HMC(0.7, num_leapfrog=3, **options), STILL)),
        "Annealed Gibbs": Subject(Annealed(ceb.Gibbs(**options), STILL), None),
        "Annealed DMALA": Subject(
            Annealed(ceb.DMALA(0.4, **options), Schedule(step_scale=linear(1.0, 1.0))), None
        ),
    }
