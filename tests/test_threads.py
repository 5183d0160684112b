"""No process takes more cores for its arithmetic than it was given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import ThreadpoolController, threadpool_info

from consumers import threads
from consumers.settings import Settings
from consumers.system import System

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    with ThreadpoolController().limit(limits=None):
        yield
    torch.set_num_threads(before)


def given(quota: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    path.write_text(quota)
    monkeypatch.setattr(threads, "QUOTA", path)
    return threads.allowed_cores()


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", CORES), ("100000 100000\n", 1), ("50000 100000\n", 1), (f"{CORES * 200_000} 100000\n", CORES), ("nonsense", CORES)],
)
def test_a_quota_counts_as_fewer_cores(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(quota, tmp_path / "cpu.max", monkeypatch) == cores


def test_without_control_groups_the_affinity_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "none")
    assert threads.allowed_cores() == CORES


@pytest.mark.parametrize(("setting", "expected"), [(1, 1), (2, 1), (6, 3), (0, max(1, threads.allowed_cores() // 2))])
def test_a_process_takes_half_of_its_cores_and_blas_one(setting: int, expected: int, tmp_path: Path) -> None:
    torch.set_num_threads(8)
    log = f"embedded:{tmp_path / 'log.db'}"
    settings = Settings.model_validate({"broker": log, "threads": setting, "metrics": {"enabled": False}})
    with System(settings):
        assert torch.get_num_threads() == expected
        assert {pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"} == {1}
