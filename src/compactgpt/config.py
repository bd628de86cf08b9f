"""The sections of params.yaml as immutable typed objects. The comments of params.yaml have the details."""

import os
import re
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from compactgpt.common.sections import Name, Section, check_section, load_section

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's seeds are signed 64-bit numbers
Loss = Annotated[float, Field(gt=0, lt=700)]  # nats per token; from 710 on, exp(loss) overflows a float
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Wheel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+$")]  # such as gguf==0.19.0
UserPath = Annotated[NonEmpty, AfterValidator(os.path.expanduser)]  # `~` becomes the home folder
FILE_KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")  # suffixes of corpus files
HubRepository = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
HubCommit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
GateMetric = Annotated[str, Field(pattern=r"^(perplexity(\.(own|strided))?|accuracy\.[a-z][a-z0-9_]*)$")]
# How a text is cut into windows as long as the model's context. own: side by side; strided: overlapping.
View = Literal["own", "strided"]
SCRATCH = "scratch"  # value of training.init_from: training starts with random weights


def _check_glob(pattern: str) -> str:
    kinds = "|".join(FILE_KINDS).replace(".", "")
    if not re.fullmatch(rf"(?i)[^/\\:~][^\\:]*(/\*\*|\.({kinds})(\.gz|\.zst)?)", pattern):
        allowed = f"/** or {', '.join(FILE_KINDS)}, also with .gz or .zst"
        raise ValueError(f"a pattern must be a path inside the project that ends in {allowed}")
    return pattern


FileGlob = Annotated[str, AfterValidator(_check_glob)]


class Runtime(Section):
    """The device, the threads and processes, and how often training logs."""

    device: Literal["auto", "cpu", "cuda", "mps"]  # auto: the fastest device of this machine
    num_threads: PositiveInt  # CPU threads that torch uses
    num_workers: PositiveInt  # processes that parse and tokenize text
    log_interval: PositiveInt = 10  # steps between two logged losses on a GPU; a CPU logs each step
    sample_interval: NonNegativeInt = 0  # steps between two generated samples; 0: no samples
    sample_prompt: str = ""  # the beginning of each generated sample


class Docstrings(Section):
    """The built-in corpus: the docstrings of installed distributions."""

    min_characters: NonNegativeInt  # shorter documents are left out
    max_characters: PositiveInt  # longer documents are left out
    distributions: Annotated[dict[Name, str], Field(min_length=1)]  # name -> version
    exclude: tuple[str, ...]  # names of folders and modules to leave out


class Files(Section):
    """The user's own text files, and how they become documents."""

    name: Annotated[str, Field(min_length=1, max_length=100)] | None = None  # the corpus's name in reports
    patterns: Annotated[tuple[FileGlob, ...], Field(min_length=1)]  # globs, relative to the repository
    text_column: NonEmpty  # the column or key with the text of a document
    # How .txt and .md files are split into documents.
    split: Literal["auto", "blank-lines", "lines", "heading", "size", "none"]
    heading: re.Pattern[str] | None  # if `split` is `heading`, a document begins at each match
    split_characters: PositiveInt  # minimum length of a document if `split` is `size` or `auto`
    split_over_characters: PositiveInt  # if `split` is `auto`, a file up to this length is one document
    max_decompressed_megabytes: PositiveInt  # maximum size of one file after decompression
    max_decompression_ratio: PositiveInt  # maximum number of decompressed bytes per compressed byte
    min_free_disk_megabytes: NonNegativeInt  # free disk space that must remain while parquet is decompressed

    def _mistakes(self) -> Iterator[str]:
        if self.split == "heading" and self.heading is None:
            yield "split is heading: set heading to a regular expression of each document's first line"


