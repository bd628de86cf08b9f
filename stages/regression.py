"""Run the gate, as `compactgpt gate` does. The gate is not a DVC stage.

DVC does not write a failed stage to dvc.lock, so it would run a failed gate again at every `dvc repro`.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
