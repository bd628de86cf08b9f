"""Run `compactgpt gate`, which checks that the model is not worse than an accepted model.

The gate is not a DVC stage. If it were one and failed, each `dvc repro` would run it again, because DVC keeps
no result of a stage that fails.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
