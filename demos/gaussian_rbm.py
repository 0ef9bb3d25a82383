"""A restricted Boltzmann machine of reals: grey digits, by block Gibbs and by Langevin, alone and in a sum.

Its hidden bits can be drawn given the image and the image given them, so block Gibbs samples it; its
free energy is smooth, so every kernel that follows a gradient samples it as well. All start from the
same noise here and must come to the same energies; Langevin without a correction ends higher, by
n/2 (1/(1 - η/2s²) - 1) nats for n pixels, as its step η is known to spread a Gaussian. Pictures show the
mean of the image given the hidden bits, without the noise of standard deviation s of a sample.

The fourth panel is a sum that Gibbs refuses, as a convolutional network has no conditionals in closed
form: the RBM times p(digit | x)⁵ of another family's expert, along the gradient of both; a row a digit.

    python demos/gaussian_rbm.py --out gaussian_rbm.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from tqdm import tqdm

import composable_ebm as ceb
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.plotting import BLUE, GREEN, ORANGE, figure, image_grid, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIDE = 8  # images a row and column of every panel
POOL, WEIGHT = 256, 5
STEP = 0.05  # of Langevin, in squared standard deviations of a pixel
DIGITS = (0, 2, 3, 4, 6, 7, 8, 9)


def filters(network: RBM, count: int) -> torch.Tensor:
    """Weights of the hidden bits that matter most, each on a scale of its own, in [-1, 1]."""
    weight = network.weight.detach().T
    chosen = weight[weight.norm(dim=1).argsort(descending=True)[:count]]
    scale = chosen.abs().quantile(0.995, dim=1, keepdim=True)
    return (chosen / scale).clamp(-1, 1).reshape(count, *network.event_shape)


@torch.no_grad()
def means(network: RBM, x: torch.Tensor) -> torch.Tensor:
    """Mean of the image given the hidden bits at their probabilities given x, in [-1, 1]."""
    told = network.conditionals()
    assert told.weight is not None
    assert told.precision is not None
    eta = told.field + network.features(x) @ told.weight.T
    return (eta / told.precision).clamp(-1, 1).reshape(x.shape)


def guided(
    rbm: ceb.Energy, term: ceb.Energy, pool: torch.Tensor, sampler: ceb.MALA, seed: int
) -> torch.Tensor:
    """Samples of the RBM and a weighted term in one sum, (SIDE, *event).

    Chains start where the sum is likely, from samples of the RBM drawn in proportion to exp(-term).
    """
    with torch.no_grad():
        share = (-term(pool)).softmax(0)
    generator = torch.Generator().manual_seed(seed)
    start = pool[torch.multinomial(share, SIDE, replacement=True, generator=generator)]
    return ceb.sample(rbm + term, init=start, num_steps=300, sampler=sampler, seed=seed).samples


def plot_energies(ax: Axes, runs: dict[str, tuple[ceb.SampleResult, str]], excess: float) -> None:
    """Mean free energy of the chains after each step, and where each kernel ends, with its standard error.

    Args:
        ax: Where to draw.
        runs: Name -> result and colour.
        excess: What Langevin's step is known to add, in nats.
    """
    for name, (out, colour) in runs.items():
        last = out.energies
        assert last is not None
        ends = f"{float(last.mean()):.0f} ± {float(last.std() / len(last) ** 0.5):.0f}"
        ends += f", of it {excess:.0f} by its step" if name == "Langevin" else ""
        energy = out.trace.energy.mean(1)
        ax.plot(range(1, len(energy) + 1), energy, color=colour, label=f"{name}: {ends}")
    ax.set(xscale="log", xlabel="step", ylim=(-200, 450))
    ax.set_title("Free energy (nats) from the same noise", loc="left", fontsize=10.5)
    ax.legend(fontsize=8.5, loc="lower left", title="at the end", alignment="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--expert", default="reals/rbm")
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=IMAGES / "gaussian_rbm.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rbm = ceb.load_expert(options.expert)
    network = rbm.network
    assert isinstance(network, RBM)
    digits = ceb.load_expert("contrastive_digits/digit")
    variance = float(torch.as_tensor(network.noise)) ** 2
    count = SIDE * SIDE
    start = 2 * torch.rand(count, *network.event_shape, generator=torch.Generator().manual_seed(0)) - 1

    mala = ceb.MALA(step_size=0.15 * variance)  # of which it accepts 57 %
    kernels = {
        "block Gibbs": (ceb.Gibbs(), BLUE),
        "MALA": (mala, GREEN),
        "Langevin": (ceb.Langevin(step_size=STEP * variance), ORANGE),
    }
    runs = {
        name: (ceb.sample(rbm, init=start, num_steps=options.num_steps, sampler=kernel, seed=1), colour)
        for name, (kernel, colour) in tqdm(kernels.items(), disable=None)
    }
    pool = ceb.sample(rbm, num_chains=POOL, num_steps=300, sampler=ceb.Gibbs(), seed=2).samples
    rows = [
        guided(rbm, WEIGHT * ceb.ratio(digits[value], digits["any"]), pool, mala, value)
        for value in tqdm(DIGITS, disable=None)
    ]

    panels = {
        f"Filters, {count} of {network.weight.shape[1]}": filters(network, count),
        "Block Gibbs": means(network, runs["block Gibbs"][0].samples),
        "MALA, on the free energy": means(network, runs["MALA"][0].samples),
        f"rbm + {WEIGHT}*ratio(digit[k], any), by MALA": means(network, torch.cat(rows)),
    }
    fig, (axes,) = figure(1, 5, 19, 4.1)
    for ax, (title, images) in zip(axes, panels.items(), strict=False):
        ax.imshow(image_grid(images, SIDE, padding=1, background=110))
        ax.set_title(title, loc="left", fontsize=10.5)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    plot_energies(axes[-1], runs, start[0].numel() / 2 * (1 / (1 - STEP / 2) - 1))
    save_figure(fig, options.out, dpi=100)
    print(options.out)


if __name__ == "__main__":
    main()
