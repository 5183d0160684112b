"""The tests of the engines on a GPU, where there is one, against main memory; and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from consumers.layers import SettingsError
from consumers.settings import Settings
from consumers.system import new_model
from model.meta import adapt
from model.tasks import Task
from tests.model_cases import CLOSED, PAPER, TASKS, learn, small_model
from tests.test_engine import FEW, STEPS, VARIANTS, compare

DEVICE = "cuda"
CASES: dict[str, dict[str, Any]] = {
    "closed form": CLOSED,
    "inner steps before the solve": CLOSED | {"inner_steps": 1},
    "gradient steps": PAPER,
    "second order": PAPER | {"order": "second"},
    "decision": PAPER | {"local": "decision", "memory": "off"},
}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here that torch can use")


def agrees(groups: list[list[Task]], over: dict[str, Any], tolerance: float, dtype: torch.dtype = torch.float64) -> None:
    """The same tasks there, and here by the plain model."""
    there, here = small_model(dtype=dtype, device=DEVICE, **over), small_model(dtype=dtype, **over)
    here.plain = True
    assert adapt(there, groups[0], learning=True).prediction.score.device.type == DEVICE
    compare(there, here, groups, tolerance)
    gradient, writes = learn(there, groups[0], write=True)
    assert gradient.vector.device.type == "cpu"
    assert writes is None or all(value.device.type == "cpu" for value in writes.tensors().values())


@on_a_gpu
@pytest.mark.parametrize("over", CASES.values(), ids=list(CASES))
def test_on_a_gpu_scores_gradients_and_writes_are_those_of_main_memory(over: dict[str, Any]) -> None:
    agrees([TASKS, TASKS[:2]], over, 1e-9)


@on_a_gpu
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups=FEW, over=VARIANTS | STEPS)
def test_and_so_for_any_tasks(groups: list[list[Task]], over: dict[str, Any]) -> None:
    base = PAPER if "inner_steps" in over else CLOSED
    agrees(groups, base | over, 1e-9)
    agrees(groups, base | over, 1e-4, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="device: cuda is not available here"):
        new_model(Settings(device="cuda"))
