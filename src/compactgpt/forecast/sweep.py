"""A scaling law for our own corpus, fitted to a sweep of small runs: `compactgpt experiment fit`.

The law is that of Hoffmann et al. 2022 (equation 2), L(N, D) = E + A / N^a + B / D^b, in nats per token,
with N parameters in nanoGPT's convention and D tokens trained on. A few small runs determine few constants,
so there are two shorter forms of it. The form is chosen that extrapolates best: it is fitted without the runs
of the largest budget, then without the widest models, and predicts what was left out. The fit minimizes
Huber's loss of the difference of logarithms (Hoffmann, appendix D.2). The interval of a prediction comes from
constants fitted to resampled runs (bootstrap), each combined with every error of those extrapolations.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from ruamel.yaml import YAML

from compactgpt.common.errors import BadConfig, BadData, NotAllowed
from compactgpt.common.sections import Section, load_section
from compactgpt.common.storage import json_bytes, write_json
from compactgpt.config import ExpectedLoss, Params, load_params, parse_params
from compactgpt.forecast.model_size import count_parameters
from compactgpt.forecast.scaling_laws import configured_run

Floats = npt.NDArray[np.float64]
FormName = Literal["floor", "sum", "product"]
ReadFile = Callable[[str, str], str]  # name of a DVC experiment, path of a file in it -> its text

HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, appendix D.2
RESAMPLES = 400
SEED = 1337
DIGITS = 9  # of a constant that is written: processors differ in the digits after these
# What runs were trained with before these settings existed.
EARLIER_SETTINGS = {
    "training.head": "full",
    "training.init_unigram": 0.0,
    "training.init_positions": 0.0,
    "training.position_learning_rate": None,
}


class SweepRun(Section):
    """One finished run of a sweep."""

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
    """The chosen form with its constants, those of the bootstrap, and how each form extrapolated."""

    form: FormName
    constants: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]
    misses: tuple[float, ...]  # log of measured over predicted loss, of the extrapolated runs
    errors: dict[FormName, float]  # root mean square of such misses, by form


class Sweep(Section):
    """The content of results/ladder.json."""

    corpus: dict[str, Any]  # the settings that decide the text
    settings: dict[str, Any]  # what else the runs have in common
    data_sha256: str
    train_tokens: int
    val_tokens: int
    runs: tuple[SweepRun, ...] = Field(alias="rungs")  # wording: quoted
    fit: Fit


@dataclass(frozen=True)
class Form:
    """A form of the law: the loss is a sum of terms, and a term's logarithm is linear in the constants."""

    formula: str
    design: Callable[[float, float], list[list[float]]]  # log N, log D -> (terms, constants)
    starts: tuple[tuple[float, ...], ...]  # of the fit

    def log_loss(self, constants: Any, num_params: int, tokens: int) -> Floats:
        """Return the logarithm of the loss. (..., constants) -> (...)."""
        design = np.array(self.design(math.log(num_params), math.log(tokens)))
        terms = np.asarray(constants) @ design.T  # (..., terms)
        log_sums: Floats = np.logaddexp.reduce(terms, axis=-1)
        return log_sums


FORMS: dict[FormName, Form] = {
    "floor": Form(  # Hoffmann's own parameters: log E, log A, a, log B, b
        "E + A / N^a + B / D^b",
        lambda n, d: [[1, 0, 0, 0, 0], [0, 1, -n, 0, 0], [0, 0, 0, 1, -d]],
        ((0.5, 5.0, 0.34, 5.0, 0.28), (1.0, 3.0, 0.2, 8.0, 0.7), (1.3, 1.0, 0.1, 10.0, 1.0)),
    ),
    "sum": Form(  # log A, a, log B, b
        "A / N^a + B / D^b",
        lambda n, d: [[1, -n, 0, 0], [0, 0, 1, -d]],
        ((3.0, 0.1, 5.0, 0.4), (6.0, 0.34, 6.0, 0.28)),
    ),
    "product": Form("A / (N^a D^b)", lambda n, d: [[1, -n, -d]], ((3.0, 0.05, 0.1),)),  # log A, a, b
}


