"""Handwritten digits (MNIST) with the digit and three measured attributes of the handwriting.

An image x in [-1, 1] holds ink I = (x + 1)/2, clipped to [0, 1], at pixel centres (u, v), u to the
right and v down; nothing is outside the image. With M = Σ I, and means, variances and covariance
taken with the weights I/M:

    thickness = 2 M / TV(I)              pixels: area over half the outline, TV = Σ |∇I|
    slant     = -atan(Cov(u, v)/Var(v))  degrees: how far the pen leans, right is positive
    width     = √(12 Var(u | v))         pixels: a bar's width, after the slant is taken out
                                         Var(u | v) = Var(u) - Cov(u, v)²/Var(v)

A pixel is a unit square and not a point, so Var(u) and Var(v) include its own variance, 1/12: a
bar of k whole pixels is k wide, and one with soft edges a little wider. A blank image measures 0
in all three.

Each measure makes a binary attribute. Its cuts are the thirds of the training images: a label is
0 below the lower cut, 1 above the upper one, and -1 between, where people would not agree either.

Reference:
    LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document recognition.
    Castro, Tan, Kainz, Konukoglu, Glocker (2019), Morpho-MNIST: quantitative assessment and
    diagnostics for representation learning, arXiv 1809.10780 (slant as here; its thickness and
    width come from skeletons and bounding boxes, which are slower and not batched).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST

from composable_ebm.data.combinations import parse_combinations, without
from composable_ebm.data.dataset import UNLABELLED, LabelledImages, unknown_name
from composable_ebm.data.root import ENVIRONMENT_VARIABLE, download_root, find_root, search_path

SPLITS = ("train", "validation", "test")
VALIDATION_SIZE = 5_000
DIGITS = tuple("0123456789")

# Thirds of the 55,000 training images; `test_cuts_are_the_thirds_of_the_training_images`.
THICKNESS_CUTS_IN_PIXELS = (2.25, 2.75)
SLANT_CUTS_IN_DEGREES = (-0.74, 12.41)
WIDTH_CUTS_IN_PIXELS = (10.66, 13.66)

_FILE = "MNIST/raw/train-images-idx3-ubyte"
_CHUNK = 4096  # images measured at a time, so that the floats of all are never in memory


def load(
    split: str = "train",
    root: str | Path | None = None,
    download: bool = False,
    exclude: Iterable[str] = (),
) -> LabelledImages:
    """MNIST as 28x28 images with the attributes `digit`, `thick`, `slanted` and `wide`.

    Args:
        split: "train" (the first 55,000 training images), "validation" (the last 5,000) or
            "test" (10,000).
        root: The folder that holds `MNIST/raw`. Without it the first of these that does: the
            folder named by the environment variable COMPOSABLE_EBM_DATA, `./data`,
            `../shared/data`, `~/.cache/composable_ebm`.
        download: Whether to fetch what is missing, into `root`, COMPOSABLE_EBM_DATA or
            `~/.cache/composable_ebm`.
        exclude: Combinations to hold out, such as "digit[3]+thick+slanted". An image is dropped if it
            has all the attributes of any of them; a measured attribute is `thick` or `~thick`.
    Raises:
        TypeError: If `exclude` is a single text.
        ValueError: If there is no such split or combination.
        FileNotFoundError: If MNIST is absent and not to be downloaded.
    Example:
        >>> load("train").where("slanted")
    """
    if split not in SPLITS:
        raise ValueError(unknown_name("split of the digits", split, SPLITS))
    values = {"digit": DIGITS, **{name: m.values for name, m in MEASURED.items()}}
    held_out = parse_combinations(exclude, values, "digits")
    found = _root(root, download)
    mnist = MNIST(str(found), train=split != "test", download=download)
    images, digit = mnist.data[:, None], mnist.targets
    if split == "train":
        images, digit = images[:-VALIDATION_SIZE], digit[:-VALIDATION_SIZE]
    elif split == "validation":
        images, digit = images[-VALIDATION_SIZE:], digit[-VALIDATION_SIZE:]
    chunks = [handwriting(chunk.float() / 127.5 - 1) for chunk in images.split(_CHUNK)]
    measured = {name: torch.cat([chunk[name] for chunk in chunks]) for name in MEASURED}
    labels = {"digit": digit, **measured}
    return without(LabelledImages(images, labels, values, name=f"digits/{split}"), held_out)


def _root(root: str | Path | None, download: bool) -> Path:
    """The folder to read from, or to download into."""
    found = find_root(_FILE) if root is None else Path(root).expanduser()
    if found is not None and (found / _FILE).exists():
        return found
    if download:
        return found or download_root()
    looked = ", ".join(map(str, search_path() if root is None else (root,)))
    raise FileNotFoundError(
        f"MNIST is in none of: {looked}. Fetch it with load(..., download=True), or say where "
        f"the folder is that holds MNIST/raw: load(..., root=...) or the environment variable "
        f"{ENVIRONMENT_VARIABLE}."
    )


def handwriting(x: Tensor) -> dict[str, Tensor]:
    """The measured attributes of any images, samples included.

    Args:
        x: Images in [-1, 1], shape (batch, 1, height, width).
    Returns:
        For each of `thick`, `slanted` and `wide` the labels (int64) of shape (batch,): 0, 1, or
        -1 between the cuts.
    """
    return {name: m.label(x) for name, m in MEASURED.items()}


def thickness(x: Tensor) -> Tensor:
    """Mean thickness of the strokes in pixels: twice the ink over its total variation.

        thickness = 2 Σ I / TV(I)

    By the co-area formula, TV is the mean outline of the level sets {I > t} and Σ I their mean
    area. A stroke of length h and thickness w has area w h and outline 2 (w + h): its thickness
    is w h/(w + h), close to w when it is long. ∇I is taken on the corners between four pixels, as
    the mean of the two differences across and of the two down: strokes of two pixels and more
    measure alike to 4 % in all directions, where forward differences, or a root mean square,
    make them up to 20 % thinner along a diagonal.

    Args:
        x: Images in [-1, 1], shape (batch, 1, height, width).
    Returns:
        Pixels, shape (batch,); 0 for a blank image.
    """
    ink = _ink(x)
    padded = F.pad(ink, (1, 1, 1, 1))  # strokes that touch the border have an outline there
    across = padded.diff(dim=-1).unfold(-2, 2, 1).mean(dim=-1)
    down = padded.diff(dim=-2).unfold(-1, 2, 1).mean(dim=-1)
    total_variation = torch.hypot(across, down).sum(dim=(-2, -1))
    return _ratio(2 * ink.sum(dim=(-2, -1)), total_variation)


def slant(x: Tensor) -> Tensor:
    """How far the writing leans, in degrees: positive to the right, like italics.

        slant = -atan(Cov(u, v)/Var(v))

    The shear that leaves no covariance between columns and rows. The digit has a share in it
    beside the hand: the same pen measures further right in a 5 than in a 7.

    Args:
        x: Images in [-1, 1], shape (batch, 1, height, width).
    Returns:
        Degrees, shape (batch,); 0 for a blank image.
    Reference:
        Castro et al. (2019), Morpho-MNIST, arXiv 1809.10780.
    """
    _, rows, both = _moments(x)
    return torch.rad2deg(torch.atan(_ratio(-both, rows)))


def width(x: Tensor) -> Tensor:
    """Width of the writing in pixels, as if it stood upright.

        width = √(12 (Var(u) - Cov(u, v)²/Var(v)))

    The width of the evenly inked bar that has the same variance across once the slant is taken
    out; one stray pixel moves it less than it moves a bounding box.

    Args:
        x: Images in [-1, 1], shape (batch, 1, height, width).
    Returns:
        Pixels, shape (batch,); 0 for a blank image.
    """
    columns, rows, both = _moments(x)
    return (12 * (columns - _ratio(both.square(), rows))).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Measured:
    """A binary attribute that is read off the image.

    Args:
        measure: Images (batch, 1, height, width) to numbers (batch,).
        cuts: Below the first the label is 0, above the second it is 1, between them -1.
        values: The names of the labels 0 and 1.
    """

    measure: Callable[[Tensor], Tensor]
    cuts: tuple[float, float]
    values: tuple[str, str]

    def label(self, x: Tensor) -> Tensor:
        """The labels (int64) of images in [-1, 1], shape (batch,)."""
        measured, (low, high) = self.measure(x), self.cuts
        labels = torch.full_like(measured, UNLABELLED, dtype=torch.int64)
        return labels.masked_fill(measured < low, 0).masked_fill(measured > high, 1)


MEASURED = {
    "thick": Measured(thickness, THICKNESS_CUTS_IN_PIXELS, ("thin", "thick")),
    "slanted": Measured(slant, SLANT_CUTS_IN_DEGREES, ("upright", "slanted")),
    "wide": Measured(width, WIDTH_CUTS_IN_PIXELS, ("narrow", "wide")),
}


def _ink(x: Tensor) -> Tensor:
    """Images in [-1, 1] as ink in [0, 1], shape (batch, height, width)."""
    if x.ndim != 4 or x.shape[1] != 1 or not x.is_floating_point():
        raise ValueError(
            "`x` must be floats in [-1, 1] of shape (batch, 1, height, width), "
            f"got {x.dtype} of shape {tuple(x.shape)}. LabelledImages.batch gives them."
        )
    return ((x[:, 0] + 1) / 2).clamp(0, 1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Var(u), Var(v) and Cov(u, v) of the ink, each of shape (batch,); 0 for a blank image."""
    ink = _ink(x)
    mass = ink.sum(dim=(-2, -1))
    share = _ratio(ink, mass[:, None, None])
    by_row, by_column = share.sum(dim=-1), share.sum(dim=-2)
    v = torch.arange(ink.shape[-2], dtype=ink.dtype, device=ink.device)
    u = torch.arange(ink.shape[-1], dtype=ink.dtype, device=ink.device)
    v = v - (by_row * v).sum(dim=-1, keepdim=True)
    u = u - (by_column * u).sum(dim=-1, keepdim=True)
    pixel = (mass > 0) / 12  # a pixel's own variance, see above
    columns = (by_column * u.square()).sum(dim=-1) + pixel
    rows = (by_row * v.square()).sum(dim=-1) + pixel
    return columns, rows, torch.einsum("bvu,bv,bu->b", share, v, u)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))
