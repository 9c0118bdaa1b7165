"""A frozen dataclass of hyperparameters ↔ typed flat values, and `name=value` overrides of them.

Flat values are a dict from dotted names to `Value`. Sequences in it are always tuples, an Enum member stands
there by its name and a Path by its text; the annotations of the dataclass turn them back. So a flat dict goes
through JSON unchanged, and two of them compare without knowing the class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias, TypeVar

from tracked.errors import ParamError

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | None"
P = TypeVar("P")

LONGEST_TEXT = 6000  # characters; MLflow cuts a param's value there
LONGEST_NAME = 250  # characters; MLflow refuses a longer key

_NONE_WORDS = ("None", "none", "null")
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NAME_CHARACTERS = re.compile(r"[/\w.\- :]+")


class _Misfit(ValueError):
    """A value that does not fit its annotation; the caller, who knows the name, makes it a ParamError."""


def check(cls: object) -> None:
    """Refuses a class that `build` could not restore exactly.

    Raises:
        ParamError: No frozen dataclass, an annotation that cannot be resolved, or one that cannot be stored.
    """
    for _ in _leaves(cls):
        pass


def flatten(params: object) -> dict[str, Value]:
    """The typed flat values of a frozen dataclass instance, or of a mapping (both may be nested).

    A value is brought to its annotation first, so that `lr: float = 1` is 1.0 here and after every resume.

    Raises:
        ParamError: A value that does not fit its annotation, or is no number, text, bool, None or sequence.
    """
    if isinstance(params, Mapping):
        return {name: _named(name, _plain, value) for name, value in _walk(params)}
    flat: dict[str, Value] = {}
    for name, hint, value in _leaf_values(params, ""):
        flat[name] = _plain(_fitted(name, hint, value))
    return flat


def build(cls: type[P], flat: Mapping[str, object]) -> P:
    """An instance of `cls` with these values, of the annotated types; missing names take the defaults.

    Raises:
        ParamError: An unknown name, a value of another type, a field without default that is not given, or
            values that the class's own `__post_init__` refuses.
    """
    _known(_leaves(cls), flat)
    return typing.cast(P, _assemble(cls, flat, "", None))


def replace(params: P, overrides: Mapping[str, object]) -> P:
    """A copy of `params` (dataclass instance or mapping) with some dotted names changed.

    Raises:
        ParamError: As `build`.
    """
    _known(_leaves(params), overrides)
    if isinstance(params, Mapping):
        return typing.cast(P, _replaced(params, overrides, ""))
    return typing.cast(P, _assemble(type(params), overrides, "", params))


def parse(of: object, words: Iterable[str]) -> dict[str, Value]:
    """Reads `name=value` words as typed on a command line.

    Args:
        of: The Params class, an instance of it, or a mapping, whose current values then give the types.
        words: For example `["lr=1e-3", "optimizer.momentum=0.9", "hidden=64,32"]`.

    Raises:
        ParamError: No `=`, an unknown name, a name given twice, or a value that cannot be read.
    """
    leaves = _leaves(of)
    flat: dict[str, Value] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip()
        if not equals or not name:
            example = name or next(iter(leaves), "lr")
            raise ParamError(f"{word!r} is no override", expected="name=value", try_next=f"{example}=…")
        _known(leaves, [name])
        if name in flat:
            raise ParamError(
                f"{name} is given twice", expected="each name once", try_next=f"leave out {word!r}"
            )
        try:
            flat[name] = _plain(_read(leaves[name], text))
        except _Misfit:
            raise _unreadable(name, text, leaves[name]) from None
    return flat


def read_yaml(of: object, path: str | Path) -> dict[str, Value]:
    """Flat values from a YAML file of nested or dotted keys, types checked against the annotations.

    YAML 1.1 reads `1e-3` (no dot) as text; where a float is expected it becomes the number that was meant.

    Raises:
        ParamError: No readable file, no mapping, an unknown or repeated name, a value of another type.
    """
    import yaml  # here, because the import costs more than this whole module

    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise ParamError(f"cannot read {str(path)!r}: {error.strerror}", expected="a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamError(f"{str(path)!r} is no YAML: {error}", expected="name: value, one a line") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ParamError(f"{str(path)!r} holds {_shown(content)}", expected="name: value, one a line")
    given = dict(_walk(content))
    leaves = _leaves(of)
    _known(leaves, given)
    return {name: _plain(_fitted(name, leaves[name], value, yaml=True)) for name, value in given.items()}


def differences(a: Mapping[str, Value], b: Mapping[str, Value]) -> dict[str, tuple[Value, Value]]:
    """Names whose values differ, in order of name. NaN equals NaN, 1 equals 1.0, and absent equals None."""
    return {
        name: (a.get(name), b.get(name)) for name in sorted({*a, *b}) if not _same(a.get(name), b.get(name))
    }


def as_text(flat: Mapping[str, Value]) -> dict[str, str]:
    """What MLflow's param table shows: floats by `repr`, sequences as typed on the command line (`64,32`).

    Values are cut at 6000 characters with an ellipsis.

    Raises:
        ParamError: A name that MLflow refuses: over 250 characters, odd characters, or no clean path.
    """
    shown = {}
    for name, value in flat.items():
        # "//" and "." components: MLflow refuses names that would mean another file
        unclean = any(part in ("", ".", "..") for part in name.split("/"))
        if len(name) > LONGEST_NAME or not _NAME_CHARACTERS.fullmatch(name) or unclean:
            raise ParamError(
                f"{name[:80]!r} ({len(name)} characters) cannot be the name of an MLflow param",
                expected=f"at most {LONGEST_NAME} letters, digits, and _ - . : / or space",
            )
        text = _text(value)
        shown[name] = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    return shown


def to_json(flat: Mapping[str, Value]) -> str:
    """JSON that `from_json` reads back exactly; NaN and infinities stand as Python's `NaN`, `Infinity`."""
    return json.dumps(dict(flat))


