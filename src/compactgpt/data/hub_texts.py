"""A data set of the Hugging Face hub as a corpus.

The library `datasets` streams the rows of a pinned commit in their order, without copying them to its cache:
only the document shards store the text. params.yaml may have the SHA-256 of the text of a small data set; the
data set is then read twice. A local copy of the text (`file`) is read as a data set of one row.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.config import Download
from compactgpt.data.documents import MEGABYTE, Corpus, Part, Text
from compactgpt.data.hub import hub_errors, one_line, require_on_hub
from compactgpt.data.inputs import check_files, regular_status

_PROGRESS_ROWS = 1000


class _Position(NamedTuple):
    """The position where reading resumes: a row, and how many of its texts to skip."""

    split: int
    row: int = 0  # number of rows of the split that were read completely
    state: Any = None  # state of the `datasets` iterator before the current row; None at the start
    texts: int = 0  # number of texts of the current row that were read


def hub_corpus(params: Download, progress: Progress) -> Corpus:
    """Return the data set `download.hub.name` as a corpus; the first read opens it."""
    data_set = _DataSet(params)
    data, mirror = data_set.params, data_set.mirror
    paths = [] if mirror is None else sorted(path for path in mirror.rglob("*") if path.is_file())
    paths += [] if data_set.file is None else [data_set.file]
    files = [[path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    identity = [data.model_dump(mode="json"), params.max_row_megabytes, files]

    def read(position: Any) -> Iterator[Text]:
        data_set.check_source()
        data_set.check_hash()  # before the first text is used
        start = _Position(*(position or [0]))
        while start.split < len(data.splits):
            for text, row, after in data_set.documents(start):
                if row % _PROGRESS_ROWS == 0:  # the total number of rows is unknown
                    progress(row, 0)
                yield Text(text, f"{data_set.name(start)}:{row}", start.split, list(after))
            start = _Position(start.split + 1)

    parts = [Part(f"{data.repo}/{split}", data.revision, data.licence) for split in data.splits]
    return Corpus("hub", identity, parts, read)


class _DataSet:
    """Reads the rows and the documents of one data set.

    Raises:
        Unreachable: the hub does not answer.
        BadConfig: params.yaml has no commit, or the hub does not have the data set, commit or split.
        BadData: a file is damaged, a text is missing or too long, or the hash of the text differs.
        MissingInput: the folder `download.hub.mirror` is missing, or the local copy is a link to nothing.
    """

    def __init__(self, params: Download) -> None:
        self.params = params.hub.sets[params.hub.name]
        self.mirror = None if params.hub.mirror is None else Path(params.hub.mirror)
        self.file: Path | None = None  # a local copy of the text, read instead of the hub
        self._key = f"download.hub.sets.{params.hub.name}"
        self._advice = f"correct {self._key}, or name a copy of the repository in download.hub.mirror"
        if self.params.file is not None and self.mirror is None:
            self._advice = f"bring the text: curl -fLo {self.params.file} {self.params.file_url}"
            if os.path.lexists(self.params.file):
                self.file = Path(self.params.file)
                regular_status(self.file, str(self.file))  # `datasets` would wait for a named pipe
                self.params = self.params.model_copy(update={"splits": (self.file.name,)})
        self._max_row_megabytes = params.max_row_megabytes

    def name(self, position: _Position) -> str:
        """Return the name of a position's split: repository/split."""
        return f"{self.params.repo}/{self.params.splits[position.split]}"

    def check_source(self) -> None:
        """Check that the mirror folder exists, or that the hub has the commit."""
        if self.mirror is not None:
            if not self.mirror.is_dir():
                raise MissingInput(f"download.hub.mirror: there is no folder {self.mirror}")
            check_files(self.mirror)  # `datasets` would wait for a named pipe
            return
        if self.file is not None:
            return
        if self.params.revision is None:
            raise BadConfig(
                f"{self._key}.revision is empty: write the commit there (40 hex digits), as `git ls-remote` "
                "shows it for the data set's repository; a branch moves, a commit does not"
            )
        require_on_hub("dataset", self.params.repo, self.params.revision, self._advice)

    def check_hash(self) -> None:
        """Compare the SHA-256 of all text with the one in params.yaml, if there is one."""
        if self.params.sha256 is None:
            return
        hasher = hashlib.sha256()
        for split in range(len(self.params.splits)):
            for text, _, _ in self._rows(_Position(split)):
                hasher.update(text.encode("utf-8"))
        found, expected = hasher.hexdigest(), self.params.sha256
        if found != expected:
            raise BadData(
                f"the text of {self.file or self.params.repo} has SHA-256 {found}, {self._key}.sha256 "
                f"expects {expected}: use the expected text, or correct the hash"
            )

    def documents(self, start: _Position) -> Iterator[tuple[str, int, _Position]]:
        """Yield (text of a document, number of its first row, position after the document).

        A document is one row, several rows (`opens_document`), or a part of a row (`separator`). Neighbouring
        parts are joined until a document has `join_characters`.
        """
        if self.params.opens_document is not None:
            yield from self._joined_rows(start, re.compile(self.params.opens_document))
            return
        for text, row, before in self._rows(start):
            texts = [text] if self.params.separator is None else text.split(self.params.separator)
            # A resumed run reads its last row again, and skips the texts that it has already stored.
            done = start.texts if row == start.row + 1 else 0
            separator, least = self.params.separator or "", self.params.join_characters or 0
            first = done  # index of the document's first text
            for end in range(done + 1, len(texts) + 1):
                document = separator.join(texts[first:end])
                if end == len(texts) or len(document) >= least:
                    yield document, row, before._replace(texts=end)
                    first = end

    def _joined_rows(self, start: _Position, opens: re.Pattern[str]) -> Iterator[tuple[str, int, _Position]]:
        joined: list[str] = []
        first = size = 0
        for text, row, before in self._rows(start):
            if joined and opens.fullmatch(text):
                # This row belongs to the next document: resume before it.
                yield "".join(joined), first, before
                joined, size = [], 0
            first = first if joined else row
            joined.append(text)
            size += len(text)
            self._check_size(size, start, first)  # without a match, all rows are joined
        if joined:
            yield "".join(joined), first, _Position(start.split + 1)

    def _rows(self, start: _Position) -> Iterator[tuple[str, int, _Position]]:
        """Yield (text, row number from 1, position before the row)."""
        column = self.params.text_column
        with self._errors():
            data = self._open(self.params.splits[start.split])
            if start.state is not None:
                data.load_state_dict(start.state)
            before = _Position(start.split, start.row, start.state or data.state_dict())
            for row, values in enumerate(data, start.row + 1):  # values: dict of all columns
                text = values.get(column)
                if not isinstance(text, str):
                    found = f"columns {sorted(values)}" if column not in values else type(text).__name__
                    raise BadData(
                        f"{self.name(start)}, row {row:,}: found {found}, "
                        f"expected text in {self._key}.text_column ({column!r})"
                    )
                self._check_size(len(text), start, row)
                yield text, row, before
                before = _Position(start.split, row, data.state_dict())

    def _check_size(self, size: int, position: _Position, row: int) -> None:
        if size > self._max_row_megabytes * MEGABYTE:
            raise BadData(
                f"{self.name(position)}:{row} is longer than {self._max_row_megabytes:,} MB "
                "(download.max_row_megabytes): raise the limit"
            )

    def _open(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # `_errors` reports the errors
        if self.mirror is not None:
            # Resolve the path: the library may take a relative path for a repository name.
            source, revision = str(self.mirror.resolve()), None
        elif self.file is not None:
            options = {"data_files": str(self.file), "sample_by": "document", "split": "train"}  # one row
            return datasets.load_dataset("text", **options, streaming=True)
        else:
            source, revision = self.params.repo, self.params.revision
        return datasets.load_dataset(
            source, self.params.config, split=split, revision=revision, streaming=True
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow as pa

        local = self.mirror or self.file
        where = self.params.repo if local is None else str(local)
        try:
            with hub_errors(where, self._advice) if local is None else nullcontext():
                yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            problem = f"is damaged, or was cut short, or `datasets` can't read it ({one_line(error)})"
            if "BatchSize" in str(error):  # `datasets` takes the first row group's size for all
                problem = "is a parquet file whose first row group is empty, which `datasets` can't read"
            raise BadData(f"a file of {where} {problem}") from error
        except (ValueError, RuntimeError) as error:
            raise BadConfig(
                f"{where} can't be read with the settings in {self._key}: {one_line(error)}"
            ) from error
