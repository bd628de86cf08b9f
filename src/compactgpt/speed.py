"""Measure how fast this machine trains, and estimate the time of a training run."""

import time
import timeit
from collections.abc import Sequence
from pathlib import Path

from compactgpt.common.device import prepare_process, resolve_device
from compactgpt.config import SCRATCH, Params
from compactgpt.forecast.estimate import format_minutes
from compactgpt.forecast.model_size import flops_per_token
from compactgpt.forecast.scaling_laws import run_of

SECONDS = 1.0  # minimum duration of the measurement
CPU_TOKENS = 2048  # maximum number of tokens in a measured step on a CPU
MATRIX_SIZE = 1536  # rows and columns of each multiplied matrix; enough to reach full speed


def measure_speed(params: Params) -> float:
    """Return the training speed of this machine in FLOP/s.

    Makes training steps with the model and the optimizer of `params`, on random tokens. Writes no file.
    Raises OutOfMemory if a step needs too much memory.
    """
    prepare_process(params.runtime.num_threads)  # before the imports below, because torch reads its settings
    import numpy as np

    from compactgpt.data.token_files import pack_documents
    from compactgpt.training.distributed import init_process_group
    from compactgpt.training.trainer import Splits, Trainer, memory_errors

    device = resolve_device("auto")
    training, block_size = params.training, params.model.block_size
    micro_batch_size = training.micro_batch_size
    # To compile the model would take longer than the steps.
    changes: dict[str, object] = {"compile": False, "init_from": SCRATCH}
    if device == "cpu":
        micro_batch_size = max(1, min(micro_batch_size, CPU_TOKENS // block_size))
        changes["dtype"] = "float32"
    changes |= {"micro_batch_size": micro_batch_size, "tokens_per_step": micro_batch_size * block_size}
    params = params.model_copy(
        update={
            "training": training.model_copy(update=changes),
            "runtime": params.runtime.model_copy(update={"device": device}),
        }
    )
    # Small token ids are frequent, as in text.
    uniform = np.random.default_rng(0).random(20 * block_size)
    tokens = (params.model.vocab_size * uniform**4).astype(np.int64)
    vocabulary = {"vocab_size": params.model.vocab_size, "eot_token": 0}
    split = pack_documents(Path(), [(bytes(16), len(tokens), tokens)], tokenizer_sha256="", **vocabulary)
    with init_process_group(training.launcher, device) as group, memory_errors():
        trainer = Trainer(params, Splits(split, split, ""), Path(), group)
        trainer.make_step()  # not timed, because the first step allocates memory
        trainer.read_losses()
        start, first = time.perf_counter(), trainer.step
        while (seconds := time.perf_counter() - start) < SECONDS:
            trainer.make_step()
            trainer.read_losses()  # waits until a GPU has finished the step
    flops = flops_per_token(params.model, params.training)["with_attention"]
    return flops * params.training.tokens_per_step * (trainer.step - first) / seconds


def measure_products() -> float:
    """Return the speed of this machine's CPU in FLOP/s, measured on float32 matrix products.

    The evaluation of a neural baseline reaches about this speed.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((MATRIX_SIZE, MATRIX_SIZE), np.float32) for _ in range(2))
    product = a @ b
    return 2 * MATRIX_SIZE**3 / min(timeit.repeat(lambda: np.matmul(a, b, out=product), number=1, repeat=10))


def training_minutes(params: Params, speed: float) -> float:
    """Return the minutes of training at `speed` FLOP/s."""
    flops = flops_per_token(params.model, params.training)["with_attention"]
    return flops * run_of(params.model, params.training).tokens / speed / 60


def announce_times(runs: Sequence[Params]) -> list[str]:
    """Return messages about the time of the training and of slow baselines."""
    speed = measure_speed(runs[0])
    minutes = sum(training_minutes(params, speed) for params in runs)
    return [
        f"training: about {format_minutes(minutes)} at this machine's speed, measured just now; the progress "
        "bar shows a better estimate after the first steps",
        *describe_slow_baselines(runs[0]),
    ]


def describe_slow_baselines(params: Params) -> list[str]:
    """Return a message for each baseline that can take minutes or hours; the others take seconds."""
    return [
        f"baseline {name}: scores the val split too, and may take longer than the training; "
        "to leave it out, remove it from baseline.names in params.yaml"
        for name in params.baseline.names
        if params.baseline.specs[name].kind in ("gguf", "folder", "hub")
    ]


def is_busy() -> bool:
    """Return whether other programs use the processor now, so that a measured speed would be too low."""
    import psutil

    return bool(psutil.cpu_percent(interval=0.3) > 25)
