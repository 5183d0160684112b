from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from consumers import catalogue, inspection, reference, threads
from consumers.layers import Loaded, SettingsError, load
from consumers.settings import Settings
from model.settings import PRESETS, Feature, FeatureSchema

DOCS = Path(__file__).parent.parent / "docs"


def loaded(tmp_path: Path, toml: str | None = None, **sources: Any) -> Loaded:  # noqa: ANN401 - the sources of `load`
    if toml is not None:
        (tmp_path / "coldstream.toml").write_text(toml)
    return load(directory=tmp_path, **{"environ": {}, **sources})


def problems(tmp_path: Path, toml: str | None = None, **sources: Any) -> list[str]:  # noqa: ANN401 - as above
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, toml, **sources)
    return caught.value.problems


def test_without_any_source_every_setting_is_its_default(tmp_path: Path) -> None:
    result = loaded(tmp_path)
    assert result.settings == Settings()
    assert result.origins.keys() == catalogue.entries().keys()
    assert {origin.source for origin in result.origins.values()} == {"default"}


def test_each_source_wins_over_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, section, key = "trainer.meta_update", "trainer", "meta_update"
    monkeypatch.setitem(PRESETS, "paper", {section: {key: 2}})
    sources: dict[str, Any] = {"toml": 'preset = "paper"'}
    assert loaded(tmp_path, **sources).settings.trainer.meta_update == 2
    assert str(loaded(tmp_path).origins[name]) == "preset paper"

    sources["toml"] = 'preset = "paper"\n[trainer]\nmeta_update = 3'
    result = loaded(tmp_path, **sources)
    assert (result.settings.trainer.meta_update, str(result.origins[name])) == (3, "file coldstream.toml: [trainer] meta_update")

    sources["environ"] = {"COLDSTREAM_TRAINER__META_UPDATE": "4", "HOME": "/"}
    result = loaded(tmp_path, **sources)
    assert (result.settings.trainer.meta_update, str(result.origins[name])) == (4, "environment COLDSTREAM_TRAINER__META_UPDATE")

    sources["sets"] = ["trainer.meta_update=5"]
    result = loaded(tmp_path, **sources)
    assert (result.settings.trainer.meta_update, str(result.origins[name])) == (5, "flag --set trainer.meta_update")

    sources["flags"] = {name: 6, "worker.micro_batch": None}
    result = loaded(tmp_path, **sources)
    assert (result.settings.trainer.meta_update, str(result.origins[name])) == (6, "flag --meta-update")
    assert result.origins["worker.micro_batch"].source == "default"


def test_the_last_set_of_a_name_wins(tmp_path: Path) -> None:
    assert loaded(tmp_path, sets=["seed=2", "seed=3"]).settings.seed == 3


def test_the_preset_may_come_from_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "paper", {"worker": {"support_size": 7}})
    for sources in ({"environ": {"COLDSTREAM_PRESET": "paper"}}, {"sets": ["preset=paper"]}, {"flags": {"preset": "paper"}}):
        assert loaded(tmp_path, **sources).settings.worker.support_size == 7
    assert loaded(tmp_path, 'preset = "paper"', sets=["preset=default"]).settings.worker.support_size == Settings().worker.support_size


def test_values_given_as_text_become_what_the_setting_is(tmp_path: Path) -> None:
    user = {"age": {"kind": "numeric", "mean": 30}}
    environ = {
        "COLDSTREAM_WORKER__FROZEN": "true",
        "COLDSTREAM_RATING__MAXIMUM": "10",
        "COLDSTREAM_SCHEMA__USER": json.dumps(user),
        "COLDSTREAM_GROUP": "1",
    }
    settings = loaded(tmp_path, environ=environ).settings
    assert settings.worker.frozen is True
    assert settings.rating.maximum == 10.0
    assert settings.feature_schema.user["age"].mean == 30
    assert settings.group == "1"