class HubSet(Section):
    """A data set of the Hugging Face hub, and how its rows become documents."""

    repo: HubRepository
    config: str | None  # the data set's configuration, if it has several
    splits: Annotated[tuple[Name, ...], Field(min_length=1)]
    text_column: NonEmpty  # the column with the text of a row
    # A commit or a branch. For the branch, `sha256` must be set, because the content of a branch can change.
    revision: HubCommit | Literal["refs/convert/parquet"] | None
    licence: str
    sha256: Sha256 | None = None  # hash of the text of all rows; a local copy needs it
    opens_document: re.Pattern[str] | None = None  # a row that matches starts a new document
    separator: NonEmpty | None = None  # each row is split into parts at this text
    # Join consecutive parts of a row until they have at least this many characters. None: join no parts.
    join_characters: PositiveInt | None = None
    file: UserPath | None = None  # local copy of the text, read instead of the hub if it exists
    file_url: NonEmpty | None = None  # where the user can download `file`

    def _mistakes(self) -> Iterator[str]:
        if self.opens_document is not None and self.separator is not None:
            yield "opens_document joins rows, and separator splits them: give one of the two at most"
        if str(self.revision).startswith("refs/") and self.sha256 is None:
            yield "revision is a branch, whose content can change: give sha256, or a commit as the revision"


class HubCorpus(Section):
    name: Name  # the corpus to download: a key of `sets`
    mirror: UserPath | None  # local copy of the data set's repository, read instead of the hub
    sets: dict[Name, HubSet]

    def _mistakes(self) -> Iterator[str]:
        if self.name not in self.sets:
            yield f"name {self.name!r} has no entry in sets; sets has {sorted(self.sets)}"


class Tokenizer(Section):
    """The wheel that contains GPT-2's tokenizer."""

    encoding: Literal["gpt2"]
    wheel: Wheel
    wheel_folder: str  # the folder of the tokenizer files in the wheel
    vocab_bpe_sha256: Sha256
    encoder_json_sha256: Sha256


class Download(Section):
    corpus: Literal["docstrings", "files", "hub"]  # the section below that describes the corpus
    max_documents: PositiveInt | None  # use only this many documents; None: all
    max_bytes: PositiveInt | None  # use at most this many bytes of text; None: all
    shard_megabytes: PositiveInt  # size of a shard, a file that contains many documents
    max_document_megabytes: Annotated[int, Field(gt=0, le=1000)]  # a longer .txt or .md document is an error
    max_row_megabytes: Annotated[int, Field(gt=0, le=1000)]  # a longer row is an error
    docstrings: Docstrings
    files: Files
    hub: HubCorpus
    tokenizer: Tokenizer

    @property
    def corpus_name(self) -> str:
        """The name of the corpus in reports and Data Docs."""
        if self.corpus == "docstrings":
            return "docstrings"
        if self.corpus == "hub":
            return self.hub.name
        first, *others = self.files.patterns
        is_one_file = not others and not has_magic(first)
        return self.files.name or (PurePath(first).name.split(".")[0] if is_one_file else "your text")


class Validation(Section):
    min_characters: NonNegativeInt  # minimum length of one document
    max_characters: PositiveInt  # maximum length of one document
    min_documents: PositiveInt
    min_total_megabytes: NonNegativeFloat  # minimum size of all documents together
    min_letter_share: Share  # letters in one document, divided by its characters that are not white space
    max_replacement_share: Share  # share of U+FFFD in one document
    min_unique_share: Share  # share of documents that equal no other document
    mostly: Share  # share of documents that must meet a limit on one document, such as min_characters
    # If there are more documents, a sample of about this many is checked. A small sample could be empty.
    max_rows: Annotated[int, Field(ge=1000)]


class Tokenization(Section):
    # If `split` is hash, val has this share of the documents; if `split` is tail, this share of the bytes.
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    # hash: the hash of a document decides whether it is in val; tail: val is the end of the corpus
    split: Literal["hash", "tail"] = "hash"
    encoder: Literal["gigatoken", "tiktoken"] = "gigatoken"  # both give the same token ids
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or a Ray cluster


class Inspection(Section):
    min_val_documents: PositiveInt
    # With split `hash`: how far val's share of documents may be from val_fraction, in standard deviations.
    max_val_deviation: PositiveFloat
    shingle_words: PositiveInt  # number of words in the sequences that MinHash compares
    permutations: PositiveInt  # length of a MinHash signature
    bands: PositiveInt  # number of parts of a signature; two documents that share a part are compared
    seed: Seed
    similarity: PositiveShare  # Jaccard similarity from which two documents are near duplicates
    overlap_words: PositiveInt  # number of words in the sequences of val that are searched for in train
    # The report lists a val document if more than this share of the document's word sequences is in train.
    flagged_overlap: Share
    # A val document is leaked if at least this share of its word sequences, or a near duplicate, is in train.
    leaked_overlap: PositiveShare
    max_leaked_share: Share  # share of leaked val documents; a greater share stops the pipeline
    max_repeated_share: Share  # share of documents with a near duplicate; a greater share stops the pipeline
    max_listed: NonNegativeInt  # maximum number of pairs of similar train documents in the report

    def _mistakes(self) -> Iterator[str]:
        if self.permutations % self.bands:
            yield f"permutations ({self.permutations}) must be a multiple of bands ({self.bands})"


