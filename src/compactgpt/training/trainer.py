"""The training loop: a pure function of (configuration, data, machine), however often it is interrupted.

The batch of a step depends on (seed, step) alone, dropout on (seed, step, micro-step), validation reads
fixed windows: nothing that is random is kept between steps. So a state on disk is model, optimizers and
loss curve, and a run that goes on from one ends with the bits of a run that was never stopped.

A GPU works behind the program, which never waits for it between two looks at the losses (log_interval).
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compactgpt.common.console import Progress, silent
from compactgpt.common.device import resolve_device, set_precision
from compactgpt.common.errors import BadConfig, BadData, Busy, NotFinite, OutOfMemory
from compactgpt.common.storage import json_bytes, sha256_file, verified_manifest, write_text
from compactgpt.common.torchrun import DistInfo
from compactgpt.config import Params, Training
from compactgpt.data.token_files import TokenFile, Window, evaluation_windows, open_tokens, training_batch
from compactgpt.model.gpt import GPT, token_nats
from compactgpt.model.sampled_softmax import draw_sample, inclusion_probabilities, token_counts
from compactgpt.training.checkpoint import load_newest_state, save_model, save_state
from compactgpt.training.distributed import Group, gathered, init_process_group
from compactgpt.training.initialization import initial_model, set_sinusoids, start_at_unigram
from compactgpt.training.optim import Optimizers, lr_multiplier

# What a training state was computed by: another version of one of them never goes on from it.
SOURCES = (
    "data/token_files.py",
    "model/cross_entropy.py",
    "model/cross_entropy_triton.py",
    "model/gpt.py",
    "model/huggingface.py",
    "model/sampled_softmax.py",
    "training/checkpoint.py",
    "training/distributed.py",
    "training/fsdp.py",
    "training/initialization.py",
    "training/optim.py",
    "training/trainer.py",
)
# Where the best model waits beside the training states, until the run ends.
BEST = "best"

OnMetrics = Callable[[int, Mapping[str, float]], None]
"""Called with a step and what was measured at it."""
Watch = Callable[[int, GPT], None]
"""Called after every step with the model, to look at and not to change."""


@dataclass(frozen=True)
class Splits:
    """The two token files, and the hash of their folder's list of files."""

    train: TokenFile
    val: TokenFile
    sha256: str


def open_splits(folder: Path) -> Splits:
    """Verify and open what the stage `tokenization` made.

    Raises:
        MissingInput, BadData: a file is missing, altered or damaged.
    """
    files = verified_manifest(folder)["files"]
    digest = hashlib.sha256(json_bytes(files)).hexdigest()
    return Splits(open_tokens(folder / "train.tokens"), open_tokens(folder / "val.tokens"), digest)


@dataclass(frozen=True)
class Row:
    """One point of the loss curve."""

    step: int  # updates made
    train_loss: float  # nats per token, over the steps since the row before
    val_loss: float  # nats per token, after this step


