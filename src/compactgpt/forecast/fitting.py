"""Fits a scaling law to finished runs, and gathers those runs from their DVC experiments.

See compactgpt.ladder for what the law is and how its interval is made.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from compactgpt.common.errors import BadConfig, BadData, NotAllowed
from compactgpt.common.storage import json_bytes, write_bytes, write_json
from compactgpt.config import Params, load_params, parse_params
from compactgpt.experiments import experiment_ref, find_experiment, read_experiment_file, run_names
from compactgpt.forecast.estimate import configured_run
from compactgpt.forecast.model_size import counts
from compactgpt.forecast.sweep import (
    FORMS,
    Fit,
    Form,
    Ladder,
    Rung,
    corpus_of,
    ladder_report,
    predict,
    read_ladder,
    settings_of,
)

HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, appendix D.2
RESAMPLES = 400
SEED = 1337
DIGITS = 9  # of a constant that is written: what differs between processors lies beyond


def fit_form(form: Form, rungs: Sequence[Rung], starts: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The constants of a form, from the best of several starts."""
    import numpy as np
    from scipy.optimize import least_squares
    from scipy.special import softmax

    design = np.array([form.design(math.log(r.num_params), math.log(r.tokens)) for r in rungs])
    measured = np.log([rung.loss for rung in rungs])

    def misses(constants: Any) -> Any:
        return np.logaddexp.reduce(design @ constants, axis=1) - measured  # (runs,)

    def slopes(constants: Any) -> Any:
        return np.einsum("rt,rtc->rc", softmax(design @ constants, axis=1), design)  # (runs, constants)

    fits = [least_squares(misses, start, slopes, loss="huber", f_scale=HUBER_DELTA) for start in starts]
    best = min(fits, key=lambda found: float(found.cost))
    return tuple(float(f"{constant:.{DIGITS}g}") for constant in best.x)


def extrapolations(form: Form, rungs: Sequence[Rung]) -> list[float]:
    """Log of measured over told, of the largest budget and of the widest models, each fitted without them.

    Empty where too few runs are left for the form's constants.
    """
    misses = []
    for size in (_tokens, _num_params):
        top = max(map(size, rungs))
        known = [rung for rung in rungs if size(rung) < top]
        if len(known) <= len(form.starts[0]) or len({size(rung) for rung in known}) < 2:
            return []
        constants = fit_form(form, known, form.starts)
        misses += [_miss(form, constants, rung) for rung in rungs if size(rung) == top]
    return misses


def _tokens(rung: Rung) -> int:
    return rung.tokens


def _num_params(rung: Rung) -> int:
    return rung.num_params


def _miss(form: Form, constants: Sequence[float], rung: Rung) -> float:
    told = form.log_loss(constants, math.log(rung.num_params), math.log(rung.tokens))
    return float(f"{math.log(rung.loss) - told:.{DIGITS}g}")