def from_json(text: str) -> dict[str, Value]:
    """The flat values that `to_json` wrote.

    Raises:
        ParamError: Anything else. The text may come from a server.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise _Misfit(f"the top is {_shown(content)}")
        return {name: _plain(value) for name, value in content.items()}
    except (ValueError, RecursionError) as error:
        raise ParamError(f"params cannot be read: {error}", expected="one flat JSON object") from error


# -- names -----------------------------------------------------------------------------------------


_hints = functools.lru_cache(64)(
    typing.get_type_hints
)  # compiles every annotation anew, and a sweep asks often


def _fields(cls: object) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a frozen dataclass that its constructor takes, each with its resolved annotation."""
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ParamError(
            f"{_class_name(cls)} is no dataclass",
            expected="a frozen dataclass",
            try_next="write @dataclass(frozen=True) above the class",
        )
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ParamError(
            f"{_class_name(cls)} is a dataclass that can be changed",
            expected="a frozen one, because its values are recorded once",
            try_next="write @dataclass(frozen=True) above the class",
        )
    try:
        hints = _hints(cls)
    except (NameError, TypeError, SyntaxError) as error:
        raise ParamError(
            f"the annotations of {_class_name(cls)} cannot be read: {error}",
            expected="types that the file imports at run time, at its top level",
        ) from error
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def _class_name(cls: object) -> str:
    if not isinstance(cls, type):
        return f"Params, which is {_shown(cls)},"
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return f"{cls.__qualname__} in {Path(file).name}" if file else cls.__qualname__


def _leaves(of: object, prefix: str = "") -> dict[str, Any]:
    """Every dotted name and its annotation; for a mapping, the annotation that its current value suggests."""
    if isinstance(of, Mapping):
        return {name: _named(name, _hint_of, value) for name, value in _walk(of)}
    leaves: dict[str, Any] = {}
    for field, hint in _fields(of if isinstance(of, type) or not dataclasses.is_dataclass(of) else type(of)):
        name = prefix + field.name
        nested, optional = _nested(hint)
        if nested is None:
            _check_hint(name, hint)
            leaves[name] = hint
            continue
        if optional:
            leaves[name] = types.NoneType
        leaves.update(_leaves(nested, name + "."))
    return leaves


def _leaf_values(params: object, prefix: str) -> Iterator[tuple[str, Any, object]]:
    """(dotted name, annotation, value) of a dataclass instance."""
    for field, hint in _fields(type(params)):
        name, value = prefix + field.name, getattr(params, field.name)
        nested, optional = _nested(hint)
        if nested is None:
            _check_hint(name, hint)
            yield name, hint, value
        elif value is None and optional:
            yield name, types.NoneType, None
        elif type(value) is nested:
            yield from _leaf_values(value, name + ".")
        else:
            raise ParamError(
                f"{name} is {_shown(value)}", expected=f"a {nested.__qualname__}, no subclass of it"
            )


