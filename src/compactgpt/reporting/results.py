"""The measured values of finished experiments, in results/<experiment>.json.

The stage `comparison` adds these values to reports/evidence.json.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt import experiments
from compactgpt.common.errors import BadConfig
from compactgpt.common.sections import Name, Section, load_section
from compactgpt.common.storage import read_json, write_json
from compactgpt.config import Params, Sha256, load_params
from compactgpt.evaluation.metrics import perplexity_ratio
from compactgpt.evaluation.totals import read_totals
from compactgpt.forecast.model_size import count_parameters
from compactgpt.forecast.sweep import documents_sha256
from compactgpt.reporting.claims import COMPACT

# Experiments that are sweeps (series of training runs). Their files in results/ have the format `Sweep`.
SWEEPS = ("ladder", "nanogpt-recipe", "seeds", "small-scale")
# Id of a perplexity ratio -> (experiment of the numerator, experiment of the denominator).
PAIRS = {
    "ratio.context_512_to_1024.perplexity": ("note", "context-1024"),
    "ratio.long_to_note.perplexity": ("long", "note"),
    "ratio.gpt2-124m_to_note.perplexity": ("gpt2-124m", "note"),
}
# `record_result` accepts a params.yaml that differs from the experiment in keys with these prefixes.
NOT_COMPARED = (
    "runtime.", "baseline.", "training.launcher.", "training.compile", "training.dtype",
    "training.micro_batch_size", "training.checkpoint_interval", "training.init_", "download.files.",
)  # fmt: skip
# Last part of the id `ratio.<experiment>_to_gpt2.<last part>` -> text metric. The value with this id is the
# metric of the experiment's model divided by the metric of GPT-2.
TEXT_RATIOS = {
    "repetition": "greedy.seq_rep_4",
    "distinct_2": "greedy.distinct_2",
    "length": "greedy.tokens",
    "sampled_repetition": "nucleus.seq_rep_4",
    "sampled_distinct_2": "nucleus.distinct_2",
    "sampled_length": "nucleus.tokens",
}


class Documents(Section):
    """The loss in nats and the number of tokens of each val document, in the order of the val split."""

    ids_sha256: Sha256  # hash of the documents' ids and numbers of tokens
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


class Result(Section):
    """The result of one experiment, in results/<experiment>.json."""

    experiment: Name  # name of a file in conf/experiments, without .yaml
    params: dict[str, Any]  # the sections `model`, `training` and `download.corpus` of params.yaml
    documents: Documents
    evidence: tuple[dict[str, Any], ...]  # measured values; each id contains the experiment's name


def read_results(folder: Path) -> tuple[Result, ...]:
    """Read the results of all experiments from `folder`, sorted by name. Sweeps are left out.

    Raises BadConfig if a file of results is not valid.
    """
    paths = sorted(path for path in folder.glob("*.json") if path.stem not in SWEEPS)
    return tuple(load_section(path, Result) for path in paths)


def record_result(name: str, root: Path = Path(), conf: Path = experiments.CONF) -> Path:
    """Write the measured values in reports/ to results/<name>.json and return the path.

    Raises BadConfig if the experiment is a sweep, if params.yaml differs from the experiment, or if
    reports/evidence.json does not fit params.yaml.
    Raises MissingInput if params.yaml or a result of the pipeline is missing.
    """
    if experiments.find_experiment(name, conf).sweep:
        raise BadConfig(f"{name} is a sweep: `compactgpt experiment run {name}` writes results/{name}.json")
    changes = experiments.apply(name, root / "params.yaml", conf=conf, write=False)
    if other := [line for line in changes if not line.startswith(NOT_COMPARED)]:
        raise BadConfig(
            f"params.yaml differs from the experiment {name}, which sets\n  "
            + "\n  ".join(other)
            + f"\nrun `compactgpt experiment apply {name}` and `dvc repro` first"
        )
    params = load_params(root / "params.yaml")
    record = read_json(root / "reports" / "evidence.json")
    values = {item["id"]: item["value"] for item in record["evidence"]}
    expected = {
        f"{COMPACT}.parameters.all_tensors": count_parameters(params.model).all_tensors,
        f"{COMPACT}.tokens_seen": params.training.max_steps * params.training.tokens_per_step,
    }
    for value_id, number in expected.items():
        if values.get(value_id) != number:
            raise BadConfig(
                f"{value_id} is {values.get(value_id)} in reports/evidence.json, "
                f"but params.yaml gives {number}: run `dvc repro` first"
            )
    totals = read_totals(root / "data" / "evaluation" / "compact.parquet")
    documents = document_sums(totals.ids, totals.nats.tolist(), totals.tokens.tolist())
    path = root / "results" / f"{name}.json"
    write_json(path, make_result(name, record, params, documents).model_dump(mode="json"))
    return path


def document_sums(ids: Sequence[str], nats: Sequence[float], tokens: Sequence[int]) -> Documents:
    """Return the ids, losses and numbers of tokens as `Documents`, with losses rounded to 6 decimals."""
    rounded = tuple(round(n, 6) for n in nats)
    return Documents(ids_sha256=documents_sha256(ids, tokens), nats=rounded, tokens=tuple(tokens))


def make_result(name: str, record: Mapping[str, Any], params: Params, documents: Documents) -> Result:
    """Return the result of the experiment `name`. Its values are the measured values in `record`.

    `record` is the content of reports/evidence.json. Each id in the result contains the experiment's name,
    because values of different experiments need different ids.
    """
    by_id = {item["id"]: item for item in record["evidence"]}
    baselines = [one["name"] for one in record["models"]["measured"] if one["name"] != COMPACT]
    kept = [_rename(item, name, baselines) for item in by_id.values() if item["known"] == "measured"]
    return Result(
        experiment=name,
        params=params.model_dump(
            mode="json", include={"model": True, "training": True, "download": {"corpus"}}
        ),
        documents=documents,
        evidence=(*kept, *_derive(name, kept, record["curve"])),
    )


def _rename(item: Mapping[str, Any], name: str, baselines: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `item`, in which the fields id, report and source contain the experiment's name."""
    first, _, rest = item["id"].partition(".")
    renamed = {"report": f"results/{name}.json", "source": f"experiment {name}: {item['source']}"}
    if first == COMPACT:
        renamed |= {"id": f"{name}.{rest}", "model": name}
    elif first == "ratio":
        renamed |= {"id": f"ratio.{rest.replace(f'{COMPACT}_to_', f'{name}_to_', 1)}", "model": name}
    else:
        # Take the longest matching name: `a.b.loss` belongs to the baseline `a.b`, not to a baseline `a`.
        owner = max((other for other in baselines if item["id"].startswith(f"{other}.")), key=len)
        renamed["id"] = f"{owner}.{name}.{item['id'].removeprefix(f'{owner}.')}"
    return {**item, **renamed}


