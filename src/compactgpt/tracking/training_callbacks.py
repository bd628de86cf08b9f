"""Callbacks that show the progress of training and log it to MLflow. They change no result of training."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiktoken import Encoding

from compactgpt.common.device import dist_info
from compactgpt.common.storage import write_text
from compactgpt.config import Params
from compactgpt.data.tokenizer import load_encoding
from compactgpt.forecast.estimate import expected_loss
from compactgpt.model.gpt import GPT
from compactgpt.training.distributed import gathered
from compactgpt.training.loss_curve import Row, best_row, divergence_warning, loss_csv
from compactgpt.training.optim import lr_multiplier
from compactgpt.training.trainer import Callbacks

SAMPLE_TOKENS = 40  # number of new tokens in a sample text
# A rise of the val loss by this much, in nats per token, counts as overfitting.
OVERFITTING = 0.1


class TrainingCallbacks:
    """Prints and logs the progress of training; each process of distributed training has an instance."""

    def __init__(self, stage: Any, tokenizer: Path, curve: Path) -> None:
        """Log the predicted final loss, print the batch size, and warn if the warm-up has too many steps.

        `stage` comes from `open_stage`, `tokenizer` is a folder, and `curve` is the file for the loss curve.
        """
        self.stage, self.params, self.curve = stage, stage.params, curve
        self.is_main_process, processes = dist_info().is_main_process, dist_info().world_size
        self.progress_bar = stage.progress("steps")
        self.reported_at: float | None = None  # time.monotonic() at the last call of `on_losses`
        self.warned: set[str] = set()  # names of the warnings that were printed
        self.encoding = load_encoding(tokenizer) if self.params.runtime.sample_interval else None
        expected = expected_loss(self.params)
        # This loss is from only some windows of the val split, so the loss in the stage `evaluation` differs.
        self.val_loss = f"val loss of {self.params.training.eval_windows} windows"
        self.figures = dict.fromkeys(("train loss", self.val_loss, "tokens/s"), "-")
        # Do not show the predicted loss for a user's own text: no run has tested the prediction on such text.
        if self.params.download.corpus != "files":
            self.figures["expected final val loss"] = f"{expected.low_95:.2f}-{expected.high_95:.2f}"
        stage.tracker.params({"expected_loss": expected.model_dump()})
        stage.print_message(describe_batch(self.params, processes))
        training = self.params.training
        if training.warmup_steps >= training.max_steps:
            stage.print_message(
                f"training.warmup_steps ({training.warmup_steps:,}) is not below training.max_steps "
                f"({training.max_steps:,}): the learning rate only rises, and never falls; lower warmup_steps"
            )

    def functions(self, should_stop: Callable[[], bool]) -> Callbacks:
        """Return the callbacks for `trainer.train`: methods of this instance, and `should_stop`."""
        return Callbacks(self.on_losses, self.on_row, self.on_step, self.on_warning, should_stop)

    def on_losses(self, losses: list[tuple[int, float]]) -> None:
        """Log each new pair (step, loss) together with the learning rate and the tokens per second."""
        now, training, speed = time.monotonic(), self.params.training, {}
        if self.is_main_process and self.reported_at is not None:
            tokens_per_second = len(losses) * training.tokens_per_step / max(1e-9, now - self.reported_at)
            speed = {"train/tokens_per_second": tokens_per_second}
            self.figures["tokens/s"] = f"{tokens_per_second:,.0f}"
        self.reported_at, self.figures["train loss"] = now, f"{losses[-1][1]:.3f}"
        for step, loss in losses:
            rate = training.learning_rate * lr_multiplier(training, step - 1)
            self.stage.tracker.metrics({"train/loss": loss, "train/learning_rate": rate, **speed}, step)

    def on_row(self, rows: list[Row]) -> None:
        """Log the newest val loss, and write all `rows` to the file of the loss curve.

        Warns once if the model overfits, and once if training diverges.
        """
        self.figures[self.val_loss] = f"{rows[-1].val_loss:.3f}"
        self.stage.tracker.metrics({"val/loss": rows[-1].val_loss}, rows[-1].step)
        if self.is_main_process:  # one process writes the file, for `dvc plots show` during training
            write_text(self.curve, loss_csv(rows))
        if overfits := overfitting_warning(rows):
            self._warn("overfits", overfits)
        elif diverged := divergence_warning(rows, self.params.training, self.params.model.vocab_size):
            self._warn("diverged", diverged)

    def on_step(self, step: int, model: GPT) -> None:
        """Update the progress bar. At every `runtime.sample_interval` steps, also log a sample text."""
        runtime = self.params.runtime
        self.progress_bar(step, self.params.training.max_steps, self.figures)
        if self.encoding and step % runtime.sample_interval == 0:
            text = sample_text(model, self.encoding, runtime.sample_prompt)
            self.stage.text(f"step-{step:08d}.txt", text, "samples")

    def on_warning(self, message: str) -> None:
        """Print and log the trainer's warning that the number of processes has changed."""
        self._warn("number_of_processes", message)

    def _warn(self, tag: str, message: str) -> None:
        if tag not in self.warned:
            self.warned.add(tag)
            self.stage.print_message(message)
            self.stage.tracker.tags({tag: message})


def describe_batch(params: Params, processes: int) -> str:
    """Return a message that shows how the tokens of one step are divided among sequences and processes."""
    training, block_size = params.training, params.model.block_size
    micro_batches = training.tokens_per_step // block_size // training.micro_batch_size // processes
    named = "process" if processes == 1 else "processes"
    return (
        f"tokens_per_step {training.tokens_per_step:,} = {training.micro_batch_size} sequences x "
        f"{block_size} tokens x {micro_batches} micro-batches x {processes} {named}; "
        f"{training.max_steps:,} steps, {training.max_steps * training.tokens_per_step:,} tokens"
    )


def overfitting_warning(rows: list[Row]) -> str | None:
    """Return a warning if the train loss fell, but the val loss is OVERFITTING nats above its minimum."""
    best, last = best_row(rows), rows[-1]
    if last.val_loss < best.val_loss + OVERFITTING or last.train_loss >= best.train_loss:
        return None
    return (
        f"the model overfits: since step {best.step:,} the val loss has risen from {best.val_loss:.3f} to "
        f"{last.val_loss:.3f}, while the train loss fell. Train for fewer steps (training.max_steps) or on "
        "more text. After the training, the folder `best` of the model has the weights of the best step"
    )


@torch.no_grad()
def sample_text(model: GPT, encoding: Encoding, prompt: str) -> str:
    """Return the prompt and the model's continuation, in which each token is the most likely one."""
    model.eval()
    tokens = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    start, block_size = len(tokens), model.shape.block_size
    with gathered(model):
        head = model.wte.weight[: model.shape.vocab_size]  # (vocab_size, C)
        while len(tokens) < start + SAMPLE_TOKENS:
            context = torch.tensor([tokens[-block_size:]], device=head.device)  # (1, T)
            token = int((head @ model.hidden(context)[0, -1]).argmax())  # (vocab_size, C) @ (C,)
            if token == encoding.eot_token:
                break
            tokens.append(token)
    return prompt + encoding.decode(tokens[start:])
