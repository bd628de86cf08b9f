"""What the person who waits for a training sees beside its numbers: loss expected, utilisation, sample text.

Nothing here changes what training makes, so an edit reruns nothing.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiktoken import Encoding

from compactgpt.common.device import resolve_device, set_precision
from compactgpt.config import ExpectedLoss, Params, Runtime
from compactgpt.data.tokenizer import load_encoding
from compactgpt.forecast.estimate import expected_loss
from compactgpt.forecast.model_size import flops_per_token
from compactgpt.model.gpt import GPT
from compactgpt.training.distributed import gathered

SAMPLE_TOKENS = 40


class Band:
    """The interval in which the *final* validation loss is expected, held against the curve.

    An earlier loss above it says nothing yet. One below it says that the end will lie below too, if
    training goes on to learn.
    """

    def __init__(self, expected: ExpectedLoss, max_steps: int) -> None:
        self.expected = expected
        self.low, self.high, self.max_steps = expected.low_95, expected.high_95, max_steps
        self._told = False

    def __str__(self) -> str:
        return f"{self.low:.2f}-{self.high:.2f} at the end"

    def judge(self, step: int, val_loss: float) -> str | None:
        """Say, once, that the curve ends outside; None while there is nothing to say."""
        below, above = val_loss < self.low, val_loss > self.high and step == self.max_steps
        if self._told or not (below or above):
            return None
        self._told = True
        where = f"val loss {val_loss:.3f} at step {step:,} of {self.max_steps:,}"
        interval = f"the 95 % interval expected of the final loss, {self.low:.3f} to {self.high:.3f}"
        if below:
            return (
                f"{where} is already below {interval}: better than any run that the estimate knows, or text "
                "of val among the training text"
            )
        return (
            f"{where} is above {interval}: compare learning rates and data with the runs that "
            "estimate.anchors names"
        )

    def frozen(self) -> dict[str, Any]:
        """What the run's record keeps of it, written before the first step."""
        return {"expected_loss": self.expected.model_dump()}

    def score(self, val_loss: float) -> dict[str, str]:
        """Whether the last loss of the curve lies in each interval: tags of the run."""
        told = self.expected
        inside = {
            "80": told.low_80 <= val_loss <= told.high_80,
            "95": told.low_95 <= val_loss <= told.high_95,
        }
        return {f"expected_loss.inside_{share}": str(held).lower() for share, held in inside.items()}


def expected_band(params: Params) -> Band:
    """The band that reports/estimate.json has, made from the same params.yaml."""
    return Band(expected_loss(params), params.training.max_steps)


def peak_flops(device: str, dtype: str) -> float:
    """Floating-point operations a second that this machine makes in large products, measured in 0.2 s."""
    size = 8192 if device == "cuda" else 1024
    set_precision(dtype)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    matrix = torch.full((size, size), 0.5, dtype=kind, device=device)
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


class Utilisation:
    """The share of that speed which training reaches: FLOPs of the model, forward and backward (PaLM's MFU).

    Args:
        params: of the run.
        processes: that train together; each is taken to be as fast as this one.
    """

    def __init__(self, params: Params, processes: int) -> None:
        self.flops_per_token = flops_per_token(params.model, params.training)["with_attention"]
        self.peak = processes * peak_flops(resolve_device(params.runtime.device), params.training.dtype)
        self.share = 0.0

    def __str__(self) -> str:
        return f"{self.share:.0%}"

    def added(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Add train/utilisation to what training tells of a step, where it tells its speed."""
        if speed := values.get("train/tokens_per_second"):
            self.share = speed * self.flops_per_token / self.peak
            return {**values, "train/utilisation": self.share}
        return values


@torch.no_grad()
def continued(model: GPT, encoding: Encoding, prompt: str) -> str:
    """Let a model in training go on from a prompt, greedily: no random stream is touched."""
    model.eval()
    tokens = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    begin, kept = len(tokens), model.shape.block_size
    with gathered(model):
        head = model.wte.weight[: model.shape.vocab_size]
        while len(tokens) < begin + SAMPLE_TOKENS:
            fed = torch.tensor([tokens[-kept:]], device=head.device)  # (1, T)
            token = int((head @ model.hidden(fed)[0, -1]).argmax())  # (V, C) @ (C,)
            if token == encoding.eot_token:
                break
            tokens.append(token)
    return prompt + encoding.decode(tokens[begin:])


class Sampler:
    """Writes a text every `sample_interval` steps; made by the door, given to training as its `watch`."""

    def __init__(self, runtime: Runtime, tokenizer: Path, tell: Callable[[int, str], None]) -> None:
        self.interval, self.prompt, self.tell = runtime.sample_interval, runtime.sample_prompt, tell
        self.encoding = load_encoding(tokenizer) if self.interval else None

    def __call__(self, step: int, model: GPT) -> None:
        """Tell the step and the text, where one is due."""
        if self.encoding and step % self.interval == 0:
            self.tell(step, continued(model, self.encoding, self.prompt))
