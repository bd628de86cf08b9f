"""Train a compact GPT and compare it with GPT-2. The function `load` loads a trained model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compactgpt.api import Model, Score, load

__version__ = "0.5.0"
__all__ = ["Model", "Score", "load"]


def __getattr__(name: str) -> Any:
    """Return an attribute of `compactgpt.api`. The import is here because the import takes a second."""
    if name in __all__:
        from compactgpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'compactgpt' has no attribute {name!r}")
