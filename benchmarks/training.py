"""How fast training is beside nanoGPT's own code, on this machine, in one run.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/training.py --nanogpt nanoGPT                    # the demo's shape
    python benchmarks/training.py --nanogpt nanoGPT --shape note --compiled
    python benchmarks/training.py --nanogpt nanoGPT --to-loss          # the loss of 3 minutes, in how long?
    python benchmarks/training.py --nanogpt nanoGPT --to-loss --seeds 1 2 3 --json to-loss.json
    python benchmarks/training.py --nanogpt nanoGPT --device cuda      # the note's steps, on a GPU

Each engine is a process of its own with the same number of threads, the same initial weights and the same
tokens. Steps are paired: all engines make step 0, then all make step 1 in the opposite order, and so on;
while one works the others wait for their turn. Quote the ratios: the machine may be shared.
"""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from compactgpt.common.sections import read_yaml  # noqa: E402
from compactgpt.config import Params, load_params, parse_params  # noqa: E402
from compactgpt.experiments import set_experiment  # noqa: E402
from compactgpt.forecast.model_size import flops_per_token  # noqa: E402

# What both run in the paired steps: nanoGPT's optimizer at the note's learning rate, without a schedule.
ADAMW = {
    "optimizer": "adamw", "learning_rate": 3e-4, "embedding_learning_rate": 3e-4, "schedule": "constant",
    "warmup_steps": 0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0,
    "head": "full", "init_unigram": 0.0,
}  # fmt: skip
# nanoGPT's own settings for a model of the demo's size (README, "I only have a macbook"; config/
# train_shakespeare_char.py): what --to-loss lets it train with.
SMALL = {**ADAMW, "learning_rate": 1e-3, "embedding_learning_rate": 1e-3, "schedule": "cosine",
         "warmup_steps": 100, "min_lr_ratio": 0.1}  # fmt: skip
NOTE = {"block_size": 512, "n_layer": 6, "n_head": 6, "n_embd": 384}
BUDGET = {"max_steps", "tokens_per_step", "micro_batch_size", "launcher"}
SECONDS = 180  # of nanoGPT's training in --to-loss
FULL_SOFTMAX = "full-softmax"  # the experiment whose recipe --to-loss trains beside the one of params.yaml
TURNS = 30  # in which the runs of --to-loss take the machine, one after the other
GPU_UPDATES = 20  # that are timed together: a GPU works behind the program
GPU = {**ADAMW, "dtype": "bfloat16", "compile": True}


def params_of(
    shape: str, sequences: int, device: str = "cpu", model: dict[str, Any] | None = None, **training: Any
) -> Params:
    """params.yaml with a shape and a recipe; the sequences are a step's, unless the recipe says."""
    params = load_params(ROOT / "params.yaml")
    changes = {**(NOTE if shape == "note" else {}), **(model or {})}
    shaped = params.model.model_copy(update=changes)
    budget = {
        "tokens_per_step": sequences * shaped.block_size,
        "micro_batch_size": sequences,
        "max_steps": 10**9,
    }
    changed = params.training.model_copy(update={**budget, **training})
    runtime = params.runtime.model_copy(update={"device": device, "log_interval": 10**9})
    return params.model_copy(update={"model": shaped, "training": changed, "runtime": runtime})


# --- the engines: a process each ---------------------------------------------------------------------------


class Ours:
    """compactgpt's training step, with the recipe that the parent names."""

    def __init__(self, order: dict[str, Any], params: Params) -> None:
        from compactgpt.training import trainer
        from compactgpt.training.distributed import Group

        splits = trainer.open_splits(Path(order["tokens"]))
        self.run = trainer.Trainer(params, splits, Path("unused"), Group())

    def steps(self, count: int) -> list[float]:
        """Make updates; their losses in nats per token."""
        for _ in range(count):
            self.run.make_step()
        return [loss for _, loss in self.run.read_losses()]

    def our_model(self) -> Any:
        """The weights now, in our GPT."""
        return self.run.model