def fit(rungs: Sequence[Rung], resamples: int = RESAMPLES) -> Fit:
    """Choose a form by its extrapolations, and fit it; `resamples` bootstrap draws.

    Raises:
        BadData: the runs are too few, or all of one size or budget.
    """
    misses = {name: found for name, form in FORMS.items() if (found := extrapolations(form, rungs))}
    if not misses:
        raise BadData(
            f"{len(rungs)} runs carry no scaling law: it takes three sizes and three budgets, or nearly"
        )
    errors = {name: _root_mean_square(found) for name, found in misses.items()}
    chosen = min(errors, key=lambda name: errors[name])
    form = FORMS[chosen]
    constants = fit_form(form, rungs, form.starts)
    return Fit(
        form=chosen,
        constants=constants,
        draws=_bootstrap(form, rungs, constants, resamples),
        misses=tuple(misses[chosen]),
        errors=errors,
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return float(f"{math.sqrt(math.fsum(v * v for v in values) / len(values)):.{DIGITS}g}")


def _bootstrap(
    form: Form, rungs: Sequence[Rung], constants: tuple[float, ...], resamples: int
) -> tuple[tuple[float, ...], ...]:
    """Constants of the form on runs drawn with replacement; a draw of too few places is drawn again."""
    import numpy as np

    generator = np.random.default_rng(SEED)
    draws: list[tuple[float, ...]] = []
    while len(draws) < resamples:
        drawn = [rungs[place] for place in generator.integers(0, len(rungs), len(rungs))]
        sizes, budgets = {rung.num_params for rung in drawn}, {rung.tokens for rung in drawn}
        if len({rung.name for rung in drawn}) > len(constants) and min(len(sizes), len(budgets)) > 1:
            draws.append(fit_form(form, drawn, [constants]))
    return tuple(draws)


def _check_output(folder: Path) -> None:
    """Refuse a folder with files that no earlier fit wrote; results/ has those of experiments too."""
    fit, plot = folder / "ladder.json", folder / "ladder.png"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = names - {fit.name, plot.name} if folder.resolve() != Path("results").resolve() else set()
    try:
        own = not fit.exists() or read_ladder(fit) is not None
    except BadConfig:
        own = False
    if others or not own or (plot.exists() and not fit.exists()):
        raise NotAllowed(f"{folder} has files that this command did not write: name a new or an empty folder")


def climb(name: str, folder: Path, params_file: Path) -> str:
    """Gather the runs of a sweep, fit the law, write it into `folder`, and say what came out.

    Args:
        name: the sweep.
        folder: new, empty, the project's results/, or one with the two files of an earlier fit.
        params_file: params.yaml.

    Raises:
        NotAllowed: the folder has other files.
        MissingInput, BadData, BadConfig: see `gather`.
    """
    _check_output(folder)
    found = gather(run_names(name, find_experiment(name)))
    params = load_params(params_file)
    run = configured_run(params)
    write_json(folder / "ladder.json", found.model_dump(mode="json"))
    report = ladder_report(found, params, run)
    told = report["expected_loss"]
    draw(found, folder / "ladder.png", [(run.num_params, run.tokens)] if told else [])
    lines = [f"{rung['name']}: {rung['loss']:.4f}, told {rung['told']:.4f}" for rung in report["rungs"]]
    lines.append(f"{report['formula']}, constants {', '.join(f'{c:.4g}' for c in found.fit.constants)}")
    lines.append(
        f"the configured run: {told['value']:.3f} ({told['low_95']:.3f} to {told['high_95']:.3f}, 95 %)"
        if told
        else f"the configured run is another: {', '.join(report['differs'])}"
    )
    return "\n".join(lines)


def gather(names: Sequence[str]) -> Ladder:
    """Read the finished runs of a ladder from their DVC experiments, and fit the law.

    Raises:
        MissingInput: one of them has not run.
        BadData: they differ in text or in settings, or their losses are not of the whole val split.
    """
    rungs, facts = [], []
    for name in names:
        ref = experiment_ref(name)
        params = parse_params(_yaml(read_experiment_file(ref, "params.yaml")), f"params.yaml of {name}")
        report = _yaml(read_experiment_file(ref, "reports/training.json"))
        split = _yaml(read_experiment_file(ref, "reports/tokenization.json"))
        rungs.append(_rung(name, params, report, _yaml(read_experiment_file(ref, "dvc.lock"))))
        facts.append(
            {
                "corpus": corpus_of(params),
                "settings": settings_of(params),
                "data_sha256": report["data_sha256"],
                "train_tokens": report["train_split_tokens"],
                "val_tokens": report["val_loss_tokens"],
            }
        )
        every = split["val"]["tokens"] - split["val"]["documents"]  # ends of text are not scored
        if report["val_loss_tokens"] != every:
            raise BadData(
                f"{name}: its loss is of {report['val_loss_tokens']:,} of {every:,} val tokens: raise "
                "training.eval_windows to all of them"
            )
    for name, fact in zip(names, facts, strict=True):
        if differing := [key for key in fact if fact[key] != facts[0][key]]:
            raise BadData(f"{name} and {names[0]} differ in {', '.join(differing)}: run the ladder again")
    return Ladder(**facts[0], rungs=tuple(rungs), fit=fit(rungs))


def _yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)  # JSON is YAML


def _rung(name: str, params: Params, report: Any, lock: Any) -> Rung:
    sizes, training = counts(params.model), params.training
    (model,) = (out for out in lock["stages"]["training"]["outs"] if out["path"] == "models/compact")
    identity = params.model_dump(mode="json", include={"model", "training"})
    return Rung(
        name=name,
        num_params=sizes.nanogpt,
        num_params_non_embedding=sizes.non_embedding,
        max_steps=training.max_steps,
        tokens_per_step=training.tokens_per_step,
        optimizer=training.optimizer,
        loss=report["val_loss"],
        params_sha256=hashlib.sha256(json_bytes(identity)).hexdigest(),
        model_md5=model["md5"].removesuffix(".dir"),
    )


def draw(ladder: Ladder, path: Path, beyond: Sequence[tuple[int, int]] = ()) -> None:
    """Draw the runs, the law through them, and what it tells of other runs, as a PNG.

    Args:
        ladder: the runs and the fit.
        path: where the picture goes.
        beyond: (parameters, tokens) of runs to tell.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = sorted({rung.num_params for rung in ladder.rungs})
    budgets = sorted({rung.tokens for rung in ladder.rungs} | {tokens for _, tokens in beyond})
    spread = [budgets[0] * (budgets[-1] / budgets[0]) ** (step / 40) for step in range(41)]
    for place, size in enumerate(sizes):
        colour = f"C{place}"
        rungs = [rung for rung in ladder.rungs if rung.num_params == size]
        axes.plot(spread, [predict(ladder.fit, size, round(t)).value for t in spread], colour, lw=1)
        axes.plot(
            [r.tokens for r in rungs], [r.loss for r in rungs], "o", color=colour, label=f"{size / 1e6:.2f}M"
        )
    for size, tokens in beyond:
        told = predict(ladder.fit, size, tokens)
        errors = [[told.value - told.low_95], [told.high_95 - told.value]]
        axes.errorbar(
            [tokens], [told.value], yerr=errors, fmt="D", color="black", capsize=4,
            label=f"{size / 1e6:.2f}M, told (95 %)",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="tokens trained on", ylabel="val loss, nats per token")
    axes.set_title(f"The ladder: {FORMS[ladder.fit.form].formula}", fontsize=10)
    axes.legend(title="parameters", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())
