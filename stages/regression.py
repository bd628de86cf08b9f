"""Door of compactgpt.regression, the same as `compactgpt gate`. No stage of DVC.

A gate inside the chain would never be locked when it fails, and would run again every time.
"""

from compactgpt.cli import gate
from stages._runner import new_app

app = new_app()
app.command()(gate)


if __name__ == "__main__":
    app()
