"""What a disk may hold after a power loss: every state that the operations of a protocol leave possible.

The model is stricter than any file system that we know. A file's bytes are safe once the file was synced,
its name once the folder was. Of what is not safe yet, names may be there or not, each by itself and so in any
order, and bytes may be all there, not at all, in part, or as zeros. (After SQLite's and ALICE's tests.)
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from tests.disk import Operation, Watch

SUBSETS = 6  # random ones of the names that are not safe, where there are more than four
DATA = ("kept", "lost", "cut", "zeroed")
Entry = tuple[int, str]  # inode of the folder, name
Tree = dict[str, bytes | None]  # content by path; None is a folder


class Recorder(Watch):
    """Writes down what was done, and where the protocol said that it was done with a part."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.operations: list[Operation] = []
        self.marks: list[int] = []

    def after(self, operation: Operation) -> None:
        """Write it down."""
        self.operations.append(operation)

    def mark(self) -> None:
        """From here on the reader must find what was written so far."""
        self.marks.append(len(self.operations))


@dataclass
class _Change:
    """Names that one operation sets at once, and the folders that are yet to be synced for it to be safe."""

    entries: dict[Entry, int | None]
    unsafe: set[int]


@dataclass
class Disk:
    """Inodes and names, those of now and those that are safe."""

    root: str
    safe: dict[int, bytes | None] = field(default_factory=lambda: {0: None})
    now: dict[int, bytes | None] = field(default_factory=lambda: {0: None})
    begin: dict[Entry, int] = field(default_factory=dict)
    entries: dict[Entry, int] = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)

    @classmethod
    def of(cls, root: Path) -> "Disk":
        """A disk whose folder is safe as it is."""
        disk = cls(str(root.resolve()))
        for path in sorted(root.rglob("*")):
            inode = disk._new(None if path.is_dir() else path.read_bytes())
            disk.safe[inode] = disk.now[inode]
            disk.entries[disk._entry(str(path.resolve()))] = inode
        disk.begin = dict(disk.entries)
        return disk

    def _new(self, content: bytes | None) -> int:
        inode = len(self.now)
        self.now[inode], self.safe[inode] = content, None if content is None else b""
        return inode

    def _entry(self, path: str) -> Entry:
        *folders, name = path.removeprefix(self.root).strip("/").split("/")
        inode = 0
        for folder in folders:
            inode = self.entries[inode, folder]
        return inode, name

    def _find(self, path: str) -> int | None:
        return 0 if path == self.root else self.entries.get(self._entry(path))

    def _set(self, entries: dict[Entry, int | None]) -> None:
        self.changes.append(_Change(entries, {folder for folder, _ in entries}))
        for entry, inode in entries.items():
            if inode is None:
                del self.entries[entry]
            else:
                self.entries[entry] = inode

    def do(self, operation: Operation) -> None:
        """Follow one operation."""
        name, path = operation.name, operation.path
        inode = self._find(path)
        if name in ("mkdir", "create") and inode is None:
            self._set({self._entry(path): self._new(None if name == "mkdir" else b"")})
        elif name in ("unlink", "rmdir"):
            self._set({self._entry(path): None})
        elif name == "rename":
            self._set({self._entry(path): None, self._entry(operation.to): inode})
        elif name == "link":
            self._set({self._entry(operation.to): inode})
        elif name == "fsync":
            self._sync(inode)
        elif name in ("create", "write", "truncate"):
            content = b"" if name == "create" else self.now[inode]
            place = operation.place if name != "create" else 0
            content = (
                content[:place].ljust(place, b"\0")
                + operation.content
                + (content[place + len(operation.content) :] if name == "write" else b"")
            )
            self.now[inode] = content

    def _sync(self, inode: int) -> None:
        self.safe[inode] = self.now[inode]
        for change in self.changes:
            change.unsafe.discard(inode)

    def trees(self, dice: random.Random) -> Iterator[Tree]:
        """What may be found after a power loss now."""
        waiting = [number for number, change in enumerate(self.changes) if change.unsafe]
        if len(waiting) <= 4:
            kept = [set(some) for size in range(len(waiting) + 1) for some in combinations(waiting, size)]
        else:
            kept = [set(), set(waiting)]
            kept += [{number for number in waiting if dice.random() < 0.5} for _ in range(SUBSETS)]
        for names in kept:
            for data in DATA:
                yield self._tree(names, data)

    def _tree(self, kept: set[int], data: str) -> Tree:
        entries: dict[Entry, int | None] = dict(self.begin)
        for number, change in enumerate(self.changes):
            if not change.unsafe or number in kept:
                entries.update(change.entries)
        tree: Tree = {}
        folders = [(0, "")]
        while folders:
            inode, path = folders.pop()
            for (parent, name), child in entries.items():
                if parent == inode and child is not None:
                    tree[path + name] = self._content(child, data)
                    if self.now[child] is None:
                        folders.append((child, f"{path}{name}/"))
        return tree

    def _content(self, inode: int, data: str) -> bytes | None:
        now, safe = self.now[inode], self.safe[inode]
        if now is None or safe == now or data == "kept":
            return now
        if data == "lost":
            return safe
        if data == "cut":
            return now[: (min(len(safe), len(now)) + len(now)) // 2]
        return safe[: len(now)].ljust(len(now), b"\0")


def lay_out(tree: Tree, folder: Path) -> None:
    """Make the files of a state."""
    for path, content in sorted(tree.items()):
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            place.mkdir(exist_ok=True)
        else:
            place.write_bytes(content)


def states_of(
    root: Path, protocol: Callable[[Path, Callable[[], None]], None], seed: int = 1
) -> Iterator[tuple[int, int, Tree]]:
    """Run a protocol in `root`, and yield (operations done, marks passed, state) for each distinct state.

    Args:
        root: holds what is safe before.
        protocol: called with `root` and a function that it calls when a part is done.
        seed: of the subsets.
    """
    disk, dice = Disk.of(root), random.Random(seed)
    recorder = Recorder(root)
    with recorder:
        protocol(root, recorder.mark)
    seen = set()
    for done in range(len(recorder.operations) + 1):
        if done:
            disk.do(recorder.operations[done - 1])
        passed = sum(mark <= done for mark in recorder.marks)
        for tree in disk.trees(dice):
            key = (passed, tuple(sorted(tree.items(), key=lambda item: item[0])))
            if key not in seen:
                seen.add(key)
                yield done, passed, tree
