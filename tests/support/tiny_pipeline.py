"""The whole pipeline on a few dozen documents, run stage by stage in this process, for the tests of faults.

A place is a project folder without git: params.yaml, a corpus, `data`, `models`, `reports`. Every stage runs
its real script. The second generation of inputs replaces each output of the first.
"""

import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path

from ruamel.yaml import YAML

from compactgpt.common.sections import read_yaml
from compactgpt.experiments import merge_patch
from tests.support.tiny_corpus import tokenizer_files

ROOT = Path(__file__).parents[2]
BASELINES = ("unigram", "xz")
STAGES = (
    "estimate", "download", "validation", "tokenization", "inspection", "training", "evaluation",
    *(f"baseline@{name}" for name in BASELINES), "comparison",
)  # fmt: skip
WORDS = (
    "hello", "well", "then", "low", "held", "world", "whole", "wheel", "other", "weather", "willow", "yellow",
)  # fmt: skip

# What stages import as they run, and nothing that starts a thread.
IMPORTED = (
    "pandas", "pyarrow.parquet", "tiktoken", "great_expectations.render.renderer.site_builder", "scipy.stats",
    "gigatoken", "torch._dynamo", "torch.optim", "matplotlib.pyplot", "scipy.optimize",
)  # fmt: skip


def make_place(place: Path) -> Path:
    """Create a project folder: code as links, and the tokenizer as if it was downloaded before."""
    (place / "corpus").mkdir(parents=True)
    for name in ("src", "stages"):
        (place / name).symlink_to(ROOT / name)
    for name in ("claims.yaml", "published.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, place / name)
    (place / "results").mkdir()
    wheels = place / ".state/wheels"
    wheels.mkdir(parents=True)
    for content in tokenizer_files():
        (wheels / hashlib.sha256(content).hexdigest()).write_bytes(content)
    return place


def write_inputs(place: Path, generation: int) -> None:
    """Write params and corpus of a generation: the outputs of every stage differ from those of the other."""
    (place / "params.yaml").write_text(json.dumps(params_tree(generation)))  # JSON is YAML
    rows = [
        {"text": " ".join(WORDS[(n * k + generation) % len(WORDS)] for k in range(1, 30)) + f" {n}"}
        for n in range(30 + generation)
    ]
    (place / "corpus/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def params_tree(generation: int) -> dict:
    """Return the project's params.yaml with tiny values."""
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    vocab_bpe, encoder_json = (hashlib.sha256(content).hexdigest() for content in tokenizer_files())
    vocab = len(json.loads(tokenizer_files()[1]))
    tiny = f"""
runtime: {{device: cpu, num_threads: 1, num_workers: 1}}
download:
  corpus: files
  shard_megabytes: 1
  files: {{patterns: [corpus/*.jsonl]}}
  tokenizer: {{vocab_bpe_sha256: "{vocab_bpe}", encoder_json_sha256: "{encoder_json}"}}
validation: {{min_documents: {10 + generation}, min_characters: 1, min_total_megabytes: 0.001}}
tokenization: {{val_fraction: 0.3}}
inspection: {{min_val_documents: 1, max_val_deviation: 50.0, max_listed: {5 + generation},
  max_leaked_share: 1.0, max_repeated_share: 1.0}}
model: {{block_size: 16, n_layer: 1, n_head: 2, n_embd: 16, vocab_size: {vocab},
  padded_vocab_size: {vocab + 10}}}
training: {{max_steps: {3 + generation}, tokens_per_step: 32, micro_batch_size: 2, warmup_steps: 1,
  eval_interval: 2, eval_windows: 2, checkpoint_interval: 2, seed: {generation}}}
evaluation:
  likelihood: {{window: 16, batch_size: 8, own_context: 16, views: [], stride_share: {(1 + generation) / 10}}}
  tasks: {{cloze_items: 2, cloze_characters: 20}}
  text: {{prompts: [hello], documents: 2, prompt_tokens: 4, max_new_tokens: 5}}
"""
    merge_patch(tree, YAML(typ="safe", pure=True).load(tiny))
    specs = {name: tree["baseline"]["specs"][name] for name in BASELINES}
    tree["baseline"] = {"names": list(BASELINES), "specs": specs}
    return tree


def run_stage(stage: str, place: Path, tracker: str = "mlflow") -> None:
    """Run the script of a stage in this process, as `python -m stages.X` would; SystemExit has the code."""
    from compactgpt.data import documents, sources
    from compactgpt.tracking import mlflow_logger

    os.environ.pop("DVC_STAGE", None)
    os.environ.pop("DVC_ROOT", None)
    os.chdir(place)
    sources.MEGABYTE = 1500  # several shards of the few texts,
    documents.ROW_GROUP_BYTES = 500  # and several pieces of each
    mlflow_logger.start_logger = lambda folder: None  # a process of its own: tests/tracking/test_tracking.py
    name, _, item = stage.partition("@")
    script = importlib.import_module(f"stages.{name}")
    script.app([*([item] if item else []), "--tracker", tracker], prog_name=name)


def outs_of(stage: str) -> list[str]:
    """Return the outputs of a stage, as dvc.yaml names them."""
    name, _, item = stage.partition("@")
    tree = read_yaml(ROOT / "dvc.yaml")["stages"][name]
    outs = [out for key in ("outs", "metrics", "plots") for out in tree.get(key, ())]
    paths = [next(iter(out)) if isinstance(out, dict) else out for out in outs]
    return [path.replace("${item.name}", item) for path in paths]


def warm_up(stages: tuple[str, ...] = STAGES) -> None:
    """Import the stages' scripts, the whole library, and what both import as they run."""
    modules = (path.relative_to(ROOT / "src").with_suffix("") for path in (ROOT / "src").rglob("*.py"))
    names = [
        ".".join(path.parts) for path in modules if path.stem not in ("__init__", "cross_entropy_triton")
    ]
    scripts = [f"stages.{path.stem}" for path in (ROOT / "stages").glob("[a-z_]*.py")]
    for name in (*IMPORTED, *sorted(names), *scripts):
        importlib.import_module(name)
