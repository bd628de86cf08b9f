"""Check the dependencies of the stages before DVC reads them.

DVC waits forever for a named pipe or a device. For a broken link, DVC's message is unclear.
"""

import os
import shlex
from pathlib import Path

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.sections import read_yaml
from compactgpt.config import Download


def check_dependencies(root: Path) -> None:
    """Raise BadData if DVC can't read a dependency in dvc.yaml, such as a named pipe or a broken link."""
    stages = read_yaml(root / "dvc.yaml").get("stages") or {}
    names = {name for stage in stages.values() for name in stage.get("deps") or []}
    for name in sorted(names):
        path = root / name
        if path.is_dir():
            check_files(path)
        elif os.path.lexists(path):  # DVC itself reports a missing dependency
            _check_regular(path)


def check_files(folder: Path) -> None:
    """Check that a folder and its subfolders contain only files and links to files, with UTF-8 names.

    Raises BadData, for example for a named pipe, a broken link or a link to another folder.
    """
    for parent, folders, files in os.walk(folder):  # a link that points to a folder is in `folders`
        for name in (*folders, *files):
            try:
                name.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadData(f"{parent}/{name!a}: the file name is not UTF-8: rename it") from error
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                raise BadData(
                    f"{path} is a link to a folder, and DVC does not see changes in that folder: remove the "
                    "link, then copy the folder into the project: "
                    f"`dvc add {shlex.quote(str(path.resolve()))} -o {shlex.quote(str(path))}`"
                )
        for name in files:
            _check_regular(Path(parent, name))


def _check_regular(path: Path) -> None:
    if not path.is_file():  # `is_file` does not open the file: opening a named pipe would block
        raise BadData(
            f"{path} is not a regular file, but a named pipe, a socket, a device or a broken link: remove it"
        )


def require_corpus(original: Path, params: Download) -> None:
    """Check that the current folder has the local text of the corpus that `original` has.

    `original` is the user's repository. DVC may run an experiment in a temporary copy of this repository.
    Then the current folder is the copy. Raises MissingInput if files are missing.
    """
    copy = params.hub.mirror or params.hub.sets[params.hub.name].file
    names: set[str] = set()
    if params.corpus == "files":
        names = {f"corpus/{path.name}" for path in (original / "corpus").glob("[!.]*")}
    elif params.corpus == "hub" and copy:
        # git ignores a .dvc file in a subfolder of corpus/, so `dvc add` must get the subfolder itself.
        parts = Path(copy).parts
        names = {"/".join(parts[:2])} if parts[0] == "corpus" else {copy}
    missing = sorted(name for name in names if (original / name).exists() and not Path(name).exists())
    if not missing:
        return
    paths = shlex.join(missing)
    if not missing[0].startswith("corpus/"):
        raise MissingInput(
            f"the experiment's copy of the repository lacks {paths}: "
            f"write the absolute path {(original / missing[0]).resolve()} to params.yaml (download.hub)"
        )
    raise MissingInput(
        f"the experiment's copy of the repository lacks {paths}, which DVC does not track yet: "
        f"run `dvc add {paths}`, then the same experiment again"
    )
