"""Fit a scaling law to a sweep of small runs: `compactgpt experiment fit`.

In the law, N is the number of parameters, D the number of training tokens (Hoffmann et al. 2022, equation 2).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compactgpt.common.errors import BadData
from compactgpt.common.sections import Section, load_section
from compactgpt.common.storage import write_json
from compactgpt.config import ExpectedLoss, Params, Run, Sha256, load_params
from compactgpt.forecast.scaling_laws import run_of

Floats = npt.NDArray[np.float64]
FormName = Literal["floor", "sum", "product"]

# Errors of log(loss) above this value are not squared: outliers count less (Hoffmann et al. 2022, D.2).
HUBER_DELTA = 1e-3
RESAMPLES = 400  # number of bootstrap resamples of the runs
SEED = 1337
# Keys of `training` that are ignored when two recipes are compared: they change the loss by chance only,
# or not at all. `init_from` is only a path; `init_sha256`, the hash of its files, is compared.
NOT_RECIPE = {
    "seed", "eval_interval", "eval_windows", "checkpoint_interval", "launcher", "micro_batch_size", "compile",
    "init_from",
}  # fmt: skip
# A fit can predict a run with other values of these keys than the sweep has, because the keys change only
# N (parameters) and D (training tokens), the inputs of the law.
SIZE_AND_BUDGET = {"model.n_layer", "model.n_head", "model.n_embd", "training.max_steps"}


class SweepRun(Run):
    """One finished run of a sweep."""

    name: str  # group and seed, such as `demo-1337`
    group: str  # runs of one group differ in their seed only
    params: dict[str, Any]  # key such as training.seed -> value that the sweep sets for this run
    seed: int
    optimizer: Literal["adamw", "muon"]
    train_loss: float | None = None  # nats per token, the mean of the last steps
    loss: float  # mean over all scored tokens of the val split, in nats per token
    nats: tuple[float, ...] = ()  # total loss of each document, in the order of the val split


class ScoredDocuments(Section):
    """The val documents that each run of a sweep scored, in the order of the val split."""

    ids_sha256: Sha256  # hash of the documents' ids and numbers of tokens, see `documents_sha256`
    tokens: tuple[int, ...]  # number of scored tokens of each document
    sources: tuple[str, ...]  # where each document comes from, for example the Python package `scipy`


class Fit(Section):
    """The chosen form of the scaling law with its constants, and the errors of all forms."""

    form: FormName
    constants: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]  # constants fitted to each bootstrap resample of the runs
    # For each of the sweep's largest runs, log(measured loss / loss predicted by a fit to the smaller runs)
    misses: tuple[float, ...]
    errors: dict[FormName, float]  # name of a form of the law -> root mean square of the form's misses


class Sweep(Section):
    """The content of results/<sweep>.json: the runs of a sweep, and the law fitted to them."""

    corpus: dict[str, Any]  # settings that determine the text, see `corpus_settings`
    settings: dict[str, Any]  # settings that affect the loss, see `recipe`
    data_sha256: Sha256  # hash of the token file of the val split
    train_tokens: int
    val_tokens: int  # number of scored tokens of the val split
    document_tokens: int | None = None  # of each val document, the first N tokens are scored; None: all
    documents: ScoredDocuments | None = None  # None: the runs have no losses by document
    runs: tuple[SweepRun, ...]
    fit: Fit | None = None


@dataclass(frozen=True)
class Form:
    """A form of the scaling law: the loss is a sum of terms such as A / N^a.

    The logarithm of a term is linear in the constants. In log(A / N^a) = 1 * log A + (-log N) * a, the
    constants are log A and a, and the factors of these constants are 1 and -log N.
    """

    formula: str
    # `factors(log N, log D)` is a matrix, (terms, constants): log(terms) is the matrix times the constants.
    factors: Callable[[float, float], list[list[float]]]
    starts: tuple[tuple[float, ...], ...]  # values of the constants from which the fit is started

    def log_loss(self, constants: Any, num_params: int, tokens: int) -> Floats:
        """Return log(predicted loss). `constants` is (sets, constants), or (constants,) for one set."""
        factors = np.array(self.factors(math.log(num_params), math.log(tokens)))
        log_terms = np.asarray(constants) @ factors.T  # (terms,) or (sets, terms)
        log_losses: Floats = np.logaddexp.reduce(log_terms, axis=-1)
        return log_losses


FORMS: dict[FormName, Form] = {
    "floor": Form(  # order of the constants: log E, log A, a, log B, b
        "E + A / N^a + B / D^b",
        lambda n, d: [[1, 0, 0, 0, 0], [0, 1, -n, 0, 0], [0, 0, 0, 1, -d]],
        ((0.5, 5.0, 0.34, 5.0, 0.28), (1.0, 3.0, 0.2, 8.0, 0.7), (1.3, 1.0, 0.1, 10.0, 1.0)),
    ),
    "sum": Form(  # order of the constants: log A, a, log B, b
        "A / N^a + B / D^b",
        lambda n, d: [[1, -n, 0, 0], [0, 0, 1, -d]],
        ((3.0, 0.1, 5.0, 0.4), (6.0, 0.34, 6.0, 0.28)),
    ),
    "product": Form(  # order of the constants: log A, a, b
        "A / (N^a D^b)",
        lambda n, d: [[1, -n, -d]],
        ((3.0, 0.05, 0.1),),
    ),
}


def _fit_form(form: Form, runs: Sequence[SweepRun], starts: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Make a fit from each of the starting values `starts`, and return the constants of the best fit.

    A fit minimizes a Huber loss of the errors of log(loss) (Hoffmann et al. 2022, appendix D.2).
    """
    from scipy.optimize import least_squares
    from scipy.special import softmax

    by_run = [form.factors(math.log(run.num_params), math.log(run.tokens)) for run in runs]
    factors = np.array(by_run)  # (runs, terms, constants)
    measured = np.log([run.loss for run in runs])

    def residuals(constants: Floats) -> Any:
        return np.logaddexp.reduce(factors @ constants, axis=1) - measured  # (runs,)

    def jacobian(constants: Floats) -> Any:
        return np.einsum("rt,rtc->rc", softmax(factors @ constants, axis=1), factors)  # (runs, constants)

    fits = [least_squares(residuals, start, jacobian, loss="huber", f_scale=HUBER_DELTA) for start in starts]
    best = min(fits, key=lambda found: float(found.cost))
    return tuple(_rounded(constant) for constant in best.x)


