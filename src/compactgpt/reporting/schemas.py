"""Schemas and readers of the reports that `comparison` and `compactgpt gate` read."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.sections import load_section
from compactgpt.common.storage import json_bytes, read_manifest
from compactgpt.config import ExpectedLoss, Model, Params
from compactgpt.evaluation.likelihood import IN_WINDOW
from compactgpt.evaluation.metrics import Interval
from compactgpt.evaluation.totals import Totals, figures, read_totals
from compactgpt.forecast.model_size import ParameterCounts
from compactgpt.forecast.sweep import Sweep, documents_sha256, read_sweep, recipe
from compactgpt.reporting.claims import COMPACT, Claims, Published
from compactgpt.reporting.provenance import code_hashes
from compactgpt.reporting.results import Result, read_results
from compactgpt.reporting.small_scale import find_directions

# Name of the experiment that trains the model of `demo` on the same tokens, but with nanoGPT's recipe.
RECIPE = "nanogpt-recipe"
RECIPE_LABEL = "nanoGPT's recipe (AdamW, full softmax, cosine), on as many tokens as the demo; an earlier run"


class Report(BaseModel):
    """Base class of the schemas of reports."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class _Model(Report):
    kind: str  # kind of a baseline in params.yaml, such as `ngram`
    label: str = ""  # the model's name in tables
    context: str  # which text the model sees before it predicts a token, such as `the 4 tokens before`
    num_params: int | None
    num_params_non_embedding: int | None = None
    tokenizer: str = ""
    # Hash of the weights: `sha256` if the model has one weights file, `weights_sha256` if it has several.
    sha256: str = ""
    weights_sha256: str = ""


class _Split(Report):
    documents: int
    tokens: int
    bytes: int
    sha256: str


class Scores(Report):
    """A model's loss, perplexity and bits per byte on the val split."""

    loss: Interval
    perplexity: Interval | None  # None: too large for a float
    bits_per_byte: Interval


class ViewScore(Scores):
    """A model's scores in windows of its maximum context.

    There are two views: windows of the view `strided` overlap, windows of the view `own` do not.
    """

    context: int  # tokens in a window
    stride: int  # tokens between the starts of two neighbouring windows


class _Position(Report):
    last: int  # last token position of this range; a window has the ranges 1, 2, 3 to 4, 5 to 8, and so on
    loss: Interval  # mean over the tokens in this range, in nats per token of the model's tokenizer


class _WikiText(Report):
    context: int
    stride: int | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None


class Task(Report):
    """Results of one task: the accuracy on its questions, or the perplexities on WikiText."""

    items_sha256: str = ""  # hash of the questions
    accuracy: Interval | None = None
    hits: str = ""  # one digit for each question: "1" for a right answer, "0" for a wrong answer
    sha256: str = ""  # hash of the WikiText file
    no_overlap: _WikiText | None = None
    strided: _WikiText | None = None
    per_word: _WikiText | None = None


class _Sample(Report):
    """A prompt, and the text that the model generated with each decoding strategy."""

    prompt: str
    document: str | None  # id of the val document that begins with the prompt; None: prompt of params.yaml
    greedy: str | None = Field(None, validation_alias=AliasPath("greedy", "text"))
    top_k: str | None = Field(None, validation_alias=AliasPath("top_k", "text"))
    nucleus: str | None = Field(None, validation_alias=AliasPath("nucleus", "text"))


class Text(Report):
    """Schema of reports/samples.json and of `text` in a model's report: generated text and its metrics."""

    statistics: dict[str, dict[str, Interval | None]] = {}  # decoding strategy or `human` -> metric -> value
    samples: list[_Sample] = []


class Score(Scores):
    """Schema of reports/evaluation.json and reports/baseline/<name>.json."""

    model: _Model
    validation: _Split
    window: int  # tokens in a window, the same number for all neural models
    word_perplexity: Interval | None = None
    by_position: list[_Position] = []
    views: dict[str, ViewScore] = {}  # `own` or `strided` -> scores, see `ViewScore`
    tasks: dict[str, Task] = {}  # name of the task -> results
    text: Text = Text()


class _Flag(Report):
    id: str


class _Expectation(Report):
    success: bool


class Inspection(Report):
    """Schema of reports/inspection.json and reports/validation.json. Only the first has `flagged`."""

    flagged: list[_Flag] = []
    expectations: list[_Expectation] = []


class _Tokenizer(Report):
    encoding: str
    tokenizer_sha256: str


