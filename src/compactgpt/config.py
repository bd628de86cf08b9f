"""The sections of params.yaml as immutable typed objects. The comments of params.yaml explain each value."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from compactgpt.common.sections import Name, Section, check_section, load_section

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch and numpy read a seed as a signed number of 64 bits
Loss = Annotated[float, Field(gt=0, lt=700)]  # nats per token; exp(710) is too large for a float
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Wheel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+$")]  # name==version
UserPath = Annotated[NonEmpty, AfterValidator(os.path.expanduser)]  # `~` is the home folder
FILE_KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")  # endings of corpus files
HubRepository = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
HubCommit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
GateMetric = Annotated[str, Field(pattern=r"^(perplexity(\.(own|strided))?|accuracy\.[a-z][a-z0-9_]*)$")]
# own: windows as long as the model allows; strided: overlapping windows
View = Literal["own", "strided"]
SCRATCH = "scratch"  # the value of training.init_from for a model that starts from random weights


def _check_glob(pattern: str) -> str:
    kinds = "|".join(FILE_KINDS).replace(".", "")
    if not re.fullmatch(rf"(?i)[^/\\:~][^\\:]*(/\*\*|\.({kinds})(\.gz|\.zst)?)", pattern):
        allowed = f"/** (every kind of text file) or in {', '.join(FILE_KINDS)}, also with .gz or .zst"
        raise ValueError(f"a pattern is a path inside the project, and ends in {allowed}")
    return pattern


FileGlob = Annotated[str, AfterValidator(_check_glob)]


class Runtime(Section):
    """The device, the numbers of threads and processes, and how often training reports."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    num_threads: PositiveInt
    num_workers: PositiveInt
    log_interval: PositiveInt = 10
    sample_interval: NonNegativeInt = 0
    sample_prompt: str = ""


class Docstrings(Section):
    """The built-in corpus: the docstrings of installed distributions."""

    min_characters: NonNegativeInt
    max_characters: PositiveInt
    distributions: Annotated[dict[Name, str], Field(min_length=1)]  # name -> version
    exclude: tuple[str, ...]


class Files(Section):
    """The user's own text files. `patterns` are globs relative to the repository."""

    name: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    patterns: Annotated[tuple[FileGlob, ...], Field(min_length=1)]
    text_column: NonEmpty
    split: Literal["auto", "blank-lines", "lines", "heading", "size", "none"]
    heading: re.Pattern[str] | None
    split_characters: PositiveInt
    split_over_characters: PositiveInt
    max_decompressed_megabytes: PositiveInt
    max_decompression_ratio: PositiveInt
    min_free_disk_megabytes: NonNegativeInt

    def _mistakes(self) -> Iterator[str]:
        if self.split == "heading" and self.heading is None:
            yield "split is heading: write the regular expression of a heading line into heading"


class HubSet(Section):
    """A data set of the Hugging Face hub, and how its rows become documents."""

    repo: HubRepository
    config: str | None
    splits: Annotated[tuple[Name, ...], Field(min_length=1)]
    text_column: NonEmpty
    revision: HubCommit | Literal["refs/convert/parquet"] | None
    licence: str
    sha256: Sha256 | None = None
    opens_document: re.Pattern[str] | None = None
    separator: NonEmpty | None = None
    join_characters: PositiveInt | None = None
    file: UserPath | None = None
    file_url: NonEmpty | None = None

    def _mistakes(self) -> Iterator[str]:
        if self.opens_document is not None and self.separator is not None:
            yield "opens_document joins rows and separator cuts them: one of the two at most"
        if str(self.revision).startswith("refs/") and self.sha256 is None:
            yield "revision is a branch, which moves: give the sha256 of the text, or a commit"


class HubCorpus(Section):
    name: Name  # the corpus is the data set `sets[name]`
    mirror: UserPath | None
    sets: dict[Name, HubSet]

    def _mistakes(self) -> Iterator[str]:
        if self.name not in self.sets:
            yield f"name {self.name!r} has no entry in sets; it has {sorted(self.sets)}"


