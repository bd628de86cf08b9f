"""Stage `inspection` checks the token files, and writes a report and Data Docs (HTML pages)."""

from pathlib import Path
from typing import Annotated

import typer

from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Folder of the document shards.")] = Path("data/documents"),
    tokens: Annotated[Path, typer.Option(help="Folder of the token files.")] = Path("data/tokens"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/inspection.json"),
    pass_file: Annotated[Path, typer.Option(help="File to write if all checks pass.")] = Path(
        "data/inspection.json"
    ),
    docs: Annotated[Path, typer.Option(help="Folder to write Data Docs (HTML pages) to.")] = Path(
        "data/data_docs/tokens"
    ),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Check the token files, write a report, and stop the pipeline if an expectation failed."""
    from compactgpt.common.storage import write_json
    from compactgpt.data.inspection import inspect, passed, uncompared
    from compactgpt.data.validation import require_success

    with open_stage("inspection", params_file, tracker, ("inspection",)) as stage:
        facts = inspect(
            documents,
            tokens,
            docs,
            stage.params.inspection,
            num_workers=stage.params.runtime.num_workers,
            progress=stage.progress("documents"),
        )
        stage.report(report, facts)
        stage.data_docs(docs)
        if message := uncompared(facts, stage.params.inspection.overlap_words):
            stage.print_message(message)
        require_success(facts, "the token files", f"{report} has the complete result")
        write_json(pass_file, passed(facts))


if __name__ == "__main__":
    app()
