"""Run again what a run did, in a scratch work tree, and compare every hash and every number.

The work tree has the run's commit, its uncommitted changes and its params.yaml; data that DVC's cache or
remote has is taken from there (its hash is checked), everything else is made again, with the packages that
are installed here. The project itself is only read.

Such a version is code: anyone who writes to the MLflow store or pushes a branch decides what runs here. So a
version that is not in the history of the present commit runs only after the user has seen it (`Plan`) and
agreed. No path of it may lead out of the work tree, and DVC's settings and keys are not copied there.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.common.errors import (
    BadConfig,
    BadData,
    CheckFailed,
    MissingInput,
    NotAllowed,
    UserError,
    printable,
)
from compactgpt.common.git import require_repository
from compactgpt.common.storage import inside, write_bytes, write_text
from compactgpt.common.worktree import Scratch, scratch_worktree
from compactgpt.tracking.dvc_files import (
    LOCK,
    PARAMS,
    Cache,
    Chain,
    Commit,
    Entry,
    Folder,
    Place,
    checkout,
    deps,
    entry_params,
    git,
    md5_path,
    outs,
    parse_yaml,
    read_chain,
)
from compactgpt.tracking.journal import machine_facts, numbers
from compactgpt.tracking.pipeline_run import packages
from compactgpt.tracking.records import HERE, Record, find, versions

DATA = "download"  # the stage whose outs may be taken instead of made: they come from elsewhere
IDENTICAL, ROUNDING, DIFFERENT = "identical", "within rounding", "different"
# Another order of sums moved the demo's loss by 0.15 % (README, How exact); what does not round is not here.
LOSS_TOLERANCE = 0.01
_ARITHMETIC_PACKAGES = ("numpy", "torch")
# Instead of those of the version and of this machine: no remote, and a cache of its own in the work tree.
DVC_SETTINGS = "[core]\nanalytics = false\ncheck_update = false\n"
_OWN_STATE = {"locks", "reproductions", "tokenization", "tracking", "training"}  # of .state: never shared
_LOSSES = ("loss.value", "bits_per_byte.value", "train_loss", "val_loss")


@dataclass(frozen=True)
class Gap:
    """Something that the run had, and this machine has not."""

    what: str
    message: str
    fatal: bool  # it cannot be run again without


@dataclass(frozen=True)
class StageResult:
    """One stage, recorded and made again."""

    stage: str
    verdict: str  # identical, or what differs first in it: code, params, inputs, outs
    files: list[str]  # outs of other content
    largest: float  # relative difference among the numbers of its reports
    where: str  # the number that differs most


@dataclass(frozen=True)
class Result:
    """What came of running again."""

    name: str
    verdict: str
    first: str  # stage that differs first; nothing where all are alike
    why: str
    stages: list[StageResult] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 where it is the same, or rounding explains it."""
        return CheckFailed.exit_code if self.verdict == DIFFERENT else 0

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        width = max((len(one.stage) for one in self.stages), default=0)
        told = []
        for one in self.stages:
            what = IDENTICAL if one.verdict == IDENTICAL else f"other {one.verdict}: {', '.join(one.files)}"
            told.append(f"  {one.stage:{width}}  {what}")
        first = f", first in {self.first}" if self.first else ""
        return [*told, f"{self.name}: {self.verdict}{first}: {self.why}"]


@dataclass(frozen=True)
class Checked:
    """What `--check` found."""

    name: str
    gaps: list[Gap]

    @property
    def exit_code(self) -> int:
        """0 where it can be run again."""
        return MissingInput.exit_code if any(gap.fatal for gap in self.gaps) else 0

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        told = [f"  {'missing' if gap.fatal else 'note'}: {gap.message}" for gap in self.gaps]
        can = "can't" if self.exit_code else "can"
        return [*told, f"{self.name} {can} be run again here"]