class Tokenized(Report):
    """Schema of reports/tokenization.json."""

    tokenizer: _Tokenizer
    split: Literal["hash", "tail"] = "hash"  # how val was chosen; a report without it means `hash`
    train: _Split
    val: _Split


class _CorpusPart(Report):
    name: str
    version: str | None = None  # version or commit; None for a user's own file
    licence: str | None = None  # None for a user's own file
    documents: int | None = None
    bytes: int | None = None


class Downloaded(Report):
    """Schema of reports/download.json."""

    corpus: str
    name: str  # name of the corpus in tables
    documents: int
    bytes: int
    left_out: dict[str, int] = {}  # reason -> number of documents that the download left out
    sources: list[_CorpusPart] = []


class Trained(Report):
    """Schema of reports/training.json."""

    tokens: int
    train_loss: float
    val_loss: float
    diverged: bool = False


class _Law(Report):
    loss: float
    better_than_guessing: bool


class Forecast(Report):
    """Size, training tokens and expected loss of a model, in reports/estimate.json."""

    parameters: ParameterCounts
    model: Model
    sequences_per_step: int
    tokens_per_step: int
    tokens: int
    epochs: float | None
    flops_with_attention: int = Field(validation_alias=AliasPath("flops_per_token", "with_attention"))
    laws: dict[str, _Law] = {}
    expected_loss: ExpectedLoss


class _Check(Report):
    name: str  # name of a reference run (a finished training run), see `Anchor`
    measured: float  # loss of this run
    # Limits of the 80 % and 95 % intervals that the rule `expect_loss` predicts from other reference runs.
    low_80: float
    high_80: float
    low_95: float
    high_95: float


class Calibration(Report):
    """How often the predicted interval contained the measured loss of a reference run."""

    of: int  # number of reference runs
    held_95: int  # number of reference runs whose loss is inside the predicted 95 % interval
    checks: list[_Check]


class Estimates(Report):
    """Schema of reports/estimate.json."""

    compact: Forecast  # forecast for the model and the training settings of params.yaml
    notes: list[str] = Field(validation_alias=AliasPath("compact", "notes"))  # warnings about `compact`
    note: Forecast  # forecast for the model of the note *Performance de NanoGPT Compact contre GPT-2*
    # The loss that a person expected for the note's model, from params.yaml. The program's own forecast is
    # `note.expected_loss`.
    hand_set_loss: ExpectedLoss = Field(validation_alias=AliasPath("note", "hand_set_loss"))
    calibration: Calibration


@dataclass(frozen=True)
class Measured:
    """One model's scores and its losses on each val document."""

    name: str
    source: str  # path of the file that contains the scores
    score: Score
    totals_path: str  # path of the file that contains the losses on each val document
    totals: Totals


@dataclass(frozen=True)
class Sources:
    """All inputs of reports/evidence.json."""

    claims: Claims
    published: Published
    estimate: Estimates
    training: Trained
    curve: list[dict[str, float | None]]  # rows of reports/loss.csv, see `read_curve`
    compact: Measured
    baselines: list[Measured]
    samples: list[_Sample]  # the compact model's samples
    download: Downloaded
    tokenization: Tokenized
    inspections: dict[str, Inspection]  # stage (`validation`, `inspection`) -> report of the stage
    flagged: frozenset[str]  # ids of the val documents that `inspection` flagged as leaked or duplicated
    weights_sha256: str  # hash of the compact model's weights
    code: dict[str, str]  # stage -> SHA-256 of the stage's code, see `code_hashes`
    results: tuple[Result, ...]  # experiments in results/, except sweeps (series of training runs)
    seed_losses: tuple[float, ...]  # val losses of training runs that differ from `compact` only in the seed
    directions: list[dict[str, Any]]  # result of `find_directions`: whether small runs agree with the claims


Kind = TypeVar("Kind", bound=Report)


def read_report(path: Path, kind: type[Kind]) -> Kind:
    """Read the report of a stage. `kind` is the schema of this report.

    Raises MissingInput if the report is missing, BadData if the report does not fit the schema.
    """
    try:
        return parse_report(path.read_bytes(), str(path), kind)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` in the repository folder") from error


def parse_report(content: bytes, name: str, kind: type[Kind]) -> Kind:
    """Parse the bytes of a report. `name` is the report's name in error messages.

    Raises BadData if the bytes do not fit the schema `kind`.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise BadData(f"{name}: {field}{first['msg']}; delete {name} and run `dvc repro`") from error


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """Return the rows of reports/loss.csv. A loss that was not measured at a row's step is None.

    Raises MissingInput if the file is missing, BadData if the file is not a loss curve.
    """
    keys = ("step", "train_loss", "val_loss")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{key: float(row[key]) if row[key] else None for key in keys} for row in rows]
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro training` in the repository folder") from error
    except (KeyError, ValueError) as error:
        raise BadData(f"{path} is not a loss curve ({error}): delete it and run `dvc repro`") from error


