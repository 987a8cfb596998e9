"""Reader and writer of the part of YAML that configuration files use, without a dependency.

The part: nested mappings by indentation, scalars, flow lists of scalars, `#` comments. Whatever
lies outside is an error that names the line, so a file never means something else here than to a
full YAML parser. Numbers such as `1e-5` are numbers, as in YAML 1.2 (YAML 1.1 reads text).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_LINE = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_][\w.\-]*):(?:\s+(?P<value>.*))?$")
_NUMBER = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_FORBIDDEN = tuple("&*!|>%@`{-?")


def parse(text: str) -> dict[str, Any]:
    """Parses a document into nested dictionaries.

    Raises:
        ValueError: a line is outside the supported part of YAML; the message names it.
    """
    root: dict[str, Any] = {}
    stack: list[tuple[int, dict[str, Any]]] = [(-1, root)]
    opened: tuple[int, dict[str, Any]] | None = (0, root)
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _split(raw, "#")[0].rstrip()
        if not line or line == "---":
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(
                f"line {number}: expected 'key: value' or 'key:', indented by blanks, with lists "
                f"as [a, b]; found {raw!r}"
            )
        indent = len(match["indent"])
        if opened is not None and indent >= opened[0] and (stack[-1][0] < indent):
            stack.append((indent, opened[1]))
        while stack[-1][0] > indent:
            stack.pop()
        if stack[-1][0] != indent:
            raise ValueError(f"line {number}: indentation of {indent} matches no open section")
        node = stack[-1][1]
        if match["key"] in node:
            raise ValueError(f"line {number}: key '{match['key']}' stands twice")
        if match["value"] is None:
            child: dict[str, Any] = {}
            node[match["key"]] = child
            opened = (indent + 1, child)
        else:
            try:
                node[match["key"]] = parse_value(match["value"])
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            opened = None
    return root


def parse_value(text: str) -> Any:
    """Parses one scalar or flow list of scalars, as on a command line."""
    text = text.strip()
    if text.startswith("["):
        if not text.endswith("]"):
            raise ValueError(f"unclosed list {text!r}")
        inner = text[1:-1].strip()
        return [parse_value(item) for item in _split(inner, ",")] if inner else []
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if text.startswith('"'):
        return json.loads(text)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.match(text):
        return float(text) if any(c in text for c in ".eE") else int(text)
    if text.startswith(_FORBIDDEN) or ": " in text or "'" in text[:1]:
        raise ValueError(f"{text!r} is not a plain scalar; put it in double quotes")
    return text


def _split(text: str, mark: str) -> list[str]:
    """Splits at `mark` outside quotes; `#` counts only at the start or after a space."""
    parts, quote, start = [], "", 0
    previous = " "
    skip = False
    for position, char in enumerate(text):
        if skip:
            skip = False
        elif quote:
            skip = quote == '"' and char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'" and previous in " ,[":
            quote = char
        elif char == mark and (mark != "#" or previous == " "):
            parts.append(text[start:position])
            start = position + 1
        previous = char
    return [*parts, text[start:]]


def dump(content: Mapping[str, Any], indent: int = 0) -> str:
    """Writes nested dictionaries as block YAML; `parse(dump(x)) == x`."""
    lines: list[str] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            lines.append(f"{' ' * indent}{key}:")
            lines.append(dump(value, indent + 2).rstrip("\n"))
        else:
            lines.append(f"{' ' * indent}{key}: {_dump_value(value)}")
    return "\n".join(line for line in lines if line) + "\n"


def _dump_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_dump_value(item) for item in value) + "]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    return json.dumps(value)
