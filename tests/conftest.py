"""What every test may rely on: one thread, fixed seeds, and the data sets where they lie."""

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from composable_ebm.data.root import find_root

# Two threads on a busy two-core machine are slower than one.
torch.set_num_threads(1)

# The first example of a test pays for imports and warm-up, so a deadline only makes it flaky.
# The same examples every time: what fails here fails for everybody.
hypothesis.settings.register_profile("composable_ebm", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("composable_ebm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Global generators start alike in every test, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, for libraries that draw from it
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds MNIST; tests that ask for it are skipped where there is none."""
    root = find_root("MNIST/raw/train-images-idx3-ubyte")
    if root is None:
        pytest.skip("MNIST is not on this machine")
    return root
