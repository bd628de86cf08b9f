"""Stage `download`: write data/documents/, data/tokenizer/ and reports/download.json."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.tracking import state_folder
from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Shard folder to write.")] = Path("data/documents"),
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder to write.")] = Path("data/tokenizer"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/download.json"),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Download the corpus and the tokenizer, and write both folders."""
    from compactgpt.data.inputs import require_corpus
    from compactgpt.data.sources import download

    with open_stage("download", params_file, tracker, ("download",)) as stage:
        if stage.params.download.reads_folder:
            require_corpus(state_folder().parent)
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
