"""Compare our evaluation of windows with transformers' usual loop, on a GPT-2 of 124M random weights.

    python -m benchmarks.evaluation --windows 4 --rounds 3

Each way has its own process, and the two take turns: same windows, same batches, same weights.
Memory is the peak of the process while it scores. Linux only.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

CONTEXT, VOCABULARY, BATCH_SIZE, SEED = 1024, 50257, 4, 7
Windows = list["np.ndarray[Any, np.dtype[np.int64]]"]


def random_gpt2() -> Any:
    import torch
    import transformers  # noqa: TID251

    torch.manual_seed(SEED)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


def usual(windows: Windows) -> Callable[[], float]:
    """Return a function that scores all windows as transformers' perplexity.md does."""
    import numpy as np
    import torch

    model = random_gpt2()

    def run() -> float:
        total = 0.0
        for start in range(0, len(windows), BATCH_SIZE):
            ids = torch.tensor(np.stack(windows[start : start + BATCH_SIZE]))  # (B, T)
            with torch.no_grad():
                total += model(input_ids=ids, labels=ids).loss.item() * ids[:, 1:].numel()
        return total

    return run


def ours(windows: Windows) -> Callable[[], float]:
    """Return a function that scores all windows with our GPT."""
    from compactgpt.common.device import prepare_heap
    from compactgpt.data.token_files import Window
    from compactgpt.evaluation.compact import as_neural_model
    from compactgpt.evaluation.likelihood import target_nats
    from compactgpt.model.gpt import GPT
    from compactgpt.model.huggingface import from_hf_config, from_hf_state

    theirs = random_gpt2()
    model = GPT(from_hf_config(theirs.config.to_dict(), "bench"))
    model.load_state_dict(from_hf_state(theirs.state_dict()))
    del theirs
    ctypes.CDLL(None).malloc_trim(0)  # memory that loading left free must not count
    prepare_heap()
    neural = as_neural_model(model, BATCH_SIZE)

    def run() -> float:
        cut = [Window(index, tokens[:-1], tokens[1:]) for index, tokens in enumerate(windows)]
        return float(sum(values.sum() for _, values in target_nats(neural, cut)))

    return run


def serve(which: str, count: int) -> None:
    """For each line of standard input, score all windows, and print seconds, nats and peak memory in MB."""
    import numpy as np
    import torch

    windows = list(np.random.default_rng(SEED).integers(0, VOCABULARY, (count, CONTEXT)))
    torch.set_num_threads(2)
    run = {"usual": usual, "ours": ours}[which](windows)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: the peak of scoring, not of loading
    for _ in sys.stdin:
        start = time.perf_counter()
        nats = run()
        seconds = time.perf_counter() - start
        (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in row)
        print(json.dumps([seconds, nats, int(line.split()[1]) / 1024]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=["usual", "ours"])
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.windows)
        return
    command = [sys.executable, "-m", "benchmarks.evaluation", "--windows", str(given.windows), "--serve"]
    pipe = subprocess.PIPE
    children = {
        which: subprocess.Popen([*command, which], stdin=pipe, stdout=pipe, text=True, bufsize=1)
        for which in ("usual", "ours")
    }
    seconds: dict[str, list[float]] = {which: [] for which in children}
    last: dict[str, tuple[float, float, float]] = {}
    for turn in range(given.rounds + 1):
        for which, child in children.items():
            assert child.stdin
            assert child.stdout
            child.stdin.write("go\n")
            last[which] = json.loads(child.stdout.readline())
            if turn:  # the first round warms up
                seconds[which].append(last[which][0])
    for child in children.values():
        child.communicate()
    pairs = zip(seconds["usual"], seconds["ours"], strict=True)
    tokens = given.windows * (CONTEXT - 1)
    for which, taken in seconds.items():
        rate = tokens / statistics.median(taken)
        print(f"{which}: {rate:,.0f} tokens/s, {last[which][2]:,.0f} MB at peak, {last[which][1]:.3f} nats")
    print(f"ratio of speed, median of pairs: {statistics.median(a / b for a, b in pairs):.2f}")
    print(f"ratio of peak memory: {last['ours'][2] / last['usual'][2]:.2f}")


if __name__ == "__main__":
    main()
