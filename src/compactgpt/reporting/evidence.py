"""Build reports/evidence.json from reports, claims and published values.

Most values have an id of the form `<model>.<quantity>` or `<model>.<corpus>.<quantity>`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from statistics import stdev
from typing import Any

import numpy as np

from compactgpt.common.errors import BadConfig
from compactgpt.config import Model
from compactgpt.evaluation.likelihood import IN_WINDOW
from compactgpt.evaluation.metrics import Interval, bits_per_byte, mcnemar, perplexity, perplexity_ratio
from compactgpt.evaluation.totals import Floats, figures
from compactgpt.forecast.model_size import count_parameters, flops_per_token
from compactgpt.reporting.claims import COMPACT, Evidence, Published, judge_claims
from compactgpt.reporting.results import compare_results
from compactgpt.reporting.schemas import RECIPE, Forecast, Measured, Scores, Sources

NOTE = "note"
NATS = "nats per token"
# (kind, name) of the corpora on which the note's claims are checked. Other corpora are the user's own.
NOTE_CORPORA = (("docstrings", "docstrings"), ("hub", "openwebtext"))
PUBLISHED = "published.yaml"
ESTIMATE = "reports/estimate.json"
SCORE_UNITS = {"loss": NATS, "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
# Id of a ratio -> (numerator, denominator): ids of two perplexities, without the ending `.perplexity`.
PUBLISHED_RATIOS = {
    "ratio.gpt2_to_gpt2-tuned.perplexity": ("gpt2.openwebtext", "gpt2-tuned.openwebtext"),
    "ratio.nanogpt-124m_to_gpt2.perplexity": ("nanogpt-124m.openwebtext", "gpt2.openwebtext"),
    "ratio.gpt2_openwebtext_to_webtext.perplexity": ("gpt2.openwebtext", "gpt2.webtext_figure"),
}
# Text metric -> its unit. All other text metrics have the unit `share`.
TEXT_UNITS = {"zipf": "coefficient", "tokens": "tokens"}


def build_record(sources: Sources) -> dict[str, Any]:
    """Judge the claims and return the content of reports/evidence.json.

    Raises BadConfig if two values have the same id.
    """
    evidence: dict[str, Evidence] = {}
    for item in _collect_evidence(sources):
        if item.id in evidence:
            raise BadConfig(
                f"two values are called {item.id}: rename the baseline in params.yaml (baseline.names) or "
                "the value in published.yaml"
            )
        code = item.code_sha256 or sources.code[item.stage]
        evidence[item.id] = replace(item, code_sha256=code)
    claims = _judged_claims(sources, evidence)
    scores, estimate = [sources.compact, *sources.baselines], sources.estimate
    validation, window = sources.compact.score.validation, sources.compact.score.window
    loss = evidence[f"{COMPACT}.loss"].value
    expected = {share: evidence[f"{COMPACT}.expected_loss_{share}"].bounds for share in ("80", "95")}
    return {
        "evidence": [asdict(item) for item in evidence.values()],
        "about_note": (sources.download.corpus, sources.download.name) in NOTE_CORPORA,
        "claims": claims,
        "tally": [list(pair) for pair in Counter(claim["verdict"] for claim in claims).most_common()],
        "table": [row.model_dump() for row in sources.claims.table],
        "models": {
            "measured": [row for one in scores for row in _table_rows(one)],
            "published": [n for n in sources.published.models if f"{n}.openwebtext.loss" in evidence],
            "shape": estimate.compact.model.model_dump(include={"n_layer", "n_head", "n_embd"}),
        },
        "forecast": {f"inside_{share}": low <= loss <= high for share, (low, high) in expected.items()},
        "notes": estimate.notes,
        "calibration": estimate.calibration.model_dump(),
        "diverged": sources.training.diverged,
        "validation": validation.model_dump() | {"window": window},
        "curve": sources.curve,
        # model -> loss for each range of token positions in a window, see `_Position`
        "positions": {
            one.name: [row.model_dump() for row in one.score.by_position]
            for one in scores
            if one.score.by_position
        },
        "samples": _align_samples(sources),
        "flagged": len(sources.flagged & set(sources.compact.totals.ids)),
        "data": _describe_data(sources),
    }


def _judged_claims(sources: Sources, evidence: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    claims = sources.claims.claims
    return [
        claim.model_dump(exclude={"judged"}, mode="json")
        | asdict(judgement)
        | {"small_scale": [one for one in sources.directions if one["claim"] == claim.id]}
        for claim, judgement in zip(claims, judge_claims(claims, evidence), strict=True)
    ]


def _table_rows(measured: Measured) -> list[dict[str, Any]]:
    """Return a model's rows in the table of measured models: one row for each size of windows."""
    name, model = measured.name, measured.score.model
    about = {"name": name, "label": model.label or name, "scores": name, "context": model.context}
    if model.context != IN_WINDOW:
        return [about | {"view": "document"}]  # a model that has no windows, such as a compressor
    if ".own" in _nats_by_view(measured):
        # In the row `matched`, the window size is the same for all neural models. In the row `own`, windows
        # are as long as this model's own context.
        own = {"view": "own", "scores": f"{name}.own", "tokens": measured.score.views["own"].context}
        return [about | {"view": "matched"}, about | own]
    # If the views `matched` and `own` have the same losses, the model gets one row, with the view `both`.
    return [about | {"view": "both" if "own" in measured.totals.views else "matched"}]


