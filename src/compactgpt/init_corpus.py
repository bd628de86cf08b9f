"""Fit params.yaml to the user's own text: read a sample of it, and propose values that the pipeline accepts.

Text outside of the folder corpus/ is brought there with `dvc add`, since DVC watches only that folder. The
sample is the beginning of the text. If the text is longer, counts are extrapolated by the size of the files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig, BadData, MissingInput, printable
from compactgpt.common.git import require_repository
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import write_text
from compactgpt.config import Download, Evaluation, Params, load_params, parse_params
from compactgpt.data.documents import MEGABYTE, new_document
from compactgpt.data.text_files import FOLDER, list_files, read_file
from compactgpt.data.validation import document_row, fitting_limits
from compactgpt.experiments import (
    CONF,
    DEMO,
    dvc_environment,
    edit_params,
    find_experiment,
    merge_patch,
    run_dvc,
)
from compactgpt.forecast.estimate import format_minutes, measure_flops, training_minutes

SAMPLE_BYTES = 16 * MEGABYTE  # of text; read and described in a few seconds
# Bytes of text per GPT-2 token, to count without a tokenizer. Measured: 3.1 on docstrings, 3.3 on tiny
# Shakespeare, 5.3 on simple English; 1.7 on Russian, 1.5 on Thai, 1.3 on Chinese.
ASCII_BYTES_PER_TOKEN = 3.5
OTHER_BYTES_PER_TOKEN = 1.5
VAL_DOCUMENTS = 50  # wanted in val: so that a split by hash hardly ever has fewer than 20
VAL_TOKENS = 30_000  # wanted in val: every model scores them in minutes
MAX_VAL_FRACTION = 0.2
FEW_DOCUMENTS = 100  # with fewer, shorter files are cut, too
# Up to 4 epochs, repeated text is nearly as good as new text (Muennighoff et al. 2023, Scaling
# Data-Constrained Language Models).
MAX_EPOCHS = 4
DEFAULT_MINUTES = 60.0
SCORED_TOKENS = 200_000  # of val; of a longer val only the beginning of each document is scored
SHARES = ("max_leaked_share", "max_repeated_share")
MAX_REPEATED = 0.1  # a greater share of repeated documents is a mistake in the corpus, not its nature


@dataclass(frozen=True)
class Place:
    """A file or folder that the user named: where it is now, and where DVC watches it."""

    root: Path  # the folder to which `pattern` is relative
    pattern: str
    watched: str  # the same files as a value of download.files.patterns
    additions: tuple[tuple[str, ...], ...]  # arguments of the `dvc add` commands that the files need


@dataclass
class Sample:
    """The documents at the beginning of a corpus."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # see `document_row`
    tokens: list[float] = field(default_factory=list)  # estimated tokens of each document
    bytes: int = 0
    copies: int = 0  # documents that were left out, since an earlier one is equal
    ways: set[str] = field(default_factory=set)  # how files were cut into documents: see `splitting.Piece`
    scale: float = 1.0  # size of the corpus relative to the sample


@dataclass(frozen=True)
class Plan:
    """What `init-corpus` proposes."""

    found: list[str]  # messages about the text
    additions: list[tuple[str, ...]]  # arguments of `dvc add`
    changes: list[str]  # of params.yaml, a line for each value
    content: str  # of params.yaml


def plan_corpus(
    paths: Sequence[Path], params_file: Path, *, minutes: float | None = None, steps: int | None = None
) -> Plan:
    """Read the text at `paths`, and return a proposal. Nothing is written.

    Args:
        paths: files or folders, inside or outside of corpus/.
        params_file: params.yaml, in the project's root folder.
        minutes: time for the training; without it an hour, or less for a small corpus.
        steps: number of training steps, instead of a time.

    Raises:
        MissingInput: a path does not exist, or has no text file.
        BadData: a file can't be read as text, or there are fewer than two documents.
        BadConfig: two files would have the same name in corpus/.
    """
    params = _with_limits_of_demo(params_file)
    places = [find_place(path, params_file.absolute().parent) for path in paths]
    watched = [*dict.fromkeys(place.watched for place in places)]
    if len(watched) < len(places):
        raise BadConfig(f"two of the paths would be the same file in {FOLDER}/: rename one of them")
    sample, cutting = choose_cutting(places, params.download)
    if len(sample.rows) < 2:
        raise BadData(f"found {len(sample.rows)} document, but train and val need one each: add text")
    files: dict[str, Any] = {"patterns": watched, "name": None, **cutting}
    if len(paths) == 1 and paths[0].resolve().name != FOLDER:
        files["name"] = paths[0].resolve().name.split(".")[0]
    patch, found = propose(params, sample, minutes, steps)
    patch["download"] = {"corpus": "files", "files": files}
    content, changes = edit_params(params_file, partial(_assign, patch), f"the proposed {params_file}")
    additions = [words for place in places for words in place.additions]
    found += [f"dvc add {' '.join(words)}: DVC watches text only in {FOLDER}/" for words in additions]
    return Plan(found, additions, changes, content)


