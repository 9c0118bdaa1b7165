"""Params: flat values and back, exactly; and what is said about a typing mistake."""

from __future__ import annotations

import enum
import math
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracked import params
from tracked.errors import ParamError


class Norm(enum.Enum):
    BATCH = "batchnorm"
    LAYER = "layernorm"


@dataclass(frozen=True)
class Optimizer:
    name: Literal["sgd", "adamw"] = "adamw"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Params:
    hidden: int = 64
    lr: float = 1e-3
    bias: bool = True
    title: str = "first"
    layers: tuple[int, ...] = (64, 32)
    names: list[str] = field(default_factory=list)
    norm: Norm = Norm.BATCH
    data: Path | None = None
    limit: int | float | None = None
    optimizer: Optimizer = Optimizer(momentum=0.8)
    teacher: Optimizer | None = None


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
optimizers = st.builds(
    Optimizer,
    name=st.sampled_from(["sgd", "adamw"]),
    momentum=st.floats(),
    betas=st.tuples(st.floats(), st.floats()),
)
everything = st.builds(
    Params,
    hidden=st.integers(),
    lr=st.floats(),
    bias=st.booleans(),
    title=st.text(),
    layers=st.lists(st.integers()).map(tuple),
    names=st.lists(st.text()),
    norm=st.sampled_from(Norm),
    data=st.none() | st.text(st.characters(categories=["L", "N"]), min_size=1).map(Path),
    limit=st.none() | st.integers() | st.floats(),
    optimizer=optimizers,
    teacher=st.none() | optimizers,
)


