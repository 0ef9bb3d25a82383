"""Small energies and experts that several test files share."""

import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.energy.base import Axes
from composable_ebm.experts.networks import ConvEnergy

KERNELS = [
    ceb.Langevin(0.05),
    ceb.Langevin(0.05, noise_first=True),
    ceb.MALA(0.05),
    ceb.HMC(0.1, num_leapfrog=2),
    ceb.UnderdampedLangevin(0.1),
    ceb.LeimkuhlerMatthews(0.05),
]


def kernel_name(kernel):
    return type(kernel).__name__


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Quadratic(ceb.Energy):
    """E(x) = p/2 ‖x - μ‖², precision p: every sampler's answer is known."""

    def __init__(self, precision=1.0, mean=0.0, dimension=1):
        super().__init__()
        self.precision, self.mean = precision, mean
        self.event_shape = (dimension,)

    def energy(self, x, noise_level=None):
        return self.precision / 2 * (x - self.mean).square().sum(1)


class Counted(ceb.Energy):
    """Another energy, counting its evaluations and noting the noise levels it was given."""

    noise_conditioned = True

    def __init__(self, inner):
        super().__init__()
        self.inner, self.event_shape = inner, inner.event_shape
        self.levels = []

    def energy(self, x, noise_level=None):
        self.levels.append(None if noise_level is None else float(noise_level))
        return self.inner.energy(x, noise_level)


def gaussians(dtype=torch.float32):
    """Three named Gaussians in the plane, with different means and correlated covariances."""
    a = ceb.analytic.Gaussian([0.0, 0.5], [[1.0, 0.3], [0.3, 0.5]]).named("a")
    b = ceb.analytic.Gaussian([1.0, -0.5], [[0.6, -0.2], [-0.2, 0.8]]).named("b")
    c = ceb.analytic.Gaussian([-0.5, -1.0], [0.7, 1.5]).named("c")
    return a.to(dtype), b.to(dtype), c.to(dtype)


def points(num=8, event_shape=(2,), seed=0, dtype=torch.float32):
    """Standard normal states."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, *event_shape, generator=generator, dtype=torch.float64).to(dtype)


def card(name="digit", values=("0", "1", "2"), family="toys", event_shape=(1, 4, 4), **changes):
    """The description of a tiny convolutional expert."""
    fields = {
        "family": family,
        "name": name,
        "attribute": name,
        "values": tuple(values),
        "event_shape": event_shape,
        "data_range": (-1.0, 1.0),
        "network": {
            "type": "ConvEnergy",
            "event_shape": list(event_shape),
            "num_values": len(values),
            "widths": [4],
            "patch": 2,
            "hidden": 8,
        },
        "sampler": {"kernel": "Langevin", "step_size": 0.1, "num_steps": 12},
        "energy_range": dict.fromkeys((*values, "any"), (-1.0, 1.0)),
    }
    return ceb.Card(**{**fields, **changes})


def network(description, seed=0):
    """The network that a card describes, with weights large enough to make energies vary."""
    options = {k: v for k, v in description.network.items() if k != "type"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ConvEnergy(**options)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    return net.eval().requires_grad_(False)


def expert(name="digit", values=("0", "1", "2"), seed=0, **changes):
    """A tiny expert as `load_expert` would give it."""
    description = card(name, values, **changes)
    return ceb.Expert.standing(network(description, seed), description)


def binary(name="thick", seed=0, **changes):
    """A tiny expert of a binary attribute."""
    return expert(name, ("no", "yes"), seed, **changes)


def variance_error(samples, expected):
    """Relative error of the variance of `samples`, mean over axes."""
    return abs(float(samples.var(dim=0).mean()) / expected - 1)


class Wide(ceb.Energy):
    """N(0, diag(variances) + σ²), which says along which coordinate it is wide."""

    noise_conditioned = True

    def __init__(self, variances):
        super().__init__()
        self.event_shape = (len(variances),)
        self.variances = torch.tensor(variances)

    def energy(self, x, noise_level=None):
        noise = 0.0 if noise_level is None else noise_level.reshape(-1, 1).square()
        return (x.square() / (self.variances + noise)).sum(1) / 2

    def principal_axes(self, size):
        order = self.variances.argsort()
        return Axes(torch.eye(size)[order], self.variances[order])
