"""Run again what a run did, in a scratch work tree, and compare every hash and every number.

The work tree has the run's commit, its uncommitted changes and its params.yaml; data that DVC's cache or
remote has is taken from there (its hash is checked), everything else is made again, with the packages that
are installed here. The project itself is only read.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.errors import BadConfig, CheckFailed, MissingInput, UserError
from compactgpt.lineage import (
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
from compactgpt.records import HERE, Record, find, versions
from compactgpt.storage import write_bytes, write_text
from compactgpt.tracking.journal import machine_facts, numbers
from compactgpt.tracking.pipeline_run import packages

DATA = "download"  # the stage whose outs may be taken instead of made: they come from elsewhere
IDENTICAL, ROUNDING, DIFFERENT = "identical", "within rounding", "different"
# Another order of sums moved the demo's loss by 0.15 % (README, How exact); what does not round is not here.
LOSS_TOLERANCE = 0.01
_ARITHMETIC_PACKAGES = ("numpy", "torch")
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


def of(
    wanted: str, root: Path, *, check: bool, rebuild: bool, keep: bool, say: Callable[[str], None]
) -> Result | Checked:
    """Reproduce, or only check, a version by its name: see `records.find` and `reproduce`.

    Raises:
        BadConfig: the work tree is what lies here already.
    """
    if wanted == HERE:
        raise BadConfig(f"{HERE} is no run: name a run's id or a revision (`make ui` shows the runs)")
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        record = find(root, wanted, Path(scratch))
        if check:
            return Checked(record.name, gaps(record, root))
        return reproduce(record, root.resolve(), rebuild=rebuild, keep=keep, say=say)


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
    for path, md5 in deps(entry).items():
        if not path.startswith(("src/", "stages/")) and md5_path(root / path) != md5:
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


def _installed(name: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
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
    *,
    rebuild: bool = False,
    keep: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Run a record again and compare.

    Args:
        record: what was run.
        root: the repository.
        rebuild: make the data again even where it is at hand.
        keep: leave the scratch work tree.
        say: told what is done.

    Raises:
        MissingInput: something is missing that cannot be done without; see `gaps`.
        CheckFailed: a stage failed.
    """
    fatal = [gap.message for gap in gaps(record, root) if gap.fatal]
    if fatal:
        raise MissingInput(f"{record.name} can't be run again: {'; '.join(fatal)}")
    with _work_tree(record, root, keep) as tree:
        say(f"{record.name}: commit {record.commit[:9]} in {tree}")
        _restore(record, root, tree, rebuild=rebuild, say=say)
        _repro(tree, record.stage)
        made = Folder(tree)
        return judge(record, read_chain(made), made)


@contextmanager
def _work_tree(record: Record, root: Path, keep: bool) -> Iterator[Path]:
    """The run's commit with its changes and parameters, in a folder of its own."""
    tree = root / ".state" / "reproductions" / f"{record.name.split()[-1]}-{os.getpid()}"
    tree.parent.mkdir(parents=True, exist_ok=True)
    git(root, "worktree", "add", "--force", "--detach", str(tree), record.commit)
    try:
        if record.diff:
            patch = tree.with_suffix(".diff")
            patch.write_bytes(record.diff)
            git(tree, "apply", "--binary", "--whitespace=nowarn", str(patch))
            patch.unlink()
        write_bytes(tree / PARAMS, record.place.read(PARAMS) or b"")
        yield tree
    finally:
        if not keep:
            git(root, "worktree", "remove", "--force", str(tree))


def _restore(record: Record, root: Path, tree: Path, *, rebuild: bool, say: Callable[[str], None]) -> None:
    """Bring the data, what it is made from, weights that were fetched before, and its part of dvc.lock."""
    if (settings := root / ".dvc" / "config.local").exists():  # where remotes and their keys are
        shutil.copyfile(settings, tree / ".dvc" / "config.local")
    for folder in (root / ".state").iterdir():
        if folder.is_dir() and folder.name not in _OWN_STATE:
            shutil.copytree(folder, tree / ".state" / folder.name, copy_function=_link)
    entry = record.chain.entries.get(DATA, {})
    for path, md5 in deps(entry).items():
        if not (tree / path).is_file() and md5_path(tree / path) != md5 and md5_path(root / path) == md5:
            shutil.copytree(root / path, tree / path, dirs_exist_ok=True)
    (tree / LOCK).unlink(missing_ok=True)  # every stage without an entry is run
    if not entry or rebuild:
        return
    _save_lock(tree, {DATA: entry})
    if _bring(record, entry, Cache(root), tree) or _pull(tree):
        say("the data comes from DVC's cache, by its hash")
        return
    say("the data is made again")
    (tree / LOCK).unlink()


def _bring(record: Record, entry: Entry, cache: Cache, tree: Path) -> bool:
    """Put every out of a stage at its place; the scratch cache gets what DVC looks up."""
    if not _restorable(record, entry, cache):
        return False
    for path, md5 in outs(entry).items():
        shutil.rmtree(tree / path, ignore_errors=True)
        if not checkout(cache, record.place, path, md5, tree / path):
            return False
        if cache.has(md5):
            for source in cache.objects(md5):
                target = Cache(tree).file(source.parent.name + source.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    _link(source, target)
    return True


def _pull(tree: Path) -> bool:
    return _has_remote(tree) and _dvc(tree, "pull", DATA).returncode == 0


def _link(source: str | Path, target: str | Path) -> None:
    """Share a file that nobody writes into; copy it where links do not reach."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _save_lock(tree: Path, entries: Mapping[str, Entry]) -> None:
    write_text(tree / LOCK, json.dumps({"schema": "2.0", "stages": entries}))  # JSON is YAML


def _dvc(tree: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run DVC there, with this Python, and the code of the work tree before any that is installed."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    env = {
        **own,
        "COMPACTGPT_TRACKER": "none",
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}",
    }
    return subprocess.run([sys.executable, "-m", "dvc", *words], cwd=tree, env=env, check=False)


def _repro(tree: Path, stage: str) -> None:
    if _dvc(tree, "repro", *([stage] if stage else [])).returncode:
        raise CheckFailed("the run can't be made again: a stage failed (its message stands above)")


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
