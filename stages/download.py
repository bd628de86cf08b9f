"""Stage `download`: params.yaml -> data/documents/, data/tokenizer/, reports/download.json."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.tracking import state_folder
from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Folder of document shards.")] = Path("data/documents"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = Path("data/tokenizer"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/download.json"),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Fetch the corpus and the tokenizer, as verified folders."""
    from compactgpt.data.sources import download

    with open_stage("download", params_file, tracker, ("download",)) as stage:
        facts = download(
            stage.params.download,
            documents,
            tokenizer,
            root=Path(),
            state=state_folder(),
            num_workers=stage.params.runtime.num_workers,
            progress=stage.progress("texts" if stage.params.download.corpus == "hub" else "files"),
            log=stage.print_message,
        )
        stage.report(report, facts)


if __name__ == "__main__":
    app()