class Model(Section):
    """The shape of a GPT, with the names of nanoGPT's GPTConfig."""

    block_size: PositiveInt  # context length in tokens
    n_layer: PositiveInt  # number of transformer blocks
    n_head: PositiveInt  # attention heads in each block
    n_embd: PositiveInt  # width of the hidden states
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]  # a token id has 32 bits at most
    padded_vocab_size: PositiveInt  # rows of the token embedding; a multiple of 64 is faster
    bias: bool  # whether linear layers and layer norms have biases
    dropout: ShareBelowOne
    gelu: Literal["erf", "tanh"] = "erf"  # erf as in nanoGPT, tanh as in GPT-2

    def _mistakes(self) -> Iterator[str]:
        if self.n_embd % self.n_head:
            yield f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})"
        if (padded := self.padded_vocab_size) < self.vocab_size:
            yield f"padded_vocab_size ({padded}) must be at least vocab_size ({self.vocab_size})"


class Launcher(Section):
    """How many processes train one model, and how they divide the work."""

    processes: PositiveInt = 1
    mode: Literal["fast", "fsdp"] = "fast"  # fast: data parallel; fsdp: weights sharded over processes
    max_restarts: NonNegativeInt = 3  # restarts after a process has died
    timeout_seconds: PositiveInt = 600  # how long a process waits for the others


class Training(Section):
    seed: Seed
    init_from: UserPath = SCRATCH  # scratch, or the folder of a model
    init_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""  # hash of the folder in init_from
    dtype: Literal["float32", "tfloat32", "bfloat16"] = "float32"  # of matrix products; weights are float32
    compile: bool = False  # whether torch.compile compiles the model
    max_steps: PositiveInt
    tokens_per_step: PositiveInt  # tokens of one step, in all micro-batches and processes together
    micro_batch_size: PositiveInt  # sequences of block_size tokens in one forward pass
    optimizer: Literal["adamw", "muon"]  # muon trains only hidden matrices, AdamW the rest
    learning_rate: PositiveFloat  # of AdamW
    embedding_learning_rate: PositiveFloat  # of token embeddings
    muon_learning_rate: PositiveFloat  # of Muon, for the hidden matrices
    min_lr_ratio: Share  # the last learning rate divided by the highest
    schedule: Literal["cosine", "linear", "wsd", "constant"]  # how learning rates change after the warm-up
    warmup_steps: NonNegativeInt
    decay_share: Share  # schedule wsd lowers the learning rates in this share of max_steps, at the end
    weight_decay: NonNegativeFloat
    beta1: ShareBelowOne
    beta2: ShareBelowOne
    grad_clip: NonNegativeFloat  # maximum norm of the gradient; 0: no maximum
    eval_interval: PositiveInt  # steps between two estimates of val's loss
    eval_windows: PositiveInt  # number of val sequences, of block_size tokens, that estimate val's loss
    checkpoint_interval: PositiveInt  # steps between two checkpoints
    head: Literal["full", "sampled"] = "full"  # softmax over the whole vocabulary, or over a sample of it
    sample_tokens: PositiveInt = 4096  # with head sampled: expected size of a step's vocabulary sample
    sample_power: Share = 0.75  # a token's probability grows as (its count in train + 1) ** sample_power
    # Length of a vector that is added to each position embedding before training, divided by the typical
    # length of the sum of a token embedding and a position embedding. Token embeddings are changed, too, so
    # that the first logits are near the tokens' log frequencies. 0: no embedding is changed.
    init_unigram: NonNegativeFloat = 0.0
    # The position embeddings start as sinusoids of this amplitude. With 0, they start random.
    init_positions: NonNegativeFloat = 0.0
    position_learning_rate: PositiveFloat | None = None  # None: embedding_learning_rate is used
    launcher: Launcher = Launcher()

    def _mistakes(self) -> Iterator[str]:
        if self.head == "sampled" and (self.dtype == "bfloat16" or self.launcher.mode == "fsdp"):
            yield "head is sampled: set dtype float32 or tfloat32, and launcher.mode fast; or set head full"
        if (self.init_unigram or self.init_positions) and self.init_from != SCRATCH:
            yield f"init_unigram and init_positions must be 0.0 unless init_from is {SCRATCH}"
        if (self.init_from == SCRATCH) != (not self.init_sha256):
            rule = (
                f"init_sha256 must be empty if init_from is {SCRATCH}, otherwise the hash of the folder. If "
                "you do not know the hash, write 64 zeros: stage training then stops and prints the hash"
            )
            yield f"init_from is {self.init_from}, init_sha256 is {self.init_sha256 or 'empty'}: {rule}"


