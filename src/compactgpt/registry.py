"""The compact model in MLflow: logged once a set of weights, registered, `champion` by the gate's word.

A logged model is code and safetensors: the weights' folder, the tokenizer's, the package itself, and the few
lines (`_ENTRANCE`) by which MLflow enters.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt import served
from compactgpt.errors import MissingInput
from compactgpt.lineage import MODEL, TOKENIZER, Cache, Chain, Place, checkout
from compactgpt.pipelines import Ending, read_out

NAME = "compactgpt"
CHAMPION = "champion"
EXAMPLE = "The future of AI is"
_PIPELINE = "pipeline_run"  # tag of a version
_NEEDED = (
    "mlflow",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "ruamel.yaml",
    "safetensors",
    "tiktoken",
    "torch",
)
_ENTRANCE = '''"""How MLflow enters the compact model; made by compactgpt.registry."""

from pathlib import Path

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

from compactgpt.served import Speaker


class Entrance(PythonModel):
    """A data frame with `prompt` in; one with `text` and `loss` (nats per token of the prompt) out."""

    def load_context(self, context):
        self.speaker = Speaker(Path(context.artifacts["model"]), Path(context.artifacts["tokenizer"]))

    def predict(self, context, model_input, params=None):
        rows = [self.speaker.answer(str(prompt), params) for prompt in model_input["prompt"]]
        return pd.DataFrame(rows, columns=["text", "loss"])


mlflow.models.set_model(Entrance())
'''


@dataclass(frozen=True)
class Shelf:
    """Where models of this project are kept."""

    client: Any
    experiment: str
    run_id: str  # that made the model
    pipeline: str  # run of the whole chain that it is part of, with its reports

    def register(self, ending: Ending, place: Place, cache: Cache) -> str:
        """Log and register the model of a chain, unless its weights are there already.

        Returns:
            The version of the registered model.

        Raises:
            MissingInput: DVC's cache lacks the model or the tokenizer.
        """
        weights = ending.tags["weights_sha256"]
        if version := version_of(self.client, weights):
            return version
        model_id = self._logged(weights) or self._log(ending, place, cache)
        if not self.client.search_registered_models(f"name = '{NAME}'"):
            about = "The compact GPT. The alias `champion` is the version that passed the gate last."
            self.client.create_registered_model(NAME, description=about)
        made = self.client.create_model_version(
            NAME,
            f"models:/{model_id}",
            run_id=self.run_id,
            model_id=model_id,
            tags={"weights_sha256": weights, _PIPELINE: self.pipeline},
            description=f"made by run {self.run_id}",
        )
        return str(made.version)

    def _logged(self, weights: str) -> str:
        """The logged model with these weights: the next step was cut off."""
        wanted = f"tags.weights_sha256 = '{weights}'"
        found = self.client.search_logged_models([self.experiment], filter_string=wanted)
        ready = [model.model_id for model in found if model.status == "READY"]
        for model in found:
            if model.status != "READY":
                self.client.delete_logged_model(model.model_id)
        return str(ready[0]) if ready else ""

    def _log(self, ending: Ending, place: Place, cache: Cache) -> str:
        """Write the model for MLflow and send it."""
        weights = ending.tags["weights_sha256"]
        with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
            folder = Path(scratch)
            for path in (MODEL, TOKENIZER):
                if not checkout(cache, place, path, ending.chain.out(path), folder / path):
                    raise MissingInput(f"DVC's cache lacks {path}")
            (folder / "card.md").write_text(card(ending.chain, place, cache, weights), encoding="utf-8")
            made = self.client.create_logged_model(
                self.experiment,
                name="compact",
                source_run_id=self.run_id,
                tags={"weights_sha256": weights},
                params=_shape(folder / MODEL / "config.json"),
                model_type="gpt",
            )
            save(folder, folder / "mlflow", made.model_id, self.run_id)
            self.client.log_model_artifacts(made.model_id, str(folder / "mlflow"))
        self.client.finalize_logged_model(made.model_id, "READY")
        self._log_figures(made.model_id, ending)
        return str(made.model_id)

    def _log_figures(self, model_id: str, ending: Ending) -> None:
        """Show the model's figures on its own page."""
        from mlflow.entities import Metric

        figures = {
            key: value
            for _, values in ending.metrics
            for key, value in values.items()
            if key in ("eval/loss", "eval/perplexity", "eval/bits_per_byte")
        }
        metrics = [Metric(key, value, 0, 0, model_id=model_id) for key, value in figures.items()]
        self.client.log_batch(self.run_id, metrics=metrics)


