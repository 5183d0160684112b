"""The verifier finds what is broken: each of these runs is spoiled on purpose, one promise at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from consumers.opening import connect
from consumers.settings import Settings
from consumers.tables import ProfileTables
from consumers.trainer import Trainer
from consumers.worker import Worker
from streaming.codec import decode, encode
from streaming.deadletters import dead_letter_message
from streaming.embedded.writer import EmbeddedWriter
from streaming.errors import LogError, Malformed
from streaming.events import Score, Update, Version
from streaming.log import Assignment, Commit, Message, Record, TopicPartition
from streaming.support import SupportSets
from tests.small_runs import Stream, fill, profile, run, small
from tests.test_promises import findings, reasons_of
from tests.verify.reading import read

Patch = pytest.MonkeyPatch
STREAM = Stream(160, seed=3, garbage=0.1)


class Killed(Exception):
    """Stands for the end of the process."""


def on_call(patch: Patch, kind: type, name: str, number: int, spoil: Callable[..., Any]) -> None:
    """Let ``spoil(original, self, ...)`` answer the call of this number, and the original all others."""
    original, calls = getattr(kind, name), [0]

    def method(self: object, *args: Any) -> Any:  # noqa: ANN401 - as the method
        calls[0] += 1
        return spoil(original, self, *args) if calls[0] == number else original(self, *args)

    patch.setattr(kind, name, method)


def changed(message: Message, **fields: Any) -> Message:  # noqa: ANN401 - as the struct
    assert message.value is not None
    return message._replace(value=encode(msgspec.structs.replace(decode(message.value, Score, what="score"), **fields)))


def spoil_scores(spoil: Callable[[list[Message]], list[Message]]) -> Callable[[Patch], None]:
    return lambda patch: on_call(patch, Worker, "_scores", 4, lambda original, *args: spoil(original(*args)))


def spoil_updates(spoil: Callable[[list[Message]], list[Message]]) -> Callable[[Patch], None]:
    return lambda patch: on_call(patch, Worker, "_updates", 4, lambda original, *args: spoil(original(*args)))


def spoil_letters(spoil: Callable[[Record, Malformed], tuple[Record, Malformed]]) -> Callable[[Patch], None]:
    def spoiled(patch: Patch) -> None:
        calls = [0]

        def letter(topic: str, record: Record, error: Malformed) -> Message:
            calls[0] += 1
            return dead_letter_message(topic, *(spoil(record, error) if calls[0] == 3 else (record, error)))

        patch.setattr("consumers.worker.dead_letter_message", letter)

    return spoiled


def lose_an_event_of_a_support_set(patch: Patch) -> None:
    on_call(patch, SupportSets, "append", 100, lambda original, *args: 0)


def keep_one_interaction_less(patch: Patch) -> None:
    original = SupportSets.append

    def short(sets: SupportSets, *args: Any) -> int:  # noqa: ANN401
        sets.size -= 1
        earlier = original(sets, *args)
        sets.size += 1
        return earlier

    patch.setattr(SupportSets, "append", short)


def name_another_version(patch: Patch) -> None:
    def renamed(original: Callable[..., list[Message]], worker: Worker, *args: Any) -> list[Message]:  # noqa: ANN401
        worker.versions.version += 1
        try:
            return original(worker, *args)
        finally:
            worker.versions.version -= 1

    on_call(patch, Worker, "_scores", 4, renamed)


def skip_an_update(patch: Patch) -> None:
    on_call(patch, Trainer, "_read_until", 6, lambda original, trainer, *how: original(trainer, *how)[1:])


def fold_an_update_twice(patch: Patch) -> None:
    def twice(original: Callable[..., list[Any]], trainer: Trainer, *how: Any) -> list[Any]:  # noqa: ANN401
        lessons = original(trainer, *how)
        return [lessons[0], *lessons]

    on_call(patch, Trainer, "_read_until", 6, twice)


def fork_the_versions(patch: Patch) -> None:
    def forked(original: Callable[..., Any], trainer: Trainer, version: int, parent: int, *rest: Any) -> Any:  # noqa: ANN401
        return original(trainer, version, parent - 1, *rest)

    on_call(patch, Trainer, "_version", 10, forked)
    patch.setattr("consumers.versions.Versions._feed", lambda versions, record: None)


def drop_an_update_against_the_rule(patch: Patch) -> None:
    def choose(original: Callable[..., Any], trainer: Trainer, complete: list[Any]) -> tuple[list[Any], list[Any]]:
        chosen, dropped = original(trainer, complete)
        return chosen[1:], [*(part.place for part in chosen[0]), *dropped]

    on_call(patch, Trainer, "_choose", 6, choose)


def fold_two_at_once(patch: Patch) -> None:
    step = Trainer.step
    patch.setattr(Trainer, "_round", lambda *_: 2)
    patch.setattr(Trainer, "step", lambda trainer, *args, **_: step(trainer, *args))


BREAKS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "a score dropped": ("b", spoil_scores(lambda scores: scores[1:])),
    "a score doubled": ("b", spoil_scores(lambda scores: [*scores, scores[2]])),
    "a score of a place without an event": ("b", spoil_scores(lambda s: [changed(s[0], source=("interactions", 0, 10_000)), *s[1:]])),
    "two scores exchanged": (
        "d",
        spoil_scores(
            lambda s: [
                changed(s[0], source=decode(s[5].value, Score, what="it").source),
                *s[1:5],
                changed(s[5], source=decode(s[0].value, Score, what="it").source),
                *s[6:],
            ]
        ),
    ),
    "a score of another item": ("d", spoil_scores(lambda scores: [changed(scores[0], item="i999"), *scores[1:]])),
    "a score of another version": ("d", name_another_version),
    "a wrong count of earlier events": ("d", spoil_scores(lambda scores: [changed(scores[0], earlier=99), *scores[1:]])),
    "an event lost from a support set": ("a", lose_an_event_of_a_support_set),
    "a support set one interaction short": ("a", keep_one_interaction_less),
    "an update lost": ("b", spoil_updates(lambda updates: updates[2:])),
    "an update written twice": ("b", spoil_updates(lambda updates: [*updates, updates[0]])),
    "an update skipped by the trainer": ("c", skip_an_update),
    "an update dropped against the rule": ("c", drop_an_update_against_the_rule),
    "an update folded twice": ("c", fold_an_update_twice),
    "two meta-updates folded at once": ("c", fold_two_at_once),
    "a version of another parent": ("c", fork_the_versions),
    "a dead letter of another place": ("e", spoil_letters(lambda record, error: (record._replace(offset=record.offset + 1), error))),
    "a dead letter of another reason": ("e", spoil_letters(lambda record, error: (record, Malformed("empty", "no")))),
    "a dead letter of other bytes": ("e", spoil_letters(lambda record, error: (record._replace(value=b"other"), error))),
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small(tmp_path / "log.db")


@pytest.mark.parametrize("what", BREAKS)
def test_it_finds(what: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    promise, spoil = BREAKS[what]
    reasons = reasons_of(STREAM, fill(settings, STREAM.messages))
    spoil(monkeypatch)
    run(settings)
    found = {finding.promise for finding in findings(settings, reasons=reasons)}
    assert promise in found
    # What follows from it may be found as well, but no promise that holds is said to be broken.
    assert found <= {promise, *{"a": "d", "b": "cd"}.get(promise, "")}


def forget_nobody(patch: Patch) -> None:
    patch.setattr(SupportSets, "forget", lambda sets, user, offset: None)


def forget_one_event_late(patch: Patch) -> None:
    """The user's next event still belongs to the old life."""
    forget, append, late = SupportSets.forget, SupportSets.append, dict[str, int]()
    patch.setattr(SupportSets, "forget", lambda sets, user, offset: late.update({user: offset}))

    def appended(sets: SupportSets, user: str, *args: Any) -> int:  # noqa: ANN401 - as the method
        earlier = append(sets, user, *args)
        if user in late:
            forget(sets, user, late.pop(user))
        return earlier

    patch.setattr(SupportSets, "append", appended)


