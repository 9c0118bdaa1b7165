"""Search spaces: what is typed is what is searched, and a slip is told before anything trains."""

from __future__ import annotations

import enum
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracked import params, space
from tracked.errors import ParamError
from tracked.experiment import Experiment
from tracked.space import Choice, IntRange, LogUniform, Uniform


class Norm(enum.Enum):
    BATCH = "batchnorm"
    LAYER = "layernorm"


@dataclass(frozen=True)
class Optimizer:
    name: Literal["sgd", "adamw"] = "adamw"
    momentum: float = 0.9


@dataclass(frozen=True)
class Params:
    lr: float = 1e-3
    hidden: int = 64
    bias: bool = True
    title: str = "first"
    layers: tuple[int, ...] = (64, 32)
    names: tuple[str, ...] = ()
    norm: Norm = Norm.BATCH
    limit: int | float | None = None
    optimizer: Optimizer = Optimizer()


EXPERIMENT = Experiment(Path("digits.py"), b"", "", Params)


def parse(*words: str) -> space.Space:
    parsed, fixed = space.parse(words, EXPERIMENT)
    assert fixed == []
    return parsed


@pytest.mark.parametrize(
    ("word", "dimension"),
    [
        ("lr=log(1e-4,1e-1)", LogUniform(1e-4, 1e-1)),
        ("lr = log( 1e-4 , 1 ) ", LogUniform(1e-4, 1.0)),
        ("lr=uniform(-1,1)", Uniform(-1.0, 1.0)),
        ("lr=choice(1,1e-3)", Choice((1.0, 1e-3))),
        ("hidden=int(-2,4)", IntRange(-2, 4)),
        ("hidden=log(1,1000)", IntRange(1, 1000, log=True)),
        ("hidden=choice(16,32,64)", Choice((16, 32, 64))),
        ("hidden=choice(16)", Choice((16,))),
        ("bias=choice(true,no)", Choice((True, False))),
        ("norm=choice(layernorm,BATCH)", Choice(("LAYER", "BATCH"))),
        ("layers=choice([64,32],[128],(8,8),[])", Choice(((64, 32), (128,), (8, 8), ()))),
        ("layers=choice(64,32)", Choice(((64,), (32,)))),
        ('names=choice(["a,b","c"],[])', Choice((("a,b", "c"), ()))),
        ("limit=choice(None,3,0.5)", Choice((None, 3, 0.5))),
        ("limit=int(1,3)", IntRange(1, 3)),
        ("limit=uniform(1,3.5)", Uniform(1.0, 3.5)),
        ("optimizer.name=choice(sgd,adamw)", Choice(("sgd", "adamw"))),
        ("optimizer.momentum=uniform(0,1)", Uniform(0.0, 1.0)),
        ('title=choice(a b,"c, d",\'e"f\',it\'s,"")', Choice(("a b", "c, d", 'e"f', "it's", ""))),
        ("title=choice(draft(1,2),k=v)", Choice(("draft(1,2)", "k=v"))),
    ],
)
def test_a_dimension_is_read_as_its_param_is_annotated(word: str, dimension: space.Dimension) -> None:
    (read,) = parse(word).values()

    assert read == dimension
    assert repr(read) == repr(dimension)  # 1 is not 1.0 here


def test_what_is_no_space_is_a_fixed_value_and_stays_as_typed() -> None:
    words = ["hidden=32", "lr=log(1e-4,1e-1)", "layers=(8,4)", "title=draft(2)", "nonsense"]

    parsed, fixed = space.parse(words, EXPERIMENT)

    assert list(parsed) == ["lr"]
    assert fixed == ["hidden=32", "layers=(8,4)", "title=draft(2)", "nonsense"]


def test_the_order_of_the_words_does_not_matter() -> None:
    words = ["lr=log(1e-4,1e-1)", "hidden=int(1,4)", "bias=choice(true,false)"]

    assert list(parse(*words)) == list(parse(*words[::-1])) == ["bias", "hidden", "lr"]
    assert space.as_json(parse(*words)) == space.as_json(parse(*words[::-1]))


