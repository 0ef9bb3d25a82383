"""The mixer for programs: endpoints for `gradio_client` and, with the extra, MCP."""

from __future__ import annotations

import gradio as gr

from composable_ebm.experts.catalogue import cards

from . import pictures, state
from .runs import FAILURES, Runs, sentences, understood

__all__ = ["add_api"]


def add_api(server: gr.Server, runs: Runs) -> None:
    """Adds /sample, /experts and /running."""

    def sample(recipe: str, num_chains: int = 16, num_steps: int = 200, seed: int = 0) -> dict:
        """Draws pictures from a composition of experts, such as "faces/base + 6*ratio(faces/smile,
        faces/smile[any])": `experts` lists what may be named.

        Args:
            recipe: Experts with weights, added (all of them), joined by | (one of them), ~ for not.
            num_chains: How many pictures.
            num_steps: Steps of the sampler; 80 suffice for faces.
            seed: Seeds the noise: the same seed gives the same pictures.
        Returns:
            "png", a data URI of all pictures side by side; "energies" in nats, low where a picture fits
            the recipe; "report" and "problems" of the run; "recipe" as it was understood; "seconds".
        """
        try:
            asked = state.checked(recipe, num_chains, num_steps, seed, runs.limits)
            result = runs.engine.submit(
                understood(asked.recipe, runs.library),
                asked.num_chains,
                asked.num_steps,
                asked.seed,
                alone=True,
                on_divergence="report",
            ).result()
        except FAILURES as error:
            raise gr.Error(sentences(error), print_exception=False) from error
        content = pictures.png(pictures.montage(result.images), result.provenance())
        return {
            "png": pictures.data_uri(content),
            "energies": result.energies.tolist(),
            "report": result.report(),
            "problems": result.problems,
            "recipe": result.recipe,
            "seconds": result.seconds,
        }

    def running() -> int:
        """How many visitors have chains running, or waiting to."""
        return runs.running()

    def experts() -> list[dict]:
        """Lists the experts that recipes may name.

        Returns:
            For each its "name", the "attribute" that it knows and its "values", chosen as name[value]; a
            binary expert stands for its second value and ~name for its first.
        """
        return [
            {
                "name": name,
                "attribute": card.attribute,
                "values": list(card.values),
                "event_shape": list(card.event_shape),
                "data_range": None if card.data_range is None else list(card.data_range),
                "metrics": dict(card.metrics),
            }
            for name, card in cards()[0].items()
        ]

    server.api(sample, name="sample", concurrency_limit=1)
    server.api(experts, name="experts", queue=False)
    server.api(running, name="running", queue=False)
