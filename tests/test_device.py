"""Scores, gradients and writes on a GPU, where there is one, against main memory; and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from consumers.layers import SettingsError
from consumers.settings import Settings
from consumers.system import new_model
from model.mamo import Mamo
from model.meta import adapt
from tests.model_cases import CLOSED, PAPER, TASKS, learn, small_model
from tests.test_engine import compare

CASES: dict[str, dict[str, Any]] = {
    "closed form": CLOSED,
    "inner steps before the solve": CLOSED | {"inner_steps": 1},
    "gradient steps": PAPER,
    "second order": PAPER | {"order": "second"},
    "decision": PAPER | {"local": "decision", "memory": "off"},
}


def moved(over: dict[str, Any], device: str) -> Mamo:
    model = small_model(**over)
    model.device = torch.device(device)
    model.plain = True
    return model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here that torch can use")
@pytest.mark.parametrize("over", CASES.values(), ids=list(CASES))
def test_on_a_gpu_scores_gradients_and_writes_are_those_of_main_memory(over: dict[str, Any]) -> None:
    there, here = moved(over, "cuda"), moved(over, "cpu")
    assert adapt(there, TASKS, learning=True).prediction.score.device.type == "cuda"
    compare(there, here, [TASKS, TASKS[:2]], 1e-9)


@pytest.mark.parametrize("over", CASES.values(), ids=list(CASES))
def test_whatever_touches_a_device_leaves_results_in_main_memory(over: dict[str, Any]) -> None:
    gradient, writes = learn(moved(over, "cpu"), write=True)
    assert gradient.vector.device.type == "cpu"
    assert writes is None or all(value.device.type == "cpu" for value in writes.tensors().values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="device: cuda is not available here"):
        new_model(Settings(device="cuda"))
