"""A scaling law for our own corpus: fitted to several finished small runs, asked for the configured one.

The law is that of Hoffmann et al. 2022 (equation 2), L(N, D) = E + A / N^a + B / D^b, in nats per token,
N being parameters in nanoGPT's convention and D tokens trained on. A ladder of small runs carries few
constants, so three forms of it stand for choice. The one is taken that extrapolates best: fitted without the
runs of the largest budget, and without the widest models, it is asked for those. Fitting is Hoffmann's
(appendix D.2): Huber's loss of the difference of logarithms. The interval of a prediction is made of the
constants of runs drawn anew (bootstrap), each times every miss of those extrapolations.

Fitting (compactgpt.fitting) is done once, by `compactgpt ladder`, which writes results/ladder.json; reading a
prediction off it needs neither numpy nor scipy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import Any, Literal

from compactgpt.common.sections import Section, load_section
from compactgpt.config import ExpectedLoss, Params
from compactgpt.forecast.scaling_laws import Run

CURVE_POINTS = 25
# What runs were trained with before these settings existed: a ladder that does not name them.
EARLIER_SETTINGS = {
    "training.head": "full",
    "training.init_unigram": 0.0,
    "training.init_positions": 0.0,
    "training.position_learning_rate": None,
}

FormName = Literal["floor", "sum", "product"]


class Rung(Section):
    """One finished run."""

    name: str
    num_params: int  # nanoGPT's convention
    num_params_non_embedding: int
    max_steps: int
    tokens_per_step: int
    optimizer: Literal["adamw", "muon"]
    loss: float  # nats per token, the whole val split
    params_sha256: str
    model_md5: str  # DVC's, of the folder of weights

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.max_steps * self.tokens_per_step


class Fit(Section):
    """The chosen form with its constants, those of the bootstrap, and how each form did."""

    form: FormName
    constants: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]
    misses: tuple[float, ...]  # log of measured over told, of runs beyond those that were fitted
    errors: dict[FormName, float]  # root mean square of such misses, by form


class Ladder(Section):
    """All of results/ladder.json."""

    corpus: dict[str, Any]  # the settings that decide the text
    settings: dict[str, Any]  # what else the runs have in common
    data_sha256: str
    train_tokens: int
    val_tokens: int
    rungs: tuple[Rung, ...]
    fit: Fit


@dataclass(frozen=True)
class Form:
    """A shape of the law: the loss is a sum of terms, each exp(a constant) / N^(another) / D^(another)."""

    formula: str
    terms: tuple[
        tuple[tuple[int, Literal["1", "N", "D"]], ...], ...
    ]  # places of constants, and what each is of
    starts: tuple[tuple[float, ...], ...]

    def design(self, log_n: float, log_d: float) -> list[list[float]]:
        """What each constant is multiplied by in the logarithm of each term. (terms, constants)."""
        factors = {"1": 1.0, "N": -log_n, "D": -log_d}
        rows = [[0.0] * len(self.starts[0]) for _ in self.terms]
        for row, term in zip(rows, self.terms, strict=True):
            for place, of in term:
                row[place] = factors[of]
        return rows

    def log_loss(self, constants: Sequence[float], log_n: float, log_d: float) -> float:
        """The logarithm of the loss."""
        logs = [sum(map(mul, row, constants)) for row in self.design(log_n, log_d)]
        top = max(logs)
        return float(top + math.log(sum(math.exp(term - top) for term in logs)))


FORMS: dict[FormName, Form] = {
    "floor": Form(  # Hoffmann's own parameters: log E, log A, a, log B, b
        "E + A / N^a + B / D^b",
        (((0, "1"),), ((1, "1"), (2, "N")), ((3, "1"), (4, "D"))),
        ((0.5, 5.0, 0.34, 5.0, 0.28), (1.0, 3.0, 0.2, 8.0, 0.7), (1.3, 1.0, 0.1, 10.0, 1.0)),
    ),
    "sum": Form(
        "A / N^a + B / D^b",
        (((0, "1"), (1, "N")), ((2, "1"), (3, "D"))),
        ((3.0, 0.1, 5.0, 0.4), (6.0, 0.34, 6.0, 0.28)),
    ),
    "product": Form("A / (N^a D^b)", (((0, "1"), (1, "N"), (2, "D")),), ((3.0, 0.05, 0.1),)),
}


def predict(found: Fit, num_params: int, tokens: int) -> ExpectedLoss:
    """The loss that a fit tells, with intervals: see the module."""
    form, n, d = FORMS[found.form], math.log(num_params), math.log(tokens)
    told = [form.log_loss(draw, n, d) for draw in found.draws]
    losses = sorted(math.exp(loss + miss) for loss in told for miss in found.misses)
    shares = {"low_95": 0.025, "low_80": 0.1, "value": 0.5, "high_80": 0.9, "high_95": 0.975}
    return ExpectedLoss(
        **{name: _rounded(_quantile(losses, share)) for name, share in shares.items()},
        basis=f"{form.formula}, fitted to a ladder of small runs on the same text",
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """numpy's `linear` quantile of values in order."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _rounded(loss: float) -> float:
    return float(f"{loss:.6g}")


