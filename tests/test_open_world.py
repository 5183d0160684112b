"""An open world: whoever and whatever was never seen before is served at once, profiles come late and change, and growth has its bounds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers import lockstep
from consumers.opening import connect
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from streaming.codec import decode, texts
from streaming.events import Interaction, Score, Version
from streaming.log import Message
from streaming.topics import POSITION_KEY
from tests.small_runs import MICRO_BATCH, T0, Stream, fill, message, profile, run, run_and_keep, small
from tests.test_promises import findings
from tests.verify.reading import joined, read


def scores(settings: Settings) -> list[Score]:
    with connect(settings) as log:
        return [decode(record.value, Score, what="score") for record in read(log, "scores", 0)]


def event(user: str, item: str, rating: float, number: int = 0) -> Message:
    return message(Interaction(user, item, rating, T0 + number))


def lesson(n: int) -> list[Message]:
    """Users of job a rate high what users of job b rate low, and the genre x is liked by all."""
    dice, messages = random.Random(n), []
    for number in range(n):
        user, item = dice.randrange(20), dice.randrange(10)
        rating = 4.0 if (user % 2 == 0) else 2.0
        messages.append(event(f"u{user}", f"i{item}", rating + (1.0 if item % 2 else 0.0), number))
    return messages


def profiles() -> list[Message]:
    users = [profile("users", f"u{n}", {"job": "ab"[n % 2]}) for n in range(20)]
    return users + [profile("items", f"i{n}", {"genre": ["y", "x"][n % 2]}) for n in range(10)]


def test_users_items_and_values_never_seen_before_are_served_without_a_restart(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(200, garbage=0).messages)
    strangers = [
        profile("items", "new-item", {"genre": ["never", "seen"], "colour": "unknown to the schema"}),
        profile("users", "new-user", {"job": "astronaut"}),
        event("new-user", "new-item", 4.0),
        event("no-profile", "new-item", 2.0),
        event("new-user", "без профиля ☃", 5.0),
        event("ü" * 128, "i1", 1.0),
    ]
    sent: list[Message] = []

    def send(progress: lockstep.Progress) -> None:
        if progress.done >= 100 and not sent:
            sent.extend(strangers)
            fill(settings, strangers)

    with Stop() as stop, System(settings) as system:
        lockstep.run(system, stop, until_end=True, on_step=send)
    found = {(score.user, score.item): score for score in scores(settings)[200:]}
    assert found.keys() == {("new-user", "new-item"), ("no-profile", "new-item"), ("new-user", "без профиля ☃"), ("ü" * 128, "i1")}
    assert all(1 <= score.score <= 5 and score.sd for score in found.values())
    assert findings(settings) == []


def probe(folder: Path, *late: Message, before: int = 0) -> list[float]:
    """Scores of an unknown user, asked in each step of a run in which ``late`` comes between the steps ``before`` and the next."""
    settings = small(folder / "log.db", worker={"micro_batch": 1, "frozen": True}, schema=small(folder).model_dump(by_alias=True)["schema"])
    learning = small(folder / "log.db")
    fill(learning, profiles() + lesson(400))
    run(learning)
    asked = [event(f"stranger-{number}", "i3", 3.0) for number in range(4)]
    fill(learning, asked)
    steps = []

    def send(_: lockstep.Progress) -> None:
        steps.append(1)
        if len(steps) == before:
            fill(learning, list(late))

    if before == 0:
        fill(learning, list(late))
    with Stop() as stop, System(settings) as system:
        lockstep.run(system, stop, until_end=True, on_step=send)
    return [score.score for score in scores(settings)[400:]]


def test_a_late_profile_takes_effect_at_the_next_step_and_a_change_of_it_too(tmp_path: Path) -> None:
    everybody = range(4)
    without = probe(tmp_path / "without")
    assert len(set(without)) == 1, "strangers without a profile are alike"
    late = probe(tmp_path / "late", *(profile("users", f"stranger-{n}", {"job": "a"}) for n in everybody), before=2)
    assert late[:2] == without[:2]
    assert late[2] == late[3] != without[2]

    other = probe(tmp_path / "other", *(profile("users", f"stranger-{n}", {"job": "b"}) for n in everybody), before=2)
    assert other[2] < late[2], "the stranger's profile says what the model has learned of such users"
    item = probe(tmp_path / "item", profile("items", "i3", {"genre": "y"}), before=1)
    assert item[0] == without[0] != item[1] == item[3]
    dropped = probe(tmp_path / "dropped", profile("items", "i3", None), before=3)
    assert dropped[:3] == without[:3]
    assert dropped[3] != without[3]


def test_a_bound_on_rows_holds_and_what_is_beyond_it_is_served_and_learned_from_shared_rows(tmp_path: Path) -> None:
    bound, shared = 20, 4
    settings = small(tmp_path / "log.db", model={"max_rows": bound, "overflow_rows": shared})
    fill(settings, Stream(400, garbage=0, items=120, seed=3).messages)
    run(settings)
    with connect(settings) as log:
        versions = [decode(whole.value, Version, what="version") for whole in joined(read(log, "model", 0))]
    keys = {key for version in versions for key in texts(version.rows["item"].ids, what="ids")}
    # Each feature has overflow rows of its own, and there are two.
    assert len([key for key in keys if "~" not in key]) <= bound
    assert len(keys) <= bound + 2 * shared
    assert {f"id~{n}" for n in range(shared)} <= keys
    values: dict[str, set[bytes]] = {}
    for version in versions:
        rows = version.rows["item"]
        ids = texts(rows.ids, what="ids")
        width = len(rows.values.data) // max(1, len(ids))
        for place, key in enumerate(ids):
            values.setdefault(key, set()).add(rows.values.data[place * width : (place + 1) * width])
    assert all(len(values[f"id~{n}"]) > 3 for n in range(shared)), "shared rows learn"
    assert len(scores(settings)) == 400
    assert findings(settings) == []


def test_a_bound_on_users_holds_and_who_comes_back_is_new(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"max_users": 3, "micro_batch": 4})
    names = ["a", "a", "b", "c", "b", "d", "a", "a", "e", "c"]
    fill(settings, [event(name, f"i{number}", 3.0, number) for number, name in enumerate(names)])
    with Stop() as stop, System(settings) as system:
        lockstep.run(system, stop, until_end=True)
        held = system.metrics.registry.get_sample_value("coldstream_users_held")
    assert held == 3
    # d takes the place of a, whose last event is oldest; a comes back for c, e for b, and c for d.
    assert [(score.user, score.earlier) for score in scores(settings)] == [
        *[("a", 0), ("a", 1), ("b", 0), ("c", 0), ("b", 1), ("d", 0), ("a", 0), ("a", 1), ("e", 0), ("c", 0)]
    ]
    with connect(settings) as log:
        kept = {record.key for record in read(log, "support", 0) if record.value is not None} - {POSITION_KEY}
    assert kept == {b"a", b"e", b"c"}
    assert findings(settings) == []


def test_a_bound_on_profiles_holds(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", model={"max_profiles": 5})
    fill(settings, profiles() + lesson(60))
    with run_and_keep(settings) as (_, worker):
        assert (len(worker.model.users.features), worker.model.users.refused) == (5, 15)
    assert len(scores(settings)) == 60


@pytest.mark.parametrize(("low", "high"), [(1, 10), (0, 1), (-1, 1)])
@pytest.mark.parametrize("local", ["closed_form", "all"])
def test_scores_stay_inside_the_scale_of_ratings(low: int, high: int, local: str, tmp_path: Path) -> None:
    model: dict[str, Any] = {"local": local} | (
        {} if local == "closed_form" else {"loss": "squared", "inner_steps": 2, "inner_rate": 0.02, "tau": 0.05}
    )
    settings = small(tmp_path / "log.db", rating={"minimum": low, "maximum": high}, model=model)
    dice = random.Random(1)
    # Users who only know the ends of the scale pull every estimate to it and beyond.
    loud = [event(f"u{number % 4}", f"i{dice.randrange(9)}", float([low, high][number % 2]), number) for number in range(150)]
    off = [event("u1", "i1", rating) for rating in (low - 0.5, high + 0.5)]
    fill(settings, [*loud, *off])
    run(settings)
    found = scores(settings)
    assert len(found) == len(loud)
    assert all(low <= score.score <= high for score in found)
    # Small gradient steps get there too, but later.
    late = found[-30:] if local == "closed_form" else []
    middle = (low + high) / 2
    assert not late or sum((score.score > middle) == (int(score.user[1:]) % 2 == 1) for score in late) > 25, (
        "and they are learned on this scale"
    )
    assert findings(settings) == []
    assert msgspec.msgpack.decode(loud[0].value or b"")["rating"] == low
    assert len(loud) > MICRO_BATCH
