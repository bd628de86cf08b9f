"""Read a data set of the Hugging Face hub as a corpus.

The library `datasets` streams the rows of the data set. A local text file is a data set of one row.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadConfig, BadData
from compactgpt.config import Download, HubSet
from compactgpt.data.documents import Corpus, Part, Text, check_size, text_of_row
from compactgpt.data.hub import check_data_set, hub_errors, local_copy, one_line

_PROGRESS_ROWS = 1000


class _Position(NamedTuple):
    """The position in a data set at which the stage `download` resumes after a stop."""

    split: int = 0  # index in `HubSet.splits`
    rows: int = 0  # number of rows to skip at the beginning of this split
    state: Any = None  # state of the `datasets` iterator after the skipped rows; None: no row is skipped
    texts: int = 0  # number of texts to skip at the beginning of the first row that is not skipped


class _Row(NamedTuple):
    number: int  # from 1
    before: Any  # state of the `datasets` iterator just before it yields this row
    text: str


def hub_corpus(params: Download, progress: Progress) -> Corpus:
    """Return the data set `download.hub.name` as a corpus. `Corpus.read` opens the data set later."""
    data_set = _DataSet(params)
    chosen, copy = data_set.chosen, data_set.copy
    paths = sorted(path for path in [copy, *copy.rglob("*")] if path.is_file()) if copy else []
    files = [[path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    identity = [chosen.model_dump(mode="json"), params.max_row_megabytes, files]

    def read(position: Any) -> Iterator[Text]:
        check_data_set(params.hub)
        data_set.check_hash(progress)
        start = _Position(*(position or ()))
        for split in range(start.split, len(chosen.splits)):
            for row, texts in data_set.texts(split, start.rows, start.state):
                if row.number % _PROGRESS_ROWS == 0:
                    progress(row.number, 0)  # 0, since the total number of rows is unknown
                source = f"{data_set.names[split]}:{row.number}"
                done = start.texts if row.number == start.rows + 1 else 0
                for number, text in enumerate(texts[done:], done + 1):
                    yield Text(text, source, split, _Position(split, row.number - 1, row.before, number))
            start = _Position()  # the next split is read from its beginning

    parts = [Part(name, chosen.revision, chosen.licence) for name in data_set.names]
    return Corpus("hub", identity, parts, read)


class _DataSet:
    """Reads the rows of one data set, and cuts or joins rows to texts."""

    def __init__(self, params: Download) -> None:
        self.copy = local_copy(params.hub)
        self.chosen: HubSet = params.hub.sets[params.hub.name]
        self._is_text = self.copy is not None and not self.copy.is_dir()
        if self.copy is not None and self._is_text:
            self.chosen = self.chosen.model_copy(update={"splits": (self.copy.name,)})
        self.names = [f"{self.chosen.repo}/{split}" for split in self.chosen.splits]
        self._key = f"download.hub.sets.{params.hub.name}"
        self._max_row_megabytes = params.max_row_megabytes

    def check_hash(self, progress: Progress) -> None:
        """Raise BadData if the text of all rows does not have the SHA-256 that params.yaml gives.

        Without a SHA-256, also raises BadData for a local copy: DVC does not see changes in the copy.
        """
        if self.chosen.sha256 is None and self.copy is None:
            return
        hasher = hashlib.sha256()
        for split in range(len(self.chosen.splits)):
            for row in self._rows(split):
                hasher.update(row.text.encode("utf-8"))
                if row.number % _PROGRESS_ROWS == 0:
                    progress(row.number, 0)
        found, expected = hasher.hexdigest(), self.chosen.sha256
        if expected is None:
            raise BadData(
                f"{self.copy} is a local copy, and DVC does not see changes in it: if it has the right text, "
                f"write `sha256: {found}` below {self._key} in params.yaml"
            )
        if found != expected:
            raise BadData(
                f"the text of {self.copy or self.chosen.repo} has SHA-256 {found}, "
                f"{self._key}.sha256 expects {expected}: use the expected text, or correct the hash"
            )

    def texts(self, split: int, rows: int, state: Any) -> Iterator[tuple[_Row, list[str]]]:
        """Yield (row, list of the texts that begin in the row). Rows in which no text begins are left out.

        A text is one row, several joined rows, or a part of a row. `split` is an index in `HubSet.splits`.
        The first `rows` rows are skipped. `state` is the state of the `datasets` iterator after these rows,
        or None to start with the first row.
        """
        opens_document = self.chosen.opens_document
        if opens_document is None:
            for row in self._rows(split, rows, state):
                yield row, _split_row(row.text, self.chosen)
            return
        first: _Row | None = None  # the row in which the current text begins
        joined: list[str] = []
        size = 0
        for row in self._rows(split, rows, state):
            if first and opens_document.fullmatch(row.text):
                yield first, ["".join(joined)]
                first, joined, size = None, [], 0
            first = first or row
            joined.append(row.text)
            size += len(row.text)
            # Limit the joined text: if no row matches `opens_document`, all rows would be joined in memory.
            where = f"{self.names[split]}:{first.number}"
            check_size(size, where, "max_row_megabytes", self._max_row_megabytes)
        if first:
            yield first, ["".join(joined)]

    def _rows(self, split: int, rows: int = 0, state: Any = None) -> Iterator[_Row]:
        with self._errors():
            data = self._open(self.chosen.splits[split])
            if state is not None:
                data.load_state_dict(state)
            before = state or data.state_dict()
            for number, values in enumerate(data, rows + 1):  # `values` maps a column name to a value
                where = f"{self.names[split]}, row {number:,}"
                text = text_of_row(values, where, self.chosen.text_column, self._key)
                check_size(len(text), where, "max_row_megabytes", self._max_row_megabytes)
                yield _Row(number, before, text)
                before = data.state_dict()

    def _open(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # no second message: `_errors` reports the errors
        if self._is_text:
            # sample_by="document": the file is one row, not one row for each line.
            options = {"data_files": str(self.copy), "sample_by": "document", "split": "train"}
            return datasets.load_dataset("text", **options, streaming=True)
        source, revision = self.chosen.repo, self.chosen.revision
        if self.copy is not None:
            # Make the path absolute, because `datasets` may read a relative path as a repository name.
            source, revision = str(self.copy.resolve()), None
        return datasets.load_dataset(
            source, self.chosen.config, split=split, revision=revision, streaming=True
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of `datasets` into user errors.

        Raises BadData for a damaged file and BadConfig for wrong settings. Without a local copy of the data
        set, also raises Unreachable if the hub does not answer.
        """
        import pyarrow as pa

        where = str(self.copy or self.chosen.repo)
        try:
            with nullcontext() if self.copy else hub_errors(where, f"correct {self._key}"):
                yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise BadData(
                f"a file of {where} is damaged, or was cut short ({one_line(error)}): get a new copy of it"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise BadConfig(
                f"{where} can't be read with the settings in {self._key}: {one_line(error)}"
            ) from error


def _split_row(text: str, chosen: HubSet) -> list[str]:
    """Cut a row at `chosen.separator` into parts, then join adjacent parts to texts.

    Each text except the last has at least `chosen.join_characters` characters.
    """
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