def read_sources(root: Path, reports: Path, data: Path, models: Path, params: Params) -> Sources:
    """Read all inputs of reports/evidence.json.

    Raises MissingInput, BadConfig or BadData if an input is missing, not valid or damaged.
    """
    compact, *baselines = _read_scores(reports, data, params.baseline.names)
    if recipe_run := _read_sweep(root, RECIPE, compact):
        baselines.insert(0, _as_measured(recipe_run, compact))
    seeds = _read_sweep(root, "seeds", compact)
    weights = read_manifest(models / COMPACT)["files"].get("model.safetensors")
    if weights is None:
        raise BadData(f"{models / COMPACT} has no model.safetensors: run `dvc repro training`")
    stages = ("validation", "inspection")
    inspections = {stage: read_report(reports / f"{stage}.json", Inspection) for stage in stages}
    return Sources(
        claims=load_section(root / "claims.yaml", Claims),
        published=load_section(root / "published.yaml", Published),
        estimate=read_report(reports / "estimate.json", Estimates),
        training=read_report(reports / "training.json", Trained),
        curve=read_curve(reports / "loss.csv"),
        compact=compact,
        baselines=baselines,
        samples=read_report(reports / "samples.json", Text).samples,
        download=read_report(reports / "download.json", Downloaded),
        tokenization=read_report(reports / "tokenization.json", Tokenized),
        inspections=inspections,
        flagged=frozenset(flag.id for flag in inspections["inspection"].flagged),
        weights_sha256=weights["sha256"],
        code=code_hashes(root),
        results=read_results(root / "results"),
        seed_losses=tuple(r.loss for r in seeds.runs) if seeds and seeds.settings == recipe(params) else (),
        directions=find_directions(root),
    )


def _read_scores(reports: Path, data: Path, names: Iterable[str]) -> list[Measured]:
    files = {COMPACT: ("evaluation.json", "evaluation/compact.parquet")}
    files |= {name: (f"baseline/{name}.json", f"baseline/{name}.parquet") for name in names}
    found = []
    for name, (report, totals) in files.items():
        score, losses = read_report(reports / report, Score), read_totals(data / totals)
        found.append(Measured(name, f"reports/{report}", score, f"data/{totals}", losses))
        _check_same_text(found[0], found[-1])
    return found


def _read_sweep(root: Path, name: str, compact: Measured) -> Sweep | None:
    """Read results/<name>.json, a sweep (a series of training runs).

    Returns None if the file is missing, or if its runs were scored on other val documents than `compact`.
    """
    found, totals = read_sweep(root / "results" / f"{name}.json"), compact.totals
    if found is None or not found.runs or found.documents is None:
        return None
    is_same = found.documents.ids_sha256 == documents_sha256(totals.ids, totals.tokens.tolist())
    return found if is_same else None


def _as_measured(sweep: Sweep, compact: Measured) -> Measured:
    """Convert the first training run of a sweep to `Measured`, so that tables show this run as a baseline."""
    run = sweep.runs[0]
    totals = replace(compact.totals, nats=np.array(run.nats), views={}, own_tokens=None)
    report = {
        "model": {
            "kind": "recipe",
            "label": RECIPE_LABEL,
            "context": IN_WINDOW,
            "num_params": run.num_params,
        },
        "validation": compact.score.validation.model_dump(),
        "window": compact.score.window,
        **figures(totals.nats, totals),
    }
    path = f"results/{RECIPE}.json"
    return Measured(RECIPE, path, parse_report(json_bytes(report), path, Score), path, totals)


def _check_same_text(compact: Measured, other: Measured) -> None:
    """Raise BadData if two models differ in their val documents, window size or number of task questions."""
    ours, theirs, a, b = compact.score, other.score, compact.totals, other.totals
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
            different.append(f"numbers of questions in the task {task}")
    if different:
        raise BadData(
            f"{other.source} and {compact.source} can't be compared, because they have different "
            f"{', '.join(different)}: run `dvc repro -s evaluation baseline@{other.name}`"
        )
