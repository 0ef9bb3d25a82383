"""A deep belief network of digits: an RBM on the hidden units of the shipped one.

The second layer is trained greedily (a few minutes; kept under runs/ and used again). Left, images
from Gibbs sampling in the top RBM and one pass down. Right, how well a linear classifier reads the
digit from pixels, from the hidden units of one RBM, and from those of both layers.

    python demos/dbn.py --out dbn.png
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import composable_ebm as ceb
from composable_ebm.boltzmann import DeepBelief
from composable_ebm.data import load_data
from composable_ebm.plotting import BLUE, GREY, INK, figure, image_grid, save_figure
from composable_ebm.train import read_config, train_layers

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TEST = 10_000, 10_000


def probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-3) -> float:
    """Test accuracy of multinomial logistic regression on features (n, size), fitted by L-BFGS."""
    mean, scale = train.mean(0), train.std(0) + 0.1
    train, test = (train - mean) / scale, (test - mean) / scale
    weight = torch.zeros(train.shape[1], 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(((test @ weight + bias).argmax(1) == test_labels).float().mean())


def deep_belief(config: Path, iterations: int, runs: Path) -> DeepBelief:
    """The shipped RBM and one above it, trained unless it lies under `runs`."""
    first = ceb.load_expert("bits/rbm")
    settings = replace(
        read_config(config),
        name="second_layer",
        num_iterations=iterations,
        evaluate_every=iterations,
        models=str(runs),
        runs=str(runs / "logs"),
    )
    if (settings.model_folder / "config.json").exists():
        second = ceb.load_expert(settings.model_folder)
    else:
        second = train_layers([settings], below=[first])[-1]
    return DeepBelief([first.network, second.network])  # type: ignore[list-item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "deep_belief")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/dbn.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = deep_belief(ROOT / "configs/bits/rbm.toml", options.iterations, options.runs)

    train, test = load_data("digits", "train"), load_data("digits", "test")
    pixels = [(data.batch(torch.arange(n)) + 1) / 2 for data, n in ((train, TRAIN), (test, TEST))]
    labels = [train.labels["digit"][:TRAIN], test.labels["digit"][:TEST]]
    one, two = ([network.features(x, depth) for x in pixels] for depth in (1, 2))
    both = [torch.cat(pair, dim=1) for pair in zip(one, two, strict=True)]
    accuracy = {
        name: probe(seen, labels[0], unseen, labels[1])
        for name, (seen, unseen) in {
            "pixels": [x.flatten(1) for x in pixels],
            "one RBM": one,
            "second layer": two,
            "both layers": both,
        }.items()
    }
    images, _ = network.sample(num_chains=80, num_steps=1000, seed=1)

    fig, ((picture, ax),) = figure(1, 2, 9.5, 4.0, width_ratios=[1.35, 1])
    picture.imshow(image_grid(2 * images - 1, 10, padding=1, background=110))
    picture.set_title("From the top RBM, down", loc="left")
    picture.set(xticks=[], yticks=[])
    picture.grid(False)
    picture.spines[:].set_visible(False)
    names = list(accuracy)
    errors = [100 * (1 - accuracy[name]) for name in names]
    ax.barh(names, errors, color=[GREY, BLUE, BLUE, BLUE], height=0.6)
    for y, error in enumerate(errors):
        ax.text(error, y, f" {error:.1f} %", va="center", color=INK)
    ax.set(xlim=(0, 1.2 * max(errors)), xlabel="test images that a linear classifier gets wrong (%)")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_title(f"Linear probe, {TRAIN:,} labels", loc="left")
    save_figure(fig, options.out, dpi=110)
    print(", ".join(f"{name} {100 * value:.2f} %" for name, value in accuracy.items()))
    print(options.out)


if __name__ == "__main__":
    main()