def _derive(
    name: str, kept: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, float | None]]
) -> Iterator[dict[str, Any]]:
    """Yield an experiment's val loss minus train loss, and its text metrics divided by GPT-2's."""
    by_id = {item["id"]: item for item in kept}
    val_loss, train_loss = curve[-1]["val_loss"], curve[-1]["train_loss"]
    if val_loss is not None and train_loss is not None:
        gap = {"id": f"{name}.generalisation_gap", "value": val_loss - train_loss, "low": None, "high": None}
        source = f"experiment {name}: last row of reports/loss.csv, val minus train"
        yield {**by_id[f"{name}.loss"], **gap, "source": source}
    for quantity, figure in TEXT_RATIOS.items():
        ours, theirs = by_id.get(f"{name}.text.{figure}"), by_id.get(f"gpt2.{name}.text.{figure}")
        if ours and theirs and theirs["low"] > 0:
            yield {
                **ours,
                "id": f"ratio.{name}_to_gpt2.{quantity}",
                "unit": "ratio",
                "value": ours["value"] / theirs["value"],
                # the smallest and the largest ratio that the two intervals allow
                "low": max(ours["low"], 0.0) / theirs["high"],
                "high": ours["high"] / theirs["low"],
                "source": f"{ours['id']} over {theirs['id']}",
            }


def compare_results(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Yield the perplexity ratio of each pair in PAIRS whose experiments scored the same val documents."""
    by_name = {result.experiment: result for result in results}
    for value_id, (ours, theirs) in PAIRS.items():
        one, other = by_name.get(ours), by_name.get(theirs)
        if not one or not other or one.documents.ids_sha256 != other.documents.ids_sha256:
            continue
        tokens = np.array(one.documents.tokens, float)  # (documents,)
        scored = tokens > 0
        a, b = (np.array(result.documents.nats)[scored] for result in (one, other))
        if ratio := perplexity_ratio(a, b, tokens[scored]).as_report():
            loss = next(item for item in one.evidence if item["id"] == f"{ours}.loss")
            source = f"losses in results/{ours}.json and results/{theirs}.json, compared document by document"
            yield {**loss, "id": value_id, "unit": "ratio", "source": source, **ratio}