@pytest.mark.parametrize(
    ("toml", "sources", "words"),
    [
        (
            "[worker]\nmicro_batch = 0",
            {},
            ["worker.micro_batch = 0", "coldstream.toml: [worker] micro_batch", "integer from 1 to 65536", "events"],
        ),
        (
            None,
            {"environ": {"COLDSTREAM_LOG__DURABILITY": "none"}},
            ["log.durability = none", "COLDSTREAM_LOG__DURABILITY", '"process", "power"'],
        ),
        (None, {"sets": ["rating.minimum=nan"]}, ["rating.minimum = nan", "--set rating.minimum", "finite"]),
        (None, {"flags": {"metrics.port": 70000}}, ["metrics.port = 70000", "flag --port", "0 to 65535"]),
        ("[worker]\nmicro_batch = true", {}, ["worker.micro_batch = true", "wrong type"]),
        ("[worker]\nmicro_batch = 1.5", {}, ["worker.micro_batch = 1.5", "integer"]),
        ("worker = 3", {}, ["worker = 3", "table"]),
        ('broker = "redis:x"', {}, ["broker = redis:x", "embedded:PATH"]),
        ('topic_prefix = "a b"', {}, ["topic_prefix = a b", "letters"]),
        ("[rating]\nmaximum = 1.0", {}, ["rating.maximum (1) must be above rating.minimum (1)", "[rating] maximum"]),
        (None, {"sets": ["limits.latest_ms=5"]}, ["limits.latest_ms (5) must be after limits.earliest_ms", "--set limits.latest_ms"]),
        (
            "[worker]\npoll_timeout_ms = 5000",
            {"sets": ["log.session_timeout_ms=1000", "seed=2"]},
            ["log.session_timeout_ms (1000) must be above", "(5020)", "[worker] poll_timeout_ms", "--set log.session_timeout_ms"],
        ),
        (None, {"sets": ["preset=papre"]}, ["preset = papre", '"default", "paper"']),
        ('[schema.user.age]\nkind = "number"', {}, ["schema.user", "age.kind"]),
        (None, {"environ": {"COLDSTREAM_SCHEMA__USER": "{oops"}}, ["schema.user", "JSON"]),
        (None, {"sets": ["worker.micro_batch"]}, ["--set worker.micro_batch", "section.name=value"]),
        ("a = = 3", {}, ["coldstream.toml: is not TOML", "line"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_place_and_what_is_allowed(
    tmp_path: Path, toml: str | None, sources: dict[str, Any], words: list[str]
) -> None:
    (problem,) = problems(tmp_path, toml, **sources)
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("sources", "place", "hint"),
    [
        ({"toml": "[worker]\nmicro_bach = 3"}, "coldstream.toml: [worker] micro_bach", "worker.micro_batch"),
        ({"toml": "[wroker]\nmicro_batch = 3"}, "[wroker] micro_batch", "worker.micro_batch"),
        ({"environ": {"COLDSTREAM_METRICS__PROT": "1"}}, "environment COLDSTREAM_METRICS__PROT", "metrics.port"),
        ({"environ": {"COLDSTREAM_MICRO_BATCH": "1"}}, "environment COLDSTREAM_MICRO_BATCH", "worker.micro_batch"),
        ({"sets": ["suport_size=1"]}, "--set suport_size", "worker.support_size"),
    ],
)
def test_an_unknown_setting_is_named_with_its_place_and_a_likely_name(
    tmp_path: Path, sources: dict[str, Any], place: str, hint: str
) -> None:
    found = problems(tmp_path, **sources)
    assert len(found) == 1
    assert "unknown setting" in found[0]
    assert place in found[0]
    assert hint in found[0]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "sed = 1\n[worker]\nmicro = 2", sets=["x=1"])) == 3
    assert len(problems(tmp_path, "seed = -1\n[worker]\nmicro_batch = 0")) == 2


def test_a_missing_file_is_an_error_only_if_it_was_asked_for(tmp_path: Path) -> None:
    assert "no such settings file" in problems(tmp_path, config=tmp_path / "other.toml")[0]
    (tmp_path / "other.toml").write_text("seed = 9")
    assert loaded(tmp_path, "seed = 8", config=tmp_path / "other.toml").settings.seed == 9


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    assert "larger than" in problems(tmp_path, "#" * 1_100_000)[0]


def test_the_variable_that_names_the_file_is_no_setting(tmp_path: Path) -> None:
    assert loaded(tmp_path, environ={"COLDSTREAM_CONFIG": "x.toml"}).settings == Settings()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Settings().worker.micro_batch = 3


# The digest


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"rating": {"maximum": 10}}, {"model": {"embedding_size": 3}}, {"schema": {"user": {"age": {"kind": "numeric"}}}}],
)
def test_the_digest_follows_what_a_models_values_depend_on(change: dict[str, Any]) -> None:
    assert Settings.model_validate(change).digest() != Settings().digest()


