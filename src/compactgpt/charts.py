"""The record's pictures, as PNG (Markdown, MLflow) and as SVG that lies inside the page.

Each chart is one function that draws on given axes. PNG shows the light palette. In SVG the palette's colours
become CSS variables of the page, so that one picture serves light and dark, and text stays text in the
page's own type. Nothing depends on the clock, the user's settings or the library's version string: equal
records give equal bytes.
"""

import io
import re
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from compactgpt.rendering import Record, View, localized, show
from compactgpt.words import Language

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
}
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
    """The curve, and the interval of the final loss that was expected before, at its end."""
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
    """Name the two lines where they are furthest apart; train lies above at first, its mean lags."""
    rows = [row for row in curve[1:] if row["train_loss"] is not None and row["val_loss"] is not None]
    if not rows:
        return
    row = max(rows, key=lambda one: abs(one["train_loss"] - one["val_loss"]))
    for key, colour in (("train_loss", MUTED), ("val_loss", DEMO)):
        above = row[key] == max(row["train_loss"], row["val_loss"])
        place = (8, 4) if above else (-4, -14)
        axes.annotate(
            view.words[f"{key}_curve"],
            (row["step"], row[key]),
            place,
            textcoords="offset points",
            color=colour,
        )


def _rows(view: View, axes: Axes, items: list[Mapping[str, Any]], names: list[str], ours: list[int]) -> None:
    """A dot with its interval in each row, the value written at the right edge."""
    for place, item in enumerate(items):
        colour = DEMO if place in ours else INK
        if item["low"] is not None:
            axes.plot([item["low"], item["high"]], [place, place], color=colour, linewidth=2.2, alpha=0.45)
        axes.plot([item["value"]], [place], "o", color=colour, markersize=6.5)
        text = show(item["value"], item["unit"], view.language)
        axes.text(1.02, place, text, color=colour, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(items)), names, color=INK)
    axes.set_ylim(len(items) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _bits_per_byte(view: View, axes: Axes) -> None:
    """Every measured model's bits per byte."""
    items = [view.evidence[f"{m['name']}.bits_per_byte"] for m in view.record["models"]["measured"]]
    items.sort(key=lambda item: float(item["value"]))
    names = [item["model"] for item in items]
    _rows(view, axes, items, names, [names.index("compact")])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{view.words['bits_per_byte']}, {items[0]['corpus']}")


def _ratio(view: View, axes: Axes) -> None:
    """Perplexity of the demo over each baseline's; 1 is a draw."""
    names = [m["name"] for m in view.record["models"]["measured"] if m["name"] != "compact"]
    found = {name: view.evidence[f"ratio.compact_to_{name}.perplexity"] for name in names}
    names.sort(key=lambda name: float(found[name]["value"]))
    items = [found[name] for name in names]
    axes.set_xscale("log")
    axes.axvline(1, color=MUTED, linewidth=1)
    _rows(view, axes, items, names, [])
    ends = [item[key] for item in items for key in ("low", "high")]
    low, high = min([0.5, *ends]) / 1.25, max([2.0, *ends]) * 1.25
    ticks = [t for t in (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100) if low <= t <= high]
    axes.set_xticks(ticks, [show(t, "", view.language) for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    for words, place, side in (("better", 0.95, "right"), ("worse", 1.05, "left")):
        axes.text(place, -0.55, view.words[words], color=MUTED, ha=side, va="bottom", fontsize=9)
    axes.set_xlabel(view.words["ratio_axis"])


def _positions(view: View, axes: Axes) -> None:
    """Loss by place in the window; each model in its own tokens."""
    axes.set_xscale("log", base=2)
    last = 1
    for name, rows in view.record["positions"].items():
        colour, width = (DEMO, 2.2) if name == "compact" else (INK, 1.4)
        places = [row["last"] for row in rows]
        last = max(last, *places)
        axes.fill_between(
            places,
            [row["loss"]["low"] for row in rows],
            [row["loss"]["high"] for row in rows],
            color=colour,
            alpha=0.13,
            linewidth=0,
        )
        values = [row["loss"]["value"] for row in rows]
        axes.plot(places, values, color=colour, linewidth=width, marker="o", markersize=4)
        axes.annotate(name, (places[-1], values[-1]), (7, -3), textcoords="offset points", color=colour)
    ticks = [2**n for n in range(last.bit_length())]
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xlim(0.9, last * 3)
    axes.set_xlabel(view.words["position_axis"])
    axes.set_ylabel(view.words["loss_axis"])


def _calibration(view: View, axes: Axes) -> None:
    """Each run's intervals and what was found; below, runs of others that the same rule was tried on."""
    runs = [("compact", "demo_run", "compact.loss"), ("note", "note_run", "reported.loss")]
    names = [view.words[key] for _, key, _ in runs]
    for place, (model, _, found) in enumerate(runs):
        intervals = [view.evidence[f"{model}.expected_loss_{share}"] for share in ("95", "80")]
        _intervals(axes, place, [(item["low"], item["high"]) for item in intervals])
        for name, item in view.evidence.items():
            if name.startswith(f"{model}.law."):
                axes.plot([item["value"]], [place - 0.2], "|", color=MUTED, markersize=9)
        if found in view.evidence:
            item = view.evidence[found]
            _found(view, axes, place, item["value"], DEMO if model == "compact" else INK, item["known"])
    for place, check in enumerate(view.record["calibration"], len(runs)):
        names.append(check["name"])
        _intervals(axes, place, [(check[f"low_{share}"], check[f"high_{share}"]) for share in ("95", "80")])
        _found(view, axes, place, check["measured"], INK, "reported")
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(view.words["loss_axis"])


def _intervals(axes: Axes, place: int, wide_and_narrow: list[tuple[float, float]]) -> None:
    for ends, width in zip(wide_and_narrow, (2.0, 7.0), strict=True):
        axes.plot(ends, [place, place], color=OTHER, linewidth=width, solid_capstyle="butt", alpha=0.6)


def _found(view: View, axes: Axes, place: int, loss: float, colour: str, known: str) -> None:
    face = colour if known == "measured" else PAPER
    axes.plot([loss], [place], "o", color=colour, markerfacecolor=face, markersize=8)
    text = show(loss, "nats per token", view.language)
    axes.text(1.02, place, text, color=colour, va="center", transform=axes.get_yaxis_transform())


def _repetition(view: View, axes: Axes) -> None:
    """Repeated 4-grams of what each model wrote, by way of writing, and of human text."""
    rows = []
    for name, item in view.evidence.items():
        model, _, figure = name.partition(".text.")
        way, _, quantity = figure.partition(".")
        if quantity == "seq_rep_4":
            named = view.words[way] if way == "human" else f"{model}, {view.words[way]}"
            rows.append((item, named))
    rows.sort(key=lambda row: float(row[0]["value"]))
    ours = [place for place, (item, named) in enumerate(rows) if named.startswith("compact")]
    _rows(view, axes, [item for item, _ in rows], [named for _, named in rows], ours)
    axes.set_xlim(left=-0.02)
    axes.xaxis.set_major_formatter(lambda share, _: show(share, "share", view.language).replace(".0", ""))


CHARTS: dict[str, Callable[[View, Axes], None]] = {
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
        name: one of CHARTS.
        language: of the labels.
    """
    return _drawn(record, name, language, "png", metadata={"Software": None}, dpi=130)


def svg(record: Record, name: str, language: Language, label: str) -> str:
    """Draw one chart as an <svg> element for the page.

    Args:
        record: the comparison's.
        name: one of CHARTS.
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
    """Let a linear axis number its ticks with the marks of the language."""
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    own = axis.get_major_formatter()
    if isinstance(own, ScalarFormatter):
        axis.set_major_formatter(FuncFormatter(lambda x, place: localized(own(x, place), language)))
        axis.get_major_formatter().set_locs = own.set_locs  # the library asks it how many digits are needed


def _height(record: Record, name: str) -> float:
    """Inches; a row more for each run that the estimate was tried on."""
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
        CHARTS[name](View(record, language), axes)
        for axis in (axes.xaxis, axes.yaxis):
            _localize(axis, language)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format=form, transparent=form == "svg", **more)
    return buffer.getvalue()
