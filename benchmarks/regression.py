"""How often the gate is wrong, both ways: what docs/decisions/15-gate.md quotes.

    python benchmarks/regression.py                     # the table of both errors
    python benchmarks/regression.py reruns --out RUNS   # trains the demo again
    python benchmarks/regression.py noise RUNS/*.parquet data/evaluation/compact.parquet   # spread

The table's documents have lengths drawn from the val split's own (reports/accepted.json). A document's loss
per token differs between two models by a shift that all share, plus its own part: normal, with the variance
OWN + TOKEN / tokens, as `noise` finds it. The gate itself decides, with the settings of params.yaml.
"""

import argparse
import math
import shutil
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from compactgpt.config import Regression, load_params  # noqa: E402
from compactgpt.evaluation.likelihood import read_totals  # noqa: E402
from compactgpt.gate.gate import decide, perplexity_rise  # noqa: E402
from compactgpt.gate.references import read_accepted  # noqa: E402

# Variance between documents of the difference of two models, OWN + TOKEN / tokens: `noise` found it between
# runs that differ by rounding only (docs/decisions/15-gate.md).
OWN, TOKEN = 2.1e-4, 0.17


def outcomes(
    settings: Regression, lengths: np.ndarray, documents: int, rise: float, noise: float,
    uneven: float, trials: int, generator: np.random.Generator,
) -> float:  # fmt: skip
    """Share of trials in which perplexity fails the gate.

    Args:
        settings: of the gate.
        lengths: tokens of documents to draw from.
        documents: of a val split.
        rise: true rise of the perplexity, as a share.
        noise: standard deviation of the shift between two runs that should be equal, nats per token.
        uneven: how many times as unevenly documents change as by rounding.
        trials: how many.
        generator: of the draws.
    """
    gated = 3  # perplexity in two views and a task: what the demo has
    failed = 0
    for _ in range(trials):
        tokens = generator.choice(lengths, documents)
        shift = math.log1p(rise) + noise * generator.standard_normal()
        change = shift + uneven * np.sqrt(OWN + TOKEN / tokens) * generator.standard_normal(documents)
        found = perplexity_rise(
            change * tokens, np.zeros(documents), tokens,
            settings, settings.false_alarms / gated,
        )  # fmt: skip
        failed += decide(found, settings.tolerances["perplexity"]) == "fail"
    return failed / trials


def simulate(options: argparse.Namespace) -> None:
    """Print the table."""
    settings = load_params(ROOT / "params.yaml").regression
    lengths = read_accepted(ROOT / "reports/accepted.json").documents.tokens
    print(f"{options.trials} trials each, 8 times as many of rare failures where that is quick; 3 metrics,")
    print(
        f"tolerance {settings.tolerances['perplexity']:.0%}, false alarms {settings.false_alarms:.1%}, "
        f"rerun noise {settings.rerun_noise} nats per token"
    )
    sizes = (27, 100, 500)
    print(f"{'share of runs that fail':44}" + "".join(f"{size:>8,}" for size in sizes) + "  documents")
    for says, rise, noise, uneven in (
        ("nothing changed but documents a little", 0.0, 0.0, 1),
        ("nothing changed, another order of sums", 0.0, settings.rerun_noise, 1),
        ("the same, documents three times as uneven", 0.0, settings.rerun_noise, 3),
        ("1 % worse", 0.01, settings.rerun_noise, 1),
        ("3 % worse", 0.03, settings.rerun_noise, 1),
        ("3 % worse, three times as uneven", 0.03, settings.rerun_noise, 3),
        ("5 % worse", 0.05, settings.rerun_noise, 1),
        ("5 % worse, three times as uneven", 0.05, settings.rerun_noise, 3),
        ("10 % worse, three times as uneven", 0.10, settings.rerun_noise, 3),
        ("1 % worse, were runs free of noise", 0.01, None, 1),
        ("3 % worse, were runs free of noise", 0.03, None, 1),
    ):
        judged = settings if noise is not None else settings.model_copy(update={"rerun_noise": 0.0})
        generator = np.random.default_rng(1)
        shares = [
            outcomes(judged, lengths, size, rise, noise or 0, uneven, count, generator)
            for size in sizes
            for count in [options.trials * (8 if not rise and size <= 100 else 1)]  # a rare thing wants more
        ]
        print(f"{says:44}" + "".join(f"{share:8.2%}" for share in shares), flush=True)


