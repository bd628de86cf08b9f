"""Run `compactgpt gate`, which checks that the model is not worse than an accepted model.

The gate is not a DVC stage, because each `dvc repro` would run a failed stage again.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