def read_ladder(path: Path) -> Ladder | None:
    """The finished small runs, or None where there are none.

    Raises:
        BadConfig: the file is damaged.
    """
    return load_section(path, Ladder) if path.exists() else None


def corpus_of(params: Params) -> dict[str, Any]:
    """The settings that decide which text is trained and measured on."""
    download = params.download
    reader: Section = {"docstrings": download.docstrings, "files": download.files, "hub": download.hub}[
        download.corpus
    ]
    no_text = {"mirror"} if download.corpus == "hub" else {"name"}  # of files: for reports only
    return {
        "corpus": download.corpus,
        "settings": reader.model_dump(mode="json", exclude=no_text),
        "max_documents": download.max_documents,
        "max_bytes": download.max_bytes,
        "tokenizer": download.tokenizer.vocab_bpe_sha256,
        "val_fraction": params.tokenization.val_fraction,
    }


def settings_of(params: Params) -> dict[str, Any]:
    """What decides a loss beside text, size, budget and chance."""
    shape = params.model.model_dump(mode="json", exclude={"n_layer", "n_head", "n_embd"})
    free = {"seed", "max_steps", "eval_interval", "eval_windows", "checkpoint_interval", "launcher"}
    free |= {"micro_batch_size", "compile", "init_from"}
    if params.training.head == "full":
        free |= {"sample_tokens", "sample_power"}
    training = params.training.model_dump(mode="json", exclude=free)
    return {f"model.{key}": value for key, value in shape.items()} | {
        f"training.{key}": value for key, value in training.items()
    }


def ladder_report(ladder: Ladder, params: Params, run: Run) -> dict[str, Any]:
    """What the ladder tells of a run, or why it tells nothing; and the fit, to be drawn."""
    form, found = FORMS[ladder.fit.form], ladder.fit
    ours = settings_of(params)
    theirs = EARLIER_SETTINGS | ladder.settings
    differs = sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key))
    if ladder.corpus != corpus_of(params):
        differs.insert(0, "corpus")
    told = None if differs else predict(found, run.num_params, run.tokens).model_dump()
    return {
        "expected_loss": told,
        "differs": differs,  # between the ladder and the configured run: then nothing is told
        "formula": form.formula,
        "form": found.form,
        "constants": list(found.constants),
        "errors": dict(found.errors),
        "data_sha256": ladder.data_sha256,
        "rungs": [
            rung.model_dump() | {"tokens": rung.tokens, "told": _told(found, rung.num_params, rung.tokens)}
            for rung in ladder.rungs
        ],
        "curves": [] if differs else _curves(ladder, run),
    }


def _told(found: Fit, num_params: float, tokens: float) -> float:
    log_loss = FORMS[found.form].log_loss
    return _rounded(math.exp(log_loss(found.constants, math.log(num_params), math.log(tokens))))


def _curves(ladder: Ladder, run: Run) -> list[dict[str, Any]]:
    """For each size of model, and for ours, the loss that the fit tells over tokens."""
    budgets = [rung.tokens for rung in ladder.rungs] + [run.tokens]
    low, high = math.log(min(budgets)), math.log(max(budgets))
    tokens = [math.exp(low + (high - low) * step / (CURVE_POINTS - 1)) for step in range(CURVE_POINTS)]
    curves = []
    for size in sorted({rung.num_params for rung in ladder.rungs} | {run.num_params}):
        points = [predict(ladder.fit, size, round(budget)) for budget in tokens]
        curves.append(
            {
                "num_params": size,
                "tokens": [round(budget) for budget in tokens],
                "loss": [point.value for point in points],
                "low_95": [point.low_95 for point in points],
                "high_95": [point.high_95 for point in points],
            }
        )
    return curves
