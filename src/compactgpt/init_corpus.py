"""Propose values of params.yaml that fit the user's text.

The module reads at most about SAMPLE_BYTES of the text.
"""

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig, BadData, MissingInput, printable
from compactgpt.common.git import require_repository
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import write_text
from compactgpt.config import FILE_KINDS, Download, Params, Validation, load_params, parse_params
from compactgpt.data.documents import MEGABYTE, new_document
from compactgpt.data.text_files import FOLDER, IsIgnored, file_kind, list_files, read_file
from compactgpt.data.validation import document_row
from compactgpt.experiments import DEMO, edit_params, find_experiment, merge_patch, run_dvc, set_values
from compactgpt.forecast.estimate import format_minutes
from compactgpt.speed import describe_slow_baselines, is_busy, measure_speed, training_minutes
from compactgpt.tracking.dvc_files import ignored_files

SAMPLE_BYTES = 16 * MEGABYTE  # maximum bytes of text to read; this takes a few seconds
# Bytes of text per GPT-2 token. Measured: 3.1 to 5.3 for ASCII text;
# 1.3 to 1.7 for Chinese, Thai and Russian.
ASCII_BYTES_PER_TOKEN = 3.5
OTHER_BYTES_PER_TOKEN = 1.5
VAL_DOCUMENTS = 50  # val documents to aim for; a split by hash may give fewer, but rarely fewer than 20
VAL_TOKENS = 30_000  # val tokens to aim for; every model scores them in minutes
MAX_VAL_FRACTION = 0.2
MIN_DOCUMENTS = 10  # train and val together: MAX_VAL_FRACTION of them is 2, which text statistics need
FEW_DOCUMENTS = 100  # with fewer documents, `_choose_cutting` tries to cut files
# Up to 4 epochs, repeated text is nearly as good as new text (arXiv:2305.16264).
MAX_EPOCHS = 4
DEFAULT_MINUTES = 60.0
# Number of tokens to score in all val documents together. `_evaluation` divides this number equally: it sets
# how many of the first tokens of each document are scored, at least one window.
SCORED_TOKENS = 200_000
# The proposed lengths of prompt and continuation must fit into at least this many val documents.
CONTINUED_DOCUMENTS = 8
MAX_REPEATED = 0.1  # a greater share of repeated documents is treated as a mistake in the corpus


