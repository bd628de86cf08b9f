"""Stage `tokenization` encodes the documents, and writes a token file for each of the two splits."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.tracking import state_folder
from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    documents: Annotated[Path, typer.Option(help="Folder of the document shards.")] = Path("data/documents"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = Path("data/tokenizer"),
    tokens: Annotated[Path, typer.Option(help="Folder to write the token files to.")] = Path("data/tokens"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/tokenization.json"),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Encode the documents, and write the token files of the train split and the val split."""
    from compactgpt.data.tokenization import tokenize

    with open_stage("tokenization", params_file, tracker, ("tokenization",)) as stage:
        facts = tokenize(
            documents,
            tokenizer,
            tokens,
            stage.params.tokenization,
            num_workers=stage.params.runtime.num_workers,
            state=state_folder() / "tokenization",
            progress=stage.progress("bytes"),
        )
        stage.report(report, facts)


if __name__ == "__main__":
    app()
