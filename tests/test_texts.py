"""Ids that stay where a record holds them are the same as texts of their own, looked up in a dictionary."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import model.texts
import streaming.codec
from consumers.histories import history_of, history_of_encoded
from consumers.wire import rows_from_wire, rows_to_wire
from model.history import History, rated
from model.packing import begin_of, byte, rows_of, text_at, texts_of
from model.profiles import Profiles
from model.settings import Feature
from model.tables import Table
from model.texts import Index, Texts
from streaming.codec import decode, encode, packed
from streaming.errors import FormatMismatch, Malformed
from streaming.events import Support

IDS = st.one_of(st.sampled_from(["", "a", "b", "ab", "é", "i1"]), st.text(max_size=4), st.integers(30, 300).map(lambda n: "x" * n))
TIMES = st.sampled_from(
    [0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 880_000_000_000, -1, -32, -33, -128, -129, -(2**31), -(2**40)]
)
ROWS = st.lists(st.tuples(IDS, st.floats(allow_nan=False), TIMES), max_size=20)


def texts(ids: list[str]) -> Texts:
    ends = np.cumsum([3, *(len(each.encode()) for each in ids)])
    return Texts(b"???" + "".join(ids).encode() + b"!", np.stack([ends[:-1], ends[1:]], 1))


def support(rows: list[tuple[str, float, int]]) -> Support:
    return Support(rows, ("interactions", 0, 7), len(rows), 3)


def profiles() -> Profiles:
    table = Table("item", 3, deviation=0.1, zero_from=2, seed=1, max_rows=10_000, overflow_rows=2)
    return Profiles({"id": Feature(kind="id")}, table)


@given(st.lists(IDS, max_size=8), IDS, st.integers(-9, 9), st.integers(-9, 9))
def test_texts_are_a_sequence_of_them(ids: list[str], other: str, low: int, high: int) -> None:
    found = texts(ids)
    assert (list(found), len(found), found[low:high]) == (ids, len(ids), ids[low:high])
    assert [found[place] for place in range(len(ids))] == ids
    assert all(each in found for each in ids)
    assert (other in found) == (other in ids)
    number: object = 7
    assert number not in found


class IndexMachine(RuleBasedStateMachine):
    """An index beside a dictionary; numbers of removed keys are given again, as places are."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, int] = {f"k{number}": number for number in range(3)}
        self.index = Index(self.known)
        self.free = list[int]()
        self.removed = set[str]()

    @rule(keys=st.lists(IDS, min_size=1, max_size=40))
    def add(self, keys: list[str]) -> None:
        for key in keys:
            if key not in self.known:
                self.known[key] = self.free.pop() if self.free else len(self.known)
                self.index.add(key, self.known[key])

    @rule(first=st.integers(0, 50), count=st.integers(1, 30))
    def come_and_go(self, first: int, count: int) -> None:
        self.add([f"go{number}" for number in range(first, first + count)])
        for number in range(first, first + count):
            self.remove(f"go{number}")

    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        if self.known:
            self.remove(data.draw(st.sampled_from(sorted(self.known))))

    @rule()
    def begin_anew(self) -> None:
        self.index = Index(self.known)

    def remove(self, key: str) -> None:
        self.free.append(self.known.pop(key))
        self.index.remove(key)
        self.removed.add(key)

    @invariant()
    def finds_what_the_dictionary_finds(self) -> None:
        asked = [*self.known, *self.removed, "never", *self.known]
        found, unknown = self.index.of(texts(asked))
        expected = [self.known.get(key, -1) for key in asked]
        assert found.tolist() == expected
        assert unknown == expected.count(-1)


TestIndex = IndexMachine.TestCase


def test_an_index_keeps_no_more_than_a_few_times_what_it_holds() -> None:
    index = Index({"stays": 0})
    for number in range(20_000):
        index.add(f"comes and goes {number}", 1)
        index.remove(f"comes and goes {number}")
    assert index.of(texts(["stays", "comes and goes 19999"]))[0].tolist() == [0, -1]
    assert len(index._slots) <= 128
    assert len(index._keys) <= 8192