@dataclass(frozen=True)
class Plan:
    """What would run: the user reads this before it does."""

    name: str
    commit: str  # hash, author, day and subject
    changed: list[str]  # files that the uncommitted changes touch
    commands: dict[str, str]  # by stage

    def lines(self) -> list[str]:
        """For people."""
        width = max(map(len, self.commands), default=0)
        lines = [
            f"{self.name} runs code with your rights, and it is not in the history of your present commit:",
            f"  commit   {self.commit}",
            f"  changes  {', '.join(self.changed) or 'none'} (uncommitted, kept with the run)",
            *(f"  {stage:{width}}  {command}" for stage, command in self.commands.items()),
        ]
        return list(map(printable, lines))


def of(
    wanted: str,
    root: Path,
    *,
    check: bool,
    rebuild: bool,
    keep: bool,
    say: Callable[[str], None],
    agree: Callable[[Plan], bool] = lambda _: False,
) -> Result | Checked:
    """Reproduce, or only check, a version by its name: see `records.find` and `reproduce`.

    Raises:
        BadConfig: the work tree is what is here already.
        MissingInput: this folder is not a git repository.
    """
    if wanted == HERE:
        raise BadConfig(f"{HERE} is no run: name a run's id or a revision (`make ui` shows the runs)")
    require_repository(root)
    root = root.resolve()
    with scratch_worktree(root, root / ".state" / "reproductions", keep=keep and not check) as scratch:
        (scratch.folder / "artifacts").mkdir()
        record = find(root, wanted, scratch.folder / "artifacts")
        if check:
            return Checked(record.name, gaps(record, root))
        return reproduce(record, root, scratch, rebuild=rebuild, say=say, agree=agree)


def gaps(record: Record, root: Path) -> list[Gap]:
    """Say beforehand what would be missing, or be another."""
    return [*_code_gaps(record, root), *_data_gaps(record, root), *_environment_gaps(record)]


def _code_gaps(record: Record, root: Path) -> Iterator[Gap]:
    if not record.commit:
        yield Gap("commit", "the run names no commit: it was made outside of git", True)
        return
    try:
        git(root, "cat-file", "-e", f"{record.commit}^{{commit}}")
    except UserError:
        yield Gap("commit", f"git lacks commit {record.commit[:9]}: `git fetch --all` may have it", True)
        return
    if record.diff is None:
        yield Gap("changes", "the run had uncommitted changes, and they were not kept", True)
    for name in (PARAMS, LOCK):
        if record.place.read(name) is None:
            yield Gap(name, f"the run keeps no {name}", True)


def _data_gaps(record: Record, root: Path) -> Iterator[Gap]:
    """What the data would be made from, where the cache lacks it."""
    entry = record.chain.entries.get(DATA)
    if entry is None or _restorable(record, entry, Cache(root)):
        return
    if _has_remote(root):
        yield Gap(
            "data", "DVC's cache lacks the data: it will be pulled from the remote, or made again", False
        )
    made = _made_by_stages(record)
    for path, md5 in deps(entry).items():
        if path not in made and not path.startswith(("src/", "stages/")) and md5_path(root / path) != md5:
            yield Gap(path, f"DVC's cache lacks the data, and {path} is not what it was made from", True)
    download = parse_yaml(record.place.read(PARAMS), PARAMS).get("download", {})
    if download.get("corpus") == "hub":
        yield Gap("hub", "DVC's cache lacks the data: it will be fetched from the hub again", False)
    if download.get("corpus") == "docstrings":
        wanted = download.get("docstrings", {}).get("distributions", {})
        for name, version in wanted.items():
            if version and _installed(name) != str(version):
                found = _installed(name) or "none"
                yield Gap(name, f"the data is made from {name} {version}; installed is {found}", True)


def _made_by_stages(record: Record) -> set[str]:
    """Return the paths that stages of the pipeline write: `dvc repro` makes them again."""
    return {path for entry in record.chain.entries.values() for path in outs(entry)}


