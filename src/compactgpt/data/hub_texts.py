"""A data set of the Hugging Face hub as a corpus: streamed by `datasets` at a pinned commit, in its order.

Nothing is copied to the library's cache: what has been read is in our shards only. A small set without a
commit is pinned by the hash of its text, for which it is read twice.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.config import Download, HubSet
from compactgpt.data.documents import MEGABYTE, Corpus, Part, Text
from compactgpt.data.hub import hub_errors, one_line, require_on_hub
from compactgpt.data.inputs import check_files

_PROGRESS_ROWS = 1000


def hub_corpus(params: Download, progress: Progress) -> Corpus:
    """Return the data set that `download.hub.name` names as a corpus; it is opened when it is first read."""
    data = params.hub.sets[params.hub.name]
    mirror = None if params.hub.mirror is None else Path(params.hub.mirror)
    paths = [] if mirror is None else sorted(path for path in mirror.rglob("*") if path.is_file())
    files = [[path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    parts = [Part(f"{data.repo}/{split}", data.revision, data.licence) for split in data.splits]
    reader = _Reader(data, f"download.hub.sets.{params.hub.name}", mirror, params.max_row_megabytes)
    identity = [data.model_dump(mode="json"), params.max_row_megabytes, files]
    return Corpus("hub", identity, parts, partial(reader.read, progress))


class _Reader:
    """Reads the documents of one data set.

    A position is a dict: `split` (index), `row` (rows of the split before the current one), `state` (that of
    the library before the current row; None at the beginning), `texts` (of the current row that were read).
    """

    def __init__(self, data: HubSet, key: str, mirror: Path | None, max_row_megabytes: int) -> None:
        self._set, self._key, self._mirror = data, key, mirror  # `key`: in params.yaml, for messages
        self._max_row_megabytes = max_row_megabytes

    def read(self, progress: Progress, position: Any) -> Iterator[Text]:
        """Yield the texts after a position.

        Raises:
            Unreachable: the hub does not answer.
            BadConfig: the set has no commit, or the hub has no such set, commit, split or column.
            BadData: a file is damaged, a text is too long, or the hash of the text differs.
            MissingInput: the folder of the mirror is missing.
        """
        self._check_source()
        self._check_hash()
        position = position or _start(0)
        for split in range(position["split"], len(self._set.splits)):
            start = position if split == position["split"] else _start(split)
            for text, row, after in self._documents(start):
                if row % _PROGRESS_ROWS == 0:
                    progress(row, 0)
                yield Text(text, f"{self._set.repo}/{self._set.splits[split]}:{row}", split, after)

    def _check_source(self) -> None:
        if self._mirror is not None:
            if not self._mirror.is_dir():
                raise MissingInput(f"download.hub.mirror: there is no folder {self._mirror}")
            check_files(self._mirror)
            return
        if self._set.revision is None:
            raise BadConfig(
                f"{self._key}.revision is empty: write the commit there (40 hex digits), as `git ls-remote` "
                "shows it for the data set's repository; a branch moves, a commit does not"
            )
        require_on_hub("dataset", self._set.repo, self._set.revision, self._advice)

    @property
    def _advice(self) -> str:
        return f"correct {self._key}, or name a copy of the repository in download.hub.mirror"

    def _check_hash(self) -> None:
        if self._set.sha256 is None:
            return
        hasher = hashlib.sha256()
        for split in range(len(self._set.splits)):
            for text, _, _ in self._rows(_start(split)):
                hasher.update(text.encode("utf-8"))
        if hasher.hexdigest() != self._set.sha256:
            raise BadData(
                f"the text of {self._set.repo} has SHA-256 {hasher.hexdigest()}, {self._key}.sha256 expects "
                f"{self._set.sha256}: use the expected data set, or correct the hash"
            )

    def _documents(self, start: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield (document, its first row, position after it): rows as they are, split, or joined."""
        if self._set.opens_document is not None:
            yield from self._joined_rows(start, re.compile(self._set.opens_document))
            return
        for text, row, state in self._rows(start):
            texts = [text] if self._set.separator is None else text.split(self._set.separator)
            # A resumed run reads the row again that it stopped in, and skips what was read of it.
            skipped = start["texts"] if row == start["row"] + 1 else 0
            for number, each in enumerate(texts[skipped:], skipped + 1):
                yield each, row, {**start, "row": row - 1, "state": state, "texts": number}

    def _joined_rows(
        self, start: dict[str, Any], opens: re.Pattern[str]
    ) -> Iterator[tuple[str, int, dict[str, Any]]]:
        joined: list[str] = []
        first = size = 0
        for text, row, state in self._rows(start):
            if joined and opens.fullmatch(text):
                # This row belongs to the next document: resume before it.
                yield "".join(joined), first, {**start, "row": row - 1, "state": state}
                joined, size = [], 0
            first = first if joined else row
            joined.append(text)
            size += len(text)
            self._check_length(size, start["split"], first)
        if joined:
            yield "".join(joined), first, _start(start["split"] + 1)

    def _rows(self, start: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
        """Yield (text, row from 1, state of the library before the row)."""
        column, split = self._set.text_column, start["split"]
        with self._errors():
            data = self._open(self._set.splits[split])
            if start["state"] is not None:
                data.load_state_dict(start["state"])
            state = start["state"] or data.state_dict()
            for row, values in enumerate(data, start["row"] + 1):
                text = values.get(column)
                if not isinstance(text, str):
                    found = f"columns {sorted(values)}" if column not in values else type(text).__name__
                    raise BadData(
                        f"{self._set.repo}/{self._set.splits[split]}, row {row:,}: found {found}, "
                        f"expected text in {self._key}.text_column ({column!r})"
                    )
                self._check_length(len(text), split, row)
                yield text, row, state
                state = data.state_dict()

    def _check_length(self, size: int, split: int, row: int) -> None:
        if size > self._max_row_megabytes * MEGABYTE:
            raise BadData(
                f"{self._set.repo}/{self._set.splits[split]}:{row} is longer than "
                f"{self._max_row_megabytes:,} MB (download.max_row_megabytes): raise the limit"
            )

    def _open(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # errors become messages of our own
        if self._mirror is not None:
            source, options = str(self._mirror.resolve()), {}
        else:
            source, options = self._set.repo, {"revision": self._set.revision}
        return datasets.load_dataset(source, self._set.config, split=split, streaming=True, **options)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow as pa

        where = self._set.repo if self._mirror is None else str(self._mirror)
        try:
            with hub_errors(where, self._advice) if self._mirror is None else nullcontext():
                yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise BadData(f"a file of {where} is damaged, or was cut short ({one_line(error)})") from error
        except (ValueError, RuntimeError) as error:
            raise BadConfig(f"{where} can't be read as {self._key} says: {one_line(error)}") from error


def _start(split: int) -> dict[str, Any]:
    return {"split": split, "row": 0, "state": None, "texts": 0}
