"""Reports, claims and published values -> one record, from which every table, picture and page is made.

`gather` turns all that is known into values; `compare` judges the claims with them and returns the record,
plain JSON (reports/evidence.json). The modules of `reporting` see nothing but that record, so no reader can
meet a number that it lacks. Ids: `<model>.<quantity>`, where `note` is the note's model,
`compact` the one trained here; published results on another corpus carry its name, `gpt2.openwebtext.loss`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from compactgpt.common.errors import BadConfig
from compactgpt.config import ExpectedLoss, Likelihood, Model
from compactgpt.evaluation.metrics import (
    Interval,
    bits_per_byte,
    mcnemar,
    perplexity,
    perplexity_ratio,
    ratio_bootstrap,
)
from compactgpt.forecast.model_size import counts, flops_per_token
from compactgpt.reporting.claims import Claim, Evidence, Judgement, Published, judge
from compactgpt.reporting.results import across
from compactgpt.reporting.schemas import COMPACT, Bounds, Forecast, Measured, Sources

NOTE = "note"
NATS = "nats per token"
# Kind and name of the corpora whose reports are about the note: the embedded demo's, and the note's own.
# On any other corpus a report is about the model that was trained there.
NOTE_CORPORA = (("docstrings", "docstrings"), ("hub", "openwebtext"))
_PUBLISHED = "published.yaml"
_ESTIMATE = "reports/estimate.json"


@dataclass(frozen=True)
class Value(Evidence):
    """A value with all that it was made from, as far as it has it."""

    stage: str = "comparison"  # that made it
    report: str = ""  # the file that it was read from
    context: int | None = None  # most tokens that the model could see
    stride: int | None = None  # tokens between the starts of two windows
    tokenizer: str = ""  # the model's own
    data_sha256: str = ""  # of the token file that it is about
    weights_sha256: str = ""
    code_sha256: str = ""  # of the stage's code, see provenance.py


def compare(sources: Sources, likelihood: Likelihood) -> dict[str, Any]:
    """Judge the claims and lay out the tables: the record, plain JSON.

    Args:
        sources: see `readings.read_sources`.
        likelihood: resamples and seed of the paired bootstrap.

    Raises:
        BadConfig: two values have the same name.
    """
    evidence: dict[str, Value] = {}
    for item in gather(sources, likelihood):
        if item.id in evidence:
            raise BadConfig(
                f"two values are called {item.id}: rename the baseline in params.yaml (baseline.names) or "
                "the value in published.yaml"
            )
        code = item.code_sha256 or sources.code[item.stage.partition("@")[0]]
        evidence[item.id] = replace(item, code_sha256=code)
    judgements = judge(sources.claims.claims, evidence)
    validation = sources.compact.score.validation.model_dump()
    return {
        "evidence": [asdict(item) for item in evidence.values()],
        "about_note": (sources.download.corpus, sources.download.name) in NOTE_CORPORA,
        "claims": [_claim_record(*pair) for pair in zip(sources.claims.claims, judgements, strict=True)],
        "tally": [list(pair) for pair in Counter(j.verdict for j in judgements).most_common()],
        "table": [row.model_dump() for row in sources.claims.table],
        "models": _models(sources, evidence),
        "forecast": _forecast_check(evidence),
        "notes": sources.estimate.compact.notes,
        "calibration": [check.model_dump() for check in sources.estimate.calibration.checks],
        "validation": validation | {"window": sources.compact.score.window},
        "curve": sources.curve,
        "positions": _positions(sources),
        "samples": _samples(sources),
        "flagged": len(sources.flagged & set(sources.compact.totals.ids)),
        "data": _data(sources),
        "code": {item.stage: item.code_sha256 for item in evidence.values()},
    }


def _models(sources: Sources, evidence: Mapping[str, Value]) -> dict[str, Any]:
    scores = [sources.compact, *sources.baselines]
    return {
        "measured": [
            {"name": scored.name, "kind": scored.score.model.kind, "context": scored.score.model.context}
            for scored in scores
        ],
        "published": [name for name in sources.published.models if f"{name}.openwebtext.loss" in evidence],
        "shape": sources.estimate.compact.model.model_dump(),
    }


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


def _positions(sources: Sources) -> dict[str, list[dict[str, Any]]]:
    """Loss by place in the window, in nats per token of the model's own, of every model that has it."""
    scores = (sources.compact, *sources.baselines)
    return {
        scored.name: [row.model_dump() for row in scored.score.by_position]
        for scored in scores
        if scored.score.by_position
    }


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


