"""Format the values of reports/evidence.json as sentences and as rows of cells."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from compactgpt.reporting.claims import COMPACT
from compactgpt.reporting.templating import Language, load_messages, translate

Record = Mapping[str, Any]  # the content of reports/evidence.json
Item = Mapping[str, Any]  # a value in reports/evidence.json: the fields of `Evidence`

# Name of a table -> its columns. `note` has the columns of the table in the note *Performance de NanoGPT
# Compact contre GPT-2*; `View.note_head` adds a column for the model trained here.
COLUMNS = {
    "note": ("compact", "gpt2", "gpt2_xl"),
    "claims": ("claim", "says", "range", "verdict", "because"),
    "measured": (
        "model", "parameters_all", "seen_context", "val_loss", "clean_loss", "val_perplexity",
        "bits_per_byte", "ratio",
    ),
    "published": (
        "model", "parameters_all", "parameters_non_embedding", "seen_context", "published_text", "val_loss",
        "val_perplexity", "bits_per_byte", "source",
    ),
}  # fmt: skip
# Row of the table `note` -> quantity of the model trained here. The value's id is `compact.<quantity>`.
TRAINED_HERE = {
    "parameters": "parameters.all_tensors",
    "perplexity": "perplexity",
    "context": "context",
    "tokens": "tokens_seen",
    "loss": "loss",
}
# Name of a group of verdicts -> the verdicts in this group. `View.groups` counts them.
GROUPS: dict[str, tuple[str, ...]] = {
    "holds": ("confirmed", "supported"),
    "repeats": ("restated", "consistent"),
    "fails": ("contradicted", "self-inconsistent", "misleading"),
    "open": ("inconclusive", "unverifiable"),
    "waits": ("not yet measured",),
}
# Unit -> format of a number in this unit.
FORMATS = {
    "parameters": "{:,.0f}",
    "tokens": "{:,.0f}",
    "sequences": "{:,.0f}",
    "nats per token": "{:.3f}",
    "bits per byte": "{:.3f}",
    "ratio": "{:,.3f}",
    "difference": "{:.3f}",
    "perplexity": "{:,.2f}",
    "share": "{:.1%}",
    "coefficient": "{:.2f}",
    "probability": "{:.2g}",
}
# A ratio or a perplexity is shown with three significant digits if the number is outside these limits.
SMALL_RATIO, LARGE_PERPLEXITY = 0.1, 1e9
_FRENCH_MARKS = str.maketrans({",": "\u202f", ".": ",", "%": "\u202f%"})  # \u202f: a narrow space


def show(value: float, unit: str, language: Language = "en") -> str:
    """Format a number as its unit requires, with the separators of `language`."""
    if unit in ("ratio", "perplexity") and not SMALL_RATIO <= value < LARGE_PERPLEXITY:
        return localized(f"{value:.3g}", language)
    return localized(FORMATS.get(unit, "{:g}").format(value), language)


def localized(number: str, language: Language) -> str:
    """Replace the English separators in `number` by those of `language`."""
    return number.translate(_FRENCH_MARKS) if language == "fr" else number


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    id: str = ""  # id of the shown value in reports/evidence.json; "": the text is not from there
    note: str = ""  # a second line below the text


class View:
    """Formats the values and the claims of reports/evidence.json in one language."""

    def __init__(self, record: Record, language: Language = "en") -> None:
        self.record, self.language = record, language
        self.words = load_messages(language)["text"]
        self.evidence: dict[str, Item] = {item["id"]: item for item in record["evidence"]}
        self.claims: dict[str, Mapping[str, Any]] = {claim["id"]: claim for claim in record["claims"]}
        self.corpus: str = record["data"]["name"]
        # False: the corpus is the user's own, so the note's claims are not checked.
        self.about_note: bool = record["about_note"]
        # Rows of the table `measured`, one for each model and size of windows.
        self.rows: list[Mapping[str, Any]] = record["models"]["measured"]
        self.models: list[str] = list(dict.fromkeys(row["name"] for row in self.rows))
        self.baselines = [name for name in self.models if name != COMPACT]

    # --- messages and formatted numbers

    @cached_property
    def facts(self) -> dict[str, str]:
        """The values that all messages of the report may use: name of a placeholder -> formatted value."""
        record, words = self.record, self.words
        row = next(row for row in record["table"] if row["id"] == "perplexity")
        small, gpt2 = self.claims[row["compact"]], self.claims[row["gpt2"]]
        decided = [self.evidence[d["source"]] for d in small["decisions"] if d["source"] in self.evidence]
        small_key = "answer_measured" if decided else "answer_expected"
        known = (decided or [self.evidence["note.expected_perplexity"]])[0]
        calibration = record["calibration"]
        held = {"held": self.number(calibration["held_95"]), "of": self.number(calibration["of"])}
        reached = self.evidence.get(f"{COMPACT}.perplexity")
        counted = ("documents", "tokens", "bytes", "window")
        return {
            **{key: self.number(record["validation"][key]) for key in counted},
            **{key: self.value(f"{COMPACT}.{key}") for key in ("loss", "perplexity", "bits_per_byte")},
            **{key: words["inside" if inside else "outside"] for key, inside in record["forecast"].items()},
            **held,
            "corpus": self.corpus,
            "sha256": record["validation"]["sha256"],
            "flagged": str(record["flagged"]),
            "parameters": self.value(f"{COMPACT}.parameters.all_tensors"),
            "without": self.value(f"{COMPACT}.parameters.non_embedding"),
            "layers": self.number(record["models"]["shape"]["n_layer"]),
            "width": self.number(record["models"]["shape"]["n_embd"]),
            "seen": self.value(f"{COMPACT}.tokens_seen"),
            "expected_loss": self.value(f"{COMPACT}.expected_loss"),
            "basis": self.evidence[f"{COMPACT}.expected_loss"]["source"],
            "note_loss": self.value("note.expected_loss"),
            "note_perplexity": self.value("note.expected_perplexity"),
            "by_hand": self.value("note.hand_set_loss"),
            "claimed": self.quoted(small),
            "claimed_gpt2": self.quoted(gpt2),
            "published": ", ".join(map(self.figure, self.known_items(gpt2))) or words["none"],
            "small": words[small_key].format(found=self.show(known), **held),
            "reached": self.figure(reached) if reached else words["not_defined"],
        }

    def say(self, key: str, **values: Any) -> str:
        """Return the message `key` without asterisks. `facts` and `values` replace its placeholders."""
        return self.words[key].replace("*", "").format(**{**self.facts, **values})

    def translate(self, section: str, text: str) -> str:
        """Translate `text` with the messages in `section`. Without a translation, return `text`."""
        return translate(self.language, section, text)

    def figure(self, item: Item) -> str:
        """Format a value with its unit, without its interval."""
        return show(item["value"], item["unit"], self.language)

    def show(self, item: Item) -> str:
        """Format a value, followed by its interval if the value has one."""
        bounds = self.interval(item["low"], item["high"], item["unit"])
        return f"{self.figure(item)} ({bounds})" if bounds else self.figure(item)

    def interval(self, low: float | None, high: float | None, unit: str) -> str:
        """Format the interval from `low` to `high`. None: no limit on this side. For no limits, return ""."""
        if low is not None and high is not None:
            ends = (show(low, unit, self.language), show(high, unit, self.language))
            return ends[0] if low == high else f"{ends[0]} {self.words['to']} {ends[1]}"
        if high is not None:
            return f"{self.words['at_most']} {show(high, unit, self.language)}"
        return "" if low is None else f"{self.words['at_least']} {show(low, unit, self.language)}"

    def number(self, count: float | None) -> str:
        """Format a count. For None, return a dash."""
        return self.words["none"] if count is None else localized(f"{count:,.0f}", self.language)

    def value(self, name: str) -> str:
        """Format the value with the id `name`.

        Returns `not defined` for a perplexity too large for a float, and a dash if the value is missing.
        """
        if name in self.evidence:
            return self.show(self.evidence[name])
        is_too_large = name.endswith(".perplexity") and name.replace("perplexity", "loss") in self.evidence
        return self.words["not_defined" if is_too_large else "none"]

    def cell(self, name: str) -> Cell:
        """Return a cell with the text `value(name)`. Its id is `name`, or "" if the value is missing."""
        return Cell(self.value(name), name if name in self.evidence else "")

    def known_on(self, item: Item) -> str:
        """Return how a value was obtained and on which corpus, such as `measured (openwebtext val)`."""
        corpus = f" ({self.translate('phrases', item['corpus'])})" if item["corpus"] else ""
        return self.translate("known", item["known"]) + corpus

    def conditions(self, item: Item) -> str:
        """Return a value's corpus, context, stride and tokenizer. If all are missing, return a dash."""
        parts = [item["corpus"]] if item["corpus"] else []
        present = [key for key in ("context", "stride") if item[key]]
        parts += [f"{self.words[f'{key}_of']} {self.number(item[key])}" for key in present]
        if item["tokenizer"]:
            parts.append(f"{self.words['tokenizer']} {item['tokenizer']}")
        return ", ".join(parts) or self.words["none"]

    def head(self, columns: Iterable[str]) -> list[str]:
        """Return the headings of `columns` in `self.language`."""
        return [self.words[column] for column in columns]

    # --- sentences

    def headline(self) -> str:
        """Return the main result: claimed, published and measured perplexities.

        If the corpus is the user's own, return only the scores of the model trained here.
        """
        return self.say("answer" if self.about_note else "own_headline")

    def summary(self) -> str:
        """Return a text: what perplexity means, and how many claims of the published note hold.

        If the corpus is the user's own, the text compares the compact model with the baselines instead.
        """
        return self.say("summary", sums=self.sums()) if self.about_note else self.ranking()

    def ranking(self) -> str:
        """Return the sentence that ranks the compact model against the baselines.

        Two models are level if the interval of their perplexity ratio contains 1.
        """
        names: dict[str, list[str]] = {"better": [], "worse": [], "level": []}
        for name in self.baselines:
            ratio = self.evidence.get(f"ratio.{COMPACT}_to_{name}.perplexity")  # None: the ratio is infinite
            key = "worse" if not ratio or ratio["low"] > 1 else "better" if ratio["high"] < 1 else "level"
            names[key].append(name)
        parts = [self.say(f"own_{key}", names=", ".join(found)) for key, found in names.items() if found]
        return self.say("own_ranking", parts="; ".join(parts)) if parts else ""

    def tally(self) -> str:
        """Return the sentence with the number of claims for each verdict."""
        counts = ", ".join(self._count(*pair) for pair in self.record["tally"])
        return self.say("tally", number=len(self.record["claims"]), counts=counts)

    def _count(self, verdict: str, number: int) -> str:
        return f"{number} {self.translate('verdicts', verdict)}"

    def groups(self) -> list[tuple[str, int, str]]:
        """Return each group that has claims: (name, number, text such as `3 confirmed, 2 supported`)."""
        tally, found = dict(self.record["tally"]), []
        for group, verdicts in GROUPS.items():
            present = [verdict for verdict in verdicts if tally.get(verdict)]
            names = ", ".join(self._count(verdict, tally[verdict]) for verdict in present)
            if present:
                found.append((group, sum(tally[verdict] for verdict in present), names))
        return found

    def sums(self) -> str:
        """Return the sentence with the number of claims in each group of GROUPS."""
        parts = [self.say(f"{group}_1" if n == 1 else group, n=n) for group, n, _ in self.groups()]
        joined = f" {self.words['and']} ".join([", ".join(parts[:-1]), parts[-1]]) if parts[1:] else parts[0]
        return self.say("sums", number=len(self.record["claims"]), parts=joined)

    # --- claims

    def translation(self, claim: Mapping[str, Any]) -> str:
        """Return the claim in English. Return "" in a French report, or if the note's text is English."""
        english: str = claim["english"]
        return "" if self.language == "fr" or english == claim["quote"] else english

    def quoted(self, claim: Mapping[str, Any]) -> str:
        """Return the claim in the language of the report, between quotation marks."""
        text = self.translation(claim) or claim["quote"]
        return f"{self.words['quote_open']}{text}{self.words['quote_close']}"

    def known_items(self, claim: Mapping[str, Any]) -> list[Item]:
        """Return the values that decide a claim, then the values that are only shown with the claim."""
        names = [decision["source"] for decision in claim["decisions"]] + list(claim["beside"])
        return [self.evidence[name] for name in names if name in self.evidence]

    def verdict(self, claim: Mapping[str, Any]) -> str:
        """Return a claim's verdict, with a remark if a person decided this verdict."""
        word = self.translate("verdicts", claim["verdict"])
        return f"{word} ({self.words['by_hand']})" if claim["by_hand"] else word

    def reasons(self, claim: Mapping[str, Any]) -> list[str]:
        """Return the reasons for a claim's verdict, as sentences."""
        reasons = [self.translate("phrases", claim["reason"])] if claim["reason"] else []
        if claim["verdict"] == "not yet measured" and claim["experiment"]:
            reasons.append(self.say("wait_for", name=claim["experiment"]))
        for decision in claim["decisions"]:
            if decision["source"] not in self.evidence:  # `source` names the compared claims, not a value
                bounds = self.interval(decision["low"], decision["high"], claim["unit"])
                reasons.append(f"{decision['source'].replace(' and ', ', ')}{self.words['colon']}{bounds}")
        return reasons

    def small_scale(self, claim: Mapping[str, Any]) -> list[str]:
        """Return what small training runs show about a claim, one sentence for each comparison."""
        lines = []
        for found in claim["small_scale"]:
            ours, theirs = found["runs"]
            line = self.say(
                "small_scale",
                outcome=self.words[f"small_{found['outcome'].replace(' ', '_')}"],
                quantity=self.translate("phrases", found["quantity"]),
                value=self.figure(found),
                interval=self.interval(found["low"], found["high"], found["unit"]),
                ours=ours,
                theirs=theirs,
            )
            reason = [self.translate("phrases", found["otherwise"])] if found["otherwise"] else []
            lines.append("; ".join([line, *reason]))
        return lines

    def claimed(self, claim: Mapping[str, Any]) -> str:
        """Format the claimed interval. If the claim gives no interval, return a dash."""
        return self.interval(claim["low"], claim["high"], claim["unit"]) or self.words["none"]

    # --- tables

    def note_head(self) -> list[str]:
        """Return the column headings of the table `note`."""
        return ["", *self.head(COLUMNS["note"]), *([self.say("trained_here")] if self.about_note else [])]

    def note_rows(self) -> list[tuple[str, list[Mapping[str, Any]], list[Item]]]:
        """Return the rows of the table `note`: (quantity, claims about the models, list of values).

        The list has one value, of the model trained here. The list is empty if this value is missing, or if
        the corpus is the user's own.
        """
        rows = []
        for row in self.record["table"]:
            name = f"{COMPACT}.{TRAINED_HERE[row['id']]}"
            here = [self.evidence[name]] if self.about_note and name in self.evidence else []
            rows.append((self.words[row["id"]], [self.claims[row[one]] for one in COLUMNS["note"]], here))
        return rows

    def measured_rows(self) -> list[list[Cell]]:
        """Return the rows of the table `measured`: one for each model and size of windows."""
        rows = []
        for row in self.rows:
            cells = self._sizes_and_scores(row["name"], row["scores"])
            cells["model"] = Cell(row["label"])
            cells["seen_context"] = Cell(self.seen_context(row))
            cells["clean_loss"] = self.cell(f"{row['scores']}.clean.loss")
            if row["scores"] == COMPACT and f"{COMPACT}.seed_deviation" in self.evidence:
                note = self.say("seed_note", deviation=self.value(f"{COMPACT}.seed_deviation"))
                cells["val_loss"] = replace(cells["val_loss"], note=note)
            cells["ratio"] = self.cell(f"ratio.{COMPACT}_to_{row['scores']}.perplexity")
            rows.append([cells[column] for column in COLUMNS["measured"]])
        return rows

    def seen_context(self, row: Mapping[str, Any]) -> str:
        """Return what the model sees before it predicts a token, such as "own context: 1,024 tokens"."""
        if row["view"] == "document":
            return self.translate("phrases", row["context"])
        return self.say(f"context_{row['view']}", tokens=self.number(row.get("tokens")))

    def published_rows(self) -> list[list[Cell]]:
        """Return one row of cells for each model with a published score."""
        rows = []
        for name in self.record["models"]["published"]:
            loss = self.evidence[f"{name}.openwebtext.loss"]
            cells = self._sizes_and_scores(name, f"{name}.openwebtext")
            cells["seen_context"] = self.cell(f"{name}.context")
            cells |= {"published_text": Cell(loss["corpus"]), "source": Cell(loss["source"])}
            rows.append([cells[column] for column in COLUMNS["published"]])
        return rows

    def _sizes_and_scores(self, name: str, scores: str) -> dict[str, Cell]:
        # Prefer the number of parameters from the architecture to the number in the model's report.
        key = "parameters" if f"{name}.parameters.all_tensors" in self.evidence else "num_params"
        return {
            "model": Cell(name),
            "parameters_all": self.cell(f"{name}.{key}.all_tensors"),
            "parameters_non_embedding": self.cell(f"{name}.{key}.non_embedding"),
            "val_loss": self.cell(f"{scores}.loss"),
            "val_perplexity": self.cell(f"{scores}.perplexity"),
            "bits_per_byte": self.cell(f"{scores}.bits_per_byte"),
        }

    def task_rows(self) -> list[list[str]]:
        """Return the scores that have no column in `measured_rows`, as (model, quantity, value, p-value).

        If reports/evidence.json has a loss and its perplexity, only the loss is returned, because the
        perplexity is exp(loss).
        """
        endings = (".accuracy", ".loss", "word_perplexity", ".perplexity")
        measured = [name for name, item in self.evidence.items() if item["known"] == "measured"]
        rows = []
        for model in self.models:
            for name in measured:
                quantity = name.removeprefix(f"{model}.")
                in_main_table = quantity.startswith(("own.", "clean."))
                stem = name.removesuffix(".perplexity")
                follows = stem != name and f"{stem}.loss" in self.evidence
                is_score = name != quantity and quantity.endswith(endings)
                if is_score and not in_main_table and not follows:
                    task = quantity.removesuffix(".accuracy")
                    p_value = self.value(f"ratio.{COMPACT}_to_{model}.{task}.p_value")
                    rows.append([model, quantity, self.value(name), p_value])
        return rows

    def text_rows(self) -> list[list[str]]:
        """Return (model, decoding strategy, metric, value) of each metric of generated or human text."""
        rows = []
        for name in self.evidence:
            model, _, figure = name.partition(".text.")
            if figure:
                way, _, quantity = figure.partition(".")
                writer = self.words["none"] if way == "human" else model
                rows.append([writer, way, quantity, self.value(name)])
        return rows
