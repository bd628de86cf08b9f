"""Run a version of the project again in a temporary checkout, and compare the outputs."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compactgpt.common.errors import BadConfig, CheckFailed, MissingInput, NotAllowed, UserError, printable
from compactgpt.common.git import git_text, require_repository
from compactgpt.common.storage import inside, temporary_path, write_bytes, write_text
from compactgpt.tracking.dvc_files import (
    CODE,
    LOCK,
    PARAMS,
    STAGES,
    Cache,
    Commit,
    Entry,
    Place,
    all_outs,
    deps,
    entry_params,
    md5_of,
    md5_path,
    open_repo,
    outs,
    pipeline_stages,
)
from compactgpt.tracking.journal import numbers
from compactgpt.tracking.records import WORKSPACE, Version, changed_environment, find_version, version_here

# The stage DATA reads the folder CORPUS, which may have changed since the version ran. `reproduce` therefore
# restores the outputs of DATA. DATA runs again only if an output can't be restored.
DATA, CORPUS = "download", "corpus"
IDENTICAL, ROUNDING, DIFFERENT = "identical", "within rounding", "different"
# Rounding can explain losses that differ by up to 1 %. The largest measured difference was 0.15 %.
LOSS_TOLERANCE = 0.01
# Packages and machine facts that can change the rounding of results.
_ARITHMETIC = {"arithmetic", "cpu.vectors", "machine", "numpy", "torch"}
# DVC's settings in the temporary checkout of the version. The checkout has its own cache and no remote.
_DVC_SETTINGS = "[core]\nanalytics = false\ncheck_update = false\n"
# These folders of .state have no downloaded files, so `_copy_downloads` does not link their files.
_NO_DOWNLOADS = {"locks", "reproductions", "tokenization", "tracking", "training"}
# A number in a report is a loss if its key ends in one of these names.
_LOSSES = ("loss.value", "bits_per_byte.value", "train_loss", "val_loss")


@dataclass(frozen=True)
class Result:
    """The outputs of a version, compared with the outputs when the version ran a second time."""

    name: str  # the run, git revision or experiment, as the user named it
    verdict: str  # IDENTICAL, ROUNDING or DIFFERENT
    first: str  # the first stage whose outputs differ; empty if all outputs are identical
    why: str  # the reason for the verdict
    stages: dict[str, str]  # stage -> IDENTICAL, or the stage's first difference, such as `other code`

    def lines(self) -> list[str]:
        """Return the result as lines for the terminal."""
        width = max(map(len, self.stages), default=0)
        found = [f"  {stage:{width}}  {change}" for stage, change in self.stages.items()]
        first = f", first in {self.first}" if self.first else ""
        return [*found, f"{self.name}: {self.verdict}{first}: {self.why}"]


def list_missing(wanted: str, root: Path) -> tuple[list[str], list[str]]:
    """Return what a second run of a version lacks, and how this machine differs from the version's machine.

    Each of the two results is a list of sentences. `wanted` is a run id, a git revision or a DVC experiment.
    """
    with _temporary_folder(root) as folder:
        version = _find(wanted, root, folder)
        changes = _machine_changes(version, version_here("this machine", root))
        return find_missing(version, root), list(changes.values())


def reproduce(wanted: str, root: Path, log: Callable[[str], None], confirm: Callable[[str], bool]) -> Result:
    """Run the MLflow run, git revision or DVC experiment `wanted` again; compare new and old outputs.

    `log` prints a message. `confirm` shows the stages' commands, and returns whether to run them.
    Raises MissingInput if an input is missing, OutsideFolder if a path leads out of the checkout,
    NotAllowed if the user does not confirm, or CheckFailed if a stage fails.
    """
    root = root.resolve()
    with _temporary_folder(root) as folder:
        version, tree = _find(wanted, root, folder), folder / "tree"
        if missing := find_missing(version, root):
            raise MissingInput(f"{version.name} can't be run again: {'; '.join(missing)}")
        plan = _check_out(version, root, tree)
        if not (is_in_history(version, root) or confirm("\n".join(plan))):
            raise NotAllowed(
                f"{version.name} was not run: read the commands above, then confirm; without a terminal "
                f"run `compactgpt reproduce {wanted} --trust`"
            )
        log(f"{version.name}: commit {version.commit[:9]} in {tree}")
        _copy_downloads(root, tree)
        if _restore_data(version, root, tree):
            log("the data was restored from DVC's cache or remote")
        else:
            shutil.copytree(root / CORPUS, inside(tree, CORPUS), dirs_exist_ok=True)
            log("the download stage runs again")
        if _run_dvc(tree):
            raise CheckFailed("the second run is incomplete because a stage failed: read its message above")
        return compare_hashes(version, version_here("the second run", tree))


@contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    # `temporary_path` also deletes folders that killed processes have left here.
    folder = temporary_path(root / ".state/reproductions/run")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find(wanted: str, root: Path, folder: Path) -> Version:
    if wanted == WORKSPACE:
        raise BadConfig(
            f"{WORKSPACE} is not a run: use an MLflow run's id (`make ui` shows the ids) or a git revision"
        )
    require_repository(root)
    return find_version(root, wanted, folder)


def find_missing(version: Version, root: Path) -> list[str]:
    """Return a sentence for each missing thing that a second run of the version needs."""
    if not version.commit:
        return ["the run names no commit: it did not run in a git repository"]
    try:
        git_text(root, "cat-file", "-e", f"{version.commit}^{{commit}}")
    except UserError:
        return [f"git lacks commit {version.commit[:9]}: `git fetch --all` may fetch it"]
    missing = ["the run's uncommitted changes were not kept"] if version.diff is None else []
    missing += [f"the run has no {name}" for name in (PARAMS, LOCK) if version.place.read(name) is None]
    entry, cache = version.entries.get(DATA, {}), Cache(root)
    has_data = all(cache.has(md5) or version.place.read(path) for path, md5 in outs(entry).items())
    if not has_data and md5_path(root / CORPUS) != deps(entry).get(CORPUS, ""):
        missing.append(f"DVC's cache lacks the data, and {CORPUS} has changed since the data was made")
    return missing


def _machine_changes(version: Version, here: Version) -> dict[str, str]:
    """Return a dict: package or machine fact that differs -> a sentence with its value on each machine."""
    return {
        name: f"{name} was {old or 'missing'}, on this machine it is {new or 'missing'}"
        for name, (old, new) in changed_environment(version, here).items()
    }


def is_in_history(version: Version, root: Path) -> bool:
    """Return whether the version is a git commit in the history of HEAD."""
    if not isinstance(version.place, Commit):
        return False  # an MLflow run, whose code can have uncommitted changes
    # `git rev-list` prints the commit only if the commit is not in the history of HEAD.
    printed = git_text(root, "rev-list", "-1", version.commit, "^HEAD")
    return printed == ""


def _check_out(version: Version, root: Path, tree: Path) -> list[str]:
    """Check out a version into the folder `tree`, and return lines that describe its code."""
    # The checkout is a clone without hooks, so its code can't change the project's branches.
    no_hooks = ("-c", f"core.hooksPath={os.devnull}")
    git_text(root, "clone", "--quiet", "--shared", "--no-checkout", "--template=", str(root), str(tree))
    git_text(tree, *no_hooks, "checkout", "--quiet", "--detach", version.commit)
    changed = []
    if version.diff:
        patch = tree.with_name("changes.diff")
        patch.write_bytes(version.diff)
        # `git apply` refuses a patch with a path that leads out of the checkout.
        git_text(tree, "apply", "--binary", "--whitespace=nowarn", str(patch))
        changed = git_text(tree, "apply", "--numstat", str(patch)).splitlines()
    for path in tree.rglob("*"):
        if path.is_symlink():  # a link could lead a stage to a file outside of the checkout
            inside(tree, path.relative_to(tree).as_posix())
    write_bytes(inside(tree, PARAMS), version.place.read(PARAMS) or b"")
    write_text(inside(tree, ".dvc/config"), _DVC_SETTINGS)
    inside(tree, ".dvc/config.local").unlink(missing_ok=True)
    (tree / LOCK).unlink(missing_ok=True)  # without dvc.lock, DVC runs all stages
    commands = _stage_commands(tree)
    width = max(map(len, commands), default=0)
    names = ", ".join(line.split()[-1] for line in changed) or "none"
    lines = [
        f"{version.name} is not a commit in the history of HEAD. It runs this code with your rights:",
        "  commit   " + git_text(root, "show", "-s", "--format=%h by %an <%ae>, %as: %s", version.commit),
        f"  changes  {names} (uncommitted, saved with the run)",
        *(f"  {stage:{width}}  {command}" for stage, command in commands.items()),
    ]
    return [printable(line) for line in lines]


def _stage_commands(tree: Path) -> dict[str, str]:
    """Return the command of each stage. Raises OutsideFolder if a path leads out of `tree`."""
    with open_repo(tree) as repo:
        for one in (*repo.index.outs, *repo.index.deps):
            name = os.path.relpath(one.fs_path, tree) if one.protocol == "local" else f"/{one.def_path}"
            inside(tree, name)
        return {stage.name: str(stage.cmd) for stage in pipeline_stages(repo)}


def _copy_downloads(root: Path, tree: Path) -> None:
    """Link the project's downloaded files into the checkout. Links are safe: no stage changes the files."""
    for folder in (root / ".state").iterdir():
        if folder.is_dir() and folder.name not in _NO_DOWNLOADS:
            shutil.copytree(folder, inside(tree, f".state/{folder.name}"), copy_function=os.link)


