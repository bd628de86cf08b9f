"""The training loop: a pure function of (configuration, data, machine), however often it is interrupted.

The batch of a step depends on (seed, step) alone, dropout on (seed, step, micro-batch), and validation reads
fixed windows: no random state is kept between steps. So a training state on disk is model, optimizers and
loss curve, and a run that resumes from one ends with the same bits as a run that never stopped.

A GPU works behind the program, which waits for it only where losses are read (every log_interval steps).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compactgpt.common.device import resolve_device, set_precision
from compactgpt.common.errors import BadConfig, BadData, Busy, NotFinite, OutOfMemory
from compactgpt.common.storage import json_bytes, sha256_file, verified_manifest, write_text
from compactgpt.config import Params
from compactgpt.data.token_files import TokenFile, Window, evaluation_windows, open_tokens, training_batch
from compactgpt.model.cross_entropy import token_nats
from compactgpt.model.gpt import GPT
from compactgpt.model.sampled_softmax import draw_sample, inclusion_probabilities, token_counts
from compactgpt.model.weights import save_model
from compactgpt.training.checkpoint import load_newest_state, save_state
from compactgpt.training.distributed import Group, gathered, init_process_group
from compactgpt.training.initialization import initial_model, set_sinusoids, start_at_unigram
from compactgpt.training.optim import Optimizers

# The code that computes a training state: no other version of it resumes from that state.
SOURCES = ("data/token_files.py", "model/*.py", "training/*.py")
BEST = "best"  # folder of the best model so far, next to the training states


@dataclass(frozen=True)
class Splits:
    """The token files to train and to validate on, and the hash of their manifest."""

    train: TokenFile
    val: TokenFile
    sha256: str


def open_splits(folder: Path) -> Splits:
    """Open what the stage `tokenization` wrote.

    Raises:
        MissingInput, BadData: a file is missing, changed or damaged.
    """
    files = verified_manifest(folder)["files"]
    digest = hashlib.sha256(json_bytes(files)).hexdigest()
    return Splits(open_tokens(folder / "train.tokens"), open_tokens(folder / "val.tokens"), digest)


class Row(NamedTuple):
    """One point of the loss curve."""

    step: int  # updates made
    train_loss: float  # nats per token, over the steps since the last row
    val_loss: float  # nats per token, after this step


OnLosses = Callable[[list[tuple[int, float]]], None]
OnRow = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Trained:
    """The result of a finished run."""

    model: GPT
    rows: list[Row]
    val_tokens: int  # in each estimate of val_loss
    resumed_from: int  # step of the training state that this process started from, or 0


def run_key(params: Params, splits: Splits) -> str:
    """Hash everything that the bits of the result depend on, except for the number of processes.

    So one process can resume a run of two, though not to the same bits.
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