def _data(sources: Sources) -> dict[str, Any]:
    """What the data card says: the corpus, its parts, its splits, and how its inspections went."""
    checks = {
        stage: {"passed": sum(one.success for one in found.expectations), "of": len(found.expectations)}
        for stage, found in sources.inspections.items()
    }
    tokenized = sources.tokenization
    return {
        **sources.download.model_dump(),
        "tokenizer": tokenized.tokenizer.model_dump(),
        "splits": {name: getattr(tokenized, name).model_dump() for name in ("train", "val")},
        "checks": checks,
    }


def gather(sources: Sources, likelihood: Likelihood) -> Iterator[Value]:
    """Everything that is known, one value at a time, ids unique."""
    yield from _estimated(NOTE, sources.estimate.note)
    yield from _estimated(COMPACT, sources.estimate.compact)
    for name, shape in sources.published.models.items():
        yield from _shape_facts(name, shape)
    yield from _size_ratios(sources)
    yield from _published(sources.published)
    yield from _trained(sources)
    corpus = f"{sources.download.name} val"
    for measured in (sources.compact, *sources.baselines):
        made = _made(measured, sources, corpus)
        yield from _scored(measured, made)
        yield from _asked(measured, made)
        yield from _written(measured, made)
        yield from _apart(measured, sources.flagged, likelihood, made)
    ours = _made(sources.compact, sources, corpus)
    for baseline in sources.baselines:
        yield _paired_ratio(sources.compact, baseline, likelihood, ours)
        yield from _paired_tasks(sources.compact, baseline, ours)
    yield from _recorded(sources, likelihood)


def _recorded(sources: Sources, likelihood: Likelihood) -> Iterator[Value]:
    """What earlier experiments measured, as it was kept, and their paired ratios."""
    for result in sources.results:
        yield from (Value(**item) for item in result.evidence)
    resamples, seed = likelihood.bootstrap_resamples, likelihood.bootstrap_seed
    yield from (Value(**item) for item in across(sources.results, resamples, seed))


def _estimated(model: str, forecast: Forecast) -> Iterator[Value]:
    """Size, budget and expected loss of one of the two estimated runs."""
    source = f"params.yaml, {_ESTIMATE}"

    def count(quantity: str, value: float, unit: str) -> Value:
        return Value(
            f"{model}.{quantity}",
            value,
            unit,
            "computed",
            model,
            source,
            exact=True,
            stage="estimate",
            report=_ESTIMATE,
        )

    for convention, number in forecast.parameters.model_dump().items():
        yield count(f"parameters.{convention}", number, "parameters")
    yield count("context", forecast.model.block_size, "tokens")
    yield count("sequences_per_step", forecast.sequences_per_step, "sequences")
    yield count("tokens_per_step", forecast.tokens_per_step, "tokens")
    yield count("tokens", forecast.tokens, "tokens")
    if forecast.epochs is not None:
        yield count("epochs", forecast.epochs, "share")
    yield from _expected(model, forecast.expected_loss, source, forecast.model.block_size)
    yield from _laws(model, forecast)


def _expected(model: str, expected: ExpectedLoss, source: str, context: int) -> Iterator[Value]:
    """The loss expected with each of its intervals, 95 % where the name has none; perplexity likewise."""
    about: dict[str, Any] = {"known": "estimated", "model": model, "source": f"{source}: {expected.basis}"}
    about |= {"stage": "estimate", "report": _ESTIMATE, "context": context, "stride": context}
    eighty, ninety_five = (expected.low_80, expected.high_80), (expected.low_95, expected.high_95)
    for name, (low, high) in {"": ninety_five, "_95": ninety_five, "_80": eighty}.items():
        yield Value(f"{model}.expected_loss{name}", expected.value, NATS, low=low, high=high, **about)
    value, low, high = (perplexity(loss) for loss in (expected.value, *ninety_five))
    yield Value(f"{model}.expected_perplexity", value, "perplexity", low=low, high=high, **about)


def _laws(model: str, forecast: Forecast) -> Iterator[Value]:
    """What each published scaling law says as it stands; where it is worse than guessing, nothing."""
    for name, law in forecast.laws.items():
        if law.better_than_guessing:
            source = f"{_ESTIMATE}: the law {name} as published, not calibrated"
            yield Value(
                f"{model}.law.{name}.loss",
                law.loss,
                NATS,
                "estimated",
                model,
                source,
                stage="estimate",
                report=_ESTIMATE,
            )


def _shape_facts(name: str, shape: Model) -> Iterator[Value]:
    source = f"{_PUBLISHED}: counted from the architecture"
    about: dict[str, Any] = {"model": name, "source": source, "exact": True, "report": _PUBLISHED}
    for convention, number in asdict(counts(shape)).items():
        yield Value(f"{name}.parameters.{convention}", number, "parameters", "computed", **about)
    yield Value(f"{name}.context", shape.block_size, "tokens", "published", **about)