@dataclass
class Sample:
    """The documents at the beginning of a corpus."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # result of `document_row` for each document
    tokens: list[float] = field(default_factory=list)  # estimated number of tokens of each document
    bytes: int = 0  # UTF-8 bytes of all documents
    cuts: set[str] = field(default_factory=set)  # kinds of places where files were cut, such as "blank lines"
    scale: float = 1.0  # size of the corpus divided by the size of the sample


@dataclass(frozen=True)
class Plan:
    """The changes that `init-corpus` proposes."""

    found: list[str]  # messages about the text
    additions: list[list[str]]  # arguments of each `dvc add` command
    changes: list[str]  # a line for each value of params.yaml that changes
    content: str  # the new text of params.yaml


def plan_corpus(paths: Sequence[Path], params_file: Path, minutes: float | None = None) -> Plan:
    """Read the files and folders `paths`, and return the proposed changes.

    `minutes` limits the training time; the default is DEFAULT_MINUTES.
    """
    params = _with_limits_of_demo(params_file)
    # `abspath` keeps the path of a symbolic link; `Path.resolve` would return the path of the link's target.
    paths = [Path(os.path.abspath(path.expanduser())) for path in paths]  # noqa: PTH100
    targets, additions = zip(*map(_target, paths), strict=True)
    if len({*targets}) < len(targets):
        raise BadConfig(f"two of the paths would be the same file in {FOLDER}/: rename one of them")
    is_ignored = ignored_files(Path())
    files = [
        each
        for path, target in zip(paths, targets, strict=True)
        for each in _files(path, Path(target).parent, is_ignored)
    ]
    sample, longest = _choose_cutting(files, params.download)
    if len(sample.rows) < MIN_DOCUMENTS:
        raise BadData(
            f"documents: found {len(sample.rows)}, but train and val need {MIN_DOCUMENTS}: add text"
        )
    values, messages = _propose(params, sample, minutes)
    values |= {
        "download.corpus": "files",
        "download.max_documents": None,
        "download.max_bytes": None,
        "download.files.name": None if len(paths) > 1 or paths[0].name == FOLDER else paths[0].stem[:100],
        "download.files.patterns": [
            f"{target}/**" if path.is_dir() else target for path, target in zip(paths, targets, strict=True)
        ],
        "download.files.split_over_characters": longest,
    }
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    change = partial(set_values, settings=settings)
    content, changes = edit_params(params_file, change, f"the proposed {params_file}")
    added = [words for words in additions if words]
    messages += [
        f"init-corpus will copy the text to {FOLDER}/ by running: dvc add {shlex.join(words)}"
        for words in added
    ]
    return Plan(messages, added, changes, content)


def apply_plan(plan: Plan, params_file: Path) -> None:
    """Add the text to corpus/ with `dvc add`, then write params.yaml."""
    if plan.additions:
        require_repository(Path())
    for words in plan.additions:
        run_dvc(["add", "-q", *words])
    write_text(params_file, plan.content)


def _with_limits_of_demo(params_file: Path) -> Params:
    """Return the settings of params.yaml, but take the limits on the text from the experiment `demo`."""
    load_params(params_file)  # raises an error for a mistake in the file; the result is not used
    tree, demo = read_yaml(params_file), find_experiment(DEMO).params
    # Replace the limits in params.yaml, which may fit an earlier corpus.
    limits = {name: demo[name] for name in ("validation", "inspection")}
    limits |= {"download": {"files": demo["download"]["files"]}}
    limits |= {"evaluation": {"text": demo["evaluation"]["text"]}}
    merge_patch(tree, limits)
    return parse_params(tree)


def _target(path: Path) -> tuple[str, list[str]]:
    """Return the path for a copy of the text in corpus/, and the arguments of `dvc add` that make this copy.

    The list of arguments is empty if the text is in corpus/ already.
    """
    if not path.exists():
        raise MissingInput(f"{printable(str(path))} is missing: give a text file, or a folder of text files")
    corpus = Path.cwd() / FOLDER
    if path in corpus.parents:
        raise BadConfig(f"{path} contains the folder {FOLDER}/: give the files or folders of your text")
    is_inside = path.is_relative_to(corpus)
    name = path.relative_to(corpus.parent).as_posix() if is_inside else f"{FOLDER}/{path.name}"
    target = name
    if path.is_file() and file_kind(name) not in FILE_KINDS:  # add .txt: enwik8 becomes enwik8.txt
        target = re.sub(r"(?i)(\.gz|\.zst|)$", r".txt\1", name, count=1)
    if re.search(r"[][*?:\\]", name) or (is_inside and target != name):
        raise BadConfig(
            f"rename {name}: the name must end with {', '.join(FILE_KINDS)} (also with .gz or .zst), and "
            r"must not have any of *?[]:\, which have a meaning in download.files.patterns"
        )
    if is_inside:
        return target, []
    may_replace = Path(f"{target}.dvc").exists()  # then an earlier `dvc add` wrote the target
    if Path(target).exists() and not may_replace:
        raise BadConfig(
            f"{target} exists already: rename your text, or use the existing text: "
            f"`compactgpt init-corpus {target}`"
        )
    return target, [str(path), "-o", target, *(["-f"] if may_replace else [])]


def _files(path: Path, folder: Path, is_ignored: IsIgnored) -> list[tuple[Path, str]]:
    """Return a pair (folder, path in this folder) for each text file. `path` is a text file or a folder.

    `folder` is the folder in corpus/ to which `path` will be copied.
    """
    if path.is_file():
        return [(path.parent, path.name)]
    names = list_files([f"{path.name}/**"], path.parent, lambda name: is_ignored(f"{folder}/{name}"))
    return [(path.parent, name) for _, name in names]


def _choose_cutting(files: Sequence[tuple[Path, str]], download: Download) -> tuple[Sample, int]:
    """Return a sample, and the proposed value of download.files.split_over_characters."""
    sample, settings = read_sample(files, download), download.files
    # If there are few documents, cut the files into more documents, if possible.
    if len(sample.rows) < FEW_DOCUMENTS and settings.split == "auto":
        shorter = settings.model_copy(update={"split_over_characters": settings.split_characters})
        again = read_sample(files, download.model_copy(update={"files": shorter}))
        if len(again.rows) > len(sample.rows):
            return again, settings.split_characters
    return sample, settings.split_over_characters


def read_sample(files: Sequence[tuple[Path, str]], download: Download) -> Sample:
    """Read documents until the sample has `SAMPLE_BYTES` of text."""
    sample, seen = Sample(), set()
    for folder, name in files:
        for text, source, cut in read_file(folder, name, download):
            if sample.bytes >= SAMPLE_BYTES:
                # Estimate `scale` from the sizes of the files. The estimate is too low for compressed files:
                # their text is larger.
                size = sum((folder / name).stat().st_size for folder, name in files)
                sample.scale = max(1.0, size / sample.bytes)
                return sample
            document = new_document(text, source)
            if document.id in seen or not text.strip():
                continue
            seen.add(document.id)
            length, n_ascii = len(text.encode()), sum(map(str.isascii, text))
            sample.rows.append(document_row(document))
            sample.tokens.append(n_ascii / ASCII_BYTES_PER_TOKEN + (length - n_ascii) / OTHER_BYTES_PER_TOKEN)
            sample.bytes += length
            sample.cuts |= {cut} - {""}
    return sample


def _propose(params: Params, sample: Sample, minutes: float | None) -> tuple[dict[str, Any], list[str]]:
    """Return proposed values (dotted key -> value), and messages about the corpus."""
    documents, tokens = round(sample.scale * len(sample.rows)), sample.scale * sum(sample.tokens)
    megabytes = sample.scale * sample.bytes / MEGABYTE
    wanted = max(VAL_DOCUMENTS / documents, VAL_TOKENS / tokens)
    fraction = float(f"{min(MAX_VAL_FRACTION, wanted):.2g}")
    val_documents = fraction * documents
    # Hold out the last documents ("tail") if files were cut: a split by hash would put parts of one file in
    # both splits. Also do so if val is small: a split by hash could put too few documents in val.
    split = "tail" if sample.cuts or val_documents < VAL_DOCUMENTS / 2 else "hash"
    limits = _fitting_limits(sample.rows, params.validation)
    repeated = round(min(MAX_REPEATED, 2 * (1 - limits["min_unique_share"])), 3)
    values = {f"validation.{key}": value for key, value in limits.items()} | {
        # The stage `validation` fails if the corpus later has less than half of its present text.
        "validation.min_documents": documents // 2,
        "validation.min_total_megabytes": round(megabytes / 2, 3),
        "tokenization.val_fraction": fraction,
        "tokenization.split": split,
        "inspection.min_val_documents": max(1, min(20, int(val_documents / 2))),
        "inspection.max_leaked_share": max(params.inspection.max_leaked_share, repeated),
        "inspection.max_repeated_share": max(params.inspection.max_repeated_share, repeated),
    }
    training, time = _training(params, tokens, minutes)
    about, cuts = "about " if sample.scale > 1 else "", "; ".join(sorted(sample.cuts))
    wide = ": few, so intervals will be wide" if val_documents < 20 else ""
    measured = f"about {val_documents:,.0f} documents, about {fraction * tokens:,.0f} tokens{wide}"
    return values | training | _evaluation(params, sample.tokens, val_documents), [
        f"found {about}{documents:,} documents{f', from files split by {cuts}' if cuts else ''}",
        f"{about}{megabytes:,.2f} MB of text, about {tokens:,.0f} tokens",
        f"held out for measurement (val, {split}): {measured}",
        time,
        *describe_slow_baselines(params),
    ]


def _fitting_limits(rows: Sequence[Mapping[str, Any]], params: Validation) -> dict[str, float]:
    """Return limits for the section `validation` that the documents in `rows` satisfy."""
    lengths = sorted(row["n_characters"] for row in rows)
    letters = sorted(row["letter_share"] for row in rows)
    copies = Counter(row["normalised"] for row in rows)
    unique = sum(count == 1 for count in copies.values()) / len(rows)
    spare = int((1 - params.mostly) * len(rows))  # number of rows that may violate a limit
    # `max_replacement_share` is never changed: the user must repair wrongly decoded text.
    return {
        "min_characters": min(params.min_characters, lengths[spare // 2]),
        "max_characters": max(params.max_characters, lengths[-1 - spare // 2]),
        "min_letter_share": min(params.min_letter_share, math.floor(100 * letters[spare]) / 100),
        "min_unique_share": min(params.min_unique_share, math.floor(1000 * unique) / 1000),
    }


def _training(params: Params, tokens: float, minutes: float | None) -> tuple[dict[str, int], str]:
    """Return proposed values of the section `training`, and a message about the training time."""
    busy = is_busy()
    step_minutes = training_minutes(params, measure_speed(params)) / params.training.max_steps
    steps_per_epoch = tokens / params.training.tokens_per_step
    found = min((minutes or DEFAULT_MINUTES) / step_minutes, MAX_EPOCHS * steps_per_epoch)
    steps = max(10, int(float(f"{found:.2g}")))
    time = f"about {format_minutes(steps * step_minutes)} at the speed that was measured just now"
    if busy:
        time += " (other programs were running: for a better estimate, run this on a quiet machine)"
    if found == MAX_EPOCHS * steps_per_epoch:
        time += "; not longer, because with more epochs a model often memorizes a text of this size"
    values = {
        "training.max_steps": steps,
        "training.warmup_steps": max(1, steps // 70),
        "training.eval_interval": max(1, steps // 10),
        "training.checkpoint_interval": max(1, steps // 4),
    }
    return values, f"training alone: {steps:,} steps, {steps / steps_per_epoch:.2g} epochs, {time}"


def _evaluation(params: Params, tokens: Sequence[float], val_documents: float) -> dict[str, int]:
    """Return proposed values of the section `evaluation`; `tokens` has the length of each document."""
    likelihood, text = params.evaluation.likelihood, params.evaluation.text
    # Share of val documents that must be long enough for a prompt and a continuation.
    share = min(1.0, CONTINUED_DOCUMENTS / val_documents)
    # Use a quarter of the document for the prompt and a quarter for the continuation. The other half is a
    # margin, because `tokens` are estimates.
    quarter = int(sorted(tokens)[int((1 - share) * (len(tokens) - 1))] / 4)
    return {
        "evaluation.likelihood.document_tokens": max(likelihood.window, int(SCORED_TOKENS / val_documents)),
        "evaluation.text.prompt_tokens": max(1, min(text.prompt_tokens, quarter)),
        "evaluation.text.max_new_tokens": max(5, min(text.max_new_tokens, quarter)),
    }