def train(
    params: Params,
    splits: Splits,
    folder: Path,
    *,
    on_step: Callable[[int, GPT], None] = lambda _step, _model: None,
    on_losses: OnLosses = lambda _losses: None,
    on_row: OnRow = lambda _rows: None,
    on_warning: Callable[[str], None] = lambda _message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train the model of params.yaml, from the newest training state in `folder` if there is one.

    Args:
        params: all of params.yaml; `model`, `training` and `runtime` are used.
        splits: the data.
        folder: of this run's training states, named by `run_key(params, splits)`.
        on_step: called after every step with its number, from 1, and the model, which it must not change.
        on_losses: called with steps and training losses that were not reported yet; on a GPU several at once.
        on_row: called with the loss curve when it has a new row.
        on_warning: called with what the user must know about this run.
        should_stop: asked after every step.

    Raises:
        Busy: `should_stop` returned True; the state is saved, and the next call resumes from it.
        NotFinite: a loss or gradient is NaN or infinite; nothing of that step is kept.
        OutOfMemory: the message says which number to lower.
        BadConfig, BadData: the tokens don't fit the model.
    """
    device = resolve_device(params.runtime.device)
    with init_process_group(params.training.launcher, device) as group, _memory_errors():
        trainer = Trainer(params, splits, folder, group)
        max_steps = params.training.max_steps
        resumed_from = trainer.resume()
        if warning := trainer.determinism_warning():
            on_warning(warning)
        while trainer.step < max_steps:
            trainer.make_step()
            if trainer.is_report_due():
                trainer.report(on_losses, on_row)
            stops = group.any_rank(should_stop()) and trainer.step < max_steps
            if stops or trainer.step % params.training.checkpoint_interval == 0:
                trainer.report(on_losses, on_row)  # a state holds read losses only
                trainer.save()
            on_step(trainer.step, trainer.model)
            if stops:
                raise Busy(
                    f"stopped at step {trainer.step} of {max_steps}, which is saved: "
                    "run `dvc repro` again, it resumes from there"
                )
        return Trained(trainer.full_model().eval(), trainer.rows, trainer.val_tokens, resumed_from)


class Trainer:
    """What changes while training runs: model, optimizers, loss curve and the number of updates."""

    def __init__(self, params: Params, splits: Splits, folder: Path, group: Group) -> None:
        self.training, self.shape, self.group = params.training, params.model, group
        self.splits, self.folder = splits, folder
        self._check_vocabulary()
        self.run_key = run_key(params, splits)
        self.sequences = self.training.tokens_per_step // self.shape.block_size
        self.batch_slice = group.batch_slice(self.sequences, self.training.micro_batch_size)
        group.assert_same_on_all_ranks("params.yaml, data or program", self.run_key)
        self.device = resolve_device(params.runtime.device)
        self.log_interval = params.runtime.log_interval
        # A GPU works behind this program: a loss stays on it until it is reported.
        self.defers_losses = self.device == "cuda"
        self.windows = _select_windows(splits.val, self.shape.block_size, self.training.eval_windows)
        self.val_tokens = sum(len(window.targets) for window in self.windows)
        set_precision(self.training.dtype)
        self.model, self.optimizers = self._build_model()
        self.inclusion: npt.NDArray[np.float64] | None = (
            None  # of each token in a step's sample, (vocab_size,)
        )
        if self.training.head == "sampled":
            size, power = self.training.sample_tokens, self.training.sample_power
            self.inclusion = inclusion_probabilities(self._token_counts, size, power)
        self.step = 0  # updates made
        self.rows: list[Row] = []
        self.unreported: list[tuple[int, Tensor, Tensor]] = []  # step from 0, loss and gradient norm
        self.losses: list[float] = []  # since the last row
        self.previous_processes = group.world_size  # that made the steps before this process started

    def _check_vocabulary(self) -> None:
        for split in (self.splits.train, self.splits.val):
            if split.header.vocab_size > self.shape.vocab_size:
                raise BadConfig(
                    f"model.vocab_size: found {self.shape.vocab_size}, but {split.path} has a vocabulary of "
                    f"{split.header.vocab_size} tokens; it must be at least that"
                )

    def _build_model(self) -> tuple[GPT, Optimizers]:
        """Return the model before its first step, or this process's shards of it, and its optimizers."""
        if self.group.is_sharded:
            from compactgpt.training.fsdp import orthogonalize_sharded, shard_model

            source = self._initial_model() if self.group.is_main_process else None
            model = shard_model(source, self.shape, self.device, compiles=self.training.compile)
            return model, Optimizers(model, self.training, orthogonalize_sharded)
        model = self._initial_model().to(self.device)
        if self.training.compile:
            model.compiled = torch.compile(model.blocks)
        return model, Optimizers(model, self.training)

    def _initial_model(self) -> GPT:
        """Return the full model before its first step, on the CPU."""
        model = initial_model(self.shape, self.training)
        if self.training.init_positions:
            set_sinusoids(model, self.training.init_positions)
        if self.training.init_unigram:
            start_at_unigram(model, self._token_counts, self.training.init_unigram)
        return model

    @cached_property
    def _token_counts(self) -> npt.NDArray[np.int64]:
        """Number of times that each token is in the training split. (vocab_size,)."""
        return token_counts(self.splits.train.tokens, self.shape.vocab_size)

    def full_model(self) -> GPT:
        """Return the model; a sharded one is gathered in the main process, which writes files."""
        if not self.group.is_sharded:
            return self.model
        from compactgpt.training.fsdp import full_model

        return full_model(self.model, self.group.is_main_process)

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a training state; changing them changes model and optimizers."""
        return {**self.model.state_dict(), **self.optimizers.state}

    def resume(self) -> int:
        """Continue from the newest valid training state, and return its step; 0 if there is none."""
        if found := load_newest_state(self.folder, self.run_key, self._tensors(), self.group):
            self.step, progress = found
            self.rows = [Row(*row) for row in progress["rows"]]
            self.losses = list(progress["waiting"])
            self.previous_processes = progress["processes"]
        return self.step

    def determinism_warning(self) -> str | None:
        """Return a warning if bits will differ from those of an uninterrupted run."""
        if self.previous_processes == self.group.world_size:
            return None
        return (
            f"up to step {self.step} this run had {self.previous_processes} of training.launcher.processes, "
            f"from here on {self.group.world_size}: the result equals that of an uninterrupted run within "
            "rounding only"
        )

    def report(self, on_losses: OnLosses, on_row: OnRow) -> None:
        """Report the losses since the last report, and a new row of the loss curve if one is due."""
        if losses := self.read_losses():
            on_losses(losses)
            if self.is_row_due():
                self.add_row()
                on_row(self.rows)

    def save(self) -> None:
        """Write a training state."""
        progress = {"rows": self.rows, "waiting": self.losses, "processes": self.group.world_size}
        save_state(self.folder, self.run_key, self.step, self._tensors(), progress, self.group)

    def make_step(self) -> None:
        """Make one update."""
        tokens, targets, *head = self._batch()
        loss = self._accumulate_gradient(tokens, targets, *head)
        grad_norm = self.optimizers.grad_norm()
        if not self.defers_losses:  # a CPU knows before the update whether the step is good
            self._check_finite(self.step, {"training loss": loss, "norm of its gradient": grad_norm})
        self.unreported.append((self.step, loss, grad_norm))
        self.optimizers.update(self.step, grad_norm)
        self.step += 1

    def _batch(self) -> tuple[Tensor, ...]:
        """Return this process's slice of the step's batch: tokens and targets, 2 x (rows, T).

        With a sampled softmax both are positions in the sample, and two more arguments of the model follow:
        the sample's rows of the tied matrix, (K, C), and the correction of their logits, (K,).
        """
        seed = self.training.seed
        tokens, targets = training_batch(
            self.splits.train.tokens,
            seed=seed,
            step=self.step,
            sequences=self.sequences,
            block_size=self.shape.block_size,
        )  # 2 x (B, T), of all processes
        head: tuple[Tensor, ...] = ()
        if self.inclusion is not None:
            sample = draw_sample(self.inclusion, np.stack([tokens, targets]), seed=seed, step=self.step)
            tokens, targets = sample.positions(tokens), sample.positions(targets)
            table = self.optimizers.select_rows(torch.from_numpy(sample.ids).to(self.device))
            head = table, torch.from_numpy(-sample.log_inclusion).to(self.device)
        return self._to_device(tokens[self.batch_slice]), self._to_device(targets[self.batch_slice]), *head

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        # From pinned memory a GPU copies while this program draws the next batch.
        tensor = tensor.pin_memory() if self.defers_losses else tensor
        return tensor.to(self.device, non_blocking=True)

    def _accumulate_gradient(self, tokens: Tensor, targets: Tensor, *head: Tensor) -> Tensor:
        """Add up the gradient of the mean loss over micro-batches and processes, and return the loss.

        Args:
            tokens: (rows, T)
            targets: (rows, T)
            head: table and correction of a sampled softmax. (K, C), (K,)

        Returns:
            ()
        """
        self.model.train()
        size = self.training.micro_batch_size
        own = len(tokens) // size
        first = self.batch_slice.start // size  # micro-batches of the processes before this one
        micro_batches = own * self.group.world_size
        losses: list[Tensor] = []
        for number in range(own):
            if self.shape.dropout:
                torch.manual_seed(_dropout_seed(self.training.seed, self.step, first + number))
            rows = slice(number * size, (number + 1) * size)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
                loss: Tensor = self.model(tokens[rows], targets[rows], *head) / micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return self.group.sum_gradients(self.optimizers.trained_parameters(), torch.stack(losses).sum())

    def read_losses(self) -> list[tuple[int, float]]:
        """Return steps, from 1, and losses in nats per token since the last call; waits for a GPU.

        Raises:
            NotFinite: a loss or the norm of a gradient is not finite.
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

    def _check_finite(self, step: int, numbers: Mapping[str, float | Tensor]) -> None:
        if all(math.isfinite(number) for number in numbers.values()):
            return
        found = " and the ".join(f"{name} is {float(number)}" for name, number in numbers.items())
        raise NotFinite(
            f"step {step + 1} of {self.training.max_steps}: the {found}; nothing of it was kept, and its "
            f"batch (seed {self.training.seed}, step {step} from 0) would give the same again: lower "
            "training.learning_rate, embedding_learning_rate or muon_learning_rate, or lengthen "
            "training.warmup_steps, in params.yaml, then run `dvc repro`"
        )

    def is_report_due(self) -> bool:
        """Whether to read losses after this step: on a GPU seldom, since reading waits for it."""
        return not self.defers_losses or self.is_row_due() or self.step % self.log_interval == 0

    def is_row_due(self) -> bool:
        """Whether the curve has a row at this step: the first, every eval_interval, the last."""
        return self.step in (1, self.training.max_steps) or self.step % self.training.eval_interval == 0

    def add_row(self) -> None:
        """Validate, add a row to the loss curve, and save the model if it is the best so far."""
        val_loss = validation_loss(self.model, self.windows, self.training.micro_batch_size)
        self._check_finite(self.step - 1, {"validation loss": val_loss})
        # Every step has the same number of tokens, so the mean over steps is the mean over tokens.
        row = Row(self.step, math.fsum(self.losses) / len(self.losses), val_loss)
        self.rows.append(row)
        self.losses = []
        is_best = row is best_row(self.rows) and self.step < self.training.max_steps
        # Other machines may round otherwise: the main process decides for all.
        if self.group.any_rank(is_best and self.group.is_main_process):
            model = self.full_model()
            if self.group.is_main_process:
                facts = {"step": row.step, "val_loss": row.val_loss}
                save_model(model, self.folder / BEST, facts, private=True)


def best_row(rows: list[Row]) -> Row:
    """Return the row of the lowest validation loss; the earliest of equal ones."""
    return min(rows, key=lambda row: row.val_loss)


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _select_windows(val: TokenFile, block_size: int, count: int) -> list[Window]:
    """Return `count` evaluation windows, evenly spread over the split: always the same.

    Raises:
        BadData: the split has none.
    """
    windows = list(evaluation_windows(val, block_size))
    if not windows:
        raise BadData(
            f"{val.path} has no tokens to validate on: raise tokenization.val_fraction, or add text"
        )
    positions = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    return [windows[position] for position in positions]


@torch.no_grad()
def validation_loss(model: GPT, windows: list[Window], batch_size: int) -> float:
    """Return the loss over windows in nats per token, without the vocabulary's padding rows.

    An estimate for the curve; the comparison quotes what the stage `evaluation` measures.
    """
    model.eval()
    nats: list[float] = []
    with gathered(model):
        for start in range(0, len(windows), batch_size):
            nats += window_nats(model, windows[start : start + batch_size])
    return math.fsum(nats) / len(nats)


def window_nats(model: GPT, windows: list[Window]) -> list[float]:
    """Return the cross-entropy of every target of some windows, in nats."""
    head = model.wte.weight[: model.shape.vocab_size]  # (vocab_size, C)
    T = max(len(window.tokens) for window in windows)
    tokens = torch.zeros(len(windows), T, dtype=torch.int64)
    for row, window in enumerate(windows):  # attention is causal: the padding at the end changes nothing
        tokens[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
    x = model.hidden(tokens.to(head.device))  # (B, T, C)
    unpadded = torch.cat([x[row, : len(window.targets)] for row, window in enumerate(windows)])  # (N, C)
    targets = torch.from_numpy(np.concatenate([window.targets for window in windows])).to(head.device)  # (N,)
    nats: list[float] = token_nats(unpadded, head, targets).tolist()
    return nats


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Name the number to lower when memory runs out; on a CPU, torch raises a RuntimeError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory_error = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory_error and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            "no memory left: halve training.micro_batch_size in params.yaml (tokens_per_step stays as it "
            "is), then model.block_size or model.n_embd"
        ) from error


def save_results(
    params: Params, splits: Splits, trained: Trained, states: Path, model: Path, curve: Path
) -> dict[str, Any]:
    """Write the trained model and its curve, and return the content of reports/training.json.

    `model` gets the last weights. If an earlier validation loss was lower, `model`/best gets those.
    """
    training, rows = params.training, trained.rows
    best = best_row(rows)
    sequences = training.tokens_per_step // params.model.block_size
    tokens = training.max_steps * training.tokens_per_step
    train_split_tokens = splits.train.header.tokens
    before_last = rows[-2].step if len(rows) > 1 else 0
    report = {
        "num_params": trained.model.num_params,
        "num_params_nanogpt": trained.model.num_params_nanogpt,
        "num_params_non_embedding": trained.model.num_params_non_embedding,
        "steps": training.max_steps,
        "tokens": tokens,
        "tokens_per_step": training.tokens_per_step,
        "gradient_accumulation_steps": sequences // training.micro_batch_size,
        "train_split_tokens": train_split_tokens,
        "epochs": tokens / train_split_tokens,
        "head": training.head,  # sampled: train_loss is an estimate; val_loss is always the full softmax's
        "train_loss": rows[-1].train_loss,
        "train_loss_steps": training.max_steps - before_last,  # train_loss is the mean of these last steps
        "val_loss": rows[-1].val_loss,
        "val_loss_tokens": trained.val_tokens,
        "best_val_loss": best.val_loss,
        "best_val_step": best.step,
        "data_sha256": splits.sha256,
    }
    save_model(trained.model, model, report, states / BEST if best.step < training.max_steps else None)
    write_text(curve, loss_csv(rows))
    return report


def loss_csv(rows: list[Row]) -> str:
    """Return the loss curve as CSV, in nats per token."""
    lines = [f"{row.step},{row.train_loss!r},{row.val_loss!r}" for row in rows]
    return "\n".join(["step,train_loss,val_loss", *lines]) + "\n"