def _align_samples(sources: Sources) -> list[dict[str, Any]]:
    """Return the texts that each model generated after each prompt of params.yaml."""
    by_model = {COMPACT: sources.samples} | {b.name: b.score.text.samples for b in sources.baselines}
    prompts: dict[str, dict[str, Any]] = {}
    for model, samples in by_model.items():
        for sample in samples:
            if sample.document is None:  # the prompt is from params.yaml, not from a val document
                continuations = {"greedy": sample.greedy, "top_k": sample.top_k, "nucleus": sample.nucleus}
                texts = {way: text for way, text in continuations.items() if text is not None}
                prompts.setdefault(sample.prompt, {})[model] = texts
    return [{"prompt": prompt, "models": models} for prompt, models in prompts.items()]


def _describe_data(sources: Sources) -> dict[str, Any]:
    tokenized = sources.tokenization.model_dump()
    return {
        **sources.download.model_dump(),
        "tokenizer": tokenized["tokenizer"],
        "split": tokenized["split"],
        "splits": {split: tokenized[split] for split in ("train", "val")},
        "checks": {
            stage: {"passed": sum(one.success for one in found.expectations), "of": len(found.expectations)}
            for stage, found in sources.inspections.items()
        },
    }


def _collect_evidence(sources: Sources) -> Iterator[Evidence]:
    note = sources.estimate.note
    yield from _estimated(NOTE, note)
    by_hand = sources.estimate.hand_set_loss
    by = "estimate.note.hand_set_loss, the forecast of a person who knew the loss of a similar training run"
    source = f"params.yaml, {by}: {by_hand.basis}"
    yield Evidence(
        f"{NOTE}.hand_set_loss", by_hand.value, NATS, "estimated", NOTE, source, "OpenWebText val",
        by_hand.low_95, by_hand.high_95, stage="estimate", report=ESTIMATE,
    )  # fmt: skip
    yield from _estimated(COMPACT, sources.estimate.compact)
    for name, shape in sources.published.models.items():
        yield from _counted(name, shape)
    yield from _size_ratios(note, sources.published.models["gpt2"])
    yield from _published(sources.published)
    yield from _trained(sources)
    for measured in (sources.compact, *sources.baselines):
        yield from _likelihood(measured, sources)
        yield from _task_scores(measured, sources)
        yield from _flagged_and_clean(measured, sources)
    for baseline in sources.baselines:
        yield from _perplexity_ratios(baseline, sources)
        yield from _task_p_values(baseline, sources)
    for result in sources.results:
        yield from (Evidence(**item) for item in result.evidence)
    yield from (Evidence(**item) for item in compare_results(sources.results))


# --- estimated, counted and published values


