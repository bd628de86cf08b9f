"""The record -> reports/index.html: one file that needs nothing but itself.

Both languages lie in it, each an article of its own; two radio buttons and a style rule show one of them, so
that nothing is executed and nothing is fetched. Charts are inline SVG whose colours are the page's variables:
light and dark need no second picture. Every number links to its row in the last table, and says on hover and
on focus where it came from.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from compactgpt.charts import svg
from compactgpt.rendering import (
    CLAIMS_COLUMNS,
    COLUMNS,
    MEASURED_COLUMNS,
    Cell,
    Record,
    View,
    show_interval,
)
from compactgpt.style import STYLE
from compactgpt.words import GROUPS, LANGUAGES, TEXT, UNITS, Language, translated

MARKS = {"holds": "✓", "fails": "✗", "open": "?", "waits": "…"}
_GROUP_OF = {verdict: group for group, verdicts in GROUPS.items() for verdict in verdicts}
_SECTIONS = ("table", "demo", "claims", "samples", "data", "sources")
_HEX = 10  # digits of a hash that a reader sees; evidence.json has all


def html(record: Record, default: Language = "en") -> str:
    """Render the record as one HTML file.

    Args:
        record: the comparison's.
        default: the language that is shown first.
    """
    switches, articles = [], []
    for language in LANGUAGES:
        checked = " checked" if language == default else ""
        name = TEXT[language]["this_language"]
        switches.append(
            f'<input type="radio" name="language" id="in-{language}"{checked} '
            f'aria-label="{name}"><label for="in-{language}" lang="{language}">{name}</label>'
        )
        articles.append(_article(View(record, language)))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="{default}">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(TEXT[default]['title'])}</title>",
            f"<style>{STYLE}</style></head>",
            "<body>",
            *switches,
            "<main>",
            *articles,
            "</main></body></html>",
            "",
        ]
    )


def _article(view: View) -> str:
    parts = [
        _opening(view),
        _note_table(view),
        _demo(view),
        _claims(view),
        _samples(view),
        _data(view),
        _sources(view),
        f"<footer><p>{_marked(view.words['page_colophon'])}</p></footer>",
    ]
    return f'<article lang="{view.language}">\n' + "\n".join(parts) + "\n</article>"


def _opening(view: View) -> str:
    """The verdict in one sentence, what became of the central guess, and all verdicts as one bar."""
    words, tally = view.words, dict(view.record["tally"])
    bars = []
    for group, verdicts in GROUPS.items():
        if n := sum(tally.get(verdict, 0) for verdict in verdicts):
            names = ", ".join(f"{tally[v]} {view.verdict_word(v)}" for v in verdicts if v in tally)
            bars.append(
                f'<li class="{group}" style="flex-grow:{n}"><b>{n}</b> <span>{escape(names)}</span></li>'
            )
    links = " ".join(
        f'<a href="#{view.language}-{key}">{escape(words[f"page_{key}"])}</a>' for key in _SECTIONS
    )
    return (
        f'<header><p class="kicker">{words["kicker"]}</p><h1>{escape(view.sums())}</h1>'
        f'<p class="deck">{escape(view.central())}</p>'
        f'<ul class="bar" aria-label="{words["verdict"]}">{"".join(bars)}</ul>'
        f'<nav aria-label="{words["top"]}">{links}</nav></header>'
    )


def _section(view: View, key: str, *body: str, lead: str = "") -> str:
    words, place = view.words, f"{view.language}-{key}"
    lead = lead or words.get(f"page_{key}_lead", "")
    opening = f'<p class="lead">{_marked(lead)}</p>' if lead else ""
    return (
        f'<section id="{place}" aria-labelledby="{place}-title"><h2 id="{place}-title">'
        f"{escape(words[f'page_{key}'])}</h2>{opening}{''.join(body)}</section>"
    )


def _marked(text: str) -> str:
    """Escape a sentence, and set what stands between backticks, stars or pairs of stars."""
    out = escape(text)
    for mark, tag in (("**", "strong"), ("*", "em"), ("`", "code")):
        pieces = out.split(mark)
        out = "".join(
            f"<{tag}>{piece}</{tag}>" if place % 2 and place < len(pieces) - 1 else piece
            for place, piece in enumerate(pieces)
        )
    return out


def _value(view: View, name: str, text: str = "") -> str:
    """A value that says on hover and focus where it came from, and links to its row."""
    item = view.evidence[name]
    origin = f"{view.known(item)} · {item['stage']} · {item['source']}"
    shown, _, bounds = (text or view.show(item)).partition(" (")
    interval = f'<span class="ci"> ({escape(bounds)}</span>' if bounds else ""
    return (
        f'<a class="v" data-id="{escape(name)}" href="#{view.language}-v-{escape(name)}">'
        f"{escape(shown)}{interval}"
        f'<span class="tip" role="tooltip"><b>{escape(name)}</b> {escape(origin)}</span></a>'
    )


def _known(view: View, item: Mapping[str, Any]) -> str:
    return f'<span class="known">{escape(view.known(item))}</span> {_value(view, item["id"])}'


def _cell(view: View, cell: Cell) -> str:
    return _value(view, cell.id, cell.text) if cell.id else escape(cell.text)


def _chip(view: View, claim: Mapping[str, Any]) -> str:
    group = _GROUP_OF[claim["verdict"]]
    return (
        f'<span class="chip {group}"><span aria-hidden="true">{MARKS[group]}</span> '
        f"{escape(view.verdict(claim))}</span>"
    )


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, kind: str = "", scroll: bool = True
) -> str:
    """A table with scopes; its first column names the row. Cells are HTML."""
    # Roles stand there too: a table that a phone shows as blocks would lose them.
    head = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in heads)
    body = []
    for first, *rest in rows:
        cells = "".join(
            f'<td role="cell" data-label="{escape(name)}">{cell}</td>'
            for name, cell in zip(heads[1:], rest, strict=True)
        )
        body.append(f'<tr role="row"><th scope="row" role="rowheader">{first}</th>{cells}</tr>')
    table = (
        f'<table class="{kind}" role="table"><caption>{escape(label)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )
    if not scroll:
        return table
    return f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'


def _note_table(view: View) -> str:
    """The note's rows: its figure in large type, what is known, the verdict."""
    words, rows = view.words, []
    for row in view.record["table"]:
        cells = []
        for column in COLUMNS:
            claim = view.claims[row[column]]
            known = "".join(f"<li>{_known(view, item)}</li>" for item, _ in view.known_values(claim))
            cells.append(
                f'<span class="quote" lang="fr">{escape(claim["quote"])}</span><ul>{known}</ul>'
                f"{_chip(view, claim)}"
            )
        rows.append([escape(words[row["id"]]), *cells])
    heads = ["", *(words[column] for column in COLUMNS)]
    table = _table(heads, rows, label=words["page_table"], kind="note", scroll=False)
    return _section(view, "table", table, f'<p class="fine">{_marked(words["table_note"])}</p>')


