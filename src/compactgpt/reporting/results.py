"""What finished experiments measured, kept: results/<experiment>.json, small, in git, written by a command.

params.yaml and reports/ hold one run at a time. `compactgpt experiment record NAME` keeps what the reports
say of an experiment's run under the experiment's name: `compact.loss` of the experiment `note` becomes
`note.loss`, GPT-2 measured beside it `gpt2.note.loss`. The comparison takes these values into its record,
where the note's claims wait for them. Sums by document are kept too, so that two experiments on the same text
can be compared in pairs.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compactgpt.config import ExpectedLoss, Name, Params, Section, Sha256, load_section

FOLDER = Path("results")
COMPACT = "compact"
LADDER = "ladder"  # a sweep: its file is another, see compactgpt.ladder
# id of the ratio of two experiments' perplexities, on the same text
PAIRS = {
    "ratio.context_512_to_1024.perplexity": ("note", "context-1024"),
    "ratio.long_to_note.perplexity": ("long", "note"),
    "ratio.gpt2-124m_to_note.perplexity": ("gpt2-124m", "note"),
}


class Documents(Section):
    """Sums by document of the val split, in its order."""

    ids_sha256: Sha256
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


class Forecast(Section):
    """What was written down before the run, and whether it held."""

    expected_loss: ExpectedLoss
    inside_80: bool
    inside_95: bool


class Result(Section):
    """One file of results/."""

    experiment: Name
    params: dict[str, Any]  # the sections `model` and `training`, and the corpus
    data_sha256: Sha256  # of the val split
    forecast: Forecast
    documents: Documents
    evidence: tuple[dict[str, Any], ...]  # values of the record, under the experiment's name


def read_results(folder: Path) -> tuple[Result, ...]:
    """Read what is kept, by name; nothing where there is no folder.

    Raises:
        BadConfig: one of the files is damaged.
    """
    paths = sorted(path for path in folder.glob("*.json") if path.stem != LADDER)
    return tuple(load_section(path, Result) for path in paths)


def result_of(name: str, record: Mapping[str, Any], params: Params, documents: Documents) -> Result:
    """Rename what a record says of our model and of those beside it.

    Args:
        name: the experiment that the record is of.
        record: reports/evidence.json.
        params: what it was made from.
        documents: our model's sums.
    """
    values = [item for item in record["evidence"] if item["known"] == "measured"]
    others = [one["name"] for one in record["models"]["measured"] if one["name"] != COMPACT]
    kept = [item | _renamed(item, name, others) for item in values]
    expected = {item["id"]: item for item in record["evidence"]}[f"{COMPACT}.expected_loss_95"]
    eighty = {item["id"]: item for item in record["evidence"]}[f"{COMPACT}.expected_loss_80"]
    return Result(
        experiment=name,
        params=params.model_dump(
            mode="json", include={"model": True, "training": True, "download": {"corpus"}}
        ),
        data_sha256=record["validation"]["sha256"],
        forecast=Forecast(
            expected_loss=ExpectedLoss(
                value=expected["value"],
                low_80=eighty["low"],
                high_80=eighty["high"],
                low_95=expected["low"],
                high_95=expected["high"],
                basis=expected["source"],
            ),
            **record["forecast"],
        ),
        documents=documents,
        evidence=(*kept, *_derived(name, kept, record["curve"])),
    )


def _renamed(item: Mapping[str, Any], name: str, others: Sequence[str]) -> dict[str, Any]:
    """The id and model of a value under the experiment's name."""
    first, _, rest = item["id"].partition(".")
    kept = {"report": f"results/{name}.json", "source": f"experiment {name}: {item['source']}"}
    if first == COMPACT:
        return kept | {"id": f"{name}.{rest}", "model": name}
    if first == "ratio":
        return kept | {"id": f"ratio.{rest.replace(f'{COMPACT}_to_', f'{name}_to_', 1)}", "model": name}
    other = next(o for o in sorted(others, key=len, reverse=True) if item["id"].startswith(f"{o}."))
    return kept | {"id": f"{other}.{name}.{item['id'].removeprefix(f'{other}.')}"}


def _derived(
    name: str, kept: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, float | None]]
) -> Iterator[dict[str, Any]]:
    """What claims ask for and no stage reports: the gap of val and train, text beside GPT-2's."""
    by_id = {item["id"]: item for item in kept}
    base = by_id[f"{name}.loss"]
    last = curve[-1]
    if last["val_loss"] is not None and last["train_loss"] is not None:
        yield {
            **base,
            "id": f"{name}.generalisation_gap",
            "value": last["val_loss"] - last["train_loss"],
            "low": None,
            "high": None,
            "source": f"experiment {name}: last row of reports/loss.csv, val less train",
        }
    figures = {"repetition": "seq_rep_4", "distinct_2": "distinct_2", "length": "tokens"}
    for quantity, figure in figures.items():
        ours, theirs = (by_id.get(f"{who}.text.greedy.{figure}") for who in (name, f"gpt2.{name}"))
        if ours and theirs and theirs["low"] > 0:
            yield {
                **ours,
                "id": f"ratio.{name}_to_gpt2.{quantity}",
                "unit": "ratio",
                "value": ours["value"] / theirs["value"],
                "low": max(ours["low"], 0.0) / theirs["high"],  # the two intervals at their worst
                "high": ours["high"] / theirs["low"],
                "source": f"{ours['id']} over {theirs['id']}",
            }


def across(results: Sequence[Result], resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Ratios of the perplexities of two experiments, paired by document."""
    import numpy as np

    from compactgpt.evaluation.metrics import perplexity_ratio

    by_name = {result.experiment: result for result in results}
    for name, (ours, theirs) in PAIRS.items():
        one, other = by_name.get(ours), by_name.get(theirs)
        if not one or not other or one.documents.ids_sha256 != other.documents.ids_sha256:
            continue
        tokens = np.array(one.documents.tokens, float)
        scored = tokens > 0
        a, b = (np.array(result.documents.nats)[scored] for result in (one, other))
        ratio = perplexity_ratio(a, b, tokens[scored], resamples=resamples, seed=seed)
        base = next(item for item in one.evidence if item["id"] == f"{ours}.loss")
        yield {
            **base,
            "id": name,
            "unit": "ratio",
            "value": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "source": f"paired bootstrap over documents, results/{ours}.json and results/{theirs}.json",
        }


def documents_of(ids: Sequence[str], nats: Sequence[float], tokens: Sequence[int]) -> Documents:
    """Sums by document, in the val split's order; nats to a millionth."""
    digest = hashlib.sha256("\n".join([*ids, *map(str, tokens)]).encode()).hexdigest()
    return Documents(ids_sha256=digest, nats=tuple(round(n, 6) for n in nats), tokens=tuple(tokens))