class Tokenizer(Section):
    """The wheel that contains the files of GPT-2's tokenizer."""

    encoding: Literal["gpt2"]
    wheel: Wheel
    wheel_folder: str
    vocab_bpe_sha256: Sha256
    encoder_json_sha256: Sha256


class Download(Section):
    corpus: Literal["docstrings", "files", "hub"]
    max_documents: PositiveInt | None
    max_bytes: PositiveInt | None
    shard_megabytes: PositiveInt
    max_document_megabytes: Annotated[int, Field(gt=0, le=1000)]
    max_row_megabytes: Annotated[int, Field(gt=0, le=1000)]
    docstrings: Docstrings
    files: Files
    hub: HubCorpus
    tokenizer: Tokenizer


class Validation(Section):
    min_characters: NonNegativeInt
    max_characters: PositiveInt
    min_documents: PositiveInt
    min_total_megabytes: NonNegativeFloat
    min_letter_share: Share
    max_replacement_share: Share
    min_unique_share: Share
    mostly: Share
    # A sample of fewer documents could be empty.
    max_rows: Annotated[int, Field(ge=1000)]


class Tokenization(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split: Literal["hash", "tail"] = "hash"
    encoder: Literal["gigatoken", "tiktoken"] = "gigatoken"
    engine: Literal["local", "ray"] = "local"


class Inspection(Section):
    min_val_documents: PositiveInt
    max_val_deviation: PositiveFloat
    shingle_words: PositiveInt
    permutations: PositiveInt
    bands: PositiveInt
    seed: Seed
    similarity: PositiveShare
    overlap_words: PositiveInt
    flagged_overlap: Share
    leaked_overlap: PositiveShare
    max_leaked_share: Share
    max_repeated_share: Share
    max_listed: NonNegativeInt

    def _mistakes(self) -> Iterator[str]:
        if self.permutations % self.bands:
            yield f"permutations ({self.permutations}) must be a multiple of bands ({self.bands})"


class Model(Section):
    """The shape of a GPT, with the names of nanoGPT's GPTConfig."""

    block_size: PositiveInt
    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]  # a token id has 32 bits at most
    padded_vocab_size: PositiveInt
    bias: bool
    dropout: ShareBelowOne
    gelu: Literal["erf", "tanh"] = "erf"

    def _mistakes(self) -> Iterator[str]:
        if self.n_embd % self.n_head:
            yield f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})"
        if (padded := self.padded_vocab_size) < self.vocab_size:
            yield f"padded_vocab_size ({padded}) must be at least vocab_size ({self.vocab_size})"


class Launcher(Section):
    """How many processes train one model, and how they divide the work."""

    processes: PositiveInt = 1
    mode: Literal["fast", "fsdp"] = "fast"
    max_restarts: NonNegativeInt = 3
    timeout_seconds: PositiveInt = 600


class Training(Section):
    seed: Seed
    init_from: UserPath = SCRATCH
    init_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    dtype: Literal["float32", "tfloat32", "bfloat16"] = "float32"
    compile: bool = False
    max_steps: PositiveInt
    tokens_per_step: PositiveInt
    micro_batch_size: PositiveInt
    optimizer: Literal["adamw", "muon"]
    learning_rate: PositiveFloat
    embedding_learning_rate: PositiveFloat
    muon_learning_rate: PositiveFloat
    min_lr_ratio: Share
    schedule: Literal["cosine", "linear", "wsd", "constant"]
    warmup_steps: NonNegativeInt
    decay_share: Share
    weight_decay: NonNegativeFloat
    beta1: ShareBelowOne
    beta2: ShareBelowOne
    grad_clip: NonNegativeFloat
    eval_interval: PositiveInt
    eval_windows: PositiveInt
    checkpoint_interval: PositiveInt
    head: Literal["full", "sampled"] = "full"
    sample_tokens: PositiveInt = 4096
    sample_power: Share = 0.75
    init_unigram: NonNegativeFloat = 0.0
    init_positions: NonNegativeFloat = 0.0
    position_learning_rate: PositiveFloat | None = None
    launcher: Launcher = Launcher()

    def _mistakes(self) -> Iterator[str]:
        if self.head == "sampled" and (self.dtype == "bfloat16" or self.launcher.mode == "fsdp"):
            yield "head (sampled) needs dtype float32 or tfloat32, and launcher.mode fast; head full does not"
        if (self.init_unigram or self.init_positions) and self.init_from != SCRATCH:
            yield f"init_unigram and init_positions must be 0.0 unless init_from is {SCRATCH}"
        if (self.init_from == SCRATCH) != (not self.init_sha256):
            rule = f"empty for {SCRATCH}, else the folder's hash; with 64 zeros the stage prints the hash"
            yield f"init_from is {self.init_from}: init_sha256 ({self.init_sha256 or 'empty'}) must be {rule}"


