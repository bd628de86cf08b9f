"""Reports of a user's own text are about that text and the model trained on it, and its names stay text."""

import csv
import html as entities
import io
import json
import re
from itertools import combinations

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from compactgpt.common.errors import printable
from compactgpt.reporting import pages, plots, tables
from compactgpt.reporting.pages import render_comparison, render_model_card
from tests.support.comparison_inputs import edit, make_place, record_of

HOSTILE = "*Ham<script>let</script>* `x` [a](b) | $y$ \u202etxt.exe\x1b[31m"
NAME = "Shakespeare's plays"


def own(project, name=NAME):
    """Turn a project's reports into those of a user's own corpus."""
    part = {"name": f"corpus/{name}.txt", "version": None, "licence": name, "documents": 1, "bytes": 9}
    edit(project / "reports/download.json", lambda r: r.update(corpus="files", name=name, sources=[part]))
    return project


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return record_of(own(make_place(tmp_path_factory.mktemp("project"))))


def test_the_record_knows_what_it_is_about(record, tmp_path):
    assert record["about_note"] is False
    known = {item["id"]: item for item in record["evidence"]}
    assert known["compact.perplexity"]["corpus"] == f"{NAME} val"
    assert known["compact.tokens_seen"]["corpus"] == f"{NAME} train"
    project = own(make_place(tmp_path), "docstrings")  # a file of that name is no demo
    assert record_of(project)["about_note"] is False


@pytest.mark.parametrize("language", ["en", "fr"])
def test_the_reports_begin_with_the_users_text_and_no_score_of_it_is_in_the_notes_table(record, language):
    view, text = tables.View(record, language), render_comparison(record, language)
    assert text.startswith(f"# {view.say('own_title', corpus=NAME)}\n\n{view.headline()}")
    assert view.value("compact.perplexity") in view.headline()
    sections = text.split("\n## ")
    titles = [section.splitlines()[0] for section in sections]
    assert titles[1] == view.say("measured", corpus=NAME)
    note = sections[titles.index(view.words["table_own"])]
    claims = sections[titles.index(view.words["claims"])]
    for name in ("loss", "perplexity", "tokens_seen"):
        assert view.value(f"compact.{name}") in sections[1]
        assert view.value(f"compact.{name}") not in note + claims
    assert "compact." not in note + claims
    assert f"Perplexity on OpenWebText ({NAME})" not in text
    assert "of files" not in text
    assert NAME in text


def test_the_page_begins_with_the_users_text(record):
    page = pages.render_page(record)
    headline = tables.View(record).headline()
    assert f"<h1>{entities.escape(headline, quote=True)}</h1>".replace("&#x27;", "&#39;") in page
    first = page[page.index('<article lang="en">') : page.index('<article lang="fr">')]
    assert first.index('id="en-demo"') < first.index('id="en-table"') < first.index('id="en-claims"')
    assert 'class="here"' not in first
    rows = list(csv.DictReader(io.StringIO(pages.render_csv(record))))
    assert not {row["evidence"] for row in rows if row["claim"]} & {"compact.loss", "compact.perplexity"}


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_the_reports_say_how_val_was_chosen(tmp_path, split):
    place = make_place(tmp_path)
    edit(place / "reports/tokenization.json", lambda report: report.update(split=split))
    record = record_of(place)
    for language in ("en", "fr"):
        assert tables.View(record, language).say(f"val_{split}") in render_comparison(record, language)
    assert re.findall(r"<code>tokenization\.split: (\w+)</code>", pages.render_page(record)) == [split, split]


def test_the_ranking_follows_the_paired_intervals(record):
    view = tables.View(record)
    for name in view.baselines:
        view.evidence[f"ratio.compact_to_{name}.perplexity"] = {"low": 0.5, "high": 0.9}
    view.evidence["ratio.compact_to_xz.perplexity"] = {"low": 1.1, "high": 2}
    view.evidence["ratio.compact_to_zstd.perplexity"] = {"low": 0.9, "high": 2}
    better = ", ".join(name for name in view.baselines if name not in ("xz", "zstd"))
    assert view.ranking() == (
        f"On the same text, it predicts better than {better}; it predicts worse than xz; "
        "it is not clearly different from zstd."
    )


@pytest.mark.parametrize("name", ["ratio", "positions", "bits_per_byte"])
def test_labels_do_not_overlap_with_ratios_far_from_one(record, name):
    changed = json.loads(json.dumps(record))
    for item in changed["evidence"]:
        if item["id"].startswith("ratio.compact_to_") and item["id"].endswith(".perplexity"):
            item.update(value=3e-6, low=1e-6, high=1e-5)
    rows = changed["positions"]["compact"]
    changed["positions"] = {f"model-{n}": [*rows, {**rows[-1], "last": 4096}] for n in range(4)}
    figure = plots.make_figure(tables.View(changed), name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    beyond = {tick.label1 for tick in axes.xaxis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    texts = [text for text in texts if text not in beyond]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for box in boxes:
        assert -1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1
    for first, second in combinations(boxes, 2):
        assert not first.shrunk(0.9, 0.7).overlaps(second.shrunk(0.9, 0.7))


# --- names with markup and control characters


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    project = own(make_place(tmp_path_factory.mktemp("project")), HOSTILE)

    def rename(report):
        for sample in report["samples"]:
            sample["prompt"] = HOSTILE
            sample["greedy"]["text"] = f"```\n</pre><script>\u202e{HOSTILE}\n```\n# no heading"

    edit(project / "reports/samples.json", rename)
    edit(project / "reports/evaluation.json", lambda r: r["model"].update(context=HOSTILE))
    return record_of(project)


@pytest.mark.parametrize("render", [render_comparison, render_model_card])
def test_hostile_names_stay_text_in_markdown(hostile, render):
    text = render(hostile)
    body = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)
    # `<br>` is the one tag that the reports write themselves; markdown-it passes it on
    ours = "h1 h2 h3 p table thead tbody tr th td strong em code a pre ul li br"
    assert set(re.findall(r"</?([a-z]+\d?)[ >]", rendered)) <= set(ours.split())
    assert set(re.findall(r'href="([^"]*)"', rendered)) == set()
    assert "\u202e" not in text
    assert "\x1b" not in text
    shown = entities.unescape(re.sub(r"<[^>]*>", "", rendered))
    assert shown.count(printable(HOSTILE)) > 3
    if render is render_model_card:
        (name,) = {result.dataset_name for result in ModelCard(text).data.eval_results}
        assert name == f"{printable(HOSTILE)}, held-out documents"


def test_hostile_names_stay_text_in_the_page(hostile):
    page = pages.render_page(hostile)
    assert not re.search("<script|[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", page)
    assert printable(HOSTILE) in entities.unescape(re.sub(r"<[^>]*>", "", page))


def test_hostile_names_stay_text_in_plots(hostile, tmp_path):
    assert "<script" not in plots.draw_svg(hostile, "calibration", "en", HOSTILE)
    picture = plots.draw_svg(hostile, "bits_per_byte", "en", "")
    assert not re.search("<script|\u202e", picture)
    assert printable(HOSTILE)[:20] in entities.unescape(picture)
    record = record_of(own(make_place(tmp_path), r"$x$ and $\frac$"))
    assert r">Bits per byte, $x$ and $\frac$ val<" in plots.draw_svg(record, "bits_per_byte", "en", "")