def _with_limits_of_demo(params_file: Path) -> Params:
    """Return params.yaml with the demo's limits, so that no limit of an earlier corpus stays."""
    load_params(params_file)  # names its mistakes
    tree, demo = read_yaml(params_file), find_experiment(DEMO, params_file.parent / CONF).params
    limits = {key: demo[key] for key in ("validation", "inspection")}
    merge_patch(tree, limits | {"evaluation": {"text": demo["evaluation"]["text"]}})
    return parse_params(tree)


def _assign(patch: dict[str, Any], tree: dict[str, Any]) -> None:
    """Set the values of a patch in a tree. Unlike in `merge_patch`, None is a value, which keeps its line."""
    for key, value in patch.items():
        if isinstance(value, dict):
            _assign(value, tree[key])
        elif tree.get(key) != value:  # an equal value keeps its form, such as 2_000_000
            tree[key] = value


def apply_plan(plan: Plan, params_file: Path) -> None:
    """Bring the text to corpus/ with DVC, then write params.yaml.

    Raises:
        CheckFailed: DVC failed; params.yaml was not changed.
    """
    if plan.additions:
        environment = dvc_environment()
        require_repository(Path())
        for words in plan.additions:
            run_dvc(["add", "-q", *words], environment)
    write_text(params_file, plan.content)


