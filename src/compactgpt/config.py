"""params.yaml -> frozen, strict, typed objects.

The file is read with DVC's own YAML reader and checked once, before any work: an unknown key, a wrong
type or an impossible value is refused with the key's path, what was found and what is allowed. Below
the door only these objects travel. Units and meanings stand beside the numbers, in params.yaml.
"""

import copy
import difflib
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compactgpt.common.errors import BadConfig, MissingInput, printable
from compactgpt.common.git import conflict_in

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A name becomes part of paths, of DVC's stage names and of MLflow's runs: nothing of it means anything there.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # DVC reads a dot as a step into a map
NAME_RULE = "a name has letters, digits, '_' and '-' only, at most 64, and begins with a letter or digit"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
# A wheel of the package index, pinned: `name==version`.
Wheel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+$")]
# A glob inside the repository.
FilePattern = Annotated[str, Field(pattern=r"^[^/\\:][^\\:]*\.(txt|md|jsonl|parquet)(\.gz|\.zst)?$")]
# A repository of the Hugging Face hub, and a commit of it.
Repository = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Section(BaseModel):
    """One section of params.yaml: immutable, with no key but the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Checked = TypeVar("Checked", bound=Section)
_MOST_VALUES = 1_000_000  # of a file, counted as often as they are referred to


# What `training.init_from` says of a model that starts from drawn weights.
SCRATCH = "scratch"


class Runtime(Section):
    """What the process runs on."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    num_threads: Positive
    num_workers: Positive
    log_interval: Positive = 10
    sample_interval: Count = 0
    sample_prompt: str = ""


class Lengths(Section):
    """Bounds of one document's length."""

    min_characters: Count
    max_characters: Positive

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters ({self.max_characters}) must be at least "
                f"min_characters ({self.min_characters})"
            )
        return self


class Docstrings(Lengths):
    """The embedded corpus: docstrings of installed distributions, by name and version."""

    distributions: Annotated[dict[Name, str], Field(min_length=1)]
    exclude: tuple[str, ...]


class Files(Section):
    """The user's own text, by globs relative to the repository, and its name in the reports."""

    name: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    patterns: Annotated[tuple[FilePattern, ...], Field(min_length=1)]
    text_column: Annotated[str, Field(min_length=1)]
    max_decompressed_megabytes: Positive
    max_decompression_ratio: Positive
    min_free_disk_megabytes: Count


class HubSet(Section):
    """One data set of the Hugging Face hub, pinned by commit or hash, and how its rows become documents."""

    repo: Repository
    config: str | None
    splits: Annotated[tuple[Name, ...], Field(min_length=1)]
    text_column: Annotated[str, Field(min_length=1)]
    revision: Commit | Literal["refs/convert/parquet"] | None
    licence: str
    sha256: Sha256 | None = None
    opens_document: str | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.opens_document is not None and self.separator is not None:
            raise ValueError("opens_document joins rows and separator cuts them: one of the two at most")
        if str(self.revision).startswith("refs/") and self.sha256 is None:
            raise ValueError("revision is a branch, which moves: give the sha256 of the text, or a commit")
        try:
            re.compile(self.opens_document or "")
        except re.error as error:
            raise ValueError(f"opens_document is no regular expression ({error})") from error
        return self


class HubCorpus(Section):
    """A data set of the Hugging Face hub, or a local copy of its repository."""

    name: Name
    mirror: str | None
    sets: dict[Name, HubSet]

    @model_validator(mode="after")
    def _specified(self) -> Self:
        if self.name not in self.sets:
            raise ValueError(f"name {self.name!r} has no entry in sets; it has {sorted(self.sets)}")
        return self


class Tokenizer(Section):
    """A tiktoken encoding, and the wheel that carries GPT-2's files."""

    encoding: str
    wheel: Wheel
    wheel_folder: str
    vocab_bpe_sha256: Sha256
    encoder_json_sha256: Sha256


class Download(Section):
    """Where the corpus and the tokenizer come from."""

    corpus: Literal["docstrings", "files", "hub"]
    max_documents: Positive | None
    max_bytes: Positive | None
    shard_megabytes: Positive
    max_document_megabytes: Annotated[int, Field(gt=0, le=1000)]
    max_row_megabytes: Annotated[int, Field(gt=0, le=1000)]
    docstrings: Docstrings
    files: Files
    hub: HubCorpus
    tokenizer: Tokenizer


