"""Diffusion models as noise-conditioned energies: scores, denoisers, noise predictors.

A diffusion model knows the score of data plus Gaussian noise, at every noise level σ, by the denoiser
D(x, σ), its best guess of the clean data in x = clean + σξ, ξ standard normal:

    ∂E/∂x = (x - D)/σ²

`parametrisation` tells how networks that were trained on other schedules, and that answer noise or
velocities, are asked for it.

There is no energy to compare, only its gradient: such energies have `has_value = False`. In sums,

    base + Σᵢ wᵢ (eᵢ - base),

is the composable-diffusion formula. Where the summed scores are not the score of the diffused sum, which
is everywhere but at σ = 0, Langevin steps at each noise level correct it; MALA and HMC do so exactly,
but need energies: a network written as one, by its `form`, has them.

Reference:
    Liu et al. (2022), Compositional visual generation with composable diffusion models, arXiv
    2206.01714, eq. 11. Du et al. (2023), Reduce, reuse, recycle, arXiv 2302.11552, sections 4 and 5.
    Salimans and Ho (2021), Should EBMs model the energy or the score?, for the residual form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from composable_ebm.energy import Energy, flat, known_by_gradient
from composable_ebm.energy.adapters import name_of
from composable_ebm.energy.closures import as_module
from composable_ebm.energy.parametrisation import Parametrisation, VariancePreserving

FORMS = ("score", "residual")

__all__ = ["from_denoiser", "from_diffusers", "from_noise_predictor", "from_score"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""States (batch, *event) and noise levels (batch,) -> denoised states (batch, *event)."""


class _Score(Energy):
    """Known by its gradient -s(x), or -s(x, σ)."""

    has_value = False
    wide_states = True

    def __init__(self, score: Callable[..., Tensor], noise_conditioned: bool) -> None:
        super().__init__()
        self.score_function = as_module(score)
        self.noise_conditioned = noise_conditioned

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        at = x.detach()
        others = (noise_level,) if self.noise_conditioned else ()
        return known_by_gradient(x, -_like(_answer(self.score_function, at, *others), x, "a score"))


class _Denoiser(Energy):
    """(x - D)/σ² as a gradient, or ‖x - D‖²/(2σ²) as an energy."""

    noise_conditioned = True
    wide_states = True

    def __init__(self, denoise: Denoise, noise_range: Sequence[float], form: str) -> None:
        super().__init__()
        low, high = map(float, noise_range)
        if not 0 < low < high:
            raise ValueError(f"`noise_range` must be (low, high) with 0 < low < high, got {noise_range}.")
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
        self.denoise = as_module(denoise)
        self.noise_range = (low, high)
        self.form = form
        self.has_value = form != "score"
        self.sampler_settings = _reverse_diffusion(low, high)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        sigma = x.new_full((), self.noise_range[0]) if noise_level is None else noise_level.to(x.dtype)
        sigma = sigma.clamp(*self.noise_range).expand(len(x))
        variance = sigma.square().reshape(-1, *[1] * (x.ndim - 1))
        if self.form == "score":
            at = x.detach()
            answer = _like(_answer(self.denoise, at, sigma), at, "a denoiser")
            return known_by_gradient(x, (at - answer) / variance)
        residual = x - _like(_answer(self.denoise, x, sigma), x, "a denoiser")
        return flat(residual.square() / (2 * variance)).sum(1)


def from_score(
    score: Callable[..., Tensor],
    *,
    name: str | None = None,
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = None,
    noise_conditioned: bool = False,
) -> Energy:
    """Any score s(x) = ∇ log p(x) as an energy that is known by its gradient alone.

    Args:
        score: States (batch, *event) -> scores of the same shape. Its parameters belong to the energy.
        name: What recipes print; the function's own name unless given.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the data; None if unbounded.
        noise_conditioned: Calls `score(x, noise_level)`; the level is None outside annealing.
    Example:
        >>> wind = from_score(lambda x: -x, name="wind")
    """
    return _described(_Score(score, noise_conditioned), score, name, event_shape, data_range)


def from_denoiser(
    denoiser: Denoise,
    *,
    noise_range: Sequence[float],
    form: str = "score",
    name: str | None = None,
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
) -> Energy:
    """A denoiser D(x, σ) as a noise-conditioned energy.

    Args:
        denoiser: Noisy states (batch, *event), noise levels (batch,) -> clean states.
        noise_range: Smallest and largest σ that it was trained for, in data units.
        form: "score": ∂E/∂x = (x - D)/σ², without a value, which is right for every denoiser.
            "residual": E = ‖x - D‖²/(2σ²), whose gradient autograd takes through D: only for networks
            that were trained as this energy. It has values, so MALA, HMC and mixtures work.
        name: What recipes print; the denoiser's own name unless given.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the data; None if unbounded.
    Raises:
        ValueError: If the range is empty or there is no such form.
    Example:
        >>> face = from_denoiser(network, noise_range=(0.02, 10.0), event_shape=(3, 32, 32))
        >>> out = sample(face + 3 * (smiling - face), num_chains=16)
    """
    energy = _Denoiser(denoiser, noise_range, form)
    return _described(energy, denoiser, name, event_shape, data_range)


