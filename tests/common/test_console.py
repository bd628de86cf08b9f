"""Progress without a terminal is a line on stderr. The other messages are tested in test_cli.py."""

from compactgpt.common.console import ProgressBar


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
