"""What dvc.yaml offers to DVC's own commands: plots, the model registry, a readable table of experiments."""

import csv
import json
import subprocess
import time

import pytest

from compactgpt.common.sections import read_yaml
from tests.support.dvc_projects import ENVIRONMENT, ROOT, dvc, git, git_repository, run

TREE = read_yaml(ROOT / "dvc.yaml")
pytestmark = pytest.mark.slow
# As the training stage does: after each row, it writes the whole file again.
TRAIN = """import json, pathlib, time
lr = int(pathlib.Path("params.yaml").read_text().split()[1])
pathlib.Path("reports/metrics.json").write_text(json.dumps({"score": lr}))
rows = ["step,train_loss,val_loss"]
for step in range(1, 4):
    rows.append(f"{step},{5 - step}.0,{5 - step}.5")
    pathlib.Path("reports/loss.csv").write_text("\\n".join(rows) + "\\n")
    while step == 2 and not pathlib.Path("seen").exists():
        time.sleep(0.1)
"""


def chart(folder, *words):
    """The rows of the loss curve that `dvc plots` draws, and its x axis."""
    drawn = json.loads(dvc(folder, "plots", *words, "--json"))["data"]
    assert all("type" in one for charts in drawn.values() for one in charts)
    (found,) = drawn["Loss curve"]
    return found["content"]["data"]["values"], found["content"]["encoding"]["x"]["field"]


@pytest.fixture
def project(tmp_path):
    """The plots and metrics of dvc.yaml on one stage."""
    stage = {"cmd": "python train.py", "deps": ["train.py"], "params": ["lr"]}
    stage["outs"] = [{"reports/loss.csv": {"cache": False}}]
    stage["metrics"] = [{"reports/metrics.json": {"cache": False}}]
    plots = [plot for plot in TREE["plots"] if "Loss curve" in plot]
    place = git_repository(tmp_path / "project", {"training": stage}, plots=plots)
    (place / "train.py").write_text(TRAIN)
    (place / "params.yaml").write_text("lr: 1\nwidth: 2\n")
    (place / "reports").mkdir()
    (place / ".gitignore").write_text("seen\n")
    return place


def test_plots_are_declared_once_and_the_curve_has_its_step_for_its_axis():
    assert not [name for name, stage in TREE["stages"].items() if "plots" in stage]
    declared = {next(iter(plot)) if isinstance(plot, dict) else plot for plot in TREE["plots"]}
    pictures = {path for out in TREE["stages"]["comparison"]["outs"] for path in out if path.endswith(".png")}
    assert declared == {"Loss curve", *pictures}
    assert set(json.loads(dvc(ROOT, "plots", "show", "--json"))["data"]) == declared
    rows, axis = chart(ROOT, "show")
    assert axis == "step"
    steps = [line.split(",")[0] for line in (ROOT / "reports/loss.csv").read_text().splitlines()[1:]]
    assert [row["step"] for row in rows if row["field"] == "val_loss"] == steps


def test_the_curve_is_drawn_while_training_runs(project):
    training = subprocess.Popen(["dvc", "repro", "-q"], cwd=project, env=ENVIRONMENT)
    curve = project / "reports/loss.csv"
    deadline = time.monotonic() + 120
    while not (curve.exists() and curve.read_text().count("\n") == 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    rows, _ = chart(project, "show")
    assert training.poll() is None
    (project / "seen").touch()
    assert training.wait(120) == 0
    assert {row["step"] for row in rows} == {"1", "2"}
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first")
    rows, axis = chart(project, "diff", "HEAD")
    assert (axis, len(rows)) == ("step", 2 * 2 * 3)  # revisions, series, steps


def test_make_experiments_shows_metrics_and_what_differs(project):
    (project / "seen").touch()
    dvc(project, "repro", "-q")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first")
    dvc(project, "exp", "run", "-q", "-n", "faster", "-S", "lr=3")
    shown = run(ROOT, "make", "-n", "--no-print-directory", "experiments").stdout.splitlines()
    (line,) = [line for line in shown if line.startswith("dvc exp show")]
    table = list(csv.DictReader(run(project, "bash", "-c", f"{line} --csv").stdout.splitlines()))
    assert {(row["lr"], row["score"]) for row in table if row["Experiment"] == "faster"} == {("3", "3")}
    assert set(table[0]) == {"Experiment", "rev", "typ", "parent", "lr", "score"} - {"parent"}
    figures = json.loads((ROOT / "reports/metrics.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte"} <= set(figures)
