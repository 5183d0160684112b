"""Support sets as the worker keeps them, step by step and through restarts, against the pure fold of the events."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streaming.codec import decode, encode
from streaming.events import Interaction, Position, Support
from streaming.log import Record
from streaming.store.file import Place
from streaming.store.held import Head, Held, InMemory
from streaming.store.stored import Stored
from streaming.support import Appended, SupportSets
from streaming.topics import POSITION_KEY
from tests.verify.fold import Fold
from tests.verify.reading import Event

Changelog = list[tuple[bytes, bytes | None]]
PLACE = Place("g", "support", 0)


def interactions(users: Sequence[int]) -> list[Interaction]:
    return [Interaction(f"u{user}", f"i{number % 3}", 3.0, 10**9 + number) for number, user in enumerate(users)]


def compacted(changelog: Changelog, start: int) -> list[Record]:
    """What the log has left of the changelog, from an offset on."""
    latest: dict[bytes, tuple[int, bytes | None]] = {key: (offset, value) for offset, (key, value) in enumerate(changelog)}
    kept = sorted((offset, key, value) for key, (offset, value) in latest.items() if offset >= start)
    return [Record("support", 0, offset, 1000 + offset, key, value) for offset, key, value in kept]


def opened(path: Path | None, size: int, max_users: int) -> SupportSets:
    return SupportSets(size, max_users=max_users, held=None if path is None else Stored(path, PLACE, ordered=True))


def restored(sets: SupportSets, path: Path | None, changelog: Changelog, *, killed: bool) -> SupportSets:
    """What a restart makes of file and changelog; killed, of all that was not written to the file."""
    if killed and isinstance(sets.held, Stored):
        sets.held._file.close()
    sets.close()
    again = opened(path, sets.size, sets.max_users)
    assert (again.covered.offset == len(changelog)) == (path is not None and not killed) or not changelog
    for record in compacted(changelog, again.covered.offset):
        again.restore(record)
    again.restored()
    assert again.position == sets.position
    return again


@pytest.mark.parametrize("where", ["memory", "file", "file, killed"])
@given(
    users=st.lists(st.integers(0, 6), max_size=60),
    cuts=st.sets(st.integers(0, 60)),
    restarts=st.sets(st.integers(0, 60)),
    size=st.integers(1, 4),
    max_users=st.integers(0, 5),
)
def test_they_are_the_fold_however_it_is_cut_into_steps_and_runs(
    where: str, users: list[int], cuts: set[int], restarts: set[int], size: int, max_users: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = None if where == "memory" else Path(folder) / "s.db"
        sets, fold, changelog = opened(path, size, max_users), Fold(size, max_users), Changelog()
        for offset, event in enumerate(interactions(users)):
            before = sets.get(event.user)
            wanted = fold.take(Event(offset, event.user, event.item, event.rating, event.timestamp))
            assert (before.earlier if before else 0) == len(wanted)
            sets.append(event.user, event, ("interactions", 0, offset))
            drawn = sets.draw(4, np.random.default_rng(offset))
            assert all(sets.get(user) is not None for user in drawn), "nobody is drawn whom this step forgets"
            if offset in cuts or offset == len(users) - 1:
                position = encode(Position(offset + 1, sets.ordinals_after, 0, {}, sets.changelog))
                changes = sets.changes()
                changelog += [*changes, (POSITION_KEY, position)]
                sets.begin(changes)
                sets.commit(position, len(changelog) - 1)
                if offset in restarts:
                    expected = sets.draw(3, np.random.default_rng(offset))
                    sets = restored(sets, path, changelog, killed=where == "file, killed")
                    assert sets.draw(3, np.random.default_rng(offset)) == expected
        assert sets.ordinals_given == fold.ordinals
        assert len(sets) == len(fold.users) <= (max_users or 99)
        for user, held in fold.users.items():
            found = sets.get(user)
            assert found is not None
            assert (found.interactions, found.earlier, found.ordinal) == (fold.support(user), len(held.events), held.ordinal)
            assert found.source == ("interactions", 0, held.events[-1].offset)
        sets.close()


@pytest.fixture(params=["memory", "file"])
def sets(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SupportSets]:
    """Of three interactions and two users."""
    made = opened(tmp_path / "s.db" if request.param == "file" else None, 3, 2)
    yield made
    made.close()


def test_a_user_forgotten_and_back_within_one_step_takes_the_place_of_the_next(sets: SupportSets) -> None:
    for offset, event in enumerate(interactions([0, 1])):
        sets.append(event.user, event, ("interactions", 0, offset))
    sets.begin(sets.changes())
    sets.commit()
    for offset, event in enumerate(interactions([2, 0]), 2):
        sets.append(event.user, event, ("interactions", 0, offset))
    sets.begin(sets.changes())
    sets.commit()
    assert [sets.get(user) is None for user in ("u0", "u1", "u2")] == [False, True, False]
    assert sets.evicted == 1, "of u0, back at once, nothing was lost but its support"


def test_what_is_discarded_leaves_no_trace(sets: SupportSets) -> None:
    events = interactions([0, 1, 2, 2, 0])
    sets.append("u0", events[0], ("interactions", 0, 0))
    sets.begin(sets.changes())
    sets.commit()
    kept = sets.get("u0")
    for offset, event in enumerate(events[1:], 1):
        sets.append(event.user, event, ("interactions", 0, offset))
    sets.discard()
    assert (len(sets), sets.get("u0"), sets.get("u1"), sets.ordinals_after, sets.changes()) == (1, kept, None, 1, [])
    assert decode(sets.held.value("u0"), Support, what="it") == kept


@pytest.mark.parametrize("where", ["memory", "file"])
@given(
    actions=st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60),
    cuts=st.sets(st.integers(0, 60)),
    failing=st.sets(st.integers(0, 60)),
    answered=st.sets(st.integers(0, 60)),
    max_users=st.integers(0, 5),
)
# Who goes is the user silent for longest, over two steps on their way.
@example(actions=[(0, False), (1, False), (0, False), (2, False)], cuts={1, 2}, failing=set(), answered=set(), max_users=2)
def test_what_is_on_its_way_counts_as_if_it_were_committed(
    where: str, actions: list[tuple[int, bool]], cuts: set[int], failing: set[int], answered: set[int], max_users: int
) -> None:
    """Beside support sets whose steps are committed at once, others whose steps are on their way until an answer comes for all of them.

    Where they fail, that is all that is gone, and the step on top of them: all go on from what was committed before.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = None if where == "memory" else Path(folder) / "s.db"
        at_once, late = SupportSets(3, max_users=max_users), opened(path, 3, max_users)
        steps: list[list[tuple[int, str, bool]]] = [[]]
        for offset, (user, forgets) in enumerate(actions):
            steps[-1].append((offset, f"u{user}", forgets))
            if offset in cuts:
                steps.append([])

        def stage(sets: SupportSets, step: list[tuple[int, str, bool]]) -> None:
            for offset, user, forgets in step:
                if forgets:
                    sets.forget(user, offset)
                else:
                    sets.append(user, Interaction(user, f"i{offset}", 3.0, offset), ("interactions", 0, offset))

        def same() -> None:
            assert late.ordinals_after == at_once.ordinals_after
            assert late.changes() == at_once.changes()
            assert all(late.get(f"u{user}") == at_once.get(f"u{user}") for user in range(7))
            assert all(late.encoded(f"u{user}") == at_once.encoded(f"u{user}") for user in range(7))
            assert late.draw(4, np.random.default_rng(5)) == at_once.draw(4, np.random.default_rng(5))

        under_way = list[list[tuple[int, str, bool]]]()
        for number, step in enumerate(steps):
            stage(at_once, step)
            stage(late, step)
            same()
            if number in failing:
                # What is on its way fails, with the step on top of it: all are made again.
                late.discard_all()
                for earlier in under_way:
                    stage(late, earlier)
                    late.begin(late.changes())
                stage(late, step)
                same()
            at_once.begin(at_once.changes())
            at_once.commit()
            if number in answered:
                late.commit(steps=len(under_way))
                under_way.clear()
            late.begin(late.changes())
            under_way.append(step)
            same()
        late.commit(steps=len(under_way))
        assert len(late) == len(at_once)
        late.close()


