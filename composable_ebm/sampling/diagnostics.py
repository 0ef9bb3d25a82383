"""Diagnostics: effective sample size and split R-hat of chains, Fisher divergence of energies.

Draws are a tensor (draws, chains) of one scalar statistic. Both diagnostics of chains are computed on
rank-normalised draws of split chains, so that they neither need finite variance nor miss a drift
within chains.

Reference:
    Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and
    localization: an improved R-hat, arXiv 1903.08008, sections 3.1, 3.2 and 4.1.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from composable_ebm.energy import flat

CONSTANT = 1e-15
"""Draws that differ by less are one and the same."""

__all__ = ["ess", "fisher_divergence", "r_hat"]


class Scored(Protocol):
    """What has a score, as every energy does."""

    def score(self, x: Tensor) -> Tensor: ...


def ess(draws: Tensor) -> float:
    """Bulk effective sample size: how many independent draws carry as much information.

    Args:
        draws: Shape (draws, chains), at least 4 draws.
    Returns:
        Between 0 and draws · chains · log10(draws · chains); the number of draws where they are all the
        same, as in ArviZ, and NaN where it is not defined.
    """
    split = _split(draws)
    if split is None:
        return math.nan
    return _effective(_rank_normalise(split))


def r_hat(draws: Tensor) -> float:
    """Split R-hat: the larger of the bulk's and the tails'. Near 1 if chains agree; above 1.01, not.

    Args:
        draws: Shape (draws, chains), at least 4 draws.
    Returns:
        A number of at least about 1; NaN where it is not defined.
    """
    split = _split(draws)
    if split is None:
        return math.nan
    # torch's median is the lower of the two middle draws.
    folded = (split - (split.median() - (-split).median()) / 2).abs()
    return max(_potential_reduction(_rank_normalise(s)) for s in (split, folded))


def _split(draws: Tensor) -> Tensor | None:
    """Each chain cut in two halves: (draws/2, 2 chains); None without enough finite draws."""
    if draws.ndim != 2:
        raise ValueError(f"`draws` must have shape (draws, chains), got {tuple(draws.shape)}.")
    half = draws.shape[0] // 2
    draws = draws.detach().to("cpu", torch.float64)
    if half < 2 or not draws.shape[1] or not draws.isfinite().all():
        return None
    return torch.cat([draws[:half], draws[-half:]], dim=1)


def _rank_normalise(draws: Tensor) -> Tensor:
    """Φ⁻¹((r - 3/8)/(S + 1/4)), with r the average rank among all S draws."""
    _, inverse, counts = draws.flatten().unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0) - (counts - 1) / 2
    quantile = (rank - 3 / 8) / (draws.numel() + 1 / 4)
    return torch.special.ndtri(quantile)[inverse].reshape(draws.shape)


def _potential_reduction(draws: Tensor) -> float:
    n = draws.shape[0]
    within = draws.var(dim=0).mean()
    between = n * draws.mean(dim=0).var()
    if within == 0:
        return math.nan
    return math.sqrt((between / within + n - 1) / n)


def _effective(draws: Tensor) -> float:
    """Geyer's initial monotone sequence on the autocorrelations of all chains together."""
    n, chains = draws.shape
    total = n * chains
    if float(draws.max() - draws.min()) < CONSTANT:
        return float(total)
    centred = draws - draws.mean(dim=0)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=0)
    autocovariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n] / n
    within = autocovariance[0].mean() * n / (n - 1)
    variance = within * (n - 1) / n + (draws.mean(dim=0).var() if chains > 1 else 0.0)
    rho = (1 - (within - autocovariance.mean(dim=1)) / variance).tolist()
    rho[0] = 1.0
    # Pairs of lags as long as their sum is positive, up to where the reference implementations stop.
    pairs = [rho[0] + rho[1]]
    t = 1
    while t < n - 3 and pairs[-1] > 0:
        pairs.append(rho[t + 1] + rho[t + 2])
        t += 2
    # The even lag after the last pair improves the estimate for antithetic chains.
    end, after = len(pairs) - 1, rho[t - 1] if pairs[-1] >= 0 else max(0.0, rho[t - 1])
    monotone = torch.tensor(pairs[:end]).cummin(dim=0).values.sum() if end else 0.0
    tau = -1 + 2 * float(monotone) + after
    return total / max(tau, 1 / math.log10(total))


def fisher_divergence(energy: Scored, truth: Scored, x: Tensor) -> float:
    """½ mean ‖∇E - ∇E*‖² over samples of the truth: how far the gradients of an energy are off.

    It is 0 where both are one density up to a constant, and blind to the proportions of modes that do
    not touch: gradients do not know them.

    Args:
        energy: What was learned.
        truth: The energy E* of the density that `x` was drawn from.
        x: Samples of it, (batch, *event).
    Reference:
        Hyvärinen (2005), Estimation of non-normalized statistical models by score matching, eq. 2.
    """
    difference = (energy.score(x) - truth.score(x)).detach()
    return float(flat(difference).square().sum(1).mean() / 2)
