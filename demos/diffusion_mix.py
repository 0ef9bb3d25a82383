"""A diffusion model, a contrastive energy and a classifier in one sum.

Three kinds of model that never met, each knowing one thing about cartoon faces:

    diffusion   a denoiser: the score of p(x), and no energy          diffusion/base
    energy      an energy that learned by contrast with its samples   contrastive_faces/glasses
    classifier  p(curly | x, σ), trained here in seconds              from_classifier

Their sum is sampled by one engine. Each row starts from the same noise, so that a column is one face, and
what the added term changed in it can be seen.

    python demos/diffusion_mix.py --out diffusion_mix.png
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.plotting import INK, figure, image_grid, save_figure
from composable_ebm.sampling.request import calibrated_sampler

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
NUM_CHAINS, NUM_STEPS, SEED = 12, 160, 5


class NoisyClassifier(nn.Module):
    """Logits of one attribute from images that carry noise of level σ."""

    def __init__(self, pixels: int, labels: int, hidden: int = 192) -> None:
        super().__init__()
        self.first = nn.Linear(pixels, hidden)
        self.level = nn.Linear(16, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, labels)

    def forward(self, x: Tensor, noise_level: Tensor | None) -> Tensor:
        sigma = x.new_full((len(x),), 0.02) if noise_level is None else noise_level.expand(len(x))
        waves = sigma.log()[:, None] * torch.linspace(0.2, 3, 8)
        level = self.level(torch.cat([waves.sin(), waves.cos()], dim=1))
        h = F.silu(self.first(x.flatten(1) * (0.3 + sigma.square())[:, None].rsqrt()) + level)
        return self.head(h + F.silu(self.second(h)))


def train_classifier(attribute: str, iterations: int) -> ceb.Energy:
    """p(attribute | x, σ) as an energy, for noise levels up to 5."""
    data = load_data("faces", "train")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = NoisyClassifier(3 * 32 * 32, len(data.values[attribute]))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(iterations), desc=f"classifier of {attribute}", disable=None):
        index = torch.randint(len(data), (128,), generator=generator)
        sigma = torch.exp(-1.0 + 1.3 * torch.randn(128, generator=generator)).clamp(0.02, 5.0)
        x = data.batch(index)
        noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(model(noisy, sigma), data.labels[attribute][index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"classifier of {attribute}: cross-entropy {loss:.3f} over all noise levels")
    return ceb.from_classifier(
        model.requires_grad_(False),
        1,
        name=attribute,
        event_shape=data.event_shape,
        data_range=(-1.0, 1.0),
        noise_conditioned=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="diffusion/base")
    parser.add_argument("--iterations", type=int, default=400, help="of the classifier")
    parser.add_argument("--out", type=Path, default=IMAGES / "diffusion_mix.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    face = ceb.load_expert(options.base)
    glasses = ceb.load_expert("contrastive_faces/glasses")
    curly = train_classifier("curly", options.iterations)
    seeing = glasses.card.weight * ceb.ratio(glasses, glasses["any"])
    rows = {
        "diffusion": face,
        "+ contrastive\n(glasses)": face + seeing,
        "+ classifier\n(curly)": face + 3 * curly,
        "+ both": face + seeing + 3 * curly,
    }
    sampler, _ = calibrated_sampler(face)
    fig, axes = figure(len(rows), 1, 9.6, 3.2)
    for ax, (title, energy) in zip(axes[:, 0], rows.items(), strict=True):
        out = ceb.sample(energy, num_chains=NUM_CHAINS, num_steps=NUM_STEPS, sampler=sampler, seed=SEED)
        ax.imshow(image_grid(out.samples, columns=NUM_CHAINS, scale=3))
        ax.set_axis_off()
        ax.text(-0.012, 0.5, title, transform=ax.transAxes, ha="right", va="center", fontsize=9, color=INK)
        print(f"{title!r}: {energy}")
    save_figure(fig, options.out, dpi=130)
    print(out.report())
    print(options.out)


if __name__ == "__main__":
    main()