class Products:
    """The matrix products of our step outside attention, and nothing else: a bound for any engine.

    What multiplies with the same library in the same precision cannot be quicker, were all else free.
    """

    def __init__(self, order: dict[str, Any], params: Params) -> None:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        self.torch = torch
        calls: list[tuple[Any, Any, Any]] = []

        class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                    calls.append((func, args, kwargs or {}))
                return func(*args, **(kwargs or {}))

        with Record():  # type: ignore[no-untyped-call]
            Ours(order, params).steps(1)
        self.calls = calls

    def steps(self, count: int) -> list[float]:
        """Make the products of so many steps, of whatever their tensors hold; no losses."""
        with self.torch.no_grad():
            for func, args, kwargs in self.calls * count:
                func(*args, **kwargs)
        return []


class NanoGPT:
    """nanoGPT's model and optimizer, stepped as its train.py does."""

    def __init__(self, order: dict[str, Any], params: Params) -> None:
        import torch

        from compactgpt.model import gpt as our_models
        from compactgpt.training import trainer

        sys.path.insert(0, order["nanogpt"])
        from model import GPT, GPTConfig  # type: ignore[import-not-found]  # nanoGPT's

        shape, self.training = params.model, params.training
        self.params, self.torch, self.made, self.device = params, torch, 0, params.runtime.device
        self.splits = trainer.open_splits(Path(order["tokens"]))
        settings = GPTConfig(
            shape.block_size, shape.padded_vocab_size, shape.n_layer, shape.n_head, shape.n_embd,
            shape.dropout, shape.bias,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            self.raw = GPT(settings)
            self.ours = our_models.GPT(shape, self.training.seed)
            for name, tensor in self.ours.state_dict().items():
                self.raw.transformer.get_parameter(name).data.copy_(tensor)
            self.raw.to(self.device)
            recipe = (self.training.learning_rate, (self.training.beta1, self.training.beta2))
            self.optimizer = self.raw.configure_optimizers(self.training.weight_decay, *recipe, self.device)
        compiled = order["engine"].startswith("nanogpt-compiled")
        self.model: Any = torch.compile(self.raw) if compiled else self.raw

    def steps(self, count: int) -> list[float]:
        """Make updates; their losses in nats per token."""
        return [float(loss) for loss in [self._step() for _ in range(count)]]

    def _step(self) -> Any:
        from compactgpt.data.token_files import training_batch
        from compactgpt.training.optim import lr_multiplier

        settings, block = self.training, self.params.model.block_size
        sequences = settings.tokens_per_step // block
        tokens = self.splits.train.tokens
        arrays = training_batch(
            tokens, seed=settings.seed, step=self.made, sequences=sequences, block_size=block
        )
        x, y = (self._on_device(self.torch.from_numpy(array).contiguous()) for array in arrays)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * lr_multiplier(settings, self.made)
        total = 0.0
        parts = (each.split(settings.micro_batch_size) for each in (x, y))
        for tokens, targets in zip(*parts, strict=True):
            with self.torch.autocast(self.device, self.torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                _, loss = self.model(tokens, targets)
                loss = loss * len(tokens) / sequences
            loss.backward()
            total = total + loss.detach()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.made += 1
        return total

    def _on_device(self, tensor: Any) -> Any:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor

    def our_model(self) -> Any:
        """The weights now, in our GPT."""
        for name, tensor in self.ours.state_dict().items():
            tensor.copy_(self.raw.transformer.get_parameter(name).data)
        return self.ours


class Peak:
    """The best that this machine does: products of square matrices. A step's `loss` is FLOP/s."""

    def __init__(self, _order: dict[str, Any], params: Params) -> None:
        import torch

        self.torch, device = torch, params.runtime.device
        self.size, kind = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
        self.a, self.b, self.out = (
            torch.randn(self.size, self.size, device=device, dtype=kind) for _ in range(3)
        )

    def steps(self, _count: int) -> list[float]:
        """Make five products; the quickest one's FLOP/s."""
        best = math.inf
        for _ in range(5):
            begin = time.perf_counter()
            self.torch.mm(self.a, self.b, out=self.out)[0, 0].item()  # waits for a GPU
            best = min(best, time.perf_counter() - begin)
        return [2 * self.size**3 / best]


def work(order: dict[str, Any]) -> None:
    """Be one engine: answer each line of stdin with one of JSON."""
    params = params_of(
        order["shape"], order["sequences"], order["device"], order["model"], **order["training"]
    )
    ours = order["engine"].startswith("ours") or order["engine"] == "products"
    os.environ["OMP_NUM_THREADS"] = str(params.runtime.num_threads)
    if ours:
        from compactgpt.common.device import prepare_process

        prepare_process(params.runtime.num_threads)
    import torch

    torch.set_num_threads(params.runtime.num_threads)
    kinds = {"ours": Ours, "peak": Peak, "products": Products}
    engine: Any = kinds.get(order["engine"].split("-")[0], NanoGPT)(order, params)
    say({"ready": True})
    for line in sys.stdin:
        if line.strip() == "val":
            say(validation(engine.our_model(), engine.run.splits if ours else engine.splits))
            continue
        begin = time.perf_counter()
        losses = engine.steps(order["updates"])
        if gpu := order["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / order["updates"]
        peak = torch.cuda.max_memory_allocated() if gpu else peak_bytes()
        say({"seconds": seconds, "losses": losses, "peak_bytes": peak})


def validation(model: Any, splits: Any) -> dict[str, Any]:
    """Return the loss over the val split by the full softmax, and by a target's position in its window."""
    import torch

    from compactgpt.data.token_files import evaluation_windows
    from compactgpt.training.loss_curve import window_nats

    model.eval()
    by_position: dict[int, list[float]] = {}
    with torch.no_grad():
        for window in evaluation_windows(splits.val, model.shape.block_size):
            for position, nats in enumerate(window_nats(model, [window]), start=1):
                by_position.setdefault(position, []).append(nats)

    def mean(first: int, last: int) -> float:
        nats = [each for position in range(first, last + 1) for each in by_position.get(position, [])]
        return math.fsum(nats) / len(nats)

    return {
        "val_loss": mean(1, max(by_position)),
        "position_2": mean(2, 2),
        "positions_33_to_64": mean(33, 64),
    }


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def peak_bytes() -> int:
    """Most memory that this process ever held (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


# --- the parent: whose turn it is --------------------------------------------------------------------------


class Worker:
    """An engine's process, asked for one step at a time."""

    def __init__(
        self,
        engine: str,
        options: argparse.Namespace,
        training: dict[str, Any],
        model: dict[str, Any] | None = None,
    ) -> None:
        self.engine, self.peak = engine, 0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        order = {"engine": engine, "shape": options.shape, "sequences": options.sequences,
                 "training": training, "tokens": str(options.tokens), "nanogpt": str(options.nanogpt),
                 "device": options.device, "model": model,
                 "updates": GPU_UPDATES if options.device == "cuda" else 1}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(order)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            sys.exit(f"{self.engine} ended early, see above")
        return dict(json.loads(line))

    def send(self, word: str) -> None:
        """Ask for something."""
        assert self.process.stdin
        print(word, file=self.process.stdin, flush=True)

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word, wait for the answer."""
        self.send(word)
        return self._answer()

    def step(self) -> None:
        """Have one step made, and note its time."""
        self.send("step")
        self.note()

    def note(self) -> None:
        """Wait for a step that was asked for, and note its time."""
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.losses += answer["losses"]
        self.peak = answer["peak_bytes"]

    def end(self) -> None:
        """Let the process go."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def paired(workers: list[Worker], steps: int, warm_up: int) -> None:
    """Make paired steps in alternating order, then forget the times of the first; all compile at once."""
    for worker in workers:
        worker.send("step")
    for worker in workers:
        worker._answer()  # that it is ready
        worker.note()
    for step in range(1, warm_up + steps):
        for worker in workers if step % 2 == 0 else workers[::-1]:
            worker.step()
    for worker in workers:
        del worker.seconds[:warm_up]


def engines_of(options: argparse.Namespace, params: Params) -> dict[str, dict[str, Any]]:
    """Name the engines and their settings; the first is nanoGPT's, and the second ours with its recipe."""
    if options.device == "cuda":  # the note's micro-batch is 16, nanoGPT is given ours as well
        own = {**GPU, "micro_batch_size": options.sequences}
        note = {**GPU, "micro_batch_size": 16}
        return {"nanogpt-compiled": note, "ours": own, "nanogpt-compiled-64": own, "ours-16": note}
    tuned = params.training.model_dump(exclude=BUDGET)
    engines: dict[str, dict[str, Any]] = {"nanogpt": ADAMW, "ours": ADAMW, "ours-tuned": tuned}
    if options.compiled:
        engines["nanogpt-compiled"] = ADAMW
    if options.bfloat16:
        engines["ours-bfloat16"] = {**ADAMW, "dtype": "bfloat16"}
    return engines


def ratios(base: Worker, worker: Worker) -> tuple[float, float, float]:
    """How many times as fast as `base`: of the medians, the median of the pairs, of the quickest."""
    pairs = [a / b for a, b in zip(base.seconds, worker.seconds, strict=True)]
    medians = statistics.median(base.seconds) / statistics.median(worker.seconds)
    return medians, statistics.median(pairs), min(base.seconds) / min(worker.seconds)


def compare(options: argparse.Namespace) -> None:
    """Print tokens a second, ratios, memory and the share of the machine's peak."""
    params = params_of(options.shape, options.sequences)
    tokens = params.training.tokens_per_step
    engines = engines_of(options, params)
    bounds: dict[str, Any] = {"peak": {}} if options.device == "cuda" else {"peak": {}, "products": ADAMW}
    workers = [Worker(engine, options, training) for engine, training in {**engines, **bounds}.items()]
    paired(workers, options.steps, 3)
    trained, (peak, *products) = workers[: len(engines)], workers[len(engines) :]
    best = max(peak.losses)
    base = trained[0]
    flops = flops_per_token(params.model)["with_attention"]
    where = f"{params.runtime.num_threads} threads" if options.device == "cpu" else "bfloat16 on one GPU"
    print(f"{options.shape}: {tokens} tokens a step, {options.steps} paired steps, "
          f"{where}, products at {best / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'engine':20}{'tok/s':>10}{'ratio':>8}{'paired':>8}{'best':>8}{'of peak':>9}{'MB':>8}")
    found = {}
    for worker in trained:
        median = statistics.median(worker.seconds)
        ratio, pairs, quickest = ratios(base, worker)
        share = flops * tokens / min(worker.seconds) / best
        print(f"{worker.engine:20}{tokens / median:10.0f}{ratio:8.2f}{pairs:8.2f}{quickest:8.2f}{share:9.0%}"
              f"{worker.peak / 1e6:8.0f}")  # fmt: skip
        found[worker.engine] = {"ratio": pairs, "tokens_per_second": tokens / median, "bytes": worker.peak}
    if options.json:
        options.json.write_text(json.dumps({"shape": options.shape, "engines": found}, indent=2) + "\n")
    ours = trained[1]
    worst = max(abs(a - b) for a, b in zip(base.losses[:5], ours.losses[:5], strict=True))
    print(f"largest difference of the first 5 losses, ours to nanoGPT's: {worst:.1e}")
    print("ratio: of medians; paired: median of a step's ratio; best: of the quickest steps (of peak too)")
    for bound in products:
        figures = ", ".join(f"{ratio:.2f}" for ratio in ratios(base, bound))
        print(f"the bound of all engines, were all but their matrix products free: {figures}")
    for worker in workers:
        worker.end()
    if worst > (2e-2 if options.device == "cuda" else 1e-4):  # of bfloat16 and of float32
        sys.exit("the losses differ: this compares two different computations")


def recipe_of(tree: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of training and the shape of a parsed params.yaml."""
    params = parse_params(tree)
    return {**params.training.model_dump(exclude={"launcher"}), "seed": seed}, params.model.model_dump()


def seconds_a_step(
    options: argparse.Namespace, recipes: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, float]:
    """Median seconds of a step of each recipe, in paired steps."""
    probes = [
        Worker(engine, options, {**training, "max_steps": 10**9}, model)
        for engine, (training, model) in recipes.items()
    ]
    paired(probes, 8, 3)
    for probe in probes:
        probe.end()
    return {probe.engine: statistics.median(probe.seconds) for probe in probes}


def alternate(runs: list[tuple[Worker, int]]) -> None:
    """Let each worker make its number of steps, all at the same share of them after every turn."""
    for worker, _ in runs:
        worker._answer()  # that it is ready
    for turn in range(1, TURNS + 1):
        for worker, count in runs[:: 1 if turn % 2 else -1]:
            while len(worker.losses) < round(count * turn / TURNS):
                worker.step()


def to_loss(options: argparse.Namespace) -> None:
    """Train nanoGPT for SECONDS, ours for a share of it, and both recipes of ours whole, in turns."""
    found = []
    for seed in options.seeds:
        found.append(one_race(options, seed))
        if options.json:
            options.json.write_text(json.dumps({"shape": options.shape, "runs": found}, indent=2) + "\n")


def one_race(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All runs of one seed, each with its schedule to the end."""
    tree = read_yaml(ROOT / "params.yaml")
    ours = recipe_of(tree, seed)
    set_experiment(tree, FULL_SOFTMAX, ROOT / "conf")
    before = recipe_of(tree, seed)
    nanogpt = {**SMALL, "seed": seed}, ours[1]
    seconds = seconds_a_step(options, {"nanogpt": nanogpt, "ours": ours})
    planned = [
        ("nanogpt", nanogpt, int(SECONDS / seconds["nanogpt"])),
        ("ours-short", ours, int(SECONDS * options.share / seconds["ours"])),
        ("ours-before", before, before[0]["max_steps"]),
        ("ours", ours, ours[0]["max_steps"]),
    ][: 2 if options.short else 4]
    runs = [
        (Worker(name, options, {**training, "max_steps": count}, model), count)
        for name, (training, model), count in planned
    ]
    alternate(runs)
    result: dict[str, Any] = {"seed": seed}
    for worker, count in runs:
        spent = sum(worker.seconds)
        result[worker.engine] = {"steps": count, "seconds": spent, "bytes": worker.peak, **worker.ask("val")}
        worker.end()
        figures = result[worker.engine]
        print(f"seed {seed} {worker.engine:12} {count:5} steps, {spent:6.1f} s: val loss "
              f"{figures['val_loss']:.4f} nats per token, at position 2 {figures['position_2']:.3f}, at 33 "
              f"to 64 {figures['positions_33_to_64']:.3f}; {worker.peak / 1e6:.0f} MB",
              flush=True)  # fmt: skip
    for name, base in (("ours-short", "nanogpt"), ("ours", "ours-before"))[: len(runs) // 2]:
        share = result[name]["seconds"] / result[base]["seconds"]
        gain = result[base]["val_loss"] - result[name]["val_loss"]
        print(
            f"seed {seed} {name} took {share:.3f} of {base}'s time and ends {gain:.4f} nats per token lower",
            flush=True,
        )
    return result


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--shape", choices=["demo", "note"], help="demo; on a GPU note")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=Path, default=ROOT / "data/tokens", help="what `dvc repro` made")
    parser.add_argument("--steps", type=int, default=20, help="paired steps")
    parser.add_argument("--sequences", type=int, help="of a step: 4 in one micro-batch; on a GPU 64")
    parser.add_argument("--bfloat16", action="store_true", help="ours in bfloat16 as well")
    parser.add_argument("--compiled", action="store_true", help="nanoGPT with torch.compile as well")
    parser.add_argument(
        "--to-loss", action="store_true", help=f"wall-clock to nanoGPT's loss after {SECONDS} s"
    )
    parser.add_argument("--share", type=float, default=1 / 8, help="of nanoGPT's time, for ours in --to-loss")
    parser.add_argument(
        "--short", action="store_true", help="--to-loss without the two whole recipes of ours"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="of the runs of --to-loss")
    parser.add_argument(
        "--json", type=Path, help="write the figures too: `compactgpt gate --bench` reads them"
    )
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.shape = options.shape or ("note" if gpu else "demo")
    options.sequences = options.sequences or (64 if gpu else 4)
    if options.work:
        work(json.loads(options.work))
    elif not options.nanogpt or not (options.nanogpt / "model.py").is_file():
        parser.error("--nanogpt must name a checkout of nanoGPT: it has model.py")
    else:
        (to_loss if options.to_loss else compare)(options)


if __name__ == "__main__":
    main()