def _installed(name: str) -> str:
    """The version of a package without its local part: the corpus of torch 2.13.0+cpu is that of 2.13.0."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name).partition("+")[0]
    return ""


def _environment_gaps(record: Record) -> Iterator[Gap]:
    here = versions(packages())
    for name, version in sorted(record.packages.items()):
        found = here.get(name, "")
        if isinstance(record.place, Commit):  # asks for 2.13.0, and 2.13.0+cpu is one
            found = found.partition("+")[0]
        if found != version:
            yield Gap(name, f"{name} was {version}, here it is {here.get(name, 'not installed')}", False)
    for name, value in machine_facts().items():
        if record.machine and record.machine.get(name, "") != value:
            yield Gap(name, f"{name} was {record.machine.get(name) or 'another'}, here it is {value}", False)


def _restorable(record: Record, entry: Entry, cache: Cache) -> bool:
    """Whether every out of a stage is in the cache, or kept with the run."""
    return all(cache.has(md5) or record.place.read(path) is not None for path, md5 in outs(entry).items())


def _has_remote(root: Path) -> bool:
    settings = [root / ".dvc" / name for name in ("config", "config.local")]
    return any("remote" in path.read_text() for path in settings if path.exists())


def reproduce(
    record: Record,
    root: Path,
    scratch: Scratch,
    *,
    rebuild: bool = False,
    say: Callable[[str], None] = lambda _: None,
    agree: Callable[[Plan], bool] = lambda _: False,
) -> Result:
    """Run a record again and compare.

    Args:
        record: what was run.
        root: the repository.
        scratch: a folder for the work tree.
        rebuild: make the data again even where it is at hand.
        say: told what is done.
        agree: asked whether code may run that is not in the history of the present commit.

    Raises:
        MissingInput: something is missing that cannot be done without; see `gaps`.
        OutsideFolder: a path leads out of the work tree.
        NotAllowed: the user did not agree.
        CheckFailed: a stage failed.
    """
    fatal = [gap.message for gap in gaps(record, root) if gap.fatal]
    if fatal:
        raise MissingInput(f"{record.name} can't be run again: {'; '.join(fatal)}")
    plan = _check_out(record, root, scratch)
    if not _is_known(record, root) and not agree(plan):
        raise NotAllowed(f"{record.name} was not run: read what it is above, and run it with --trust")
    say(f"{record.name}: commit {record.commit[:9]} in {scratch.tree}")
    _restore(record, root, scratch.tree, rebuild=rebuild, say=say)
    if _repro(scratch, record.stage):
        raise CheckFailed("the run can't be made again: a stage failed (its message stands above)")
    made = Folder(scratch.tree)
    return judge(record, read_chain(made), made)


def _is_known(record: Record, root: Path) -> bool:
    """Whether all code and settings of a record are in the history of the present commit."""
    if not isinstance(record.place, Commit):
        return False
    try:
        git(root, "merge-base", "--is-ancestor", record.commit, "HEAD")
    except UserError:
        return False
    return True


def _check_out(record: Record, root: Path, scratch: Scratch) -> Plan:
    """Create the work tree: the commit with its changes and parameters, and our settings of DVC."""
    tree = scratch.tree
    hooks = ("-c", f"core.hooksPath={os.devnull}")
    git(root, *hooks, "worktree", "add", "--force", "--detach", str(tree), record.commit)
    changed = []
    if record.diff:
        (patch := scratch.folder / "changes.diff").write_bytes(record.diff)
        git(tree, "apply", "--binary", "--whitespace=nowarn", str(patch))  # refuses paths out of the tree
        changed = git(tree, "apply", "--numstat", str(patch)).splitlines()
    _refuse_links_out(tree)
    write_bytes(inside(tree, PARAMS), record.place.read(PARAMS) or b"")
    write_text(inside(tree, ".dvc/config"), DVC_SETTINGS)
    inside(tree, ".dvc/config.local").unlink(missing_ok=True)
    facts = git(root, "show", "--no-patch", "--format=%h by %an <%ae>, %as: %s", record.commit)
    return Plan(record.name, facts, [line.split("\t")[-1] for line in changed], _commands(tree))


def _refuse_links_out(tree: Path) -> None:
    """Refuse a work tree with a symbolic link that leads out of it: a stage's output would be written there.

    Raises:
        OutsideFolder: it has one.
    """
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            if (path := Path(folder) / name).is_symlink():
                inside(tree, path.relative_to(tree).as_posix())


def _commands(tree: Path) -> dict[str, str]:
    """The command of each stage as DVC would run it, after checking the paths that DVC would write and read.

    Raises:
        OutsideFolder: a path leads out of the work tree.
        BadData: DVC can't read dvc.yaml or dvc.lock.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(tree)) as repo:
            for one in (*repo.index.outs, *repo.index.deps):
                name = os.path.relpath(one.fs_path, tree) if one.protocol == "local" else f"/{one.def_path}"
                inside(tree, name)
            return {stage.addressing: str(stage.cmd) for stage in repo.index.stages if stage.cmd}
    except (DvcException, ImportError) as error:  # ImportError: paths on a storage whose plugin is missing
        raise BadData(f"DVC can't read this version: {error}") from error