@dataclass
class Curve:
    """The loss curve so far, and the training losses that wait for their row."""

    rows: list[Row] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)

    def close_row(self, step: int, val_loss: float) -> Row:
        """Turn the waiting losses into a row; every step has the same number of tokens."""
        self.rows.append(Row(step, math.fsum(self.waiting) / len(self.waiting), val_loss))
        self.waiting = []
        return self.rows[-1]

    def to_json(self) -> dict[str, Any]:
        """Render for a training state."""
        return {
            "rows": [[row.step, row.train_loss, row.val_loss] for row in self.rows],
            "waiting": self.waiting,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Curve":
        """Read what `to_json` made."""
        return cls([Row(*row) for row in value["rows"]], list(value["waiting"]))


OnCurve = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves."""

    model: GPT
    rows: list[Row]
    val_tokens: int  # scored in each estimate of val_loss
    resumed_from: int  # step of the training state that this process began with, or 0


def run_key(params: Params, splits: Splits) -> str:
    """Hash everything that the bits of the result depend on, but for the number of processes.

    So a run of two processes can resume with one, though not to the same bits.
    """
    here = Path(__file__).parents[1]
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
        "sources": {name: sha256_file(here / name) for name in SOURCES},
    }
    return hashlib.sha256(json_bytes(identity)).hexdigest()[:16]


def train(
    params: Params,
    splits: Splits,
    state: Path,
    *,
    progress: Progress = silent,
    on_metrics: OnMetrics = lambda _step, _values: None,
    on_curve: OnCurve = lambda _rows: None,
    watch: Watch = lambda _step, _model: None,
    tell: Callable[[str], None] = lambda _text: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train the model of params.yaml, from the newest training state in `state` where there is one.

    Args:
        params: all of params.yaml; `model`, `training` and `runtime` are used.
        splits: the data.
        state: folder of this run's training states, named by `run_key(params, splits)`.
        progress: told of every step.
        on_metrics: told of every step's train/loss, train/learning_rate, train/tokens_per_second, and
            of val/loss where it is measured. On a GPU the news of several steps come together.
        on_curve: given the curve so far, from its first row, whenever it has a new one.
        watch: shown the model after every step.
        tell: told what the user must know of this run, in a sentence.
        stopping: asked after every step.

    Raises:
        Busy: `stopping` said yes; the state was saved, and the next call goes on from it.
        NotFinite: a loss or gradient is NaN or infinite; nothing of that step was kept.
        OutOfMemory: says which number to lower.
        BadConfig, BadData: the tokens don't fit the model.
    """
    _check_vocabulary(params, splits)
    device = resolve_device(params.runtime.device)
    with init_process_group(params.training.launcher, device) as group, _memory_errors():
        run = _Run(params, splits, state, group)
        resumed_from = run.resume()
        if warning := run.determinism_warning():
            tell(warning)
        clock = _Clock(run.step)
        while run.step < params.training.max_steps:
            run.make_step()
            if run.looks_now():
                _tell(run, clock, on_metrics, on_curve)
            stop = group.any_rank(stopping()) and run.step < params.training.max_steps
            if stop or run.step % params.training.checkpoint_interval == 0:
                _tell(run, clock, on_metrics, on_curve)
                run.save()
            progress(run.step, params.training.max_steps, clock.figures(params.training, run.step))
            watch(run.step, run.model)
            if stop:
                raise Busy(
                    f"stopped at step {run.step} of {params.training.max_steps}, which is saved: "
                    "run `dvc repro` again, it goes on from there"
                )
        return Trained(run.full_model().eval(), run.curve.rows, run.val_tokens, resumed_from)


def _tell(run: "_Run", clock: "_Clock", on_metrics: OnMetrics, on_curve: OnCurve) -> None:
    """Tell of the steps since the last time, and of a new row of the curve where one is due."""
    if losses := run.read_losses():
        speed = clock.tick(run.training, losses)
        for step, loss in losses:
            rate = run.training.learning_rate * lr_multiplier(run.training, step - 1)
            on_metrics(step, {"train/loss": loss, "train/learning_rate": rate, **speed})
        if run.row_is_due():
            on_metrics(run.step, {"val/loss": run.measure().val_loss})
            on_curve(run.curve.rows)


def _check_vocabulary(params: Params, splits: Splits) -> None:
    for split in (splits.train, splits.val):
        if split.header.vocab_size > params.model.vocab_size:
            raise BadConfig(
                f"model.vocab_size: found {params.model.vocab_size}, but {split.path} was made with "
                f"{split.header.vocab_size} kinds of tokens; it must be at least that"
            )


class _Run:
    """What changes while training runs: model, optimizers, curve and the number of updates made."""

    def __init__(self, params: Params, splits: Splits, folder: Path, group: Group) -> None:
        self.training, self.shape, self.group = params.training, params.model, group
        self.splits, self.folder = splits, folder
        self.key = run_key(params, splits)
        sequences = self.training.tokens_per_step // self.shape.block_size
        self.rows = group.batch_slice(sequences, self.training.micro_batch_size)
        group.assert_same_on_all_ranks("params.yaml, data or program", self.key)
        self.device = resolve_device(params.runtime.device)
        self.windows = _chosen_windows(splits.val, self.shape.block_size, self.training.eval_windows)
        self.val_tokens = sum(len(window.targets) for window in self.windows)
        set_precision(self.training.dtype)
        self.model, self.optimizers = self._begun()
        self.curve = Curve()
        self.step = 0
        self.begun_by = group.world_size  # processes that made the steps before
        self.inclusion = self._inclusion()
        self.defers = self.device == "cuda"  # a GPU works behind us, and asking for a number waits for it
        self.log_interval = params.runtime.log_interval
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # step from 0, loss and gradient's norm, on device
        self.news: list[tuple[int, float]] = []  # step from 1 and loss, of the steps that nobody was told of

    def _begun(self) -> tuple[GPT, Optimizers]:
        """The model before its first step, whole or this process's part of it, and its optimizers."""
        if self.group.is_sharded:
            from compactgpt.training.fsdp import orthogonalise_sharded, shard_model

            source = self.group.run_on_main(self._initial_model)
            model = shard_model(source, self.shape, self.device, compiles=self.training.compile)
            return model, Optimizers(model, self.training, orthogonalise_sharded)
        model = self._initial_model().to(self.device)
        if self.training.compile:
            model.compiled = torch.compile(model.blocks)
        return model, Optimizers(model, self.training)

    def _initial_model(self) -> GPT:
        """Return the whole model before its first step, on the CPU."""
        model = initial_model(self.shape, self.training)
        if self.training.init_positions:
            set_sinusoids(model, self.training.init_positions)
        if self.training.init_unigram:
            start_at_unigram(model, self._counts(), self.training.init_unigram)
        return model

    def _counts(self) -> npt.NDArray[np.int64]:
        """Count each token of the training split. (vocab_size,)."""
        return token_counts(self.splits.train.tokens, self.shape.vocab_size)

    def _inclusion(self) -> npt.NDArray[np.float64] | None:
        """Each token's probability of being in a step's sample, None for a full softmax. (vocab_size,)."""
        if self.training.head == "full":
            return None
        return inclusion_probabilities(
            self._counts(), self.training.sample_tokens, self.training.sample_power
        )

    def full_model(self) -> GPT:
        """Return the model; a sharded one is gathered in the main process, which writes files."""
        if not self.group.is_sharded:
            return self.model
        from compactgpt.training.fsdp import full_model

        return full_model(self.model, self.group.is_main_process)

    def resume(self) -> int:
        """Go on from the newest whole training state; say from which step, 0 if there is none.

        One process reads it and tells the others, whose machines may not see the folder. In mode fsdp
        all read, each its part, whether one process wrote it or several.
        """
        if self.group.mode == "fsdp":
            from compactgpt.training.fsdp import load_newest_sharded_state

            tensors = {**self.model.state_dict(), **self.optimizers.zero_state()}
            if loaded := load_newest_sharded_state(self.folder, self.key, tensors, self.group):
                self.optimizers.load_state_tensors(
                    {name: tensors[name] for name in self.optimizers.zero_state()}
                )
                self._take_progress(*loaded)
            return self.step
        if self.group.is_main_process:
            loaded = load_newest_state(self.folder, self.key, self.model, self.optimizers)
            if loaded:
                self._take_progress(*loaded)
        self.step = self.group.broadcast_number(self.step)
        self.group.broadcast(list(self.model.state_dict().values()))
        if self.step:
            if not self.group.is_main_process:
                self.optimizers.load_state_tensors(self.optimizers.zero_state())
            self.group.broadcast(list(self.optimizers.state_tensors().values()))
        return self.step

    def _take_progress(self, step: int, progress: Mapping[str, Any]) -> None:
        """Go on from what a state says, in mode fsdp in every process, which has the step alone."""
        self.step = step
        if self.group.is_main_process:
            self.curve = Curve.from_json(progress)
            self.begun_by = progress["processes"]

    def determinism_warning(self) -> str | None:
        """Return a warning, in the main process, if bits will differ from those of an uninterrupted run."""
        if self.begun_by == self.group.world_size:
            return None
        return (
            f"up to step {self.step} this run had {self.begun_by} of training.launcher.processes, from here "
            f"on {self.group.world_size}: the result equals that of an uninterrupted run within rounding only"
        )

    def save(self) -> None:
        """Write a training state."""
        progress = {**self.curve.to_json(), "processes": self.group.world_size}
        if self.group.is_sharded:
            from compactgpt.training.fsdp import save_sharded_state

            tensors = {**self.model.state_dict(), **self.optimizers.state_tensors()}
            save_sharded_state(self.folder, self.key, self.step, tensors, progress, self.group)
        elif self.group.is_main_process:
            save_state(self.folder, self.key, self.step, self.model, self.optimizers, progress)

    def make_step(self) -> None:
        """Make one update. The tokens of a step are what the user states; how many micro-batches follows."""
        loss = self._gradient(*self._batch())
        grad_norm = self.group.full_tensor(self.optimizers.grad_norm())
        self.unread.append((self.step, loss, grad_norm))
        if not self.defers:
            self._read()
        self.optimizers.update(self.step, grad_norm)
        self.step += 1

    def _batch(self) -> tuple[Tensor, ...]:
        """This process's rows of the step's batch on the device: tokens and targets, 2 x (rows, T).

        With a sampled softmax both are positions in the sample, and two more arguments of the model follow:
        the sample's rows of the tied matrix, (K, C), and the correction of their logits, (K,).
        """
        arrays = training_batch(
            self.splits.train.tokens,
            seed=self.training.seed,
            step=self.step,
            sequences=self.training.tokens_per_step // self.shape.block_size,
            block_size=self.shape.block_size,
        )
        head: tuple[Tensor, ...] = ()
        if self.inclusion is not None:
            seed = self.training.seed
            sample = draw_sample(self.inclusion, np.stack(arrays), seed=seed, step=self.step)
            arrays = sample.positions(arrays[0]), sample.positions(arrays[1])
            table = self.optimizers.select_rows(torch.from_numpy(sample.ids).to(self.device))
            head = table, torch.from_numpy(-sample.log_inclusion).to(self.device)
        tokens, targets = (torch.from_numpy(array[self.rows]) for array in arrays)
        if self.defers:  # from pinned memory the copy goes on while we draw the next batch
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return (
            tokens.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
            *head,
        )

    def read_losses(self) -> list[tuple[int, float]]:
        """Steps, counted from 1, and their losses in nats per token, since the last call.

        Raises:
            NotFinite: one of them went wrong; a step on a CPU says so before its update.
        """
        self._read()
        news, self.news = self.news, []
        return news

    def _read(self) -> None:
        """Look at the losses and norms that the device has, waiting for them, and judge them in order."""
        if not self.unread:
            return
        numbers = torch.stack([torch.stack([loss, norm]) for _, loss, norm in self.unread]).tolist()
        steps, self.unread = [step for step, _, _ in self.unread], []
        for step, (loss, norm) in zip(steps, numbers, strict=True):
            self._refuse_non_finite(step, {"training loss": loss, "norm of its gradient": norm})
            self.curve.waiting.append(loss)
            self.news.append((step + 1, loss))

    def _gradient(self, tokens: Tensor, targets: Tensor, *head: Tensor) -> Tensor:
        """Leave the gradient of the mean loss in what is trained; return the loss. Takes a `_batch`. ()."""
        self.model.train()
        size = self.training.micro_batch_size
        own, first = len(tokens) // size, self.rows.start // size
        micro_batches = own * self.group.world_size  # of all processes
        losses: list[Tensor] = []
        for number in range(own):
            if self.shape.dropout:
                torch.manual_seed(_dropout_seed(self.training.seed, self.step, first + number))
            rows = slice(number * size, (number + 1) * size)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
                loss: Tensor = self.model(tokens[rows], targets[rows], *head) / micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return self.group.sum_gradients(self.optimizers.trained(), torch.stack(losses).sum())

    def _refuse_non_finite(self, step: int, numbers: Mapping[str, float]) -> None:
        if all(math.isfinite(number) for number in numbers.values()):
            return
        found = " and the ".join(f"{name} is {number}" for name, number in numbers.items())
        raise NotFinite(
            f"step {step + 1} of {self.training.max_steps}: the {found}; nothing of it was kept, and its "
            f"batch (seed {self.training.seed}, step {step} from 0) would give the same again: lower "
            "training.learning_rate, embedding_learning_rate or muon_learning_rate, or lengthen "
            "training.warmup_steps, in params.yaml, then run `dvc repro`"
        )

    def looks_now(self) -> bool:
        """Tell whether to look at the losses after this step: a GPU is seldom waited for."""
        return not self.defers or self.row_is_due() or self.step % self.log_interval == 0

    def row_is_due(self) -> bool:
        """Tell whether the curve has a row at this step: the first, every eval_interval, the last."""
        return self.step in (1, self.training.max_steps) or self.step % self.training.eval_interval == 0

    def measure(self) -> Row:
        """Add a row to the curve, and keep the model if it is the best so far."""
        val_loss = validation_loss(self.model, self.windows, self.training.micro_batch_size)
        self._refuse_non_finite(self.step - 1, {"validation loss": val_loss})
        row = self.curve.close_row(self.step, val_loss)
        best = row is best_row(self.curve.rows) and self.step < self.training.max_steps
        if self.group.any_rank(best and self.group.is_main_process):  # only it knows the whole curve
            model = self.full_model()
            if self.group.is_main_process:
                facts = {"step": row.step, "val_loss": row.val_loss}
                save_model(model, self.folder / BEST, facts, private=True)
        return row


def best_row(rows: list[Row]) -> Row:
    """The row of the lowest validation loss; the earliest of equals."""
    return min(rows, key=lambda row: row.val_loss)


def _dropout_seed(seed: int, step: int, micro_step: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _chosen_windows(val: TokenFile, block_size: int, count: int) -> list[Window]:
    """Take `count` evaluation windows, evenly spread over the whole split: always the same.

    Raises:
        BadData: the split has none.
    """
    windows = list(evaluation_windows(val, block_size))
    if not windows:
        raise BadData(
            f"{val.path} has no tokens to validate on: raise tokenization.val_fraction, or add text"
        )
    places = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    return [windows[place] for place in places]


@torch.no_grad()
def validation_loss(model: GPT, windows: list[Window], batch_size: int) -> float:
    """Loss over windows in nats per token, padding rows of the vocabulary masked. Sums, then one division.

    An estimate for the curve; what the table quotes is measured by the stage `evaluation`.
    """
    model.eval()
    nats: list[float] = []
    with gathered(model):
        for batch in _batches(windows, batch_size):
            nats += _window_nats(model, batch)
    return math.fsum(nats) / len(nats)


def _window_nats(model: GPT, batch: list[Window]) -> list[float]:
    """Nats of every target of some windows."""
    head = model.wte.weight[: model.shape.vocab_size]
    T = max(len(window.tokens) for window in batch)
    tokens = torch.zeros(len(batch), T, dtype=torch.int64)
    for row, window in enumerate(batch):  # causal: what pads the end changes nothing before it
        tokens[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
    x = model.hidden(tokens.to(head.device))  # (B, T, C)
    kept = torch.cat([x[row, : len(window.targets)] for row, window in enumerate(batch)])  # (N, C)
    targets = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(head.device)  # (N,)
    nats: list[float] = token_nats(kept, head, targets).tolist()
    return nats


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


class _Clock:
    """Speed and time left, for people only."""

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.begin = self.last = time.monotonic()
        self.loss = math.nan

    def tick(self, training: Training, losses: list[tuple[int, float]]) -> dict[str, float]:
        """Tokens a second over the steps since the last call."""
        before, self.last, self.loss = self.last, time.monotonic(), losses[-1][1]
        tokens = len(losses) * training.tokens_per_step
        return {"train/tokens_per_second": tokens / max(1e-9, self.last - before)}

    def figures(self, training: Training, step: int) -> dict[str, str]:
        """Render for a progress bar."""
        seconds_a_step = (time.monotonic() - self.begin) / (step - self.first_step)
        left = round(seconds_a_step * (training.max_steps - step))
        return {
            "loss": "-" if math.isnan(self.loss) else f"{self.loss:.3f}",
            "tokens/s": f"{training.tokens_per_step / max(1e-9, seconds_a_step):,.0f}",
            "left": f"{left // 60}:{left % 60:02d}",
        }


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say which number to lower; torch tells a full CPU memory by the text of a RuntimeError only."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cuda = isinstance(error, torch.OutOfMemoryError)
        if not (cuda or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        raise OutOfMemory(
            "no memory left: halve training.micro_batch_size in params.yaml (tokens_per_step stays as it "
            "is), then model.block_size or model.n_embd"
        ) from error


def budget(params: Params, processes: int) -> str:
    """Say what a step is: nobody's batch shrinks in silence when a micro-batch or a machine is lost.

    Raises:
        BadConfig: the step can't be shared out.
    """
    training, block = params.training, params.model.block_size
    sequences = training.tokens_per_step // block
    group = Group(DistInfo(world_size=processes), training.launcher.mode)
    own = group.batch_slice(sequences, training.micro_batch_size)
    accumulation = (own.stop - own.start) // training.micro_batch_size
    named = "process" if processes == 1 else "processes"
    return (
        f"tokens_per_step {training.tokens_per_step:,} = {training.micro_batch_size} sequences x {block} "
        f"tokens x {accumulation} micro-batches x {processes} {named}; "
        f"{training.max_steps:,} steps, {training.max_steps * training.tokens_per_step:,} tokens"
    )


def report(params: Params, splits: Splits, trained: Trained) -> dict[str, Any]:
    """Render what reports/training.json says: nothing that differs between two identical runs."""
    training, rows = params.training, trained.rows
    best = best_row(rows)
    sequences = training.tokens_per_step // params.model.block_size
    tokens = training.max_steps * training.tokens_per_step
    before_last = rows[-2].step if len(rows) > 1 else 0
    return {
        "num_params": trained.model.num_params,
        "num_params_nanogpt": trained.model.num_params_nanogpt,
        "num_params_non_embedding": trained.model.num_params_non_embedding,
        "steps": training.max_steps,
        "tokens": tokens,
        "tokens_per_step": training.tokens_per_step,
        "gradient_accumulation_steps": sequences // training.micro_batch_size,
        "train_split_tokens": splits.train.header.tokens,
        "epochs": tokens / splits.train.header.tokens,
        "head": training.head,  # sampled: train_loss is an estimate; val_loss is always the full softmax's
        "train_loss": rows[-1].train_loss,
        "train_loss_steps": training.max_steps - before_last,  # train_loss is the mean of so many last steps
        "val_loss": rows[-1].val_loss,
        "val_loss_tokens": trained.val_tokens,
        "best_val_loss": best.val_loss,
        "best_val_step": best.step,
        "data_sha256": splits.sha256,
    }


def save_results(
    params: Params, splits: Splits, trained: Trained, states: Path, model: Path, curve: Path
) -> dict[str, Any]:
    """Write the trained model and its curve; return the report.

    `model` holds the last weights. Where an earlier validation loss was lower, `model`/best holds those.
    """
    facts = report(params, splits, trained)
    save_model(
        trained.model, model, facts, states / BEST if facts["best_val_step"] < facts["steps"] else None
    )
    write_text(curve, loss_csv(trained.rows))
    return facts


def loss_csv(rows: list[Row]) -> str:
    """Render the loss curve, nats per token."""
    lines = [f"{row.step},{row.train_loss!r},{row.val_loss!r}" for row in rows]
    return "\n".join(["step,train_loss,val_loss", *lines]) + "\n"