def _estimated(model: str, forecast: Forecast) -> Iterator[Evidence]:
    """Yield the size, training tokens and expected loss of `model`, from reports/estimate.json."""
    source = f"params.yaml, {ESTIMATE}"
    about: dict[str, Any] = {"model": model, "stage": "estimate", "report": ESTIMATE}
    sizes = asdict(forecast.parameters).items()
    found = {f"parameters.{convention}": (n, "parameters") for convention, n in sizes}
    found["context"] = (forecast.model.block_size, "tokens")
    found["sequences_per_step"] = (forecast.sequences_per_step, "sequences")
    found["tokens_per_step"] = (forecast.tokens_per_step, "tokens")
    found["tokens"] = (forecast.tokens, "tokens")
    if forecast.epochs is not None:
        found["epochs"] = (forecast.epochs, "share")
    for quantity, (value, unit) in found.items():
        yield Evidence(f"{model}.{quantity}", value, unit, "computed", source=source, exact=True, **about)
    expected, context = forecast.expected_loss, forecast.model.block_size
    by_rule = about | {
        "known": "estimated", "source": f"{ESTIMATE}, the fixed rule: {expected.basis}",
        "corpus": "OpenWebText val" if model == NOTE else "", "context": context, "stride": context,
    }  # fmt: skip
    bounds_95 = (expected.low_95, expected.high_95)
    intervals = {"": bounds_95, "_95": bounds_95, "_80": (expected.low_80, expected.high_80)}
    for suffix, (low, high) in intervals.items():
        yield Evidence(f"{model}.expected_loss{suffix}", expected.value, NATS, low=low, high=high, **by_rule)
    bounds = Interval(expected.value, *bounds_95).map(perplexity)
    yield _interval(f"{model}.expected_perplexity", bounds, "perplexity", by_rule)
    for law, found_by_law in forecast.laws.items():
        if found_by_law.better_than_guessing:
            name = f"{model}.law.{law}.loss"
            source = f"{ESTIMATE}: the scaling law {law}, with its published constants"
            yield Evidence(name, found_by_law.loss, NATS, "estimated", source=source, **about)


def _counted(name: str, shape: Model) -> Iterator[Evidence]:
    """Yield the parameter counts and the context size of the published model `name`."""
    source = f"{PUBLISHED}: counted from the architecture"
    about: dict[str, Any] = {"model": name, "source": source, "exact": True, "report": PUBLISHED}
    for convention, number in asdict(count_parameters(shape)).items():
        yield Evidence(f"{name}.parameters.{convention}", number, "parameters", "computed", **about)
    yield Evidence(f"{name}.context", shape.block_size, "tokens", "published", **about)


def _size_ratios(note: Forecast, gpt2: Model) -> Iterator[Evidence]:
    """Yield parameters and FLOPs per token of the model that the note describes, divided by GPT-2 small's."""
    sizes = asdict(note.parameters)
    counts = asdict(count_parameters(gpt2))
    ratios = {f"parameters.{convention}": sizes[convention] / n for convention, n in counts.items()}
    ratios["flops_per_token"] = note.flops_with_attention / flops_per_token(gpt2)["with_attention"]
    for quantity, ratio in ratios.items():
        name, source = (
            f"ratio.note_to_gpt2.{quantity}",
            "number for the note's model divided by the number for GPT-2 small",
        )
        yield Evidence(name, ratio, "share", "computed", NOTE, source, exact=True, report=ESTIMATE)


def _published(published: Published) -> Iterator[Evidence]:
    """Yield the values in published.yaml, and perplexities, bits per byte and ratios derived from them."""
    found = {value.id: replace(value, report=PUBLISHED) for value in published.values}
    yield from found.values()
    bytes_per_token = found["openwebtext.bytes_per_token"].value
    for loss in [item for item in found.values() if item.id.endswith(".loss")]:
        item = _from_loss(loss, "perplexity", "exp, ", perplexity)
        found[item.id] = item
        yield item
        if loss.id.endswith(".openwebtext.loss"):
            source = f"at {bytes_per_token} bytes per token, "
            yield _from_loss(loss, "bits_per_byte", source, lambda n: bits_per_byte(n, 1) / bytes_per_token)
    for name, (ours, theirs) in PUBLISHED_RATIOS.items():
        one, other = found[f"{ours}.perplexity"], found[f"{theirs}.perplexity"]
        (low, high), (other_low, other_high) = one.bounds, other.bounds
        yield Evidence(
            name, one.value / other.value, "ratio", "derived", one.model, f"{one.id} over {other.id}",
            one.corpus, low / other_high, high / other_low, report=PUBLISHED,
        )  # fmt: skip


def _from_loss(loss: Evidence, quantity: str, source: str, convert: Callable[[float], float]) -> Evidence:
    """Convert a published loss and its limits to perplexity or bits per byte.

    `convert` must be an increasing function: a decreasing one would exchange the limits `low` and `high`.
    """
    limits = {"low": loss.low, "high": loss.high}
    ends: dict[str, Any] = {end: convert(limit) for end, limit in limits.items() if limit is not None}
    return replace(
        loss, id=f"{loss.id.removesuffix('loss')}{quantity}", value=convert(loss.value),
        unit=SCORE_UNITS[quantity], source=f"{source}from {loss.id}: {loss.source}",
        known="derived" if loss.known == "published" else loss.known, **ends,
    )  # fmt: skip


# --- measured values


