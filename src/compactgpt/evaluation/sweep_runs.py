"""Train and score the runs of a sweep in this process.

A sweep is a group of training runs that differ in a few parameters.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from compactgpt.common.console import silent
from compactgpt.common.device import stop_requests
from compactgpt.common.errors import BadConfig, Busy
from compactgpt.common.storage import sha256_file, write_json
from compactgpt.config import Params
from compactgpt.data.documents import read_names, row_groups
from compactgpt.data.tokenizer import load_encoding
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import scored_split, select_documents
from compactgpt.experiments import SweepGroup, SweepPoint, load_changed_params, sweep_points
from compactgpt.forecast.sweep import (
    ScoredDocuments,
    Sweep,
    SweepRun,
    corpus_settings,
    documents_sha256,
    read_sweep,
    recipe,
)
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import save_model
from compactgpt.training.initialization import folder_sha256
from compactgpt.training.trainer import Callbacks, open_splits, run_key, train

DATA = Path("data")


def run_sweep(
    name: str,
    params_file: Path,
    settings: Sequence[str],
    path: Path,
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Train and score the unfinished runs of the sweep `name`, and add their results to the file `path`.

    A run is finished if the file has its results. `settings` are changes of params.yaml, `key=value`.
    `folder` keeps training states and models.
    Raises Busy if the user stops a run; the next call resumes the run.
    """
    runner = SweepRunner(load_changed_params(params_file, settings), folder)
    points = sweep_points(name, params_file, settings)
    starts = {point.sweep.start for point in points}
    sweep = runner.finished_runs(path)
    with stop_requests() as should_stop:
        for point in points_to_run(points, sweep, folder):
            started = time.monotonic()
            try:
                model, train_loss = runner.train(point, should_stop)
            except Busy as error:
                raise Busy(
                    f"{point.name} was stopped, and its last step is saved: "
                    f"resume with `compactgpt experiment run {name}`"
                ) from error
            if point.name in starts:
                save_model(model, folder / point.name)
            run = runner.score(point, model, train_loss)
            kept = tuple(other for other in sweep.runs if other.name != run.name)
            sweep = sweep.model_copy(update={"runs": (*kept, run), "fit": None})
            write_json(path, sweep.model_dump(mode="json"))
            log(f"{run.name}: {run.loss:.4f} nats per token, {time.monotonic() - started:.0f} s")


def points_to_run(points: Sequence[SweepPoint], sweep: Sweep, folder: Path) -> list[SweepPoint]:
    """Return the runs to train: the unfinished runs, and the finished runs whose weights are needed again.

    An unfinished run can start from the weights of a finished run. If these weights are not in `folder`, the
    finished run must be trained again.
    """
    finished = [(run.name, run.params) for run in sweep.runs]
    names = {point.name for point in points if (point.name, point.values) not in finished}
    starts = {point.sweep.start for point in points if point.name in names and point.sweep.start}
    names |= {start for start in starts if not (folder / start).is_dir()}
    return [point for point in points if point.name in names]


class SweepRunner:
    """Trains and scores the runs of a sweep; all runs share the token files."""

    def __init__(self, params: Params, folder: Path) -> None:
        self.params, self.folder = params, folder
        self.splits, self.encoding = open_splits(DATA / "tokens"), load_encoding(DATA / "tokenizer")
        self.scored = scored_split(self.splits.val, self.encoding, params.evaluation.likelihood)
        self.tokens = (np.diff(self.scored.offsets) - 1).tolist()  # number of scored tokens per val document
        names = [name for group in row_groups(DATA / "documents") for name in read_names(group)]
        self.sources = {name: source.split("/")[0] for name, source in names}

    def finished_runs(self, path: Path) -> Sweep:
        """Return the sweep in the file `path`.

        Returns an empty sweep if the file is missing, or if its corpus or settings differ from the runner's.
        """
        ids = self.splits.val.document_ids
        empty = Sweep(
            corpus=corpus_settings(self.params),
            settings=recipe(self.params),
            data_sha256=sha256_file(self.splits.val.path),
            train_tokens=self.splits.train.header.tokens,
            val_tokens=sum(self.tokens),
            document_tokens=self.params.evaluation.likelihood.document_tokens,
            documents=ScoredDocuments(
                ids_sha256=documents_sha256(ids, self.tokens),
                tokens=tuple(self.tokens),
                sources=tuple(self.sources[name] for name in ids),
            ),
            runs=(),
        )
        found = read_sweep(path)
        return found if found and found.model_copy(update={"runs": (), "fit": None}) == empty else empty

    def train(self, point: SweepPoint, should_stop: Callable[[], bool]) -> tuple[GPT, float]:
        """Train a run. Return its model and its last training loss."""
        params, splits = point.params, self.splits
        if chosen := self._train_documents(point.sweep):
            splits = replace(
                splits, train=select_documents(splits.train, chosen), sha256=f"{splits.sha256} {chosen}"
            )
        if point.sweep.start:
            start = self.folder / point.sweep.start
            start_from = {"init_from": str(start), "init_sha256": folder_sha256(start)}
            params = params.model_copy(update={"training": params.training.model_copy(update=start_from)})
        states = self.folder / run_key(params, splits)
        trained = train(params, splits, states, Callbacks(should_stop=should_stop))
        shutil.rmtree(states, ignore_errors=True)
        return trained.model, trained.rows[-1].train_loss

    def _train_documents(self, sweep: SweepGroup) -> list[int]:
        """Return the indices of the train documents that a run of the sweep reads. Empty: all documents."""
        ids = self.splits.train.document_ids
        if sweep.train_source:
            chosen = [index for index, name in enumerate(ids) if self.sources[name] == sweep.train_source]
            if not chosen:
                raise BadConfig(
                    f"train_source: no document is from {sweep.train_source!r}: correct the experiment's file"
                )
            return chosen
        if sweep.train_documents:  # documents at equal distances in the split
            return [int(index) for index in np.linspace(0, len(ids) - 1, sweep.train_documents)]
        return []

    def score(self, point: SweepPoint, model: GPT, train_loss: float) -> SweepRun:
        """Return the settings of a trained run and its losses on the val split."""
        likelihood, training = point.params.evaluation.likelihood, point.params.training
        scores = as_neural_model(model, likelihood.batch_size).score(self.scored, likelihood.window, silent)
        return SweepRun(
            name=point.name,
            group=point.group,
            params=point.values,
            seed=training.seed,
            num_params=model.num_params_nanogpt,
            num_params_non_embedding=model.num_params_non_embedding,
            max_steps=training.max_steps,
            tokens_per_step=training.tokens_per_step,
            optimizer=training.optimizer,
            train_loss=train_loss,
            loss=float(scores.nats.sum()) / sum(self.tokens),
            nats=tuple(round(nats, 6) for nats in scores.nats.tolist()),
        )