def _size_ratios(sources: Sources) -> Iterator[Value]:
    """The note's model against GPT-2 small: parameters, and arithmetic of a token at each one's context."""
    note, gpt2 = sources.estimate.note, sources.published.models["gpt2"]
    sizes = note.parameters.model_dump()
    shares = {f"parameters.{key}": sizes[key] / number for key, number in asdict(counts(gpt2)).items()}
    flops = flops_per_token(gpt2)["with_attention"]
    shares["flops_per_token"] = note.flops_per_token.with_attention / flops
    for quantity, share in shares.items():
        name, source = f"ratio.note_to_gpt2.{quantity}", "ratio of the two counts"
        yield Value(name, share, "share", "computed", NOTE, source, exact=True, report=_ESTIMATE)


def _published(published: Published) -> Iterator[Value]:
    """Published values, and what follows from a published loss: perplexity and bits per byte."""
    values = {value.id: value for value in published.values}
    bytes_per_token = values["openwebtext.bytes_per_token"].value
    for value in published.values:
        yield Value(**value.model_dump(), report=_PUBLISHED)
        if not value.id.endswith(".loss"):
            continue
        stem = value.id.removesuffix(".loss")
        about = value.model_dump(include={"known", "model", "corpus", "context", "stride", "tokenizer"})
        about["report"] = _PUBLISHED
        source = f"from {value.id}: {value.source}"
        yield Value(
            f"{stem}.perplexity", perplexity(value.value), "perplexity", source=f"exp, {source}", **about
        )
        if stem.endswith(".openwebtext"):
            bits = bits_per_byte(value.value, 1) / bytes_per_token
            spread = f"at {bytes_per_token} bytes per token, {source}"
            yield Value(f"{stem}.bits_per_byte", bits, "bits per byte", source=spread, **about)
    gap = math.exp(values["gpt2.openwebtext.loss"].value - values["gpt2-tuned.openwebtext.loss"].value)
    yield Value(
        "ratio.gpt2_to_gpt2-tuned.perplexity",
        gap,
        "ratio",
        "published",
        "gpt2",
        "from gpt2.openwebtext.loss and gpt2-tuned.openwebtext.loss",
        "OpenWebText val",
        report=_PUBLISHED,
    )


def _trained(sources: Sources) -> Iterator[Value]:
    """Tokens that our training really saw."""
    report, trained = "reports/training.json", sources.training
    yield Value(
        f"{COMPACT}.tokens_seen",
        trained.tokens,
        "tokens",
        "measured",
        COMPACT,
        report,
        f"{sources.download.name} train",
        exact=True,
        stage="training",
        report=report,
        data_sha256=sources.tokenization.train.sha256,
        weights_sha256=sources.weights_sha256,
    )


def _made(measured: Measured, sources: Sources, corpus: str) -> dict[str, Any]:
    """What all values of one model's report have in common."""
    score, ours = measured.score, measured.name == COMPACT
    model = score.model
    return {
        "known": "measured",
        "model": measured.name,
        "source": measured.source,
        "corpus": corpus,
        "stage": "evaluation" if ours else f"baseline@{measured.name}",
        "report": measured.source,
        "tokenizer": sources.tokenization.tokenizer.encoding if ours else model.tokenizer,
        "data_sha256": score.validation.sha256,
        "weights_sha256": sources.weights_sha256 if ours else model.sha256 or model.weights_sha256,
    }


def _interval(name: str, bounds: Interval | Bounds, unit: str, made: Mapping[str, Any]) -> Value:
    return Value(name, bounds.value, unit, low=bounds.low, high=bounds.high, **made)


def _windows(measured: Measured) -> dict[str, int]:
    """Context and stride of the matched windows; a compressor has none, and sees the document before."""
    cut = measured.score.model.kind != "compressor"
    return {"context": measured.score.window, "stride": measured.score.window} if cut else {}


def _scored(measured: Measured, made: Mapping[str, Any]) -> Iterator[Value]:
    """Loss, perplexity and bits per byte of one measured model, and its size where it has one."""
    name, score = measured.name, measured.score
    made = {**made, **_windows(measured)}
    for quantity, unit in {
        "loss": NATS,
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
    }.items():
        yield _interval(f"{name}.{quantity}", getattr(score, quantity), unit, made)
    if name == COMPACT:  # its size is counted from params.yaml, in all three conventions
        return
    sizes = {"all_tensors": score.model.num_params, "non_embedding": score.model.num_params_non_embedding}
    for convention, size in sizes.items():
        if size is not None:
            about = {**made, "corpus": "", "context": None, "stride": None, "data_sha256": ""}
            yield Value(f"{name}.num_params.{convention}", size, "parameters", **about, exact=True)


