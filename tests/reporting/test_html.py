"""The page needs nothing but itself, shows what the record holds, and works in a real browser."""

import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from compactgpt.reporting import pages
from compactgpt.reporting.tables import COLUMNS, View
from compactgpt.reporting.templating import TEMPLATES, load_messages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def text(record):
    """The page, with a script in a generated text."""
    script = {"greedy": "<script>document.title='owned'</script>"}
    return pages.render_page({**record, "samples": [{"prompt": "The", "models": {"compact": script}}]})


@pytest.fixture(scope="module")
def tags(text):
    """Every opening tag of the page with its attributes, in order."""
    found: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(text)
    return found


def test_it_asks_for_nothing_and_runs_nothing(text, tags):
    for tag, attributes in tags:
        assert tag not in {"script", "iframe", "object", "embed", "img", "base"}
        assert not {name for name in attributes if name.startswith("on") or name == "src"}
        link = attributes.get("href") or "#"
        assert link.startswith("#") or (tag == "link" and link == "data:,"), link
    assert not re.search(r"@import|@font-face|url\((?!#)", text)
    assert len(text.encode()) < 1_500_000


def test_ids_are_unique_and_every_link_has_its_place(tags):
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {attributes["href"][1:] for tag, attributes in tags if tag == "a"} <= set(ids)
    assert {a[key] for _, a in tags for key in ("aria-labelledby", "for") if key in a} <= set(ids)


def test_headings_go_down_one_at_a_time_and_tables_have_scopes(tags):
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 2  # one a language
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {attributes.get("scope") for tag, attributes in tags if tag == "th"} == {"col", "row"}
    assert all(a.get("aria-label") for tag, a in tags if tag == "svg")


def shade(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_stand_out_from_the_paper_in_light_and_dark():
    style = (TEMPLATES / "report.css").read_text("utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for block in (light, dark[: dark.index("* {")]):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for name in ("ink", "muted", "demo", "holds", "fails", "open", "waits"):
            for ground in ("paper", "card"):
                one, other = sorted((shade(colours[name]), shade(colours[ground])), reverse=True)
                assert (one + 0.05) / (other + 0.05) >= 4.5, (name, ground)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: `apt-get install chromium` brings one")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, text, tmp_path):
    """Open the page in a window of its own; what it logged and asked for must be nothing."""
    path: Path = tmp_path / "index.html"
    logged, asked, contexts = [], [], []

    def see(width: int, scheme: str = "light", *, touch: bool = False, page: str = text):
        path.write_text(page, encoding="utf-8")
        size = {"width": width, "height": 800}
        contexts.append(
            browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch, is_mobile=touch)
        )
        window = contexts[-1].new_page()
        window.on("console", lambda message: logged.append(message.text))
        window.on("pageerror", lambda error: logged.append(str(error)))
        window.on("request", lambda request: asked.append(request.url))
        window.goto(path.as_uri())
        return window

    yield see
    for context in contexts:
        context.close()
    assert logged == []
    assert set(asked) == {path.as_uri()}


def test_the_browsers_cells_are_the_records(opened, record):
    window = opened(1280)
    assert window.title() == load_messages("en")["text"]["title"]
    view = View(record)
    known = {item["id"]: item for item in record["evidence"]}
    shown = window.eval_on_selector_all(
        "article[lang=en] .v",
        """all => all.map(v => [v.dataset.id, [...v.childNodes].filter(n => n.className != 'tip')
        .map(n => n.textContent).join(''), v.querySelector('.tip').textContent])""",
    )
    assert len(shown) > 100
    for name, value, tip in shown:
        assert value == view.show(known[name])
        assert known[name]["source"] in tip
    values = window.eval_on_selector_all(
        "article[lang=en] table.sources tbody tr", "rows => rows.map(row => row.cells[0].textContent)"
    )
    assert values == [item["id"] for item in record["evidence"]]


def test_a_number_says_where_it_came_from_to_mouse_and_keyboard(opened):
    window = opened(1280)
    value = window.locator("article[lang=en] table.note .v").first
    assert not value.locator(".tip").is_visible()
    value.hover()
    assert value.locator(".tip").is_visible()
    window.mouse.move(0, 0)
    value.focus()
    assert value.locator(".tip").is_visible()
    value.locator(".tip a").click()
    assert "#en-v-note.parameters.nanogpt" in window.url


def test_on_a_phone_a_tap_opens_the_source_where_the_number_is(opened):
    window = opened(390, touch=True)
    value = window.locator("article[lang=en] table.models .v").nth(4)
    value.scroll_into_view_if_needed()
    position, url = window.evaluate("scrollY"), window.url
    assert not value.locator(".tip").is_visible()
    value.tap()
    box = value.locator(".tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 800
    assert (window.evaluate("scrollY"), window.url) == (position, url)
    window.locator("article[lang=en] h1").tap()
    assert not value.locator(".tip").is_visible()


def test_on_a_phone_every_column_of_the_models_is_in_sight(opened, record):
    window = opened(390, touch=True)
    names = [
        load_messages("en")["text"][key] for key in (*COLUMNS["measured"][1:], *COLUMNS["published"][1:])
    ]
    cells = window.eval_on_selector_all(
        "article[lang=en] table.models td",
        """all => all.map(td => [td.dataset.label, getComputedStyle(td, '::before').content,
        td.getBoundingClientRect().right])""",
    )
    assert {label for label, _, _ in cells} == set(names)
    assert all(f'"{label}"' == shown and right <= 390 for label, shown, right in cells)


def test_the_language_is_switched_without_the_network(opened, record):
    window = opened(1280)
    english, french = (window.locator(f"article[lang={language}] h1") for language in ("en", "fr"))
    assert english.is_visible()
    assert not french.is_visible()
    window.get_by_text("Français", exact=True).click()
    assert french.is_visible()
    assert not english.is_visible()
    assert french.text_content() == View(record, "fr").headline()
    window.locator("#in-fr").press("ArrowLeft")
    assert english.is_visible()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(opened, record, width):
    """Here, the name of the corpus and its licence are long words."""
    name = "corpus" * 16
    parts = [{**record["data"]["sources"][0], "name": f"{name}.txt", "licence": name}]
    data = {**record["data"], "name": name, "sources": parts}
    window = opened(width, page=pages.render_page({**record, "about_note": False, "data": data}))
    for language in ("en", "fr"):
        window.locator(f"#in-{language}").check(force=True)
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        figure = window.locator(f"article[lang={language}] svg").first.bounding_box()
        assert figure is not None
        assert 250 < figure["width"] <= width
