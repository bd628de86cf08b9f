"""Door of compactgpt.validation: data/documents/ -> reports/validation.json, data/data_docs/."""

from pathlib import Path
from typing import Annotated

import typer

from stages.door import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Folder of document shards.")] = Path("data/documents"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/validation.json"),
    docs: Annotated[Path, typer.Option(help="Folder for Great Expectations' own pages.")] = Path(
        "data/data_docs/documents"
    ),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Judge the documents; the report is written before a failed expectation stops the pipeline."""
    from compactgpt.validation import require_success, validate

    with open_stage("validation", params_file, tracker, ("validation",)) as stage:
        facts = validate(documents, docs, stage.params.validation, progress=stage.progress("documents"))
        stage.report(report, facts)
        require_success(
            facts, "the documents", "mend the corpus, or change the bounds in params.yaml (validation)"
        )


if __name__ == "__main__":
    app()
