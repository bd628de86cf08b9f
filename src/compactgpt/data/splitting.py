"""Cut a text file into documents, as `download.files.split` in params.yaml says.

Memory holds at most two documents and, with `auto`, the first `split_over_characters` of the file.
"""

import codecs
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, NamedTuple

from compactgpt.common.errors import BadData
from compactgpt.config import Files

_LARGE = 10  # auto: a passage without blank lines is cut when it has this many times `split_characters`
_WAYS = {"blank-lines": "blank lines", "lines": "lines", "heading": "headings", "size": "size"}


class Line(NamedTuple):
    """A line with its end. A very long line is read in parts, which end at spaces."""

    number: int  # from 1
    text: str
    is_start: bool  # False for the second and later parts of a line

    @property
    def is_blank(self) -> bool:
        """Whether the line has only white space; always False for the later parts of a line."""
        return self.is_start and self.text.isspace()


class Piece(NamedTuple):
    """A part of a file that is one document."""

    line: int  # number of the piece's first line; 0 if the piece is the complete file
    text: str
    way: str = ""  # where the file was cut, for messages


def split_text(file: IO[bytes], name: str, params: Files, max_characters: int) -> Iterator[Piece]:
    """Yield the documents of a text file.

    A complete file is not changed. Blank lines at the start of a piece, and white space at its end, are
    removed.

    Args:
        file: the file, in UTF-8.
        name: name of the file in messages.
        params: the section `download.files` of params.yaml.
        max_characters: the caller refuses a longer piece, so such a piece may be cut at any line.

    Raises:
        BadData: the file is not UTF-8.
    """
    split, least, most = params.split, 1, max_characters + 1
    lines = _read_lines(file, name, 2 * params.split_characters)
    if split == "auto":
        head, size = [], 0
        for line in lines:
            head.append(line)
            size += len(line.text)
            if size > params.split_over_characters:
                break
        if size <= params.split_over_characters:
            split = "none"
        elif any(line.is_blank for line in head):
            split, most = "blank-lines", _LARGE * params.split_characters
        else:
            split = "size"
        lines, least = chain(head, lines), params.split_characters
    elif split == "size":
        least = params.split_characters
    heading = re.compile(params.heading or "")
    way = _WAYS.get(split, "") + (f", of at least {least:,} characters" if least > 1 else "")
    for number, text in _cut(lines, split, heading, least, most):
        if split == "none":
            yield Piece(0, text)
        elif text.strip():
            yield Piece(number, text.strip("\r\n").rstrip(), way)


def _is_boundary(split: str, heading: re.Pattern[str], before: Line, line: Line) -> bool:
    """Return whether a document may begin at `line`; `before` is the line before it."""
    if split == "size":
        return True
    if split == "none" or not line.is_start:
        return False
    if split == "blank-lines":
        return before.is_blank and not line.is_blank
    return split == "lines" or heading.match(line.text) is not None


def _cut(
    lines: Iterator[Line], split: str, heading: re.Pattern[str], least: int, most: int
) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, text) of each piece.

    A piece ends before the first boundary after `least` characters, or at any line after `most` characters.
    The last piece is joined to the piece before it if it is shorter than `least`.
    """
    pieces: list[tuple[int, str]] = []  # at most one: the piece before the current piece
    current: list[Line] = []
    size = 0
    for line in lines:
        if size >= most or (size >= least and _is_boundary(split, heading, current[-1], line)):
            yield from pieces
            pieces = [(current[0].number, "".join(each.text for each in current))]
            current, size = [], 0
        current.append(line)
        size += len(line.text)
    last = "".join(each.text for each in current)
    if pieces and size < least:
        yield pieces[0][0], pieces[0][1] + last
    else:
        yield from pieces
        if current:
            yield current[0].number, last


def _read_lines(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a file. A line over `max_bytes` is yielded in parts of about `max_bytes`."""
    content = file.readline(max_bytes).removeprefix(codecs.BOM_UTF8)
    number, is_start, rest = 1, True, ""
    while content:
        following = file.readline(max_bytes)
        try:
            # A part of a long line may end within a character: `used` is the number of decoded bytes.
            text, used = codecs.utf_8_decode(content, "strict", not following)
        except UnicodeDecodeError as error:
            raise not_utf8(error, name, number) from error
        content, text = content[used:] + following, rest + text
        if text.endswith("\n") or not following:
            yield Line(number, text, is_start)
            number, is_start, rest = number + 1, True, ""
        else:
            begin, space, rest = text.rpartition(" ")
            if not space:
                begin, rest = rest, ""
            yield Line(number, begin + space, is_start)
            is_start = False


def not_utf8(error: UnicodeDecodeError, name: str, line: int) -> BadData:
    """Return the error for a file that is not UTF-8; `line` is the number of the first decoded line."""
    line += error.object.count(b"\n", 0, error.start)
    byte = f"byte 0x{error.object[error.start]:02x}"
    return BadData(f"{name}, line {line:,}: {byte} is not UTF-8: convert the file (iconv) or remove it")