def _rounded(value: float, digits: int = 9) -> float:
    """Return the value rounded to significant digits; further digits differ between processors."""
    return float(f"{value:.{digits}g}")


def fit_runs(runs: Sequence[SweepRun], resamples: int = RESAMPLES) -> Fit:
    """Choose the form that predicts larger runs best, and fit it to all runs.

    Raises BadData if the runs are too few.
    """
    misses = {name: found for name, form in FORMS.items() if (found := _extrapolation_misses(form, runs))}
    if not misses:
        raise BadData(f"{len(runs)} runs are too few for a scaling law: run 3 sizes with 3 budgets each")
    # Root mean square of the misses: `hypot` returns the root of the sum of squares.
    errors = {name: _rounded(math.hypot(*found) / math.sqrt(len(found))) for name, found in misses.items()}
    chosen = min(errors, key=lambda name: errors[name])
    form = FORMS[chosen]
    constants = _fit_form(form, runs, form.starts)
    generator = np.random.default_rng(SEED)
    draws: list[tuple[float, ...]] = []
    while len(draws) < resamples:
        sample = [runs[index] for index in generator.integers(0, len(runs), len(runs))]
        sizes, budgets = {run.num_params for run in sample}, {run.tokens for run in sample}
        # A resample with too few different runs, sizes or budgets can't determine the constants: skip it.
        if len({run.name for run in sample}) > len(constants) and min(len(sizes), len(budgets)) > 1:
            draws.append(_fit_form(form, sample, [constants]))
    return Fit(
        form=chosen, constants=constants, draws=tuple(draws), misses=tuple(misses[chosen]), errors=errors
    )


def _extrapolation_misses(form: Form, runs: Sequence[SweepRun]) -> list[float]:
    """Return log(measured loss / predicted loss) of runs that are larger than the fitted runs.

    Fits `form` twice: first without the runs that have the most tokens, then without the runs that have the
    most parameters. Each fit predicts the runs left out. Returns an empty list if too few runs remain.
    """
    misses = []
    for attribute in ("tokens", "num_params"):
        largest = max(getattr(run, attribute) for run in runs)
        known = [run for run in runs if getattr(run, attribute) < largest]
        if len(known) <= len(form.starts[0]) or len({getattr(run, attribute) for run in known}) < 2:
            return []
        constants = _fit_form(form, known, form.starts)
        for run in runs:
            if getattr(run, attribute) == largest:
                predicted = form.log_loss(constants, run.num_params, run.tokens)
                misses.append(_rounded(math.log(run.loss) - float(predicted)))
    return misses


