"""A log whose model was made with other settings: the error names the mend, and says with its exit code that settings are at fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumers import cli
from consumers.demo_files import begin
from consumers.exits import Exit
from consumers.settings import Settings
from streaming.errors import SourceError
from tests.small_runs import Stream, fill, run, small


def test_a_model_of_other_settings_is_refused_as_a_wrong_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(tmp_path / "log.db")
    stream = Stream(40, seed=3)
    fill(settings, stream.messages)
    run(settings)
    command = ["run", "--until-end", "--broker", settings.broker, "--set", "model.embedding_size=7", "--set", "topics.partitions=1"]
    assert cli.execute([*command, "--set", "metrics.enabled=false"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "other settings" in said
    assert "unexpected" not in said


def test_a_demo_deletes_no_log_that_is_none_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"precious")
    with pytest.raises(SourceError, match="--out"):
        begin(Settings(), tmp_path)
    assert (tmp_path / "log.db").read_bytes() == b"precious"
