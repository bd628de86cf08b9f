"""compactgpt: train a compact GPT, measure it against GPT-2, and show where every number came from.

`compactgpt.load` loads a trained model; see `compactgpt.api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compactgpt.api import Model, Score, load

__version__ = "0.4.0"
__all__ = ["Model", "Score", "load"]


def __getattr__(name: str) -> Any:
    """Import the names of `__all__` when a program uses them: they need torch, which takes a second."""
    if name in __all__:
        from compactgpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'compactgpt' has no attribute {name!r}")