def predict_loss(fit: Fit, num_params: int, tokens: int) -> ExpectedLoss:
    """Return the loss that the fitted law predicts for a run, with intervals, in nats per token."""
    form = FORMS[fit.form]
    log_losses = form.log_loss(fit.draws, num_params, tokens)  # (draws,)
    losses = np.exp(log_losses[:, None] + np.array(fit.misses))  # (draws, misses)
    shares = {"low_95": 0.025, "low_80": 0.1, "value": 0.5, "high_80": 0.9, "high_95": 0.975}
    quantiles = np.quantile(losses, list(shares.values()))
    return ExpectedLoss(
        **{name: _rounded(value, 6) for name, value in zip(shares, quantiles, strict=True)},
        basis=f"{form.formula}, fitted to a sweep of small runs on the same text",
    )


def read_sweep(path: Path) -> Sweep | None:
    """Return the sweep in the file `path`; None for a missing file. Raises BadConfig for a damaged file."""
    return load_section(path, Sweep) if path.exists() else None


def documents_sha256(ids: Sequence[str], tokens: Sequence[int]) -> str:
    """Return a hash of all documents' ids, and of `tokens`, the number of scored tokens of each document."""
    return hashlib.sha256("\n".join([*ids, *map(str, tokens)]).encode()).hexdigest()


def corpus_settings(params: Params) -> dict[str, Any]:
    """Return the settings that determine the text of the train split and the val split."""
    download = params.download
    readers = {"docstrings": download.docstrings, "files": download.files, "hub": download.hub}
    not_text = {"mirror"} if download.corpus == "hub" else {"name"}  # settings that do not change the text
    return {
        "corpus": download.corpus,
        "settings": readers[download.corpus].model_dump(mode="json", exclude=not_text),
        "max_documents": download.max_documents,
        "max_bytes": download.max_bytes,
        "tokenizer": download.tokenizer.vocab_bpe_sha256,
        "val_fraction": params.tokenization.val_fraction,
        # Older sweep files all used `hash` and have no key `split`, so the key is left out for `hash`.
        **({} if params.tokenization.split == "hash" else {"split": params.tokenization.split}),
    }


def recipe(params: Params) -> dict[str, Any]:
    """Return the settings of model and training that affect the loss: dotted key -> value."""
    training = params.training.model_dump(mode="json", exclude=NOT_RECIPE)
    if params.training.head == "full":
        del training["sample_tokens"], training["sample_power"]
    return {
        **{f"model.{key}": value for key, value in params.model.model_dump(mode="json").items()},
        **{f"training.{key}": value for key, value in training.items()},
    }


def sweep_report(sweep: Sweep, params: Params) -> dict[str, Any]:
    """Return the section `ladder` of reports/estimate.json.

    `differs` lists the settings that prevent a prediction, because `params` and the sweep have different
    values. The item `corpus` means that the texts differ. If the list is not empty, `expected_loss` is null.
    Raises BadData if the sweep has no fit.
    """
    fit, run = sweep.fit, run_of(params.model, params.training)
    if fit is None:
        raise BadData("the runs of the sweep have no law yet: run `compactgpt experiment fit ladder`")
    ours, theirs = recipe(params), sweep.settings
    keys = (ours.keys() | theirs) - SIZE_AND_BUDGET
    differs = sorted(key for key in keys if ours.get(key) != theirs.get(key))
    if sweep.corpus != corpus_settings(params):
        differs.insert(0, "corpus")
    return {
        "expected_loss": None if differs else predict_loss(fit, run.num_params, run.tokens).model_dump(),
        "differs": differs,
        "formula": FORMS[fit.form].formula,
        "constants": list(fit.constants),
        "errors": dict(fit.errors),
    }


def fit_sweep(path: Path, params_file: Path) -> str:
    """Fit the law to the runs in the file `path`, write the fit to this file, and return a summary.

    Raises MissingInput or BadConfig for a missing or invalid file, and BadData for too few runs.
    """
    found, params = load_section(path, Sweep), load_params(params_file)
    fit = fit_runs(found.runs)
    sweep = found.model_copy(update={"fit": fit})
    write_json(path, sweep.model_dump(mode="json"))
    report = sweep_report(sweep, params)
    loss, lines = report["expected_loss"], []
    for run in sweep.runs:
        log_loss = FORMS[fit.form].log_loss(fit.constants, run.num_params, run.tokens)
        lines.append(f"{run.name}: {run.loss:.4f}, fitted {math.exp(log_loss):.4f}")
    lines.append(f"{report['formula']}, constants {', '.join(f'{c:.4g}' for c in report['constants'])}")
    lines.append(
        f"the configured run: {loss['value']:.3f} ({loss['low_95']:.3f} to {loss['high_95']:.3f}, 95 %)"
        if loss
        else f"no prediction: the configured run differs from the sweep in {', '.join(report['differs'])}"
    )
    return "\n".join(lines)