def _nats_by_view(measured: Measured) -> dict[str, Floats]:
    """Return the model's loss on each val document in nats, (documents,), one or two times.

    Key "": in the windows that all neural models share (a model without windows has only this key).
    Key ".own": in windows as long as the model's own context. It is left out if the losses are the same.
    """
    nats, own = measured.totals.nats, measured.totals.views.get("own")
    return {"": nats} if own is None or np.array_equal(own, nats) else {"": nats, ".own": own}


def _windows(measured: Measured, view: str) -> dict[str, int]:
    """Return the fields `context` and `stride` of `Evidence` for a view of `_nats_by_view`.

    Returns {} if the model has no windows.
    """
    if view == "" and measured.score.model.kind in ("compressor", "ngram"):
        return {}
    size = measured.score.views["own"].context if view == ".own" else measured.score.window
    return {"context": size, "stride": size}


def _common(measured: Measured, sources: Sources) -> dict[str, Any]:
    """Return the fields of `Evidence` that are the same for all values from one model's report."""
    model, ours, is_recipe = measured.score.model, measured.name == COMPACT, measured.name == RECIPE
    return {
        "known": "measured",
        "model": measured.name,
        "source": measured.source,
        "corpus": f"{sources.download.name} val",
        "stage": "evaluation" if ours else "comparison" if is_recipe else f"baseline@{measured.name}",
        "report": measured.source,
        "tokenizer": sources.tokenization.tokenizer.encoding if ours or is_recipe else model.tokenizer,
        "data_sha256": measured.score.validation.sha256,
        "weights_sha256": sources.weights_sha256 if ours else model.sha256 or model.weights_sha256,
    }


def _trained(sources: Sources) -> Iterator[Evidence]:
    """Yield the compact model's number of training tokens and its train loss.

    Also yield the standard deviation of the val loss between training runs with different seeds.
    """
    about: dict[str, Any] = {
        "known": "measured", "model": COMPACT, "corpus": f"{sources.download.name} train",
        "stage": "training", "report": "reports/training.json",
        "data_sha256": sources.tokenization.train.sha256, "weights_sha256": sources.weights_sha256,
    }  # fmt: skip
    name, source = f"{COMPACT}.tokens_seen", "reports/training.json"
    yield Evidence(name, sources.training.tokens, "tokens", source=source, exact=True, **about)
    source = (
        "reports/training.json: mean loss of the steps between the last two rows of reports/loss.csv; if "
        "training.head is sampled, this loss is an estimate from a part of the vocabulary"
    )
    yield Evidence(f"{COMPACT}.train_loss", sources.training.train_loss, NATS, source=source, **about)
    if losses := sources.seed_losses:
        report, text = "results/seeds.json", f"{sources.download.name} val"
        source = f"{report}: standard deviation of {len(losses)} runs that differ only in their seed"
        yield Evidence(
            f"{COMPACT}.seed_deviation", stdev(losses), NATS, "measured", COMPACT, source, text,
            report=report, data_sha256=sources.compact.score.validation.sha256,
        )  # fmt: skip


def _interval(name: str, bounds: Interval, unit: str, about: Mapping[str, Any]) -> Evidence:
    return Evidence(name, bounds.value, unit, low=bounds.low, high=bounds.high, **about)


def _scores(stem: str, found: Scores, about: Mapping[str, Any]) -> Iterator[Evidence]:
    """Yield the loss, the perplexity and the bits per byte, with ids that begin with `stem`.

    Leaves out a perplexity too large for a float. `about` has the fields that `_interval` does not set.
    """
    for quantity, unit in SCORE_UNITS.items():
        if bounds := getattr(found, quantity):
            yield _interval(f"{stem}.{quantity}", bounds, unit, about)


def _likelihood(measured: Measured, sources: Sources) -> Iterator[Evidence]:
    """Yield a model's scores in each view (a way to cut documents into windows).

    For a baseline, also yield the numbers of parameters.
    """
    name, score = measured.name, measured.score
    about = _common(measured, sources)
    on_windows = about | _windows(measured, "")
    yield from _scores(name, score, on_windows)
    counts = {"all_tensors": score.model.num_params, "non_embedding": score.model.num_params_non_embedding}
    for convention, size in counts.items():
        if size is not None and name != COMPACT:  # `_estimated` yields the compact model's counts
            without_data = about | {"corpus": "", "data_sha256": "", "exact": True}
            yield Evidence(f"{name}.num_params.{convention}", size, "parameters", **without_data)
    if score.word_perplexity is not None:
        yield _interval(f"{name}.word_perplexity", score.word_perplexity, "perplexity", on_windows)
    for view, found in score.views.items():
        windows = {"context": found.context, "stride": found.stride}
        yield from _scores(f"{name}.{view}", found, about | windows)


