"""The comparison's record as rows of cells: for the templates, the terminal and CSV.

Nothing is computed here and nothing is read but the record: a number that a reader sees is one of its
values, formatted by `show`. `View` is what the templates, the plots and the model card read it through.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compactgpt.common.errors import BadData
from compactgpt.reporting.claims import relate
from compactgpt.reporting.messages import Language, messages, translate, translate_phrase

Record = Mapping[str, Any]
Item = Mapping[str, Any]  # a value of the record's evidence

COMPACT = "compact"
COLUMNS = ("compact", "gpt2", "gpt2_xl")  # of the note's table
CLAIMS_COLUMNS = ("claim", "says", "range", "verdict", "because")
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
)
PUBLISHED_COLUMNS = (
    "model",
    "parameters_all",
    "parameters_non_embedding",
    "seen_context",
    "published_text",
    "val_loss",
    "val_perplexity",
    "bits_per_byte",
    "source",
)
CARD_COLUMNS = ("model", "parameters_all", "seen_context", "val_loss", "val_perplexity", "bits_per_byte")
# The row of the note's table -> the same quantity of the model that was trained here.
TRAINED_HERE = {
    "parameters": "parameters.all_tensors",
    "perplexity": "perplexity",
    "context": "context",
    "tokens": "tokens_seen",
    "loss": "loss",
}
GROUPS: dict[str, tuple[str, ...]] = {  # of verdicts, for the sentence that sums them up
    "holds": ("confirmed", "supported"),
    "fails": ("contradicted", "self-inconsistent", "misleading"),
    "open": ("inconclusive", "unverifiable"),
    "waits": ("not yet measured",),
}
GROUP_OF = {verdict: group for group, verdicts in GROUPS.items() for verdict in verdicts}
FORMATS = {
    "parameters": "{:,.0f}",
    "tokens": "{:,.0f}",
    "sequences": "{:,.0f}",
    "nats per token": "{:.3f}",
    "bits per byte": "{:.3f}",
    "ratio": "{:,.3f}",
    "perplexity": "{:,.2f}",
    "share": "{:.1%}",
    "coefficient": "{:.2f}",
    "probability": "{:.2g}",
}
SMALL_RATIO = 0.1  # below it, three decimals say little or nothing: three significant digits do
_FRENCH_MARKS = str.maketrans({",": "\u202f", ".": ","})  # a narrow space that does not break


def show(value: float, unit: str, language: Language = "en") -> str:
    """Format one value of the record for readers."""
    if unit == "ratio" and abs(value) < SMALL_RATIO:
        return localized(f"{value:.3g}", language)
    return localized(FORMATS.get(unit, "{:g}").format(value), language)


def localized(number: str, language: Language) -> str:
    """Write a formatted number with the marks of a language."""
    return number.translate(_FRENCH_MARKS).replace("%", "\u202f%") if language == "fr" else number


def show_interval(low: float | None, high: float | None, unit: str, language: Language = "en") -> str:
    """Format a range, which may be open on one side."""
    words = messages(language)["text"]
    if low is None and high is None:
        return ""
    if low is None or high is None:
        word, bound = (words["at_most"], high) if low is None else (words["at_least"], low)
        return f"{word} {show(bound, unit, language)}" if bound is not None else ""
    ends = (show(low, unit, language), show(high, unit, language))
    return ends[0] if low == high else f"{ends[0]} {words['to']} {ends[1]}"


def show_evidence(item: Item, language: Language = "en") -> str:
    """Format a value of the record with its interval where it has one."""
    text = show(item["value"], item["unit"], language)
    bounds = show_interval(item["low"], item["high"], item["unit"], language)
    return f"{text} ({bounds})" if bounds else text


@dataclass(frozen=True)
class Cell:
    """What a reader sees, and the id of the value behind it where it is one."""

    text: str
    id: str = ""


class View:
    """A record, indexed, and seen in a language.

    Raises:
        BadData: an older version of compactgpt made the record.
    """

    def __init__(self, record: Record, language: Language = "en") -> None:
        if "about_note" not in record:
            raise BadData(
                "reports/evidence.json is of an older version of compactgpt: run `dvc repro` to make it"
            )
        self.record, self.language = record, language
        self.words = messages(language)["text"]
        self.evidence: dict[str, Item] = {item["id"]: item for item in record["evidence"]}
        self.claims: dict[str, Mapping[str, Any]] = {claim["id"]: claim for claim in record["claims"]}
        self.corpus: str = record["data"]["name"]
        self.about_note: bool = record["about_note"]  # or about a corpus of the user's own
        self.baselines = [m["name"] for m in record["models"]["measured"] if m["name"] != COMPACT]

    # --- words and numbers

    def say(self, key: str, **values: Any) -> str:
        """Return a message as plain text, filled."""
        return self.words[key].format(**values)

    def phrase(self, sentence: str) -> str:
        """Return a sentence of the record in the reader's language, if there is one for it."""
        return translate_phrase(self.language, sentence)

    def show(self, item: Item) -> str:
        """Format a value with its interval."""
        return show_evidence(item, self.language)

    def number(self, count: float | None) -> str:
        """Format a count, or a dash."""
        return self.words["none"] if count is None else localized(f"{count:,.0f}", self.language)

    def value(self, name: str) -> str:
        """Format a value by its id, or a dash."""
        return self.show(self.evidence[name]) if name in self.evidence else self.words["none"]

    def cell_of(self, name: str) -> Cell:
        """Return the cell of a value, or of a dash."""
        return Cell(self.value(name), name if name in self.evidence else "")

    def known(self, item: Item) -> str:
        """Say how a value is known."""
        return translate(self.language, "known", item["known"])

    def unit(self, item: Item) -> str:
        """Return the unit of a value."""
        return translate(self.language, "units", item["unit"])

    def conditions(self, item: Item) -> str:
        """Return corpus, context, stride and tokenizer of a value, those that it has, or a dash."""
        parts = [item["corpus"]] if item["corpus"] else []
        present = [key for key in ("context", "stride") if item[key]]
        parts += [f"{self.words[f'{key}_of']} {self.number(item[key])}" for key in present]
        if item["tokenizer"]:
            parts.append(f"{self.words['tokenizer']} {item['tokenizer']}")
        return ", ".join(parts) or self.words["none"]

    def head(self, columns: Iterable[str]) -> list[str]:
        """Return the heads of columns."""
        return [self.words[column] for column in columns]

    # --- sentences

    def title(self) -> str:
        """Return the title: the audit of the note, or the model on the user's own text."""
        return self.words["title"] if self.about_note else self.say("own_title", corpus=self.corpus)

    def headline(self) -> str:
        """Return the result in one sentence: the verdicts on the note, or the scores on the user's text."""
        if self.about_note:
            return self.sums()
        figures = {key: self.value(f"{COMPACT}.{key}") for key in ("loss", "perplexity", "bits_per_byte")}
        return self.say("own_headline", corpus=self.corpus, **figures)

    def second_sentence(self) -> str:
        """Return what became of the note's central guess, or how the model compares with the baselines."""
        return self.central() if self.about_note else self.ranking()

    def ranking(self) -> str:
        """Say which baselines the model is better or worse than, by the interval of the paired ratio."""
        names: dict[str, list[str]] = {"better": [], "worse": [], "level": []}
        for name in self.baselines:
            ratio = self.evidence[f"ratio.{COMPACT}_to_{name}.perplexity"]
            key = "better" if ratio["high"] < 1 else "worse" if ratio["low"] > 1 else "level"
            names[key].append(name)
        parts = [self.say(f"own_{key}", names=", ".join(found)) for key, found in names.items() if found]
        return self.say("own_ranking", parts="; ".join(parts)) if parts else ""

    def tally(self) -> str:
        """Say how many claims got which verdict."""
        counts = ", ".join(
            f"{number} {self.verdict_word(verdict)}" for verdict, number in self.record["tally"]
        )
        return self.say("tally", number=len(self.record["claims"]), counts=counts)

    def groups(self) -> list[tuple[str, int, str]]:
        """Return each group of verdicts that occurs: its name, how many claims, and which verdicts."""
        tally, found = dict(self.record["tally"]), []
        for group, verdicts in GROUPS.items():
            present = [verdict for verdict in verdicts if tally.get(verdict)]
            names = ", ".join(f"{tally[verdict]} {self.verdict_word(verdict)}" for verdict in present)
            if present:
                found.append((group, sum(tally[verdict] for verdict in present), names))
        return found

    def sums(self) -> str:
        """Return the verdict on the note in one sentence, built from the tally by rule."""
        parts = [self.say(f"{group}_1" if n == 1 else group, n=n) for group, n, _ in self.groups()]
        joined = f" {self.words['and']} ".join([", ".join(parts[:-1]), parts[-1]]) if parts[1:] else parts[0]
        return self.say("sums", number=len(self.record["claims"]), parts=joined)

    def central(self) -> str:
        """Say what became of the note's perplexity for its own model, in one sentence."""
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
        return self.say("central", quote=self.translation(claim) or claim["quote"], verdict=verdict)

    # --- claims

    def translation(self, claim: Mapping[str, Any]) -> str:
        """Return the claim in the reader's language and number format; nothing if the quote is that."""
        english: str = claim["english"]
        return "" if self.language == "fr" or english == claim["quote"] else english

    def known_items(self, claim: Mapping[str, Any]) -> list[Item]:
        """Return what is known about a claim: deciding evidence, then what is shown next to it."""
        names = [decision["source"] for decision in claim["decisions"]] + list(claim["beside"])
        return [self.evidence[name] for name in names if name in self.evidence]

    def verdict(self, claim: Mapping[str, Any]) -> str:
        """Return the verdict, marked where a human read it."""
        word = self.verdict_word(claim["verdict"])
        return f"{word} ({self.words['by_hand']})" if claim["by_hand"] else word

    def verdict_word(self, verdict: str) -> str:
        """Return a verdict in the reader's language."""
        return translate(self.language, "verdicts", verdict)

    def reasons(self, claim: Mapping[str, Any]) -> list[str]:
        """Say why a human read a claim so, or what its own numbers come to."""
        reasons = [self.phrase(claim["reason"])] if claim["reason"] else []
        for decision in claim["decisions"]:
            if decision["source"] in self.evidence:
                continue
            bounds = show_interval(decision["low"], decision["high"], claim["unit"], self.language)
            reasons.append(f"{decision['source'].replace(' and ', ', ')}{self.words['colon']}{bounds}")
        return reasons

    def claimed(self, claim: Mapping[str, Any]) -> str:
        """Format the claim's range, or a dash."""
        bounds = show_interval(claim["low"], claim["high"], claim["unit"], self.language)
        return bounds or self.words["none"]

    # --- tables

    def note_rows(self) -> list[tuple[str, list[Mapping[str, Any]], list[Item]]]:
        """Return the note's rows: a title, the claim of each column, the values of the model trained here."""
        rows = []
        for row in self.record["table"]:
            name = f"{COMPACT}.{TRAINED_HERE[row['id']]}"
            here = [self.evidence[name]] if self.about_note and name in self.evidence else []
            rows.append((self.words[row["id"]], [self.claims[row[column]] for column in COLUMNS], here))
        return rows

    def note_head(self) -> list[str]:
        """Return the heads of the note's table."""
        trained_here = [self.say("trained_here", corpus=self.corpus)] if self.about_note else []
        return ["", *(self.words[column] for column in COLUMNS), *trained_here]

    def measured_rows(self, columns: Sequence[str] = MEASURED_COLUMNS) -> list[list[Cell]]:
        """Return one row for each model that was measured on the val split."""
        rows = []
        for model in self.record["models"]["measured"]:
            name = model["name"]
            cells = self._sizes(name) | self._scores(name) | {"model": Cell(name)}
            cells["tokens_seen"] = self.cell_of(f"{name}.tokens_seen")
            cells["seen_context"] = Cell(self.phrase(model["context"]))
            cells["ratio"] = self.cell_of(f"ratio.{COMPACT}_to_{name}.perplexity")
            rows.append([cells[column] for column in columns])
        return rows

    def published_rows(self, columns: Sequence[str] = PUBLISHED_COLUMNS) -> list[list[Cell]]:
        """Return one row for each model whose score others published, on other text."""
        rows = []
        for name in self.record["models"]["published"]:
            loss = self.evidence[f"{name}.openwebtext.loss"]
            cells = self._sizes(name) | self._scores(f"{name}.openwebtext") | {"model": Cell(name)}
            cells["seen_context"] = self.cell_of(f"{name}.context")
            cells |= {"published_text": Cell(loss["corpus"]), "source": Cell(loss["source"])}
            rows.append([cells[column] for column in columns])
        return rows

    def _sizes(self, name: str) -> dict[str, Cell]:
        # counted from an architecture, or by the model that ran
        counted = "parameters" if f"{name}.parameters.all_tensors" in self.evidence else "num_params"
        conventions = {"parameters_all": "all_tensors", "parameters_non_embedding": "non_embedding"}
        return {column: self.cell_of(f"{name}.{counted}.{kind}") for column, kind in conventions.items()}

    def _scores(self, name: str) -> dict[str, Cell]:
        quantities = {"val_loss": "loss", "val_perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}
        return {column: self.cell_of(f"{name}.{quantity}") for column, quantity in quantities.items()}

    def counted(self) -> dict[str, str]:
        """Return how much text was measured, for sentences."""
        validation = self.record["validation"]
        return {key: self.number(validation[key]) for key in ("documents", "tokens", "bytes", "window")}

    def task_rows(self) -> list[list[str]]:
        """Return one row for each model and accuracy, other view, or part of the val split."""
        rows = []
        for model in (m["name"] for m in self.record["models"]["measured"]):
            for name in self.evidence:
                quantity = name.removeprefix(f"{model}.")
                if name == quantity or not quantity.endswith(
                    (".accuracy", ".loss", "word_perplexity", ".perplexity")
                ):
                    continue
                task = quantity.removesuffix(".accuracy")
                p = self.value(f"ratio.{COMPACT}_to_{model}.{task}.p_value")
                rows.append([model, quantity, self.value(name), p])
        return rows

    def text_rows(self) -> list[list[str]]:
        """Return one row for each model, way of writing and figure."""
        rows = []
        for name in self.evidence:
            model, _, figure = name.partition(".text.")
            if figure:
                way, _, quantity = figure.partition(".")
                writer = self.words["none"] if way == "human" else model
                rows.append([writer, way, quantity, self.value(name)])
        return rows

    def forecast_head(self) -> list[str]:
        """Return the heads of the forecast's table, the measured loss among them."""
        found = f"{self.words['found']}{self.words['colon']}{self.value(f'{COMPACT}.loss')}"
        return ["", self.words["expected"], found]

    def forecast_rows(self) -> list[list[str]]:
        """Return the two intervals of the expected loss, each with whether the measured loss is in it."""
        rows = []
        for share in ("80", "95"):
            where = "inside" if self.record["forecast"][f"inside_{share}"] else "outside"
            expected = self.value(f"{COMPACT}.expected_loss_{share}")
            rows.append([self.words[share], expected, self.words[where]])
        return rows

    def notes(self) -> list[str]:
        """Return what a reader of the forecast must know."""
        basis = self.say("basis", basis=self.evidence[f"{COMPACT}.expected_loss"]["source"])
        return [basis, *map(self.phrase, self.record["notes"])]


def _side(item: Item, claim: Mapping[str, Any]) -> str:
    """Say where an interval lies with respect to a claimed range."""
    relation = relate(item["low"], item["high"], claim["low"], claim["high"])
    if relation != "outside":
        return relation
    return "below" if item["high"] < claim["low"] else "above"


# --- CSV

CSV_HEAD = ["table", "row", "column", "claim", "note", "verdict", "evidence", "value", "low", "high", "unit"]
CSV_HEAD = [*CSV_HEAD, "known", "corpus", "source", "context", "stride", "tokenizer", "stage", "report"]
CSV_HEAD += ["data_sha256", "weights_sha256", "code_sha256"]


def csv_text(record: Record) -> str:
    """Render the record as reports/comparison.csv: one line for each value, with the cell that shows it."""
    view, buffer = View(record), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    placed = {row[c]: ("note", row["id"], c) for row in record["table"] for c in COLUMNS}
    for claim in record["claims"]:
        position = placed.get(claim["id"], ("claims", "", ""))
        about = [*position, claim["id"], claim["quote"], claim["verdict"]]
        for item in view.known_items(claim) or [{}]:
            writer.writerow(about + _csv_values(item))
    for model in [m["name"] for m in record["models"]["measured"]]:
        for name, item in view.evidence.items():
            if name.startswith(f"{model}.") or name == f"ratio.{COMPACT}_to_{model}.perplexity":
                quantity = name.removeprefix(f"{model}.")
                writer.writerow(["measured", model, quantity, "", "", "", *_csv_values(item)])
    return buffer.getvalue()


def _csv_values(item: Item) -> list[Any]:
    return [item.get("id" if key == "evidence" else key) for key in CSV_HEAD[CSV_HEAD.index("evidence") :]]