def fit_form(form: Form, runs: Sequence[SweepRun], starts: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the constants of a form that fit best, from several starts."""
    from scipy.optimize import least_squares
    from scipy.special import softmax

    designs = [form.design(math.log(run.num_params), math.log(run.tokens)) for run in runs]
    design = np.array(designs)  # (runs, terms, constants)
    measured = np.log([run.loss for run in runs])

    def residuals(constants: Floats) -> Any:
        return np.logaddexp.reduce(design @ constants, axis=1) - measured  # (runs,)

    def jacobian(constants: Floats) -> Any:
        return np.einsum("rt,rtc->rc", softmax(design @ constants, axis=1), design)  # (runs, constants)

    fits = [least_squares(residuals, start, jacobian, loss="huber", f_scale=HUBER_DELTA) for start in starts]
    best = min(fits, key=lambda found: float(found.cost))
    return tuple(_rounded(constant, DIGITS) for constant in best.x)


def fit_runs(runs: Sequence[SweepRun], resamples: int = RESAMPLES) -> Fit:
    """Choose a form by its extrapolations, and fit it.

    Raises:
        BadData: the runs are too few, or all of one size or budget.
    """
    misses = {name: found for name, form in FORMS.items() if (found := _extrapolation_misses(form, runs))}
    if not misses:
        raise BadData(f"{len(runs)} runs are too few for a scaling law: run three sizes and three budgets")
    errors: dict[FormName, float] = {}
    for name, values in misses.items():
        mean_square = math.fsum(value * value for value in values) / len(values)
        errors[name] = _rounded(math.sqrt(mean_square), DIGITS)
    chosen = min(errors, key=lambda name: errors[name])
    form = FORMS[chosen]
    constants = fit_form(form, runs, form.starts)
    draws = [fit_form(form, drawn, [constants]) for drawn in _resampled(runs, len(constants), resamples)]
    return Fit(
        form=chosen, constants=constants, draws=tuple(draws), misses=tuple(misses[chosen]), errors=errors
    )


def _extrapolation_misses(form: Form, runs: Sequence[SweepRun]) -> list[float]:
    """Return log(measured / predicted) of the largest budget, then of the widest models.

    Each group is predicted by a fit to all other runs; empty where those are too few for the constants.
    """
    misses = []
    for attribute in ("tokens", "num_params"):
        largest = max(getattr(run, attribute) for run in runs)
        known = [run for run in runs if getattr(run, attribute) < largest]
        if len(known) <= len(form.starts[0]) or len({getattr(run, attribute) for run in known}) < 2:
            return []
        constants = fit_form(form, known, form.starts)
        for run in runs:
            if getattr(run, attribute) == largest:
                predicted = form.log_loss(constants, run.num_params, run.tokens)
                misses.append(_rounded(math.log(run.loss) - float(predicted), DIGITS))
    return misses


def _resampled(runs: Sequence[SweepRun], constants: int, resamples: int) -> Iterator[list[SweepRun]]:
    """Draw the runs with replacement; a draw of too few sizes, budgets or runs is drawn again."""
    generator, drawn = np.random.default_rng(SEED), 0
    while drawn < resamples:
        sample = [runs[index] for index in generator.integers(0, len(runs), len(runs))]
        sizes, budgets = {run.num_params for run in sample}, {run.tokens for run in sample}
        if len({run.name for run in sample}) > constants and min(len(sizes), len(budgets)) > 1:
            drawn += 1
            yield sample


def _rounded(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


def predict_loss(fit: Fit, num_params: int, tokens: int) -> ExpectedLoss:
    """Return the loss of a run by a fitted law, with intervals; see the module."""
    form = FORMS[fit.form]
    log_losses = form.log_loss(fit.draws, num_params, tokens)  # (draws,)
    losses = np.exp(log_losses[:, None] + np.array(fit.misses))  # (draws, misses)
    shares = {"low_95": 0.025, "low_80": 0.1, "value": 0.5, "high_80": 0.9, "high_95": 0.975}
    quantiles = np.quantile(losses, list(shares.values()))
    return ExpectedLoss(
        **dict(zip(shares, map(_rounded, quantiles), strict=True)),
        basis=f"{form.formula}, fitted to a ladder of small runs on the same text",
    )


def read_sweep(path: Path) -> Sweep | None:
    """Read results/ladder.json; None where there is no such file.

    Raises:
        BadConfig: the file is damaged.
    """
    return load_section(path, Sweep) if path.exists() else None


def corpus_settings(params: Params) -> dict[str, Any]:
    """Return the settings that decide which text is trained and evaluated on."""
    download = params.download
    readers = {"docstrings": download.docstrings, "files": download.files, "hub": download.hub}
    not_text = {"mirror"} if download.corpus == "hub" else {"name"}  # of files: for reports only
    return {
        "corpus": download.corpus,
        "settings": readers[download.corpus].model_dump(mode="json", exclude=not_text),
        "max_documents": download.max_documents,
        "max_bytes": download.max_bytes,
        "tokenizer": download.tokenizer.vocab_bpe_sha256,
        "val_fraction": params.tokenization.val_fraction,
    }


def shared_settings(params: Params) -> dict[str, Any]:
    """Return the settings, other than text, size, budget and chance, that decide a loss."""
    shape = params.model.model_dump(mode="json", exclude={"n_layer", "n_head", "n_embd"})
    free = {"seed", "max_steps", "eval_interval", "eval_windows", "checkpoint_interval", "launcher"}
    free |= {"micro_batch_size", "compile", "init_from"}
    if params.training.head == "full":
        free |= {"sample_tokens", "sample_power"}
    training = params.training.model_dump(mode="json", exclude=free)
    return {f"model.{key}": value for key, value in shape.items()} | {
        f"training.{key}": value for key, value in training.items()
    }


def sweep_report(sweep: Sweep, params: Params) -> dict[str, Any]:
    """Return the part `ladder` of reports/estimate.json: the fit, and its prediction for the configured run.

    Where text or settings of the sweep are others, `differs` names them and `expected_loss` is null.
    """
    fit, run = sweep.fit, configured_run(params)
    ours, theirs = shared_settings(params), EARLIER_SETTINGS | sweep.settings
    differs = sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key))
    if sweep.corpus != corpus_settings(params):
        differs.insert(0, "corpus")
    runs = []
    for done in sweep.runs:
        log_loss = FORMS[fit.form].log_loss(fit.constants, done.num_params, done.tokens)
        fitted = {"tokens": done.tokens, "told": _rounded(math.exp(log_loss))}  # wording: quoted
        runs.append(done.model_dump() | fitted)
    return {
        "expected_loss": None if differs else predict_loss(fit, run.num_params, run.tokens).model_dump(),
        "differs": differs,
        "formula": FORMS[fit.form].formula,
        "form": fit.form,
        "constants": list(fit.constants),
        "errors": dict(fit.errors),
        "data_sha256": sweep.data_sha256,
        "rungs": runs,  # wording: quoted
    }


def fit_sweep(names: Sequence[str], read_file: ReadFile, path: Path, params_file: Path) -> str:
    """Fit the law to the finished runs of a sweep, write it to `path`, and return what to print.

    `names` are DVC experiments. The prediction is that of the run of `params_file`.

    Raises:
        NotAllowed: `path` is a file that this command did not write.
        BadData: the runs differ in text or settings, or a loss is not of the whole val split.
    """
    try:
        read_sweep(path)
    except BadConfig as error:
        raise NotAllowed(f"this command did not write {path}: name a new or an empty folder") from error
    sweep, params = read_sweep_runs(names, read_file), load_params(params_file)
    write_json(path, sweep.model_dump(mode="json", by_alias=True))
    report = sweep_report(sweep, params)
    loss = report["expected_loss"]
    lines = [
        f"{done['name']}: {done['loss']:.4f}, fitted {done['told']:.4f}"  # wording: quoted
        for done in report["rungs"]  # wording: quoted
    ]
    lines.append(f"{report['formula']}, constants {', '.join(f'{c:.4g}' for c in sweep.fit.constants)}")
    lines.append(
        f"the configured run: {loss['value']:.3f} ({loss['low_95']:.3f} to {loss['high_95']:.3f}, 95 %)"
        if loss
        else f"no prediction for the configured run, which has another {', '.join(report['differs'])}"
    )
    return "\n".join(lines)


def read_sweep_runs(names: Sequence[str], read_file: ReadFile) -> Sweep:
    """Read the finished runs of a sweep, and fit the law; see `fit_sweep`."""
    runs, facts = [], []
    for name in names:
        paths = ("params.yaml", "reports/training.json", "reports/tokenization.json", "dvc.lock")
        yaml = YAML(typ="safe", pure=True)  # JSON is YAML
        tree, report, split, lock = (yaml.load(read_file(name, path)) for path in paths)
        params = parse_params(tree, f"params.yaml of {name}")
        scored = split["val"]["tokens"] - split["val"]["documents"]  # end-of-text is not scored
        if report["val_loss_tokens"] != scored:
            raise BadData(
                f"{name}: its loss is of {report['val_loss_tokens']:,} of {scored:,} val tokens: raise "
                "training.eval_windows to all of them"
            )
        runs.append(_sweep_run(name, params, report["val_loss"], lock))
        facts.append(
            {
                "corpus": corpus_settings(params),
                "settings": shared_settings(params),
                "data_sha256": report["data_sha256"],
                "train_tokens": report["train_split_tokens"],
                "val_tokens": report["val_loss_tokens"],
            }
        )
    for name, fact in zip(names, facts, strict=True):
        if differing := [key for key in fact if fact[key] != facts[0][key]]:
            raise BadData(f"{name} and {names[0]} differ in {', '.join(differing)}: run the sweep again")
    return Sweep(**facts[0], rungs=tuple(runs), fit=fit_runs(runs))  # wording: quoted


def _sweep_run(name: str, params: Params, loss: float, lock: Any) -> SweepRun:
    sizes, training = count_parameters(params.model), params.training
    (model,) = (out for out in lock["stages"]["training"]["outs"] if out["path"] == "models/compact")
    identity = params.model_dump(mode="json", include={"model", "training"})
    return SweepRun(
        name=name,
        num_params=sizes.nanogpt,
        num_params_non_embedding=sizes.non_embedding,
        max_steps=training.max_steps,
        tokens_per_step=training.tokens_per_step,
        optimizer=training.optimizer,
        loss=loss,
        params_sha256=hashlib.sha256(json_bytes(identity)).hexdigest(),
        model_md5=model["md5"].removesuffix(".dir"),
    )
