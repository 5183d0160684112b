from __future__ import annotations

import math
import random
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from streaming.events import REASONS
from streaming.metrics import GROUPS, HALF_LIFE, STAGES, Metrics, RunningError, StepReport
from tests.small_runs import MICRO_BATCH, Stream, fill, run_and_keep, small


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = generate_latest(metrics.registry).decode()
    return {(s.name, frozenset(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)["coldstream_" + name, frozenset(labels.items())]


def test_a_step_is_counted() -> None:
    metrics = Metrics()
    step = StepReport(
        partition=3,
        events=5,
        errors=[0.5, -0.5, 1.0],
        earlier=[0, 3, 40],
        appended=[-0.002, -0.02, -99.0],
        adaptations=2,
        memory_writes=1,
        unknown_fields=4,
        dead_letters={"not-decodable": 2},
    )
    metrics.observe_step(step, 0.0)
    metrics.observe_step(step, 0.0)
    assert value(metrics, "events_total", partition="3") == 10
    assert value(metrics, "scores_total") == 6
    assert value(metrics, "adaptations_total") == 4
    assert value(metrics, "memory_writes_total") == 2
    assert value(metrics, "unknown_fields_total") == 8
    assert value(metrics, "dead_letters_total", reason="not-decodable") == 4
    assert value(metrics, "micro_batch_events_bucket", le="2.0") == 0
    assert value(metrics, "micro_batch_events_bucket", le="4.0") == 2


def test_a_step_of_dead_letters_alone_scores_nothing() -> None:
    metrics = Metrics()
    metrics.observe_step(StepReport(partition=0, events=2, dead_letters={"too-large": 2}), 0.0)
    assert value(metrics, "scores_total") == 0
    assert value(metrics, "micro_batch_events_count") == 0
    assert math.isnan(value(metrics, "running_error", earlier="all", metric="mae"))


def test_every_reason_is_there_before_its_first_dead_letter() -> None:
    metrics = Metrics()
    assert {value(metrics, "dead_letters_total", reason=reason) for reason in REASONS} == {0}


def test_waits_fall_into_the_bucket_that_holds_them() -> None:
    metrics = Metrics()
    waits = [0.0005, 0.001, 0.0011, 0.5, 7200.0]  # a bound belongs to its own bucket
    metrics.observe_step(StepReport(partition=0, events=5, errors=[0.0] * 5, earlier=[0] * 5, appended=[-wait for wait in waits]), 0.0)
    found = {labels: v for (name, labels), v in samples(metrics).items() if name == "coldstream_event_to_score_seconds_bucket"}
    assert len(found) == 18
    for labels, count in found.items():
        bound = float(dict(labels)["le"])
        assert count == sum(wait <= bound for wait in waits), bound
    assert value(metrics, "event_to_score_seconds_sum") == pytest.approx(sum(waits))
    assert value(metrics, "event_to_score_seconds_count") == 5


def test_answers_are_counted() -> None:
    metrics = Metrics()
    metrics.observe_answers([0.004, 0.3], stale=1, dead_letters=["too-many-items"])
    metrics.observe_answers([], stale=0)
    assert value(metrics, "requests_total") == value(metrics, "request_to_answer_seconds_count") == 2
    assert value(metrics, "request_to_answer_seconds_bucket", le="0.005") == 1
    assert value(metrics, "requests_stale_total") == 1
    assert value(metrics, "dead_letters_total", reason="too-many-items") == 1
    assert value(metrics, "commits_total") == 2


def test_the_running_error_is_the_decayed_mean_of_just_the_values_seen() -> None:
    errors = [random.Random(1).gauss(0, 1) for _ in range(1200)]
    running = RunningError()
    for n, error in enumerate(errors, 1):
        running.update(error)
        if n in (1, 2, 10, 1200):
            weights = [0.5 ** ((n - 1 - i) / HALF_LIFE) for i in range(n)]
            mae = sum(w * abs(e) for w, e in zip(weights, errors[:n], strict=True)) / sum(weights)
            mse = sum(w * e * e for w, e in zip(weights, errors[:n], strict=True)) / sum(weights)
            assert running.mae() == pytest.approx(mae, rel=1e-9)
            assert running.rmse() == pytest.approx(math.sqrt(mse), rel=1e-9)


@pytest.mark.parametrize(
    ("earlier", "groups"),
    [
        (0, {"all", "0"}),
        (1, {"all", "1-5", "1-20"}),
        (5, {"all", "1-5", "1-20"}),
        (6, {"all", "1-20"}),
        (20, {"all", "1-20"}),
        (21, {"all", "21+"}),
    ],
)
def test_an_error_counts_in_each_group_that_holds_it(earlier: int, groups: set[str]) -> None:
    metrics = Metrics()
    metrics.observe_step(StepReport(partition=0, events=1, errors=[-2.0], earlier=[earlier], appended=[-1.0]), 0.0)
    assert {group for group in GROUPS if metrics.running[group].n} == groups
    for group in groups:
        assert value(metrics, "running_error", earlier=group, metric="mae") == pytest.approx(2.0)
        assert value(metrics, "running_error", earlier=group, metric="rmse") == pytest.approx(2.0)


def test_errors_and_earlier_counts_must_go_together() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Metrics().observe_step(StepReport(partition=0, events=2, errors=[1.0, 2.0], earlier=[0]), 0.0)


def test_stages_are_timed_and_add_up() -> None:
    metrics = Metrics()
    for _ in range(2):
        with metrics.stage("decode"):
            time.sleep(0.01)
    assert 0.02 <= metrics.stage_seconds["decode"] < 1
    assert metrics.stage_seconds["poll"] == 0
    assert set(metrics.stage_seconds) == set(STAGES)
    assert value(metrics, "step_stage_seconds_count", stage="decode") == 2
    assert value(metrics, "step_stage_seconds_sum", stage="decode") == pytest.approx(metrics.stage_seconds["decode"])


def test_every_stage_of_a_run_is_timed_once_a_step_and_none_twice_at_once(tmp_path: Path) -> None:
    settings, stream = small(tmp_path / "log.db"), Stream(200)
    fill(settings, stream.profiles + stream.messages)
    began = time.monotonic()
    with run_and_keep(settings) as (system, _):
        took = time.monotonic() - began
        seconds = system.metrics.stage_seconds
        steps = -(-len(stream.messages) // MICRO_BATCH)
        for stage in set(STAGES) - {"adopt"}:  # In lockstep worker and trainer share a model.
            assert seconds[stage] > 0, stage
            assert value(system.metrics, "step_stage_seconds_count", stage=stage) >= steps, stage
    assert sum(seconds.values()) < took


def test_a_stage_that_fails_is_timed_too() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.stage("commit"):
        raise KeyError
    assert value(metrics, "step_stage_seconds_count", stage="commit") == 1


def test_folds_are_counted_by_kind() -> None:
    metrics = Metrics()
    metrics.observe_fold(query=2, rehearsal=1)
    metrics.observe_fold(query=1, dropped=4)
    assert value(metrics, "meta_updates_total", kind="query") == 3
    assert value(metrics, "meta_updates_total", kind="rehearsal") == 1
    assert value(metrics, "updates_dropped_total") == 4


def test_the_age_of_the_version_grows_between_scrapes() -> None:
    metrics = Metrics()
    assert math.isnan(value(metrics, "model_version_age_seconds"))
    assert math.isnan(value(metrics, "model_version"))
    metrics.observe_version(7, int((time.time() - 100) * 1000))
    assert value(metrics, "model_version") == 7
    first = value(metrics, "model_version_age_seconds")
    assert 100 <= first < 110
    time.sleep(0.01)
    assert value(metrics, "model_version_age_seconds") > first


def test_lag_is_shown_for_the_partitions_held_and_no_others() -> None:
    metrics = Metrics()
    metrics.observe_lag({0: 5, 1: 6})
    metrics.observe_lag({1: 7, 2: 0})
    lag = {dict(labels)["partition"]: v for (name, labels), v in samples(metrics).items() if name == "coldstream_lag_events"}
    assert lag == {"1": 7, "2": 0}


def test_the_rest_is_set_directly() -> None:
    metrics = Metrics()
    metrics.watch_attention(lambda: (0.2, 0.1))
    metrics.users_held.set(9)
    metrics.aborted.inc()
    metrics.fenced.inc()
    assert value(metrics, "attention_spread", over="users") == 0.2
    assert value(metrics, "attention_spread", over="rows") == 0.1
    assert value(metrics, "users_held") == 9
    assert value(metrics, "transactions_aborted_total") == 1
    assert value(metrics, "fenced_total") == 1


def test_two_processes_worth_of_metrics_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.commits.inc()
    assert value(other, "commits_total") == 0


def test_names_follow_the_rules_and_what_is_described_is_what_is_served() -> None:
    metrics = Metrics()
    families = {family.name: family for family in metrics.registry.collect() if not family.name.startswith("process_")}
    described = {metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name: metric for metric in metrics.described}
    assert families.keys() == described.keys()
    for name, metric in described.items():
        assert metric.name.startswith("coldstream_")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert families[name].type == metric.kind
        assert families[name].documentation == metric.help
        assert not {"user", "item"} & set(metric.labels)
