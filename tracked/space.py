"""The search space of a sweep, as it is typed.

    lr=log(1e-4,1e-1)  momentum=uniform(0,1)  layers=int(1,4)  hidden=choice(16,32,64)

Options are told apart by commas outside brackets: `layers=choice([64,32],[128])`. One that holds a comma itself, or
spaces at its ends, is quoted: `title=choice("a, b",c)`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from tracked import params
from tracked.errors import ParamError
from tracked.params import Value

if TYPE_CHECKING:
    from tracked.experiment import Experiment


@dataclass(frozen=True)
class Uniform:
    """A float from `low` to `high`, each as likely."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"uniform({self.low!r},{self.high!r})"


@dataclass(frozen=True)
class LogUniform:
    """A float from `low` to `high`, each order of magnitude as likely."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"log({self.low!r},{self.high!r})"


@dataclass(frozen=True)
class IntRange:
    """A whole number from `low` to `high`, both included; with `log`, each order of magnitude as likely."""

    low: int
    high: int
    log: bool = False

    def __str__(self) -> str:
        return f"{'log' if self.log else 'int'}({self.low},{self.high})"


@dataclass(frozen=True)
class Choice:
    """One of `options`, which are flat values as in `params`: an Enum member stands there by its name."""

    options: tuple[Value, ...]

    def __str__(self) -> str:
        return f"choice({','.join(map(_option_text, self.options))})"


Dimension: TypeAlias = Uniform | LogUniform | IntRange | Choice
# In order of name, because samplers draw one dimension after the other: the order typed must not matter.
Space: TypeAlias = dict[str, Dimension]

_EXAMPLES = {
    "log": "log(1e-4,1e-1)",
    "uniform": "uniform(0.0,1.0)",
    "int": "int(1,8)",
    "choice": "choice(…,…)",
}
_CALL = re.compile(r"\s*(\w+)\s*\(")
_QUOTES = "\"'"


def parse(arguments: Sequence[str], experiment: Experiment) -> tuple[Space, list[str]]:
    """The dimensions among the words of a command line, and the fixed `name=value` words as they are.

    A value that is no `log(…)`, `uniform(…)`, `int(…)` or `choice(…)` is fixed; `make_params` reads it.

    Args:
        arguments: For example `["lr=log(1e-4,1e-1)", "hidden=choice(16,32)", "momentum=0.9"]`.
        experiment: Its `Params` say what names there are and what their values may be.

    Raises:
        ParamError: A space on a name that is no param, a name given twice, a range that is empty, reversed,
            not finite or of another type than the param, `log` from 0 or below, a choice of nothing or with
            the same option twice, or a text that cannot be read.
    """
    space: Space = {}
    fixed: list[str] = []
    names: set[str] = set()
    for word in arguments:
        name, _, text = word.partition("=")
        name = name.strip()
        if name in names:
            raise ParamError(
                f"{name} is given twice", expected="each name once", try_next=f"leave out {word!r}"
            )
        names.add(name)
        call = _CALL.match(text)
        if call and call[1] in _EXAMPLES:
            read = _options if call[1] == "choice" else _range
            space[name] = read(word, name, call[1], _between_brackets(word, name, call[1], text), experiment)
            continue
        if call:
            _refuse_misspelt(word, name, call[1], experiment)
        fixed.append(word)
    return dict(sorted(space.items())), fixed


def as_words(values: Mapping[str, Value]) -> list[str]:
    """Values that were suggested as the `name=value` words that `make_params` reads back exactly."""
    return [f"{name}={_value_text(value)}" for name, value in values.items()]


def grid_size(space: Space) -> int | None:
    """How many points a grid over this space has; None if a dimension is continuous."""
    size = 1
    for dimension in space.values():
        match dimension:
            case IntRange(low, high):
                size *= high - low + 1
            case Choice(options):
                size *= len(options)
            case _:
                return None
    return size


def as_json(space: Space) -> str:
    """JSON that `from_json` reads back exactly; the same for the same space, in whatever order it was typed."""
    return params.to_json({name: _flat(dimension) for name, dimension in sorted(space.items())})


def from_json(text: str) -> Space:
    """The space that `as_json` wrote.

    Raises:
        ParamError: Anything else. The text may come from a server.
    """
    return {name: _dimension(name, value) for name, value in sorted(params.from_json(text).items())}


def differences(recorded: Space, asked: Space) -> list[str]:
    """Each difference in words, in order of name; an empty list for equal spaces."""
    changed = params.differences(
        {name: _flat(dimension) for name, dimension in recorded.items()},
        {name: _flat(dimension) for name, dimension in asked.items()},
    )
    return [f"{name}: {_told(recorded, name)} -> {_told(asked, name)}" for name in changed]


def _told(space: Space, name: str) -> str:
    return str(space[name]) if name in space else "not searched"


# -- reading ---------------------------------------------------------------------------------------


def _between_brackets(word: str, name: str, kind: str, text: str) -> list[str]:
    """The parts of `kind(part,part,…)`, split at commas outside brackets and quotes; quotes are kept."""
    parts, depth, quote = [""], 0, ""
    inner = text.partition("(")[2].rstrip()
    for character in inner.removesuffix(")"):
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and not parts[-1].strip():
            quote = character
        elif character == "," and not depth:
            parts.append("")
            continue
        else:
            depth += (character in "([") - (character in ")]")
        parts[-1] += character
    if quote or depth or not inner.endswith(")"):
        missing = f"the quote {quote} is" if quote else "the brackets are"
        raise ParamError(
            f"{word!r} cannot be read: {missing} not closed",
            expected=", ".join(_EXAMPLES.values()),
            try_next=f"{name}={_EXAMPLES[kind]}",
        )
    parts = [part.strip() for part in parts]
    return [] if parts == [""] else parts


def _range(
    word: str, name: str, kind: str, parts: list[str], experiment: Experiment
) -> Uniform | LogUniform | IntRange:
    def refusal(found: str, expected: str, example: str) -> ParamError:
        return ParamError(f"{word!r}: {found}", expected=expected, try_next=f"{name}={example}")

    if len(parts) != 2:
        raise refusal(f"{kind} with {len(parts)} bounds", f"{kind}(low,high)", _EXAMPLES[kind])
    low, high = (_read(word, name, part, experiment) for part in parts)
    if not (_is_number(low) and _is_number(high)):
        raise refusal(f"{name} is no number", "choice(…,…)", str(Choice((low, high))))
    whole = isinstance(low, int) and isinstance(high, int)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise refusal("a bound that is not finite", "two finite numbers", _EXAMPLES[kind])
    if kind == "uniform" and whole:
        raise refusal(f"{name} is an int", "int(low,high), both included", f"int({low},{high})")
    if kind == "int" and not whole:
        raise refusal(f"{name} is a float", "uniform(low,high)", str(Uniform(low, high)))
    if low > high:
        raise refusal(f"{high!r} is below {low!r}", "the lower bound first", f"{kind}({high!r},{low!r})")
    if low == high:
        raise refusal("an empty range", "two bounds that differ, or one fixed value", f"{low!r}")
    if kind == "log" and low <= 0:
        raise refusal(
            f"{low!r} has no logarithm", "bounds above 0", "log(1,100)" if whole else _EXAMPLES["log"]
        )
    if isinstance(low, int) and isinstance(high, int):
        return IntRange(low, high, log=kind == "log")
    return (LogUniform if kind == "log" else Uniform)(float(low), float(high))


def _options(word: str, name: str, kind: str, parts: list[str], experiment: Experiment) -> Choice:
    if not parts or not all(parts):
        raise ParamError(
            f"{word!r}: {'an option is empty' if parts else 'a choice of nothing'}",
            expected='options separated by commas; a text without characters as ""',
            try_next=f"{name}={_EXAMPLES[kind]}",
        )
    options: list[Value] = []
    for part in parts:
        quoted = len(part) > 1 and part[0] in _QUOTES and part[-1] == part[0]
        option = _read(word, name, part[1:-1] if quoted else part, experiment)
        if option in options:  # which takes 1, 1.0 and True for the same, as Optuna does
            rest = ",".join(map(_option_text, options))
            raise ParamError(
                f"{word!r}: {_option_text(option)} stands there twice",
                expected="each option once",
                try_next=f"{name}=choice({rest})",
            )
        options.append(option)
    return Choice(tuple(options))


def _read(word: str, name: str, text: str, experiment: Experiment) -> Value:
    """The value of this param that a text means."""
    try:
        return params.parse(experiment.params_class, [f"{name}={text}"])[name]
    except ParamError as error:
        try_next = error.try_next
        if try_next.startswith(f"{name}=") and error.found.startswith(f"{name}={text}"):
            example = try_next.removeprefix(f"{name}=")
            try_next = f"{name}=choice({f'[{example}]' if ',' in example else example})"
        raise ParamError(f"{word!r}: {error.found}", expected=error.expected, try_next=try_next) from None


def _refuse_misspelt(word: str, name: str, kind: str, experiment: Experiment) -> None:
    """`lr=loguniform(…)` is no float, and was meant as a space; `title=draft(2)` is a text."""
    try:
        params.parse(experiment.params_class, [word])
    except ParamError as error:
        if not error.found.endswith("cannot be read"):
            raise
        meant = next((known for known in _EXAMPLES if known in kind.lower()), "choice")
        raise ParamError(
            f"{word!r}: there is no space {kind!r}",
            expected=", ".join(_EXAMPLES.values()),
            try_next=f"{name}={_EXAMPLES[meant]}",
        ) from None


def _is_number(value: Value) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- writing ---------------------------------------------------------------------------------------


def _value_text(value: Value) -> str:
    if isinstance(value, tuple):
        if value and isinstance(value[0], str | tuple):  # which `params` reads as JSON
            return json.dumps(value)
        return f"[{','.join(map(_value_text, value))}]"
    return value if isinstance(value, str) else repr(value)


def _option_text(option: Value) -> str:
    text = _value_text(option)
    plain = isinstance(option, str) and text == text.strip() and not re.search(r"^$|^[\"']|[,()\[\]]", text)
    if plain or not isinstance(option, str):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'


def _flat(dimension: Dimension) -> Value:
    match dimension:
        case Uniform(low, high):
            return ("uniform", low, high)
        case LogUniform(low, high):
            return ("log", low, high)
        case IntRange(low, high, log):
            return ("int log" if log else "int", low, high)
        case Choice(options):
            return ("choice", *options)


def _dimension(name: str, value: Value) -> Dimension:
    match value:
        case ("uniform", float(low), float(high)) if -math.inf < low < high < math.inf:
            return Uniform(low, high)
        case ("log", float(low), float(high)) if 0 < low < high < math.inf:
            return LogUniform(low, high)
        case ("int" | "int log" as kind, int(low), int(high)) if low < high and (low > 0 or kind == "int"):
            return IntRange(low, high, log=kind == "int log")
        case ("choice", *options) if options:
            return Choice(tuple(options))
    raise ParamError(f"the space of {name} cannot be read", expected="what a sweep recorded of its space")