def _restore(record: Record, root: Path, tree: Path, *, rebuild: bool, say: Callable[[str], None]) -> None:
    """Bring the data, what it is made from, weights that were fetched before, and its part of dvc.lock."""
    for folder in (root / ".state").iterdir():
        if folder.is_dir() and folder.name not in _OWN_STATE:
            shutil.copytree(folder, inside(tree, f".state/{folder.name}"), copy_function=_link)
    entry = record.chain.entries.get(DATA, {})
    made = _made_by_stages(record)
    for path, md5 in deps(entry).items():
        target = inside(tree, path)
        if path in made or target.is_file() or md5_path(target) == md5 or md5_path(root / path) != md5:
            continue
        if (root / path).is_dir():
            shutil.copytree(root / path, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, target)
    (tree / LOCK).unlink(missing_ok=True)  # every stage without an entry is run
    if not entry or rebuild:
        return
    if not _restorable(record, entry, Cache(root)):
        _fetch(root, outs(entry).values())
    if _bring(record, entry, Cache(root), tree):
        write_text(tree / LOCK, json.dumps({"schema": "2.0", "stages": {DATA: entry}}))  # JSON is YAML
        say("the data comes from DVC's cache, by its hash")
    else:
        say("the data is made again")


def _fetch(root: Path, hashes: Collection[str]) -> None:
    """Ask the project's own remote for objects; the work tree never has its address or keys."""
    if not _has_remote(root):
        return
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo

    # What the remote lacks is made again. The list of a folder's files is an object like any other.
    with suppress(DvcException, MissingInput), Repo(str(root)) as repo:
        repo.cloud.pull([HashInfo("md5", md5) for md5 in hashes])
        files = [file for md5 in hashes if md5.endswith(".dir") for file in Cache(root).listed(md5)]
        repo.cloud.pull([HashInfo("md5", file["md5"]) for file in files])


def _bring(record: Record, entry: Entry, cache: Cache, tree: Path) -> bool:
    """Put every out of a stage at its place; the scratch cache gets what DVC looks up."""
    if not _restorable(record, entry, cache):
        return False
    for path, md5 in outs(entry).items():
        target = inside(tree, path)
        shutil.rmtree(target, ignore_errors=True)
        if not checkout(cache, record.place, path, md5, target):
            return False
        for source in cache.objects(md5) if cache.has(md5) else ():
            kept = Cache(tree).file(source.parent.name + source.name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.exists():
                _link(source, kept)
    return True


def _link(source: str | Path, target: str | Path) -> None:
    """Share a file that nobody writes into; copy it where links do not reach."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _repro(scratch: Scratch, stage: str) -> int:
    """Run DVC there, with this Python, and the code of the work tree before any that is installed."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    environment = {
        **own,
        "COMPACTGPT_TRACKER": "none",
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{scratch.tree / 'src'}{os.pathsep}{scratch.tree}",
    }
    words = [sys.executable, "-m", "dvc", "repro", *([stage] if stage else [])]
    return scratch.run(words, environment)


