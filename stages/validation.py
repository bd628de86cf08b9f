"""Stage `validation`: check data/documents/; write reports/validation.json and Data Docs."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.common.errors import UserError
from compactgpt.common.storage import read_json
from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


def left_out(downloaded: Path) -> str:
    """Return how many texts of the corpus the stage `download` left out, for a message; no text if none."""
    try:
        counts = {reason: number for reason, number in read_json(downloaded)["left_out"].items() if number}
    except (UserError, KeyError):  # only a message: without the report it says less
        return ""
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
    return f"; download left out {reasons} (download.json)" if counts else ""


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Folder of document shards.")] = Path("data/documents"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/validation.json"),
    docs: Annotated[Path, typer.Option(help="Data Docs folder to write.")] = Path("data/data_docs/documents"),
    downloaded: Annotated[Path, typer.Option(help="Report of download, for messages.")] = Path(
        "reports/download.json"
    ),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Check the documents. The report is written before a failed expectation stops the pipeline."""
    from compactgpt.data.validation import require_success, validate

    with open_stage("validation", params_file, tracker, ("validation",)) as stage:
        facts = validate(documents, docs, stage.params.validation, progress=stage.progress("documents"))
        stage.report(report, facts)
        stage.data_docs(docs)
        require_success(facts, "the documents", f"{report} has the complete result{left_out(downloaded)}")


if __name__ == "__main__":
    app()
