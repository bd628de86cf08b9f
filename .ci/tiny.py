"""Lay tiny.yaml over params.yaml; a key that params.yaml lacks is a mistake."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def lay_over(base: dict[str, Any], change: dict[str, Any]) -> None:
    """Change `base` in place; distributions are replaced as a whole."""
    for key, value in change.items():
        if isinstance(value, dict) and key != "distributions":
            lay_over(base[key], value)
        else:
            assert key in base, key
            base[key] = value


if __name__ == "__main__":
    yaml, params = YAML(), Path("params.yaml")
    tree = yaml.load(params)
    lay_over(tree, YAML(typ="safe").load(Path(__file__).with_name("tiny.yaml")))
    yaml.dump(tree, params)
