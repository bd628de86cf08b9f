"""Progress without a terminal is a line on stderr. The other messages are tested in test_cli.py."""

import json
import math
import os
import subprocess
import sys

import pytest

from compactgpt.common.console import ProgressBar, echo_json


def test_a_line_of_progress_has_the_total_if_it_is_known(capsys):
    ProgressBar("download", "rows")(1000, 1000, {"loss": "2.5"})
    ProgressBar("download", "rows")(1000, 0)
    assert capsys.readouterr().err == "download: 1,000 of 1,000 rows, loss 2.5\ndownload: 1,000 rows\n"


def test_a_line_of_progress_has_the_time_that_is_left(capsys, monkeypatch):
    """From the second line of each pass on: 10 rows take 40 s, so 80 rows take 320 s."""
    show, clock = ProgressBar("download", "rows"), iter((100.0, 140.0, 460.0, 600.0, 640.0, 960.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for done in (10, 20, 100) * 2:
        show(done, 100)
    lines = ["download: 10 of 100 rows", "download: 20 of 100 rows, left 5:20", "download: 100 of 100 rows"]
    assert capsys.readouterr().err.splitlines() == lines * 2


def test_a_terminal_without_a_size_shows_the_bar():
    terminal, stderr = os.openpty()  # has 0 columns, as in some containers
    code = "from compactgpt.common.console import ProgressBar; ProgressBar('training', 'steps')(3, 1000)"
    subprocess.run([sys.executable, "-c", code], stderr=stderr, check=True)
    os.close(stderr)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert "training" in shown
    assert "3/1000" in shown


def test_json_has_null_for_numbers_that_json_lacks(capsys):
    value = {"a": [math.inf, (1, -math.inf)], "b": {"c": math.nan, "d": "Infinity", "e": 0.5, "f": True}}
    echo_json(value)
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown == {"a": [None, [1, None]], "b": {"c": None, "d": "Infinity", "e": 0.5, "f": True}}
