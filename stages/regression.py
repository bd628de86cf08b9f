"""Run the gate, as the command `compactgpt gate` does.

The gate is no DVC stage: DVC keeps no result of a failed stage, so every `dvc repro` would run a failed gate
again.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
