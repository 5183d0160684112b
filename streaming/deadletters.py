"""Dead letters: what could not be taken, kept with its reason, its place and enough of it to see what it was."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from streaming.codec import encode
from streaming.events import DeadLetter
from streaming.log import Message

if TYPE_CHECKING:
    from streaming.errors import Malformed
    from streaming.log import Record

KEPT_BYTES = 4096
"""How much of a dead letter's key and value is kept."""

LETTER_BYTES = 16_384
"""What a dead letter takes at most as a message, its key included: `KEPT_BYTES` three times, and what tells of them."""

_DETAIL_CHARACTERS = 500


def dead_letter(record: Record, error: Malformed, length: int = 0) -> DeadLetter:
    """Return the dead letter for ``record``. Its digest is the SHA-256 of the whole value, of no bytes for a null.

    ``length`` is that of a value of which the record holds only the beginning, and the digest that of the beginning.
    """
    value = record.value
    return DeadLetter(
        reason=error.reason,
        detail=error.detail.encode("utf-8", "backslashreplace").decode()[:_DETAIL_CHARACTERS],
        source=(record.topic, record.partition, record.offset),
        key=None if record.key is None else record.key[:KEPT_BYTES],
        value=None if value is None else value[:KEPT_BYTES],
        length=length or len(value or b""),
        digest=hashlib.sha256(value or b"").hexdigest(),
    )


def dead_letter_message(topic: str, record: Record, error: Malformed, length: int = 0) -> Message:
    """Return the dead letter as a message to ``topic``, keyed as it came. A key beyond `KEPT_BYTES` is cut: the letter always fits."""
    letter = dead_letter(record, error, length)
    return Message(topic, letter.key, encode(letter))
