"""The comparison's record -> Markdown, CSV, a table for the terminal, pictures.

Nothing is computed here and nothing is read but the record: a number that a reader sees is one of its
values, formatted by `show`. All words stand in TEXT, so that another language is another table.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]

COLUMNS = ("compact", "gpt2", "gpt2_xl")
TEXT: dict[str, str] = {
    "title": "The note's table, audited",
    "intro": "Made by `dvc repro` from reports/comparison.json, and from nothing else. The note's figures "
    "are quoted in its own language.",
    "tally": "Of the note's {number} claims: {counts}.",
    "table": "1. The note's table",
    "parameters": "Parameters",
    "perplexity": "Perplexity on OpenWebText (per GPT-2 token)",
    "context": "Context length (tokens)",
    "tokens": "Training tokens",
    "loss": "Loss (nats per token)",
    "compact": "The note's 30M model",
    "gpt2": "GPT-2 small",
    "gpt2_xl": "GPT-2 XL",
    "table_note": "The note's 30M model was not trained here. Where a figure of the compact demo stands in "
    "its column, it is from another, smaller model on another corpus, and decides nothing.",
    "measured": "2. What was measured here",
    "measured_note": "Every model saw the same {documents} documents of the val split ({tokens} GPT-2 "
    "tokens, {bytes} bytes), cut into windows of {window} tokens; the column *context* says what each one "
    "sees of them. Loss is in nats per GPT-2 token and perplexity per GPT-2 token, whatever the model's own "
    "tokenizer; bits per byte needs no tokenizer. Lower is better. Intervals are 95 %, from a bootstrap over "
    "documents; the ratio is the compact model's perplexity over that model's, paired by document.",
    "published_note": "Rows marked *published* are on other corpora, in windows of 1,024 tokens: their "
    "loss, perplexity and bits per byte are **not comparable** with the measured rows.",
    "model": "Model",
    "parameters_all": "Parameters, all",
    "parameters_non_embedding": "Parameters, non-embedding",
    "tokens_seen": "Tokens seen",
    "seen_context": "Context",
    "val_loss": "Loss",
    "val_perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "ratio": "Perplexity ratio",
    "known": "Known",
    "validation": "SHA-256 of the val split: `{sha256}`.",
    "forecast": "3. The loss expected, and the loss found",
    "expected": "Expected before training",
    "found": "Found",
    "80": "80 % interval",
    "95": "95 % interval",
    "inside": "inside",
    "outside": "outside",
    "basis": "Basis: {basis}.",
    "claims": "4. The note's claims",
    "claim": "Claim",
    "says": "The note says",
    "range": "Its range",
    "verdict": "Verdict",
    "because": "Because",
    "by_hand": "read by hand",
    "tasks": "5. Tasks, other views, flagged documents",
    "tasks_note": "Accuracies with Wilson's interval; p is McNemar's exact test of the compact model against "
    "that one on the same items. Flagged documents of the val split: {flagged} (reports/inspection.json).",
    "quantity": "Quantity",
    "p": "p",
    "text": "6. What the models wrote",
    "text_note": "Continuations of the beginnings of val documents, in GPT-2 tokens; human is how the "
    "documents go on. Formulas: `formulas` in reports/evaluation.json.",
    "way": "Way",
    "figure": "Figure",
    "samples": "7. Samples, side by side",
    "legend": "How a value is known",
    "known_measured": "**measured**: by this pipeline, on this machine.",
    "known_computed": "**computed**: follows from a configuration or an architecture.",
    "known_published": "**published**: by the source named in published.yaml.",
    "known_estimated": "**estimated**: written down before any run (reports/estimate.json). Decides nothing.",
    "known_reported": "**reported**: from somebody's public log. Decides nothing.",
    "legend_rule": "A value inside the claimed range *confirms* it (a count) or *supports* it; a disjoint "
    "one *contradicts* it; anything else is *inconclusive*. A verdict read by hand says so.",
    "demo": "demo",
    "none": "-",
    "at_least": "at least",
    "at_most": "at most",
    "to": "to",
    "step": "step",
    "train_loss_curve": "train, mean since the point before",
    "val_loss_curve": "val",
    "band": "expected, 95 %",
}
FORMATS = {
    "parameters": "{:,.0f}",
    "tokens": "{:,.0f}",
    "sequences": "{:,.0f}",
    "nats per token": "{:.3f}",
    "bits per byte": "{:.3f}",
    "ratio": "{:.3f}",
    "perplexity": "{:,.2f}",
    "share": "{:.1%}",
    "coefficient": "{:.2f}",
    "probability": "{:.2g}",
}


def show(value: float, unit: str) -> str:
    """Format one value of the record for readers."""
    return FORMATS[unit].format(value) if unit in FORMATS else f"{value:g}"


def show_interval(low: float | None, high: float | None, unit: str) -> str:
    """Format a range, which may be open on one side."""
    if low is None and high is None:
        return ""
    if low is None or high is None:
        word, bound = (TEXT["at_most"], high) if low is None else (TEXT["at_least"], low)
        return f"{word} {show(bound, unit)}" if bound is not None else ""
    return show(low, unit) if low == high else f"{show(low, unit)} {TEXT['to']} {show(high, unit)}"


def show_evidence(item: Mapping[str, Any]) -> str:
    """Format a value of the record with its interval where it has one."""
    text = show(item["value"], item["unit"])
    bounds = show_interval(item["low"], item["high"], item["unit"])
    return f"{text} ({bounds})" if bounds else text


class View:
    """A record, indexed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.evidence: dict[str, Mapping[str, Any]] = {item["id"]: item for item in record["evidence"]}
        self.claims: dict[str, Mapping[str, Any]] = {claim["id"]: claim for claim in record["claims"]}

    def value(self, name: str) -> str:
        """A value by its id, or a dash."""
        return show_evidence(self.evidence[name]) if name in self.evidence else TEXT["none"]

    def known_values(self, claim: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
        """What is known about a claim: deciding evidence first, then what stands beside it."""
        names = [decision["source"] for decision in claim["decisions"]] + list(claim["beside"])
        return [
            (self.evidence[name], show_evidence(self.evidence[name]))
            for name in names
            if name in self.evidence
        ]

    def cell(self, claim_id: str) -> list[str]:
        """A cell of the note's table as lines: the note's figure, what is known, the verdict."""
        claim = self.claims[claim_id]
        lines = [claim["quote"]]
        for item, text in self.known_values(claim):
            demo = f" {TEXT['demo']}" if item["model"] == "compact" else ""
            lines.append(f"{item['known']}{demo}: {text}")
        return [*lines, self.verdict(claim)]

    def verdict(self, claim: Mapping[str, Any]) -> str:
        """The verdict, marked where a human read it."""
        return f"{claim['verdict']} ({TEXT['by_hand']})" if claim["by_hand"] else str(claim["verdict"])

    def because(self, claim: Mapping[str, Any]) -> str:
        """The numbers that decided a claim, or the reason of a reading by hand."""
        reasons = [claim["reason"]] if claim["reason"] else []
        for decision in claim["decisions"]:
            if decision["source"] in self.evidence:
                continue
            bounds = show_interval(decision["low"], decision["high"], claim["unit"])
            reasons.append(f"{decision['source'].replace(' and ', ', ')}: {bounds}")
        reasons += [f"`{item['id']}` {text}, {item['known']}" for item, text in self.known_values(claim)]
        return "; ".join(reasons)

    def tally(self) -> str:
        """How many claims got which verdict, in a sentence."""
        counts = ", ".join(f"{number} {verdict}" for verdict, number in self.record["tally"])
        return TEXT["tally"].format(number=len(self.record["claims"]), counts=counts)

    def note_table(self) -> list[list[list[str]]]:
        """The note's rows, each a title and three cells of lines."""
        return [
            [[TEXT[row["id"]]], *(self.cell(row[column]) for column in COLUMNS)]
            for row in self.record["table"]
        ]

    def measured_table(self) -> list[list[str]]:
        """One row a model: measured ones, then published ones."""
        rows = []
        for model in self.record["models"]["measured"]:
            rows.append(self._model_row(model["name"], model["name"], model["context"], "measured"))
        for name in self.record["models"]["published"]:
            rows.append(
                self._model_row(name, f"{name}.openwebtext", self.value(f"{name}.context"), "published")
            )
        return rows

    def _model_row(self, name: str, scores: str, context: str, known: str) -> list[str]:
        # counted from an architecture, or by the model that ran
        counted = "parameters" if f"{name}.parameters.all_tensors" in self.evidence else "num_params"
        return [
            name,
            self.value(f"{name}.{counted}.all_tensors"),
            self.value(f"{name}.{counted}.non_embedding"),
            self.value(f"{name}.tokens_seen"),
            context,
            self.value(f"{scores}.loss"),
            self.value(f"{scores}.perplexity"),
            self.value(f"{scores}.bits_per_byte"),
            self.value(f"ratio.compact_to_{name}.perplexity") if known == "measured" else TEXT["none"],
            known,
        ]

    def claims_table(self) -> list[list[str]]:
        """One row a claim."""
        return [
            [
                claim["id"],
                claim["quote"],
                show_interval(claim["low"], claim["high"], claim["unit"]) or TEXT["none"],
                self.verdict(claim),
                self.because(claim) or TEXT["none"],
            ]
            for claim in self.record["claims"]
        ]

    def asked_table(self) -> list[list[str]]:
        """One row a model and accuracy, other view, or part of the val split."""
        rows = []
        for model in (m["name"] for m in self.record["models"]["measured"]):
            for name in self.evidence:
                quantity = name.removeprefix(f"{model}.")
                if name == quantity or not quantity.endswith((".accuracy", ".loss", "word_perplexity")):
                    continue
                task = quantity.removesuffix(".accuracy")
                p = self.value(f"ratio.compact_to_{model}.{task}.p_value")
                rows.append([model, quantity, self.value(name), p])
        return rows

    def text_table(self) -> list[list[str]]:
        """One row a model, way of writing and figure."""
        rows = []
        for name in self.evidence:
            model, _, figure = name.partition(".text.")
            if figure:
                way, _, quantity = figure.partition(".")
                writer = TEXT["none"] if way == "human" else model
                rows.append([writer, way, quantity, self.value(name)])
        return rows

    def forecast_table(self) -> list[list[str]]:
        """The two intervals of the loss expected, each with whether the measured loss is in it."""
        rows = []
        for share in ("80", "95"):
            where = "inside" if self.record["forecast"][f"inside_{share}"] else "outside"
            rows.append([TEXT[share], self.value(f"compact.expected_loss_{share}"), TEXT[where]])
        return rows


NOTE_HEAD = ["", *(TEXT[column] for column in COLUMNS)]
MEASURED_HEAD = [
    TEXT[key]
    for key in (
        "model",
        "parameters_all",
        "parameters_non_embedding",
        "tokens_seen",
        "seen_context",
        "val_loss",
        "val_perplexity",
        "bits_per_byte",
        "ratio",
        "known",
    )
]
CLAIMS_HEAD = [TEXT[key] for key in ("claim", "says", "range", "verdict", "because")]


def markdown(record: Record) -> str:
    """Render the record as reports/comparison.md."""
    view, validation = View(record), record["validation"]
    counted = {key: f"{validation[key]:,}" for key in ("documents", "tokens", "bytes", "window")}
    note_rows = [["<br>".join([f"**{c[0]}**", *c[1:]]) for c in row] for row in view.note_table()]
    expected = view.evidence["compact.expected_loss"]
    parts = [
        f"# {TEXT['title']}",
        view.tally(),
        TEXT["intro"],
        f"## {TEXT['table']}",
        _pipe_table(NOTE_HEAD, note_rows),
        TEXT["table_note"],
        f"## {TEXT['measured']}",
        _pipe_table(MEASURED_HEAD, view.measured_table()),
        TEXT["measured_note"].format(**counted),
        TEXT["published_note"],
        TEXT["validation"].format(sha256=validation["sha256"]),
        f"## {TEXT['forecast']}",
        _pipe_table(_forecast_head(view), view.forecast_table()),
        "\n".join(f"- {note}" for note in [TEXT["basis"].format(basis=expected["source"]), *record["notes"]]),
        f"## {TEXT['claims']}",
        _pipe_table(CLAIMS_HEAD, view.claims_table()),
        *_more(view),
        f"## {TEXT['legend']}",
        "\n".join(f"- {TEXT[key]}" for key in TEXT if key.startswith("known_")),
        TEXT["legend_rule"],
    ]
    return "\n\n".join(parts) + "\n"


_QUOTED = re.compile(r"^(<!-- table (\d) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


def _more(view: View) -> list[str]:
    """Sections that stand only where something was measured for them."""
    parts = []
    if rows := view.asked_table():
        head = [TEXT[key] for key in ("model", "quantity", "found", "p")]
        note = TEXT["tasks_note"].format(flagged=view.record["flagged"])
        parts += [f"## {TEXT['tasks']}", _pipe_table(head, rows), note]
    if rows := view.text_table():
        head = [TEXT[key] for key in ("model", "way", "figure", "found")]
        parts += [f"## {TEXT['text']}", _pipe_table(head, rows), TEXT["text_note"]]
    if view.record["samples"]:
        parts.append(f"## {TEXT['samples']}")
    for sample in view.record["samples"]:
        parts.append(f"### {sample['prompt']}")
        for model, ways in sample["models"].items():
            for way, text in ways.items():
                body = text.replace("```", "` ` `").replace("\n", "\n  ")
                parts.append(f"{model}, {way}:\n\n```text\n  {body}\n```")
    return parts


def quote_tables(page: str, report: str) -> str:
    """Renew the tables that a page quotes from `markdown`'s text, so that nobody types them.

    Args:
        page: text with pairs of lines `<!-- table N -->` and `<!-- end -->`.
        report: what `markdown` made; table N is the one in its section `## N.`.
    """
    tables = {
        section[0]: "\n".join(line for line in section.splitlines() if line.startswith("|"))
        for section in report.split("\n## ")[1:]
    }
    return _QUOTED.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", page)


def _pipe_table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


CSV_HEAD = ["table", "row", "column", "claim", "note", "verdict", "evidence", "value", "low", "high", "unit"]
CSV_HEAD = [*CSV_HEAD, "known", "corpus", "source"]


def csv_text(record: Record) -> str:
    """Render the record as reports/comparison.csv: one line a value, with the cell that it stands in."""
    view, buffer = View(record), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    placed = {row[c]: ("note", row["id"], c) for row in record["table"] for c in COLUMNS}
    for claim in record["claims"]:
        place = placed.get(claim["id"], ("claims", "", ""))
        about = [*place, claim["id"], claim["quote"], claim["verdict"]]
        for item, _ in view.known_values(claim) or [({}, "")]:
            writer.writerow(about + _csv_values(item))
    for model in [m["name"] for m in record["models"]["measured"]]:
        for name, item in view.evidence.items():
            if name.startswith(f"{model}.") or name == f"ratio.compact_to_{model}.perplexity":
                quantity = name.removeprefix(f"{model}.")
                writer.writerow(["measured", model, quantity, "", "", "", *_csv_values(item)])
    return buffer.getvalue()


def _csv_values(item: Mapping[str, Any]) -> list[Any]:
    return [item.get(key) for key in ("id", "value", "low", "high", "unit", "known", "corpus", "source")]


# The columns of the measured table that a terminal has room for.
TERMINAL_COLUMNS = (
    "model",
    "parameters_all",
    "parameters_non_embedding",
    "val_loss",
    "val_perplexity",
    "bits_per_byte",
    "ratio",
    "known",
)


def terminal(record: Record, *, width: int, colour: bool) -> str:
    """Render the note's table, what was measured and the forecast for a terminal.

    Args:
        record: the comparison's.
        width: of the terminal, in characters.
        colour: whether it understands ANSI styles.
    """
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view, buffer = View(record), io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    places = [MEASURED_HEAD.index(TEXT[key]) for key in TERMINAL_COLUMNS]
    measured = [[row[place].replace(" (", "\n(") for place in places] for row in view.measured_table()]
    note_rows = [["\n".join(cell) for cell in row] for row in view.note_table()]
    tables = [
        ("table", NOTE_HEAD, note_rows),
        ("measured", [MEASURED_HEAD[place] for place in places], measured),
        ("forecast", _forecast_head(view), view.forecast_table()),
    ]
    for key, head, rows in tables:
        lined = key == "table"
        box = HEAVY_HEAD if lined else SIMPLE_HEAD
        table = Table(title=TEXT[key], title_justify="left", show_lines=lined, box=box)
        for name, cells in zip(head, zip(*rows, strict=True), strict=True):
            longest = max((len(word) for cell in cells for word in cell.split()), default=0)
            table.add_column(name, min_width=longest, overflow="fold")  # numbers are neither cut nor broken
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: quotes hold brackets, which are no markup
        console.print(table)
    for note in (view.tally(), TEXT["table_note"], TEXT["published_note"].replace("*", "")):
        console.print(Text(note))
    return buffer.getvalue()


def _forecast_head(view: View) -> list[str]:
    return ["", TEXT["expected"], f"{TEXT['found']}: {view.value('compact.loss')}"]


def bits_per_byte_png(record: Record) -> bytes:
    """Draw the measured models' bits per byte with their intervals."""
    view = View(record)
    items = [view.evidence[f"{m['name']}.bits_per_byte"] for m in record["models"]["measured"]]
    names = [f"{item['model']}  {show(item['value'], item['unit'])}" for item in items]
    values = [item["value"] for item in items]
    spread = [
        [max(0.0, item["value"] - item["low"]) for item in items],
        [max(0.0, item["high"] - item["value"]) for item in items],
    ]
    figure, axes = _figure()
    axes.barh(names, values, xerr=spread, color=["#1f6feb", *["#9aa4b2"] * (len(items) - 1)], capsize=4)
    axes.invert_yaxis()
    axes.set_xlabel(f"{TEXT['bits_per_byte']}, {items[0]['corpus']}")
    return _png(figure)


def loss_png(record: Record) -> bytes:
    """Draw the loss curve and the interval that was expected before the training."""
    expected = View(record).evidence["compact.expected_loss"]
    figure, axes = _figure()
    for key, style in (("train_loss", {"alpha": 0.5, "linewidth": 0.8}), ("val_loss", {"marker": "o"})):
        points = [(row["step"], row[key]) for row in record["curve"] if row[key] is not None]
        axes.plot(*zip(*points, strict=True), label=TEXT[f"{key}_curve"], **style)
    axes.axhspan(expected["low"], expected["high"], alpha=0.15, color="#2da44e", label=TEXT["band"])
    axes.set_xlabel(TEXT["step"])
    axes.set_ylabel(TEXT["loss"])
    axes.legend()
    return _png(figure)


def _figure() -> Any:
    """A figure in the library's own style, whatever the user's settings are, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
        return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    """Draw with Agg; without the library's version and the date, so that equal figures are equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