def test_rehearsal_finds_users_where_most_have_been_dropped() -> None:
    sets = SupportSets(5, max_users=100)
    for n in range(1000):
        sets.append(f"u{n}", Interaction(f"u{n}", "i", 3.0, 0), ("interactions", 0, n))
        if n % 16 == 15 or n == 999:
            sets.begin(sets.changes())
            sets.commit(b"", 0)
    assert len(sets) == 100
    drawn = [sets.draw(32, np.random.default_rng([1, 0, k])) for k in range(50)]
    assert all(len(users) == len(set(users)) == 32 for users in drawn)
    assert len({user for users in drawn for user in users}) == 100


def test_a_set_that_is_appended_to_is_encoded_as_one_that_is_decoded() -> None:
    """A field that the one had and the other not would be lost with the next event."""
    assert Appended.__struct_fields__ == Support.__struct_fields__
    assert Appended.__struct_defaults__ == Support.__struct_defaults__
    support = Support([("i1", 4.0, 1), ("\u00e9", 2.5, 2**40)], ("interactions", 3, 2**33), 70_000, 5, 9)
    assert encode(decode(encode(support), Appended, what="it")) == encode(support)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_user_who_comes_back_under_another_ordinal_has_no_other(kind: str, tmp_path: Path) -> None:
    held: Held = InMemory() if kind == "memory" else Stored(tmp_path / "store", PLACE)
    for ordinal in (1, 1, 2):
        value = encode(Support([("i1", 4.0, 1)], ("interactions", 0, 0), 1, ordinal))
        held.put("u", value, Head(ordinal) if ordinal == 2 else None)
    assert (held.user_of(1), held.user_of(2)) == (None, "u")
    held.close()