def find_place(path: Path, root: Path) -> Place:
    """Return where the text of a path is, and where it has to be.

    Raises:
        MissingInput: the path does not exist.
        BadConfig: another file has the path's name in corpus/.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise MissingInput(f"{printable(str(path))} is missing: give a text file, or a folder of text files")
    corpus, below = root / FOLDER, "/**" if path.is_dir() else ""
    if path.is_relative_to(corpus):
        name = path.relative_to(root).as_posix()
        entries = [path] if path != corpus else sorted(corpus.iterdir())
        plain = [entry for entry in entries if not _is_known_to_dvc(entry, corpus)]
        additions = tuple((entry.relative_to(root).as_posix(),) for entry in plain)
        return Place(root, name + below, name + below, additions)
    target = f"{FOLDER}/{path.name}"
    is_earlier = (root / f"{target}.dvc").exists()  # from an earlier `dvc add`: replaced by the present text
    if (root / target).exists() and not is_earlier:
        raise BadConfig(f"{target} exists already: rename it, or run `compactgpt init-corpus {target}`")
    words = (str(path), "-o", target, *(["-f"] if is_earlier else []))
    return Place(path.parent, path.name + below, target + below, (words,))


def _is_known_to_dvc(path: Path, corpus: Path) -> bool:
    """Return whether a path needs no `dvc add`: DVC has it or a folder above it, or it is no text."""
    if path.name == "README.md" or path.suffix == ".dvc":
        return True
    known = [path, *path.parents]
    return any(Path(f"{each}.dvc").exists() for each in known if each.is_relative_to(corpus))


# --- reading a sample


def choose_cutting(places: Sequence[Place], download: Download) -> tuple[Sample, dict[str, int]]:
    """Read a sample; return it with the values of download.files that cut the files into documents.

    Short files are not cut, unless that leaves few documents.
    """
    sample, files = read_sample(places, download), download.files
    cutting = {"split_over_characters": files.split_characters}
    if len(sample.rows) < FEW_DOCUMENTS and files.split == "auto":
        shorter = download.model_copy(update={"files": files.model_copy(update=cutting)})
        again = read_sample(places, shorter)
        if len(again.rows) > len(sample.rows):
            return again, cutting
    return sample, {}


def read_sample(places: Sequence[Place], download: Download) -> Sample:
    """Read the beginning of the corpus."""
    names = [(place.root, name) for place in places for _, name in list_files([place.pattern], place.root)]
    sample, seen = Sample(), set()
    for root, name in names:
        for text, source, way in read_file(root, name, download):
            if sample.bytes >= SAMPLE_BYTES:
                # A compressed file holds more text than its size: the scale is then too low.
                size = sum((folder / each).stat().st_size for folder, each in names)
                sample.scale = max(1.0, size / sample.bytes)
                return sample
            document = new_document(text, source)
            if document.id in seen or not text.strip():
                sample.copies += document.id in seen
                continue
            seen.add(document.id)
            length = len(text.encode())
            n_ascii = sum(map(str.isascii, text))
            sample.rows.append(document_row(document))
            sample.tokens.append(n_ascii / ASCII_BYTES_PER_TOKEN + (length - n_ascii) / OTHER_BYTES_PER_TOKEN)
            sample.bytes += length
            if way:
                sample.ways.add(way)
    return sample


# --- the proposal


def propose(
    params: Params, sample: Sample, minutes: float | None, steps: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return values that fit a corpus as a patch of params.yaml, and messages about the corpus."""
    documents, tokens = round(sample.scale * len(sample.rows)), sample.scale * sum(sample.tokens)
    megabytes = sample.scale * sample.bytes / MEGABYTE
    fraction = _two_digits(min(MAX_VAL_FRACTION, max(VAL_DOCUMENTS / documents, VAL_TOKENS / tokens)))
    val_documents, val_tokens = fraction * documents, fraction * tokens
    # The pieces of one file continue each other, and few documents are no fair draw: val is then the end.
    split = "tail" if sample.ways or val_documents < VAL_DOCUMENTS / 2 else "hash"
    limits = fitting_limits(sample.rows, params.validation)
    repeated = min(MAX_REPEATED, 2 * (1 - limits["min_unique_share"]))
    shares = {key: max(getattr(params.inspection, key), round(repeated, 3)) for key in SHARES}
    training, time = _training(params, tokens, minutes, steps)
    patch = {
        # Half of what was found: text that gets lost later is noticed.
        "validation": limits
        | {"min_documents": max(1, documents // 2), "min_total_megabytes": round(megabytes / 2, 3)},
        "tokenization": {"val_fraction": fraction, "split": split},
        "inspection": {"min_val_documents": max(1, min(20, int(val_documents / 2))), **shares},
        "training": training,
        "evaluation": _evaluation(params.evaluation, sample.tokens, val_documents, val_tokens),
    }
    about, ways = "about " if sample.scale > 1 else "", "; ".join(sorted(sample.ways))
    copies = f"; {sample.copies:,} copies are left out" if sample.copies else ""
    wide = ": few, so intervals will be wide" if val_documents < 20 else ""
    return patch, [
        f"found {about}{documents:,} documents{f' by {ways}' if ways else ''}{copies}",
        f"{about}{megabytes:,.2f} MB of text, about {tokens:,.0f} tokens",
        f"val ({split}): about {val_documents:,.0f} documents, about {val_tokens:,.0f} tokens{wide}",
        time,
    ]


def _training(
    params: Params, tokens: float, minutes: float | None, steps: int | None
) -> tuple[dict[str, int], str]:
    """Return steps and intervals, and a message about the time of the training."""
    speed = measure_flops()
    one = params.training.model_copy(update={"max_steps": 1})
    step_minutes = training_minutes(params.model_copy(update={"training": one}), speed)
    epoch = tokens / params.training.tokens_per_step  # steps
    found = steps or (minutes or DEFAULT_MINUTES) / step_minutes
    if not steps and not minutes:
        found = min(found, MAX_EPOCHS * epoch)
    found = max(1, round(found)) if steps else max(10, int(_two_digits(found)))
    values = {
        "max_steps": found,
        "warmup_steps": max(1, found // 70),
        "eval_interval": max(1, found // 10),
        "checkpoint_interval": max(1, found // 4),
    }
    time = format_minutes(found * step_minutes)
    return values, (
        f"training: {found:,} steps, {found / epoch:.2g} epochs, about {time} on this processor (estimated)"
    )


def _evaluation(
    evaluation: Evaluation, tokens: Sequence[float], val_documents: float, val_tokens: float
) -> dict[str, Any]:
    """Return sizes of the evaluation that fit val."""
    scored = None  # all tokens of each document
    if val_tokens > SCORED_TOKENS:
        scored = max(evaluation.likelihood.window, int(SCORED_TOKENS / val_documents))
    # Continuations of documents need some documents of prompt and continuation: a quarter has this length.
    length = int(sorted(tokens)[-1 - len(tokens) // 4])
    text = evaluation.text
    return {
        "likelihood": {"document_tokens": scored},
        "text": {
            "prompt_tokens": max(1, min(text.prompt_tokens, length // 2)),
            "max_new_tokens": max(1, min(text.max_new_tokens, length // 2)),
        },
    }


def _two_digits(number: float) -> float:
    """Return a positive number rounded up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return round(math.ceil(round(number / unit, 6)) * unit, 10)