class Likelihood(Section):
    document_tokens: PositiveInt | None = None  # tokens scored from each document's start; None: all
    window: PositiveInt  # number of GPT-2 tokens in a window; all neural models get the same windows of text
    # Additional ways to cut the text into windows. Each neural model gets one more score for each way.
    views: tuple[View, ...] = ()
    batch_size: PositiveInt  # windows in one forward pass
    own_context: PositiveInt  # tokens in a window for `views`, or fewer if the model's context is shorter
    stride_share: PositiveShare  # for the view `strided`: step between windows, divided by their length


class Source(Section):
    """The published text of a task: a local file, or a file of a repository on the Hugging Face hub."""

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
    """The tasks of every neural model: predict last words (cloze, LAMBADA), and score WikiText's text."""

    cloze_items: NonNegativeInt  # maximum number of val passages whose last word a model predicts
    cloze_characters: PositiveInt  # approximate length of the text before the predicted word
    lambada: Source | None = None
    lambada_original: Source | None = None
    wikitext: dict[Name, Source]  # name in the report -> text of a test split
    wikitext_context: PositiveInt
    wikitext_stride: PositiveInt


class Text(Section):
    prompts: tuple[str, ...]
    documents: Annotated[int, Field(ge=2)]  # number of val documents whose first tokens are prompts
    prompt_tokens: PositiveInt  # number of tokens in each prompt from a val document
    max_new_tokens: Annotated[int, Field(ge=5)]
    temperature: PositiveFloat  # of top-k sampling
    top_k: PositiveInt
    top_p: PositiveShare  # of nucleus sampling
    batch_size: PositiveInt  # number of texts that are generated at once
    seed: Seed


class Evaluation(Section):
    likelihood: Likelihood
    tasks: Tasks
    text: Text


class _Labelled(Section):
    label: str = ""  # name of the baseline in tables; empty: its key in `specs`


class Unigram(_Labelled):
    """A model that knows only the token frequencies of the train split."""

    kind: Literal["unigram"]


class Compressor(_Labelled):
    kind: Literal["compressor"]
    codec: Literal["xz", "zstd"]
    level: PositiveInt
    train_megabytes: NonNegativeInt  # size of the dictionary, made of train text; 0: no dictionary

    def _mistakes(self) -> Iterator[str]:
        if self.level > (highest := {"xz": 9, "zstd": 22}[self.codec]):
            yield f"level ({self.level}) must be at most {highest} for {self.codec}"
        if self.codec == "xz" and self.train_megabytes:
            yield "train_megabytes must be 0 for xz: only zstd takes a dictionary"


class Ngram(_Labelled):
    kind: Literal["ngram"]
    order: Annotated[int, Field(ge=3, le=5)]  # tokens in the longest n-gram
    train_tokens: PositiveInt  # maximum number of train tokens, from the start of the split


class Gguf(_Labelled):
    """A language model in a GGUF file, which a wheel of the package index contains."""

    kind: Literal["gguf"]
    wheel: Wheel
    file: str  # path inside the wheel
    sha256: Sha256


class Folder(_Labelled):
    """A causal language model in a local folder, in Hugging Face's format with safetensors weights."""

    kind: Literal["folder"]
    path: UserPath
    sha256: Sha256 | None = None  # hash of the folder; None: the baseline's stage stops and prints the hash


