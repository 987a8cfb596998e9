"""Configuration keys as people write them, and their names, ranges and near misses in words."""

import difflib
from collections.abc import Collection
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


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
    keys = known_keys(model)
    path = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    if error["type"] == "extra_forbidden":
        return f"unknown key '{path}'{nearest_key(keys, path)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    if path not in keys and path.rpartition(".")[0] in keys:
        path = path.rpartition(".")[0]  # The last part names one of several allowed types.
    field = keys.get(path)
    allowed = f"; allowed: {describe(field)}" if field is not None else ""
    if error["type"] == "missing":
        return f"missing key '{path}'{allowed}"
    return f"{path}={error['input']!r} is out of range or of the wrong type{allowed}"


def describe(field: FieldInfo) -> str:
    """Names the type and range of a field in words, such as `integer in [1, 256]`."""
    return _describe(field.annotation, list(field.metadata))


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
