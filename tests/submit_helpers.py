"""What tests of `Engine` share: requests that begin together, and what each must give."""

import threading
import time

import torch

import composable_ebm as ceb

TIMEOUT = 30


class Gate(ceb.Energy):
    """Holds up the engine until it is opened, so that what is submitted meanwhile begins together."""

    event_shape = (1,)

    def __init__(self):
        super().__init__()
        self.opened = threading.Event()

    def energy(self, x, noise_level=None):
        assert self.opened.wait(TIMEOUT)
        return x.square().sum(1)


def submit_together(engine, requests):
    """Submits requests, (composition, options) each, that all begin before any of them steps."""
    gate = Gate()
    engine.submit(gate, 1, 0, sampler=ceb.Langevin(0.1))
    runs = [engine.submit(composition, **options) for composition, options in requests]
    gate.opened.set()
    return runs


def same_as_alone(requests, runs, tolerance=1e-5):
    for (composition, options), run in zip(requests, runs, strict=True):
        alone, out = ceb.sample(composition, **options), run.result(TIMEOUT)
        torch.testing.assert_close(out.samples, alone.samples, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out.energies, alone.energies, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out.trace.energy, alone.trace.energy, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out.trace.gradient_norm, alone.trace.gradient_norm, rtol=1e-4, atol=1e-4)
        assert out.trace.step_size.shape == alone.trace.step_size.shape
        assert (out.recipe, out.num_steps, out.seed) == (alone.recipe, alone.num_steps, alone.seed)
        assert out.evaluations == alone.evaluations


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
