"""docs/performance.md says what the files of the benchmarks say, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.performance import filled, sections

ROOT = Path(__file__).resolve().parent.parent


def test_its_tables_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert filled(page, sections(ROOT / "benchmarks" / "results")) == page


def test_a_table_without_a_place_is_said() -> None:
    with pytest.raises(ValueError, match="no place for latency"):
        filled("<!-- machine -->\n<!-- end of machine -->", {"machine": "two cores", "latency": "| a |"})