def _chart(view: View, name: str, key: str, note: str) -> str:
    words = view.words
    picture = svg(view.record, name, view.language, f"{words['chart']}: {words[f'page_{key}']}. {note}")
    return (
        f"<figure><h3>{escape(words[f'page_{key}'])}</h3>{picture}"
        f"<figcaption>{_marked(note)}</figcaption></figure>"
    )


def _demo(view: View) -> str:
    words, record = view.words, view.record
    where = {
        key: words["inside" if record["forecast"][key] else "outside"] for key in ("inside_80", "inside_95")
    }
    notes = {"curve": view.say("page_curve_note", found=view.value("compact.loss"), **where)}
    charts = [("loss", "curve"), ("ratio", "ratio"), ("bits_per_byte", "bits")]
    charts += [("positions", "positions"), ("calibration", "calibration"), ("repetition", "repetition")]
    figures = "".join(
        _chart(view, name, key, notes.get(key, words.get(f"page_{key}_note", ""))) for name, key in charts
    )
    shape = record["models"]["shape"]
    lead = view.say(
        "page_demo_lead",
        parameters=view.value("compact.parameters.all_tensors"),
        layers=shape["n_layer"],
        width=shape["n_embd"],
        seen=view.value("compact.tokens_seen"),
        corpus=record["data"]["corpus"],
    )
    heads = [words[key] for key in MEASURED_COLUMNS]
    rows = [[_cell(view, cell) for cell in row] for row in view.measured_cells()]
    return _section(
        view,
        "demo",
        f'<div class="figures">{figures}</div><h3>{escape(words["page_measured"])}</h3>',
        _table(heads, rows, label=words["page_measured"], kind="models"),
        f'<p class="fine">{_marked(words["measured_note"].format(**view.counted()))} '
        f"{_marked(words['published_note'])}</p>",
        lead=lead,
    )


def _claims(view: View) -> str:
    rows = []
    for claim in view.record["claims"]:
        bounds = show_interval(claim["low"], claim["high"], claim["unit"], view.language)
        reasons = [f"<p>{_marked(reason)}</p>" for reason in view.reasons(claim)]
        values = "".join(
            f"<li>{_known(view, item)} <code>{escape(item['id'])}</code></li>"
            for item, _ in view.known_values(claim)
        )
        rows.append(
            [
                escape(claim["id"]),
                f'<span lang="fr">{escape(claim["quote"])}</span>',
                escape(bounds or view.words["none"]),
                _chip(view, claim),
                "".join(reasons) + (f"<ul>{values}</ul>" if values else ""),
            ]
        )
    heads = [view.words[key] for key in CLAIMS_COLUMNS]
    legend = "".join(f"<li>{_marked(text)}</li>" for key, text in view.words.items() if key[:6] == "known_")
    return _section(
        view,
        "claims",
        _table(heads, rows, label=view.words["page_claims"], kind="claims"),
        f'<h3>{escape(view.words["legend"])}</h3><ul class="fine">{legend}</ul>'
        f'<p class="fine">{_marked(view.words["legend_rule"])}</p>',
    )


