"""Rules for single values: a kind and a range, and the words that say what is accepted.

A leaf, as `files` is: it imports nothing else of this package. The rules of every config key are in
`oneformer_jax.config_rules`; dataclasses with fields of their own bring their own rules.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from oneformer_jax.files import did_you_mean, first_few

_SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(abc.ABC):
    """Checks one value of a config or a file.

    Attributes:
      note: ends the sentence about what is accepted, as " (0 is off)".
    """

    note: str = ""

    @abc.abstractmethod
    def accepts(self, value: Any) -> bool:
        """Tells whether `value` is of the kind and in the range."""

    @abc.abstractmethod
    def wanted(self) -> str:
        """Names what is accepted, as "an integer from 1 to 9"."""

    def fault(self, value: Any) -> str:
        """Completes "it must ..." for a value that is not accepted; "" for one that is."""
        if self.accepts(value):
            return ""
        return f"be {self.wanted()}{self.note}{self.hint(value)}"

    def hint(self, value: Any) -> str:
        """Suggests what a wrong value may have been meant as, or ""."""
        near = self.nearest(value)
        return "" if near is None else f" (use {near})"

    def nearest(self, value: Any) -> Any:
        """Returns an accepted value near to `value`, or None."""
        return value if self.accepts(value) else None


@dataclasses.dataclass(frozen=True)
class Integer(Rule):
    """An integer from `low` to `high` in steps of `multiple`, or the special value `other`.

    Booleans are no integers.
    """

    low: int
    high: int
    multiple: int = 1
    other: int | None = None

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        fits = self.low <= value <= self.high and value % self.multiple == 0
        return fits or (self.other is not None and value == self.other)

    def wanted(self) -> str:
        kind = "an integer" if self.multiple == 1 else f"a multiple of {self.multiple}"
        if self.multiple == 2 and self.low % 2 == 0:
            kind = "an even number"
        other = "" if self.other is None else f"{self.other} or "
        return f"{other}{kind} from {self.low:,} to {self.high:,}"

    def nearest(self, value: Any) -> int | None:
        if self.accepts(value) or not isinstance(value, int) or isinstance(value, bool):
            return super().nearest(value)
        return super().nearest(-(-value // self.multiple) * self.multiple)


@dataclasses.dataclass(frozen=True)
class Odd(Integer):
    """An odd integer from `low` to `high`."""

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and value % 2 == 1

    def wanted(self) -> str:
        return f"an odd integer from {self.low:,} to {self.high:,}"


@dataclasses.dataclass(frozen=True)
class Number(Rule):
    """A finite number from `low` to `high`, without the ends that `above` and `below` exclude."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return (  # False for NaN
            self.low <= value <= self.high
            and not (self.above and value == self.low)
            and not (self.below and value == self.high)
        )

    def wanted(self) -> str:
        if not self.above and not self.below:
            return f"a number from {self.low:g} to {self.high:g}"
        low, high = ">" if self.above else ">=", "<" if self.below else "<="
        return f"a number {low} {self.low:g} and {high} {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Flag(Rule):
    """True, False, or the word `other`, if there is one."""

    other: str = ""

    def accepts(self, value: Any) -> bool:
        named = isinstance(value, str) and value == self.other != ""
        return isinstance(value, bool) or named

    def wanted(self) -> str:
        return f"{self.other}, True or False" if self.other else "True or False"


@dataclasses.dataclass(frozen=True)
class Word(Rule):
    """One of the `words`."""

    words: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words

    def wanted(self) -> str:
        return f"one of {', '.join(word or repr('') for word in self.words)}"

    def hint(self, value: Any) -> str:
        return did_you_mean(value, filter(None, self.words)) if isinstance(value, str) else ""


@dataclasses.dataclass(frozen=True)
class Line(Rule):
    """A text of one line, at most `length` characters; empty only if `empty` says so.

    Attributes:
      kind: what it is, as "a folder".
    """

    kind: str
    empty: bool = False
    length: int = 4096

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str) or len(value) > self.length or not value.isprintable():
            return False
        return bool(value.strip()) or (self.empty and not value)

    def wanted(self) -> str:
        return f"{self.kind}, in one line{' or empty' if self.empty else ', not empty'}"