@pytest.mark.parametrize(
    ("words", "found", "try_next"),
    [
        ("rl=log(1e-4,1)", "no param 'rl'", "lr=…"),
        ("momentum=uniform(0,1)", "no param 'momentum'", "optimizer.momentum=…"),
        ("optimizer=choice(sgd,adamw)", "a group of params", ""),
        ("lr=log(1e-1,1e-4)", "below", "lr=log(0.0001,0.1)"),
        ("hidden=int(8,1)", "below", "hidden=int(1,8)"),
        ("hidden=int(3,3)", "empty range", "hidden=3"),
        ("lr=uniform(0.5,0.5)", "empty range", "lr=0.5"),
        ("lr=log(0,1)", "no logarithm", "lr=log(1e-4,1e-1)"),
        ("hidden=log(-4,8)", "no logarithm", "hidden=log(1,100)"),
        ("lr=uniform(0,inf)", "not finite", "lr=uniform(0.0,1.0)"),
        ("lr=uniform(nan,1)", "not finite", "lr=uniform(0.0,1.0)"),
        ("lr=log(1e-4)", "1 bounds", "lr=log(1e-4,1e-1)"),
        ("lr=uniform()", "0 bounds", "lr=uniform(0.0,1.0)"),
        ("hidden=uniform(1,8)", "hidden is an int", "hidden=int(1,8)"),
        ("hidden=uniform(1,8.5)", "hidden=8.5 cannot be read", "hidden=choice(64)"),
        ("lr=int(1,8)", "lr is a float", "lr=uniform(1.0,8.0)"),
        ("bias=int(0,1)", "bias is no number", "bias=choice(False,True)"),
        ("title=uniform(0,1)", "title is no number", "title=choice(0,1)"),
        ("hidden=choice()", "a choice of nothing", "hidden=choice(…,…)"),
        ("hidden=choice( )", "a choice of nothing", "hidden=choice(…,…)"),
        ("title=choice(a,)", "an option is empty", "title=choice(…,…)"),
        ("hidden=choice(16,32,16)", "16 stands there twice", "hidden=choice(16,32)"),
        ("lr=choice(1,1.0)", "1.0 stands there twice", "lr=choice(1.0)"),
        ("hidden=choice(16,wide)", "hidden=wide cannot be read", "hidden=choice(64)"),
        ("layers=choice([64,x])", "cannot be read", "layers=choice([64,64])"),
        ("norm=choice(BATCH,GROUP)", "norm=GROUP cannot be read", "norm=choice(BATCH)"),
        ("lr=log(1e-4,1e-1", "not closed", "lr=log(1e-4,1e-1)"),
        ("lr=log(1e-4,1e-1) # wide", "not closed", "lr=log(1e-4,1e-1)"),
        ("title=choice('a,b)", "the quote ' is not closed", "title=choice(…,…)"),
        ("layers=choice([64,32)", "the brackets are not closed", "layers=choice(…,…)"),
        ("lr=loguniform(1e-4,1)", "no space 'loguniform'", "lr=log(1e-4,1e-1)"),
        ("norm=categorical(BATCH)", "no space 'categorical'", "norm=choice(…,…)"),
        ("hidden=Int(1,4)", "no space 'Int'", "hidden=int(1,8)"),
        ("rl=loguniform(1e-4,1)", "no param 'rl'", "lr=…"),
        ("lr=log(1e-4,1) lr=0.1", "lr is given twice", "leave out 'lr=0.1'"),
        ("hidden=4 hidden=int(1,4)", "hidden is given twice", "leave out 'hidden=int(1,4)'"),
    ],
)
def test_a_slip_is_told_with_a_line_to_type(words: str, found: str, try_next: str) -> None:
    with pytest.raises(ParamError) as error:
        space.parse(words.split(" ") if " lr" in words or " hid" in words else [words], EXPERIMENT)

    assert found in error.value.found
    assert error.value.expected
    assert error.value.try_next == try_next


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
dimensions = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.tuples(*[st.floats(1e-9, 1e9)] * 2)
        .filter(lambda bounds: bounds[0] < bounds[1])
        .flatmap(lambda bounds: st.sampled_from([Uniform(*bounds), LogUniform(*bounds)])),
        "hidden": st.tuples(*[st.integers(1, 10**6)] * 2, st.booleans())
        .filter(lambda bounds: bounds[0] < bounds[1])
        .map(lambda bounds: IntRange(*bounds)),
        "title": st.lists(
            texts.filter(lambda text: not ("'" in text and '"' in text)), min_size=1, unique=True
        ).map(lambda options: Choice(tuple(options))),
        "layers": st.lists(st.lists(st.integers()).map(tuple), min_size=1, unique=True).map(
            lambda options: Choice(tuple(options))
        ),
        "limit": st.lists(
            st.none() | st.integers() | st.floats(allow_nan=False), min_size=1, unique=True
        ).map(lambda options: Choice(tuple(options))),
    },
)


