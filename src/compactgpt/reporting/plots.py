"""Draw the plots of reports/evidence.json: PNG for DVC and MLflow, SVG for HTML.

Equal values give files with equal bytes.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from compactgpt.common.errors import printable
from compactgpt.reporting.claims import COMPACT
from compactgpt.reporting.tables import Item, Record, View, localized, show
from compactgpt.reporting.templating import TEMPLATES, Language

# CSS variable of the HTML page -> colour in PNG. `draw_svg` replaces the colours by the variables.
COLOURS = {
    "ink": "#1b1b1a",
    "muted": "#6b6963",
    "grid": "#dedbd3",
    "demo": "#1d5fa6",
    "other": "#8b8880",
    "band": "#cfdff0",
    "paper": "#fffefb",
}
INK, MUTED, _, DEMO, OTHER, BAND, PAPER = COLOURS.values()
LONGEST_LABEL = 30  # maximum number of characters in a line of a label
WIDTH, HEIGHT = 5.6, 3.3  # inches; `_name_rows` sets another height
LINE_HEIGHT = 0.24  # inches
Axes = Any


def _loss(view: View, axes: Axes) -> None:
    """Draw the train and val loss curves, the intervals of the expected val loss, and the final val loss."""
    curve = view.record["curve"]
    last = curve[-1]["step"]
    for share, alpha in (("95", 0.55), ("80", 1.0)):
        expected = view.evidence[f"compact.expected_loss_{share}"]
        axes.axhspan(expected["low"], expected["high"], color=BAND, alpha=alpha, linewidth=0)
    wide = view.evidence["compact.expected_loss_95"]
    axes.text(curve[0]["step"], wide["low"], view.words["band"], color=MUTED, va="bottom", fontsize=9)
    for key, colour, width in (("train_loss", OTHER, 1.4), ("val_loss", DEMO, 2.2)):
        points = [(row["step"], row[key]) for row in curve if row[key] is not None]
        label = view.words[f"{key}_curve"]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label)
    final = view.evidence["compact.loss"]
    errors = [[final["value"] - final["low"]], [final["high"] - final["value"]]]
    axes.errorbar([last * 1.03], [final["value"]], errors, fmt="o", color=DEMO, capsize=0, markersize=5)
    label = show(final["value"], final["unit"], view.language)
    axes.text(last * 1.05, final["value"], label, color=DEMO, va="center", weight="bold")
    axes.legend()
    axes.set_xlim(right=last * 1.17)
    axes.set_xlabel(view.words["step"])
    axes.set_ylabel(view.words["loss_axis"])


def _draw_rows(
    view: View, axes: Axes, items: Sequence[Item], names: Sequence[str], highlighted: Sequence[int] = ()
) -> None:
    """Draw each value as a row: a dot, the interval, and the formatted value.

    Rows whose number is in `highlighted` have the compact model's colour.
    """
    for row, item in enumerate(items):
        colour = DEMO if row in highlighted else INK
        if item["low"] is not None:
            axes.plot([item["low"], item["high"]], [row, row], color=colour, linewidth=2.2, alpha=0.45)
        axes.plot([item["value"]], [row], "o", color=colour, markersize=6.5)
        _write_value(view, axes, row, item["value"], item["unit"], colour)
    _name_rows(axes, names, (len(items) - 0.4, -0.6))


def _write_value(view: View, axes: Axes, row: int, value: float, unit: str, colour: str) -> None:
    text = show(value, unit, view.language)
    axes.text(1.02, row, text, color=colour, va="center", transform=axes.get_yaxis_transform())


def _name_rows(axes: Axes, names: Sequence[str], limits: tuple[float, float]) -> None:
    labels = ["\n".join(map(_shorten, name.split("\n"))) for name in names]
    axes.set_yticks(range(len(names)), labels, color=INK)
    lines = max(8, sum(1 + label.count("\n") for label in labels))
    axes.figure.set_figheight(1.0 + LINE_HEIGHT * lines)
    axes.set_ylim(limits)
    axes.grid(visible=False, axis="y")


def _shorten(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _bits_per_byte(view: View, axes: Axes) -> None:
    """Draw the bits per byte of each row in the table `measured`."""
    rows = sorted(view.rows, key=lambda row: _value(view.evidence[f"{row['scores']}.bits_per_byte"]))
    items = [view.evidence[f"{row['scores']}.bits_per_byte"] for row in rows]
    ours = [n for n, row in enumerate(rows) if row["name"] == COMPACT]
    _draw_rows(view, axes, items, [_row_label(view, row) for row in rows], ours)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{view.words['bits_per_byte']}, {_shorten(items[0]['corpus'])}")


def _row_label(view: View, row: Mapping[str, Any]) -> str:
    return f"{row['name']}\n{view.seen_context(row)}" if row["view"] == "own" else str(row["name"])


def _value(item: Item) -> float:
    return float(item["value"])


def _ratio(view: View, axes: Axes) -> None:
    """Draw the ratio of the compact model's perplexity to each baseline's perplexity."""
    ids = {f"ratio.{COMPACT}_to_{row['scores']}.perplexity": row for row in view.rows}
    items = sorted((view.evidence[name] for name in ids if name in view.evidence), key=_value)
    axes.axvline(1, color=MUTED, linewidth=1)
    _draw_rows(view, axes, items, [_row_label(view, ids[item["id"]]) for item in items])
    _set_log_axis(view, axes, 10)
    ends = [item[key] for item in items for key in ("low", "high")]
    axes.set_xlim(min([0.5, *ends]) / 1.25, max([2.0, *ends]) * 1.25)
    # `better` and `worse` are titles at the left and right end of the axes, where both always fit.
    for words, position in (("better", "left"), ("worse", "right")):
        axes.set_title(view.words[words], loc=position, color=MUTED, fontsize=9, pad=4)
    axes.set_xlabel(view.words["ratio_axis"])


def _set_log_axis(view: View, axes: Axes, base: int) -> None:
    axes.set_xscale("log", base=base)
    axes.set_xticks([], minor=True)
    _format_ticks(view, axes.xaxis)


def _format_ticks(view: View, axis: Any) -> None:
    axis.set_major_formatter(lambda number, _: localized(f"{number:g}", view.language))


def _positions(view: View, axes: Axes) -> None:
    """Draw how each model's loss, per token of its tokenizer, depends on the position in the window."""
    for name, rows in view.record["positions"].items():
        colour, width = (DEMO, 2.2) if name == COMPACT else (INK, 1.4)
        positions = [row["last"] for row in rows]
        low, high, values = ([row["loss"][key] for row in rows] for key in ("low", "high", "value"))
        axes.fill_between(positions, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            positions, values, color=colour, linewidth=width, marker="o", markersize=4, label=_shorten(name)
        )
    _set_log_axis(view, axes, 2)
    if view.record["positions"]:
        axes.legend()
    axes.set_xlabel(view.words["position_axis"])
    axes.set_ylabel(view.words["loss_axis"])


