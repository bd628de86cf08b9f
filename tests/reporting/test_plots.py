"""Plots show the record: they change with it, and are part of the page without leaking into it."""

import re
import xml.etree.ElementTree as ET

import pytest

from compactgpt.reporting import plots
from tests.support.comparison_inputs import make_place, record_of


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return record_of(make_place(tmp_path_factory.mktemp("place")))


@pytest.fixture(scope="module")
def pictures(record):
    return {name: plots.draw_png(record, name) for name in plots.PLOTS}


def evidence_of(record: dict) -> dict:
    return {item["id"]: item for item in record["evidence"]}


ALTERED = {
    "loss": "compact.loss",
    "ratio": "ratio.compact_to_xz.perplexity",
    "bits_per_byte": "xz.bits_per_byte",
    "calibration": "note.expected_loss_80",
    "repetition": "compact.text.greedy.seq_rep_4",
}


@pytest.mark.parametrize(("name", "value"), ALTERED.items())
def test_a_chart_changes_with_its_value(record, pictures, name, value):
    item = evidence_of(record)[value]
    kept = dict(item)
    for bound in ("value", "low", "high"):
        item[bound] *= 1.1
    assert plots.draw_png(record, name) != pictures[name]
    item.update(kept)
    assert plots.draw_png(record, name) == pictures[name]


def test_the_curve_and_the_places_in_the_window_are_drawn(record, pictures):
    kept = record["curve"][1]["val_loss"], record["positions"]["compact"][0]["loss"]["value"]
    record["curve"][1]["val_loss"] = record["positions"]["compact"][0]["loss"]["value"] = 7.0
    for name in ("loss", "positions"):
        assert plots.draw_png(record, name) != pictures[name]
    record["curve"][1]["val_loss"], record["positions"]["compact"][0]["loss"]["value"] = kept


@pytest.mark.parametrize("name", plots.PLOTS)
def test_svg_is_named_is_text_and_takes_its_colours_from_the_page(record, name):
    text = plots.draw_svg(record, name, "fr", 'what "it" shows')
    root = ET.fromstring(text.replace("xlink:href", "href"))
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'what "it" shows'
    assert list(root.iter("text"))
    assert "style" not in {element.tag for element in root.iter()}
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|http", text)
    assert set(re.findall(r"var\((--\w+)\)", text)) <= {f"--{name}" for name in plots.COLOURS}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith(f"fr-{name}-") for one in ids)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used <= set(ids)


def test_ticks_have_the_marks_of_the_language(record):
    assert re.search(r">\d\.\d+<", plots.draw_svg(record, "bits_per_byte", "en", ""))
    french = plots.draw_svg(record, "bits_per_byte", "fr", "")
    assert re.search(r">\d,\d+<", french)
    assert not re.search(r">\d+\.\d+<", french)
