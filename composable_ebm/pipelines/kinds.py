"""Which pipelines are known, by the name of their class, and `from_pipeline`."""

from __future__ import annotations

from typing import Any

import torch

from composable_ebm.pipelines.adapter import PipelineDenoiser
from composable_ebm.pipelines.flow import Flux, StableDiffusion3
from composable_ebm.pipelines.prompts import Pipeline
from composable_ebm.pipelines.stable_diffusion import StableDiffusion, StableDiffusionXL
from composable_ebm.pipelines.transformer import ClassTransformer
from composable_ebm.pipelines.unconditional import PixelNetwork

KINDS: dict[str, type[PipelineDenoiser]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "DiTPipeline": ClassTransformer,
    "DDPMPipeline": PixelNetwork,
    "DDIMPipeline": PixelNetwork,
}

__all__ = ["KINDS", "from_pipeline", "load_pipeline"]


def from_pipeline(
    pipe: Any,
    *,
    name: str | None = None,
    height: int | None = None,
    width: int | None = None,
    weight: float | None = None,
    num_steps: int | None = None,
    rows_at_once: int | None = None,
    embedded_guidance: float = 3.5,
) -> Pipeline:
    """A pipeline of `diffusers` as an energy, and each prompt as an expert.

    The pipeline stays as it is set: device, precision, offloading, safety checker, scheduler. Load it in
    half precision to save memory; chains are kept in float32 whatever the network runs in.

    Known kinds: Stable Diffusion 1, 2 and XL (predicting noise, the clean data or v; schedules that end in
    pure noise included), Stable Diffusion 3 and Flux (flow matching), DiT, and unconditional or
    class-conditional networks of pixels (DDPM, EDM).

    Args:
        pipe: The pipeline.
        name: What recipes print; that of the kind unless given.
        height: Of the pictures in pixels; what the network was trained at unless given.
        width: The same.
        weight: What `given` takes prompts with; the guidance scale that the pipeline uses unless given.
        num_steps: Noise levels of a run; what the pipeline uses unless given.
        rows_at_once: Rows of one pass of the network, chains times prompts, where memory is short.
        embedded_guidance: What networks are told that were distilled with a guidance scale (Flux-dev).
    Returns:
        The energy of p(x). `energy[prompt]` are its experts.
    Raises:
        TypeError: If the pipeline is of no known kind.
        ValueError: If its network or scheduler is of a kind that cannot be asked for a score.
    Example:
        >>> sd = from_pipeline(StableDiffusionPipeline.from_pretrained(folder))
        >>> mix = given(sd, sd["a castle"], sd["at night"], ~sd["people"], weight=7)
        >>> sample(mix, num_chains=4, seed=0).save("castle.png")
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]
    kind = next((KINDS[each] for each in names if each in KINDS), None)
    if kind is None:
        raise TypeError(
            f"`pipe` must be a pipeline of diffusers of a known kind ({', '.join(KINDS)}), got "
            f"{type(pipe).__name__}. For another network subclass composable_ebm.pipelines.PromptedDenoiser "
            "and give it to Pipeline(denoiser, name)."
        )
    denoiser = kind(pipe, height, width, embedded_guidance)
    denoiser.rows_at_once = rows_at_once
    denoiser.weight = kind.weight if weight is None else float(weight)
    denoiser.num_steps = kind.num_steps if num_steps is None else int(num_steps)
    return Pipeline(denoiser, name or kind.short_name)


def load_pipeline(place: str, device: torch.device | str = "cpu", **options: Any) -> Pipeline:
    """A pipeline of `diffusers` from a folder or the Hub, as `from_pipeline` makes it; safetensors only.

    Args:
        place: A folder, or a name on the Hub.
        device: Where to put it.
        options: For `from_pipeline`.
    Raises:
        ImportError: If `diffusers` is not installed.
    """
    try:
        from diffusers import DiffusionPipeline  # optional, and slow to load
    except ImportError as error:
        raise ImportError(f"{place} needs diffusers: pip install 'composable_ebm[diffusers]'.") from error
    return from_pipeline(DiffusionPipeline.from_pretrained(place, use_safetensors=True).to(device), **options)
