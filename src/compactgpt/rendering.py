"""The comparison's record -> Markdown, CSV, a table for the terminal.

Nothing is computed here and nothing is read but the record: a number that a reader sees is one of its
values, formatted by `show`. All words stand in words.py, in each language; `View` is what the page, the
charts and the model card look through as well.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compactgpt.claims import relate
from compactgpt.words import GROUPS, KNOWN, PHRASES, TEXT, VERDICTS, Language, translated

Record = Mapping[str, Any]

COLUMNS = ("compact", "gpt2", "gpt2_xl")
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


def show(value: float, unit: str, language: Language = "en") -> str:
    """Format one value of the record for readers."""
    return localized(FORMATS[unit].format(value) if unit in FORMATS else f"{value:g}", language)


_FRENCH_MARKS = str.maketrans({",": "\u202f", ".": ","})  # a narrow space that does not break


def localized(number: str, language: Language) -> str:
    """Write a formatted number with the marks of a language."""
    return number.translate(_FRENCH_MARKS).replace("%", "\u202f%") if language == "fr" else number


def show_interval(low: float | None, high: float | None, unit: str, language: Language = "en") -> str:
    """Format a range, which may be open on one side."""
    words = TEXT[language]
    if low is None and high is None:
        return ""
    if low is None or high is None:
        word, bound = (words["at_most"], high) if low is None else (words["at_least"], low)
        return f"{word} {show(bound, unit, language)}" if bound is not None else ""
    ends = (show(low, unit, language), show(high, unit, language))
    return ends[0] if low == high else f"{ends[0]} {words['to']} {ends[1]}"


def show_evidence(item: Mapping[str, Any], language: Language = "en") -> str:
    """Format a value of the record with its interval where it has one."""
    text = show(item["value"], item["unit"], language)
    bounds = show_interval(item["low"], item["high"], item["unit"], language)
    return f"{text} ({bounds})" if bounds else text


class View:
    """A record, indexed, and seen in a language."""

    def __init__(self, record: Record, language: Language = "en") -> None:
        self.record, self.language = record, language
        self.words = TEXT[language]
        self.evidence: dict[str, Mapping[str, Any]] = {item["id"]: item for item in record["evidence"]}
        self.claims: dict[str, Mapping[str, Any]] = {claim["id"]: claim for claim in record["claims"]}

    def say(self, key: str, **values: Any) -> str:
        """One sentence of words.py, filled."""
        return self.words[key].format(**values)

    def phrase(self, sentence: str) -> str:
        """A sentence of the record, in the reader's language where there is one for it."""
        return translated(self.language, sentence, PHRASES)

    def show(self, item: Mapping[str, Any]) -> str:
        """A value with its interval."""
        return show_evidence(item, self.language)

    def number(self, count: float) -> str:
        """A count."""
        return localized(f"{count:,.0f}", self.language)

    def value(self, name: str) -> str:
        """A value by its id, or a dash."""
        return self.show(self.evidence[name]) if name in self.evidence else self.words["none"]

    def known_values(self, claim: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
        """What is known about a claim: deciding evidence first, then what stands beside it."""
        names = [decision["source"] for decision in claim["decisions"]] + list(claim["beside"])
        return [
            (self.evidence[name], self.show(self.evidence[name])) for name in names if name in self.evidence
        ]

    def cell(self, claim_id: str) -> list[str]:
        """A cell of the note's table as lines: the note's figure, what is known, the verdict."""
        claim = self.claims[claim_id]
        lines = [claim["quote"]]
        for item, text in self.known_values(claim):
            lines.append(f"{self.known(item)}{self.words['colon']}{text}")
        return [*lines, self.verdict(claim)]

    def verdict(self, claim: Mapping[str, Any]) -> str:
        """The verdict, marked where a human read it."""
        word = self.verdict_word(claim["verdict"])
        return f"{word} ({self.words['by_hand']})" if claim["by_hand"] else word

    def verdict_word(self, verdict: str) -> str:
        """A verdict, in the reader's language."""
        return translated(self.language, verdict, VERDICTS)

    def known(self, item: Mapping[str, Any]) -> str:
        """How a value is known, marked where it is of the demo."""
        word = translated(self.language, item["known"], KNOWN)
        return f"{word} {self.words['demo']}" if item["model"] == "compact" else word

    def reasons(self, claim: Mapping[str, Any]) -> list[str]:
        """Why a human read a claim so, or what its own numbers come to."""
        reasons = [self.phrase(claim["reason"])] if claim["reason"] else []
        for decision in claim["decisions"]:
            if decision["source"] in self.evidence:
                continue
            bounds = show_interval(decision["low"], decision["high"], claim["unit"], self.language)
            reasons.append(f"{decision['source'].replace(' and ', ', ')}{self.words['colon']}{bounds}")
        return reasons

    def because(self, claim: Mapping[str, Any]) -> str:
        """The reasons, and the values that decided or stand beside."""
        values = [f"`{item['id']}` {text}, {self.known(item)}" for item, text in self.known_values(claim)]
        return "; ".join([*self.reasons(claim), *values])

    def tally(self) -> str:
        """How many claims got which verdict, in a sentence."""
        counts = ", ".join(
            f"{number} {self.verdict_word(verdict)}" for verdict, number in self.record["tally"]
        )
        return self.say("tally", number=len(self.record["claims"]), counts=counts)

    def sums(self) -> str:
        """The verdict on the note in one sentence, built from the tally by rule."""
        tally = dict(self.record["tally"])
        parts = []
        for group, verdicts in GROUPS.items():
            if n := sum(tally.get(verdict, 0) for verdict in verdicts):
                key = f"{group}_1" if n == 1 and f"{group}_1" in self.words else group
                parts.append(self.say(key, n=n))
        joined = f" {self.words['and']} ".join([", ".join(parts[:-1]), parts[-1]]) if parts[1:] else parts[0]
        return self.say("sums", number=len(self.record["claims"]), parts=joined)

    def central(self) -> str:
        """What became of the note's perplexity for its own model, in one sentence."""
        row = next(row for row in self.record["table"] if row["id"] == "perplexity")
        claim = self.claims[row["compact"]]
        deciding = [self.evidence[d["source"]] for d in claim["decisions"] if d["source"] in self.evidence]
        expected = self.evidence["note.expected_perplexity"]
        if deciding:
            found = "; ".join(self.show(item) for item in deciding)
            verdict = self.say("central_decided", verdict=self.verdict_word(claim["verdict"]), found=found)
        else:
            relation = self.say(f"relation_{_side(expected, claim)}")
            verdict = self.say("central_estimate", found=self.show(expected), relation=relation)
        return self.say("central", quote=claim["quote"], verdict=verdict)

    def note_table(self) -> list[list[list[str]]]:
        """The note's rows, each a title and three cells of lines."""
        return [
            [[self.words[row["id"]]], *(self.cell(row[column]) for column in COLUMNS)]
            for row in self.record["table"]
        ]

    def measured_cells(self) -> list[list["Cell"]]:
        """One row a model: measured ones, then published ones."""
        rows = []
        for model in self.record["models"]["measured"]:
            context = Cell(self.phrase(model["context"]))
            rows.append(self._model_row(model["name"], model["name"], context, "measured"))
        for name in self.record["models"]["published"]:
            context = self.cell_of(f"{name}.context")
            rows.append(self._model_row(name, f"{name}.openwebtext", context, "published"))
        return rows

    def _model_row(self, name: str, scores: str, context: "Cell", known: str) -> list["Cell"]:
        # counted from an architecture, or by the model that ran
        counted = "parameters" if f"{name}.parameters.all_tensors" in self.evidence else "num_params"
        ratio = f"ratio.compact_to_{name}.perplexity" if known == "measured" else ""
        quantities = [f"{scores}.{quantity}" for quantity in ("loss", "perplexity", "bits_per_byte")]
        return [
            Cell(name),
            self.cell_of(f"{name}.{counted}.all_tensors"),
            self.cell_of(f"{name}.{counted}.non_embedding"),
            self.cell_of(f"{name}.tokens_seen"),
            context,
            *(self.cell_of(quantity) for quantity in quantities),
            self.cell_of(ratio),
            Cell(translated(self.language, known, KNOWN)),
        ]

    def cell_of(self, name: str) -> "Cell":
        """The cell of a value, or a dash."""
        return Cell(self.value(name), name if name in self.evidence else "")

    def measured_table(self, columns: Sequence[str] = ()) -> list[list[str]]:
        """The rows of `measured_cells` as text, all columns or some."""
        places = [MEASURED_COLUMNS.index(column) for column in columns or MEASURED_COLUMNS]
        return [[row[place].text for place in places] for row in self.measured_cells()]

    def counted(self) -> dict[str, str]:
        """How much text was measured, for sentences."""
        validation = self.record["validation"]
        return {key: self.number(validation[key]) for key in ("documents", "tokens", "bytes", "window")}

    def claims_table(self) -> list[list[str]]:
        """One row a claim."""
        return [
            [
                claim["id"],
                claim["quote"],
                show_interval(claim["low"], claim["high"], claim["unit"], self.language)
                or self.words["none"],
                self.verdict(claim),
                self.because(claim) or self.words["none"],
            ]
            for claim in self.record["claims"]
        ]

    def asked_table(self) -> list[list[str]]:
        """One row a model and accuracy, other view, or part of the val split."""
        rows = []
        for model in (m["name"] for m in self.record["models"]["measured"]):
            for name in self.evidence:
                quantity = name.removeprefix(f"{model}.")
                if name == quantity or not quantity.endswith(
                    (".accuracy", ".loss", "word_perplexity", ".perplexity")
                ):
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
                writer = self.words["none"] if way == "human" else model
                rows.append([writer, way, quantity, self.value(name)])
        return rows

    def forecast_table(self) -> list[list[str]]:
        """The two intervals of the loss expected, each with whether the measured loss is in it."""
        rows = []
        for share in ("80", "95"):
            where = "inside" if self.record["forecast"][f"inside_{share}"] else "outside"
            rows.append([self.words[share], self.value(f"compact.expected_loss_{share}"), self.words[where]])
        return rows


def _side(item: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    """Where an interval lies with respect to a claimed range."""
    relation = relate(item["low"], item["high"], claim["low"], claim["high"])
    if relation != "outside":
        return relation
    return "below" if item["high"] < claim["low"] else "above"


@dataclass(frozen=True)
class Cell:
    """What a reader sees, and the id of the value behind it where it is one."""

    text: str
    id: str = ""


MEASURED_COLUMNS = (
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


def markdown(record: Record, language: Language = "en") -> str:
    """Render the record as reports/comparison.md."""
    view, validation = View(record, language), record["validation"]
    words = view.words
    note_rows = [["<br>".join([f"**{c[0]}**", *c[1:]]) for c in row] for row in view.note_table()]
    expected = view.evidence["compact.expected_loss"]
    notes = [view.say("basis", basis=expected["source"]), *map(view.phrase, record["notes"])]
    parts = [
        f"# {words['title']}",
        f"{view.sums()} {view.central()}",
        view.tally(),
        words["intro"],
        f"## {words['table']}",
        pipe_table(["", *_head(view, COLUMNS)], note_rows),
        words["table_note"],
        f"## {words['measured']}",
        pipe_table(_head(view, MEASURED_COLUMNS), view.measured_table()),
        words["measured_note"].format(**view.counted()),
        words["published_note"],
        view.say("validation", sha256=validation["sha256"]),
        f"## {words['forecast']}",
        pipe_table(_forecast_head(view), view.forecast_table()),
        "\n".join(f"- {note}" for note in notes),
        f"## {words['claims']}",
        pipe_table(_head(view, CLAIMS_COLUMNS), view.claims_table()),
        *_more(view),
        f"## {words['legend']}",
        "\n".join(f"- {words[key]}" for key in words if key.startswith("known_")),
        words["legend_rule"],
    ]
    return "\n\n".join(parts) + "\n"


CARD_COLUMNS = (
    "model",
    "parameters_all",
    "seen_context",
    "val_loss",
    "val_perplexity",
    "bits_per_byte",
    "known",
)
CLAIMS_COLUMNS = ("claim", "says", "range", "verdict", "because")


def _head(view: View, columns: Iterable[str]) -> list[str]:
    return [view.words[column] for column in columns]


_QUOTED = re.compile(r"^(<!-- table (\d) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


def _more(view: View) -> list[str]:
    """Sections that stand only where something was measured for them."""
    parts = []
    if rows := view.asked_table():
        head = _head(view, ("model", "quantity", "found", "p"))
        note = view.say("tasks_note", flagged=view.record["flagged"])
        parts += [f"## {view.words['tasks']}", pipe_table(head, rows), note]
    if rows := view.text_table():
        head = _head(view, ("model", "way", "figure", "found"))
        parts += [f"## {view.words['text']}", pipe_table(head, rows), view.words["text_note"]]
    if view.record["samples"]:
        parts.append(f"## {view.words['samples']}")
    for sample in view.record["samples"]:
        parts.append(f"### {sample['prompt']}")
        for model, ways in sample["models"].items():
            for way, text in ways.items():
                body = text.replace("```", "` ` `").replace("\n", "\n  ")
                parts.append(f"{model}, {view.words[way]}:\n\n```text\n  {body}\n```")
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


def pipe_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


CSV_HEAD = ["table", "row", "column", "claim", "note", "verdict", "evidence", "value", "low", "high", "unit"]
CSV_HEAD = [*CSV_HEAD, "known", "corpus", "source", "context", "stride", "tokenizer", "stage", "report"]
CSV_HEAD += ["data_sha256", "weights_sha256", "code_sha256"]


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
    return [item.get("id" if key == "evidence" else key) for key in CSV_HEAD[CSV_HEAD.index("evidence") :]]


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


def terminal(record: Record, *, width: int, colour: bool, language: Language = "en") -> str:
    """Render the note's table, what was measured and the forecast for a terminal.

    Args:
        record: the comparison's.
        width: of the terminal, in characters.
        colour: whether it understands ANSI styles.
        language: of the words.
    """
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view, buffer = View(record, language), io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    words, head = view.words, _head(view, TERMINAL_COLUMNS)
    measured = [[cell.replace(" (", "\n(") for cell in row] for row in view.measured_table(TERMINAL_COLUMNS)]
    note_rows = [["\n".join(cell) for cell in row] for row in view.note_table()]
    tables = [
        ("table", ["", *_head(view, COLUMNS)], note_rows),
        ("measured", head, measured),
        ("forecast", _forecast_head(view), view.forecast_table()),
    ]
    for key, names, rows in tables:
        lined = key == "table"
        box = HEAVY_HEAD if lined else SIMPLE_HEAD
        table = Table(title=words[key], title_justify="left", show_lines=lined, box=box)
        for name, cells in zip(names, zip(*rows, strict=True), strict=True):
            longest = max((len(word) for cell in cells for word in cell.split()), default=0)
            table.add_column(name, min_width=longest, overflow="fold")  # numbers are neither cut nor broken
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: quotes hold brackets, which are no markup
        console.print(table)
    for note in (view.sums(), view.central(), words["table_note"], words["published_note"].replace("*", "")):
        console.print(Text(note))
    return buffer.getvalue()


def _forecast_head(view: View) -> list[str]:
    return ["", view.words["expected"], f"{view.words['found']}: {view.value('compact.loss')}"]