class Validation(Lengths):
    """Bounds of the Great Expectations suite."""

    min_documents: Positive
    min_total_megabytes: NonNegative
    min_letter_share: Share
    max_replacement_share: Share
    min_unique_share: Share
    mostly: Share
    max_rows: Positive


class Tokenization(Section):
    """How documents become token files."""

    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    encoder: Literal["gigatoken", "tiktoken"] = "gigatoken"
    engine: Literal["local", "ray"] = "local"


class Inspection(Section):
    """What token files must be like, and how much text may repeat itself, above all between splits."""

    min_val_documents: Positive
    max_val_deviation: PositiveFloat
    shingle_words: Positive
    permutations: Positive
    bands: Positive
    seed: Count
    similarity: Annotated[float, Field(gt=0, le=1)]
    overlap_words: Positive
    flagged_overlap: Share
    leaked_overlap: Annotated[float, Field(gt=0, le=1)]
    max_leaked_share: Share
    max_repeated_share: Share
    max_listed: Count

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.permutations % self.bands:
            raise ValueError(f"permutations ({self.permutations}) must be a multiple of bands ({self.bands})")
        return self


class Model(Section):
    """The shape of a GPT (nanoGPT's GPTConfig, with the padded vocabulary named apart)."""

    block_size: Positive
    n_layer: Positive
    n_head: Positive
    n_embd: Positive
    vocab_size: Positive
    padded_vocab_size: Positive
    bias: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    gelu: Literal["erf", "tanh"] = "erf"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size ({self.padded_vocab_size}) must be at least "
                f"vocab_size ({self.vocab_size})"
            )
        if self.vocab_size > 2**32:
            raise ValueError(f"vocab_size ({self.vocab_size}) must fit uint32 token ids")
        return self


class Launcher(Section):
    """How many processes train one model together on this machine, and how they share the work."""

    processes: Positive = 1
    mode: Literal["fast", "fsdp"] = "fast"
    max_restarts: Count = 3
    timeout_seconds: Positive = 600


class Training(Section):
    """Budget, optimizer, schedule and arithmetic of one training run."""

    seed: Count
    init_from: Annotated[str, Field(min_length=1)] = SCRATCH
    init_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    dtype: Literal["float32", "tfloat32", "bfloat16"] = "float32"
    compile: bool = False
    max_steps: Positive
    tokens_per_step: Positive
    micro_batch_size: Positive
    optimizer: Literal["adamw", "muon"]
    learning_rate: PositiveFloat
    embedding_learning_rate: PositiveFloat
    muon_learning_rate: PositiveFloat
    min_lr_ratio: Share
    schedule: Literal["cosine", "linear", "wsd", "constant"]
    warmup_steps: Count
    decay_share: Share
    weight_decay: NonNegative
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    grad_clip: NonNegative
    eval_interval: Positive
    eval_windows: Positive
    checkpoint_interval: Positive
    head: Literal["full", "sampled"] = "full"
    sample_tokens: Positive = 4096
    sample_power: Share = 0.75
    init_unigram: NonNegative = 0.0
    init_positions: NonNegative = 0.0
    position_learning_rate: PositiveFloat | None = None
    launcher: Launcher = Launcher()

    @model_validator(mode="after")
    def _possible_head(self) -> Self:
        if self.head == "sampled" and self.dtype == "bfloat16":
            raise ValueError("head (sampled) needs dtype float32 or tfloat32: for bfloat16 set head to full")
        if self.head == "sampled" and self.launcher.mode == "fsdp":
            raise ValueError("head (sampled) needs launcher.mode fast: for fsdp set head to full")
        if (self.init_unigram or self.init_positions) and self.init_from != SCRATCH:
            raise ValueError(f"init_unigram and init_positions must be 0.0 unless init_from is {SCRATCH}")
        return self

    @model_validator(mode="after")
    def _begun(self) -> Self:
        if (self.init_from == SCRATCH) != (not self.init_sha256):
            raise ValueError(
                f"init_sha256 ({self.init_sha256 or 'empty'}) must be the hash of the folder init_from "
                f"({self.init_from}), and empty for {SCRATCH}; 64 zeros make the stage tell it"
            )
        return self


View = Literal["own", "strided"]


