"""Progress without a terminal is a line on stderr. The other messages are tested in test_cli.py."""

from compactgpt.common.console import ProgressBar


def test_a_line_of_progress_has_the_total_if_it_is_known(capsys):
    ProgressBar("download", "rows")(1000, 1000, {"loss": "2.5"})
    ProgressBar("download", "rows")(1000, 0)
    assert capsys.readouterr().err == "download: 1,000 of 1,000 rows, loss 2.5\ndownload: 1,000 rows\n"