def _restore_data(version: Version, root: Path, tree: Path) -> bool:
    """Restore the outputs of the download stage in `tree`, and return whether all outputs were found."""
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.transfer import transfer

    entry = version.entries.get(DATA, {})
    for path, md5 in outs(entry).items():
        content = version.place.read(path)
        if content is not None and md5_of(content) == md5:  # the version's folder or commit has this output
            write_bytes(inside(tree, path), content)
    with open_repo(root) as project, open_repo(tree) as repo:
        sources = [project.cache.local]
        with suppress(DvcException):  # skip the remote if the project has none
            sources.append(project.cloud.get_remote_odb())
        hashes = [HashInfo("md5", md5) for md5 in outs(entry).values()]
        for source in sources:
            # `shallow=False` also copies the files of a folder. `verify=True` refuses a file with a bad hash.
            with suppress(Exception):  # skip a cache or remote that fails: each kind has its own exceptions
                transfer(source, repo.cache.local, hashes, shallow=False, verify=True)
        write_text(tree / LOCK, json.dumps({"schema": "2.0", "stages": {DATA: entry}}))  # JSON is YAML, too
        stage = f"{tree / STAGES}:{DATA}"  # without the path, DVC reads dvc.yaml in the current folder
        try:
            repo.checkout([stage], force=True)
            logging.getLogger("dvc").setLevel(logging.WARNING)  # otherwise DVC prints to stdout
            repo.freeze(stage)  # DVC does not run a frozen stage, even if the corpus has changed
        except DvcException:
            (tree / LOCK).unlink()
            return False
    return True


