"""Figures of merit for sets of samples; each is a small function with a source."""

from __future__ import annotations

import torch
from torch import Tensor

from composable_ebm.proportions import wilson_interval

__all__ = [
    "entropy",
    "frechet_distance",
    "kolmogorov_smirnov",
    "nearest_distance",
    "precision_recall",
    "wilson_interval",
]


def entropy(shares: Tensor) -> float:
    """-Σ p log p in nats, of shares that sum to 1."""
    p = shares[shares > 0].double()
    return float(-(p * p.log()).sum())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, (n, dimension) each:

        ‖μₐ - μ_b‖² + tr(Cₐ + C_b - 2 (Cₐ C_b)^½).

    In a judge's features it is `fid_attr`, and is not comparable with published FIDs.

    Reference:
        Heusel et al. (2017), arXiv 1706.08500, eq. 6.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of (Cₐ C_b)^½ is the sum of the roots of the eigenvalues of Cₐ^½ C_b Cₐ^½.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest difference between the distribution functions of two sets of numbers, (n,) and (m,)."""
    a, b = a.sort().values, b.sort().values
    points = torch.cat([a, b])
    shares = [torch.searchsorted(x, points, right=True).double() / len(x) for x in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples inside the manifold of real features, and the reverse.

    A set's manifold is the union of balls around its points that reach their k-th neighbour.

    Args:
        real: Features of data, (n, dimension).
        fake: Features of samples, (m, dimension).
        neighbours: k.
    Reference:
        Kynkäänniemi et al. (2019), arXiv 1904.06991, eq. 1 and 2.
    """

    def covered(points: Tensor, manifold: Tensor) -> float:
        radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
        return float((torch.cdist(points, manifold) <= radii).any(dim=1).float().mean())

    return covered(fake, real), covered(real, fake)


def nearest_distance(x: Tensor, reference: Tensor, chunk: int = 256) -> Tensor:
    """Euclidean distance in pixels of each image to its nearest in a set, (n,)."""
    flat = reference.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).min(dim=1).values for part in x.split(chunk)])