def _asked(measured: Measured, made: Mapping[str, Any]) -> Iterator[Value]:
    """Word perplexity, the loss in other views and the accuracy of each task of one model."""
    name, score = measured.name, measured.score
    if score.word_perplexity is not None:
        about = {**made, **_windows(measured)}
        yield _interval(f"{name}.word_perplexity", score.word_perplexity, "perplexity", about)
    for view, found in score.views.items():
        about = {**made, "context": found.context, "stride": found.stride}
        yield _interval(f"{name}.{view}.loss", found.loss, NATS, about)
    for task, answers in score.tasks.items():
        if answers.accuracy is not None:
            own = task == "cloze"
            about = {**made, "corpus": made["corpus"] if own else "LAMBADA"}
            about["data_sha256"] = answers.items_sha256
            yield _interval(f"{name}.{task}.accuracy", answers.accuracy, "share", about)
        for protocol in ("no_overlap", "strided", "per_word"):
            if found := getattr(answers, protocol):
                about = {**made, "corpus": "WikiText", "context": found.context, "stride": found.stride}
                quantity = "perplexity" if found.word_perplexity is None else "word_perplexity"
                value, about["data_sha256"] = getattr(found, quantity), answers.sha256
                yield Value(f"{name}.{task}.{protocol}.{quantity}", value, "perplexity", **about)


_TEXT_UNITS = {"zipf": "coefficient", "tokens": "tokens"}


def _written(measured: Measured, made: Mapping[str, Any]) -> Iterator[Value]:
    """Figures of what a model wrote; of human text once, in our own model's report."""
    for way, figures in measured.score.text.statistics.items():
        if way == "human" and measured.name != COMPACT:
            continue
        for figure, bounds in figures.items():
            if bounds is not None:
                name = f"{measured.name}.text.{way}.{figure}"
                yield _interval(name, bounds, _TEXT_UNITS.get(figure, "share"), made)


def _apart(
    measured: Measured, flagged: frozenset[str], likelihood: Likelihood, made: Mapping[str, Any]
) -> Iterator[Value]:
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
            corpus = f"{made['corpus']}, {len(rows)} {part} documents"
            about = {**made, **_windows(measured), "corpus": corpus, "stage": "comparison"}
            about["source"] = f"{_totals_path(measured)}, reports/inspection.json"
            yield _interval(f"{measured.name}.{part}.loss", loss, NATS, about)


def _totals_path(measured: Measured) -> str:
    folder = "evaluation" if measured.name == COMPACT else "baseline"
    return f"data/{folder}/{measured.name}.parquet"


def _paired_ratio(
    compact: Measured, baseline: Measured, likelihood: Likelihood, ours: Mapping[str, Any]
) -> Value:
    """The compact model's perplexity over a baseline's, document by document."""
    scored = compact.totals.tokens > 0
    ratio: Interval = perplexity_ratio(
        compact.totals.nats[scored],
        baseline.totals.nats[scored],
        compact.totals.tokens[scored].astype(float),
        resamples=likelihood.bootstrap_resamples,
        seed=likelihood.bootstrap_seed,
    )
    source = f"paired bootstrap over documents, {_totals_path(compact)} and {_totals_path(baseline)}"
    about = {**ours, **_windows(compact), "stage": "comparison", "source": source}
    return _interval(f"ratio.{COMPACT}_to_{baseline.name}.perplexity", ratio, "ratio", about)


def _paired_tasks(compact: Measured, baseline: Measured, ours: Mapping[str, Any]) -> Iterator[Value]:
    """McNemar's p-value for each task that both were asked, on the same items."""
    for task, answers in compact.score.tasks.items():
        theirs = baseline.score.tasks.get(task)
        if theirs is None or answers.accuracy is None or theirs.items_sha256 != answers.items_sha256:
            continue
        pairs = Counter(zip(answers.hits, theirs.hits, strict=True))
        source = f"exact McNemar test on the items of {compact.source} and {baseline.source}"
        about = {**ours, "corpus": "", "stage": "comparison", "source": source}
        about["data_sha256"] = answers.items_sha256
        yield Value(
            f"ratio.{COMPACT}_to_{baseline.name}.{task}.p_value",
            mcnemar(pairs["1", "0"], pairs["0", "1"]),
            "probability",
            **about,
        )
