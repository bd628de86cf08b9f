"""A data set of the Hugging Face hub as a corpus.

The library `datasets` streams the rows of one commit in their order. If params.yaml has the SHA-256 of the
text, the data set is read twice: first to compare the hash. A local text file is a data set of one row.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadConfig, BadData
from compactgpt.config import Download, HubSet
from compactgpt.data.documents import Corpus, Part, Text, check_size, text_of_row
from compactgpt.data.hub import check_data_set, hub_errors, local_copy, one_line

_PROGRESS_ROWS = 1000


def hub_corpus(params: Download, progress: Progress) -> Corpus:
    """Return the data set `download.hub.name` as a corpus; the first read opens it.

    The position of a text is [index of the split, number of completed rows, state of the `datasets` iterator
    after these rows, number of texts that were read from the next row].
    """
    data_set = _DataSet(params)
    chosen, copy = data_set.chosen, data_set.copy
    paths = sorted(path for path in [copy, *copy.rglob("*")] if path.is_file()) if copy else []
    files = [[path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    identity = [chosen.model_dump(mode="json"), params.max_row_megabytes, files]

    def read(position: Any) -> Iterator[Text]:
        check_data_set(params.hub)
        data_set.check_hash()
        first_split, rows, state, done = position or (0, 0, None, 0)
        for split in range(first_split, len(chosen.splits)):
            for row, before, texts in data_set.texts(split, rows, state):
                if row % _PROGRESS_ROWS == 0:
                    progress(row, 0)  # 0, since the total number of rows is unknown
                for number, text in enumerate(texts[done:], done + 1):
                    yield Text(
                        text, f"{data_set.names[split]}:{row}", split, [split, row - 1, before, number]
                    )
                done = 0
            rows, state, done = 0, None, 0

    parts = [Part(name, chosen.revision, chosen.licence) for name in data_set.names]
    return Corpus("hub", identity, parts, read)


class _DataSet:
    """Reads the rows and the texts of one data set.

    Raises Unreachable if the hub does not answer, and BadConfig if the settings do not fit the data set.
    Raises BadData if a file is damaged, a row has no text or is too long, or the hash differs.
    """

    def __init__(self, params: Download) -> None:
        self.copy = local_copy(params.hub)
        self.chosen: HubSet = params.hub.sets[params.hub.name]
        self._is_text = self.copy is not None and not self.copy.is_dir()
        if self.copy is not None and self._is_text:
            self.chosen = self.chosen.model_copy(update={"splits": (self.copy.name,)})
        self.names = [f"{self.chosen.repo}/{split}" for split in self.chosen.splits]
        self._key = f"download.hub.sets.{params.hub.name}"
        self._max_row_megabytes = params.max_row_megabytes

    def check_hash(self) -> None:
        """Compare the SHA-256 of all text with the hash in params.yaml, if there is one."""
        if self.chosen.sha256 is None:
            return
        hasher = hashlib.sha256()
        for split in range(len(self.chosen.splits)):
            for _, _, text in self._rows(split, 0, None):
                hasher.update(text.encode("utf-8"))
        found, expected = hasher.hexdigest(), self.chosen.sha256
        if found != expected:
            raise BadData(
                f"the text of {self.copy if self._is_text else self.chosen.repo} has SHA-256 {found}, "
                f"{self._key}.sha256 expects {expected}: use the expected text, or correct the hash"
            )

    def texts(self, split: int, rows: int, state: Any) -> Iterator[tuple[int, Any, list[str]]]:
        """Yield (row number, state of the `datasets` iterator before the row, texts that begin in the row).

        The first `rows` rows are skipped; `state` is the iterator's state after them. A text is one row,
        several rows (setting `opens_document`), or a part of a row (setting `separator`).
        """
        if self.chosen.opens_document is None:
            for row, before, text in self._rows(split, rows, state):
                yield row, before, _split_row(text, self.chosen)
            return
        opens = re.compile(self.chosen.opens_document)
        joined: list[str] = []
        first, state_before, size = 0, state, 0
        for row, before, text in self._rows(split, rows, state):
            if joined and opens.fullmatch(text):
                yield first, state_before, ["".join(joined)]
                joined = []
            if not joined:
                first, state_before, size = row, before, 0
            joined.append(text)
            size += len(text)
            # Without a match of `opens_document`, all rows become one text.
            check_size(size, f"{self.names[split]}:{first}", "max_row_megabytes", self._max_row_megabytes)
        if joined:
            yield first, state_before, ["".join(joined)]

    def _rows(self, split: int, rows: int, state: Any) -> Iterator[tuple[int, Any, str]]:
        """Yield (row number from 1, state of the iterator before the row, text); arguments as in `texts`."""
        with self._errors():
            data = self._open(self.chosen.splits[split])
            if state is not None:
                data.load_state_dict(state)
            before = state or data.state_dict()
            for row, values in enumerate(data, rows + 1):  # `values` maps a column name to a value
                where = f"{self.names[split]}, row {row:,}"
                text = text_of_row(values, where, self.chosen.text_column, self._key)
                check_size(len(text), where, "max_row_megabytes", self._max_row_megabytes)
                yield row, before, text
                before = data.state_dict()

    def _open(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # `_errors` reports the errors
        if self._is_text:
            # `sample_by` makes the complete file one row.
            options = {"data_files": str(self.copy), "sample_by": "document", "split": "train"}
            return datasets.load_dataset("text", **options, streaming=True)
        source, revision = self.chosen.repo, self.chosen.revision
        if self.copy is not None:
            # The library may take a relative path for a repository name.
            source, revision = str(self.copy.resolve()), None
        return datasets.load_dataset(
            source, self.chosen.config, split=split, revision=revision, streaming=True
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow as pa

        where = str(self.copy or self.chosen.repo)
        try:
            with nullcontext() if self.copy else hub_errors(where, f"correct {self._key}"):
                yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise BadData(
                f"a file of {where} is damaged, or was cut short, or `datasets` can't read it "
                f"({one_line(error)})"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise BadConfig(
                f"{where} can't be read with the settings in {self._key}: {one_line(error)}"
            ) from error


def _split_row(text: str, chosen: HubSet) -> list[str]:
    """Cut a row at `separator`; join the parts to texts of at least `join_characters`."""
    if chosen.separator is None:
        return [text]
    texts: list[str] = []
    joined: list[str] = []
    for part in text.split(chosen.separator):
        joined.append(part)
        document = chosen.separator.join(joined)
        if len(document) >= (chosen.join_characters or 0):
            texts.append(document)
            joined = []
    return [*texts, chosen.separator.join(joined)] if joined else texts
