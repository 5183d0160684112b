"""Dead letters: what they keep of a record that could not be taken."""

from __future__ import annotations

import hashlib
from pathlib import Path

from streaming.codec import decode
from streaming.deadletters import KEPT_BYTES, LETTER_BYTES, dead_letter, dead_letter_message
from streaming.errors import Malformed
from streaming.events import DeadLetter
from streaming.log import Message, Record
from tests.small_runs import Stream, fill, run, small
from tests.test_promises import findings
from tests.test_validation import record, refused


def test_a_dead_letter_tells_what_where_and_why() -> None:
    value, key = b"\xc1" * 10_000, b"k" * 500_000
    error = refused(value)
    letter = dead_letter(record(value, key), error)
    assert letter == DeadLetter(
        reason="not-decodable",
        detail=error.detail,
        source=("interactions", 0, 17),
        key=key[:KEPT_BYTES],
        value=value[:KEPT_BYTES],
        length=10_000,
        digest=hashlib.sha256(value).hexdigest(),
    )
    message = dead_letter_message("x.dead-letters", record(value, key), error)
    assert message.topic == "x.dead-letters"
    assert message.key == key[:KEPT_BYTES], "keyed as it came, but so that it fits"
    assert decode(message.value, DeadLetter, what="it") == letter


def test_a_dead_letter_of_nothing() -> None:
    letter = dead_letter(record(None, None), refused(None, None))
    assert (letter.key, letter.value, letter.length, letter.digest) == (None, None, 0, hashlib.sha256(b"").hexdigest())
    assert dead_letter_message("d", record(None, None), refused(None, None)).key is None


def test_the_largest_of_all_fits_whatever_the_limit_of_records_is(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"max_record_bytes": 4096})
    stream = Stream(40, seed=4, garbage=0)
    large = Message("interactions", b"k" * 250, b"\xc1" + b"x" * 3800, 0)
    fill(settings, [*stream.messages[:20], large, *stream.messages[20:]])
    run(settings)
    assert findings(settings) == []
    worst = Record("t" * 249, 4095, 2**62, 0, b"k" * 1_000_000, b"v" * 1_000_000)
    letter = dead_letter_message("d", worst, Malformed("timestamp-out-of-range", "\U0001f600" * 1000))
    assert len(letter.key or b"") + len(letter.value or b"") <= LETTER_BYTES
