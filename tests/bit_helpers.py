"""Small energies of bits that several test files share, and sums over all their states."""

import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.boltzmann import BoltzmannMachine
from composable_ebm.energy.bits import bit_states
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.train.config import RBM as Sizes
from composable_ebm.train.config import GenerationConfig, OptimiserConfig, TrainConfig
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence

BITS = 5


class Network(ceb.Energy):
    """A small network over bits: nothing about it is known in closed form but its gradient."""

    event_shape, data_range, binary, name = (BITS,), (0.0, 1.0), True, "network"

    def __init__(self, seed=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(BITS, 16), nn.SiLU(), nn.Linear(16, 1))
            for p in self.parameters():
                nn.init.normal_(p, std=0.7)

    def energy(self, x, noise_level=None):
        return self.layers(x)[:, 0]


def rbm(seed=0, hidden=3, size=BITS, values=1, visible="bits", std=1.0):
    """An RBM whose weights matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = RBM((size,), values, hidden, visible)
        for p in net.parameters():
            nn.init.normal_(p, std=std)
    return net.eval()


def rbm_training(folder, num_iterations):
    """The training of a small RBM on tiny images, in a folder."""
    return TrainConfig(
        family="bits",
        name="bars",
        network=Sizes(hidden=8),
        objective=ContrastiveDivergence(
            cd_steps=5, buffer_size=200, reinit_prob=0.02, energy_l2=0.0, data_noise=0.0
        ),
        optimiser=OptimiserConfig(learning_rate=0.05, grad_clip=10.0, ema=0.9),
        generation=GenerationConfig(num_steps=20),
        batch_size=100,
        num_iterations=num_iterations,
        models=str(folder / "models"),
        runs=str(folder / "runs"),
        log_every=50,
        evaluate_every=num_iterations,
        save_every=num_iterations,
        cpu=True,
    )


def machine(seed=0, visible=3, hidden=2, lateral=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = BoltzmannMachine(visible, hidden, lateral, scale=1.0)
        nn.init.normal_(made.biases, std=0.5)
    return made.named("machine")


def exact(energy, temperature=1.0, size=BITS):
    """Probability of every state, in the order of `bit_states`."""
    with torch.no_grad():
        return (-energy(bit_states(size)) / temperature).softmax(0)


def frequencies(x):
    index = (x * 2 ** torch.arange(x.shape[1])).sum(1).long()
    return torch.bincount(index, minlength=2 ** x.shape[1]) / len(x)
