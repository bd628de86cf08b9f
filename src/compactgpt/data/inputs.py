"""Checks that run before DVC hashes anything: params.yaml is valid, and DVC can read every dependency.

DVC opens every file of a dependency. A named pipe or a link to a device keeps it waiting for ever, and a
link that leads nowhere or a file name that is not UTF-8 ends it with a traceback or half a sentence.
"""

import errno
import os
import stat
from pathlib import Path

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.sections import read_yaml
from compactgpt.config import load_params

# Words for what is not a regular file.
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_inputs(root: Path, params_file: Path) -> None:
    """Check params.yaml and the dependencies that dvc.yaml names.

    Raises:
        BadConfig: params.yaml has a key or value that is not allowed, such as a baseline's name.
        BadData, MissingInput: see `check_files`; or a file of configuration is missing.
    """
    load_params(params_file)
    check_dependencies(root)


def check_dependencies(root: Path) -> None:
    """Check the files and folders that the stages of dvc.yaml depend on: see `check_files`."""
    stages = (read_yaml(root / "dvc.yaml").get("stages") or {}).values()
    deps = [name for stage in stages for name in (stage.get("do") or stage).get("deps") or []]
    for name in sorted({name for name in deps if isinstance(name, str) and "${" not in name}):
        path = root / name
        if path.is_dir():
            check_files(path)
        elif os.path.lexists(path):
            regular_status(path, name)


def check_files(folder: Path) -> None:
    """Check that every file under a folder is a regular file, or a link to one, with a name in UTF-8.

    Links to folders are not followed, as DVC does not follow them either.

    Raises:
        BadData: a name is not UTF-8, or the file is a pipe, a socket, a device or a loop of links.
        MissingInput: a link leads nowhere.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            require_utf8(Path(parent, name))
        for name in files:
            path = Path(parent, name)
            regular_status(path, str(path))


def require_utf8(path: Path) -> None:
    """Refuse a file name that is not UTF-8: DVC and JSON can't spell it.

    Raises:
        BadData: it is not.
    """
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadData(f"{path.parent}/{path.name!a}: the file name is not UTF-8: rename it") from error


def regular_status(path: Path, name: str) -> os.stat_result:
    """Return the status of a regular file, following links, without opening it.

    Args:
        path: the file.
        name: what messages call it.

    Raises:
        BadData: it is a pipe, a socket, a device, a folder or a loop of links.
        MissingInput: it is not there, or is a link to nothing.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            missing = f"{name} is missing: it is a link to nothing, or was just removed"
            raise MissingInput(missing) from error
        if error.errno != errno.ELOOP:
            raise
        raise BadData(f"{name} is a loop of symbolic links: remove it") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise BadData(f"{name} is {kind}, a regular file is needed: remove it or move it elsewhere")
    return status