@given(st.lists(IDS | st.integers(250, 70_000).map(lambda n: "x" * n), max_size=40))
def test_texts_are_packed_as_the_encoder_packs_them_and_found_there_again(ids: list[str]) -> None:
    value = texts(ids).packed()
    assert value == packed(ids)
    spans, end = texts_of(np.frombuffer(value, np.uint8), 0)
    # What the loop leaves to the decoder: letters beyond ASCII, and what takes more than two bytes to say its length.
    if all(each.isascii() and len(each) < 65_536 for each in ids):
        assert (end, list(Texts(value, spans))) == (len(value), ids)
    else:
        assert end == -1


@pytest.mark.parametrize("count", [0, 15, 16, 65_535, 65_536])
def test_any_number_of_texts_is_packed_as_the_encoder_packs_it(count: int) -> None:
    assert texts(["a"] * count).packed() == packed(["a"] * count)


@given(st.lists(IDS, max_size=30), st.data())
def test_rows_come_back_from_the_wire_or_are_refused(ids: list[str], data: st.DataObject) -> None:
    wire = rows_to_wire({"item": (texts(ids), torch.zeros(len(ids), 2))})
    assert wire == rows_to_wire({"item": (ids, torch.zeros(len(ids), 2))})
    assert list(rows_from_wire(wire)["item"][0]) == ids
    value = bytearray(bytes(wire["item"].ids))
    value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    damaged = {"item": msgspec.structs.replace(wire["item"], ids=msgspec.Raw(bytes(value)))}
    try:
        expected: object = decoded(bytes(value))
    except Malformed:
        expected = Malformed
    try:
        found: object = list(rows_from_wire(damaged)["item"][0])
    except Malformed:
        found = Malformed
    assert found == expected


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (0, 2), (3,), (4, 2), (3, 2, 1)])
def test_rows_without_a_value_for_each_id_are_refused(shape: tuple[int, ...]) -> None:
    """One row for three ids would be given to all of them."""
    wire = rows_to_wire({"item": (["a", "b", "c"], torch.zeros(shape))})
    with pytest.raises(Malformed, match="3 ids"):
        rows_from_wire(wire)


def decoded(value: bytes) -> list[str]:
    return streaming.codec.texts(value, what="ids")