def judge(record: Record, made: Chain, place: Place) -> Result:
    """Compare what was recorded with what was made.

    Identical is a chain whose every out has the same hash. It is within rounding where only figures differ,
    code, parameters and data are the same, the arithmetic is known to be another (processor, threads,
    libraries), and every loss is within LOSS_TOLERANCE. Everything else is different.
    """
    scope = [
        stage for stage in record.chain.stages if stage in made.entries and stage in record.chain.entries
    ]
    lost = [
        stage for stage in record.chain.stages if stage in record.chain.entries and stage not in made.entries
    ]
    results = [_stage_result(stage, record, made, place) for stage in scope]
    changed = [one for one in results if one.verdict != IDENTICAL]
    if lost and not record.stage:
        return Result(record.name, DIFFERENT, lost[0], f"{lost[0]} was not made", results)
    if not changed:
        return Result(
            record.name, IDENTICAL, "", f"every out of {len(results)} stages has the recorded hash", results
        )
    first = changed[0]
    causes = _other_arithmetic(record)
    if any(one.verdict in ("code", "params") for one in changed):
        what = next(one for one in changed if one.verdict in ("code", "params"))
        return Result(record.name, DIFFERENT, first.stage, f"{what.stage} has other {what.verdict}", results)
    far = max(changed, key=lambda one: one.largest)
    if causes and far.largest <= LOSS_TOLERANCE:
        why = f"losses differ by at most {far.largest:.2%}; {'; '.join(causes)}"
        return Result(record.name, ROUNDING, first.stage, why, results)
    why = f"{', '.join(first.files)} of {first.stage} has another hash"
    if far.largest:
        why += f"; {far.where} differs by {far.largest:.2%}"
    return Result(
        record.name, DIFFERENT, first.stage, why if not causes else f"{why}, more than rounding", results
    )


def _other_arithmetic(record: Record) -> list[str]:
    """What is known to round sums in another way here."""
    here = machine_facts()
    names = ("arithmetic", "cpu.vectors", "machine")
    found = [
        f"{name}: {record.machine.get(name) or 'none'} then, {here.get(name) or 'none'} now"
        for name in names
        if record.machine and record.machine.get(name, "") != here.get(name, "")
    ]
    installed = versions(packages())
    return found + [
        f"{name} {record.packages[name]} then, {installed.get(name)} now"
        for name in _ARITHMETIC_PACKAGES
        if name in record.packages and record.packages[name] != installed.get(name)
    ]


def _stage_result(stage: str, record: Record, made: Chain, place: Place) -> StageResult:
    then, now = record.chain.entries[stage], made.entries[stage]
    files = [path for path, md5 in outs(then).items() if outs(now).get(path) != md5]
    largest, where = 0.0, ""
    for path in files:
        if path.endswith(".json"):
            for key, gap in _loss_gaps(record.place.read(path), place.read(path)):
                if gap > largest:
                    largest, where = gap, f"{path}: {key}"
    return StageResult(stage, _first_cause(then, now), files, largest, where)


def _first_cause(then: Entry, now: Entry) -> str:
    """What of a stage differs first: its code, its parameters, its inputs, or only what it made."""
    if outs(then) == outs(now):
        return IDENTICAL
    if entry_params(then) != entry_params(now):
        return "params"
    changed = [path for path, md5 in deps(then).items() if deps(now).get(path) != md5]
    if any(path.startswith(("src/", "stages/")) for path in changed) or then.get("cmd") != now.get("cmd"):
        return "code"
    return "inputs" if changed else "outs"


def _loss_gaps(then: bytes | None, now: bytes | None) -> Iterator[tuple[str, float]]:
    """Relative differences of the losses of two reports; a report that is gone is as far as can be."""
    if then is None or now is None:
        yield "the report", 1.0
        return
    before, after = numbers(json.loads(then)), numbers(json.loads(now))
    for key, value in before.items():
        if key.endswith(_LOSSES):
            yield key, abs(after.get(key, 0.0) - value) / max(abs(value), 1e-12)