def bits(value: object) -> object:
    """The value in a form whose == is exact: type, NaN and the sign of zero included."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value) if not math.isnan(value) else b"nan"
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}
    if isinstance(value, Params | Optimizer):
        return type(value), bits(vars(value))
    return type(value), value


@given(everything)
def test_any_params_come_back_exactly_from_flat_values_and_json(original: Params) -> None:
    restored = params.build(Params, params.from_json(params.to_json(params.flatten(original))))
    assert bits(restored) == bits(original)


@given(st.dictionaries(st.text(), scalars | st.lists(scalars).map(tuple)))
def test_any_flat_values_come_back_exactly_from_json(flat: dict[str, Any]) -> None:
    assert bits(params.from_json(params.to_json(flat))) == bits(flat)


@given(everything)
def test_replacing_everything_gives_the_other_params(other: Params) -> None:
    assert bits(params.replace(Params(), params.flatten(other))) == bits(other)


def test_nested_dataclasses_get_dotted_names() -> None:
    flat = params.flatten(Params())
    assert flat["optimizer.betas"] == (0.9, 0.999)
    assert flat["norm"] == "BATCH"
    assert flat["teacher"] is None


def test_an_int_in_a_float_field_is_a_float_from_the_start() -> None:
    assert params.as_text(params.flatten(Params(lr=1)))["lr"] == "1.0"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lr=1e-3", 1e-3),
        ("lr=inf", math.inf),
        ("hidden=-3", -3),
        ("bias=no", False),
        ("bias=1", True),
        ("bias=True", True),
        ("title=a=b", "a=b"),
        ("title=", ""),
        ("layers=1,2,3", (1, 2, 3)),
        ("layers=7", (7,)),
        ("layers=(7,)", (7,)),
        ("layers=[]", ()),
        ("layers=", ()),
        ("names=a, b", ("a", "b")),
        ("norm=LAYER", "LAYER"),
        ("norm=layernorm", "LAYER"),
        ("data=None", None),
        ("data=x/y", "x/y"),
        ("limit=2", 2),
        ("limit=2.5", 2.5),
        ("optimizer.name=sgd", "sgd"),
        ("optimizer.betas=0.5,1", (0.5, 1.0)),
        ("teacher=None", None),
        ("teacher.momentum=0", 0.0),
    ],
)
def test_a_word_is_read_as_its_annotation_says(word: str, expected: object) -> None:
    (value,) = params.parse(Params, [word]).values()
    assert bits(value) == bits(expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr=fast"], ["lr=fast", "float", "lr=1e-3"]),
        (["hidden=1.5"], ["int"]),
        (["hidden="], ["int"]),
        (["bias=maybe"], ["true or false"]),
        (["optimizer.name=adam"], ["sgd, adamw"]),
        (["norm=group"], ["BATCH, LAYER"]),
        (["layers=1,x"], ["separated by commas"]),
        (["optimizer.betas=1"], ["2 values"]),
        (["hiden=3"], ["hiden", "try: hidden=…"]),
        (["momentum=3"], ["optimizer.momentum"]),
        (["optimizer=sgd"], ["group", "optimizer.name, optimizer.momentum"]),
        (["teacher=sgd"], ["None"]),
        (["lr"], ["name=value", "try: lr="]),
        (["=3"], ["name=value"]),
        (["lr=1", "lr=2"], ["twice"]),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(words: list[str], said: list[str]) -> None:
    with pytest.raises(ParamError) as error:
        params.parse(Params, words)
    assert all(text in str(error.value) for text in said)


@dataclass(frozen=True)
class RequiredOptimizer:
    width: int
    optimizer: Optimizer


def test_a_field_without_default_has_to_be_given() -> None:
    with pytest.raises(ParamError, match="width of RequiredOptimizer"):
        params.build(RequiredOptimizer, {})
    assert params.build(RequiredOptimizer, {"width": 3}) == RequiredOptimizer(3, Optimizer())


def test_a_nested_default_keeps_its_own_values_beside_an_override() -> None:
    built = params.build(Params, {"optimizer.name": "sgd"})
    assert built.optimizer == Optimizer("sgd", momentum=0.8)


def test_none_and_parts_of_the_same_group_contradict() -> None:
    with pytest.raises(ParamError, match="both as None and by its parts"):
        params.build(Params, {"teacher": None, "teacher.momentum": 0.1})


def test_build_names_an_unknown_param_and_its_neighbour() -> None:
    with pytest.raises(ParamError, match=r"optimizer\.momentum"):
        params.build(Params, {"optimizer.momentun": 0.1})


@pytest.mark.parametrize(
    "flat", [{"hidden": True}, {"hidden": "64"}, {"bias": 1}, {"title": 3}, {"lr": None}]
)
def test_build_takes_no_value_of_another_type(flat: dict[str, object]) -> None:
    with pytest.raises(ParamError, match="expected"):
        params.build(Params, flat)


@dataclass
class Thawed:
    lr: float = 1.0


@dataclass(frozen=True)
class HoldsThawed:
    inner: Thawed


@dataclass(frozen=True)
class HoldsDict:
    table: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ambiguous:
    data: str | Path = ""


@dataclass(frozen=True)
class Misspelt:
    lr: flaot = 1.0  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Thawed, "frozen=True"),
        (HoldsThawed, "Thawed"),
        (int, "no dataclass"),
        ({"a": {1, 2}}, "a is"),
        (HoldsDict, "dict"),
        (Ambiguous, "look the same"),
        (Misspelt, "flaot"),
    ],
)
def test_a_class_that_cannot_be_restored_is_refused(cls: object, said: str) -> None:
    with pytest.raises(ParamError, match=said):
        params.check(cls)


@dataclass(frozen=True)
class Positive:
    lr: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr has to be positive")


def test_the_users_own_check_is_told_as_a_param_error() -> None:
    with pytest.raises(ParamError, match="lr has to be positive"):
        params.replace(Positive(), {"lr": -1.0})


def test_a_mapping_gives_the_types_of_its_current_values() -> None:
    given = {"lr": 0.1, "opt": {"name": "sgd", "norm": Norm.BATCH}, "sizes": [1, 2], "seed": np.int64(3)}
    overrides = params.parse(given, ["lr=1", "opt.norm=LAYER", "sizes=5"])
    changed = params.replace(given, overrides)
    assert changed == {**given, "lr": 1.0, "opt": {"name": "sgd", "norm": Norm.LAYER}, "sizes": [5]}
    assert type(changed["lr"]) is float
    assert params.flatten(given)["seed"] == 3
    with pytest.raises(ParamError, match=r"opt\.name"):
        params.parse(given, ["opt.nam=x"])


def test_a_mapping_that_spells_a_name_in_two_ways_is_refused() -> None:
    with pytest.raises(ParamError, match="twice"):
        params.flatten({"a.b": 1, "a": {"b": 2}})


def test_yaml_takes_nested_and_dotted_keys_and_numbers_that_yaml_calls_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "lr: 1e-3\noptimizer.name: sgd\noptimizer:\n  betas: [1e-1, 1]\nlayers: [3]\nnorm: layernorm\n"
    )
    assert params.read_yaml(Params, file) == {
        "lr": 1e-3,
        "optimizer.name": "sgd",
        "optimizer.betas": (0.1, 1.0),
        "layers": (3,),
        "norm": "LAYER",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hidden: 1.5", "hidden is 1.5"),
        ("hidden: '64'", "hidden is '64'"),
        ("title: no", "title is False"),
        ("hiden: 3", "try: hidden=…"),
        ("optimizer: {name: sgd}\noptimizer.name: sgd", "twice"),
        ("- 1", "name: value"),
        ("a: [", "no YAML"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
        ("title: 2020-01-01", "date"),
    ],
)
def test_a_yaml_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ParamError) as error:
        params.read_yaml(Params, file)
    assert said in str(error.value)


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match=r"gone\.yaml"):
        params.read_yaml(Params, tmp_path / "gone.yaml")


def test_differences_hold_nan_equal_to_nan_and_true_different_from_one() -> None:
    nan = math.nan
    a: dict[str, params.Value] = {"a": nan, "b": (nan, 1), "c": True, "d": 1, "e": None, "f": 2.0}
    b: dict[str, params.Value] = {"a": nan, "b": (nan, 1.0), "c": 1, "d": 1.0, "f": nan}
    assert list(params.differences(a, b)) == ["c", "f"]


def test_text_for_mlflow_is_what_one_would_type_and_is_cut() -> None:
    text = params.as_text({"a": 1e-3, "b": None, "c": True, "d": (1, 2), "e": "x" * 7000, "f": ()})
    assert [text[name] for name in "abcdf"] == ["0.001", "None", "True", "1,2", "[]"]
    assert len(text["e"]) == 6000
    assert text["e"].endswith("x…")


@pytest.mark.parametrize("name", ["x" * 251, "", "a\nb", "a/../b", "/a", "a//b", "ä;"])
def test_a_name_that_mlflow_refuses_is_refused_here(name: str) -> None:
    with pytest.raises(ParamError, match="MLflow param"):
        params.as_text({name: 1})


@pytest.mark.parametrize("text", ["", "[]", '{"a": {}}', "{", "[" * 100_000, '{"a": [{}]}'])
def test_json_from_a_server_that_is_no_flat_object_is_refused(text: str) -> None:
    with pytest.raises(ParamError, match="flat JSON"):
        params.from_json(text)


@pytest.mark.parametrize("module", ["params", "provenance", "experiment"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "mlflow", "optuna", "click", "yaml"}
    code = f"import sys, tracked.{module}; print(*{heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_quoted_texts_in_a_list_are_texts_without_quotes() -> None:
    @dataclass(frozen=True)
    class Named:
        names: list[str]

    assert params.parse(Named, ['names=["a", "b,c"]']) == {"names": ("a", "b,c")}
    assert params.parse(Named, ["names=a,b"]) == {"names": ("a", "b")}
