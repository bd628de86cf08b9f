"""The record's plots, as PNG (Markdown, MLflow) and as SVG for the page.

Each plot is one function that draws on given axes. PNG shows the light palette. In SVG the palette's colours
become CSS variables of the page, so that one picture serves light and dark, and text stays text in the
page's own type. Nothing depends on the clock, the user's settings or the library's version string: equal
records give equal bytes.
"""

import io
import math
import re
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from compactgpt.common.errors import printable
from compactgpt.reporting.messages import Language
from compactgpt.reporting.tables import COMPACT, Record, View, localized, show

# Colours of PNG, and the CSS variable that each one becomes inside the page.
INK, MUTED, GRID, DEMO, OTHER, BAND, PAPER = (
    "#1b1b1a", "#6b6963", "#dedbd3", "#1d5fa6", "#8b8880", "#cfdff0", "#fffefb",
)  # fmt: skip
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", DEMO: "--demo", OTHER: "--other", BAND: "--band",
    PAPER: "--paper",
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
LONGEST_LABEL = 30  # characters of a name at the edge of a plot
MOST_TICKS = 8  # of a logarithmic axis: more would touch each other
Axes = Any
_HEIGHTS = {
    "loss": 3.4,
    "ratio": 2.9,
    "bits_per_byte": 3.0,
    "positions": 3.2,
    "calibration": 2.2,
    "repetition": 3.0,
}


def _loss(view: View, axes: Axes) -> None:
    """Draw the loss curve, the interval expected before the run, and the final loss."""
    curve = view.record["curve"]
    last = curve[-1]["step"]
    for share, alpha in (("95", 0.55), ("80", 1.0)):
        expected = view.evidence[f"compact.expected_loss_{share}"]
        axes.axhspan(expected["low"], expected["high"], color=BAND, alpha=alpha, linewidth=0)
    wide = view.evidence["compact.expected_loss_95"]
    axes.text(curve[0]["step"], wide["low"], view.words["band"], color=MUTED, va="bottom", fontsize=9)
    for key, colour, width in (("train_loss", OTHER, 1.4), ("val_loss", DEMO, 2.2)):
        points = [(row["step"], row[key]) for row in curve if row[key] is not None]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width)
    _direct_labels(view, axes, curve)
    final = view.evidence["compact.loss"]
    spread = [[max(0.0, final["value"] - final["low"])], [max(0.0, final["high"] - final["value"])]]
    axes.errorbar([last * 1.03], [final["value"]], spread, fmt="o", color=DEMO, capsize=0, markersize=5)
    label = show(final["value"], final["unit"], view.language)
    axes.text(last * 1.05, final["value"], label, color=DEMO, va="center", weight="bold")
    axes.set_xlim(right=last * 1.17)
    axes.set_xlabel(view.words["step"])
    axes.set_ylabel(view.words["loss_axis"])


def _direct_labels(view: View, axes: Axes, curve: list[Mapping[str, float]]) -> None:
    """Name the two lines where they are furthest apart. Train is above at first, because its mean lags."""
    rows = [row for row in curve[1:] if row["train_loss"] is not None and row["val_loss"] is not None]
    if not rows:
        return
    row = max(rows, key=lambda one: abs(one["train_loss"] - one["val_loss"]))
    for key, colour in (("train_loss", MUTED), ("val_loss", DEMO)):
        above = row[key] == max(row["train_loss"], row["val_loss"])
        offset = (8, 4) if above else (-4, -14)
        axes.annotate(
            view.words[f"{key}_curve"],
            (row["step"], row[key]),
            offset,
            textcoords="offset points",
            color=colour,
        )


