"""What the comparison and the gate read of other stages' reports, with types, and the reader of all of it.

A report that lacks a field, or that scores other text, is refused with the command that repairs it.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.sections import load_section
from compactgpt.common.storage import read_manifest
from compactgpt.config import ExpectedLoss
from compactgpt.evaluation.likelihood import Totals, read_totals
from compactgpt.reporting.claims import Claims, Published
from compactgpt.reporting.provenance import code_hashes
from compactgpt.reporting.results import Result, read_results

COMPACT = "compact"


class Report(BaseModel):
    """The fields that are read of a report; its other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Bounds(Report):
    """A value and its interval."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class _Model(Report):
    kind: str
    context: str
    num_params: int | None
    num_params_non_embedding: int | None = None
    tokenizer: str = ""
    # the hash of a file or of a folder, whichever the model's kind has
    sha256: str = ""
    weights_sha256: str = ""


class _Split(Report):
    documents: int
    tokens: int
    bytes: int
    sha256: str


class _View(Report):
    context: int
    stride: int
    loss: Bounds
    perplexity: Bounds


class _Position(Report):
    first: int  # positions of the window from `first` to `last`, counted from 1
    last: int
    tokens: int
    loss: Bounds


class _WikiText(Report):
    context: int
    stride: int | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None


class Task(Report):
    """Questions with one right answer each, or WikiText by its protocols."""

    items_sha256: str = ""
    accuracy: Bounds | None = None
    hits: str = ""  # a 1 for each right answer, a 0 for each wrong one
    sha256: str = ""  # of WikiText's file
    no_overlap: _WikiText | None = None
    strided: _WikiText | None = None
    per_word: _WikiText | None = None


class _Written(Report):
    text: str


class _Sample(Report):
    prompt: str
    document: str | None  # id of the document that begins with the prompt, if one does
    greedy: _Written | None = None
    top_k: _Written | None = None
    nucleus: _Written | None = None


class Text(Report):
    """What a model wrote: figures by decoding strategy, and samples. Also reports/samples.json."""

    statistics: dict[str, dict[str, Bounds | None]] = {}
    samples: list[_Sample] = []


class Score(Report):
    """reports/evaluation.json and reports/baseline/<name>.json."""

    model: _Model
    validation: _Split
    window: int
    loss: Bounds
    perplexity: Bounds
    bits_per_byte: Bounds
    word_perplexity: Bounds | None = None
    by_position: list[_Position] = []
    views: dict[str, _View] = {}
    tasks: dict[str, Task] = {}
    text: Text = Text()


class _Flag(Report):
    id: str


class _Expectation(Report):
    success: bool


class Inspection(Report):
    """reports/inspection.json and reports/validation.json, which flags no documents."""

    flagged: list[_Flag] = []
    expectations: list[_Expectation] = []


class _Tokenizer(Report):
    encoding: str
    tokenizer_sha256: str


class Tokenized(Report):
    """reports/tokenization.json."""

    tokenizer: _Tokenizer
    train: _Split
    val: _Split


class _CorpusPart(Report):
    name: str
    version: str | None = None  # a user's file has no version and no licence
    licence: str | None = None
    documents: int | None = None
    bytes: int | None = None


class Downloaded(Report):
    """reports/download.json."""

    corpus: str
    name: str  # of the corpus, for readers
    documents: int
    bytes: int
    left_out: dict[str, int] = {}
    sources: list[_CorpusPart] = []


class Trained(Report):
    """reports/training.json."""

    tokens: int
    train_loss: float
    val_loss: float


class _Sizes(Report):
    all_tensors: int
    nanogpt: int
    non_embedding: int


class _Law(Report):
    loss: float
    better_than_guessing: bool


class _Shape(Report):
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int


class Forecast(Report):
    """One of the two runs of reports/estimate.json."""

    parameters: _Sizes
    model: _Shape
    sequences_per_step: int
    tokens_per_step: int
    tokens: int
    epochs: float | None
    flops_with_attention: int = Field(validation_alias=AliasPath("flops_per_token", "with_attention"))
    laws: dict[str, _Law] = {}
    expected_loss: ExpectedLoss


class _OwnForecast(Forecast):
    notes: list[str]


class _Check(Report):
    name: str  # of a published run
    measured: float
    value: float  # what the rule predicts for this run from the others
    low_80: float
    high_80: float
    low_95: float
    high_95: float


class Estimates(Report):
    """reports/estimate.json."""

    compact: _OwnForecast  # the run of params.yaml
    note: Forecast
    checks: list[_Check] = Field([], validation_alias=AliasPath("calibration", "checks"))


@dataclass(frozen=True)
class Measured:
    """One model's score, and the sums by document that it was made from, each with its path."""

    name: str
    source: str
    score: Score
    totals_path: str
    totals: Totals


