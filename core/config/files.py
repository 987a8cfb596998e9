"""Configuration files in a small part of YAML, with inheritance, and overrides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import yaml_subset
from core.errors import ConfigError


def load_yaml(path: str | Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML mapping; with `inherits: FILE`, relative to it, on top of that one.

    Args:
        heirs: files that lead to this one.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or inherits from itself.
    """
    try:
        content = yaml_subset.parse(Path(path).read_text("utf-8-sig"))
        if (parent := content.pop("inherits", None)) is None:
            return content
        here = Path(path).resolve()
        if here in heirs:
            raise ConfigError(f"'{path}' inherits from itself: remove one `inherits`")
        return _overlay(load_yaml(here.parent / str(parent), (*heirs, here)), content)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at '{path}': check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not text in UTF-8 ({error}): save it as such") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from None


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        lower = both.get(key)
        if isinstance(lower, Mapping) and isinstance(value, Mapping):
            value = _overlay(lower, value)
        both[key] = value
    return both


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turns `key=value` arguments into a flat mapping; values are read as YAML."""
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{argument}' is not of the form key=value")
        try:
            overrides[key] = yaml_subset.parse_value(value)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
    return overrides


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested copy of `base` with dotted `overrides` set."""
    merged: dict[str, Any] = {
        k: merge(v, {}) if isinstance(v, Mapping) else v for k, v in base.items()
    }
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        node = merged
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"unknown key '{key}': '{parent}' is a value, not a section")
        node[leaf] = value
    return merged
