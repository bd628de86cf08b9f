"""Reports, claims and published values -> one record, from which every table and picture is made.

`gather` turns all that is known into `Evidence`; `compare` judges the claims with it and returns the
record, plain JSON. `compactgpt.rendering` sees nothing but that record, so no table can show a number that
it lacks. Ids of the evidence: `<model>.<quantity>`, where `note` is the note's model, `compact` the one
trained here; published results on another corpus carry its name, `gpt2.openwebtext.loss`.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from compactgpt.claims import Claim, Claims, Evidence, Judgement, Published, judge
from compactgpt.config import ExpectedLoss, Likelihood, Model, load_section
from compactgpt.errors import BadConfig, BadData, MissingInput
from compactgpt.evaluation import Totals, read_totals
from compactgpt.metrics import (
    Interval,
    bits_per_byte,
    mcnemar,
    perplexity,
    perplexity_ratio,
    ratio_bootstrap,
)
from compactgpt.sizes import counts, flops_per_token
from compactgpt.storage import read_json

COMPACT, NOTE = "compact", "note"
NATS = "nats per token"


class _Report(BaseModel):
    """What is read of another stage's report; the rest of it is no concern of ours."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class _ScoredModel(_Report):
    name: str
    kind: str
    context: str
    num_params: int | None
    num_params_non_embedding: int | None = None


class _Validation(_Report):
    sha256: str
    documents: int
    tokens: int
    bytes: int


class _Bounds(_Report):
    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class _View(_Report):
    context: int
    stride: int
    loss: _Bounds


class _Task(_Report):
    """A question with one right answer; those without `accuracy` (WikiText) stay in their own report."""

    items_sha256: str = ""
    accuracy: _Bounds | None = None
    hits: str = ""


class _Text(_Report):
    """What a model wrote: figures by way, and the samples where they stand beside them."""

    statistics: dict[str, dict[str, _Bounds | None]] = {}
    samples: list[dict[str, Any]] = []


class _Samples(_Report):
    """reports/samples.json."""

    samples: list[dict[str, Any]] = []


class _Flag(_Report):
    id: str


class _Inspection(_Report):
    """reports/inspection.json."""

    flagged: list[_Flag] = []


class Score(_Report):
    """reports/evaluation.json and reports/baseline/<name>.json."""

    model: _ScoredModel
    validation: _Validation
    window: int
    loss: _Bounds
    perplexity: _Bounds
    bits_per_byte: _Bounds
    word_perplexity: _Bounds | None = None
    views: dict[str, _View] = {}
    tasks: dict[str, _Task] = {}
    text: _Text = _Text()


class _Sizes(_Report):
    all_tensors: int
    nanogpt: int
    non_embedding: int


class _Flops(_Report):
    with_attention: int


class _Shape(_Report):
    block_size: int


class Forecast(_Report):
    """One of the two runs of reports/estimate.json."""

    parameters: _Sizes
    model: _Shape
    sequences_per_step: int
    tokens_per_step: int
    tokens: int
    epochs: float | None
    flops_per_token: _Flops
    expected_loss: ExpectedLoss


class OwnForecast(Forecast):
    """The run of params.yaml."""

    corpus: str
    notes: list[str]


class Estimates(_Report):
    """reports/estimate.json."""

    compact: OwnForecast
    note: Forecast


class Trained(_Report):
    """reports/training.json."""

    tokens: int


Kind = TypeVar("Kind", bound=_Report)


@dataclass(frozen=True)
class Measured:
    """One model's score, and the sums by document that it was made from."""

    name: str
    source: str  # the report's path, for the reader
    score: Score
    totals: Totals


@dataclass(frozen=True)
class Sources:
    """All that a comparison is made from."""

    claims: Claims
    published: Published
    estimate: Estimates
    training: Trained
    curve: list[dict[str, float | None]]
    compact: Measured
    baselines: list[Measured]
    samples: list[dict[str, Any]]  # of our model
    flagged: frozenset[str]  # ids of val documents that are leaked or duplicated