@pytest.mark.parametrize(
    "change", [{"broker": "embedded:x"}, {"worker": {"micro_batch": 3}}, {"metrics": {"port": 0}}, {"log_level": "debug"}, {"threads": 3}]
)
def test_the_digest_ignores_everything_else(change: dict[str, Any]) -> None:
    assert Settings.model_validate(change).digest() == Settings().digest()


def test_the_digest_is_the_same_in_any_order_and_any_process() -> None:
    one = {"user": {"a": {"kind": "numeric"}, "b": {"kind": "categorical"}}}
    other = {"user": {"b": {"kind": "categorical"}, "a": {"kind": "numeric"}}}
    digest = Settings.model_validate({"schema": one}).digest()
    assert digest == Settings.model_validate({"schema": other}).digest()
    program = f"from consumers.settings import Settings; print(Settings.model_validate({{'schema': {other!r}}}).digest())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=DOCS.parent,
    )
    assert run.stdout.strip() == digest


def test_event_limits_carry_every_limit_and_the_scale() -> None:
    limits = Settings.model_validate(
        {"rating": {"minimum": 0, "maximum": 9}, "limits": {"max_id_bytes": 3, "latest_ms": 86_400_001}}
    ).event_limits()
    assert (limits.rating_min, limits.rating_max, limits.max_id_bytes, limits.latest) == (0, 9, 3, 86_400_001)
    assert limits.earliest == Settings().limits.earliest_ms


def test_default_limits_are_those_of_the_checks() -> None:
    from streaming.validation import Limits

    assert Settings().event_limits() == Limits()


def test_a_setting_says_how_many_cores_to_count_on() -> None:
    assert Settings().cores() == threads.allowed_cores()
    assert Settings(threads=3).cores() == 3


# What is shown and documented


def test_the_example_of_features_is_one() -> None:
    example = reference.settings_page().partition("```toml\n")[2].partition("```")[0]
    schema = FeatureSchema.model_validate(tomllib.loads(example)["schema"])
    assert {feature.kind for feature in (*schema.user.values(), *schema.item.values())} == set(
        get_args(Feature.model_fields["kind"].annotation)
    )


def test_every_setting_says_what_it_is() -> None:
    for entry in catalogue.entries().values():
        assert entry.description, entry.name
        assert entry.allowed(), entry.name


def test_every_default_is_inside_its_own_range() -> None:
    for name, entry in catalogue.entries().items():
        nested: Any = entry.default
        for part in reversed(name.split(".")):
            nested = {part: nested}
        Settings.model_validate(nested)


def test_toml_output_is_a_settings_file_with_the_same_effect(tmp_path: Path) -> None:
    first = loaded(
        tmp_path, sets=["worker.micro_batch=7", 'group=a"b'.replace('"', "-"), 'schema.user={"age": {"kind": "numeric", "bins": [1, 2]}}']
    )
    text = inspection.as_toml(inspection.effective(first))
    (tmp_path / "coldstream.toml").write_text(text)
    assert load(directory=tmp_path, environ={}).settings == first.settings


@given(
    st.recursive(st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists)
)
def test_values_are_written_as_toml_reads_them(value: object) -> None:
    assert tomllib.loads(f"x = {inspection.toml(value)}")["x"] == value


def test_json_output_names_the_place(tmp_path: Path) -> None:
    rows = inspection.select(inspection.effective(loaded(tmp_path, sets=["seed=4"])), [], changed=True)
    assert json.loads(inspection.as_json(rows)) == {"seed": {"value": 4, "unit": "", "from": "flag", "place": "--set seed"}}


def test_sections_and_settings_can_be_selected(tmp_path: Path) -> None:
    rows = inspection.effective(loaded(tmp_path))
    assert {row.entry.name.partition(".")[0] for row in inspection.select(rows, ["rating", "seed"])} == {"rating", "seed"}
    with pytest.raises(SettingsError, match="ratings: no such"):
        inspection.select(rows, ["ratings"])


def test_no_secret_is_shown(tmp_path: Path) -> None:
    result = loaded(tmp_path, sets=["broker=embedded:x?password=hunter2"])
    assert "hunter2" not in inspection.as_toml(inspection.effective(result))
    assert "hunter2" not in json.dumps(inspection.public(result.settings))
    (problem,) = problems(tmp_path, sets=["broker=redis://me:hunter2@host"])
    assert "hunter2" not in problem


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_pages_made_from_the_code_are_in_step(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == reference.PAGES[name](), "run: python -m consumers.reference"
