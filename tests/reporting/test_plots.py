"""Plots show the record: they change with it, and are part of the page without leaking into it."""

import copy
import re
import xml.etree.ElementTree as ET

import pytest

from compactgpt.reporting import plots


def altered(record, name):
    """Return the record with another value in one plot."""
    changed = copy.deepcopy(record)
    if name == "loss":
        changed["curve"][1]["val_loss"] = 7.0
    elif name == "positions":
        changed["positions"]["compact"][0]["loss"]["value"] = 7.0
    else:
        item = next(item for item in changed["evidence"] if item["id"] == VALUES[name])
        item.update({bound: item[bound] * 1.1 for bound in ("value", "low", "high")})
    return changed


VALUES = {
    "ratio": "ratio.compact_to_xz.perplexity",
    "bits_per_byte": "xz.bits_per_byte",
    "calibration": "note.expected_loss_80",
    "repetition": "compact.text.greedy.seq_rep_4",
}


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_plot_changes_with_its_values_only(record, name):
    before = plots.draw_png(record, name)
    assert plots.draw_png(altered(record, name), name) != before
    assert plots.draw_png(record, name) == before


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