def _calibration(view: View, axes: Axes) -> None:
    """Draw expected and actual losses of the compact model, the note's model and the reference runs."""
    runs = [(view.say("run_here"), COMPACT, f"{COMPACT}.loss")]
    if view.about_note:
        runs.append((view.words["note_run"], "note", "reported.loss"))
    for row, (_, model, loss) in enumerate(runs):
        wide, narrow = (view.evidence[f"{model}.expected_loss_{share}"] for share in ("95", "80"))
        _draw_intervals(axes, row, (wide["low"], wide["high"]), (narrow["low"], narrow["high"]))
        laws = [item["value"] for name, item in view.evidence.items() if name.startswith(f"{model}.law.")]
        axes.plot(laws, [row - 0.2] * len(laws), "|", color=MUTED, markersize=9)
        if item := view.evidence.get(loss):
            colour = DEMO if model == COMPACT else INK
            _draw_loss(view, axes, row, item["value"], colour, filled=item["known"] == "measured")
    checks = view.record["calibration"]["checks"]
    for row, check in enumerate(checks, len(runs)):
        wide_ends, narrow_ends = ((check[f"low_{share}"], check[f"high_{share}"]) for share in ("95", "80"))
        _draw_intervals(axes, row, wide_ends, narrow_ends)
        _draw_loss(view, axes, row, check["measured"], INK, filled=False)
    names = [name for name, *_ in runs] + [check["name"] for check in checks]
    _name_rows(axes, names, (len(names) - 0.45, -0.75))
    axes.set_xlabel(view.words["loss_axis"])