class Likelihood(Section):
    """How every model is measured on the val split: what a baseline's figures depend on."""

    window: Positive
    batch_size: Positive
    own_context: Positive
    stride_share: Annotated[float, Field(gt=0, le=1)]
    bootstrap_resamples: Positive
    bootstrap_seed: Count


class Source(Section):
    """A file of other people's text: a local path, or a data set of the Hugging Face hub; always by hash."""

    path: str | None = None
    repo: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    file: str | None = None
    sha256: Sha256

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        hub = [self.repo, self.revision, self.file]
        if (self.path is None) == (None in hub) or (self.path is not None and any(hub)):
            raise ValueError("give either path, or repo with revision and file")
        return self


class Tasks(Section):
    """Questions with one right answer, asked of every neural model."""

    cloze_items: Count
    cloze_characters: Positive
    lambada: Source | None = None
    lambada_original: Source | None = None
    wikitext: dict[Name, Source]
    wikitext_context: Positive
    wikitext_stride: Positive


class Text(Section):
    """Text that every neural model writes."""

    prompts: tuple[str, ...]
    documents: Annotated[int, Field(ge=2)]
    prompt_tokens: Positive
    max_new_tokens: Annotated[int, Field(ge=5)]
    temperature: PositiveFloat
    top_k: Positive
    top_p: Annotated[float, Field(gt=0, le=1)]
    batch_size: Positive
    seed: Count


class Evaluation(Section):
    """How models are measured; `views` are the additional ones of our own model."""

    likelihood: Likelihood
    views: tuple[View, ...]
    tasks: Tasks
    text: Text


class Unigram(Section):
    """Token frequencies of the training split: the floor that any training must leave behind."""

    kind: Literal["unigram"]


class Compressor(Section):
    """A general-purpose compressor."""

    kind: Literal["compressor"]
    codec: Literal["xz", "zstd"]
    level: Positive
    train_megabytes: Count

    @model_validator(mode="after")
    def _possible(self) -> Self:
        highest = {"xz": 9, "zstd": 22}[self.codec]
        if self.level > highest:
            raise ValueError(f"level ({self.level}) must be at most {highest} for {self.codec}")
        if self.codec == "xz" and self.train_megabytes:
            raise ValueError("train_megabytes must be 0 for xz, which takes no dictionary; zstd does")
        return self


class Gguf(Section):
    """A GGUF file inside a wheel of the package index."""

    kind: Literal["gguf"]
    wheel: Wheel
    file: str
    sha256: Sha256
    views: tuple[View, ...] = ()


class Folder(Section):
    """A causal language model in Hugging Face form in a local folder (safetensors)."""

    kind: Literal["folder"]
    path: str
    views: tuple[View, ...] = ()


class Hub(Section):
    """A causal language model of the Hugging Face hub at a pinned commit (safetensors)."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    views: tuple[View, ...] = ()


BaselineSpec = Annotated[Unigram | Compressor | Gguf | Folder | Hub, Field(discriminator="kind")]


class Baseline(Section):
    """Other people's models, through the same evaluation."""

    names: tuple[Name, ...]
    specs: dict[Name, BaselineSpec]

    @model_validator(mode="after")
    def _specified(self) -> Self:
        missing = [name for name in self.names if name not in self.specs]
        if missing:
            raise ValueError(f"names {missing} have no entry in specs; it has {sorted(self.specs)}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names {list(self.names)} repeat themselves")
        return self


class ExpectedLoss(Section):
    """A loss written down before it was measured: nats per token, with two intervals."""

    value: PositiveFloat
    low_80: PositiveFloat
    high_80: PositiveFloat
    low_95: PositiveFloat
    high_95: PositiveFloat
    basis: str

    @model_validator(mode="after")
    def _nested(self) -> Self:
        bounds = [self.low_95, self.low_80, self.value, self.high_80, self.high_95]
        if bounds != sorted(bounds):
            raise ValueError(f"low_95, low_80, value, high_80, high_95 must ascend, found {bounds}")
        return self


class NoteRun(Model):
    """The configuration that the note describes."""

    max_steps: Positive
    tokens_per_step: Positive
    micro_batch_size: Positive
    corpus_tokens: Positive
    expected_loss: ExpectedLoss


