"""Dimension of a search space: the values of a key, and whether they suit it."""

from typing import Annotated, Any

from pydantic import Field
from pydantic.fields import FieldInfo

from core.config import Config, Section
from core.config.keys import known_keys

Number = int | float


class Dimension(Section):
    """Values of one key: an interval `low` to `high`, or `choices`."""

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    """Uniform in the logarithm."""
    step: Annotated[float, Field(gt=0)] | None = None
    choices: tuple[Number | bool | str, ...] | None = None

    def check(self, name: str, field: FieldInfo) -> None:
        """Refuses values that make no sense together, or not for the key.

        Raises:
            ValueError: names the entry and the remedy.
        """
        if len({self.low is None, self.high is None, self.choices is not None}) > 1:
            given = self.model_dump(exclude_unset=True)
            told = ", ".join(f"{key}={value}" for key, value in given.items()) or "nothing"
            raise ValueError(
                f"{name} has {told}: give low and high, or choices, and null for the others"
            )
        if self.choices is not None:
            if not self.choices:
                raise ValueError(f"{name}.choices is empty: list at least one value")
            return
        assert self.low is not None
        assert self.high is not None
        if not {int, float} & set(_types(field)):
            raise ValueError(f"{name} is not numeric: give choices")
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"{name} has low={self.low:g}, high={self.high:g}, log={str(self.log).lower()}: "
                "low must not exceed high, and must be positive with log=true"
            )
        if self.log and self.step is not None:
            raise ValueError(f"{name} has both log=true and step={self.step:g}: leave one out")
        if self.step is not None and self.step % 1 and _is_integer(field):
            raise ValueError(f"{name}.step={self.step:g} must be a whole number, as its key is")

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that must be valid if all are."""
        return self.choices if self.choices is not None else (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the space, wherever the steps are."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        return isinstance(value, Number) and self.low <= value <= self.high


def is_integer(key: str) -> bool:
    """Whether a key of the run takes whole numbers alone."""
    return _is_integer(known_keys(Config)[key])


def _is_integer(field: FieldInfo) -> bool:
    types = _types(field)
    return int in types and float not in types


def _types(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    return getattr(annotation, "__args__", (annotation,))