class Likelihood(Section):
    document_tokens: PositiveInt | None = None  # of each document, the first N tokens are scored; None: all
    window: PositiveInt
    # Neural models are also measured in these views, in addition to windows of `window` tokens.
    views: tuple[View, ...] = ()
    batch_size: PositiveInt
    own_context: PositiveInt
    stride_share: PositiveShare


class Source(Section):
    """A published text file: a local file, or a file on the Hugging Face hub."""

    path: UserPath | None = None
    repo: str | None = None
    revision: HubCommit | None = None
    file: str | None = None
    sha256: Sha256

    def _mistakes(self) -> Iterator[str]:
        hub = [self.repo, self.revision, self.file]
        if (self.path is None) == (None in hub) or (self.path is not None and any(hub)):
            yield "give either path, or repo with revision and file"


class Tasks(Section):
    """The tasks of every neural model: last words (cloze, LAMBADA), and WikiText."""

    cloze_items: NonNegativeInt
    cloze_characters: PositiveInt
    lambada: Source | None = None
    lambada_original: Source | None = None
    wikitext: dict[Name, Source]
    wikitext_context: PositiveInt
    wikitext_stride: PositiveInt


class Text(Section):
    prompts: tuple[str, ...]
    documents: Annotated[int, Field(ge=2)]
    prompt_tokens: PositiveInt
    max_new_tokens: Annotated[int, Field(ge=5)]
    temperature: PositiveFloat
    top_k: PositiveInt
    top_p: PositiveShare
    batch_size: PositiveInt
    seed: Seed


class Evaluation(Section):
    likelihood: Likelihood
    tasks: Tasks
    text: Text


class Unigram(Section):
    """A model that knows only the token frequencies of the train split."""

    label: str = ""  # the name of the baseline in tables; empty: its key in `specs`
    kind: Literal["unigram"]


class Compressor(Section):
    label: str = ""
    kind: Literal["compressor"]
    codec: Literal["xz", "zstd"]
    level: PositiveInt
    train_megabytes: NonNegativeInt

    def _mistakes(self) -> Iterator[str]:
        if self.level > (highest := {"xz": 9, "zstd": 22}[self.codec]):
            yield f"level ({self.level}) must be at most {highest} for {self.codec}"
        if self.codec == "xz" and self.train_megabytes:
            yield "train_megabytes must be 0 for xz, which takes no dictionary; zstd does"


class Ngram(Section):
    label: str = ""
    kind: Literal["ngram"]
    order: Annotated[int, Field(ge=3, le=5)]
    train_tokens: PositiveInt  # maximum number of tokens, from the start of the train split


class Gguf(Section):
    """A GGUF file inside a wheel of the package index."""

    label: str = ""
    kind: Literal["gguf"]
    wheel: Wheel
    file: str
    sha256: Sha256


class Folder(Section):
    """A causal language model in Hugging Face's format in a local folder, with safetensors weights."""

    label: str = ""
    kind: Literal["folder"]
    path: UserPath
    sha256: Sha256 | None = None  # hash of the folder; if it is None, the stage stops and prints the hash


class Hub(Section):
    """A causal language model on the Hugging Face hub at a commit, with safetensors weights."""

    label: str = ""
    kind: Literal["hub"]
    repo: HubRepository
    revision: HubCommit


BaselineSpec = Annotated[Unigram | Compressor | Ngram | Gguf | Folder | Hub, Field(discriminator="kind")]


