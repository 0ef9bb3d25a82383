"""What every test may rely on: one thread, fixed seeds, and the data sets where they lie."""

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from mixer_toys import write_models

from composable_ebm.data.root import find_root
from demos.mixer.served import CHROMIUM_OPTIONS, find_chromium, served

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
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same for the CPU alone; the other notes each call, with its stack, for a device to come
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds MNIST; tests that ask for it are skipped where there is none."""
    root = find_root("MNIST/raw/train-images-idx3-ubyte")
    if root is None:
        pytest.skip("MNIST is not on this machine")
    return root


# -- the mixer, once for all tests ------------------------------------------------------------------


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder of toy experts."""
    return write_models(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def toy_page(toys):
    """The address of the mixer's page, with toy experts alone."""
    with served("--num-threads", "1", models=toys) as mixer:
        yield mixer.address.rstrip("/")


@pytest.fixture(scope="session")
def client(toy_page):
    """The API of `toy_page`."""
    return pytest.importorskip("gradio_client").Client(toy_page, verbose=False)


@pytest.fixture(scope="session")
def browser():
    """A Chromium that is waited for, however busy the machine is."""
    api = pytest.importorskip("playwright.sync_api")
    if (chromium := find_chromium()) is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    api.expect.set_options(timeout=30_000)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()
