"""Stage `download`: read the corpus; write document shards, the tokenizer and a report."""

from pathlib import Path

from compactgpt.tracking import state_folder
from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Read the corpus, download the tokenizer, and write both to data/."""
    from compactgpt.data.documents import MEGABYTE
    from compactgpt.data.inputs import require_corpus
    from compactgpt.data.sources import Limits, collect, download_tokenizer, open_corpus

    with open_stage("download", tracker, ("download",)) as stage:
        params, state, log = stage.params.download, state_folder(), stage.print_message
        require_corpus(state.parent, params)
        # Download the small tokenizer first: if there is no network, the stage fails at once.
        tokenizer = download_tokenizer(params.tokenizer, Path("data/tokenizer"), state / "wheels")
        progress = stage.progress("texts" if params.corpus == "hub" else "files")
        num_workers = stage.params.runtime.num_workers
        corpus = open_corpus(params, Path(), num_workers, progress, log, stage.ignored_files())
        limits = Limits(params.shard_megabytes * MEGABYTE, params.max_documents, params.max_bytes)
        facts = collect(corpus, Path("data/documents"), limits, state=state / "download", log=log)
        report = {**facts, "name": params.corpus_name, "tokenizer": tokenizer}
        stage.report(Path("reports/download.json"), report)


if __name__ == "__main__":
    app()
