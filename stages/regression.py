"""Run `compactgpt gate`, which compares the model with the accepted one.

The gate is no DVC stage: each `dvc repro` would run a failed stage again.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
