"""Historical logs in every form that is read: one suite for all, then what each has of its own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import SourceError
from streaming.sources import Column, Entry, Mapped, Source, interaction_source, profile_source
from streaming.textfiles import MAX_LINE_BYTES, Layout, Place
from streaming.timeorder import by_time
from streaming.validation import Limits

Row = tuple[object, ...]
Rows = Sequence[Row]
Write = Callable[[Rows], str]
ROWS: list[Row] = [
    ("196", "242", 3, 881250949000),
    ("186", "é,b", 4.5, 891717742000),
    ("22", "377", 1, 878887116000),
    ("196", "51", 2, 880606923000),
]
NAMES = ("user", "item", "rating", "timestamp")


def csv_text(rows: Rows) -> str:
    return "".join(",".join(f'"{field}"' if "," in str(field) else str(field) for field in row) + "\n" for row in rows)


def joined(delimiter: str) -> Write:
    return lambda rows: "".join(delimiter.join(map(str, row)) + "\n" for row in rows)


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(dict(zip(NAMES, row, strict=False))) + "\n" for row in rows)


class Form:
    """A way to write a file, and the settings that read it."""

    def __init__(
        self, name: str, suffix: str, write: Write, header: tuple[str, ...] = (), encoding: str = "utf-8", **settings: object
    ) -> None:
        self.name, self.suffix, self.write, self.header, self.encoding, self.settings = name, suffix, write, header, encoding, settings

    def file(self, folder: Path, rows: Rows) -> Path:
        data = self.write([self.header, *rows] if self.header else rows).encode(self.encoding)
        path = folder / f"log{self.suffix}"
        path.write_bytes(gzip.compress(data) if self.suffix.endswith(".gz") else data)
        return path

    def source(self, folder: Path, rows: Rows) -> Source:
        return interaction_source(self.file(folder, rows), **self.settings)  # type: ignore[arg-type]


BY_PLACE = Mapped(0, 1, 2, 3)
TYPED = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
RECBOLE = Mapped("user_id", "item_id")
PLAIN = [
    Form("csv", ".csv", csv_text, NAMES),
    Form("tsv", ".tsv", joined("\t"), NAMES),
    Form("jsonl", ".jsonl", jsonl),
    Form("csv without a header", ".csv", csv_text, layout=Layout(header=False), columns=BY_PLACE),
    Form("ml-1m", ".dat", joined("::"), layout=Layout("csv", "::", header=False, encoding="latin-1"), columns=BY_PLACE, encoding="latin-1"),
    Form("recbole", ".inter", joined("\t"), TYPED, columns=RECBOLE),
    Form("recbole, types kept", ".inter", joined("\t"), TYPED, columns=Mapped(*TYPED), layout=Layout(strip_types=False)),
    Form("semicolons", ".csv", joined(";"), NAMES, layout=Layout(delimiter=";")),
    Form("by byte order mark", ".csv", csv_text, NAMES, encoding="utf-8-sig"),
]
FORMS = [
    *PLAIN,
    *(Form(f"{form.name}, gzip", form.suffix + ".gz", form.write, form.header, form.encoding, **form.settings) for form in PLAIN),
]
every = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


def entries(source: Source, place: Place | None = None) -> list[Entry]:
    return [entry for entry, _ in source.entries(place or Place())]


def wanted(row: Row) -> tuple[bytes, dict[str, object], int]:
    return str(row[0]).encode(), dict(zip(NAMES, row, strict=True)), int(str(row[3]))


def given_by(entry: Entry) -> tuple[bytes | None, object, int | None]:
    assert entry.error is None, entry.error
    return entry.key, msgpack.unpackb(entry.value), entry.timestamp


def problem(entry: Entry) -> tuple[int, str]:
    assert entry.error is not None
    return entry.line.number, entry.error.reason


@every
def test_every_line_is_a_record_with_its_key_and_time(form: Form, tmp_path: Path) -> None:
    assert [given_by(entry) for entry in entries(form.source(tmp_path, ROWS))] == [wanted(row) for row in ROWS]


@every
def test_reading_goes_on_from_any_place(form: Form, tmp_path: Path) -> None:
    source = form.source(tmp_path, ROWS)
    whole = entries(source)
    for read, entry in enumerate(whole, 1):
        assert entries(source, Place(entry.line.number, entry.line.end)) == whole[read:]


@every
def test_the_share_read_rises_to_one(form: Form, tmp_path: Path) -> None:
    shares = [share for _, share in form.source(tmp_path, ROWS * 50).entries()]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1


@every
def test_a_bad_line_is_an_entry_with_its_reason_and_number(form: Form, tmp_path: Path) -> None:
    rows = [ROWS[0], ("1", "2", "many", 881250949000), ("1", "", 3, 881250949000), ("1", "2", 9, 881250949000), ("1", "2"), ROWS[1]]
    source = form.source(tmp_path, rows)
    found = entries(source)
    first = 2 if form.header else 1
    assert given_by(found[0]) == wanted(ROWS[0])
    assert given_by(found[-1]) == wanted(ROWS[1])
    short = "not-decodable" if form.header else "missing-field"
    assert [problem(entry)[0] for entry in found[1:-1]] == list(range(first + 1, first + 5))
    reasons = [problem(entry)[1] for entry in found[1:-1]]
    assert reasons[0] == "wrong-type"
    assert reasons[1] in {"missing-field", "bad-id"}
    assert reasons[2] == "rating-off-scale"
    assert reasons[3] == short
    assert found[1].value == found[1].line.raw, "the dead letter holds the line"


@every
def test_blank_lines_carriage_returns_and_a_missing_last_break_change_nothing(form: Form, tmp_path: Path) -> None:
    path = form.file(tmp_path, ROWS)
    data = gzip.decompress(path.read_bytes()) if form.suffix.endswith(".gz") else path.read_bytes()
    data = data.replace(b"\n", b"\r\n\r\n  \n").rstrip()
    path.write_bytes(gzip.compress(data) if form.suffix.endswith(".gz") else data)
    source = interaction_source(path, **form.settings)  # type: ignore[arg-type]
    assert [given_by(entry) for entry in entries(source)] == [wanted(row) for row in ROWS]
    assert entries(source)[1].line.number == (7 if form.header else 4)


@every
def test_an_endless_line_is_passed_over_in_bounded_memory(form: Form, tmp_path: Path) -> None:
    found = entries(form.source(tmp_path, [ROWS[0], ("1", "x" * (3 * MAX_LINE_BYTES), 1, 1), ROWS[1]]))
    assert problem(found[1])[1] == "too-large"
    assert len(found[1].line.raw) == 4096
    assert given_by(found[2]) == wanted(ROWS[1])


@every
def test_by_time_is_a_stable_sort_with_lines_without_time_last(form: Form, tmp_path: Path) -> None:
    rows = [*ROWS, ("7", "bad", 3, "never"), *(("u", str(i), 3, 880000000000) for i in range(5)), ("8", "x" * 70_000, 1, 1)]
    source = form.source(tmp_path, rows)
    taken = [row for row in rows if row[0] not in {"7", "8"}]
    found = [entry for entry, _ in by_time(source)]
    assert [given_by(entry) for entry in found[:-2]] == [wanted(row) for row in sorted(taken, key=lambda row: int(str(row[3])))]
    assert [problem(entry)[1] for entry in found[-2:]] == ["wrong-type", "too-large"]
    assert [(e.line.number, e.key, e.value) for e, _ in by_time(source, skip=4)] == [(e.line.number, e.key, e.value) for e in found[4:]]
    assert [share for _, share in by_time(source)][-1] == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30), st.data())
def test_by_time_against_sorted(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    rows: list[Row] = [(user, i, 3, 881250949000 + t) for i, (user, t) in enumerate(pairs)]
    source = FORMS[0].source(tmp_path_factory.mktemp("rows"), rows)
    skip = data.draw(st.integers(0, len(rows)))
    assert [e.line.number - 2 for e, _ in by_time(source, skip)] == sorted(range(len(rows)), key=lambda i: int(str(rows[i][3])))[skip:]


def test_sorting_is_bounded(tmp_path: Path) -> None:
    source = FORMS[0].source(tmp_path, ROWS)
    with pytest.raises(SourceError, match="more than 100 bytes at line 4, too much to sort in memory; sort the file"):
        list(by_time(source, max_bytes=100))


@pytest.mark.parametrize(
    ("unit", "text", "milliseconds"),
    [
        ("ms", "881250949000", 881250949000),
        ("ms", "881250949000.0", 881250949000),
        ("ms", "8.81250949e11", 881250949000),
        ("ms", "881250949", 881250949),  # seconds taken for milliseconds are January 1970: nothing is guessed
        ("s", "881250949", 881250949000),
        ("s", "881250949.25", 881250949250),
        ("iso", "1997-12-04T15:55:49Z", 881250949000),
        ("iso", "1997-12-04 15:55:49", 881250949000),
        ("iso", "1997-12-04T16:55:49.500+01:00", 881250949500),
        ("iso", "1997-12-04", 881193600000),
        ("ms", "881250949000.5", None),
        ("ms", "8812_50949000", None),
        ("ms", "nan", None),
        ("s", "inf", None),
        ("s", "1e300", None),
        ("s", "٣" * 9, 333333333000),
        ("iso", "881250949", None),
        ("iso", "0001-01-01T00:00:00+14:00", None),
        ("iso", "9999-12-31", None),
        ("ms", "9" * 5000, None),
    ],
)
def test_units_of_time(unit: str, text: str, milliseconds: int | None, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"user,item,rating,timestamp\n1,2,3,{text}\n", encoding="utf-8")
    (entry,) = entries(interaction_source(tmp_path / "log.csv", timestamps=unit))  # type: ignore[arg-type]
    assert entry.timestamp == milliseconds
    assert (entry.error is None) == (milliseconds is not None)


def test_jsonl_keeps_its_types(tmp_path: Path) -> None:
    lines = [
        {"user": 7, "item": "a", "rating": 3, "timestamp": 881250949, "more": [1]},
        {"user": True, "item": "a", "rating": 3, "timestamp": 881250949},
        {"user": "7", "item": "a", "rating": 3, "timestamp": None},
        [1],
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n" + "[" * 60_000 + "\n", encoding="utf-8")
    first, *bad = entries(interaction_source(path, timestamps="s"))
    assert given_by(first) == (b"7", {"user": "7", "item": "a", "rating": 3.0, "timestamp": 881250949000}, 881250949000)
    assert [problem(entry)[1] for entry in bad] == ["wrong-type", "missing-field", "not-a-map", "too-deep"]


def test_a_stray_quote_costs_its_own_line_only(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('user,item,rating,timestamp\n1,"2,3,881250949000\n1,2,3,881250949000\n', encoding="utf-8")
    bad, good = entries(interaction_source(path))
    assert problem(bad) == (2, "not-decodable")
    assert good.error is None


def test_bytes_that_are_not_in_the_encoding_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("user,item,rating,timestamp\né,2,3,881250949000\n".encode("latin-1"))
    assert problem(entries(interaction_source(path))[0]) == (2, "invalid-utf8")
    assert entries(interaction_source(path, layout=Layout(encoding="latin-1")))[0].key == "é".encode()


USERS = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t24\tM\ttechnician\t85711\n2\t53\tF\t\t94043\n"
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    '1\tToy "Story"\t1995\tAnimation Children\'s Comedy\n267\tunknown\t\t\n'
)


def features(source: Source) -> dict[bytes | None, object]:
    return {entry.key: msgpack.unpackb(entry.value)["features"] for entry in entries(source) if entry.error is None}


def test_recbole_profiles_need_no_settings_but_the_id(tmp_path: Path) -> None:
    (tmp_path / "ml.user").write_text(USERS, encoding="utf-8")
    (tmp_path / "ml.item").write_text(ITEMS, encoding="utf-8")
    assert features(profile_source(tmp_path / "ml.user", id_column="user_id")) == {
        b"1": {"age": "24", "gender": "M", "occupation": "technician", "zip_code": "85711"},
        b"2": {"age": "53", "gender": "F", "zip_code": "94043"},
    }
    assert features(profile_source(tmp_path / "ml.item", id_column="item_id")) == {
        b"1": {"movie_title": ["Toy", '"Story"'], "release_year": "1995", "class": ["Animation", "Children's", "Comedy"]},
        b"267": {"movie_title": ["unknown"]},
    }


def test_columns_of_profiles_can_be_chosen_and_renamed(tmp_path: Path) -> None:
    (tmp_path / "users.dat").write_text("1::F::24::a|b\n2::M::old::c\n", encoding="utf-8")
    columns = [Column(2, "number", "age"), Column(3, "list", "tags", separator="|"), Column(1, feature="gender")]
    source = profile_source(tmp_path / "users.dat", id_column=0, columns=columns, layout=Layout("csv", "::", header=False))
    assert features(source) == {b"1": {"age": 24.0, "tags": ["a", "b"], "gender": "F"}}
    assert problem(entries(source)[1]) == (2, "wrong-type")


def test_profiles_in_jsonl_are_taken_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"id": 3, "year": 1995, "genres": ["a", "b"]}\n{"year": 1}\n{"id": ""}\n', encoding="utf-8")
    source = profile_source(tmp_path / "items.jsonl", id_column="id")
    assert features(source) == {b"3": {"year": 1995.0, "genres": ["a", "b"]}}
    assert [problem(entry)[1] for entry in entries(source)[1:]] == ["missing-field", "bad-id"]


def test_limits_hold_for_lines_too(tmp_path: Path) -> None:
    source = interaction_source(FORMS[0].file(tmp_path, [("1", "2", 9, 881250949000)]), limits=Limits(rating_max=10))
    assert entries(source)[0].error is None


def broken_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(csv_text([NAMES, *ROWS * 1000]).encode())[:-50])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("none.csv", {}, "there is no such file"),
        ("log.txt", {}, "the name does not tell the format"),
        ("log.csv", {"columns": Mapped(user="uid")}, "there is no column 'uid'; cut by ',' there are user, item, rating, timestamp"),
        ("log.csv", {"columns": Mapped(user=4)}, "there is no column 4"),
        ("log.csv", {"layout": Layout(header=False)}, "without a header, column 'user' must be given by its position"),
        ("log.csv", {"layout": Layout(encoding="klingon")}, "no such encoding: klingon"),
        ("log.csv", {"layout": Layout(encoding="utf-16")}, "convert it to utf-8"),
        ("log.csv", {"layout": Layout(encoding="U16")}, "convert it to utf-8"),
        ("log.csv", {"layout": Layout(delimiter='"')}, "a delimiter cannot hold"),
        ("empty.csv", {}, "no header"),
        ("twice.csv", {}, "names a column twice"),
        ("broken.csv.gz", {}, "cannot be read"),
        ("plain.csv.gz", {}, "cannot be read"),
        (".", {"layout": Layout("csv")}, "is no file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name: str, settings: dict[str, object], message: str, tmp_path: Path) -> None:
    for file in ("log.csv", "log.txt", "plain.csv.gz"):
        (tmp_path / file).write_text(csv_text([NAMES, *ROWS]), encoding="utf-8")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "twice.csv").write_text("user,user,item\n", encoding="utf-8")
    broken_gzip(tmp_path / "broken.csv.gz")
    with pytest.raises(SourceError, match=message) as caught:
        entries(interaction_source(tmp_path / name, **settings))  # type: ignore[arg-type]
    assert str(tmp_path) in str(caught.value)


def test_columns_without_a_type_are_what_the_schema_says_and_texts_where_it_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text("movieId,year,title,genres,tags:token_seq\n1,1995,Toy Story,Animation|Comedy,a b\n", "utf-8")
    source = profile_source(tmp_path / "movies.csv", id_column="movieId", kinds={"year": "numeric", "genres": "multivalued"})
    (entry,) = entries(source)
    assert entry.key == b"1"
    assert msgspec.msgpack.decode(entry.value or b"")["features"] == {
        "year": 1995.0,
        "title": "Toy Story",
        "genres": ["Animation", "Comedy"],
        "tags": ["a", "b"],
    }


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    line = b"196,242,3,881250949000\n"
    path.write_bytes(b"user,item,rating,timestamp\n" + line * 100_000)
    before = interaction_source(path)
    seen = {before.file.digest()}
    for at in (30, -3):
        data = bytearray(path.read_bytes())
        data[at] = ord("9")
        path.write_bytes(data)
        seen.add(interaction_source(path).file.digest())
    assert len(seen) == 3
    assert interaction_source(path).settings == before.settings
    assert interaction_source(path, timestamps="s").settings != before.settings
