"""Stage `validation` checks the documents, and writes a report and Data Docs (HTML pages)."""

from pathlib import Path
from typing import Annotated

import typer

from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Folder of the document shards.")] = Path("data/documents"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/validation.json"),
    docs: Annotated[Path, typer.Option(help="Folder to write Data Docs (HTML pages) to.")] = Path(
        "data/data_docs/documents"
    ),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Check the documents, write a report, and stop the pipeline if an expectation failed."""
    from compactgpt.data.validation import require_success, validate

    with open_stage("validation", params_file, tracker, ("validation",)) as stage:
        facts = validate(documents, docs, stage.params.validation, progress=stage.progress("documents"))
        stage.report(report, facts)
        stage.data_docs(docs)
        require_success(facts, "the documents", f"{report} has the complete result")


if __name__ == "__main__":
    app()