@dataclass(frozen=True)
class Sources:
    """Everything that the record is made from."""

    claims: Claims
    published: Published
    estimate: Estimates
    training: Trained
    curve: list[dict[str, float | None]]
    compact: Measured
    baselines: list[Measured]
    samples: list[_Sample]  # of our model
    download: Downloaded
    tokenization: Tokenized
    inspections: dict[str, Inspection]  # of the documents and of the token files, by stage
    weights_sha256: str  # of our model
    code: dict[str, str]  # SHA-256 of each stage's code
    results: tuple[Result, ...]  # of earlier experiments

    @property
    def flagged(self) -> frozenset[str]:
        """Ids of documents of val that are leaked or duplicated."""
        return frozenset(flag.id for flag in self.inspections["inspection"].flagged)


Kind = TypeVar("Kind", bound=Report)


def read_report(path: Path, kind: type[Kind]) -> Kind:
    """Read the fields that we use of another stage's report.

    Raises:
        MissingInput: there is no such report.
        BadData: it lacks a field.
    """
    try:
        return parse_report(path.read_bytes(), str(path), kind)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it") from error


def parse_report(content: bytes, name: str, kind: type[Kind]) -> Kind:
    """Parse the fields that we use of a report.

    Raises:
        BadData: it is not JSON, or it lacks a field; the message has `name`, the path of the report.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise BadData(f"{name}: {field}{first['msg']}; delete it and run `dvc repro`") from error


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """Read the loss curve; a value that was not measured at a step is None.

    Raises:
        MissingInput: there is no such file.
        BadData: it is not a loss curve.
    """
    keys = ("step", "train_loss", "val_loss")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                {key: float(row[key]) if row[key] else None for key in keys} for row in csv.DictReader(file)
            ]
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro training` to make it") from error
    except (KeyError, ValueError) as error:
        raise BadData(f"{path} is not a loss curve ({error}): delete it and run `dvc repro`") from error


def read_sources(root: Path, reports: Path, data: Path, models: Path, names: Iterable[str]) -> Sources:
    """Read everything that the record is made from.

    Args:
        root: folder of claims.yaml, published.yaml, results and the code.
        reports: folder of the other stages' reports.
        data: folder of the sums by document.
        models: folder of our model.
        names: the baselines that ran.

    Raises:
        MissingInput: one of the files is missing; the message has the command that makes it.
        BadData, BadConfig: one of them is damaged, or they are of different val splits.
    """

    def measured(name: str, report: str, totals: str) -> Measured:
        score = read_report(reports / report, Score)
        return Measured(name, f"reports/{report}", score, f"data/{totals}", read_totals(data / totals))

    compact = measured(COMPACT, "evaluation.json", "evaluation/compact.parquet")
    baselines = [measured(name, f"baseline/{name}.json", f"baseline/{name}.parquet") for name in names]
    for baseline in baselines:
        _check_same_text(compact, baseline)
    weights = read_manifest(models / COMPACT)["files"].get("model.safetensors")
    if weights is None:
        raise BadData(f"{models / COMPACT} has no model.safetensors: run `dvc repro training`")
    return Sources(
        load_section(root / "claims.yaml", Claims),
        load_section(root / "published.yaml", Published),
        read_report(reports / "estimate.json", Estimates),
        read_report(reports / "training.json", Trained),
        read_curve(reports / "loss.csv"),
        compact,
        baselines,
        read_report(reports / "samples.json", Text).samples,
        read_report(reports / "download.json", Downloaded),
        read_report(reports / "tokenization.json", Tokenized),
        {name: read_report(reports / f"{name}.json", Inspection) for name in ("validation", "inspection")},
        weights["sha256"],
        code_hashes(root),
        read_results(root / "results"),
    )


def _check_same_text(compact: Measured, other: Measured) -> None:
    """Refuse to compare scores of different text or of different windows."""
    ours, theirs = compact.score, other.score
    a, b = compact.totals, other.totals
    different = []
    if ours.validation.sha256 != theirs.validation.sha256:
        different.append("val splits")
    elif a.ids != b.ids or (a.tokens != b.tokens).any() or (a.bytes != b.bytes).any():
        different.append("documents")
    if ours.window != theirs.window:
        different.append(f"windows ({theirs.window} and {ours.window} tokens)")
    for task in ours.tasks.keys() & theirs.tasks.keys():
        one, two = ours.tasks[task], theirs.tasks[task]
        if one.items_sha256 == two.items_sha256 and len(one.hits) != len(two.hits):
            different.append(f"numbers of items of {task}")
    if different:
        raise BadData(
            f"{other.source} and {compact.source} can't be compared, they have different "
            f"{', '.join(different)}: run `dvc repro -s evaluation baseline@{other.name}`"
        )
