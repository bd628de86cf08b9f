"""The gate, the same as `compactgpt gate`. Not a stage of DVC.

DVC would not lock a gate that fails, and would run it again every time.
"""

import sys

from compactgpt.cli import app

if __name__ == "__main__":
    app(["gate", *sys.argv[1:]])
