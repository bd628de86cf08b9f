"""Cut a text file into documents, as `download.files.split` in params.yaml says.

At most two documents are in memory. With `split: auto`, the start of the file is in memory, too.
"""

import codecs
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, NamedTuple

from compactgpt.common.errors import BadData
from compactgpt.config import Files

# With `split: auto`, a document without blank lines ends after this multiple of `split_characters`.
_LARGE = 10
# A value of `download.files.split` -> what messages say instead of the value.
_MESSAGE_NAMES = {"blank-lines": "blank lines", "heading": "headings"}


class Line(NamedTuple):
    """A line with its line break, or a part of a very long line."""

    number: int  # number of the line in the file, from 1
    text: str
    is_start: bool  # whether `text` begins where the line begins
    is_end: bool  # whether `text` ends where the line ends


class Piece(NamedTuple):
    """The text of one document of a file."""

    line: int  # number of the first line or row, from 1; 0 for a complete file
    text: str
    cut: str = ""  # where the file was cut, such as "blank lines"; empty for a complete file or row


def split_text(file: IO[bytes], name: str, params: Files, max_characters: int) -> Iterator[Piece]:
    """Yield the documents of the text file `name`.

    To save memory, a document over `max_characters` is cut a little after this limit. The caller must raise
    an error for such a document, because it is incomplete. Raises BadData if the file is not UTF-8.
    """
    # A document has at least `least` characters, and ends soon after `most` characters.
    split, least, most = params.split, 1, max_characters + 1
    lines = read_lines(file, name, 2 * params.split_characters)
    if split == "auto":
        head: list[Line] = []
        size = 0
        while size <= params.split_over_characters and (line := next(lines, None)):
            head.append(line)
            size += len(line.text)
        lines = chain(head, lines)
        if size <= params.split_over_characters:
            split = "none"
        elif any(map(_is_blank, head)):
            split, least, most = "blank-lines", params.split_characters, _LARGE * params.split_characters
        else:
            split = "size"
    if split == "size":
        least = params.split_characters
    cut = _MESSAGE_NAMES.get(split, split) + (f", of at least {least:,} characters" if least > 1 else "")
    heading = re.compile(params.heading or "")
    for piece in _cut(lines, split, heading, least, most):
        text = "".join(line.text for line in piece)
        if split == "none":
            yield Piece(0, text)
        elif text.strip():
            yield Piece(piece[0].number, text.strip("\r\n").rstrip(), cut)


def _is_boundary(split: str, heading: re.Pattern[str], before: Line, line: Line) -> bool:
    if split == "size":
        return True
    if split == "none" or not line.is_start:
        return False
    if split == "blank-lines":
        return _is_blank(before) and not _is_blank(line)
    return split == "lines" or heading.match(line.text) is not None


def _is_blank(line: Line) -> bool:
    return line.is_start and line.text.isspace()


def _cut(
    lines: Iterator[Line], split: str, heading: re.Pattern[str], least: int, most: int
) -> Iterator[list[Line]]:
    """Yield the lines of each piece.

    A piece ends at the first boundary (`_is_boundary`) after `least` characters. Without a boundary, the
    piece ends after `most` characters.
    """
    previous: list[Line] = []  # the piece before the current piece
    current: list[Line] = []
    size = 0
    for line in lines:
        if size >= most or (size >= least and _is_boundary(split, heading, current[-1], line)):
            if previous:
                yield previous
            previous, current, size = current, [], 0
        current.append(line)
        size += len(line.text)
    if size < least:  # the last piece is too short: join it to the piece before
        previous, current = previous + current, []
    yield from filter(None, (previous, current))


def read_lines(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file without its byte-order mark.

    A line over `max_bytes` is cut, if possible at a space. Raises BadData if the file is not UTF-8.
    """
    # `readline(max_bytes)` may end inside a character: the decoder keeps its bytes for the next call.
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, is_start, rest = 1, True, ""
    content = file.readline(max_bytes).removeprefix(codecs.BOM_UTF8)
    while content:
        following = file.readline(max_bytes)
        try:
            text = rest + decoder.decode(content, final=not following)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise BadData(
                f"{name}, line {number:,}: {byte} is not UTF-8: convert the file (iconv) or remove it"
            ) from error
        if text.endswith("\n") or not following:
            yield Line(number, text, is_start, is_end=True)
            number, is_start, rest = number + 1, True, ""
        else:
            begin, space, rest = text.rpartition(" ")
            if not space:
                begin, rest = rest, ""
            yield Line(number, begin + space, is_start, is_end=False)
            is_start = False
        content = following