def _walk(mapping: Mapping[Any, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of a nested mapping; refuses a name that is spelled in two ways."""
    seen = set()
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            raise ParamError(f"{prefix}{key!r} is {_shown(key)}", expected="a text as the name of a param")
        inner = _walk(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
        for name, leaf in inner:
            if name in seen:
                raise ParamError(f"{name} is given twice", expected="each name once, nested or dotted")
            seen.add(name)
            yield name, leaf


def _known(leaves: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name in leaves:
            continue
        group = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
        if group:
            raise ParamError(f"{name} is a group of params", expected=f"one of {', '.join(group)}")
        import difflib  # here, because only an error needs it

        tail = name.rpartition(".")[2]
        near = [leaf for leaf in leaves if leaf.rpartition(".")[2] == tail]
        alike = difflib.get_close_matches(name, leaves, n=3, cutoff=0.5)
        near += [leaf for leaf in alike if leaf not in near]
        raise ParamError(
            f"there is no param {name!r}",
            expected=f"one of {', '.join(leaves)}" if leaves else "none: this experiment has no params",
            try_next=" or ".join(f"{leaf}=…" for leaf in near),
        )


# -- dataclass from flat values --------------------------------------------------------------------


def _assemble(cls: Any, flat: Mapping[str, object], prefix: str, base: object) -> object:
    """An instance of `cls`; what `flat` leaves out comes from `base`, else from the fields' defaults."""
    values: dict[str, object] = {}
    missing: list[str] = []
    for field, hint in _fields(cls):
        name = prefix + field.name
        nested, _ = _nested(hint)
        below = nested is not None and any(given.startswith(f"{name}.") for given in flat)
        if name in flat and below:
            raise ParamError(f"{name} is given both as None and by its parts", expected="one of the two")
        if name in flat:
            values[field.name] = _fitted(name, types.NoneType if nested else hint, flat[name])
            continue
        if base is not None:
            fallback = getattr(base, field.name)
        elif field.default is not dataclasses.MISSING:
            fallback = field.default
        elif field.default_factory is not dataclasses.MISSING:
            fallback = field.default_factory()
        else:
            fallback = dataclasses.MISSING
        if nested is not None and (below or fallback is dataclasses.MISSING):
            values[field.name] = _assemble(
                nested, flat, f"{name}.", fallback if isinstance(fallback, nested) else None
            )
        elif fallback is dataclasses.MISSING:
            missing.append(name)
        else:
            values[field.name] = fallback
    if missing:
        raise ParamError(
            f"{', '.join(missing)} of {_class_name(cls)} {'has' if len(missing) == 1 else 'have'} no default",
            expected="a value for each",
            try_next=" ".join(f"{name}=…" for name in missing),
        )
    try:
        return cls(**values)
    except (ValueError, AssertionError) as error:  # the user's own check in __post_init__
        raise ParamError(f"{_class_name(cls)} refuses its values: {error}") from error


def _replaced(
    mapping: Mapping[str, object], overrides: Mapping[str, object], prefix: str
) -> dict[str, object]:
    changed: dict[str, object] = {}
    for key, value in mapping.items():
        name = prefix + key
        if isinstance(value, Mapping):
            changed[key] = _replaced(value, overrides, f"{name}.")
        else:
            changed[key] = _fitted(name, _hint_of(value), overrides[name]) if name in overrides else value
    return changed


# -- values and annotations ------------------------------------------------------------------------


def _bare(hint: Any) -> Any:
    """Sees through NewType and `type X = …`."""
    while True:
        if hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":
            hint = hint.__value__
        else:
            return hint


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    hint = _bare(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(leaf for member in typing.get_args(hint) for leaf in _members(member))
    return (hint,)


def _nested(hint: Any) -> tuple[Any, bool]:
    """(the dataclass that this annotation names or None, whether None may stand instead)."""
    members = _members(hint)
    optional = types.NoneType in members
    rest = [member for member in members if member is not types.NoneType]
    if len(rest) == 1 and isinstance(rest[0], type) and dataclasses.is_dataclass(rest[0]):
        return rest[0], optional
    return None, False


def _is_class(hint: Any, base: type) -> bool:
    return isinstance(hint, type) and typing.get_origin(hint) is None and issubclass(hint, base)


def _sequence(hint: Any) -> type | None:
    """`list` or `tuple`, whichever a value of this annotation has to be; None for no sequence."""
    origin = typing.get_origin(hint) or hint
    if origin is list:
        return list
    return tuple if origin in (tuple, Sequence) else None


def _item_hints(hint: Any, count: int) -> list[Any]:
    """The annotation of each of `count` items of a sequence."""
    items = typing.get_args(hint)
    if not items:
        # `tuple[()]` has no arguments either, but an origin
        if _sequence(hint) is tuple and typing.get_origin(hint) is tuple and count:
            raise _Misfit(f"{count} items")
        return [Any] * count
    if _sequence(hint) is tuple and typing.get_origin(hint) is tuple and items[-1] is not Ellipsis:
        if len(items) != count:
            raise _Misfit(f"{count} items")
        return list(items)
    return [items[0]] * count


def _check_hint(name: str, hint: Any) -> None:
    """Refuses an annotation that a flat value cannot carry, or that leaves open what to restore from it."""
    texts, sequences = set(), 0
    for member in _members(hint):
        if _sequence(member):
            sequences += 1
            for item in typing.get_args(member):
                if item is not Ellipsis and item != ():
                    _check_hint(name, item)
        elif _is_class(member, enum.Enum) or _is_class(member, PurePath):
            texts.add(member)
        elif member is str or typing.get_origin(member) is Literal:
            texts.add(str)
        elif member not in (Any, object, bool, int, float, types.NoneType):
            raise ParamError(
                f"{name} is annotated with {_hint_text(member)}",
                expected="bool, int, float, str, Path, an Enum, Literal, a tuple or list of these, "
                "a frozen dataclass, or one of them | None",
            )
    if len(texts) > 1 or sequences > 1:
        raise ParamError(
            f"{name} is annotated with {_hint_text(hint)}; once stored, its alternatives look the same",
            expected="one of them",
        )


def _hint_of(value: object) -> Any:
    """The annotation that a mapping's current value suggests."""
    if isinstance(value, enum.Enum | PurePath):
        return type(value)
    if isinstance(value, list | tuple):
        hints = [_hint_of(item) for item in value]
        item = hints[0] if hints and all(hint == hints[0] for hint in hints) else Any
        return (
            types.GenericAlias(list, (item,))
            if isinstance(value, list)
            else types.GenericAlias(tuple, (item, Ellipsis))
        )
    plain = _plain(value)
    return Any if plain is None else type(plain)


def _plain(value: object) -> Value:
    """The flat form of one value; a NumPy or torch scalar becomes the number it holds."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item())
    raise _Misfit(_shown(value))


def _fit(hint: Any, value: Value, yaml: bool) -> object:
    """The value that a field of this annotation holds, from its flat form."""
    members = _members(hint)
    if len(members) > 1:
        # an exact type first, so that 1 stays an int where `float | int` is allowed
        for member in sorted(members, key=lambda member: member is not type(value)):
            try:
                return _fit(member, value, yaml)
            except _Misfit:
                continue
        raise _Misfit(_shown(value))
    (hint,) = members
    if hint in (Any, object):
        return value
    if hint is types.NoneType and value is None:
        return None
    if typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            plain = _plain(choice)
            if type(plain) is type(value) and plain == value:
                return choice
    elif _sequence(hint) and isinstance(value, tuple):
        as_sequence = typing.cast("type[list[Any]]", _sequence(hint))
        items = zip(_item_hints(hint, len(value)), value, strict=True)
        return as_sequence(_fit(item, part, yaml) for item, part in items)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    elif hint is float and type(value) in (int, float):
        return _read(float, repr(value))
    elif hint is float and yaml and isinstance(value, str):
        return _read(float, value)
    elif _is_class(hint, PurePath) and isinstance(value, str):
        return hint(value)
    elif _is_class(hint, enum.Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
        if yaml:  # a file is typed by hand, and may name a member by its value
            return _read(hint, _text(value))
    raise _Misfit(_shown(value))


def _rank(hint: Any) -> int:
    """The order in which the alternatives of a union are tried on a text: the pickiest first."""
    if typing.get_origin(hint) is Literal:
        return 0
    if hint in (types.NoneType, int, float, bool):
        return 1 + (types.NoneType, int, float, bool).index(hint)
    return 7 if hint is str else 6 if _sequence(hint) else 5


def _read(hint: Any, text: str) -> object:
    """The value of this annotation that a text on the command line means."""
    for member in sorted(_members(hint), key=_rank):
        try:
            return _read_one(member, text)
        except (ValueError, OverflowError):
            continue
    raise _Misfit(repr(text))


def _read_one(hint: Any, text: str) -> object:
    if hint is str:
        return text
    word = text.strip()
    if hint in (Any, object):
        guess: Any = types.NoneType | int | float | str
        lowered = word.lower()
        return lowered == "true" if lowered in ("true", "false") else _read(guess, text)
    if hint is types.NoneType and word in _NONE_WORDS:
        return None
    if hint is bool and word.lower() in _BOOLS:
        return _BOOLS[word.lower()]
    if hint is int:
        return int(word)
    if hint is float:
        return float(word)
    if typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            if text in (str(choice), _text(_plain(choice))):
                return choice
    elif _is_class(hint, enum.Enum):
        for member in hint:
            if word in (member.name, str(member.value)):
                return member
    elif _is_class(hint, PurePath) and text:
        return hint(text)
    elif as_sequence := typing.cast("type[list[Any]] | None", _sequence(hint)):
        if word.startswith(("[[", '["')):  # sequences of sequences, or of quoted texts, as JSON
            return _fit(hint, _plain(json.loads(word)), yaml=False)
        if word[:1] + word[-1:] in ("()", "[]"):
            word = word[1:-1]
        parts = [part.strip() for part in word.removesuffix(",").split(",")] if word.strip() else []
        items = zip(_item_hints(hint, len(parts)), parts, strict=True)
        return as_sequence(_read(item, part) for item, part in items)
    raise _Misfit(repr(text))


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


# -- what people read ------------------------------------------------------------------------------


def _text(value: Value) -> str:
    if isinstance(value, list | tuple):
        inner = ",".join(_text(item) for item in value)
        nested = any(isinstance(item, list | tuple) for item in value)
        return f"[{inner}]" if nested or not value else inner
    return value if isinstance(value, str) else repr(value)


def _named(name: str, convert: Any, value: object) -> Any:
    try:
        return convert(value)
    except _Misfit as misfit:
        raise ParamError(
            f"{name} is {misfit}",
            expected="a number, text, bool, None, or a sequence of these",
            try_next=f"pass str({name}), or leave it out of the params",
        ) from None


def _fitted(name: str, hint: Any, value: object, yaml: bool = False) -> Any:
    try:
        fitted = _fit(hint, _plain(value), yaml)
        # a Path in a field for text would silently come back as text
        if isinstance(value, enum.Enum | PurePath) and type(fitted) is not type(value):
            raise _Misfit(_shown(value))
    except _Misfit as misfit:
        expected, example = _expectation(hint)
        raise ParamError(f"{name} is {misfit}", expected=expected, try_next=f"{name}={example}") from None
    return fitted


def _unreadable(name: str, text: str, hint: Any) -> ParamError:
    expected, example = _expectation(hint)
    return ParamError(f"{name}={text} cannot be read", expected=expected, try_next=f"{name}={example}")


def _expectation(hint: Any) -> tuple[str, str]:
    """(what is expected, an example of it as typed)."""
    members = _members(hint)
    if len(members) > 1:
        parts = [_expectation(member) for member in members]
        return " or ".join(part[0] for part in parts), parts[0][1]
    (hint,) = members
    if typing.get_origin(hint) is Literal:
        choices = [_text(_plain(choice)) for choice in typing.get_args(hint)]
        return f"one of {', '.join(choices)}", choices[0]
    if _is_class(hint, enum.Enum):
        return f"one of {', '.join(hint.__members__)}", next(iter(hint.__members__))
    if _sequence(hint):
        kinds = [item for item in typing.get_args(hint) if item is not Ellipsis]
        if not kinds:
            return "values separated by commas", "1,2,3"
        fixed = len(kinds) > 1 or (typing.get_origin(hint) is tuple and Ellipsis not in typing.get_args(hint))
        examples = [_expectation(kind)[1] for kind in kinds]
        if fixed:
            shape = ", ".join(_expectation(kind)[0] for kind in kinds)
            return f"{len(kinds)} values separated by commas: {shape}", ",".join(examples)
        return f"values separated by commas, each {_expectation(kinds[0])[0]}", ",".join(examples * 2)
    known = {
        bool: ("bool: true or false", "true"),
        int: ("int: a whole number", "64"),
        float: ("float: a number", "1e-3"),
        str: ("str: text", "text"),
        types.NoneType: ("None", "None"),
    }
    if hint in known:
        return known[hint]
    return ("a path", "data/file") if _is_class(hint, PurePath) else ("a value", "1")


def _hint_text(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _shown(value: object) -> str:
    """A value for an error's text: short, and with its type."""
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:79] + '…'} ({type(value).__name__})"
