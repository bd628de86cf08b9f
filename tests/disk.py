"""Every operation of this process that changes files under a folder, seen as it happens.

`Watch` stands before Python's own calls (os, open, shutil by way of them): a subclass may count them, write
them down, or let one of them fail. Files opened for writing are buffered as ever; what is seen is what
would go to the kernel. What C libraries write by themselves is not seen.
"""

import builtins
import errno
import io
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BY_PATH = ("replace", "rename", "link", "mkdir", "unlink", "remove", "rmdir")
BY_HANDLE = ("fsync", "fdatasync", "ftruncate")
NEEDS_ROOM = ("create", "write", "mkdir", "link")


@dataclass(frozen=True)
class Operation:
    """One call: its name, the path that it changes, and what else decides what it does."""

    name: str
    path: str
    to: str = ""  # of rename, replace, link
    content: bytes = b""  # of write
    place: int = 0  # offset of write, size of truncate
    half: Callable[[], Any] | None = None  # of write: takes half of the bytes to the disk


class Watch:
    """While it is entered, `before` and `after` are told of each operation under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = str(root.resolve())

    def before(self, operation: Operation) -> None:
        """Called first; what it raises, the operation raises."""

    def after(self, operation: Operation) -> None:
        """Called when the operation has been done."""

    def __enter__(self):
        self._real = [(os, name, getattr(os, name)) for name in (*BY_PATH, *BY_HANDLE, "open", "write")]
        self._real += [(builtins, "open", builtins.open), (io, "open", io.open)]
        self._real += [(shutil, "_USE_CP_SENDFILE", True), (subprocess, "Popen", subprocess.Popen)]
        real = {(module, name): value for module, name, value in self._real}
        for name in BY_PATH:
            setattr(os, name, self._by_path(name, real[os, name]))
        for name in BY_HANDLE:
            setattr(os, name, self._by_handle(name, real[os, name]))
        os.open = self._os_open(real[os, "open"])
        os.write = self._os_write(real[os, "write"])
        builtins.open = io.open = self._open(real[builtins, "open"])
        shutil._USE_CP_SENDFILE = False  # copies then go through open
        subprocess.Popen = self._popen(subprocess.Popen)
        return self

    def __exit__(self, *_):
        for module, name, value in self._real:
            setattr(module, name, value)

    def seen(self, operation: Operation, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do one operation."""
        if not operation.path.startswith(self.root):
            return real(*args, **kwargs)
        self.before(operation)
        result = real(*args, **kwargs)
        self.after(operation)
        return result

    def _by_path(self, name, real):
        def call(path, *args, dir_fd=None, **kwargs):
            to = _whole(args[0], None) if name in ("replace", "rename", "link") else ""
            kwargs |= {} if dir_fd is None else {"dir_fd": dir_fd}
            known = {"replace": "rename", "remove": "unlink"}.get(name, name)
            return self.seen(Operation(known, _whole(path, dir_fd), to), real, path, *args, **kwargs)

        return call

    def _by_handle(self, name, real):
        def call(handle, *args):
            number = handle if isinstance(handle, int) else handle.fileno()
            known = "truncate" if name == "ftruncate" else name
            return self.seen(Operation(known, _path_of(number), place=(*args, 0)[0]), real, handle, *args)

        return call

    def _os_open(self, real):
        def call(path, flags, *args, **kwargs):
            where = _whole(path, kwargs.get("dir_fd"))
            if flags & os.O_TRUNC or (flags & os.O_CREAT and not os.path.lexists(where)):
                return self.seen(Operation("create", where), real, path, flags, *args, **kwargs)
            return real(path, flags, *args, **kwargs)

        return call

    def _os_write(self, real):
        def call(handle, content):
            if not self._under(_path_of(handle)):  # a pipe, a terminal
                return real(handle, content)
            place = os.fstat(handle).st_size  # of ours they all append
            half = lambda: real(handle, bytes(content)[: len(content) // 2])  # noqa: E731
            told = Operation("write", _path_of(handle), content=bytes(content), place=place, half=half)
            return self.seen(told, real, handle, content)

        return call

    def _open(self, real):
        watch = self

        class Raw(io.FileIO):
            def write(self, content):
                content = bytes(content)
                place = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
                half = lambda: io.FileIO.write(self, content[: len(content) // 2])  # noqa: E731
                told = Operation("write", _path_of(self.fileno()), content=content, place=place, half=half)
                return watch.seen(told, super().write, content)

            def truncate(self, size=None):
                place = self.tell() if size is None else size
                return watch.seen(
                    Operation("truncate", _path_of(self.fileno()), place=place), super().truncate, size
                )

        def call(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **kwargs):
            writes = not isinstance(file, int) and set(mode) & set("wax+")
            if not writes or not self._under(path := _whole(file, None)):
                return real(file, mode, buffering, encoding, errors, newline, *args, **kwargs)
            bare = mode.replace("b", "").replace("t", "")
            if "w" in mode or not os.path.lexists(path):
                raw = self.seen(Operation("create", path), Raw, path, bare)
            else:
                raw = Raw(path, bare)
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        return call

    def _popen(self, real):
        watch = self

        class Popen(real):
            def __init__(self, words, *args, **kwargs):
                told = Operation("start", f"{watch.root}/{Path(words[0]).name}")
                watch.seen(told, super().__init__, words, *args, **kwargs)

        return Popen

    def _under(self, path: str) -> bool:
        return path.startswith(self.root)


def _whole(path: Any, dir_fd: int | None) -> str:
    base = Path.cwd() if dir_fd is None else Path(_path_of(dir_fd))
    return os.path.normpath(base / os.fspath(path))


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())


class Fault(Watch):
    """Lets the operation number `at`, counted from 0, be struck; -1 counts only.

    The kinds: `kill` and `term` (the signals, just before it), `short` (half of the bytes of a write, then
    SIGKILL), `full` (ENOSPC after half of a write, and for all that needs room from then on), `broken` (EIO),
    `twin` (before it, `twin` is called).
    """

    def __init__(
        self, root: Path, at: int = -1, kind: str = "kill", twin: Callable[[], None] | None = None
    ) -> None:
        super().__init__(root)
        self.at, self.kind, self.twin = at, kind, twin
        self.names: list[str] = []

    def before(self, operation: Operation) -> None:
        """Count, and strike."""
        self.names.append(operation.name)
        now = len(self.names) == self.at + 1
        if now and self.kind in ("kill", "short"):
            if operation.half and self.kind == "short":
                operation.half()
            os.kill(os.getpid(), signal.SIGKILL)
        if now and self.kind == "twin" and self.twin:
            self.twin()
        if now and self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        full = self.kind == "full" and 0 <= self.at < len(self.names) and operation.name in NEEDS_ROOM
        if full or (now and self.kind == "broken"):
            if operation.half:
                operation.half()
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), operation.path)
