"""Write the pictures of the documentation from the last run, while `make ui` runs: `make pictures`.

docs/page.png: the top of reports/index.html. docs/page.txt: its figures, for a test. docs/mlflow.png: charts.
"""

import shutil
import sys
from pathlib import Path

from compactgpt.common.storage import read_json, write_text

CHARTS = "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=pipelines&compareRunsMode=CHART"
# Root in a container needs --no-sandbox. The pages are only those of this project.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]


def caption() -> str:
    """Return the headline figures of the committed reports, a line each."""
    metrics, evidence = (read_json(Path("reports") / name) for name in ("metrics.json", "evidence.json"))
    lines = [f"{name}: {metrics[name]:.3f}" for name in ("loss", "perplexity", "bits_per_byte")]
    lines += [f"claims {verdict}: {count}" for verdict, count in evidence["tally"]]
    return "\n".join(lines) + "\n"


def photograph(browser, url: str, path: Path, height: int, wait_for: str) -> None:
    """Write a picture of the top of a page when it has the element `wait_for`."""
    window = browser.new_page(viewport={"width": 1280, "height": height})
    window.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    window.goto(url)
    window.wait_for_selector(wait_for, timeout=300_000)
    window.wait_for_timeout(5_000)  # for other elements like it, and animations
    window.screenshot(path=path)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Write all pictures."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium here: install it, for instance with apt-get install chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS) as browser,
    ):
        photograph(
            browser, Path("reports/index.html").resolve().as_uri(), Path("docs/page.png"), 1200, "table"
        )
        write_text(Path("docs/page.txt"), caption())
        photograph(browser, CHARTS, Path("docs/mlflow.png"), 1000, ".js-plotly-plot .main-svg")


if __name__ == "__main__":
    main()
