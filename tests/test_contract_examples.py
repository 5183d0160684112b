"""docs/contract.md against the code: every example decodes, every field, limit, reason and topic is there, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import msgpack
import msgspec
import pytest

from consumers.opening import topics_of
from consumers.settings import Settings
from streaming import events
from streaming.chunks import HEADER_BYTES
from streaming.codec import DTYPES, array, decode, encode, packed
from streaming.deadletters import KEPT_BYTES
from streaming.log import Record
from streaming.partitioner import partition_of
from streaming.textfiles import MAX_LINE_BYTES
from streaming.topics import COPARTITIONED, DAY_MS, MAX_RECORD_BYTES
from streaming.validation import Limits, decode_interaction, decode_profile

PAGE = (Path(__file__).parent.parent / "docs" / "contract.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```json (\w+)\n(.*?)```", PAGE, re.DOTALL))
RECORDS = {
    name: kind
    for name, kind in vars(events).items()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name not in {"Tensor", "Rows"}
}


def table(before: str) -> dict[str, list[str]]:
    """The first table after ``before``, its rows by their first cell."""
    rows = re.search(r"(?:^\|.*\n)+", PAGE[PAGE.index(before) :], re.MULTILINE)
    assert rows is not None
    cells = [[cell.strip() for cell in row.strip("|\n").split("|")] for row in rows[0].splitlines()[2:]]
    return {first: rest for first, *rest in cells}


def example(name: str) -> msgspec.Struct:
    record = msgspec.json.decode(EXAMPLES[name], type=RECORDS[name], strict=False)
    if isinstance(record, events.Update | events.Version):
        # Their ids stay as they are encoded, which here is JSON.
        rows = {
            table: msgspec.structs.replace(part, ids=msgspec.Raw(packed(msgspec.json.decode(part.ids))))
            for table, part in record.rows.items()
        }
        return msgspec.structs.replace(record, rows=rows)
    return record


def test_every_record_has_an_example() -> None:
    assert set(EXAMPLES) == set(RECORDS)


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_an_example_is_what_the_codec_writes_and_reads(name: str) -> None:
    record = example(name)
    assert decode(encode(record), RECORDS[name], what=name) == record
    assert set(msgpack.unpackb(encode(record), strict_map_key=False)) == set(msgspec.json.decode(EXAMPLES[name])), (
        "the example shows all fields"
    )


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_the_table_of_a_record_names_its_fields_in_order(name: str) -> None:
    before = PAGE[: PAGE.index(f"```json {name}\n")]
    rows = re.findall(r"^\| (\w+) \|", before[before.rindex("| field |") :], re.MULTILINE)
    assert rows[1:] == list(RECORDS[name].__struct_fields__)


def test_examples_that_people_write_pass_the_validation_in_json() -> None:
    interaction, profile = (" ".join(EXAMPLES[name].split()).encode() for name in ("Interaction", "Profile"))
    record = Record("interactions", partition_of(b"196", 8), 0, 0, b"196", interaction)
    assert decode_interaction(record, Limits(), partitions=8) == example("Interaction")
    assert decode_profile(record._replace(value=profile), Limits(), partitions=8) == example("Profile")


def test_tensors_of_the_examples_are_tensors() -> None:
    update = example("Update")
    assert isinstance(update, events.Update)
    assert array(update.rows["item"].values).tolist() == [[1.0, 2.0]]
    assert all(dtype in PAGE for dtype in DTYPES)


def test_the_table_of_topics_is_that_of_the_code() -> None:
    rows, made = table("## Topics"), topics_of(Settings())
    assert set(rows) == set(made)
    for name, topic in made.items():
        _, partitions, kept, default = rows[name]
        assert partitions == ("shared" if name in COPARTITIONED else "1")
        assert (kept == "compacted") == (topic.cleanup == "compact")
        assert ("size" in kept) == (topic.retention_bytes is not None)
        if topic.cleanup == "compact":
            continue
        if topic.retention_bytes is not None:
            size = f"{topic.retention_bytes >> 20} MiB" if topic.retention_bytes < 1 << 30 else f"{topic.retention_bytes >> 30} GiB"
            assert default == size + (" a partition" if name in COPARTITIONED else "")
        elif name != "trainer-lock":  # to which nothing is written
            days = (topic.retention_ms or 0) // DAY_MS
            assert default == (f"{days} day{'s' if days > 1 else ''}" if days else "for ever")


def test_reasons_are_those_of_the_code() -> None:
    assert set(table("| reason | the record |")) == events.REASONS


def test_limits_are_those_of_the_code() -> None:
    assert {name: row[0] for name, row in table("### Limits").items()} == {field.name: str(field.default) for field in fields(Limits)}


def test_sizes_are_those_of_the_code() -> None:
    assert f"{MAX_RECORD_BYTES:,} bytes together" in PAGE
    assert f"header of {HEADER_BYTES}\nbytes" in PAGE
    assert f"the first {KEPT_BYTES:,} bytes" in PAGE
    assert f"{MAX_LINE_BYTES:,} bytes" in PAGE
    assert events.FORMAT == 1
