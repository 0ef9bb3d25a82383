"""Models that compare pictures with texts, as energies: CLIP and its like."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy.base import Energy, as_name
from composable_ebm.energy.shown import Normalisation, Shown, shown_to
from composable_ebm.energy.space import Codec

CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), (224, 224))
"""Of the pictures that CLIP was trained on."""

__all__ = ["Similarity", "TextImages", "from_clip"]


class Tower(nn.Module):
    """Pictures -> embeddings of length one, (batch, dimension)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        model: Any = self.model
        encode = getattr(model, "get_image_features", None) or model.encode_image
        return F.normalize(_embedding(encode(pictures)), dim=-1)


class Similarity(Energy):
    """E(x) = -log p(text | x) among some texts, or -s cos(x, text) for one alone.

    Args:
        tower: Embeds states, shared by all texts of one model.
        texts: Embeddings of length one, (texts, dimension), the one asked for first.
        scale: s, the inverse temperature that the model was trained with.
        words: The texts.
        model_name: What recipes print before the text.
    """

    def __init__(
        self, tower: nn.Module, texts: Tensor, scale: float, words: Sequence[str], model_name: str
    ) -> None:
        super().__init__()
        self.tower = tower
        self.texts: Tensor
        self.register_buffer("texts", texts)
        self.scale = scale
        self.words = tuple(words)
        self.model_name = model_name

    @property
    def key(self) -> Hashable:
        return ("similarity", id(self.tower), self.words)

    def body(self) -> nn.Module:
        return self.tower

    def read(self, outputs: Tensor) -> Tensor:
        logits = self.scale * (outputs @ self.texts.to(outputs).T)
        return -logits[:, 0] if len(self.words) == 1 else -logits.log_softmax(dim=1)[:, 0]

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.read(self.tower(x))

    def __str__(self) -> str:
        return f"{self.model_name}[{json.dumps('; '.join(self.words), ensure_ascii=False)}]"


class TextImages:
    """A model that compares pictures with texts; `clip["a castle"]` is an energy.

    Args:
        tower: The part that embeds states.
        encode: Texts -> embeddings, (texts, dimension).
        scale: Inverse temperature.
        name: What recipes print.
        data_range: Of the states.
        event_shape: Of one state; None accepts any.
    """

    def __init__(
        self,
        tower: Shown,
        encode: Callable[[Sequence[str]], Tensor],
        scale: float,
        name: str,
        event_shape: tuple[int, ...] | None,
    ) -> None:
        self.tower = tower
        self.encode = encode
        self.scale = scale
        self.name = as_name(name)
        self.event_shape = event_shape
        self._known: dict[tuple[str, ...], Similarity] = {}

    def __getitem__(self, text: str | Sequence[str]) -> Similarity:
        """The energy of a text, or of the first of several, which are then the alternatives.

        A string holds alternatives after semicolons, as recipes write them.
        """
        words = tuple(part.strip() for part in text.split(";")) if isinstance(text, str) else tuple(text)
        if words not in self._known:
            with torch.no_grad():
                texts = F.normalize(self.encode(list(words)).float(), dim=-1)
            energy = Similarity(self.tower, texts, self.scale, words, self.name)
            energy.event_shape = self.event_shape
            energy.data_range = self.tower.data_range
            self._known[words] = energy if self.tower.codec is None else _in(energy, self.tower.codec)
        return self._known[words]

    __iter__ = None


def _in(energy: Similarity, codec: Codec) -> Similarity:
    energy.in_space(codec)
    return energy


def from_clip(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    *,
    normalise: Any = CLIP,
    scale: float | None = None,
    name: str = "clip",
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
    codec: Codec | None = None,
) -> TextImages:
    """A model that compares pictures with texts: `clip["a castle"]` is -s cos(x, text) as an energy.

    With alternatives, `clip["a castle", "a forest", "a city"]`, it is -log p(first | x) among them, the
    likelihood of an attribute in nats. It is no density: add it to one of pictures. Like all
    classifiers it was trained on clean pictures, so beside noise-conditioned energies it says little early
    on, and alone it is easily pleased by patterns that look like nothing.

    Args:
        model: `CLIPModel` of `transformers` and its like (`get_image_features`, `get_text_features`), or of
            `open_clip` (`encode_image`, `encode_text`).
        tokenizer: Its tokenizer.
        normalise: How it wants pictures, see `Normalisation.of`; its own image processor is best.
        scale: s; that of the training unless given.
        name: What recipes print.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the states; None for latents.
        codec: Where states are latents, what decodes them; the gradient passes through it.
    Example:
        >>> clip = from_clip(CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
        >>> mix = face + clip["a smiling face", "a sad face"]
    Reference:
        Radford et al. (2021), arXiv 2103.00020.
    """
    model = model.eval()
    if scale is None:
        own = getattr(model, "logit_scale", None)
        scale = 100.0 if own is None else float(own.detach().exp())

    def encode(words: Sequence[str]) -> Tensor:
        device = next(model.parameters()).device
        if hasattr(model, "get_text_features"):
            tokens = tokenizer(list(words), padding=True, truncation=True, return_tensors="pt").to(device)
            return _embedding(model.get_text_features(**tokens))  # type: ignore[operator]
        return model.encode_text(tokenizer(list(words)).to(device))  # type: ignore[operator]

    how = Normalisation.of(normalise)
    tower = shown_to(Tower(model), how, None if codec is not None else data_range, codec)
    shape = None if event_shape is None else tuple(event_shape)
    return TextImages(tower, encode, scale, name, shape if codec is None else codec.event_shape)


def _embedding(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.pooler_output
