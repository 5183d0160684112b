"""The report: names that others read, a page that needs nothing but itself and escapes all it is given, and what the journal adds."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from streaming.brokers import open_log
from streaming.events import Interaction
from streaming.journal import Journal, read_journal
from streaming.log import Message
from streaming.report import build_report, read_report, render_html, render_table, to_json, write_report
from streaming.topics import topics
from streaming.validation import Limits
from tests.reading_log import T0, ReadingLog, a_log, put, put_score, score_of

EVIL = '"><script>alert("$x$")</script>{{ 7 * 7 }}'


def a_trial(n: int = 600, *, sd: float | None = 0.9, unscored: int = 0) -> ReadingLog:
    rng = np.random.default_rng(0)
    log = a_log()
    had: dict[str, int] = {}
    for place in range(n):
        event = Interaction(f"u{rng.integers(40)}", f"i{rng.integers(30)}", float(rng.integers(1, 6)), T0 + place)
        source = put(log, event)
        if place < n - unscored:
            score = float(np.clip(event.rating + 0.9 * rng.normal(), 1, 5))
            put_score(log, score_of(event, source, score, sd=sd, earlier=had.get(event.user, 0)))
        had[event.user] = had.get(event.user, 0) + 1
    return log


def a_journal(path: Path) -> Path:
    for run in range(2):
        with Journal(path) as journal:
            for start in range(run * 280, 600 if run else 320, 20):
                journal.step(0, start, start + 20, 20)
                journal.note("attention", {"events": start, "spread_users": 0.2, "spread_rows": 0.3})
            journal.stages({"adapt": 0.5, EVIL: 0.25})
    return path


class Page(HTMLParser):
    """Collects what a page would load, its ids and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.loads.append(f"{tag} {name}")
            self.used += re.findall(r"url\(([^)]*)\)", value or "") if value else []
            if name in ("xlink:href", "aria-labelledby"):
                self.used.append(f"#{(value or '').removeprefix('#')}")


def test_report_json_has_the_names_that_others_read(tmp_path: Path) -> None:
    history = read_journal(a_journal(tmp_path / "journal.jsonl"))
    write_report(build_report(a_trial(), {"preset": "default", "seed": 1}, history), tmp_path)
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert (report["events"], report["scores"], report["dead_letters"]) == (600, 600, 0)
    assert (report["runs"], report["events_processed"]) == (2, 320 + 320)
    assert report["seconds"] == pytest.approx(history.seconds, abs=1e-3)
    assert report["events_per_second"] == pytest.approx(600 / history.seconds, abs=0.01)
    assert report["settings"] == {"preset": "default", "seed": 1}
    assert re.fullmatch("[0-9a-f]{64}", report["scores_sha256"])
    assert list(report["results"]) == ["coldstream", "river_biased_mf", "running_mean"]
    for name, result in report["results"].items():
        assert {"mae", "rmse", "by_earlier_events", "after_20000"} <= result.keys()
        assert list(result["by_earlier_events"]) == ["0", "1-5", "1-20", "21+"]
        for group in result["by_earlier_events"].values():
            assert {"n", "mae", "rmse"} <= group.keys()
        assert {"mae", "rmse"} <= result["after_20000"].keys()
        assert ("coverage_80" in result) == (name == "coldstream")
        assert ("difference" in result) == (name != "coldstream")
    assert 0.7 < report["results"]["coldstream"]["coverage_80"] < 0.95
    assert [name for name in report if report[name] is None] == []


