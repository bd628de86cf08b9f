"""Run `compactgpt gate`, which compares the metrics of the model with accepted metrics.

The gate is not a DVC stage. If the gate were a stage, each `dvc repro` would run a failed gate again.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