def forget_from_a_later_offset_on(patch: Patch) -> None:
    forget = SupportSets.forget
    patch.setattr(SupportSets, "forget", lambda sets, user, offset: forget(sets, user, offset + 1))


def forget_without_a_marker(patch: Patch) -> None:
    changes = SupportSets.changes

    def bare(sets: SupportSets) -> list[tuple[bytes, bytes | None]]:
        return [(key, None if value and b"forgotten" in value else value) for key, value in changes(sets)]

    patch.setattr(SupportSets, "changes", bare)


def forget_again_after_a_restart(patch: Patch) -> None:
    assign = ProfileTables.assign

    def forgetful(tables: ProfileTables, partitions: Any) -> None:  # noqa: ANN401
        assign(tables, partitions)
        tables._done = dict.fromkeys(tables._done, 0)

    patch.setattr(ProfileTables, "assign", forgetful)


FORGETS: dict[str, Callable[[Patch], None]] = {
    "a forget ignored": forget_nobody,
    "a forget one event late": forget_one_event_late,
    "a forget with a later offset": forget_from_a_later_offset_on,
    "a forget without a marker": forget_without_a_marker,
    "a forget done again after a restart": forget_again_after_a_restart,
}


@pytest.mark.parametrize("what", [None, *FORGETS])
def test_it_finds_wrong_forgetting(what: str | None, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three users, two come back, and the third is never heard of."""
    users = sorted({message.key.decode() for message in STREAM.messages[80:] if message.key}, key=str)[-2:]
    if what is not None:
        FORGETS[what](monkeypatch)
    fill(settings, STREAM.messages[:80])
    run(settings)
    fill(settings, [*(profile("users", user, None) for user in [*users, "nobody"]), *STREAM.messages[80:120]])
    run(settings)
    fill(settings, STREAM.messages[120:])
    run(settings)
    found = {finding.promise for finding in findings(settings)}
    assert found <= {"a", "d"}
    assert ("a" in found) == (what is not None)


def outside(kept: str, at: int) -> Callable[..., Commit]:
    """A commit in two halves, of which a kill leaves one: the messages or the offsets."""
    original, steps = EmbeddedWriter.begin, [0]

    def begin(
        writer: EmbeddedWriter,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> Commit:
        if offsets:
            steps[0] += 1
            if steps[0] == at:
                original(writer, messages if kept == "messages" else [], offsets if kept == "offsets" else None, owner)
                raise Killed
        return original(writer, messages, offsets, owner)

    return begin


@pytest.mark.parametrize(("kept", "promises"), [("messages", {"a", "b"}), ("offsets", {"a", "b", "e"})])
def test_it_finds_offsets_committed_outside_the_transaction(
    kept: str, promises: set[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(settings, STREAM.messages)
    monkeypatch.setattr(EmbeddedWriter, "begin", outside(kept, at=4))
    with pytest.raises(Killed):
        run(settings)
    monkeypatch.undo()
    assert promises <= {finding.promise for finding in findings(settings)}
    with pytest.raises(LogError, match=r"support\[0\] holds the support sets as of offset .* do not belong together"):
        run(settings)


def test_it_finds_updates_folded_again_after_a_restart(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(settings, STREAM.messages[:80])
    run(settings)
    assert findings(settings) == []
    fill(settings, STREAM.messages[80:])
    begin = Trainer._begin
    monkeypatch.setattr(Trainer, "_begin", lambda trainer, positions: begin(trainer, dict.fromkeys(positions, 0)))
    run(settings)
    assert {finding.promise for finding in findings(settings)} == {"c"}


def test_updates_dropped_by_the_rule_are_no_breach(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(settings, STREAM.messages)

    def spoiled(original: Callable[..., Any], worker: Worker, *args: Any) -> list[Message]:  # noqa: ANN401 - as the method
        first, *rest = original(worker, *args)
        update = decode(first.value, Update, what="update")
        name, tensor = next(iter(update.tensors.items()))
        nan = msgspec.structs.replace(tensor, data=np.full(tensor.shape, np.nan, tensor.dtype).tobytes())
        return [first._replace(value=encode(msgspec.structs.replace(update, tensors=update.tensors | {name: nan}))), *rest]

    on_call(monkeypatch, Worker, "_updates", 4, spoiled)
    run(settings)
    assert findings(settings) == []
    with connect(settings) as log:
        versions = [decode(record.value, Version, what="version") for record in read(log, "model", 0)]
    assert [len(version.dropped) for version in versions if version.dropped] == [1]


def test_a_log_that_retention_has_cut_is_no_proof(settings: Settings) -> None:
    cut = settings.model_copy(update={"topics": settings.topics.model_copy(update={"updates_bytes": 20_000})})
    fill(cut, STREAM.messages)
    run(cut)
    assert [finding.promise for finding in findings(settings)] == ["-"]