class Hub(_Labelled):
    """A causal language model on the Hugging Face hub at a commit, with safetensors weights."""

    kind: Literal["hub"]
    repo: HubRepository
    revision: HubCommit


BaselineSpec = Annotated[Unigram | Compressor | Ngram | Gguf | Folder | Hub, Field(discriminator="kind")]


class Baseline(Section):
    names: tuple[Name, ...]  # the baselines that the pipeline runs
    specs: dict[Name, BaselineSpec]

    def _mistakes(self) -> Iterator[str]:
        if missing := [name for name in self.names if name not in self.specs]:
            yield f"names {missing} have no entry in specs; specs has {sorted(self.specs)}"
        if len(set(self.names)) != len(self.names):
            yield f"names {list(self.names)} must be different from each other"


class ExpectedLoss(Section):
    """A predicted loss in nats per token, with its 80 % and 95 % intervals."""

    value: Loss
    low_80: Loss
    high_80: Loss
    low_95: Loss
    high_95: Loss
    basis: str  # how `value` was predicted


class NoteRun(Model):
    max_steps: PositiveInt
    tokens_per_step: PositiveInt
    micro_batch_size: PositiveInt
    corpus_tokens: PositiveInt  # tokens of OpenWebText's train split
    hand_set_loss: ExpectedLoss


class Machine(Section):
    peak_teraflops: PositiveFloat  # highest speed of the device, in 10^12 FLOPs per second
    utilisation: PositiveShare  # share of peak_teraflops that training reaches
    source: str


class Run(Section):
    """The model size and the number of training tokens of a training run."""

    num_params: PositiveInt  # number of parameters without position embeddings
    num_params_non_embedding: PositiveInt
    max_steps: PositiveInt
    tokens_per_step: PositiveInt

    @property
    def tokens(self) -> int:
        """Number of tokens in all steps; a token that is trained on twice counts twice."""
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
    assumed_budget: bool = False  # True: max_steps is a guess, so no forecast uses this run


class Estimate(Section):
    note: NoteRun
    corpus_tokens: dict[Name, PositiveInt] = Field(default_factory=dict)  # data set -> its number of tokens
    machines: Annotated[dict[Name, Machine], Field(min_length=1)]
    anchors: Annotated[tuple[Anchor, ...], Field(min_length=1)]  # finished runs with a known loss


class Comparison(Section):
    language: Literal["en", "fr"]  # language of the Markdown reports and the plots


class Regression(Section):
    """The limits of `compactgpt gate`: how much worse a metric may become."""

    false_alarms: Annotated[float, Field(gt=0, lt=0.5)]  # probability that the gate fails by chance
    fallback_noise: NonNegativeFloat  # standard deviation of the loss between seeds; used if not measured
    max_documents: PositiveInt  # maximum number of val documents that a reference of the gate stores
    max_baseline_change: NonNegativeFloat  # maximum change of a baseline's loss since the reference, in nats
    min_throughput_ratio: PositiveFloat  # minimum of our training speed divided by nanoGPT's
    # Metric -> how much worse it may get: 0.02 lets a perplexity rise by 2 %, and an accuracy fall by 0.02.
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
            advice = "put a space after the dollar sign (`$ {`)"
            yield f"found {found[1]!r}: `dvc exp run -S` would read `${{...}}` as a variable, so {advice}"
        for pattern in self.download.files.patterns if self.download.corpus == "files" else ():
            if not pattern.startswith("corpus/") or ".." in pattern:
                rule = "a pattern must begin with corpus/, the folder that DVC tracks, and must not have `..`"
                advice = "copy your text there with `dvc add PATH -o corpus/NAME`"
                yield f"download.files.patterns: found {pattern}; {rule}: {advice}"
        if (window := self.evaluation.likelihood.window) > longest:
            yield f"evaluation.likelihood.window ({window}) must be at most model.block_size ({longest})"


def load_params(path: Path) -> Params:
    """Return the checked parameters of params.yaml.

    Raises MissingInput if the file is missing, BadConfig if it is not valid.
    """
    return load_section(path, Params)


def parse_params(tree: Any, source: str = "params.yaml") -> Params:
    """Return parsed YAML as checked parameters.

    Raises BadConfig if a parameter is not valid. `source` is the file name in the error message.
    """
    return check_section(tree, Params, source)
