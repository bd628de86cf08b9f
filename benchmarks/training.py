"""Compare the speed of training with that of nanoGPT's own code, on this machine.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/training.py --nanogpt nanoGPT                    # the demo's shape
    python benchmarks/training.py --nanogpt nanoGPT --shape note --compiled
    python benchmarks/training.py --nanogpt nanoGPT --to-loss --seeds 1 2 3 --json to-loss.json
    python benchmarks/training.py --nanogpt nanoGPT --device cuda      # the note's steps, on a GPU

Each engine is a process. All have the same number of threads, the same initial weights and the same tokens.
Steps are paired: the engines take turns for each step, in alternating order.
Quote the ratios, because the machine may be shared.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from compactgpt.common.device import prepare_process  # noqa: E402
from compactgpt.common.sections import read_yaml  # noqa: E402
from compactgpt.config import Params, load_params, parse_params  # noqa: E402
from compactgpt.experiments import set_experiment  # noqa: E402

# The recipe of the paired steps: nanoGPT's optimizer at the note's learning rate, without a schedule.
ADAMW = {
    "optimizer": "adamw", "learning_rate": 3e-4, "embedding_learning_rate": 3e-4, "schedule": "constant",
    "warmup_steps": 0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0,
    "head": "full", "init_unigram": 0.0, "init_positions": 0.0, "position_learning_rate": None,
}  # fmt: skip
# nanoGPT's own settings for a model of the demo's size, for --to-loss (README, "I only have a macbook";
# config/train_shakespeare_char.py).
SMALL = {**ADAMW, "learning_rate": 1e-3, "embedding_learning_rate": 1e-3, "schedule": "cosine",
         "warmup_steps": 100, "min_lr_ratio": 0.1}  # fmt: skip
GPU = {**ADAMW, "dtype": "bfloat16", "compile": True}
NOTE = {"block_size": 512, "n_layer": 6, "n_head": 6, "n_embd": 384}
WARM_UP = 3  # first steps, which are not timed
SECONDS = 180  # of nanoGPT's training in --to-loss
FULL_SOFTMAX = "full-softmax"  # the experiment whose recipe --to-loss trains beside the one of params.yaml
TURNS = 30  # number of turns into which each run of --to-loss is divided
GPU_UPDATES = 20  # number of updates timed together, because a GPU works asynchronously


def params_of(options: argparse.Namespace, training: dict[str, Any], model: dict[str, Any]) -> Params:
    """Return params.yaml with the shape and batch of the options; `training` and `model` change values."""
    params = load_params(ROOT / "params.yaml")
    shape = params.model.model_copy(update={**(NOTE if options.shape == "note" else {}), **model})
    budget = {
        "tokens_per_step": options.sequences * shape.block_size,
        "micro_batch_size": options.sequences,
        "max_steps": 10**9,
    }
    recipe = params.training.model_copy(update={**budget, **training})
    runtime = params.runtime.model_copy(update={"device": options.device, "log_interval": 10**9})
    return params.model_copy(update={"model": shape, "training": recipe, "runtime": runtime})


# --- the engines: a process each ---------------------------------------------------------------------------


class Ours:
    """compactgpt's training step."""

    def __init__(self, options: argparse.Namespace, params: Params) -> None:
        from compactgpt.training import trainer
        from compactgpt.training.distributed import Group

        self.splits = trainer.open_splits(options.tokens)
        self.run = trainer.Trainer(params, self.splits, Path("unused"), Group())

    def steps(self, count: int) -> list[float]:
        """Make updates, and return their losses in nats per token."""
        for _ in range(count):
            self.run.make_step()
        return [loss for _, loss in self.run.read_losses()]

    def our_model(self) -> Any:
        """Return the weights in our GPT."""
        return self.run.model


class Products:
    """The matrix products of our step outside attention, and nothing else.

    With the same library and precision, no engine can be faster.
    """

    def __init__(self, options: argparse.Namespace, params: Params) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        calls: list[tuple[Any, Any, Any]] = []

        class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                    calls.append((func, args, kwargs or {}))
                return func(*args, **(kwargs or {}))

        with Record():  # type: ignore[no-untyped-call]
            Ours(options, params).steps(1)
        self.calls = calls

    def steps(self, count: int) -> list[float]:
        """Make the products of `count` steps. Returns no losses."""
        import torch

        with torch.no_grad():
            for func, args, kwargs in self.calls * count:
                func(*args, **kwargs)
        return []