def from_noise_predictor(
    model: Callable[..., Any],
    alphas_cumprod: Tensor | Sequence[float],
    *,
    predicts: str = "epsilon",
    form: str = "score",
    name: str | None = None,
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
) -> Energy:
    """A network ε(x_t, t) of a variance-preserving diffusion as a noise-conditioned energy.

    Args:
        model: States √ᾱ clean + √(1-ᾱ) ξ, (batch, *event), and times, (batch,), that need not be
            whole numbers -> predictions of the same shape; an object that holds them in `.sample`
            will do.
        alphas_cumprod: ᾱ at t = 0, 1, ..., falling, between 0 and 1.
        predicts: "epsilon", the noise; "sample", the clean data; or "v_prediction".
        form: See `from_denoiser`.
        name: What recipes print; the model's own name unless given.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the data; None if unbounded.
    Raises:
        ValueError: If the ᾱ do not fall, or there is no such prediction or form.
    """
    denoise = _Predictor(model, VariancePreserving(alphas_cumprod, predicts))
    noise_range = denoise.parametrisation.noise_range
    energy = _Denoiser(denoise, noise_range, form)
    return _described(energy, model, name, event_shape, data_range)


def from_diffusers(
    network: nn.Module,
    scheduler: Any,
    *,
    form: str = "score",
    name: str | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
) -> Energy:
    """An unconditional network of `diffusers`, such as a UNet2DModel, with the scheduler it was trained with.

    Args:
        network: Called as `network(x, t)`; its answer is in `.sample`.
        scheduler: Has `alphas_cumprod` and `config.prediction_type`, as DDPMScheduler has.
        form: See `from_denoiser`.
        name: What recipes print; the network's class unless given.
        data_range: Smallest and largest value of the data; None if unbounded.
    Raises:
        ValueError: If the scheduler has no `alphas_cumprod`.
    Example:
        >>> pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
        >>> cats = from_diffusers(pipeline.unet, pipeline.scheduler, name="cats")
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no `alphas_cumprod`: give the scheduler of the training, such "
            "as DDPMScheduler.from_config(scheduler.config), or use from_denoiser."
        )
    config, sizes = getattr(scheduler, "config", None), getattr(network, "config", None)
    predicts = getattr(config, "prediction_type", "epsilon")
    shape = None
    if sizes is not None and isinstance(size := getattr(sizes, "sample_size", None), (int, tuple, list)):
        height, width = (size, size) if isinstance(size, int) else size
        shape = (int(sizes.in_channels), int(height), int(width))
    return from_noise_predictor(
        network, alphas, predicts=predicts, form=form, name=name, event_shape=shape, data_range=data_range
    )


class _Predictor(nn.Module):
    """D(x, σ) of a network and its parametrisation."""

    def __init__(self, model: Callable[..., Any], parametrisation: Parametrisation) -> None:
        super().__init__()
        self.model = as_module(model)
        self.parametrisation = parametrisation

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        how = self.parametrisation
        answer = _answer(self.model, how.shown(x, sigma), how.time(sigma).to(x.dtype))
        if isinstance(answer, Tensor) and answer.shape[1:2] == (2 * x.shape[1],):
            raise ValueError(
                f"the network answers {answer.shape[1]} channels for states of {x.shape[1]}: it learned a "
                "variance as well, which comes second. Give the first half alone: "
                f"from_noise_predictor(lambda x, t: network(x, t).sample[:, :{x.shape[1]}], ...)."
            )
        return how.denoised(x, sigma, _like(answer, x, "a noise predictor"))


def _described(
    energy: Energy,
    function: Callable[..., Any],
    name: str | None,
    event_shape: Sequence[int] | None,
    data_range: tuple[float, float] | None,
) -> Energy:
    energy.name = name_of(function, name)
    energy.event_shape = None if event_shape is None else tuple(event_shape)
    energy.data_range = data_range
    return energy


def _answer(function: Callable[..., Any], x: Tensor, *others: Any) -> Any:
    """What a network says, in the type of `x`; one of 16 bits is shown `x` in 16 bits.

    Only the network works in 16 bits: (x - D)/σ² of states in 16 bits would be noise at small σ.
    """
    kind = None
    if isinstance(function, nn.Module) and not isinstance(function, _Predictor):
        kind = next((p.dtype for p in function.parameters() if p.dtype.itemsize == 2), None)
    answer = function(x if kind is None else x.to(kind), *others)
    answer = getattr(answer, "sample", answer)
    return answer.to(x.dtype) if isinstance(answer, Tensor) and kind is not None else answer


def _like(answer: Any, x: Tensor, what: str) -> Tensor:
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        got = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"{what} must return a tensor like its states, shape {tuple(x.shape)}, got {got}.")
    return answer


def _reverse_diffusion(low: float, high: float) -> Mapping:
    """A predictor step and two Langevin steps at each of 40 noise levels, see `sampling.from_settings`."""
    levels = {"knots": [[0.0, high], [1.0, low]], "between": "karras"}
    schedule = {"noise_level": levels, "noise_power": 2.0, "predict": True, "num_levels": 40}
    return {"kernel": "Langevin", "step_size": 0.3, "anneal": schedule, "num_steps": 80}
