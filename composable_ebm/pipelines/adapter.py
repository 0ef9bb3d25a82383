"""What all pipelines of `diffusers` have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from composable_ebm.pipelines.denoiser import Condition, PromptedDenoiser
from composable_ebm.pipelines.schedulers import learns_variance, noise_levels, parametrisation_of
from composable_ebm.pipelines.vae import PipelineCodec

__all__ = ["PipelineDenoiser", "pair"]


class PipelineDenoiser(PromptedDenoiser):
    """A pipeline's network with its scheduler's parametrisation and its autoencoder.

    A kind says which of the parts is the network, how prompts become conditions, and how it is called.

    Args:
        pipe: The pipeline.
        height: Of the pictures in pixels; what the network was trained at unless given.
        width: The same.
        embedded_guidance: What networks are told that were distilled with a guidance scale.
    Attributes:
        short_name: What recipes call it.
        network_part: Name of the network among the parts of the pipeline.
        time_scale: What networks of flows call t = 1.
        answers_variance: Whether its networks answer a variance after the mean, whatever the scheduler says.
    """

    short_name: ClassVar[str] = "pipeline"
    network_part: ClassVar[str] = "unet"
    time_scale: ClassVar[float] = 1000.0
    answers_variance: ClassVar[bool] = False

    def __init__(
        self,
        pipe: Any,
        height: int | None = None,
        width: int | None = None,
        embedded_guidance: float = 3.5,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "pipe", pipe)  # held, not owned: it stays as it is set
        network = getattr(pipe, self.network_part)
        object.__setattr__(self, "network", network)
        if not offloaded(network):
            self.owned = network  # moves with the energy
        # Chains live where the pipeline runs, which weights that are offloaded do not tell.
        self.register_buffer("place", torch.zeros(0, device=self.device), persistent=False)
        self.embedded_guidance = embedded_guidance
        self.parametrisation = parametrisation_of(pipe.scheduler, self.time_scale).to(self.device)
        self.noise_range = self.parametrisation.noise_range
        self._describe_space(height, width)
        self._check_channels()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A composition that is moved or cast takes a network of its own; the rest of the pipeline, and
        # weights that are offloaded, are shared.
        new = object.__new__(type(self))
        shared = [self.pipe, self.codec, *([self.network] if offloaded(self.network) else [])]
        memo |= {id(self): new, **{id(part): part for part in shared}}
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new

    pipe: Any
    network: Any  # a module of diffusers, which tells of itself in its `config`

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return getattr(self.pipe, "_execution_device", None) or next(self.network.parameters()).device

    # -- what a kind says ---------------------------------------------------------------------------

    @abstractmethod
    def call(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's answer, (rows, *event), to what it is shown, in its precision, at times (rows,)."""

    def schedule_options(self, num_steps: int) -> Mapping[str, Any]:
        """What `set_timesteps` of the scheduler is told besides the number of steps."""
        return {}

    # -- what they have in common ---------------------------------------------------------------------

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        how, dtype = self.parametrisation, self.network.dtype
        told = {k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.items()}
        answer = self.call(how.shown(x, sigma).to(dtype), how.time(sigma).float(), told)
        if answer.shape[1] == 2 * x.shape[1]:
            answer = answer[:, : x.shape[1]]  # the mean; the rest is a variance that was learned
        return how.denoised(x, sigma, answer.to(x.dtype))

    def levels(self, num_steps: int) -> list[float]:
        options = self.schedule_options(num_steps)
        return noise_levels(self.pipe.scheduler, self.parametrisation, num_steps, options)

    def progress(self, num_steps: int | None = None):
        """A callback for `sample` that shows the pipeline's own progress bar, as it is set.

        Args:
            num_steps: Steps of the run.
        """
        bar = self.pipe.progress_bar(total=self.num_steps if num_steps is None else num_steps)

        def show(step: int, chain: object) -> None:
            bar.update(step - bar.n)
            if step >= (bar.total or step):
                bar.close()

        return show

    def _describe_space(self, height: int | None, width: int | None) -> None:
        """Sets the shapes of states and pictures, and the codec between them."""
        vae = self.pipe.vae
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        trained = pair(self._sample_size())
        pixels = [given or size * factor for given, size in zip((height, width), trained, strict=True)]
        if any(size % self._multiple(factor) for size in pixels):
            raise ValueError(
                f"height and width must be multiples of {self._multiple(factor)}, "
                f"got {pixels[0]} and {pixels[1]}."
            )
        self.event_shape = (self._channels(), *(size // factor for size in pixels))
        image_shape = (vae.config.out_channels, *pixels)
        codec = PipelineCodec(vae, image_shape, self.event_shape, self._safety_check())
        object.__setattr__(self, "codec", codec)  # held, not owned

    def _sample_size(self) -> Any:
        """Of the latents that the network was trained at."""
        return self.network.config.sample_size

    def _multiple(self, factor: int) -> int:
        return factor

    def _channels(self) -> int:
        return int(self.network.config.in_channels)

    def _check_channels(self) -> None:
        config = self.network.config
        own, answers = int(config.in_channels), int(config.out_channels or config.in_channels)
        latent = getattr(getattr(getattr(self.pipe, "vae", None), "config", None), "latent_channels", None)
        if latent is not None and self._channels() != latent:
            raise ValueError(
                f"the network is shown {own} channels and the autoencoder has {latent}: it was made to fill "
                "in or edit pictures. Give the pipeline for text alone; masks are given to `sample`."
            )
        if answers == 2 * own and not self.answers_variance and not learns_variance(self.pipe.scheduler):
            raise ValueError(
                f"the network answers {answers} channels for {own}, a variance after the mean, and its "
                "scheduler does not say so. If it learned one: pipe.scheduler = DDPMScheduler.from_config("
                'pipe.scheduler.config, variance_type="learned_range").'
            )
        if answers not in (own, 2 * own):
            raise ValueError(f"the network must answer {own} channels, it answers {answers}.")

    def _safety_check(self):
        pipe = self.pipe
        if getattr(pipe, "safety_checker", None) is None:
            return None

        def flagged(images: Tensor) -> Tensor:
            dtype = next(pipe.safety_checker.parameters()).dtype
            _, found = pipe.run_safety_checker(images.float().clamp(-1, 1), self.device, dtype)
            return torch.as_tensor(found, dtype=torch.bool)

        return flagged


def offloaded(module: nn.Module) -> bool:
    """Whether hooks bring its weights to the device when they are needed."""
    return getattr(module, "_hf_hook", None) is not None


def pair(size: Any) -> tuple[int, int]:
    """A size of one number or two, as (height, width)."""
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[1])
    return int(size), int(size)
