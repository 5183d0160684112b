"""What holds support sets, in memory or in a file, against plain lists: the same answers, whenever the file is settled or opened anew."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from streaming.codec import encode
from streaming.events import Forgotten, Support
from streaming.store.file import Place
from streaming.store.held import Covered, Held, InMemory
from streaming.store.stored import Stored

PLACE = Place("g", "support", 0)
USERS = [f"u{number}" for number in range(6)]

Change = tuple[str, str]
changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "again", "drop", "forget", "settle", "reopen", "oldest"]),
        st.sampled_from(USERS),
    ),
    max_size=60,
)


class Plain:
    """The oracle: every user's last value in a list in the order of last changes."""

    def __init__(self) -> None:
        self.sets: list[tuple[str, int, bytes]] = []
        self.markers: dict[str, int] = {}

    def put(self, user: str, ordinal: int | None, since: int, value: bytes | None) -> None:
        self.sets = [entry for entry in self.sets if entry[0] != user]
        self.markers.pop(user, None)
        if since:
            self.markers[user] = since
        if value is not None and ordinal is not None:
            self.sets.append((user, ordinal, value))


def agree(held: Held, plain: Plain, ordinals: int) -> None:
    assert len(held) == len(plain.sets)
    values = {user: value for user, _, value in plain.sets}
    for user in USERS:
        assert held.value(user) == values.get(user)
        assert held.since(user) == plain.markers.get(user, 0)
    by_ordinal = {ordinal: user for user, ordinal, _ in plain.sets}
    for ordinal in range(ordinals + 1):
        assert held.user_of(ordinal) == by_ordinal.get(ordinal)


@given(changes, st.booleans())
def test_both_answer_as_plain_lists_do(todo: list[Change], in_file: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        held: Held = Stored(path, PLACE, ordered=True) if in_file else InMemory()
        plain, ordinals, of_user = Plain(), 0, dict[str, int]()
        for number, (what, user) in enumerate(todo, 1):
            held.covered = Covered(number, 1000 + number, "x", b"p%d" % number)
            if what in {"set", "again"}:
                if what == "set" and user not in {entry[0] for entry in plain.sets}:
                    of_user[user], ordinals = ordinals, ordinals + 1
                if user in of_user:
                    ordinal = of_user[user]
                    value = encode(Support([(f"i{number}", 3.0, number)], ("interactions", 0, number), 1, ordinal))
                    held.put(user, value)
                    plain.put(user, ordinal, 0, value)
            elif what == "drop":
                held.put(user, None)
                plain.put(user, None, 0, None)
            elif what == "forget":
                held.put(user, encode(Forgotten(number)))
                plain.put(user, None, number, None)
            elif what == "settle":
                held.settle()
                assert held.behind == 0
            elif what == "oldest":
                expected = [entry[0] for entry in plain.sets if entry[0] not in {user, "u0"}]
                assert held.oldest({user, "u0"}) == (expected[0] if expected else None)
            elif what == "reopen" and in_file:
                held.close()
                held = Stored(path, PLACE, ordered=number % 2 == 0)
                held.close()
                held = Stored(path, PLACE, ordered=True)
                assert held.set_aside == ""
                assert held.covered == Covered(number, 1000 + number, "x", b"p%d" % number)
            held.grew(None)
            agree(held, plain, ordinals)
        held.close()