class NanoGPT:
    """nanoGPT's model and optimizer, stepped as its train.py does."""

    def __init__(self, options: argparse.Namespace, params: Params) -> None:
        from compactgpt.model.gpt import GPT
        from compactgpt.training import trainer

        sys.path.insert(0, str(options.nanogpt))
        import model as nanogpt  # type: ignore[import-not-found]

        shape, self.training, self.device = params.model, params.training, params.runtime.device
        self.params, self.made = params, 0
        self.splits = trainer.open_splits(options.tokens)
        settings = nanogpt.GPTConfig(
            shape.block_size, shape.padded_vocab_size, shape.n_layer, shape.n_head, shape.n_embd,
            shape.dropout, shape.bias,
        )  # fmt: skip
        self.ours = GPT(shape, self.training.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = nanogpt.GPT(settings)
            for name, tensor in self.ours.state_dict().items():
                self.model.transformer.get_parameter(name).data.copy_(tensor)
            self.model.to(self.device)
            recipe = (self.training.learning_rate, (self.training.beta1, self.training.beta2))
            self.optimizer = self.model.configure_optimizers(self.training.weight_decay, *recipe, self.device)
        self.forward: Any = self.model

    def compile(self) -> None:
        """Compile the model as nanoGPT's train.py does."""
        import torch

        self.forward = torch.compile(self.model)

    def steps(self, count: int) -> list[float]:
        """Make updates, and return their losses in nats per token."""
        return [float(loss) for loss in [self._step() for _ in range(count)]]

    def _step(self) -> Any:
        import torch

        from compactgpt.data.token_files import training_batch
        from compactgpt.training.optim import lr_multiplier

        settings, block_size = self.training, self.params.model.block_size
        sequences, train = settings.tokens_per_step // block_size, self.splits.train.tokens
        arrays = training_batch(
            train, seed=settings.seed, step=self.made, sequences=sequences, block_size=block_size
        )
        x, y = (self._to_device(torch.from_numpy(array).contiguous()) for array in arrays)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * lr_multiplier(settings, self.made)
        total = 0.0
        size = settings.micro_batch_size
        for tokens, targets in zip(x.split(size), y.split(size), strict=True):
            with torch.autocast(self.device, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                _, loss = self.forward(tokens, targets)
                loss = loss * len(tokens) / sequences
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.made += 1
        return total

    def _to_device(self, tensor: Any) -> Any:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor

    def our_model(self) -> Any:
        """Return the weights in our GPT."""
        for name, tensor in self.ours.state_dict().items():
            tensor.copy_(self.model.transformer.get_parameter(name).data)
        return self.ours


def work(
    pipe: Any, name: str, options: argparse.Namespace, training: dict[str, Any], model: dict[str, Any]
) -> None:
    """Run one engine: answer the requests "step" and "val" until the pipe is closed."""
    params = params_of(options, training, model)
    kind = name.split("-")[0]
    os.environ["OMP_NUM_THREADS"] = str(params.runtime.num_threads)
    if kind in ("ours", "products"):
        prepare_process(params.runtime.num_threads)
    import torch

    torch.set_num_threads(params.runtime.num_threads)
    kinds = {"ours": Ours, "nanogpt": NanoGPT, "products": Products}
    engine: Any = kinds[kind](options, params)
    if name.startswith("nanogpt-compiled"):
        engine.compile()
    on_gpu = options.device == "cuda"
    updates = GPU_UPDATES if on_gpu else 1
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while request := pipe.recv():
            if request == "val":
                pipe.send(validation(engine.our_model(), engine.splits))
                continue
            begin = time.perf_counter()
            losses = engine.steps(updates)
            if on_gpu:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - begin) / updates
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send((seconds, losses, torch.cuda.max_memory_allocated() if on_gpu else peak))


def validation(model: Any, splits: Any) -> float:
    """Return the loss over the val split by the full softmax, in nats per token."""
    import torch

    from compactgpt.data.token_files import evaluation_windows
    from compactgpt.training.loss_curve import window_nats

    model.eval()
    nats: list[float] = []
    with torch.no_grad():
        for window in evaluation_windows(splits.val, model.shape.block_size):
            nats += window_nats(model, [window])
    return math.fsum(nats) / len(nats)


# --- the parent: whose turn it is --------------------------------------------------------------------------


class Worker:
    """An engine's process, asked for one step at a time."""

    def __init__(
        self, name: str, options: argparse.Namespace, training: dict[str, Any], model: dict[str, Any]
    ) -> None:
        self.name, self.peak = name, 0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # As a daemon, the process ends with the program, also after an error of another engine.
        arguments = (theirs, name, options, training, model)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """Wait for the answer of the process."""
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit(f"{self.name} ended early, see above")

    def note_step(self) -> None:
        """Wait for a step, and store its time and losses."""
        seconds, losses, self.peak = self.answer()
        self.seconds.append(seconds)
        self.losses += losses

    def step(self) -> None:
        """Request a step, and store its time and losses."""
        self.pipe.send("step")
        self.note_step()

    def end(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def make_paired_steps(workers: list[Worker], steps: int) -> None:
    """Make paired steps in alternating order. Step 0 is made by all engines at once: they may compile."""
    for worker in workers:
        worker.answer()  # the engine is ready
        worker.pipe.send("step")
    for worker in workers:
        worker.note_step()
    for step in range(1, WARM_UP + steps):
        for worker in workers if step % 2 == 0 else workers[::-1]:
            worker.step()
    for worker in workers:
        del worker.seconds[:WARM_UP]


def engines_of(options: argparse.Namespace, params: Params) -> dict[str, dict[str, Any]]:
    """Return engine -> settings. The first engine is nanoGPT, the second is ours with nanoGPT's recipe."""
    if options.device == "cuda":  # the note's micro-batch is 16; each engine also runs with the other's
        own = {**GPU, "micro_batch_size": options.sequences}
        note = {**GPU, "micro_batch_size": 16}
        return {"nanogpt-compiled": note, "ours": own, "nanogpt-compiled-64": own, "ours-16": note}
    budget = {"max_steps", "tokens_per_step", "micro_batch_size", "launcher"}
    tuned = params.training.model_dump(exclude=budget)
    engines: dict[str, dict[str, Any]] = {"nanogpt": ADAMW, "ours": ADAMW, "ours-tuned": tuned}
    if options.compiled:
        engines["nanogpt-compiled"] = ADAMW
    if options.bfloat16:
        engines["ours-bfloat16"] = {**ADAMW, "dtype": "bfloat16"}
    return {**engines, "products": ADAMW}


def compare(options: argparse.Namespace) -> None:
    """Print tokens per second, ratios to nanoGPT, and memory."""
    params = params_of(options, {}, {})
    tokens = params.training.tokens_per_step
    workers = [Worker(name, options, training, {}) for name, training in engines_of(options, params).items()]
    make_paired_steps(workers, options.steps)
    base, ours = workers[:2]
    where = f"{params.runtime.num_threads} threads" if options.device == "cpu" else "bfloat16 on one GPU"
    print(f"{options.shape}: {tokens} tokens a step, {options.steps} paired steps, {where}")
    print("ratio: nanoGPT's median time of a step to the engine's; paired: the median of the steps' ratios")
    print(f"{'engine':20}{'tok/s':>10}{'ratio':>8}{'paired':>8}{'MB':>8}")
    found = {}
    for worker in workers:
        speed = tokens / statistics.median(worker.seconds)
        ratio = statistics.median(base.seconds) / statistics.median(worker.seconds)
        paired = statistics.median(a / b for a, b in zip(base.seconds, worker.seconds, strict=True))
        print(f"{worker.name:20}{speed:10.0f}{ratio:8.2f}{paired:8.2f}{worker.peak / 1e6:8.0f}")
        if worker.name != "products":
            found[worker.name] = {"ratio": paired, "tokens_per_second": speed, "bytes": worker.peak}
    if options.json:
        options.json.write_text(json.dumps({"shape": options.shape, "engines": found}, indent=2) + "\n")
    for worker in workers:
        worker.end()
    worst = max(abs(a - b) for a, b in zip(base.losses[:5], ours.losses[:5], strict=True))
    print(f"largest difference of the first 5 losses, ours to nanoGPT's: {worst:.1e}")
    if worst > (2e-2 if options.device == "cuda" else 1e-4):  # the rounding of bfloat16 and of float32
        sys.exit("the losses differ: this compares two different computations")


def compare_to_loss(options: argparse.Namespace) -> None:
    """Make the runs of every seed, and write their losses and times to the file of --json."""
    found = []
    for seed in options.seeds:
        found.append(train_to_loss(options, seed))
        if options.json:
            options.json.write_text(json.dumps({"shape": options.shape, "runs": found}, indent=2) + "\n")


def train_to_loss(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train nanoGPT for SECONDS, ours for a share of the time, and two recipes of ours in full, in turns."""

    def recipe_of(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        params = parse_params(tree)
        return {**params.training.model_dump(exclude={"launcher"}), "seed": seed}, params.model.model_dump()

    tree = read_yaml(ROOT / "params.yaml")
    ours, shape = recipe_of(tree)
    set_experiment(tree, FULL_SOFTMAX, ROOT / "conf")
    before, shape_before = recipe_of(tree)
    nanogpt = {**SMALL, "seed": seed}
    probes = [
        Worker(name, options, {**training, "max_steps": 10**9}, shape)
        for name, training in (("nanogpt", nanogpt), ("ours", ours))
    ]
    make_paired_steps(probes, 8)
    for probe in probes:
        probe.end()
    theirs, mine = (statistics.median(probe.seconds) for probe in probes)
    planned = [
        ("nanogpt", nanogpt, shape, int(SECONDS / theirs)),
        ("ours-short", ours, shape, int(SECONDS * options.share / mine)),
        ("ours-before", before, shape_before, before["max_steps"]),
        ("ours", ours, shape, ours["max_steps"]),
    ][: 2 if options.short else 4]
    runs = [
        (Worker(name, options, {**training, "max_steps": count}, model), count)
        for name, training, model, count in planned
    ]
    for worker, _ in runs:
        worker.answer()  # the engine is ready
    for turn in range(1, TURNS + 1):  # after every turn, all are at the same share of their steps
        for worker, count in runs[:: 1 if turn % 2 else -1]:
            while len(worker.losses) < round(count * turn / TURNS):
                worker.step()
    result: dict[str, Any] = {"seed": seed}
    for worker, count in runs:
        worker.pipe.send("val")
        spent, loss = sum(worker.seconds), worker.answer()
        worker.end()
        result[worker.name] = {"steps": count, "seconds": spent, "bytes": worker.peak, "val_loss": loss}
        print(f"seed {seed} {worker.name:12} {count:5} steps, {spent:6.1f} s: val loss {loss:.4f} nats per "
              f"token; {worker.peak / 1e6:.0f} MB", flush=True)  # fmt: skip
    for name, base in (("ours-short", "nanogpt"), ("ours", "ours-before"))[: len(runs) // 2]:
        share = result[name]["seconds"] / result[base]["seconds"]
        gain = result[base]["val_loss"] - result[name]["val_loss"]
        print(f"seed {seed} {name} took {share:.3f} of {base}'s time and ends {gain:.4f} nats per token "
              "lower", flush=True)  # fmt: skip
    return result


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    add("--shape", choices=["demo", "note"], help="demo; on a GPU note")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--tokens", type=Path, default=ROOT / "data/tokens", help="the token files of `dvc repro`")
    add("--steps", type=int, default=20, help="paired steps")
    add("--sequences", type=int, help="of a step: 4 in one micro-batch; on a GPU 64")
    add("--bfloat16", action="store_true", help="ours in bfloat16 as well")
    add("--compiled", action="store_true", help="nanoGPT with torch.compile as well")
    add("--to-loss", action="store_true", help=f"wall-clock to nanoGPT's loss after {SECONDS} s")
    add("--share", type=float, default=1 / 8, help="of nanoGPT's time, for ours in --to-loss")
    add("--short", action="store_true", help="--to-loss without the two whole recipes of ours")
    add("--seeds", type=int, nargs="+", default=[1337], help="of the runs of --to-loss")
    add("--json", type=Path, help="write the figures too: `compactgpt gate --bench` reads them")
    options = parser.parse_args()
    if not (options.nanogpt / "model.py").is_file():
        parser.error("--nanogpt must name a checkout of nanoGPT: it has model.py")
    on_gpu = options.device == "cuda"
    options.shape = options.shape or ("note" if on_gpu else "demo")
    options.sequences = options.sequences or (64 if on_gpu else 4)
    (compare_to_loss if options.to_loss else compare)(options)


if __name__ == "__main__":
    main()