def _shape(config: Path) -> dict[str, str]:
    """The parameters that a model's page shows."""
    return {
        key: str(value)
        for key, value in json.loads(config.read_bytes()).items()
        if not isinstance(value, dict)
    }


def save(folder: Path, target: Path, model_id: str = "", run_id: str = "") -> None:
    """Write a model as MLflow loads it.

    Args:
        folder: holds the model, the tokenizer and card.md, at their usual places.
        target: the folder to make.
        model_id: of MLflow's logged model.
        run_id: that made it.
    """
    (folder / "entrance.py").write_text(_ENTRANCE, encoding="utf-8")
    package = folder / "code" / "compactgpt"
    shutil.copytree(Path(served.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about type hints that would make a signature: it is given
        import pandas as pd
        from mlflow.models import Model
        from mlflow.pyfunc import save_model

        save_model(
            path=str(target),
            python_model=str(folder / "entrance.py"),
            artifacts={
                name: str(folder / path) for name, path in [("model", MODEL), ("tokenizer", TOKENIZER)]
            },
            code_paths=[str(package)],
            signature=_signature(),
            input_example=pd.DataFrame({"prompt": [EXAMPLE]}),
            pip_requirements=[f"{name}=={_public(metadata.version(name))}" for name in _NEEDED],
            mlflow_model=Model(run_id=run_id or None, model_id=model_id or None),
        )
    shutil.copyfile(folder / "card.md", target / "README.md")


def _signature() -> Any:
    """What the model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {int: "long", float: "double", str: "string"}
    wishes = [ParamSpec(key, kinds[type(value)], value) for key, value in served.DEFAULTS.items()]
    answers = Schema([ColSpec("string", "text"), ColSpec("double", "loss")])
    return ModelSignature(Schema([ColSpec("string", "prompt")]), answers, ParamSchema(wishes))


def _public(version: str) -> str:
    """A version without its local part: no index has torch 2.13.0+cpu."""
    return version.partition("+")[0]


def card(chain: Chain, place: Place, cache: Cache, weights: str) -> str:
    """The model's card: the report's where there is one, else what is known here."""
    if content := read_out(chain, place, cache, "reports/model_card.md"):
        return content.decode()
    report = read_out(chain, place, cache, "reports/evaluation.json")
    figures = json.loads(report) if report else {}
    named = {"Loss (nats per token)": "loss", "Perplexity": "perplexity", "Bits per byte": "bits_per_byte"}
    rows = [
        f"| {name} | {figures[key]['value']:.4f} | {figures[key]['low']:.4f} to {figures[key]['high']:.4f} |"
        for name, key in named.items()
        if key in figures
    ]
    lines = ["# compactgpt", "", "A compact GPT, as MLflow's pyfunc: `prompt` in, `text` and `loss` out.", ""]
    if rows:
        lines += ["| On the val split | value | 95 % interval |", "| --- | --- | --- |", *rows, ""]
    return "\n".join([*lines, f"SHA-256 of the weights: `{weights}`.", ""])


def version_of(client: Any, weights: str) -> str:
    """The newest version with these weights, or nothing."""
    found = client.search_model_versions(f"name = '{NAME}' and tags.weights_sha256 = '{weights}'")
    return max((str(one.version) for one in found), key=int, default="")


def promote(client: Any, weights: str) -> str:
    """Make the version with these weights the champion: only the gate calls this.

    Args:
        client: MLflow's.
        weights: SHA-256 of the model's file.

    Returns:
        The version that carries the alias now.

    Raises:
        MissingInput: no version has them.
    """
    if not (version := version_of(client, weights)):
        raise MissingInput("MLflow has no model with these weights: `make repro` registers what it made")
    client.set_registered_model_alias(NAME, CHAMPION, version)
    return version


def champion(client: Any) -> Mapping[str, str] | None:
    """The version that passed the gate last, or None.

    Returns:
        `version`, `weights_sha256`, and as `run_id` the run of the pipeline that has its reports, lock and
        sums by document as artifacts.
    """
    found = client.search_registered_models(f"name = '{NAME}'")
    if not found or CHAMPION not in found[0].aliases:
        return None
    version = client.get_model_version_by_alias(NAME, CHAMPION)
    return {
        "version": str(version.version),
        "run_id": version.tags.get(_PIPELINE, ""),
        "weights_sha256": version.tags.get("weights_sha256", ""),
    }