class Baseline(Section):
    names: tuple[Name, ...]
    specs: dict[Name, BaselineSpec]

    def _mistakes(self) -> Iterator[str]:
        if missing := [name for name in self.names if name not in self.specs]:
            yield f"names {missing} have no entry in specs; it has {sorted(self.specs)}"
        if len(set(self.names)) != len(self.names):
            yield f"names {list(self.names)} must be different from each other"


class ExpectedLoss(Section):
    """A predicted loss in nats per token, with two intervals."""

    value: Loss
    low_80: Loss
    high_80: Loss
    low_95: Loss
    high_95: Loss
    basis: str


class NoteRun(Model):
    max_steps: PositiveInt
    tokens_per_step: PositiveInt
    micro_batch_size: PositiveInt
    corpus_tokens: PositiveInt
    hand_set_loss: ExpectedLoss


class Machine(Section):
    peak_teraflops: PositiveFloat
    utilisation: PositiveShare
    source: str


class Run(Section):
    """The size and the budget of a training run."""

    num_params: PositiveInt  # without position embeddings, as nanoGPT counts
    num_params_non_embedding: PositiveInt
    max_steps: PositiveInt
    tokens_per_step: PositiveInt

    @property
    def tokens(self) -> int:
        """Number of tokens that the run trains on; a repeated token counts each time."""
        return self.max_steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """Training compute in FLOPs: 6 times parameters times tokens."""
        return 6 * self.num_params * self.tokens


class Anchor(Run):
    """A reference run: a finished run whose loss was measured."""

    name: Name
    optimizer: Literal["adamw", "muon"]
    loss: PositiveFloat  # nats per token
    corpus: str
    source: str
    assumed_budget: bool = False  # True: max_steps is a guess, so this run predicts no other run


class Estimate(Section):
    note: NoteRun
    corpus_tokens: dict[Name, PositiveInt] = Field(default_factory=dict)
    utilisation_of_products: PositiveShare = 0.6
    machines: Annotated[dict[Name, Machine], Field(min_length=1)]
    anchors: Annotated[tuple[Anchor, ...], Field(min_length=1)]


class Comparison(Section):
    language: Literal["en", "fr"]


class Regression(Section):
    """The limits of `compactgpt gate`: how much worse a metric may become."""

    false_alarms: Annotated[float, Field(gt=0, lt=0.5)]
    fallback_noise: NonNegativeFloat
    max_documents: PositiveInt
    max_baseline_change: NonNegativeFloat
    min_throughput_ratio: PositiveFloat
    tolerances: Annotated[dict[GateMetric, NonNegativeFloat], Field(min_length=1)]


class Params(Section):
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

    def _mistakes(self) -> Iterator[str]:
        training, longest = self.training, self.model.block_size
        unit = training.micro_batch_size * longest * training.launcher.processes
        if (step := training.tokens_per_step) % unit:
            factors = "training.micro_batch_size x model.block_size x training.launcher.processes"
            yield f"training.tokens_per_step ({step}) must be a multiple of {factors} ({unit})"
        if found := re.search(r'"([^"]*\$\{[^"]*)"', self.model_dump_json()):
            yield f"found {found[1]!r}: `dvc exp run -S` would replace `${{...}}`: write `$ {{`"
        for pattern in self.download.files.patterns if self.download.corpus == "files" else ():
            if not pattern.startswith("corpus/") or ".." in pattern:
                rule = "must begin with corpus/, which DVC watches: `dvc add PATH -o corpus/NAME` copies it"
                yield f"download.files.patterns: found {pattern}, {rule}"
        if (window := self.evaluation.likelihood.window) > longest:
            yield f"evaluation.likelihood.window ({window}) must be at most model.block_size ({longest})"


def load_params(path: Path) -> Params:
    """Read and check params.yaml; raises MissingInput or BadConfig."""
    return load_section(path, Params)


def parse_params(tree: Any, source: str = "params.yaml") -> Params:
    """Check the parsed content of params.yaml; raises BadConfig. `source` names the content in messages."""
    return check_section(tree, Params, source)
