"""Other stages' reports, read strictly: only what the comparison needs of each, with its types.

A report that lacks something, or scores of different text, are refused here with the command that mends it.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import MANIFEST, read_json
from compactgpt.config import ExpectedLoss, load_section
from compactgpt.evaluation.generation import WAYS
from compactgpt.evaluation.likelihood import Totals, read_totals
from compactgpt.reporting.claims import Claims, Published
from compactgpt.reporting.provenance import code_hashes
from compactgpt.reporting.results import Result, read_results

COMPACT = "compact"


class _Report(BaseModel):
    """What is read of another stage's report; the rest of it is no concern of ours."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class _ScoredModel(_Report):
    name: str
    kind: str
    context: str
    num_params: int | None
    num_params_non_embedding: int | None = None
    tokenizer: str = ""
    # whichever its kind has: a file's hash, a folder's, a commit of the hub
    sha256: str = ""
    weights_sha256: str = ""
    revision: str = ""


class _Validation(_Report):
    sha256: str
    documents: int
    tokens: int
    bytes: int


class Bounds(_Report):
    """A value and its interval."""

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
    loss: Bounds


class _Position(_Report):
    """Loss at some places of the window, counted from 1."""

    first: int
    last: int
    tokens: int
    loss: Bounds


class _Protocol(_Report):
    """WikiText by one of its protocols."""

    context: int
    stride: int | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None


class _Task(_Report):
    """Questions with one right answer each, or WikiText by its protocols."""

    items_sha256: str = ""
    accuracy: Bounds | None = None
    hits: str = ""
    sha256: str = ""  # of WikiText's file
    no_overlap: _Protocol | None = None
    strided: _Protocol | None = None
    per_word: _Protocol | None = None


def _whole_sample(sample: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(sample.get("prompt"), str) or "document" not in sample:
        raise ValueError("a sample lacks its prompt or its document")
    ways = {way: one for way, one in sample.items() if isinstance(one, dict)}
    if unknown := sorted(ways.keys() - set(WAYS)):
        raise ValueError(f"a sample was written in an unknown way, {unknown[0]!r}")
    if not all(isinstance(one.get("text"), str) for one in ways.values()):
        raise ValueError("a sample lacks its text")
    return sample


Sample = Annotated[dict[str, Any], AfterValidator(_whole_sample)]


class _Text(_Report):
    """What a model wrote: figures by way, and the samples where they stand beside them."""

    statistics: dict[str, dict[str, Bounds | None]] = {}
    samples: list[Sample] = []


class _Samples(_Report):
    """reports/samples.json."""

    samples: list[Sample] = []


class _Flag(_Report):
    id: str


class _Expectation(_Report):
    success: bool


class Inspection(_Report):
    """reports/inspection.json, and of reports/validation.json what is the same there."""

    flagged: list[_Flag] = []
    expectations: list[_Expectation] = []


class _Split(_Report):
    documents: int
    tokens: int
    bytes: int
    sha256: str


class _Tokenizer(_Report):
    encoding: str
    tokenizer_sha256: str


class Tokenized(_Report):
    """reports/tokenization.json."""

    tokenizer: _Tokenizer
    train: _Split
    val: _Split


class _CorpusPart(_Report):
    name: str
    version: str | None = None  # files have none
    licence: str | None = None
    documents: int | None = None
    bytes: int | None = None


class Downloaded(_Report):
    """reports/download.json."""

    corpus: str
    name: str  # of the corpus, for readers
    documents: int
    bytes: int
    left_out: dict[str, int] = {}
    sources: list[_CorpusPart] = []


class _File(_Report):
    sha256: str


class _Manifest(_Report):
    files: dict[str, _File]


class Score(_Report):
    """reports/evaluation.json and reports/baseline/<name>.json."""

    model: _ScoredModel
    validation: _Validation
    window: int
    loss: Bounds
    perplexity: Bounds
    bits_per_byte: Bounds
    word_perplexity: Bounds | None = None
    by_position: list[_Position] = []
    views: dict[str, _View] = {}
    tasks: dict[str, _Task] = {}
    text: _Text = _Text()


class _Sizes(_Report):
    all_tensors: int
    nanogpt: int
    non_embedding: int


class _Flops(_Report):
    with_attention: int


class _Law(_Report):
    loss: float
    better_than_guessing: bool


class _Shape(_Report):
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int


class Forecast(_Report):
    """One of the two runs of reports/estimate.json."""

    parameters: _Sizes
    model: _Shape
    sequences_per_step: int
    tokens_per_step: int
    tokens: int
    epochs: float | None
    flops_per_token: _Flops
    laws: dict[str, _Law] = {}
    expected_loss: ExpectedLoss


class OwnForecast(Forecast):
    """The run of params.yaml."""

    corpus: str
    notes: list[str]


class _Check(_Report):
    """A run that somebody measured, and what the rule says of it from the others."""

    name: str
    measured: float
    value: float
    low_80: float
    high_80: float
    low_95: float
    high_95: float


class _Calibration(_Report):
    checks: list[_Check] = []


class Estimates(_Report):
    """reports/estimate.json."""

    compact: OwnForecast
    note: Forecast
    calibration: _Calibration = _Calibration()


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


def read_sources(root: Path, reports: Path, data: Path, models: Path, names: Iterable[str]) -> Sources:
    """Read everything that a comparison is made from.

    Args:
        root: folder of claims.yaml, published.yaml, results and the code.
        reports: folder of the other stages' reports.
        data: folder of the sums by document.
        models: folder of our model.
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
        load_section(root / "claims.yaml", Claims),
        load_section(root / "published.yaml", Published),
        read_report(reports / "estimate.json", Estimates),
        read_report(reports / "training.json", Trained),
        read_curve(reports / "loss.csv"),
        compact,
        baselines,
        read_report(reports / "samples.json", _Samples).samples,
        read_report(reports / "download.json", Downloaded),
        read_report(reports / "tokenization.json", Tokenized),
        {name: read_report(reports / f"{name}.json", Inspection) for name in ("validation", "inspection")},
        read_report(models / COMPACT / MANIFEST, _Manifest).files["model.safetensors"].sha256,
        code_hashes(root),
        read_results(root / "results"),
    )


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
    for task in ours.tasks.keys() & theirs.tasks.keys():
        asked, there = ours.tasks[task], theirs.tasks[task]
        if asked.items_sha256 == there.items_sha256 and len(asked.hits) != len(there.hits):
            raise BadData(f"{other.source} and {compact.source} answer {task} in different numbers: {mend}")
