"""A data set of the Hugging Face hub as a corpus: streamed at a pinned commit, row by row, in its order.

Nothing is copied to the library's own cache: what has been read lies in our shards only. A small set that
has no commit is pinned by the hash of its text, for which it is read twice.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.config import HubCorpus, HubSet
from compactgpt.data.hub import one_line, require_on_hub
from compactgpt.data.inputs import check_files
from compactgpt.data.sources import MEGABYTE, Origin, Piece

_PROGRESS_ROWS = 1000


class HubReader:
    """One data set: see compactgpt.corpus.Reader. Opened before the first row is read."""

    name = "hub"
    lengths = range(1, 2**62)

    def __init__(self, params: HubCorpus, max_row_bytes: int, progress: Progress = silent) -> None:
        self._set: HubSet = params.sets[params.name]
        self._key = f"download.hub.sets.{params.name}"
        self._folder = None if params.mirror is None else Path(params.mirror)
        self._max_row_bytes, self._progress = max_row_bytes, progress
        self.parts = [
            Origin(f"{self._set.repo}/{split}", self._set.revision, self._set.licence)
            for split in self._set.splits
        ]
        self._place: dict[str, Any] = {}

    @property
    def identity(self) -> Any:
        """The data set at its commit; of a mirror also its files by name, size and time."""
        files = []
        if self._folder is not None:
            for path in sorted(path for path in self._folder.rglob("*") if path.is_file()):
                status = path.stat()
                files.append([path.as_posix(), status.st_size, status.st_mtime_ns])
        return [self._set.model_dump(mode="json"), self._max_row_bytes, files]

    def place(self) -> Any:
        """The split, its rows that are done, and the library's own note of where they end."""
        return dict(self._place)

    def read(self, place: Any) -> Iterator[Piece]:
        """Yield the texts behind a place.

        Raises:
            Unreachable: the hub does not answer; said at once.
            BadConfig: the set has no commit, or the hub has no such set, commit, part or column.
            BadData: a file of it is damaged, a text is too long, or the text is not the one by hash.
        """
        self._require()
        self._verify()
        place = place or _start(0)
        for number in range(place["split"], len(self._set.splits)):
            for text, row in self._documents(place if number == place["split"] else _start(number)):
                if row % _PROGRESS_ROWS == 0:
                    self._progress(row, 0)
                yield Piece(text, f"{self.parts[number].name}:{row}", number)

    def _require(self) -> None:
        if self._folder is not None:
            if not self._folder.is_dir():
                raise MissingInput(f"download.hub.mirror: there is no folder {self._folder}")
            check_files(self._folder)
            return
        if self._set.revision is None:
            raise BadConfig(
                f"{self._key}.revision is empty: write the commit there (40 hex digits), as `git ls-remote` "
                "shows it for the data set's repository; a branch moves, a commit does not"
            )
        mend = f"mend {self._key}, or name a copy of the repository in download.hub.mirror"
        require_on_hub("dataset", self._set.repo, self._set.revision, mend)

    def _verify(self) -> None:
        if self._set.sha256 is None:
            return
        digest = hashlib.sha256()
        for number in range(len(self._set.splits)):
            for text, *_ in self._rows(_start(number)):
                digest.update(text.encode("utf-8"))
        if digest.hexdigest() != self._set.sha256:
            raise BadData(
                f"the text of {self._set.repo} has SHA-256 {digest.hexdigest()}, {self._key}.sha256 expects "
                f"{self._set.sha256}: it is not the text that was meant, or mend the hash"
            )

    def _documents(self, place: dict[str, Any]) -> Iterator[tuple[str, int]]:
        """Yield (document, its first row): rows as they are, cut, or joined, as the set says."""
        if self._set.opens_document is not None:
            yield from self._joined(place, re.compile(self._set.opens_document))
            return
        skip = place["pieces"]
        for text, row, before, after in self._rows(place):
            pieces = [text] if self._set.separator is None else text.split(self._set.separator)
            for done, piece in enumerate(pieces[skip:], skip + 1):
                self._place = (
                    {**place, "rows": row, "state": after, "pieces": 0}
                    if done == len(pieces)
                    else {**place, "rows": row - 1, "state": before, "pieces": done}
                )
                yield piece, row
            skip = 0

    def _joined(self, place: dict[str, Any], opens: re.Pattern[str]) -> Iterator[tuple[str, int]]:
        joined: list[str] = []
        first = size = 0
        for text, row, before, _ in self._rows(place):
            if joined and opens.fullmatch(text):
                # The row that opens the next document is read already: stand before it.
                self._place = {**place, "rows": row - 1, "state": before}
                yield "".join(joined), first
                joined, size = [], 0
            first = first if joined else row
            joined.append(text)
            size += len(text)
            self._require_short(size, place["split"], first)
        if joined:
            self._place = _start(place["split"] + 1)
            yield "".join(joined), first

    def _rows(self, place: dict[str, Any]) -> Iterator[tuple[str, int, Any, Any]]:
        """Yield (text, row from 1, where the library stood before it and stands after it)."""
        column, number, state = self._set.text_column, place["split"], place["state"]
        with self._clear_errors():
            data = self._open(self._set.splits[number])
            if state is not None:
                data.load_state_dict(state)
            before = state or data.state_dict()
            for row, values in enumerate(data, place["rows"] + 1):
                after = data.state_dict()
                text = values.get(column)
                if not isinstance(text, str):
                    found = f"columns {sorted(values)}" if column not in values else type(text).__name__
                    raise BadData(
                        f"{self.parts[number].name}, row {row:,}: found {found} where text in "
                        f"{self._key}.text_column ({column!r}) is wanted"
                    )
                self._require_short(len(text), number, row)
                yield text, row, before, after
                before = after

    def _require_short(self, size: int, number: int, row: int) -> None:
        if size > self._max_row_bytes:
            raise BadData(
                f"{self.parts[number].name}:{row} is longer than {self._max_row_bytes // MEGABYTE:,} MB "
                "(download.max_row_megabytes): raise the limit"
            )

    def _open(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # what fails is said once, by us
        if self._folder is not None:
            return datasets.load_dataset(
                str(self._folder.resolve()), self._set.config, split=split, streaming=True
            )
        return datasets.load_dataset(
            self._set.repo, self._set.config, split=split, revision=self._set.revision, streaming=True
        )

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        import httpx2
        import pyarrow as pa

        where = self._set.repo if self._folder is None else str(self._folder)
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise BadData(f"a file of {where} is damaged, or was cut short ({one_line(error)})") from error
        except (ValueError, RuntimeError) as error:
            raise BadConfig(f"{where} can't be read as {self._key} says: {one_line(error)}") from error
        except (httpx2.HTTPError, OSError) as error:
            if self._folder is not None:
                raise BadData(f"a file of {where} can't be read ({one_line(error)})") from error
            raise Unreachable(
                f"the hub stopped answering for {where} ({one_line(error)}): run the same command again, it "
                "goes on from the last finished shard"
            ) from error


def _start(split: int) -> dict[str, Any]:
    return {"split": split, "rows": 0, "state": None, "pieces": 0}
