"""Configuration keys: their names, ranges and near misses in words."""

import difflib
from collections.abc import Collection
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

COUNT, NOISE = "central_images.per_class", "central_images.noise_multiplier"
CLUSTERS = "central_images.num_clusters"
"""The count where the easy stage starts from moments."""
_SHOWN = 100
"""Characters of a wrong value that a message repeats."""


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Maps every dotted key of `model` to its field, those of optional sections included."""
    keys: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        section = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if section is not None:
            keys.update(known_keys(section, f"{prefix}{name}."))
        else:
            keys[prefix + name] = field
    return keys


def nearest_key(keys: Collection[str], key: str) -> str:
    """Returns a hint that names the valid key closest to an unknown one."""
    match = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not match:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in keys}
        leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.5)
        match = [by_leaf[leaf[0]]] if leaf else []
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; valid keys start with {', '.join(sorted({k.split('.')[0] for k in keys}))}"


def explain(model: type[BaseModel], failure: ValidationError) -> str:
    """The first problem of a validation as one sentence."""
    error = failure.errors()[0]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    path, kind, allowed = _locate(model, error["loc"])
    if error["type"] == "extra_forbidden":
        prefix = f"{path}." if path else ""
        keys = {*known_keys(model), *known_keys(_section(kind) or model, prefix)}
        path = f"{prefix}{error['loc'][-1]}"
        return f"unknown key '{path}'{nearest_key(keys, path)}"
    if error["type"] == "missing":
        return f"missing key '{path}'; allowed: {allowed}"
    given = repr(error["input"])
    given = given if len(given) <= _SHOWN else f"{given[: _SHOWN - 3]}..."
    return f"{path}={given} is out of range or of the wrong type; allowed: {allowed}"


def _locate(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, Any, str]:
    """Dotted key, type, and what is allowed in words, of the place of an error.

    Parts of a location that are no keys count items or name one of several allowed types.
    """
    path: list[str] = []
    kind, allowed = model, ""
    for part in map(str, location):
        if get_origin(kind) is dict:  # Its keys may have any name.
            kind = get_args(kind)[1]
            allowed = _describe(kind, [])
        elif (section := _section(kind)) is not None and part in section.model_fields:
            field = section.model_fields[part]
            kind, allowed = field.annotation, _describe(field.annotation, list(field.metadata))
        else:
            continue
        path.append(part)
    return ".".join(path), kind, allowed


def _section(kind: Any) -> type[BaseModel] | None:
    """The section that a type is, allows or lists."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next(filter(None, map(_section, get_args(kind))), None)


def _describe(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        for item in extra:
            metadata = metadata + (list(item.metadata) if isinstance(item, FieldInfo) else [item])
        return _describe(inner, metadata)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_describe(each, metadata) for each in get_args(annotation))
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_describe(get_args(annotation)[0], [])}"
    if get_origin(annotation) is dict:
        return "a section of keys"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with {', '.join(annotation.model_fields)}"
    patterns = [found for item in metadata if (found := getattr(item, "pattern", None))]
    if patterns:
        return f"text that matches {patterns[0]}"
    bounds = {
        name: value
        for item in metadata
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(item, name, None)) is not None
    }
    names = {int: "integer", float: "finite number", str: "text", bool: "true or false"}
    kind = names.get(annotation, str(annotation).replace("None", "null"))
    if not bounds:
        return kind
    low = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds.get('gt', '-inf')}"
    high = f"{bounds['le']}]" if "le" in bounds else f"{bounds.get('lt', 'inf')})"
    return f"{kind} in {low}, {high}"
