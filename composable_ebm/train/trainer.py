"""The training loop, under Hugging Face Accelerate.

The negative phase runs on the same engine as `sample`; the network is called once an iteration
through its training wrapper, on positives and negatives together. Nothing in an iteration waits
for the device: metrics are read every `log_every` iterations.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from composable_ebm.data import LabelledImages
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.hub import check_repository, hub_token
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.potential.native import decide_now
from composable_ebm.processes import launch_command
from composable_ebm.train.best import Best
from composable_ebm.train.budget import Budget
from composable_ebm.train.checkpoint import (
    flatten_optimiser,
    load_checkpoint,
    restore_optimiser,
    save_checkpoint,
)
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.divergence import TrainingDivergedError, advice, finite
from composable_ebm.train.ending import finished, publish, write, write_with_verdict
from composable_ebm.train.export import export_unfinished, held_out_metrics
from composable_ebm.train.folder import folder_digest
from composable_ebm.train.identity import (
    PICTURES,
    START,
    STARTED_FROM,
    first_stage,
    identity,
    run_digest,
)
from composable_ebm.train.journal import Journal
from composable_ebm.train.material import Split, gather
from composable_ebm.train.objectives.base import Figures, Setting
from composable_ebm.train.preparation import build
from composable_ebm.train.readings import Readings, is_healthy
from composable_ebm.train.run_folder import RunFolder
from composable_ebm.train.start import start_from
from composable_ebm.train.stopping import StopSignals, TrainingStoppedError

MAX_ROLLBACKS = 3
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

__all__ = ["Trainer", "TrainingDivergedError", "accelerator_for", "train"]


def train(
    config: TrainConfig,
    accelerator: Accelerator | None = None,
    data: Split | None = None,
    arguments: Sequence[str] = (),
    told: bool = False,
    to_come: str = "",
) -> Expert:
    """Trains one expert, from its last checkpoint if there is one, and writes it.

    Args:
        config: What to train.
        accelerator: The processes to train on; made from `config` unless given.
        data: Images to learn from and held-out ones, in place of those that `config` names.
        arguments: Arguments of `composable-ebm train` that ask for this training, for the card.
        told: Whether a training before it has said what is in the folder.
        to_come: Name of the stage that goes on from this one into the same expert, which is written as
            unfinished.
    Raises:
        TrainingDivergedError: If it diverged more than three times; the last good expert is written.
        TrainingStoppedError: If it was interrupted; what it had is saved.
        ValueError: If the run's folder belongs to another training, or another works in it.
        OSError: If the disk is full; the message says where it goes on.
    """
    trainer = Trainer(config, accelerator, data, arguments, told, to_come)
    try:
        return trainer.run()
    finally:
        if accelerator is None:
            # A process group that is still open when the interpreter goes can abort the process.
            trainer.accelerator.end_training()


def accelerator_for(config: TrainConfig) -> Accelerator:
    """The processes of a training."""
    return Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
    )


class Trainer:
    """Everything one training needs, and its loop.

    Args:
        config: What to train.
        accelerator: The processes to train on; made from `config` unless given.
        data: Images to learn from and held-out ones, in place of those that `config` names.
        arguments: Arguments of `composable-ebm train` that ask for this training, for the card.
        told: Whether a training before it has said what is in the folder.
        to_come: Name of the stage that goes on from this one, "" for none.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator | None = None,
        data: Split | None = None,
        arguments: Sequence[str] = (),
        told: bool = False,
        to_come: str = "",
    ) -> None:
        if config.contrast:
            raise ValueError("a training with `contrast` has two stages: train each of `train.stages`.")
        self.config = config
        self.to_come = to_come
        self.arguments = arguments
        if config.push_to_hub:  # before the training: what would fail at its end
            check_repository(config.push_to_hub)
            hub_token()
        self.accelerator = accelerator or accelerator_for(config)
        self.device = self.accelerator.device
        self.material = gather(config, self.accelerator, data, told)
        self.card, values = self.material.card, self.material.values
        torch.manual_seed(config.seed)  # the same weights on every rank
        network = build(self.card)
        start_from(network, config.init, self.data, len(values), self.card.codec)
        config.objective.prepare(network)
        self.identity = identity(config, (self.data, self.held_out), values, self.accelerator.num_processes)
        self.first_stage = first_stage(config)
        self.folder = RunFolder(config, self.identity)
        network = network.to(self.device)
        self.average = AveragedModel(network, multi_avg_fn=self._average)
        optimiser = torch.optim.Adam(
            network.parameters(),
            lr=config.optimiser.learning_rate,
            betas=(config.optimiser.beta1, config.optimiser.beta2),
        )
        self.model, self.optimiser = self.accelerator.prepare(network, optimiser)
        if self.accelerator.scaler is None and self.device.type in ("cpu", "cuda"):
            # Without a loss scaler the wrapper adds nothing there, but searches for an optional package
            # twice a step: 0.4 ms, longer than the step itself of a small network.
            self.optimiser = optimiser
        self.network: nn.Module = self.accelerator.unwrap_model(self.model)

        # Data order, noise and chains differ between ranks.
        rank = self.accelerator.process_index
        self.generators = {
            name: torch.Generator(self.device).manual_seed(1000 * config.seed + 10 * rank + i)
            for i, name in enumerate(("data", "objective"), 1)
        }
        self.phase = config.objective.begin(
            Setting(
                event_shape=self.data.event_shape,
                num_values=len(values),
                data_range=self.card.data_range,
                batch_size=config.batch_size,
                sampler=config.kernel,
                generator=self.generators["objective"],
                binary=config.binary,
            )
        )
        self.step = 0
        self.seconds = 0.0
        self.rollbacks = 0
        self.rate_factor = 1.0
        self.budget = Budget(config)
        self.best = Best()
        self.readings = Readings(self.accelerator)

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> Expert:
        """Trains to the end and returns the finished expert, which is also written to its folder."""
        decide_now()  # a run that is killed and goes on takes the same steps to the last bit
        first = self.accelerator.is_main_process
        if first:
            self.folder.enter()
        try:
            self.accelerator.wait_for_everyone()
            with StopSignals() as stop:
                return self._run(stop)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                f"there is no room left to write to ({error}). Nothing is lost but what came after "
                f"{self._last_saved()}: make room, and the same command goes on from there."
            ) from error
        finally:
            if first:
                self.folder.leave()

    def _run(self, stop: StopSignals) -> Expert:
        config, first = self.config, self.accelerator.is_main_process
        self._resume()
        if self.budget.done(self.step) and (expert := self._finished()):
            if config.push_to_hub and first:
                publish(config)
            return expert
        journal = Journal(config, first, resume_at=self.step)
        progress = tqdm(
            total=None if config.minutes else config.num_iterations,
            initial=self.step,
            desc=f"{config.family}/{config.name}",
            disable=not first,
            dynamic_ncols=True,
        )
        try:
            self._iterate(stop, journal, progress)
            progress.close()
            expert = self._ending() if first else self.expert()
        finally:
            progress.close()
            journal.close()
        if config.push_to_hub and first:
            publish(config)
        # Where one process ends badly the launcher ends all: none may leave before the expert is written.
        self.accelerator.wait_for_everyone()
        return expert

    def _iterate(self, stop: StopSignals, journal: Journal, progress: tqdm) -> None:
        config, budget = self.config, self.budget
        good = self._snapshot()
        start = time.perf_counter() - self.seconds
        while not budget.done(self.step):
            if stop.requested:
                self._stop(stop.requested)
            self.readings.add(self._iteration())
            self.step += 1
            progress.update()
            self.seconds = time.perf_counter() - start
            if self.accelerator.num_processes > 1 and config.minutes and self.step % config.log_every:
                continue  # what processes decide together costs a message
            budget.tick(self._shared_seconds())
            last = budget.done(self.step)
            saving = last or budget.due(self.step, config.save_every)
            if saving or self.step % config.log_every == 0:
                metrics = self.readings.read()
                if not is_healthy(metrics, config.largest_gap):
                    goes_on = self._roll_back(good, metrics)
                    progress.update(self.step - progress.n)
                    if not goes_on:
                        break
                    continue
                journal.write(self.step, {**metrics, "seconds": self.seconds, "learning_rate": self._rate()})
                progress.set_postfix(loss=f"{metrics['loss']:.3f}", left=budget.left(self.step))
            if last or budget.due(self.step, config.evaluate_every):
                self._evaluate(journal, sheet=last or self.material.base is None)
                now = time.perf_counter() - start
                if self.accelerator.num_processes == 1:  # several decide alike
                    budget.looked(now, now - self.seconds)
            if saving:
                good = self._snapshot()
                self._save(good)

    def _shared_seconds(self) -> float:
        """The seconds of the training, the same on all processes where they decide anything."""
        if not self.config.minutes or self.accelerator.num_processes == 1:
            return self.seconds
        return float(self.accelerator.reduce(torch.tensor(self.seconds, device=self.device), "mean"))

    def _ending(self) -> Expert:
        """Writes what was trained, and says what experts of a folder, or kept at their best, are worth."""
        config, network, facts = self.config, self.average.module, self.facts()
        if config.keep_best:
            network, facts["best_iteration"] = self.best.network(network), self.best.step or self.step
        if self.to_come:
            expert = self.material.expert(network)
            metrics = held_out_metrics(expert, self.held_out)
            return export_unfinished(config, expert, facts, metrics, self.to_come)
        if isinstance(network, PictureCodec) or not (config.keep_best or config.data.name == "folder"):
            return write(config, self.material, network, facts)
        return write_with_verdict(config, self.material, network, facts)

    def _stop(self, signal_number: int) -> None:
        """Ends a training that was asked to, after saving what it has."""
        # Several processes are asked at different iterations, and have no common state to save.
        alone = self.accelerator.num_processes == 1
        if alone and self.step and is_healthy(self.readings.read(), self.config.largest_gap):
            self._save(self._snapshot())
        raise TrainingStoppedError(
            f"{self.config.family}/{self.config.name} stopped at iteration {self.step} of "
            f"{self.budget}. The same command goes on from {self._last_saved()}, as if it had "
            "not been stopped.",
            signal_number,
        )

    def _last_saved(self) -> str:
        newest = self.folder.newest()
        return f"iteration {newest[1]['step']}" if newest else "the beginning"

    def _finished(self) -> Expert | None:
        """The expert that this very run has written, if it has come to its end before."""
        expert = finished(self.config, self.material, self.average.module, self.facts())
        if expert is not None and self.accelerator.is_main_process:
            tqdm.write(
                f"this training is finished, after {self.step} iterations: nothing was done. For more give "
                f"{'more --minutes' if self.config.minutes else 'a larger --num-iterations'}; to start anew, "
                "--fresh."
            )
        return expert

    def _iteration(self) -> Figures:
        config = self.config
        figures: Figures = {}
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        for _ in range(config.accumulate):
            with self.accelerator.accumulate(self.model):
                x, y = self.material.batch(config, self.generators["data"])
                with self.accelerator.autocast():
                    loss, figures = self.phase.loss(self.model, self.network, x, y)
                self.accelerator.backward(loss)
                norm = None
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(
                        self.model.parameters(), config.optimiser.grad_clip
                    )
                    self.optimiser.step()
                    self.optimiser.zero_grad()
                if norm is not None:
                    figures["weight_gradient_norm"] = norm.detach()
        self.average.update_parameters(self.network)
        return figures

    @torch.no_grad()
    def _average(self, average: Sequence[Tensor], weights: Sequence[Tensor], _: object) -> None:
        """Moves the average towards the weights, at first faster: a short run leaves its start behind.

        The decay is min(`ema`, (1 + n)/(10 + n)) after n iterations, as TensorFlow's.
        """
        decay = min(self.config.optimiser.ema, (1 + self.step) / (10 + self.step))
        for mine, theirs in zip(average, weights, strict=True):
            mine.lerp_(theirs, 1 - decay) if mine.is_floating_point() else mine.copy_(theirs)

    def _rate(self) -> float:
        """Held, then falling linearly to zero."""
        optimiser = self.config.optimiser
        done = self.budget.progress(self.step)
        fall = 1 - max(0.0, done - optimiser.hold) / max(1 - optimiser.hold, 1e-9)
        return optimiser.learning_rate * self.rate_factor * fall

    # -- health ---------------------------------------------------------------------------------

    def _roll_back(self, good: dict, metrics: Mapping[str, float]) -> bool:
        """Back to the last good state, at half the rate and with other chains; whether it goes on."""
        config = self.config
        step, figure = self.step, "energy_gap" if "energy_gap" in metrics else "loss"
        self._restore(good)
        self.rollbacks += 1
        self.rate_factor *= 0.5
        for i, generator in enumerate(self.generators.values()):
            generator.manual_seed(generator.initial_seed() + 7919 * self.rollbacks + i)
        what = f"{figure.replace('_', ' ')} {metrics[figure]:.3g}"
        message = f"diverged at iteration {step} ({what}); back to {self.step}"
        if self.rollbacks > MAX_ROLLBACKS and self.first_stage:
            if self.accelerator.is_main_process:
                tqdm.write(f"{message} for the last time: it ends here; what its first stage learned stays")
            return False
        if self.rollbacks > MAX_ROLLBACKS:
            written = "No expert was written, since there is none that is finite."
            if finite(self.average.module) and self.step:
                written = f"The expert of that iteration was written to {config.model_folder}."
                if self.accelerator.is_main_process:
                    write(config, self.material, self.average.module, self.facts())
            self.accelerator.wait_for_everyone()
            raise TrainingDivergedError(
                f"{config.family}/{config.name} {message} for the last time. {written} {advice(config)}"
            )
        if self.accelerator.is_main_process:
            tqdm.write(f"{message}, at half the learning rate ({self.rollbacks} of {MAX_ROLLBACKS})")
        return True

    # -- state ----------------------------------------------------------------------------------

    @property
    def data(self) -> LabelledImages:
        """What is learned from."""
        return self.material.data

    @property
    def held_out(self) -> LabelledImages:
        """The same of held-out pictures."""
        return self.material.held_out

    def expert(self) -> Expert:
        """The expert with averaged weights, as of now."""
        return self.material.expert(self.average.module)

    def _evaluate(self, journal: Journal, sheet: bool) -> None:
        network = self.average.module
        if isinstance(network, PictureCodec):
            journal.evaluate_codec(self.step, network, self.held_out, self.seconds)
            return
        metrics = journal.evaluate(self.step, self.expert(), self.held_out, self.seconds, sheet)
        if self.config.keep_best and self.best.offer(self.step, metrics, network):
            export_unfinished(self.config, self.expert(), self.facts(), metrics)

    def facts(self) -> dict:
        """How the training went, for the card."""
        data = self.config.data
        return {
            **({"command": self._command()} if self.arguments else {}),
            "objective": type(self.config.objective).__name__,
            "iterations": self.step,
            "minutes": round(self.seconds / 60, 1),
            "processes": self.accelerator.num_processes,
            "device": str(self.device),
            "rollbacks": self.rollbacks,
            "pictures": self.identity[PICTURES],
            "run": run_digest(self.identity),
            **({STARTED_FROM: self.identity[START]} if self.config.init else {}),
            **({"first_stage": self.first_stage} if self.first_stage else {}),
            **({"folder": folder_digest(data.root)} if data.name == "folder" and data.root else {}),
            **({"exclude": list(data.exclude)} if data.exclude else {}),
        }

    def _command(self) -> str:
        """What repeats this training."""
        return launch_command(self.accelerator.num_processes, self.device.type, self.arguments)

    def _snapshot(self) -> dict:
        tensors = {
            **{f"network.{k}": v for k, v in self.network.state_dict().items()},
            **{f"average.{k}": v for k, v in self.average.state_dict().items()},
            **{f"phase.{k}": v for k, v in self.phase.state_dict().items()},
            **{f"generator.{k}": g.get_state() for k, g in self.generators.items()},
            **flatten_optimiser(self.optimiser),
        }
        facts = {
            "seconds": self.seconds,
            "rollbacks": self.rollbacks,
            "rate_factor": self.rate_factor,
            "identity": self.identity,
            "planned": str(self.budget),
        }
        return {
            "step": self.step,
            "facts": facts,
            "tensors": {k: v.detach().clone() for k, v in tensors.items()},
        }

    def _restore(self, snapshot: dict) -> None:
        tensors, facts = snapshot["tensors"], snapshot["facts"]

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.average.load_state_dict(part("average."))
        self.phase.load_state_dict(part("phase."))
        for name, state in part("generator.").items():
            self.generators[name].set_state(state.cpu())
        restore_optimiser(self.optimiser, tensors)
        self.step, self.seconds = int(snapshot["step"]), float(facts["seconds"])
        self.readings.clear()

    def _save(self, snapshot: dict) -> None:
        best = {"best_loss": self.best.loss, "best_step": self.best.step} if self.best.weights else {}
        save_checkpoint(
            self.folder.checkpoints,
            int(snapshot["step"]),
            {**snapshot["tensors"], **self.best.tensors()},
            {**snapshot["facts"], **best},
            self.accelerator.process_index,
            self.accelerator.wait_for_everyone,
        )

    def _resume(self) -> None:
        newest = self.folder.newest()
        if newest is None:
            return
        path, facts, damaged = newest
        tensors = load_checkpoint(path, self.accelerator.process_index)
        self._restore({"step": facts["step"], "facts": facts, "tensors": tensors})
        self.rollbacks, self.rate_factor = facts["rollbacks"], facts["rate_factor"]
        self.best.restore(facts, tensors)
        self.budget.tick(self.seconds)
        if not self.accelerator.is_main_process:
            return
        for problem in damaged:
            tqdm.write(f"passed over a damaged checkpoint: {problem}")
        planned = facts["planned"]
        if not self.budget.done(self.step):
            other = f", to {self.budget} instead of {planned}"
            tqdm.write(f"resuming from {path}{other if planned != str(self.budget) else ''}")