@dataclasses.dataclass(frozen=True)
class Matching(Line):
    """A line for which `test` holds; `kind` says what that is."""

    test: Callable[[str], bool] = bool

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and (not value or self.test(value))


@dataclasses.dataclass(frozen=True)
class Tuple(Rule):
    """A tuple (or list) of `least` to `most` values that each satisfy `item`.

    Attributes:
      order: "" for any order, "distinct", "ascending" (each above the one before), or "range" (none
        below the one before).
    """

    item: Rule
    least: int
    most: int
    order: str = ""

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, tuple | list) or not self.least <= len(value) <= self.most:
            return False
        if not all(self.item.accepts(item) for item in value):
            return False
        if self.order == "distinct":
            return len(set(value)) == len(value)
        pairs = itertools.pairwise(value)
        if self.order == "ascending":
            return all(a < b for a, b in pairs)
        return self.order != "range" or all(a <= b for a, b in pairs)

    def wanted(self) -> str:
        if self.order == "range":
            return f"(low, high) with low <= high, each {self.item.wanted()}"
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        order = f" {self.order}" if self.order else ""
        return f"a tuple of {count}{order} values, each {self.item.wanted()}"

    def hint(self, value: Any) -> str:
        if not isinstance(value, tuple | list):
            return ""
        near = tuple(self.item.nearest(item) for item in value)
        if near != tuple(value) and self.accepts(near):
            return f" (use {near})"
        return next((self.item.hint(item) for item in value if not self.item.accepts(item)), "")


@dataclasses.dataclass(frozen=True)
class Fields(Rule):
    """Named values of a kind that the reader of `where` checks."""

    where: str

    def accepts(self, value: Any) -> bool:
        return hasattr(value, "items") and all(isinstance(key, str) for key in value)

    def wanted(self) -> str:
        return f"fields with values, see {self.where}"


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted name -> value of nested settings; empty groups are left out."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": v for inner, v in flattened(value).items()}
        else:
            found[name] = value
    return found


def shown(value: Any) -> str:
    """Returns the value in a message: its repr, cut where it is long.

    Of an address, what may be secret is left out: a password, and what follows a "?".
    """
    if isinstance(value, int) and value.bit_length() > 1000:  # too many digits for repr
        return f"an integer of {value.bit_length():,} bits"
    try:
        text = repr(value)
    except RecursionError:
        return "a value of too many levels"
    text = re.sub(r"://[^/@\s]*@", "://...@", text)
    text = re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1...", text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def faults(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, str]:
    """Tells what each field of `rules` must be whose value is missing or wrong."""
    found = {
        name: rule.fault(values[name]) if name in values else f"be given: {rule.wanted()}"
        for name, rule in rules.items()
    }
    return {name: fault for name, fault in found.items() if fault}


def require(owner: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises a ValueError with a sentence for every field of `values` that breaks its rule.

    Args:
      owner: begins the name of a field in the message, as "SwinConfig: ".
      values: field -> value.
      rules: field -> rule.
    """
    refuse(owner, values, faults(values, rules))


def refuse(owner: str, values: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raises a ValueError with the fields, values and sentences of `faults`, if there are any."""
    if found:
        raise ValueError(
            "; ".join(
                f"{owner}{name} is {shown(values.get(name))}; it must {text}"
                for name, text in found.items()
            )
        )


def require_names(what: str, given: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Raises a ValueError for unknown names in `given`, with the nearest known, or missing ones."""
    if unknown := [name for name in given if name not in known]:
        first = [f"{shown(n)}{did_you_mean(n[:_SHOWN], known)}" for n in map(str, unknown[:5])]
        hints = first_few(first + unknown[5:])
        raise ValueError(f"{what}: unknown fields {hints}; known are {', '.join(known)}")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{what}: fields {', '.join(missing)} must be given")
