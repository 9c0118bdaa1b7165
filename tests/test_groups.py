"""Parameter groups: what decays, by which rate what trains, and under which names that is logged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tracked
from tracked.errors import UsageError
from tracked.freezing import freeze
from tracked.loop import learning_rates
from tracked.names import validate_key


def network() -> nn.ModuleDict:
    backbone = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(3, 1)})


def test_biases_and_norms_do_not_decay() -> None:
    model = network()
    groups = tracked.param_groups(model, weight_decay=0.1)
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("rest", 0.1, 2),
        ("rest without decay", 0.0, 4),
    ]
    assert all(parameter.dim() == 2 for parameter in groups[0]["params"])


def test_each_part_has_its_rate_and_is_logged_by_its_name() -> None:
    model = network()
    groups = tracked.param_groups(model, weight_decay=0.1, lr={"backbone": 1e-4})
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    assert learning_rates(optimizer) == {
        "lr/backbone": 1e-4,
        "lr/backbone without decay": 1e-4,
        "lr/rest": 1e-2,
        "lr/rest without decay": 1e-2,
    }


def test_what_is_frozen_is_left_out_unless_it_will_be_unfrozen() -> None:
    model = network()
    freeze(model, "backbone")
    names = [group["name"] for group in tracked.param_groups(model, weight_decay=0.1, lr={"backbone": 1e-4})]
    assert names == ["rest", "rest without decay"]
    later = tracked.param_groups(model, weight_decay=0.1, also={3: "backbone.0"})
    assert sum(len(group["params"]) for group in later) == 4


def test_a_pattern_that_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no parameter goes by 'bakbone'"):
        tracked.param_groups(network(), weight_decay=0.1, lr={"bakbone": 1e-4})


def test_a_rate_by_a_pattern_is_logged_under_a_name_that_mlflow_takes() -> None:
    groups = tracked.param_groups(network(), weight_decay=0.0, lr={"back*": 1e-4})
    rates = learning_rates(torch.optim.AdamW(groups, lr=1e-2))
    for key in rates:
        validate_key(key)
    assert rates["lr/back"] == 1e-4