def _draw_intervals(axes: Axes, row: int, wide: tuple[float, float], narrow: tuple[float, float]) -> None:
    for ends, width in ((wide, 2.0), (narrow, 7.0)):
        axes.plot(ends, [row, row], color=OTHER, linewidth=width, solid_capstyle="butt", alpha=0.6)


def _draw_loss(view: View, axes: Axes, row: int, loss: float, colour: str, *, filled: bool) -> None:
    face = colour if filled else PAPER
    axes.plot([loss], [row], "o", color=colour, markerfacecolor=face, markersize=8)
    _write_value(view, axes, row, loss, "nats per token", colour)


def _repetition(view: View, axes: Axes) -> None:
    """Draw the share of repeated 4-grams in generated text and in human text."""
    rows = []
    for name, item in view.evidence.items():
        model, _, figure = name.partition(".text.")
        way, _, quantity = figure.partition(".")
        if quantity == "seq_rep_4":
            named = view.words[way] if way == "human" else f"{model}\n{view.words[way]}"
            rows.append((item, named))
    rows.sort(key=lambda row: _value(row[0]))
    human = view.words["human"]
    ours = [n for n, (item, named) in enumerate(rows) if item["model"] == COMPACT and named != human]
    _draw_rows(view, axes, [item for item, _ in rows], [named for _, named in rows], ours)
    axes.set_xlim(left=-0.02)
    axes.xaxis.set_major_formatter(lambda share, _: show(share, "share", view.language).replace(".0", ""))


PLOTS: dict[str, Callable[[View, Axes], None]] = {
    "loss": _loss,
    "ratio": _ratio,
    "bits_per_byte": _bits_per_byte,
    "positions": _positions,
    "calibration": _calibration,
    "repetition": _repetition,
}


def draw_png(record: Record, name: str, language: Language = "en") -> bytes:
    """Draw the plot `name`, a key of PLOTS, as PNG. The metadata does not contain matplotlib's version."""
    return _draw(record, name, language, "png", metadata={"Software": None}, dpi=130)


def draw_svg(record: Record, name: str, language: Language, label: str) -> str:
    """Draw the plot `name`, a key of PLOTS, as an <svg> element.

    Screen readers read out the text `label`.
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = _draw(record, name, language, "svg", metadata=nothing).decode()
    body = text[text.index("<svg") :].strip()
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    prefix = f"{language}-{name}-"  # makes ids unique in the HTML page, which has many plots
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # CSS rules would apply to the whole page
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    box = re.search(r'viewBox="[^"]*"', body)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}" stroke-linejoin="round">'
    return opening + body[body.index(">") + 1 :]


def _draw(record: Record, name: str, language: Language, form: str, **options: Any) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    salt = {"svg.hashsalt": f"{name}-{language}"}
    style = matplotlib.rc_params_from_file(TEMPLATES / "plots.mplstyle")  # plus matplotlib's defaults
    with matplotlib.rc_context({**style, **salt}):
        figure = make_figure(View(record, language), name)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format=form, transparent=form == "svg", **options)
    return buffer.getvalue()


def make_figure(view: View, name: str) -> Any:
    """Return the matplotlib figure of the plot `name`, a key of PLOTS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    for axis in (axes.xaxis, axes.yaxis):
        _format_ticks(view, axis)
    PLOTS[name](view, axes)
    return figure