def _task_scores(measured: Measured, sources: Sources) -> Iterator[Evidence]:
    """Yield a model's task scores and the metrics of its generated text."""
    name, about = measured.name, _common(measured, sources)
    for task, answers in measured.score.tasks.items():
        if answers.accuracy is not None:
            corpus = about["corpus"] if task == "cloze" else "LAMBADA"
            items = {"corpus": corpus, "data_sha256": answers.items_sha256}
            yield _interval(f"{name}.{task}.accuracy", answers.accuracy, "share", about | items)
        for protocol in ("no_overlap", "strided", "per_word"):
            if result := getattr(answers, protocol):
                quantity = "perplexity" if result.word_perplexity is None else "word_perplexity"
                value_id, value = f"{name}.{task}.{protocol}.{quantity}", getattr(result, quantity)
                text = {"corpus": "WikiText", "data_sha256": answers.sha256}
                text |= {"context": result.context, "stride": result.stride}
                yield Evidence(value_id, value, "perplexity", **about | text)
    for way, statistics in measured.score.text.statistics.items():
        for figure, bounds in statistics.items():
            # Read the metrics of human text from one report only: they are the same in each model's report.
            if bounds is not None and (way != "human" or name == COMPACT):
                yield _interval(f"{name}.text.{way}.{figure}", bounds, TEXT_UNITS.get(figure, "share"), about)


def _flagged_and_clean(measured: Measured, sources: Sources) -> Iterator[Evidence]:
    """Yield a model's scores on the flagged (leaked or duplicated) val documents, and on the other ones."""
    totals = measured.totals
    flagged = np.isin(totals.ids, list(sources.flagged))
    for subset, chosen in {"flagged": flagged, "clean": ~flagged}.items():
        documents = int((chosen & (totals.tokens > 0)).sum())
        if not documents:
            continue
        for view, nats in _nats_by_view(measured).items():
            scores = figures(nats, totals, chosen)
            about = _common(measured, sources) | _windows(measured, view) | {"stage": "comparison"}
            about["corpus"] = f"{about['corpus']}, {documents} {subset} documents"
            about["source"] = f"{measured.totals_path}, reports/inspection.json"
            for quantity, unit in SCORE_UNITS.items():
                if bounds := scores[quantity]:
                    yield Evidence(f"{measured.name}{view}.{subset}.{quantity}", unit=unit, **bounds, **about)


def _perplexity_ratios(baseline: Measured, sources: Sources) -> Iterator[Evidence]:
    """Yield the compact model's perplexity divided by the baseline's, for each window size of the baseline.

    The interval of this ratio is calculated from the two models' difference in loss on each document.
    """
    compact = sources.compact
    ours = compact.totals
    scored = ours.tokens > 0
    for view, theirs in _nats_by_view(baseline).items():
        nats, tokens = _nats_by_view(compact).get(view, ours.nats), ours.tokens[scored].astype(float)
        ratio = perplexity_ratio(nats[scored], theirs[scored], tokens)
        source = f"losses in {compact.totals_path} and {baseline.totals_path}, compared document by document"
        about = _common(compact, sources) | _windows(compact, view) | {"stage": "comparison"}
        about["source"] = source
        if ratio.as_report():  # None if the ratio or its upper limit is infinite
            yield _interval(f"ratio.{COMPACT}_to_{baseline.name}{view}.perplexity", ratio, "ratio", about)


def _task_p_values(baseline: Measured, sources: Sources) -> Iterator[Evidence]:
    """Yield McNemar's p-value for each task in which both models answered the same questions.

    Null hypothesis: both models have the same accuracy.
    """
    compact = sources.compact
    about = _common(compact, sources) | {"corpus": "", "stage": "comparison"}
    about["source"] = f"exact McNemar test on the questions of {compact.source} and {baseline.source}"
    for task, ours in compact.score.tasks.items():
        theirs = baseline.score.tasks.get(task)
        if theirs is None or ours.accuracy is None or theirs.items_sha256 != ours.items_sha256:
            continue
        pairs = Counter(zip(ours.hits, theirs.hits, strict=True))
        p_value = mcnemar(pairs["1", "0"], pairs["0", "1"])
        name = f"ratio.{COMPACT}_to_{baseline.name}.{task}.p_value"
        yield Evidence(name, p_value, "probability", **about | {"data_sha256": ours.items_sha256})
