"""The training loop. A resumed training gives bit-identical weights to an uninterrupted training.

The batch depends only on (seed, step), and dropout only on (seed, step, micro-batch). So a training state
needs no state of a random generator.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compactgpt.common.device import resolve_device, set_precision
from compactgpt.common.errors import BadConfig, Busy, NotFinite, OutOfMemory
from compactgpt.common.storage import json_bytes, sha256_file, verified_manifest, write_text
from compactgpt.config import Params
from compactgpt.data.token_files import TokenFile, open_tokens, training_batch
from compactgpt.model.gpt import GPT
from compactgpt.model.sampled_softmax import draw_sample, inclusion_probabilities, token_counts
from compactgpt.model.weights import save_model
from compactgpt.training.checkpoint import load_newest_state, save_state
from compactgpt.training.distributed import Group, init_process_group
from compactgpt.training.initialization import initial_model
from compactgpt.training.loss_curve import (
    LOWER_RATES,
    Row,
    best_row,
    divergence_warning,
    loss_csv,
    select_windows,
    validation_loss,
)
from compactgpt.training.optim import Optimizers

# If one of these source files changes, training starts from step 0 instead of its last state.
SOURCES = ("data/token_files.py", "model/*.py", "training/*.py")
BEST = "best"  # folder of the best model so far, next to the training states


@dataclass(frozen=True)
class Splits:
    """The token files of the train split and the val split, and a hash of their manifest."""

    train: TokenFile
    val: TokenFile
    sha256: str


def open_splits(folder: Path) -> Splits:
    """Open the token files of the stage `tokenization`.

    Raises MissingInput if `folder` has no manifest, and BadData if a file is missing or damaged.
    """
    files = verified_manifest(folder)["files"]
    digest = hashlib.sha256(json_bytes(files)).hexdigest()
    return Splits(open_tokens(folder / "train.tokens"), open_tokens(folder / "val.tokens"), digest)


@dataclass(frozen=True)
class Callbacks:
    """Functions that `train` calls in every process; steps are counted from 1."""

    # The argument has the pairs (step, training loss) since the previous call.
    on_losses: Callable[[list[tuple[int, float]]], None] = lambda _losses: None
    # The argument has all rows of the loss curve; the last one is new.
    on_row: Callable[[list[Row]], None] = lambda _rows: None
    # The arguments are the step and the model, which the function must not change.
    on_step: Callable[[int, GPT], None] = lambda _step, _model: None
    on_warning: Callable[[str], None] = lambda _message: None
    # `train` calls the function after every step, and stops if the function returns True.
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Trained:
    """The result of a finished training run."""

    model: GPT
    rows: list[Row]
    resumed_from: int  # step of the training state that this process started from, or 0


def run_key(params: Params, splits: Splits) -> str:
    """Return a hash of everything that the result of a training run depends on.

    The number of processes is left out, because it changes only rounding.
    """
    package = Path(__file__).parents[1]
    sources = sorted(path for pattern in SOURCES for path in package.glob(pattern))
    launcher = {"processes", "max_restarts", "timeout_seconds"}
    identity = {
        "training": params.training.model_dump(
            mode="json", exclude={"launcher": launcher, "init_from": True}
        ),
        "model": params.model.model_dump(mode="json"),
        "device": resolve_device(params.runtime.device),
        "num_threads": params.runtime.num_threads,
        "data": splits.sha256,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "sources": {str(path.relative_to(package)): sha256_file(path) for path in sources},
    }
    return hashlib.sha256(json_bytes(identity)).hexdigest()[:16]


def train(params: Params, splits: Splits, folder: Path, callbacks: Callbacks = Callbacks()) -> Trained:
    """Train the model of params.yaml, and return it; resume if `folder` has a training state.

    If `callbacks.should_stop` returns True before the last step, saves the training state and raises Busy.
    Raises NotFinite for a loss or gradient that is NaN or infinite.
    """
    device, max_steps = resolve_device(params.runtime.device), params.training.max_steps
    with init_process_group(params.training.launcher, device) as group, memory_errors():
        trainer = Trainer(params, splits, folder, group)
        resumed_from = trainer.resume(callbacks)
        while trainer.step < max_steps:
            trainer.make_step()
            if trainer.is_report_due():
                trainer.report(callbacks)
            # All processes must stop at the same step: if one stopped alone, the others would wait for it.
            stops = group.any_rank(callbacks.should_stop()) and trainer.step < max_steps
            if stops or trainer.step % params.training.checkpoint_interval == 0:
                trainer.report(callbacks)  # reads the last losses, which the saved state must contain
                trainer.save()
            callbacks.on_step(trainer.step, trainer.model)
            if stops:
                raise Busy(
                    f"stopped at step {trainer.step} of {max_steps}, which is saved: "
                    "run `dvc repro` again to resume from this step"
                )
        return Trained(trainer.full_model().eval(), trainer.rows, resumed_from)


class Trainer:
    """A training run in progress: model, optimizers, loss curve and number of updates."""

    def __init__(self, params: Params, splits: Splits, folder: Path, group: Group) -> None:
        self.training, self.shape, self.group = params.training, params.model, group
        self.splits, self.folder = splits, folder
        self.run_key = run_key(params, splits)
        self.sequences = self.training.tokens_per_step // self.shape.block_size
        self.batch_slice = group.batch_slice(self.sequences, self.training.micro_batch_size)
        self._check_vocabulary()
        group.assert_same_on_all_ranks("params.yaml, data, code, library versions or hardware", self.run_key)
        self.device = resolve_device(params.runtime.device)
        self.log_interval = params.runtime.log_interval
        # A GPU keeps its losses until they are reported: to read one, the program must wait for the GPU.
        self.defers_losses = self.device == "cuda"
        self.windows = select_windows(splits.val, self.shape.block_size, self.training.eval_windows)
        counts = None  # how often each token occurs in the train split, (vocab_size,)
        if self.training.init_unigram or self.training.head == "sampled":
            counts = token_counts(splits.train.tokens, self.shape.vocab_size)
        # Only for a sampled softmax: each token's probability to be in a sample, (vocab_size,).
        self.inclusion: npt.NDArray[np.float64] | None = None
        if self.training.head == "sampled" and counts is not None:
            size, power = self.training.sample_tokens, self.training.sample_power
            self.inclusion = inclusion_probabilities(counts, size, power)
        set_precision(self.training.dtype)
        self.model, self.optimizers = self._build_model(counts)
        self.step = 0  # number of updates made so far
        self.rows: list[Row] = []
        # Triples (step counted from 0, loss, gradient norm) of the steps that were not reported yet.
        self.unreported: list[tuple[int, Tensor, Tensor]] = []
        self.losses: list[float] = []  # training losses of the steps since the last row of the loss curve

    def _check_vocabulary(self) -> None:
        for split in (self.splits.train, self.splits.val):
            if split.header.vocab_size > self.shape.vocab_size:
                raise BadConfig(
                    f"model.vocab_size: found {self.shape.vocab_size}, but {split.path} has a vocabulary of "
                    f"{split.header.vocab_size} tokens: raise model.vocab_size to at least this number"
                )

    def _build_model(self, counts: npt.NDArray[np.int64] | None) -> tuple[GPT, Optimizers]:
        """Return the initial model, or this process's shards of it, and the optimizers."""
        shape, training = self.shape, self.training
        if self.group.is_sharded:
            from compactgpt.training.fsdp import orthogonalize_sharded, shard_model

            full: dict[str, Tensor] = {}  # filled in the main process only
            self.group.run_on_main(lambda: full.update(initial_model(shape, training, counts).state_dict()))
            model = shard_model(full, shape, self.device, self.group, compiles=training.compile)
            return model, Optimizers(model, training, orthogonalize_sharded)
        model = initial_model(shape, training, counts).to(self.device)
        if training.compile:
            model.compiled = torch.compile(model.blocks)
        return model, Optimizers(model, training)

    def full_model(self) -> GPT:
        """Return the full model. If the model is sharded, only the main process's result has weights."""
        if not self.group.is_sharded:
            return self.model
        full = self.group.gather(self.model.state_dict())
        with torch.device("meta"):
            model = GPT(self.shape)
        if self.group.is_main_process:
            model.load_state_dict(full, assign=True)
        return model

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the model and the optimizers by name, without copying them."""
        return {**self.model.state_dict(), **self.optimizers.state}

    def save(self) -> None:
        """Save the training state to disk."""
        progress = {"rows": self.rows, "waiting": self.losses, "processes": self.group.world_size}
        save_state(self.folder, self.run_key, self.step, self._tensors(), progress, self.group)

    def resume(self, callbacks: Callbacks) -> int:
        """Load the newest valid training state, and return its step; return 0 if no state is valid.

        Calls `callbacks.on_warning` if the number of processes has changed.
        """
        found = load_newest_state(self.folder, self.run_key, self._tensors(), self.group)
        if found is None:
            return 0
        self.step, progress = found
        self.rows = [Row(*row) for row in progress["rows"]]
        self.losses = list(progress["waiting"])
        before, now = progress["processes"], self.group.world_size
        if before != now:
            callbacks.on_warning(
                f"training.launcher.processes changed from {before} to {now} at step {self.step}: the "
                f"weights can differ slightly from those of {before} processes, which round sums differently"
            )
        return self.step

    def make_step(self) -> None:
        """Make one training step: draw the batch, compute the gradient, and update the weights."""
        tokens, targets, *head = self._batch()
        loss = self._accumulate_gradient(tokens, targets, *head)
        grad_norm = self.optimizers.grad_norm()
        self.unreported.append((self.step, loss, grad_norm))
        self.optimizers.update(self.step, grad_norm)
        self.step += 1

    def _batch(self) -> tuple[Tensor, ...]:
        """Return the arguments of `GPT.forward` for this process's slice of the step's batch.

        These are `tokens` and `targets`, and for a sampled softmax also `table` and `correction`.
        """
        seed, train = self.training.seed, self.splits.train.tokens
        tokens, targets = training_batch(
            train, seed=seed, step=self.step, sequences=self.sequences, block_size=self.shape.block_size
        )  # 2 x (B, T), the batch of all processes together
        head: tuple[Tensor, ...] = ()
        if self.inclusion is not None:
            sample = draw_sample(self.inclusion, np.stack([tokens, targets]), seed=seed, step=self.step)
            tokens, targets = sample.positions(tokens), sample.positions(targets)
            table = self.optimizers.select_rows(torch.from_numpy(sample.ids).to(self.device))
            head = table, torch.from_numpy(-sample.log_inclusion).to(self.device)
        return self._to_device(tokens[self.batch_slice]), self._to_device(targets[self.batch_slice]), *head

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        # The copy from pinned memory runs while the program continues.
        tensor = tensor.pin_memory() if self.defers_losses else tensor
        return tensor.to(self.device, non_blocking=True)

    def _accumulate_gradient(self, tokens: Tensor, targets: Tensor, *head: Tensor) -> Tensor:
        """Compute the gradient of the mean loss over the batch of all processes, and return this loss.

        `head` is empty, or has the arguments `table` and `correction` of `GPT.forward`.
        """
        self.model.train()
        size = self.training.micro_batch_size
        own = len(tokens) // size
        first = self.batch_slice.start // size  # index of this process's first micro-batch
        micro_batches = own * self.group.world_size
        losses: list[Tensor] = []
        for number in range(own):
            if self.shape.dropout:
                name = f"dropout {self.training.seed} {self.step} {first + number}"
                torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
            rows = slice(number * size, (number + 1) * size)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
                loss: Tensor = self.model(tokens[rows], targets[rows], *head) / micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return self.group.sum_gradients(self.optimizers.trained_parameters(), torch.stack(losses).sum())

    def is_report_due(self) -> bool:
        """Return whether to report losses after this step.

        On a CPU: always. With CUDA: every log_interval steps, and when a row of the loss curve is due.
        """
        return not self.defers_losses or self.is_row_due() or self.step % self.log_interval == 0

    def is_row_due(self) -> bool:
        """Return whether the loss curve gets a row: after the first, last and every eval_interval-th step."""
        return self.step in (1, self.training.max_steps) or self.step % self.training.eval_interval == 0

    def report(self, callbacks: Callbacks) -> None:
        """Pass the unreported losses to `callbacks`.

        If a row is due, add the row to the loss curve, and pass the curve to `callbacks`, too.
        """
        if losses := self.read_losses():
            callbacks.on_losses(losses)
            if self.is_row_due():
                self.add_row()
                callbacks.on_row(self.rows)

    def read_losses(self) -> list[tuple[int, float]]:
        """Return (step, loss in nats per token) for each step since the last call. Steps count from 1.

        Raises NotFinite if a loss or gradient norm is not finite.
        """
        if not self.unreported:
            return []
        numbers = torch.stack([torch.stack([loss, norm]) for _, loss, norm in self.unreported]).tolist()
        losses = []
        for (step, *_), (loss, norm) in zip(self.unreported, numbers, strict=True):
            self._check_finite(step, {"training loss": loss, "norm of its gradient": norm})
            losses.append((step + 1, loss))
        self.unreported = []
        self.losses += [loss for _, loss in losses]
        return losses

    def _check_finite(self, step: int, numbers: Mapping[str, float]) -> None:
        if all(math.isfinite(number) for number in numbers.values()):
            return
        found = " and the ".join(f"{name} is {number}" for name, number in numbers.items())
        raise NotFinite(
            f"step {step + 1} of {self.training.max_steps}: the {found}. The step was not saved. The "
            f"same batch (seed {self.training.seed}, step index {step}) would fail again. Before the next "
            f"`dvc repro`, {LOWER_RATES} in params.yaml"
        )

    def add_row(self) -> None:
        """Add a row to the loss curve. Save the model if its val loss is the lowest so far.

        After the last step, `save_results` saves the model, so this method does not.
        """
        val_loss = validation_loss(self.model, self.windows, self.training.micro_batch_size)
        self._check_finite(self.step - 1, {"validation loss": val_loss})
        # All steps have the same number of tokens, so the mean over steps is the mean over tokens.
        row = Row(self.step, math.fsum(self.losses) / len(self.losses), val_loss)
        self.rows.append(row)
        self.losses = []
        is_best = row is best_row(self.rows) and self.step < self.training.max_steps
        # Losses may differ by rounding between machines, so only the main process decides.
        if self.group.any_rank(is_best and self.group.is_main_process):
            model = self.full_model()
            if self.group.is_main_process:
                save_model(model, self.folder / BEST, force=True)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemory, which names the settings to lower, when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory_error = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # On a CPU, torch raises a RuntimeError instead of an OutOfMemoryError.
        if not is_memory_error and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            "out of memory: halve training.micro_batch_size in params.yaml (tokens_per_step can stay as it "
            "is); if that is not enough, lower model.block_size or model.n_embd"
        ) from error


def save_results(params: Params, trained: Trained, states: Path, model: Path, curve: Path) -> dict[str, Any]:
    """Write the trained model and its loss curve; return the content of reports/training.json.

    The folder `model` gets the last weights. If the val loss was lowest at an earlier step, `model`/best gets
    the weights of that step; these are read from the folder `states`.
    """
    training, rows = params.training, trained.rows
    best = best_row(rows)
    save_model(trained.model, model, states / BEST if best.step < training.max_steps else None)
    write_text(curve, loss_csv(rows))
    return {
        "steps": training.max_steps,
        "tokens": training.max_steps * training.tokens_per_step,
        # The mean over the steps since the previous row; only an estimate if training.head is `sampled`.
        "train_loss": rows[-1].train_loss,
        "val_loss": rows[-1].val_loss,
        "best_val_loss": best.val_loss,
        "best_val_step": best.step,
        "diverged": divergence_warning(rows, training, params.model.vocab_size) is not None,
    }
