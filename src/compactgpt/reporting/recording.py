"""Keeps what a finished experiment measured: `compactgpt experiment record NAME`. See compactgpt.results."""

from pathlib import Path

from compactgpt import experiments
from compactgpt.common.errors import BadConfig
from compactgpt.common.storage import read_json, write_json
from compactgpt.config import Params, load_params
from compactgpt.evaluation.likelihood import read_totals
from compactgpt.reporting.results import FOLDER, documents_of, result_of

# Where a run may differ from its experiment and still be it: machine, models beside it, the user's own paths.
FREE = (
    "runtime.",
    "baseline.",
    "training.launcher.",
    "training.compile",
    "training.dtype",
    "training.micro_batch_size",
    "training.checkpoint_interval",
    "training.init_",
    "download.files.",
)


def record(name: str, root: Path = Path(), conf: Path = experiments.CONF) -> Path:
    """Keep what reports/ says of an experiment's run as results/NAME.json.

    Raises:
        BadConfig: params.yaml is not that experiment, or the reports are of another run.
        MissingInput: a report is missing.
    """
    if experiments.find(name, conf).sweep:
        raise BadConfig(f"{name} is a sweep: `compactgpt ladder {name}` keeps its runs")
    params_file = root / "params.yaml"
    told = experiments.apply(name, params_file, conf=conf, write=False)
    if other := [line for line in told if not line.startswith(FREE)]:
        raise BadConfig(f"params.yaml is not the experiment {name}, which has\n  " + "\n  ".join(other))
    params = load_params(params_file)
    found = read_json(root / "reports" / "evidence.json")
    _check_made_from(params, {item["id"]: item["value"] for item in found["evidence"]})
    totals = read_totals(root / "data" / "evaluation" / "compact.parquet")
    documents = documents_of(totals.ids, totals.nats.tolist(), totals.tokens.tolist())
    path = root / FOLDER / f"{name}.json"
    write_json(path, result_of(name, found, params, documents).model_dump(mode="json"))
    return path


def _check_made_from(params: Params, values: dict[str, float]) -> None:
    """Refuse reports of another run than that of params.yaml."""
    from compactgpt.forecast.model_size import counts

    wanted = {
        "compact.parameters.all_tensors": counts(params.model).all_tensors,
        "compact.tokens_seen": params.training.max_steps * params.training.tokens_per_step,
    }
    for name, value in wanted.items():
        if values.get(name) != value:
            raise BadConfig(
                f"{name} is {values.get(name)} in reports/evidence.json and {value} by params.yaml: "
                "run `dvc repro` first"
            )