def _samples(view: View) -> str:
    """The prompts; under each a column a model, a row a way."""
    blocks = []
    for sample in view.record["samples"]:
        columns = []
        for model, ways in sample["models"].items():
            texts = "".join(
                f"<dt>{escape(view.words[way])}</dt><dd>{_written(view, text)}</dd>"
                for way, text in ways.items()
            )
            columns.append(f"<div><h4>{escape(model)}</h4><dl>{texts}</dl></div>")
        blocks.append(
            f'<h3 class="prompt"><span class="known">{view.words["prompt"]}</span> '
            f"{escape(sample['prompt'])}</h3>"
            f'<div class="side">{"".join(columns)}</div>'
        )
    return _section(view, "samples", *blocks)


def _written(view: View, text: str) -> str:
    return f"<pre>{escape(text.rstrip())}</pre>" if text.strip() else f"<em>{view.words['blank']}</em>"


def _data(view: View) -> str:
    words, data = view.words, view.record["data"]
    none = words["none"]
    facts = {
        "corpus": data["corpus"],
        "documents": view.number(data["documents"]),
        "bytes": view.number(data["bytes"]),
        "left_out": ", ".join(f"{view.number(n)} {why}" for why, n in data["left_out"].items()) or none,
        "tokenizer": f"{data['tokenizer']['encoding']} ({data['tokenizer']['tokenizer_sha256'][:_HEX]}…)",
        "checks": ", ".join(f"{stage} {c['passed']}/{c['of']}" for stage, c in data["checks"].items()),
        "flagged": view.number(view.record["flagged"]),
    }
    listed = "".join(
        f"<div><dt>{escape(words[key])}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    splits = [
        [name, *(view.number(split[key]) for key in ("documents", "tokens", "bytes")), _hash(split["sha256"])]
        for name, split in data["splits"].items()
    ]
    parts = [
        [
            escape(part["name"]),
            escape(part["version"] or none),
            escape(part["licence"] or none),
            none if part["documents"] is None else view.number(part["documents"]),
            none if part["bytes"] is None else view.number(part["bytes"]),
        ]
        for part in data["sources"]
    ]
    split_heads = [words["split"], words["documents"], "Tokens", words["bytes"], "SHA-256"]
    part_heads = [words[key] for key in ("part", "version", "licence", "documents", "bytes")]
    return _section(
        view,
        "data",
        f'<dl class="facts">{listed}</dl>',
        _table(split_heads, splits, label=words["splits"], kind="plain"),
        _table(part_heads, parts, label=words["part"], kind="plain"),
    )


def _hash(digits: str) -> str:
    """The beginning of a hash, the whole of it on hover."""
    return f'<abbr title="{digits}">{digits[:_HEX]}</abbr>' if digits else ""


def _sources(view: View) -> str:
    """All values, each a row that the links above lead to."""
    words, rows = view.words, []
    for name, item in view.evidence.items():
        hashes = (_hash(item[key]) for key in ("data_sha256", "weights_sha256", "code_sha256"))
        rows.append(
            [
                f'<code id="{view.language}-v-{escape(name)}">{escape(name)}</code>',
                f"{escape(view.show(item))} {_unit(view, item['unit'])}",
                escape(view.known(item)),
                f"{escape(item['source'])} <b>{escape(item['stage'])}</b>",
                escape(_conditions(view, item) or words["none"]),
                " ".join(one or words["none"] for one in hashes),
            ]
        )
    heads = [words[key] for key in ("id", "value", "known", "source", "conditions", "hashes")]
    return _section(view, "sources", _table(heads, rows, label=words["page_sources"], kind="sources"))


def _unit(view: View, unit: str) -> str:
    return f'<span class="known">{escape(translated(view.language, unit, UNITS))}</span>'


def _conditions(view: View, item: Mapping[str, Any]) -> str:
    """Corpus, context, stride and tokenizer of a value, those that it has."""
    words = view.words
    named = [f"{words[f'{key}_of']} {view.number(item[key])}" for key in ("context", "stride") if item[key]]
    tokenizer = [f"{words['tokenizer']} {item['tokenizer']}"] if item["tokenizer"] else []
    return ", ".join([*([item["corpus"]] if item["corpus"] else []), *named, *tokenizer])