def _rows(view: View, axes: Axes, items: list[Mapping[str, Any]], names: list[str], ours: list[int]) -> None:
    """Draw one row for each item: a dot with its interval, and the value at the right edge."""
    for row, item in enumerate(items):
        colour = DEMO if row in ours else INK
        if item["low"] is not None:
            axes.plot([item["low"], item["high"]], [row, row], color=colour, linewidth=2.2, alpha=0.45)
        axes.plot([item["value"]], [row], "o", color=colour, markersize=6.5)
        text = show(item["value"], item["unit"], view.language)
        axes.text(1.02, row, text, color=colour, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(items)), [_label(name) for name in names], color=INK)
    axes.set_ylim(len(items) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _label(name: str) -> str:
    """Return a name, cut to LONGEST_LABEL characters."""
    name = printable(name)
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _bits_per_byte(view: View, axes: Axes) -> None:
    """Draw the bits per byte of every measured model."""
    items = [view.evidence[f"{m['name']}.bits_per_byte"] for m in view.record["models"]["measured"]]
    items.sort(key=lambda item: float(item["value"]))
    names = [item["model"] for item in items]
    _rows(view, axes, items, names, [names.index("compact")])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{view.words['bits_per_byte']}, {_label(items[0]['corpus'])}")


def _ratio(view: View, axes: Axes) -> None:
    """Draw the perplexity of the compact model over that of each baseline."""
    found = {name: view.evidence[f"ratio.{COMPACT}_to_{name}.perplexity"] for name in view.baselines}
    names = sorted(found, key=lambda name: float(found[name]["value"]))
    items = [found[name] for name in names]
    axes.set_xscale("log")
    axes.axvline(1, color=MUTED, linewidth=1)
    _rows(view, axes, items, names, [])
    ends = [item[key] for item in items for key in ("low", "high")]
    low, high = min([0.5, *ends]) / 1.25, max([2.0, *ends]) * 1.25
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [show(t, "", view.language) for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    # At the ends of the axis, not at 1: where 1 lies at an end, a word next to it would leave the picture.
    for words, position in (("better", "left"), ("worse", "right")):
        axes.set_title(view.words[words], loc=position, color=MUTED, fontsize=9, pad=4)
    axes.set_xlabel(view.words["ratio_axis"])


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most MOST_TICKS round numbers within a logarithmic axis: 1, 2, 5, or powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [digit * 10.0**n for n in decades for digit in (1, 2, 5) if low <= digit * 10.0**n <= high]
    if len(fine) <= MOST_TICKS:
        return fine
    powers = [n for n in decades if low <= 10.0**n <= high]
    step = math.ceil(len(powers) / MOST_TICKS)
    return [10.0**n for n in powers if n % step == 0]  # 1 is always among them


def _positions(view: View, axes: Axes) -> None:
    """Draw the loss by position in the window, each model in its own tokens."""
    axes.set_xscale("log", base=2)
    last = 1
    ends: list[tuple[float, str, str, int]] = []
    for name, rows in view.record["positions"].items():
        colour, width = (DEMO, 2.2) if name == COMPACT else (INK, 1.4)
        positions = [row["last"] for row in rows]
        last = max(last, *positions)
        axes.fill_between(
            positions,
            [row["loss"]["low"] for row in rows],
            [row["loss"]["high"] for row in rows],
            color=colour,
            alpha=0.13,
            linewidth=0,
        )
        values = [row["loss"]["value"] for row in rows]
        axes.plot(positions, values, color=colour, linewidth=width, marker="o", markersize=4)
        ends.append((values[-1], name, colour, positions[-1]))
    _end_labels(axes, ends)
    exponents = range(last.bit_length())
    step = math.ceil(len(exponents) / MOST_TICKS)
    ticks = [2**n for n in exponents if n % step == 0]
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xlim(0.9, last * 3)
    axes.set_xlabel(view.words["position_axis"])
    axes.set_ylabel(view.words["loss_axis"])


def _end_labels(axes: Axes, ends: list[tuple[float, str, str, int]]) -> None:
    """Name each line at its end; names that would touch are moved apart, upwards."""
    low, high = axes.get_ylim()
    line = 0.07 * (high - low)  # height of a line of text
    taken = -math.inf
    for value, name, colour, x in sorted(ends):
        height = max(value, taken + line)
        taken = height
        axes.annotate(
            printable(name), (x, height), (7, 0), textcoords="offset points", color=colour, va="center"
        )
    axes.set_ylim(low, max(high, taken + line))


def _calibration(view: View, axes: Axes) -> None:
    """Draw the intervals of each run and what was found; then the runs that the same rule was tested on."""
    runs = [(COMPACT, f"{COMPACT}.loss")]
    names = [view.say("run_here", corpus=view.corpus)]
    if view.about_note:
        runs.append(("note", "reported.loss"))
        names.append(view.words["note_run"])
    for row, (model, found) in enumerate(runs):
        intervals = [view.evidence[f"{model}.expected_loss_{share}"] for share in ("95", "80")]
        _intervals(axes, row, [(item["low"], item["high"]) for item in intervals])
        for name, item in view.evidence.items():
            if name.startswith(f"{model}.law."):
                axes.plot([item["value"]], [row - 0.2], "|", color=MUTED, markersize=9)
        if found in view.evidence:
            item = view.evidence[found]
            _found(view, axes, row, item["value"], DEMO if model == COMPACT else INK, item["known"])
    for row, check in enumerate(view.record["calibration"], len(runs)):
        names.append(check["name"])
        _intervals(axes, row, [(check[f"low_{share}"], check[f"high_{share}"]) for share in ("95", "80")])
        _found(view, axes, row, check["measured"], INK, "reported")
    axes.set_yticks(range(len(names)), [_label(name) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(view.words["loss_axis"])


def _intervals(axes: Axes, row: int, wide_and_narrow: list[tuple[float, float]]) -> None:
    for ends, width in zip(wide_and_narrow, (2.0, 7.0), strict=True):
        axes.plot(ends, [row, row], color=OTHER, linewidth=width, solid_capstyle="butt", alpha=0.6)


def _found(view: View, axes: Axes, row: int, loss: float, colour: str, known: str) -> None:
    face = colour if known == "measured" else PAPER
    axes.plot([loss], [row], "o", color=colour, markerfacecolor=face, markersize=8)
    text = show(loss, "nats per token", view.language)
    axes.text(1.02, row, text, color=colour, va="center", transform=axes.get_yaxis_transform())


def _repetition(view: View, axes: Axes) -> None:
    """Draw the share of repeated 4-grams: of each model by decoding strategy, and of human text."""
    rows = []
    for name, item in view.evidence.items():
        model, _, figure = name.partition(".text.")
        way, _, quantity = figure.partition(".")
        if quantity == "seq_rep_4":
            named = view.words[way] if way == "human" else f"{model}, {view.words[way]}"
            rows.append((item, named))
    rows.sort(key=lambda row: float(row[0]["value"]))
    human = view.words["human"]
    ours = [
        number for number, (item, named) in enumerate(rows) if item["model"] == COMPACT and named != human
    ]
    _rows(view, axes, [item for item, _ in rows], [named for _, named in rows], ours)
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


def png(record: Record, name: str, language: Language = "en") -> bytes:
    """Draw one chart as PNG, without the library's version and the date.

    Args:
        record: the comparison's.
        name: one of PLOTS.
        language: of the labels.
    """
    return _drawn(record, name, language, "png", metadata={"Software": None}, dpi=130)


def svg(record: Record, name: str, language: Language, label: str) -> str:
    """Draw one chart as an <svg> element for the page.

    Args:
        record: the comparison's.
        name: one of PLOTS.
        language: of the labels.
        label: what it shows, for those who can't see it.
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = _drawn(record, name, language, "svg", metadata=nothing).decode()
    body = text[text.index("<svg") :].strip()
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    prefix = f"{language}-{name}-"
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", body)  # the page holds many pictures
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # its rule would hold for the whole page
    body = re.sub(r" font-family: [^;\"]*;", "", body)  # the page's own type
    box = re.search(r'viewBox="[^"]*"', body)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}" stroke-linejoin="round">'
    return opening + body[body.index(">") + 1 :]


def _localize(axis: Any, language: Language) -> None:
    """Write the ticks of a linear axis with the number marks of the language."""
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    own = axis.get_major_formatter()
    if isinstance(own, ScalarFormatter):
        axis.set_major_formatter(FuncFormatter(lambda x, tick: localized(own(x, tick), language)))
        axis.get_major_formatter().set_locs = own.set_locs  # the library asks it how many digits are needed


def _height(record: Record, name: str) -> float:
    """Return the height in inches; calibration has one row for each run that the estimate was tested on."""
    return _HEIGHTS[name] + (0.22 * len(record["calibration"]) if name == "calibration" else 0)


def _drawn(record: Record, name: str, language: Language, form: str, **more: Any) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    salt = {"svg.hashsalt": f"{name}-{language}"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS, **salt}):
        figure = Figure(figsize=(5.6, _height(record, name)), layout="constrained")
        axes = figure.subplots()
        PLOTS[name](View(record, language), axes)
        for axis in (axes.xaxis, axes.yaxis):
            _localize(axis, language)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format=form, transparent=form == "svg", **more)
    return buffer.getvalue()