class Machine(Section):
    """A machine that could do the training."""

    peak_teraflops: PositiveFloat
    utilisation: Annotated[float, Field(gt=0, le=1)]
    source: str


class Anchor(Section):
    """A run whose loss was measured."""

    name: Name
    num_params: Positive
    num_params_non_embedding: Positive
    max_steps: Positive
    tokens_per_step: Positive
    optimizer: Literal["adamw", "muon"]
    loss: PositiveFloat
    corpus: str
    source: str
    assumed_budget: bool = False  # then it is only checked, and tells nothing of other runs


class Estimate(Section):
    """What is estimated, for which machines, and the measured runs that the estimate starts from."""

    note: NoteRun
    corpus_tokens: dict[Name, Positive] = {}
    utilisation_of_products: Annotated[float, Field(gt=0, le=1)] = 0.6
    machines: Annotated[dict[Name, Machine], Field(min_length=1)]
    anchors: Annotated[tuple[Anchor, ...], Field(min_length=1)]


class Comparison(Section):
    """How the table is rendered."""

    language: Literal["en", "fr"]


Metric = Annotated[str, Field(pattern=r"^(perplexity(\.(own|strided))?|accuracy\.[a-z][a-z0-9_]*)$")]


class Regression(Section):
    """The gate: how much worse is worse, and how sure it must be. It judges outputs and changes none."""

    false_alarms: Annotated[float, Field(gt=0, lt=0.5)]
    rerun_noise: NonNegative
    resamples: Annotated[int, Field(ge=100)]
    seed: Count
    max_documents: Positive
    max_baseline_change: NonNegative
    min_throughput_ratio: PositiveFloat
    tolerances: Annotated[dict[Metric, NonNegative], Field(min_length=1)]


