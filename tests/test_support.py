"""Support sets as the worker keeps them, step by step and through restarts, against the pure fold of the events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.codec import decode
from streaming.events import Interaction, Support
from streaming.log import Record
from streaming.support import SupportSets
from tests.verify.fold import Fold
from tests.verify.reading import Event

Changelog = list[tuple[bytes, bytes | None]]


def interactions(users: Sequence[int]) -> list[Interaction]:
    return [Interaction(f"u{user}", f"i{number % 3}", 3.0, 10**9 + number) for number, user in enumerate(users)]


def restored(changelog: Changelog, size: int, max_users: int, ordinals: int) -> SupportSets:
    """What a restart makes of the changelog, compacted as the log does it."""
    latest: dict[bytes, tuple[int, bytes | None]] = {key: (offset, value) for offset, (key, value) in enumerate(changelog)}
    sets = SupportSets(size, max_users=max_users)
    for key, (offset, value) in sorted(latest.items(), key=lambda entry: entry[1][0]):
        sets.restore(Record("support", 0, offset, 0, key, value))
    sets.ordinals_given = ordinals
    return sets


@given(
    users=st.lists(st.integers(0, 6), max_size=60),
    cuts=st.sets(st.integers(0, 60)),
    restarts=st.sets(st.integers(0, 60)),
    size=st.integers(1, 4),
    max_users=st.integers(0, 5),
)
def test_they_are_the_fold_however_it_is_cut_into_steps_and_runs(
    users: list[int], cuts: set[int], restarts: set[int], size: int, max_users: int
) -> None:
    sets, fold, changelog = SupportSets(size, max_users=max_users), Fold(size, max_users), Changelog()
    for offset, event in enumerate(interactions(users)):
        before = sets.get(event.user)
        wanted = fold.take(Event(offset, event.user, event.item, event.rating, event.timestamp))
        assert (before.earlier if before else 0) == len(wanted)
        sets.append(event.user, event, ("interactions", 0, offset))
        drawn = sets.draw(4, np.random.default_rng(offset))
        assert all(sets.get(user) is not None for user in drawn), "nobody is drawn whom this step forgets"
        if offset in cuts or offset == len(users) - 1:
            changes = sets.changes()
            sets.commit(changes)
            changelog += changes
            if offset in restarts:
                again = restored(changelog, size, max_users, sets.ordinals_given)
                assert again.draw(3, np.random.default_rng(offset)) == sets.draw(3, np.random.default_rng(offset))
                sets = again
    assert sets.ordinals_given == fold.ordinals
    assert len(sets) == len(fold.users) <= (max_users or 99)
    for user, held in fold.users.items():
        found = sets.get(user)
        assert found is not None
        assert (found.interactions, found.earlier, found.ordinal) == (fold.support(user), len(held.events), held.ordinal)
        assert found.source == ("interactions", 0, held.events[-1].offset)


def test_a_user_forgotten_and_back_within_one_step_takes_the_place_of_the_next() -> None:
    sets = SupportSets(3, max_users=2)
    for offset, event in enumerate(interactions([0, 1])):
        sets.append(event.user, event, ("interactions", 0, offset))
    sets.commit(sets.changes())
    for offset, event in enumerate(interactions([2, 0]), 2):
        sets.append(event.user, event, ("interactions", 0, offset))
    sets.commit(sets.changes())
    assert [sets.get(user) is None for user in ("u0", "u1", "u2")] == [False, True, False]
    assert sets.evicted == 1, "of u0, back at once, nothing was lost but its support"


def test_what_is_discarded_leaves_no_trace() -> None:
    sets = SupportSets(3, max_users=2)
    events = interactions([0, 1, 2, 2, 0])
    sets.append("u0", events[0], ("interactions", 0, 0))
    sets.commit(sets.changes())
    kept = sets.get("u0")
    for offset, event in enumerate(events[1:], 1):
        sets.append(event.user, event, ("interactions", 0, offset))
    sets.discard()
    assert (len(sets), sets.get("u0"), sets.get("u1"), sets.ordinals_after, sets.changes()) == (1, kept, None, 1, [])
    assert decode(sets._values["u0"], Support, what="it") == kept