def _run_dvc(tree: Path) -> int:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    environment = {
        **kept,
        "COMPACTGPT_TRACKER": "none",
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}",
    }
    words = [sys.executable, "-m", "dvc", "repro"]
    # stdout=2 sends DVC's output to stderr, because this command prints its result to stdout.
    done = subprocess.run(words, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=2, check=False)
    return done.returncode


def compare_hashes(version: Version, second: Version) -> Result:
    """Compare the outputs of a version with the outputs of `second`, its second run on this machine."""
    old, new = version.entries, second.entries
    stages = {stage: _first_change(entry, new.get(stage)) for stage, entry in old.items()}
    changed = {stage: change for stage, change in stages.items() if change != IDENTICAL}
    if not changed:
        why = f"every output of {len(stages)} stages has the recorded hash"
        return Result(version.name, IDENTICAL, "", why, stages)
    again = all_outs(new)
    files = [path for path, md5 in all_outs(old).items() if again.get(path) != md5]
    reports = [path for path in files if path.endswith(".json")]
    losses = [one for path in reports for one in _loss_differences(path, version.place, second.place)]
    largest, where = max(losses, default=(0.0, ""))
    causes = [text for name, text in _machine_changes(version, second).items() if name in _ARITHMETIC]
    # Rounding can change the outputs of a stage, and these outputs are the inputs of later stages.
    by_rounding = ("other inputs", "other outs")
    other = [f"{stage} has {change}" for stage, change in changed.items() if change not in by_rounding]
    verdict = DIFFERENT
    # The verdict is ROUNDING only if code and parameters are equal, the losses are close, and something that
    # can change the rounding is different, such as the CPU or the version of PyTorch.
    if other:
        why = other[0]
    elif causes and largest <= LOSS_TOLERANCE:
        verdict, why = ROUNDING, f"losses differ by at most {largest:.2%}; {'; '.join(causes)}"
    else:
        why = f"{files[0]} has another hash" + (f"; {where} differs by {largest:.2%}" if largest else "")
    return Result(version.name, verdict, next(iter(changed)), why, stages)


def _first_change(old: Entry, new: Entry | None) -> str:
    """Return IDENTICAL if the outputs are equal, otherwise what differs, such as `other params`."""
    if new is None:
        return "not run again"
    if outs(old) == outs(new):
        return IDENTICAL
    if entry_params(old) != entry_params(new):
        return "other params"
    changed = [path for path, md5 in deps(old).items() if deps(new).get(path) != md5]
    if any(path.startswith(CODE) for path in changed) or old.get("cmd") != new.get("cmd"):
        return "other code"
    return "other inputs" if changed else "other outs"


def _loss_differences(path: str, old: Place, new: Place) -> Iterator[tuple[float, str]]:
    """Yield (relative difference, name) for each loss in a report; (1.0, path) for a missing report."""
    contents = old.read(path), new.read(path)
    if None in contents:
        yield 1.0, path
        return
    before, after = (numbers(json.loads(content or b"{}")) for content in contents)
    for key, value in before.items():
        if key.endswith(_LOSSES):
            yield abs(after.get(key, 0.0) - value) / max(abs(value), 1e-12), f"{path}: {key}"