class Params(Section):
    """All of params.yaml."""

    runtime: Runtime
    download: Download
    validation: Validation
    tokenization: Tokenization
    inspection: Inspection
    model: Model
    training: Training
    evaluation: Evaluation
    baseline: Baseline
    estimate: Estimate
    comparison: Comparison
    regression: Regression

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        processes = self.training.launcher.processes
        unit = self.training.micro_batch_size * self.model.block_size * processes
        if self.training.tokens_per_step % unit:
            raise ValueError(
                f"training.tokens_per_step ({self.training.tokens_per_step}) must be a multiple of "
                f"training.micro_batch_size x model.block_size x training.launcher.processes ({unit})"
            )
        window = self.evaluation.likelihood.window
        if window > self.model.block_size:
            raise ValueError(
                f"evaluation.likelihood.window ({window}) must be at most "
                f"model.block_size ({self.model.block_size})"
            )
        return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml: see `load_section`."""
    return load_section(path, Params)


def load_section(path: Path, kind: type[Checked]) -> Checked:
    """Read a YAML file and check it as a section.

    Raises:
        MissingInput: there is no such file.
        BadConfig: it is no YAML, or a key is unknown, missing, of the wrong type or impossible; the
            message names every such key.
    """
    return _parse(read_yaml(path), kind, str(path))


# Beside its own, the library lets pass what Python says of impossible dates, numbers, tags and depths.
NO_YAML = (
    YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_yaml(path: Path) -> Any:
    """Parse a YAML file as DVC does.

    Raises:
        MissingInput, BadConfig: see `load_section`.
    """
    try:
        content = path.read_bytes()
        return copy.deepcopy(_parsed(content))
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run from the repository folder, or give its path") from error
    except NO_YAML as error:
        if conflict := conflict_in(path.name, content):
            raise BadConfig(conflict) from error
        what = " ".join(str(error).split()).replace('in "<byte string>",', "in")
        raise BadConfig(f"{path} is no valid YAML: {what}") from error


@functools.lru_cache(maxsize=64)
def _parsed(content: bytes) -> Any:
    """Parse YAML: params.yaml takes a tenth of a second, and a process may read it ten times."""
    return YAML(typ="safe", pure=True).load(content)


def parse_params(tree: Any, source: str = "params.yaml") -> Params:
    """Check a parsed params.yaml.

    Raises:
        BadConfig: see `load_section`.
    """
    return _parse(tree, Params, source)


def lay_over(tree: dict[str, Any], change: dict[str, Any], where: str = "") -> list[str]:
    """Change a tree in place by JSON merge patch (RFC 7386): mappings are merged, null takes a key away.

    Returns:
        A line for each value that is another now, in the order of `change`.
    """
    told = []
    for key, value in change.items():
        path = f"{where}{key}"
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            told += lay_over(tree[key], value, f"{path}.")
        elif value is None:
            if tree.get(key) is not None:  # what is null already says the same
                told.append(f"{path}: {tree.pop(key)!r} taken away")
        elif key not in tree or tree[key] != value:
            told.append(f"{path}: {tree[key]!r} -> {value!r}" if key in tree else f"{path}: {value!r}, new")
            tree[key] = value
    return told


def set_values(tree: dict[str, Any], settings: Sequence[str]) -> list[str]:
    """Change a tree in place by `path.to.key=value`, as `dvc exp run -S` does; the value is YAML.

    Returns:
        A line for each value that is another now.

    Raises:
        BadConfig: a setting has no `=` or no YAML behind it, or names a key that the tree lacks.
    """
    told = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise BadConfig(f"-S {setting}: give key=value, such as training.max_steps=1600")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise BadConfig(f"-S {setting}: {text!r} is no YAML value") from error
        *parents, key = path.split(".")
        node: Any = tree
        for depth, part in enumerate([*parents, key]):
            if not isinstance(node, dict) or part not in node:
                known = sorted(map(str, node)) if isinstance(node, dict) else []
                close = difflib.get_close_matches(part, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
                where = ".".join(path.split(".")[: depth + 1])
                raise BadConfig(f"-S {setting}: params.yaml has no key {where}; {hint}")
            node, parent = node[part], node
        if node != value:
            told.append(f"{path}: {node!r} -> {value!r}")
            parent[key] = value
    return told


def _parse(tree: Any, kind: type[Checked], source: str) -> Checked:
    try:
        _check_extent(tree)
        # JSON is the strict mode that still lets a YAML list be a tuple.
        return kind.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [f"  {_explain(detail, kind)}" for detail in error.errors()]
        raise BadConfig(f"{source} can't be used; mend:\n" + "\n".join(lines)) from error
    except (TypeError, ValueError, RecursionError) as error:  # from dumps
        raise BadConfig(
            f"{source} can't be used: keys must be words, and nothing may hold itself ({error})"
        ) from error


def _check_extent(tree: Any) -> None:
    """Refuse a few lines of YAML that refer to themselves and stand for more than memory holds."""
    waiting, seen = [tree], 0
    while waiting:
        node = waiting.pop()
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        seen += 1 + len(children)
        if seen > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values")
        waiting.extend(children)


def _explain(detail: Any, kind: type[Section]) -> str:
    """One line for one mistake: the key's path, what was found, what is allowed."""
    location, parent = _walk([str(part) for part in detail["loc"]], kind)
    path = printable(".".join(location))
    if detail["type"] == "extra_forbidden":
        known = sorted(getattr(parent, "model_fields", {}))
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{path}: missing key"
    message = detail["msg"].removeprefix("Value error, ")
    if detail.get("ctx", {}).get("pattern") == NAME_PATTERN:
        message = NAME_RULE
    if isinstance(detail["input"], dict | list):
        return f"{path}: {message}" if path else message
    return f"{path}: found {json.dumps(detail['input'])}; {message[0].lower()}{message[1:]}"


def _walk(location: list[str], kind: Any) -> tuple[list[str], Any]:
    """Follow pydantic's location of a mistake: the path as the file has it, and the section it ends in.

    A union told apart by a key adds that key's value to pydantic's location, which no file has.
    """
    path: list[str] = []
    parent = kind
    for part in location:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        members = get_args(kind)
        if get_origin(kind) in (Union, UnionType) and part in (tags := _tags(members)):
            kind = tags[part]
            continue
        path.append(part)
        parent = kind
        fields = getattr(kind, "model_fields", {})
        if part in fields:
            kind = fields[part].annotation
        else:  # dict[name, section], tuple[section, ...]
            kind = members[-1 if get_origin(kind) is dict else 0] if members else None
    return path, parent


def _tags(members: tuple[Any, ...]) -> dict[str, Any]:
    """The sections of a union by the value of the key that tells them apart."""
    tags: dict[str, Any] = {}
    for member in members:
        for field in getattr(member, "model_fields", {}).values():
            if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
                tags[get_args(field.annotation)[0]] = member
    return tags
