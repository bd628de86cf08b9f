"""What the tests of corpora share: the section `download` with other values, and a corpus as documents."""

import json
from pathlib import Path

from compactgpt.common.console import silent
from compactgpt.common.sections import read_yaml
from compactgpt.config import Download
from compactgpt.data.documents import Corpus, read_row_group, row_groups
from compactgpt.data.sources import Limits, collect, open_corpus
from compactgpt.tracking.dvc_files import ignored_files

ROOT = Path(__file__).parents[2]
ALL = Limits(10**6)
DOWNLOAD = read_yaml(ROOT / "params.yaml")["download"]


def download_params(**changes) -> Download:
    """Section `download` of params.yaml, with some keys of its parts replaced."""
    for name, value in changes.items():
        changes[name] = DOWNLOAD[name] | value if isinstance(value, dict) else value
    return Download.model_validate_json(json.dumps(DOWNLOAD | changes))


def collect_in(folder: Path, corpus: Corpus, limits: Limits = ALL, log=lambda _: None):
    """Write `folder`/documents, with the state next to it; return the report and the documents."""
    report = collect(corpus, folder / "documents", limits, state=folder / "state", log=log)
    return report, [each for group in row_groups(folder / "documents") for each in read_row_group(group)]


def write_corpus(folder: Path, params: Download, num_workers: int = 1, log=lambda _: None):
    """Write the corpus that `params` names; patterns are relative to `folder`. See `collect_in`."""
    corpus = open_corpus(params, folder, num_workers, silent, log, ignored_files(folder))
    return collect_in(folder, corpus, log=log)