def read_report(path: Path, kind: type[Kind]) -> Kind:
    """Read what we need of another stage's report.

    Raises:
        MissingInput: there is no such report.
        BadData: it lacks something.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadData(f"{path}: {where}: {first['msg']}; delete it and run `dvc repro`") from error


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """Read the loss curve; what was not measured at a step is null there.

    Raises:
        MissingInput: there is no such file.
        BadData: it is no loss curve.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                {key: float(row[key]) if row[key] else None for key in ("step", "train_loss", "val_loss")}
                for row in csv.DictReader(file)
            ]
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro training` to make it") from error
    except (KeyError, ValueError) as error:
        raise BadData(f"{path} is no loss curve ({error}): delete it and run `dvc repro`") from error


def read_sources(inputs: Path, reports: Path, data: Path, names: Iterable[str]) -> Sources:
    """Read everything that a comparison is made from.

    Args:
        inputs: folder of claims.yaml and published.yaml.
        reports: folder of the other stages' reports.
        data: folder of the sums by document.
        names: the baselines that ran.

    Raises:
        MissingInput: one of the files is not there; the message has the command that makes it.
        BadData, BadConfig: one of them is damaged, or they are of different val splits.
    """
    compact = _read_measured(COMPACT, "evaluation", reports, data / "evaluation" / "compact.parquet")
    baselines = [
        _read_measured(name, f"baseline/{name}", reports, data / "baseline" / f"{name}.parquet")
        for name in names
    ]
    for baseline in baselines:
        _check_same_text(compact, baseline)
    return Sources(
        load_section(inputs / "claims.yaml", Claims),
        load_section(inputs / "published.yaml", Published),
        read_report(reports / "estimate.json", Estimates),
        read_report(reports / "training.json", Trained),
        read_curve(reports / "loss.csv"),
        compact,
        baselines,
        _read_optional(reports / "samples.json", _Samples).samples,
        frozenset(flag.id for flag in _read_optional(reports / "inspection.json", _Inspection).flagged),
    )


def _read_optional(path: Path, kind: type[Kind]) -> Kind:
    return read_report(path, kind) if path.exists() else kind()


def _read_measured(name: str, report: str, reports: Path, totals: Path) -> Measured:
    score = read_report(reports / f"{report}.json", Score)
    return Measured(name, f"reports/{report}.json", score, read_totals(totals))


def _check_same_text(compact: Measured, other: Measured) -> None:
    """Refuse to compare scores of different text or of different windows."""
    ours, theirs = compact.score, other.score
    mend = f"run `dvc repro -s evaluation baseline@{other.name}`"
    if ours.validation.sha256 != theirs.validation.sha256:
        raise BadData(
            f"{other.source} and {compact.source} were measured on different val splits (SHA-256 "
            f"{theirs.validation.sha256} and {ours.validation.sha256}) and can't be compared: {mend}"
        )
    if ours.window != theirs.window:
        raise BadData(
            f"{other.source} was measured in windows of {theirs.window} tokens and {compact.source} of "
            f"{ours.window}: they can't be compared; {mend}"
        )
    a, b = compact.totals, other.totals
    if a.ids != b.ids or (a.tokens != b.tokens).any() or (a.bytes != b.bytes).any():
        raise BadData(f"the documents of {other.name} and {compact.name} differ: {mend}")


def compare(sources: Sources, likelihood: Likelihood) -> dict[str, Any]:
    """Judge the claims and lay out the tables: the record, plain JSON.

    Args:
        sources: see `read_sources`.
        likelihood: resamples and seed of the paired bootstrap.

    Raises:
        BadConfig: two values have the same name.
    """
    evidence: dict[str, Evidence] = {}
    for item in gather(sources, likelihood):
        if item.id in evidence:
            raise BadConfig(
                f"two values are called {item.id}: rename the baseline in params.yaml (baseline.names) or "
                "the value in published.yaml"
            )
        evidence[item.id] = item
    judgements = judge(sources.claims.claims, evidence)
    scores = [sources.compact, *sources.baselines]
    published = [name for name in sources.published.models if f"{name}.openwebtext.loss" in evidence]
    return {
        "evidence": [asdict(item) for item in evidence.values()],
        "claims": [_claim_record(*pair) for pair in zip(sources.claims.claims, judgements, strict=True)],
        "tally": [list(pair) for pair in Counter(j.verdict for j in judgements).most_common()],
        "table": [row.model_dump() for row in sources.claims.table],
        "models": {
            "measured": [
                {"name": scored.name, "kind": scored.score.model.kind, "context": scored.score.model.context}
                for scored in scores
            ],
            "published": published,
        },
        "forecast": _forecast_check(evidence),
        "notes": sources.estimate.compact.notes,
        "validation": sources.compact.score.validation.model_dump()
        | {"window": sources.compact.score.window},
        "curve": sources.curve,
        "samples": _samples(sources),
        "flagged": len(sources.flagged & set(sources.compact.totals.ids)),
    }


def measured_values(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's measured values by id, for the tracker."""
    return {item["id"]: item["value"] for item in record["evidence"] if item["known"] == "measured"}


def _claim_record(claim: Claim, judgement: Judgement) -> dict[str, Any]:
    return {
        **claim.model_dump(exclude={"judged"}, mode="json"),
        "verdict": judgement.verdict,
        "by_hand": judgement.by_hand,
        "reason": judgement.reason,
        "decisions": [asdict(decision) for decision in judgement.decisions],
    }


def _forecast_check(evidence: Mapping[str, Evidence]) -> dict[str, Any]:
    """Whether the measured loss fell into the intervals that were written down before the training."""
    measured = evidence[f"{COMPACT}.loss"].value
    inside = {}
    for share in ("80", "95"):
        low, high = evidence[f"{COMPACT}.expected_loss_{share}"].bounds
        inside[f"inside_{share}"] = low <= measured <= high
    return inside


def gather(sources: Sources, likelihood: Likelihood) -> Iterator[Evidence]:
    """Everything that is known, one value at a time, ids unique."""
    yield from _estimated(NOTE, sources.estimate.note)
    yield from _estimated(COMPACT, sources.estimate.compact)
    for name, shape in sources.published.models.items():
        yield from _shape_facts(name, shape)
    yield from _size_ratios(sources)
    yield from _published(sources.published)
    yield from _trained(sources.training)
    corpus = f"{sources.estimate.compact.corpus} val"
    for measured in (sources.compact, *sources.baselines):
        yield from _scored(measured, corpus)
        yield from _asked(measured, corpus)
        yield from _written(measured, corpus)
        yield from _apart(measured, sources.flagged, likelihood, corpus)
    for baseline in sources.baselines:
        yield _paired_ratio(sources.compact, baseline, likelihood, corpus)
        yield from _paired_tasks(sources.compact, baseline)


def _estimated(model: str, forecast: Forecast) -> Iterator[Evidence]:
    """Size, budget and expected loss of one of the two estimated runs."""
    source = "params.yaml, reports/estimate.json"

    def count(quantity: str, value: float, unit: str) -> Evidence:
        return Evidence(f"{model}.{quantity}", value, unit, "computed", model, source, exact=True)

    for convention, number in forecast.parameters.model_dump().items():
        yield count(f"parameters.{convention}", number, "parameters")
    yield count("context", forecast.model.block_size, "tokens")
    yield count("sequences_per_step", forecast.sequences_per_step, "sequences")
    yield count("tokens_per_step", forecast.tokens_per_step, "tokens")
    yield count("tokens", forecast.tokens, "tokens")
    if forecast.epochs is not None:
        yield count("epochs", forecast.epochs, "share")
    yield from _expected(model, forecast.expected_loss, source)


def _expected(model: str, expected: ExpectedLoss, source: str) -> Iterator[Evidence]:
    """The loss expected with each of its intervals, 95 % where the name has none; perplexity likewise."""
    about: dict[str, Any] = {"known": "estimated", "model": model, "source": f"{source}: {expected.basis}"}
    eighty, ninety_five = (expected.low_80, expected.high_80), (expected.low_95, expected.high_95)
    for name, (low, high) in {"": ninety_five, "_95": ninety_five, "_80": eighty}.items():
        yield Evidence(f"{model}.expected_loss{name}", expected.value, NATS, low=low, high=high, **about)
    value, low, high = (perplexity(loss) for loss in (expected.value, *ninety_five))
    yield Evidence(f"{model}.expected_perplexity", value, "perplexity", low=low, high=high, **about)


def _shape_facts(name: str, shape: Model) -> Iterator[Evidence]:
    source = "published.yaml: counted from the architecture"
    for convention, number in asdict(counts(shape)).items():
        yield Evidence(
            f"{name}.parameters.{convention}", number, "parameters", "computed", name, source, exact=True
        )
    yield Evidence(f"{name}.context", shape.block_size, "tokens", "published", name, source, exact=True)


def _size_ratios(sources: Sources) -> Iterator[Evidence]:
    """The note's model against GPT-2 small: parameters, and arithmetic of a token at each one's context."""
    note, gpt2 = sources.estimate.note, sources.published.models["gpt2"]
    sizes = note.parameters.model_dump()
    shares = {f"parameters.{key}": sizes[key] / number for key, number in asdict(counts(gpt2)).items()}
    flops = flops_per_token(gpt2)["with_attention"]
    shares["flops_per_token"] = note.flops_per_token.with_attention / flops
    for quantity, share in shares.items():
        name = f"ratio.note_to_gpt2.{quantity}"
        yield Evidence(name, share, "share", "computed", NOTE, "ratio of the two counts", exact=True)


def _published(published: Published) -> Iterator[Evidence]:
    """Published values, and what follows from a published loss: perplexity and bits per byte."""
    values = {value.id: value for value in published.values}
    bytes_per_token = values["openwebtext.bytes_per_token"].value
    for value in published.values:
        yield Evidence(**value.model_dump())
        if not value.id.endswith(".loss"):
            continue
        stem = value.id.removesuffix(".loss")
        about: dict[str, Any] = {"known": value.known, "model": value.model, "corpus": value.corpus}
        source = f"from {value.id}: {value.source}"
        yield Evidence(
            f"{stem}.perplexity", perplexity(value.value), "perplexity", source=f"exp, {source}", **about
        )
        if stem.endswith(".openwebtext"):
            bits = bits_per_byte(value.value, 1) / bytes_per_token
            spread = f"at {bytes_per_token} bytes per token, {source}"
            yield Evidence(f"{stem}.bits_per_byte", bits, "bits per byte", source=spread, **about)
    gap = math.exp(values["gpt2.openwebtext.loss"].value - values["gpt2-tuned.openwebtext.loss"].value)
    yield Evidence(
        "ratio.gpt2_to_gpt2-tuned.perplexity",
        gap,
        "ratio",
        "published",
        "gpt2",
        "from gpt2.openwebtext.loss and gpt2-tuned.openwebtext.loss",
        "OpenWebText val",
    )


def _trained(report: Trained) -> Iterator[Evidence]:
    """Tokens that our training really saw."""
    source, seen = "reports/training.json", report.tokens
    yield Evidence(f"{COMPACT}.tokens_seen", seen, "tokens", "measured", COMPACT, source, exact=True)


def _scored(measured: Measured, corpus: str) -> Iterator[Evidence]:
    """Loss, perplexity and bits per byte of one measured model, and its size where it has one."""
    name, score = measured.name, measured.score
    units = {"loss": NATS, "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    for quantity, unit in units.items():
        bounds: _Bounds = getattr(score, quantity)
        yield Evidence(
            f"{name}.{quantity}",
            bounds.value,
            unit,
            "measured",
            name,
            measured.source,
            corpus,
            low=bounds.low,
            high=bounds.high,
        )
    if name == COMPACT:  # its size is counted from params.yaml, in all three conventions
        return
    sizes = {"all_tensors": score.model.num_params, "non_embedding": score.model.num_params_non_embedding}
    for convention, size in sizes.items():
        if size is not None:
            quantity = f"{name}.num_params.{convention}"
            yield Evidence(quantity, size, "parameters", "measured", name, measured.source, exact=True)


def _paired_ratio(compact: Measured, baseline: Measured, likelihood: Likelihood, corpus: str) -> Evidence:
    """The compact model's perplexity over a baseline's, document by document."""
    scored = compact.totals.tokens > 0
    ratio: Interval = perplexity_ratio(
        compact.totals.nats[scored],
        baseline.totals.nats[scored],
        compact.totals.tokens[scored].astype(float),
        resamples=likelihood.bootstrap_resamples,
        seed=likelihood.bootstrap_seed,
    )
    return Evidence(
        f"ratio.{COMPACT}_to_{baseline.name}.perplexity",
        ratio.value,
        "ratio",
        "measured",
        COMPACT,
        "paired bootstrap over documents, data/evaluation/compact.parquet and "
        f"data/baseline/{baseline.name}.parquet",
        corpus,
        low=ratio.low,
        high=ratio.high,
    )


def _samples(sources: Sources) -> list[dict[str, Any]]:
    """What every model wrote behind each of the note's prompts, side by side."""
    written = {COMPACT: sources.samples} | {b.name: b.score.text.samples for b in sources.baselines}
    prompts: dict[str, dict[str, Any]] = {}
    for model, samples in written.items():
        for sample in samples:
            if sample["document"] is None:
                ways = {way: one["text"] for way, one in sample.items() if isinstance(one, dict)}
                prompts.setdefault(sample["prompt"], {})[model] = ways
    return [{"prompt": prompt, "models": models} for prompt, models in prompts.items()]


def _interval(name: str, bounds: Interval | _Bounds, unit: str, measured: Measured, corpus: str) -> Evidence:
    return Evidence(
        name,
        bounds.value,
        unit,
        "measured",
        measured.name,
        measured.source,
        corpus,
        low=bounds.low,
        high=bounds.high,
    )


def _asked(measured: Measured, corpus: str) -> Iterator[Evidence]:
    """Word perplexity, the loss in other views and the accuracy of each task of one model."""
    name, score = measured.name, measured.score
    if score.word_perplexity is not None:
        yield _interval(f"{name}.word_perplexity", score.word_perplexity, "perplexity", measured, corpus)
    for view, found in score.views.items():
        about = f"{corpus}, context {found.context}, stride {found.stride}"
        yield _interval(f"{name}.{view}.loss", found.loss, NATS, measured, about)
    for task, answers in score.tasks.items():
        if answers.accuracy is not None:
            about = corpus if task == "cloze" else "LAMBADA"
            yield _interval(f"{name}.{task}.accuracy", answers.accuracy, "share", measured, about)


_TEXT_UNITS = {"zipf": "coefficient", "tokens": "tokens"}


def _written(measured: Measured, corpus: str) -> Iterator[Evidence]:
    """Figures of what a model wrote; of human text once, in our own model's report."""
    for way, figures in measured.score.text.statistics.items():
        if way == "human" and measured.name != COMPACT:
            continue
        for figure, bounds in figures.items():
            if bounds is not None:
                name = f"{measured.name}.text.{way}.{figure}"
                yield _interval(name, bounds, _TEXT_UNITS.get(figure, "share"), measured, corpus)


def _apart(
    measured: Measured, flagged: frozenset[str], likelihood: Likelihood, corpus: str
) -> Iterator[Evidence]:
    """Loss on documents that are flagged as leaked or duplicated, and on the clean ones."""
    totals = measured.totals
    held = {"flagged": [name in flagged for name in totals.ids]}
    held["clean"] = [not one for one in held["flagged"]]
    for part, chosen in held.items():
        rows = [place for place, one in enumerate(chosen) if one and totals.tokens[place] > 0]
        if flagged and rows:
            loss = ratio_bootstrap(
                totals.nats[rows],
                totals.tokens[rows].astype(float),
                resamples=likelihood.bootstrap_resamples,
                seed=likelihood.bootstrap_seed,
            )
            about = f"{corpus}, {len(rows)} {part} documents"
            yield _interval(f"{measured.name}.{part}.loss", loss, NATS, measured, about)


def _paired_tasks(compact: Measured, baseline: Measured) -> Iterator[Evidence]:
    """McNemar's p-value for each task that both were asked, on the same items."""
    for task, ours in compact.score.tasks.items():
        theirs = baseline.score.tasks.get(task)
        if theirs is None or ours.accuracy is None or theirs.items_sha256 != ours.items_sha256:
            continue
        pairs = Counter(zip(ours.hits, theirs.hits, strict=True))
        yield Evidence(
            f"ratio.{COMPACT}_to_{baseline.name}.{task}.p_value",
            mcnemar(pairs["1", "0"], pairs["0", "1"]),
            "probability",
            "measured",
            COMPACT,
            f"exact McNemar test on the items of {compact.source} and {baseline.source}",
        )
