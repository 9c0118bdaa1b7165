"""The compiler stays out of a training that does not compile, and is there for one that does."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SETUP = """
import sys, torch
from tracked.deferred_compiler import defer_compiler
defer_compiler()
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
def step(module):
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step(); scheduler.step(); optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
step(model)
assert "sympy" not in sys.modules, "the compiler was imported by a plain step"
"""


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", _SETUP + code], check=True, timeout=110)


def test_a_plain_step_does_not_import_the_compiler() -> None:
    _run("")


@pytest.mark.parametrize(
    "first_use",
    [
        "import torch._dynamo.config as config; assert config is sys.modules['torch._dynamo.config']",
        "torch._dynamo.config.verbose",
    ],
)
def test_whoever_uses_the_compiler_gets_the_real_one(first_use: str) -> None:
    _run(
        f"""
{first_use}
compiled = torch.compile(model, backend="eager")
step(compiled)
real = sys.modules["torch._dynamo"]
assert type(real).__name__ == "module", type(real)
assert torch._dynamo is real
assert torch._dynamo.utils.counters["frames"]["ok"] >= 1, "nothing was compiled"
inner = torch.optim.Optimizer.zero_grad.__wrapped__
assert getattr(inner, "__dynamo_disable", None) is not inner, "the compiler would trace into the optimizer"
"""
    )
