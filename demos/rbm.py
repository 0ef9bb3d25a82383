"""What a restricted Boltzmann machine of digits has learned, drawn, and composed.

Filters are the weights of single hidden units. Fantasies are long Gibbs chains, completions Gibbs
chains whose upper half is held. The last panel is a composition that Gibbs sampling refuses, since
a convolutional network has no conditionals in closed form: the RBM times p(digit | x) of another
family's expert, asked about bits, sampled by DMALA along the gradient of both; a row a digit.

    python demos/rbm.py --out rbm.png
    python demos/rbm.py --likelihood      # log Z by annealed importance sampling as well, a minute
"""

import argparse
from pathlib import Path

import torch

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.partition.log_z import log_z
from composable_ebm.plotting import figure, image_grid, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIDE = 8  # images a row and column of every panel
POOL, WEIGHT = 512, 3


def data_bits(split: str, count: int, seed: int = 0) -> torch.Tensor:
    """Images drawn from a split as bits, grey levels as odds, (count, 1, 28, 28)."""
    generator = torch.Generator().manual_seed(seed)
    data = load_data("digits", split)
    index = torch.randperm(len(data), generator=generator)[:count]
    return torch.bernoulli((data.batch(index) + 1) / 2, generator=generator)


def probabilities(network: RBM, x: torch.Tensor) -> torch.Tensor:
    """p(vᵢ = 1 | h) after the hidden units given x, whose mean the next sweep would draw from."""
    with torch.no_grad():
        told = network.conditionals()
        h = torch.bernoulli(network.features(x), generator=torch.Generator().manual_seed(0))
        return (told.field + h @ told.weight.T).sigmoid().reshape(x.shape)  # type: ignore[union-attr]


def filters(network: RBM, count: int) -> torch.Tensor:
    """Weights of the hidden units that matter most, each on a scale of its own, in [-1, 1]."""
    weight = network.weight.detach().T
    chosen = weight[weight.norm(dim=1).argsort(descending=True)[:count]]
    scale = chosen.abs().quantile(0.995, dim=1, keepdim=True)
    return (chosen / scale).clamp(-1, 1).reshape(count, 1, 28, 28)


def guided(rbm: ceb.Energy, digits: ceb.Expert, value: int, pool: torch.Tensor, num: int) -> torch.Tensor:
    """Samples of the RBM times p(value | x)³, (num, 1, 28, 28).

    Chains start where the product is likely, from samples of the RBM drawn in proportion to
    p(value | x)³, as moves of a few bits rarely turn one digit into another.
    """
    ratio = ceb.ratio(ceb.on_bits(digits[value]), ceb.on_bits(digits["any"]))
    with torch.no_grad():
        share = (-WEIGHT * ratio(pool)).softmax(0)
    generator = torch.Generator().manual_seed(value)
    start = pool[torch.multinomial(share, num, replacement=True, generator=generator)]
    kernel = ceb.DMALA(0.3, target_acceptance=0.6)
    out = ceb.sample(
        rbm + WEIGHT * ratio, init=start, num_steps=150, num_warmup=50, sampler=kernel, seed=value
    )
    return out.samples


def likelihood(rbm: ceb.Energy) -> str:
    """log Z and the log likelihood of test images, in words."""
    train, test = data_bits("train", 1000), data_bits("test", 2000)
    start = train.flatten(1).mean(0).clamp(0.01, 0.99).logit()
    z = log_z(rbm, levels=2000, start=start, init=train[:100], burn_in=100)
    with torch.no_grad():
        mean = -float(rbm(test).mean()) - z.value
    return (
        f"log Z {z.value:.2f} ± {z.error:.2f} nats (towards {z.forward:.2f}, back {z.backward:.2f}); "
        f"log likelihood of test images {mean:.2f} nats"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--expert", default="bits/rbm")
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--likelihood", action="store_true")
    parser.add_argument("--out", type=Path, default=IMAGES / "rbm.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rbm = ceb.load_expert(options.expert)
    network: RBM = rbm.network  # type: ignore[assignment]
    count = SIDE * SIDE

    pool = ceb.sample(rbm, num_chains=POOL, num_steps=options.num_steps, seed=2).samples
    fantasies = pool[:count]
    test = data_bits("test", SIDE).repeat_interleave(SIDE, dim=0)
    mask = torch.zeros(1, 28, 28)
    mask[:, 14:] = 1
    completed = ceb.sample(rbm, init=test, mask=mask, num_steps=300, seed=3).samples
    shown = torch.where(mask.bool(), probabilities(network, completed), test)
    digits = ceb.load_expert("contrastive_digits/digit")
    rows = [guided(rbm, digits, value, pool, SIDE) for value in (0, 2, 3, 4, 6, 7, 8, 9)]

    panels = {
        f"Filters, {count} of {network.weight.shape[1]}": filters(network, count),
        f"Fantasies after {options.num_steps} sweeps": 2 * probabilities(network, fantasies) - 1,
        "Lower halves sampled, upper given": 2 * shown - 1,
        f"rbm + {WEIGHT}*ratio(on_bits(digit[k]), any)": 2 * probabilities(network, torch.cat(rows)) - 1,
    }
    fig, (axes,) = figure(1, 4, 15, 4.1)
    for ax, (title, images) in zip(axes, panels.items(), strict=True):
        ax.imshow(image_grid(images, SIDE, padding=1, background=110))
        ax.set_title(title, loc="left", fontsize=10.5)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    save_figure(fig, options.out, dpi=110)
    if options.likelihood:
        print(likelihood(rbm))
    print(options.out)


if __name__ == "__main__":
    main()
