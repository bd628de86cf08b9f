"""Write the pictures of the documentation from the last run: `make pictures`.

docs/page.png is the top of reports/index.html; docs/page.txt has its figures, which a test compares with the
reports. docs/mlflow.png has the charts that `make ui` opens, of the runs in mlflow.db.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

from compactgpt.common.storage import read_json, write_text

PAGE = Path("reports/index.html")
CHARTS = "#/experiments/1/runs?viewStateShareKey=pipelines&compareRunsMode=CHART"
# For root in a container. The pictures show only pages of this project.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]


def caption() -> str:
    """Return the headline figures of the committed reports, a line each."""
    metrics, evidence = (read_json(Path("reports") / name) for name in ("metrics.json", "evidence.json"))
    lines = [f"{name}: {metrics[name]:.3f}" for name in ("loss", "perplexity", "bits_per_byte")]
    lines += [f"claims {verdict}: {count}" for verdict, count in evidence["tally"]]
    return "\n".join(lines) + "\n"


def photograph(browser, url: str, path: Path, size: tuple[int, int], wait_for: str) -> None:
    """Write a picture of the top of a page when it has the element `wait_for`."""
    window = browser.new_page(viewport={"width": size[0], "height": size[1]})
    window.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    window.goto(url)
    window.wait_for_selector(wait_for, timeout=300_000)
    window.wait_for_timeout(5_000)  # for other elements like it, and animations
    window.screenshot(path=path)
    window.close()
    print(f"{path}: {path.stat().st_size:,} bytes")


def photograph_mlflow(browser) -> None:
    """Start an MLflow server on mlflow.db, and write a picture of its charts."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    store = [f"--backend-store-uri=sqlite:///{Path('mlflow.db').resolve()}", f"--port={port}"]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host=127.0.0.1", "--workers=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):  # seconds; on a busy machine MLflow starts slowly
                time.sleep(1)
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            url = f"http://127.0.0.1:{port}/{CHARTS}"
            photograph(browser, url, Path("docs/mlflow.png"), (1280, 1000), ".js-plotly-plot .main-svg")
        finally:
            server.terminate()


def main() -> None:
    """Write all pictures."""
    from playwright.sync_api import sync_playwright

    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, programs), None)
    if chromium is None:
        sys.exit("there is no Chromium here: install it, for instance with apt-get install chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS) as browser,
    ):
        photograph(browser, PAGE.resolve().as_uri(), Path("docs/page.png"), (1280, 1200), "table")
        write_text(Path("docs/page.txt"), caption())
        if Path("mlflow.db").exists():
            photograph_mlflow(browser)


if __name__ == "__main__":
    main()