@given(dimensions)
def test_a_space_comes_back_from_its_json_and_from_its_own_words(asked: Any) -> None:
    assert repr(space.from_json(space.as_json(asked))) == repr(dict(sorted(asked.items())))
    assert parse(*(f"{name}={dimension}" for name, dimension in asked.items())) == asked


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(allow_nan=False),
            "hidden": st.integers(),
            "bias": st.booleans(),
            "title": texts,
            "layers": st.lists(st.integers()).map(tuple),
            "names": st.lists(texts).map(tuple),
            "norm": st.sampled_from(["BATCH", "LAYER"]),
            "limit": st.none() | st.integers() | st.floats(allow_nan=False),
        },
    )
)
def test_suggested_values_pass_through_words_unchanged(values: Any) -> None:
    words = space.as_words(values)

    assert repr(params.parse(Params, words)) == repr(values)
    assert params.flatten(EXPERIMENT.make_params(words)).items() >= values.items()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"lr": 1}',
        '{"lr": ["log", -1.0, 1.0]}',
        '{"lr": ["uniform", 1.0, 0.0]}',
        '{"lr": ["uniform", 0.0, Infinity]}',
        '{"lr": ["int", 0.5, 2]}',
        '{"lr": ["choice"]}',
        '{"lr": ["normal", 0.0, 1.0]}',
    ],
)
def test_json_from_a_server_that_is_no_space_is_refused(text: str) -> None:
    with pytest.raises(ParamError, match="cannot be read"):
        space.from_json(text)


def test_differences_name_each_dimension_in_words() -> None:
    recorded = parse("lr=log(1e-4,1e-1)", "hidden=choice(16,32)", "bias=choice(true,false)")
    asked = parse("lr=uniform(1e-4,1e-1)", "hidden=choice(32,16)", "title=choice(a)")

    assert space.differences(recorded, recorded) == []
    assert space.differences(recorded, asked) == [
        "bias: choice(True,False) -> not searched",
        "hidden: choice(16,32) -> choice(32,16)",
        "lr: log(0.0001,0.1) -> uniform(0.0001,0.1)",
        "title: not searched -> choice(a)",
    ]


def test_a_grid_has_an_end_where_nothing_is_continuous() -> None:
    assert space.grid_size(parse("hidden=int(-1,3)", "bias=choice(true,false)")) == 10
    assert space.grid_size(parse("hidden=log(1,10)")) == 10
    assert space.grid_size(parse("hidden=int(1,3)", "lr=uniform(0,1)")) is None
    assert space.grid_size({}) == 1


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, tracked.space; print(*{'torch', 'mlflow', 'optuna', 'yaml'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""
