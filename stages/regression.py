"""Run `compactgpt gate`, which compares the metrics of the model with accepted metrics.

The gate is no DVC stage: each `dvc repro` would run a failed stage again.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
