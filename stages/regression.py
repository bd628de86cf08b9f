"""The gate, the same as `compactgpt gate`. Not a stage of DVC.

DVC would not lock a gate that fails, and would run it again every time.
"""

from compactgpt.cli import gate
from stages._runner import new_app

app = new_app()
app.command()(gate)


if __name__ == "__main__":
    app()
