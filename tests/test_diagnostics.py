"""Effective sample size and R-hat against the reference implementation."""

import math

import pytest
import torch
from helpers import points

from composable_ebm.sampling.diagnostics import ess, r_hat


def autoregressive(phi, draws=500, chains=4, seed=0):
    """Stationary AR(1) chains of unit variance, (draws, chains)."""
    xi = points(draws, (chains,), seed, torch.float64)
    x = [xi[0]]
    for step in xi[1:]:
        x.append(phi * x[-1] + math.sqrt(1 - phi**2) * step)
    return torch.stack(x)


CHAINS = {
    "independent": autoregressive(0.0),
    "correlated": autoregressive(0.9),
    "antithetic": autoregressive(-0.6),
    "odd number of draws": autoregressive(0.5, draws=301),
    "one chain": autoregressive(0.5, chains=1),
    "many chains": autoregressive(0.7, draws=50, chains=64),
    "four draws": autoregressive(0.0, draws=4),
    "shifted": autoregressive(0.3) + torch.tensor([0.0, 0.0, 0.0, 1.0]),
    "scaled": autoregressive(0.3) * torch.tensor([1.0, 1.0, 1.0, 4.0]),
    "drifting": autoregressive(0.3) + torch.linspace(0, 2, 500)[:, None],
    "heavy tails": autoregressive(0.3).mul(1.5).tan(),
    "ties": autoregressive(0.5).round(),
    "float32 with an offset": (autoregressive(0.5) + 1000).float(),
}


@pytest.fixture(params=CHAINS)
def draws(request):
    return CHAINS[request.param]


@pytest.fixture(scope="module")
def arviz():
    return pytest.importorskip("arviz_stats.base").array_stats


def test_ess_is_the_bulk_ess_of_arviz(draws, arviz):
    expected = float(arviz.ess(draws.double().T.numpy(), chain_axis=0, draw_axis=1, method="bulk"))
    assert ess(draws) == pytest.approx(expected, rel=1e-6)


def test_r_hat_is_the_rank_normalised_split_r_hat_of_arviz(draws, arviz):
    if draws.shape[1] == 1:
        pytest.skip("arviz wants two chains; see test_one_chain_is_compared_with_itself")
    expected = float(arviz.rhat(draws.double().T.numpy(), chain_axis=0, draw_axis=1, method="rank"))
    assert r_hat(draws) == pytest.approx(expected, rel=1e-6)


def test_ess_of_autoregressive_chains_is_that_of_theory():
    # Many draws: n (1 - φ)/(1 + φ).
    for phi in (0.0, 0.5, 0.8):
        draws = autoregressive(phi, draws=4000, chains=8)
        assert ess(draws) == pytest.approx(draws.numel() * (1 - phi) / (1 + phi), rel=0.12)


def test_r_hat_is_one_for_chains_that_agree_and_large_otherwise():
    assert r_hat(CHAINS["independent"]) < 1.01
    for name in ("shifted", "scaled", "drifting"):
        assert r_hat(CHAINS[name]) > 1.05


def test_one_chain_is_compared_with_itself():
    assert r_hat(autoregressive(0.2, chains=1)) < 1.02
    assert r_hat(autoregressive(0.2, chains=1) + torch.linspace(0, 4, 500)[:, None]) > 1.2


@pytest.mark.parametrize("diagnostic", [ess, r_hat])
def test_diagnostics_do_not_depend_on_units(diagnostic):
    draws = CHAINS["correlated"]
    assert diagnostic(1e6 * draws - 5) == pytest.approx(diagnostic(draws))
    assert diagnostic(draws.exp()) == pytest.approx(diagnostic(draws), rel=0.05)


@pytest.mark.parametrize("diagnostic", [ess, r_hat])
@pytest.mark.parametrize(
    "draws",
    [
        torch.zeros(0, 4),
        torch.randn(3, 4),
        torch.full((10, 2), math.nan),
        torch.zeros(10, 0),
    ],
    ids=["none", "three", "nan", "no chains"],
)
def test_diagnostics_are_nan_where_they_are_not_defined(diagnostic, draws):
    assert math.isnan(diagnostic(draws))


def test_constants_are_as_many_draws_as_there_are():
    assert ess(torch.ones(10, 4)) == 40
    assert math.isnan(r_hat(torch.ones(10, 4)))


def published(draws):
    """The bulk ESS of (draws, chains) by Vehtari et al. (2021), as Stan and ArviZ write it, lag by lag."""
    half = len(draws) // 2
    x = torch.cat([draws[:half], draws[-half:]], dim=1).double()
    rank = x.flatten().argsort().argsort().double() + 1
    z = torch.special.ndtri((rank - 3 / 8) / (x.numel() + 1 / 4)).reshape(x.shape)
    n, chains = z.shape
    d = z - z.mean(0)
    lags = [(d[: n - k] * d[k:]).sum(0).mean() / n for k in range(n)]
    within = lags[0] * n / (n - 1)
    total = lags[0] + (z.mean(0).var() if chains > 1 else 0)
    rho, t, even, odd = [1.0] + [0.0] * n, 1, 1.0, float(1 - (within - lags[1]) / total)
    rho[1] = odd
    while t < n - 3 and even + odd > 0:
        even, odd = (float(1 - (within - lags[t + k]) / total) for k in (1, 2))
        if even + odd >= 0:
            rho[t + 1], rho[t + 2] = even, odd
        t += 2
    last = t - 2
    if even > 0:
        rho[last + 1] = even
    for k in range(1, last - 1, 2):
        if rho[k + 1] + rho[k + 2] > rho[k - 1] + rho[k]:
            rho[k + 1] = rho[k + 2] = (rho[k - 1] + rho[k]) / 2
    tau = -1 + 2 * sum(rho[: last + 1]) + rho[last + 1]
    return n * chains / max(tau, 1 / math.log10(n * chains))


@pytest.mark.parametrize("num", [*range(4, 24), 60])
def test_ess_of_few_draws_is_the_published_one(num):
    generator = torch.Generator().manual_seed(num)
    for chains in (1, 2, 8):
        for memory in (-0.5, 0.0, 0.5, 0.95):
            draws = torch.randn(num, chains, generator=generator)
            for i in range(1, num):
                draws[i] += memory * draws[i - 1]
            assert ess(draws) == pytest.approx(published(draws), rel=1e-3)


def test_one_infinite_draw_makes_both_undefined():
    draws = CHAINS["independent"].clone()
    draws[7, 2] = math.inf
    assert math.isnan(ess(draws))
    assert math.isnan(r_hat(draws))


@pytest.mark.parametrize("diagnostic", [ess, r_hat])
@pytest.mark.parametrize("shape", [(8,), (8, 2, 1)])
def test_draws_are_draws_by_chains(diagnostic, shape):
    with pytest.raises(ValueError, match=r"`draws` must have shape \(draws, chains\), got \(8"):
        diagnostic(torch.zeros(shape))