def noise(options: argparse.Namespace) -> None:
    """Print what runs differ by: the shift that documents share, and each document's own part."""
    totals = [read_totals(path) for path in options.totals]
    tokens = totals[0].tokens.astype(float)
    for path, each in zip(options.totals, totals, strict=True):
        print(f"{path.stem:20} loss {each.nats.sum() / tokens.sum():.5f}")
    shifts, own, token = [], [], []
    for one, other in combinations(totals, 2):
        change = other.nats - one.nats
        shift = change.sum() / tokens.sum()
        rest = change - shift * tokens
        count = len(tokens)
        error = math.sqrt(count / (count - 1) * (rest**2).sum()) / tokens.sum()
        # rest / tokens has the variance own + token / tokens: least squares, weighted by tokens
        columns = np.stack([np.sqrt(tokens), 1 / np.sqrt(tokens)], 1)
        found = np.linalg.lstsq(columns, (rest / tokens) ** 2 * np.sqrt(tokens), rcond=None)[0]
        shifts.append((shift, error))
        own.append(found[0])
        token.append(found[1])
    whole, sampling = _root([s for s, _ in shifts]), _root([e for _, e in shifts])
    print(f"{len(shifts)} pairs: standard deviation of the difference {whole:.4f} nats per token;")
    runs = math.sqrt(max(0, whole**2 - sampling**2))
    print(f"sampling documents makes {sampling:.4f} of it, the runs {runs:.4f}")
    print(f"variance between documents: {np.mean(own):.2g} + {np.mean(token):.2g} / tokens")


def _root(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def reruns(options: argparse.Namespace) -> None:
    """Train the demo again from first weights that differ in the seventh digit: rounding, and no more."""
    import torch

    from compactgpt.common.device import prepare_process
    from compactgpt.data.token_files import open_tokens
    from compactgpt.data.tokenizer import load_encoding
    from compactgpt.evaluation.compact import load_compact
    from compactgpt.evaluation.likelihood import evaluate, write_totals
    from compactgpt.model.gpt import GPT
    from compactgpt.training import trainer
    from compactgpt.training.initialization import initial_model

    params, data = load_params(ROOT / "params.yaml"), ROOT / "data"
    prepare_process(params.runtime.num_threads)
    drawn, splits = initial_model, trainer.open_splits(data / "tokens")
    encoding, split = load_encoding(data / "tokenizer"), open_tokens(data / "tokens/val.tokens")
    for run in range(1, options.count + 1):

        def nearly(*words: Any, run: int = run) -> GPT:
            model, generator = drawn(*words), torch.Generator().manual_seed(run)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=generator))
            return model

        trainer.initial_model = nearly  # type: ignore[attr-defined, assignment]
        options.out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="bench-regression-", dir=options.out))
        trained = trainer.train(params, splits, scratch / "states")
        trainer.save_results(
            params, splits, trained, scratch / "states", scratch / "model", scratch / "loss.csv"
        )
        model = load_compact(scratch / "model", encoding, params.evaluation.likelihood.batch_size, "cpu")
        found = evaluate(model, split, encoding, params.evaluation.likelihood)
        write_totals(options.out / f"{run}.parquet", found)
        shutil.rmtree(scratch)
        print(options.out / f"{run}.parquet", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.set_defaults(run=simulate)
    parser.add_argument("--trials", type=int, default=2000)
    commands = parser.add_subparsers()
    made = commands.add_parser("reruns")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--count", type=int, default=4)
    made.set_defaults(run=reruns)
    measured = commands.add_parser("noise")
    measured.add_argument("totals", type=Path, nargs="+")
    measured.set_defaults(run=noise)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
