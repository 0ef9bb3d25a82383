"""Diffusion pipelines as experts: one network, and an expert for every prompt.

A pipeline of `diffusers` is a network, a text encoder, a codec and a schedule. `from_pipeline` makes an
energy of it, known by its gradient: by itself the pipeline's p(x), `sd["a castle"]` its p(x | prompt), both
on the latents of its codec. They compose as all experts do.

    denoiser     what a prompted network is, whoever trained it
    prompts      the energies, and the one pass in which all prompts of a composition are evaluated
    schedulers   noise levels and parametrisation of a `diffusers` scheduler
    vae          the codec
    kinds        one adapter for each kind of pipeline

Nothing here imports `diffusers`: what is used of a pipeline are its parts and their public calls.
"""

from composable_ebm.pipelines.denoiser import Condition, PromptedDenoiser
from composable_ebm.pipelines.kinds import from_pipeline, load_pipeline
from composable_ebm.pipelines.prompts import Pipeline, Prompt

__all__ = ["Condition", "Pipeline", "Prompt", "PromptedDenoiser", "from_pipeline", "load_pipeline"]