def test_nothing_is_read_outside_of_what_an_index_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python runs the loops, where a read past the end is an error; number 0 is gone, and the keys were packed anew since."""
    index = Index({"x" * 5000: 1, "zero": 0})
    for key in ("zero", "x" * 5000):
        index.remove(key)
    for number in range(40):
        index.add(f"g{number}", 1)
        index.remove(f"g{number}")
    index.add("", 2)
    assert len(index._keys) < 5000, "else it would show nothing"
    for name in ("word", "hashed", "same", "same_words", "same_half", "number_in", "find"):
        monkeypatch.setattr(f"model.texts.{name}", as_python(getattr(model.texts, name)))
    monkeypatch.setattr("model.texts.loaded", eight_bytes)
    monkeypatch.setattr("model.texts.ask_for", lambda rows, row: None)
    monkeypatch.setattr("model.texts.mixed", lambda left, right: folded(int(left) * int(right)))
    asked = texts(["unknown", "zero", "", "g39", "of more than one word", "g1"])
    with np.errstate(over="ignore"):
        found, unknown = as_python(model.texts.numbers_of)(
            asked.bytes, asked.spans, model.texts.SECRET, index._keys, index._spans, index._slots
        )
    assert (found.tolist(), unknown) == ([-1, -1, 2, -1, -1, -1], 5)


def eight_bytes(buffer: np.ndarray, at: int) -> np.uint64:
    """As `model.words.loaded`, where they are all there."""
    assert 0 <= at <= len(buffer) - 8
    return np.uint64(int.from_bytes(bytes(buffer[at : at + 8]), "little"))


def folded(product: int) -> np.uint64:
    """The halves of a product, one xor the other."""
    return np.uint64(product >> 64 ^ product & 2**64 - 1)


@given(st.binary(max_size=40), st.data())
def test_hashes_and_comparisons_are_of_the_bytes_alone_wherever_they_lie(text: bytes, data: st.DataObject) -> None:
    before, behind = data.draw(st.binary(max_size=12)), data.draw(st.binary(max_size=12))
    there, alone = np.frombuffer(before + text + behind, np.uint8), np.frombuffer(text, np.uint8)
    start, end, secret = len(before), len(before) + len(text), np.uint64(data.draw(st.integers(0, 2**64 - 1)))
    expected = secret ^ np.uint64(len(text))
    for at in range(0, len(text), 8):
        expected = folded(int(expected ^ np.uint64(int.from_bytes(text[at : at + 8], "little"))) * 0x9E3779B97F4A7C15)
    assert (
        np.uint64(model.texts.hashed(there, start, end, secret)) == expected == np.uint64(model.texts.hashed(alone, 0, end - start, secret))
    )
    assert model.texts.same(there, start, end, alone, 0, len(alone))
    for place in range(len(text)):
        other = bytearray(text)
        other[place] ^= 1 << data.draw(st.integers(0, 7))
        assert not model.texts.same(there, start, end, np.frombuffer(other, np.uint8), 0, len(other))
        assert not model.texts.same(there, start, end, alone, 0, place)


@given(st.lists(st.lists(IDS, max_size=5), max_size=6))
def test_texts_joined_are_those_of_all_parts(parts: list[list[str]]) -> None:
    assert list(model.texts.joined([texts(part) for part in parts])) == [text for part in parts for text in part]


@given(ROWS)
def test_an_encoded_support_set_gives_the_history_that_the_decoded_one_gives(rows: list[tuple[str, float, int]]) -> None:
    value = encode(support(rows))
    found, expected = history_of_encoded(value), history_of(decode(value, Support, what="support set"))
    assert isinstance(found.items, Texts) == all(item.isascii() for item, _, _ in rows)
    assert (list(found.items), found.ratings, list(found.numbers)) == (expected.items, expected.ratings, list(expected.numbers))
    np.testing.assert_array_equal(rated([found], profiles())[0], rated([expected], profiles())[0])
    for item in ("i1", "new"):
        after, wanted = found.and_then(item, 4.0, 5), expected.and_then(item, 4.0, 5)
        assert (after.items, after.ratings, list(after.numbers)) == (wanted.items, wanted.ratings, list(wanted.numbers))
        np.testing.assert_array_equal(rated([after], profiles())[0], rated([wanted], profiles())[0])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300, 70_000])
def test_of_any_length(count: int) -> None:
    rows = [(f"i{number % 1000}", float(number % 5), number) for number in range(count)]
    found, expected = history_of_encoded(encode(support(rows))), history_of(support(rows))
    assert (list(found.items), found.ratings) == (expected.items, expected.ratings)
    assert isinstance(found.items, Texts) == (count < 65_536)


@given(ROWS, st.integers(0, 2000), st.integers(0, 255))
def test_what_is_damaged_is_taken_or_refused_as_the_decoder_does(rows: list[tuple[str, float, int]], place: int, other: int) -> None:
    value = bytearray(encode(support(rows)))
    value[place % len(value)] = other

    def read(how: Callable[[bytes], History]) -> object:
        try:
            history = how(bytes(value))
        except (Malformed, FormatMismatch) as error:
            return type(error)
        return list(history.items), np.array(history.ratings).tobytes(), list(history.numbers)

    assert read(history_of_encoded) == read(lambda damaged: history_of(decode(damaged, Support, what="support set")))


@pytest.mark.parametrize("item", ["\u00e9", "\u4e2d\u6587", "i1"])
def test_ids_beyond_ascii_are_for_the_decoder(item: str) -> None:
    found = history_of_encoded(encode(support([("a", 1.0, 1), (item, 2.0, 2)])))
    assert isinstance(found.items, Texts) == item.isascii()
    assert list(found.items) == ["a", item]


@given(ROWS, st.integers(0, 400))
def test_what_is_cut_short_is_refused_as_ever(rows: list[tuple[str, float, int]], length: int) -> None:
    value = encode(support(rows))
    with pytest.raises(Malformed):
        history_of_encoded(value[: min(length, len(value) - 1)])


@given(
    st.binary(max_size=80) | ROWS.map(lambda rows: b"".join(map(msgspec.msgpack.encode, rows))),
    st.integers(0, 6),
    st.integers(0, 90),
    st.binary(max_size=2),
    st.booleans(),
)
def test_bytes_of_any_kind_are_read_within_their_bounds(value: bytes, count: int, place: int, other: bytes, long: bool) -> None:
    value = head(count, long) + value[:place] + other + value[place + len(other) :]
    rows, buffer = strict(value), np.frombuffer(value, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        # As Python runs it, a read past the end is an error.
        for name, loop in (("byte", byte), ("begin_of", begin_of), ("text_at", text_at)):
            patch.setattr(f"model.packing.{name}", as_python(loop))
        assert (as_python(rows_of)(buffer, 0)[2] >= 0) == (rows is not None)
        as_python(texts_of)(buffer, 0)
    spans, floats, end = rows_of(buffer, 0)
    assert (end >= 0) == (rows is not None)
    if rows is not None:
        assert end <= len(value)
        assert [value[start:stop] for start, stop in spans.tolist()] == [text for text, _ in rows]
        np.testing.assert_array_equal(floats, [number for _, number in rows])


def test_every_loop_is_compiled_before_anybody_waits(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "not compiled:", "what stands behind it is compiled in somebody's step"


COMPILED = """
from consumers.settings import Settings
from consumers.system import compile_loops
from model import packing, texts
compile_loops(Settings())
# Python never calls these.
inner = {"word", "hashed", "same", "same_words", "byte", "begin_of", "text_at", "head", "same_half", "number_in", "rows_of", "last_of_each"}
loops = {name: loop for name, loop in (vars(texts) | vars(packing)).items() if hasattr(loop, "signatures")}
print("not compiled:", *(name for name, loop in loops.items() if name not in inner and not loop.signatures))
"""


@pytest.mark.parametrize("value", [b"", b"\xdc", b"\xdc\x00", b"\xdd\x00\x00\x00\x00", b"\x80", b"\xa0", b"\xdc\xff\xff"])
def test_what_is_no_array_has_no_rows(value: bytes) -> None:
    assert rows_of(np.frombuffer(value, np.uint8), 0)[2] == -1


def as_python(loop: Any) -> Any:  # noqa: ANN401 - Numba's
    """A loop as it was before it was compiled."""
    return loop.py_func


def head(count: int, long: bool) -> bytes:
    """How an array of so many begins."""
    return b"\xdc" + count.to_bytes(2) if long else bytes([0x90 | count])


def strict(value: bytes) -> list[tuple[bytes, float]] | None:
    """What stands there, by a plain reading; None where it is anything else."""
    count, at = (int.from_bytes(value[1:3]), 3) if value[0] == 0xDC else (value[0] & 15, 1)
    rows = []
    sizes = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
    try:
        for _ in range(count):
            if value[at] != 0x93:
                return None
            kind, at = value[at + 1], at + 2
            if kind in (0xD9, 0xDA):
                head = kind - 0xD8
                size, at = int.from_bytes(value[at : at + head]), at + head
            elif kind >> 5 == 5:
                size = kind & 31
            else:
                return None
            text, at = value[at : at + size], at + size
            if not text.isascii():
                return None
            if value[at] != 0xCB:
                return None
            number = float(np.frombuffer(value[at + 1 : at + 9], ">f8")[0])
            kind, at = value[at + 9], at + 10 + sizes.get(value[at + 9], 0)
            if (0x80 <= kind < 0xE0 and kind not in sizes) or at > len(value):
                return None
            rows.append((text, number))
    except (IndexError, ValueError):
        return None
    return rows


def places(items: Profiles, ids: list[str]) -> list[int]:
    """Those of texts that lie in a buffer, which are those of a list as well."""
    found: Any = items.places(texts(ids))
    assert found.tolist() == items.places(ids).tolist()
    return list(map(int, found))


def test_places_are_the_same_however_they_are_asked_for() -> None:
    items = profiles()
    first = places(items, ["a", "b", "a", "é"])
    assert first == [0, 1, 0, 2]
    items.places(["c"])
    assert places(items, ["c", "d", "d"]) == [3, 4, 4]
    items.set("b", {})
    items.set("b", None)
    assert places(items, ["e"]) == [1], "the place of b is given to another"
    assert places(items, ["b", "e"]) == [5, 1]
    items.table.clear()
    items.begin()
    assert places(items, ["e", "b"]) == [0, 1]


def test_a_history_of_texts_goes_on_from_event_to_event() -> None:
    items = profiles()
    history = history_of_encoded(encode(support([("a", 1.0, 1), ("b", 2.0, 2)])))
    for number, item in enumerate(["c", "d", "e"]):
        rated([history], items)
        history = history.and_then(item, float(number), 3)
    assert history.items == ["c", "d", "e"]
    assert rated([history], items)[0][:, 0].tolist() == items.places(["c", "d", "e"]).tolist()