def test_what_no_journal_told_is_null_and_the_page_does_without(tmp_path: Path) -> None:
    write_report(build_report(a_trial(sd=None), {}), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [name for name in report if report[name] is None] == ["seconds", "events_per_second", "runs", "events_processed"]
    assert report["results"]["coldstream"]["coverage_80"] is None
    page = (tmp_path / "report.html").read_text()
    for absent in ("Time by stage", "Memory attention", "Honesty of the intervals", "Events/s", "None"):
        assert absent not in page


def test_an_empty_and_a_tiny_run_have_a_report_too() -> None:
    for n in (0, 1, 2):
        report = build_report(a_trial(n), {})
        assert report.events == n
        assert "<h2" in render_html(report)
        assert json.loads(to_json(report))["results"]["coldstream"]["after_20000"]["mae"] is None
        Console(quiet=True).print(render_table(report))


def test_the_page_needs_nothing_but_itself_and_escapes_everything(tmp_path: Path) -> None:
    history = read_journal(a_journal(tmp_path / "j"))
    settings = {EVIL: EVIL, "model": {"rows": 16, "deep": {"er": [EVIL, 1]}}, "empty": {}}
    text = render_html(build_report(a_trial(), settings, history))
    page = Page(text)
    assert page.loads == []
    assert "script" not in page.tags
    assert "49" not in re.findall(r"\d+", text.split("Settings")[1].split("How to recompute")[0])
    assert not re.search(r"@import|https?://(?!www\.w3\.org/)", text)
    assert page.tags.count("svg") == 5
    assert "$x$" in text.split("Time by stage")[1].split("<h2")[0], "a stage's name is text, not mathematics"
    assert page.tags.count("title") == 6, "the page's own, and one in each plot for those who cannot see it"
    assert "model.deep.er" in text
    assert len(page.ids) == len(set(page.ids)), "ids of one plot must not be those of another"
    assert {name.removeprefix("#") for name in page.used if name.startswith("#")} <= set(page.ids)
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", text), "a stand-in colour was left in a plot"


def test_the_same_report_gives_the_same_page_also_after_being_read_back(tmp_path: Path) -> None:
    history = read_journal(a_journal(tmp_path / "j"))
    report = build_report(a_trial(), {"seed": 1}, history)
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "report.html", "report.json"]
    back = read_report(tmp_path / "report.json")
    assert to_json(back) == to_json(report)
    assert render_html(back) == (tmp_path / "report.html").read_text()


def test_the_embedded_broker_gives_the_same_report(tmp_path: Path) -> None:
    plain = ReadingLog(topics(partitions=3).values())
    with open_log(f"embedded:{tmp_path / 'log'}") as embedded:
        embedded.create(topics(partitions=3).values())
        rng = np.random.default_rng(1)
        for place in range(300):
            event = Interaction(f"u{rng.integers(20)}", f"i{rng.integers(9)}", float(rng.integers(1, 6)), T0 + place)
            score = float(rng.uniform(1, 5))
            for log in (plain, embedded):
                put_score(log, score_of(event, put(log, event), score, earlier=-1))
        broken = Message("interactions", b"u1", b"not an event", 0)
        for log in (plain, embedded):
            log.append([broken, Message("dead-letters", b"u1", b"said so")])
        report = build_report(embedded, {})
        assert to_json(report) == to_json(build_report(plain, {}))
    assert (report.events, report.scores, report.partitions, report.refused, report.dead_letters) == (300, 300, 3, 1, 1)


def test_what_should_not_be_is_said_on_the_page() -> None:
    log = a_trial(unscored=3)
    event = Interaction("u0", "i0", 3.0, T0)
    put_score(log, score_of(event, ("interactions", 0, 9_999)))
    report = build_report(log, {})
    assert (report.unscored, report.orphan_scores) == (3, 1)
    page = render_html(report)
    assert "3 events have no score yet" in page
    assert "1 score names no valid event" in page
    assert "beyond the first" not in page
    assert 'class="warning"' not in render_html(build_report(a_trial(), {}))


def test_the_table_shows_each_error_with_its_standard_error() -> None:
    report = build_report(a_trial(), {})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_table(report))
    text = console.export_text()
    ours = report.results["coldstream"]
    assert f"{ours.mae:.4f} ± {ours.mae_se:.4f}" in text
    assert f"{report.results['river_biased_mf'].rmse:.4f}" in text
    assert "MAE, 1-5 earlier events" in text
    assert "–" in text, "there is nothing after the first 20,000 here"
    assert f"{ours.coverage_80:.1%}" in text


def test_scale_and_window_are_those_given() -> None:
    log = a_log()
    for n in range(30):
        event = Interaction("a", f"i{n}", float(n % 11), T0 + n)
        put_score(log, score_of(event, put(log, event), 5.0))
    report = build_report(log, {}, limits=Limits(rating_min=0.0, rating_max=10.0), window=10)
    assert (report.events, report.refused, report.rating_scale) == (30, 0, (0.0, 10.0))
    assert report.results["running_mean"].last_window.n == 10
    assert build_report(log, {}).refused > 0, "on the scale 1 to 5 some of these are no events"
    with pytest.raises(ValueError, match="window: 0"):
        build_report(log, {}, window=0)


def test_a_report_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(msgspec.ValidationError, match="events"):
        read_report(tmp_path / "report.json")
