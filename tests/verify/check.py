"""The promises, one function each."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgpack
import numpy as np

from streaming.codec import decode
from streaming.events import REASONS, Answer, DeadLetter, Forgotten, Position, Score, Source, Support, Update, Version
from streaming.log import Log, Record, TopicPartition
from tests.verify.answers import each_answered_once, is_answer
from tests.verify.finding import Finding
from tests.verify.fold import Fold
from tests.verify.reading import Event, event_of, joined, read

POSITION = b"\x00position"


@dataclass(frozen=True)
class Rules:
    """What a run promises to keep to.

    ``reasons`` are those of garbage by its place, where whoever made it knows them. ``nulls`` are places in ``users`` of null profiles, and
    whose, that newer profiles have superseded: of these the log itself knows no more.
    """

    group: str = "coldstream"
    prefix: str = ""
    scale: tuple[float, float] = (1.0, 5.0)
    support_size: int = 4
    max_staleness: int = 0
    max_users: int = 0
    round_updates: int = 1
    stale_rounds: int = 64
    meta_update: int = 8
    reasons: Mapping[Source, str] = field(default_factory=dict)
    nulls: Mapping[Source, str] = field(default_factory=dict)


@dataclass
class Seen:
    """A partition of the log: its events up to the committed offset, and what the fold makes of them."""

    number: int
    committed: int
    events: list[Event]
    garbage: list[Record]
    before: dict[int, list[Event]]
    """What the user of the event at an offset had before it."""
    after: Fold
    scores: list[Score]
    updates: list[tuple[int, Update]]
    """With the offset after each."""
    answers: list[Answer]
    had: dict[Source, set[int]]
    """How many interactions its user had, of each answer by the place of its request; two numbers where the user was being forgotten."""


def verify(log: Log, rules: Rules) -> list[Finding]:
    """Check every promise; what is wrong, in the order of promises."""
    names = {
        name: rules.prefix + name for name in ("interactions", "scores", "support", "updates", "model", "dead-letters", "users", "requests")
    }
    topics = log.topics()
    for plain in ("interactions", "scores", "updates", "model", "dead-letters"):
        tps = [TopicPartition(names[plain], number) for number in range(topics[names[plain]].partitions)]
        if cut := [tp for tp, bounds in log.bounds(tps).items() if bounds.start]:
            return [Finding("-", f"retention has cut {cut}, so that nothing can be checked")]
    partitions = [_look(log, rules, names, number) for number in range(topics[names["interactions"]].partitions)]
    found: list[Finding] = []
    for seen in partitions:
        found += _support_is_the_fold(log, names, seen)
        found += _one_score_for_each_event(names, seen)
        found += _updates_cover_the_events(seen, rules.meta_update)
        found += each_answered_once(log, rules.group, names, seen.number, seen.had, seen.answers, rules.scale)
    found += _updates_are_folded_once(log, rules, names, partitions)
    found += _dead_letters_once(log, rules, names, partitions)
    return sorted(found)


def _look(log: Log, rules: Rules, names: dict[str, str], number: int) -> Seen:
    tp = TopicPartition(names["interactions"], number)
    committed = log.committed(rules.group, [tp]).get(tp, 0)
    events, garbage = [], []
    partitions = log.topics()[tp.topic].partitions
    for record in read(log, *tp):
        if record.offset < committed:
            event = event_of(record, rules.scale, partitions)
            if event is None:
                garbage.append(record)
            else:
                events.append(event)
    written = read(log, names["scores"], number)
    scores = [decode(record.value, Score, what="score") for record in written if not is_answer(record)]
    answers = [decode(record.value, Answer, what="answer") for record in written if is_answer(record)]
    updates = [(whole.end, decode(whole.value, Update, what="update")) for whole in joined(read(log, names["updates"], number))]
    forgets = _forgets(log, rules, TopicPartition(names["users"], number), [update for _, update in updates], committed)
    fold, before = Fold(rules.support_size, rules.max_users), dict[int, list[Event]]()
    had: dict[Source, set[int]] = {answer.asked: set() for answer in answers}
    later = sorted(answers, key=lambda answer: answer.as_of)
    for event in [*events, None]:
        end = committed if event is None else event.offset
        here = [answer for answer in later if answer.as_of[2] <= end]
        later = later[len(here) :]
        for again in (False, True):
            for answer in here:
                had[answer.asked].add(fold.count(answer.user))
            while forgets and forgets[0][0][1] <= end and not again:
                since, user = forgets.pop(0)
                fold.forget(user, since)
        if event is not None:
            before[event.offset] = fold.take(event)
    return Seen(number, committed, events, garbage, before, fold, scores, updates, answers, had)


def _forgets(log: Log, rules: Rules, tp: TopicPartition, updates: Iterable[Update], end: int) -> list[tuple[tuple[int, int], str]]:
    """Who is forgotten, in order, and bounds of where: after the last step that had not read the null, by the first that had."""
    committed = log.committed(rules.group, [tp]).get(tp, 0)
    nulls = {place[2]: user for place, user in rules.nulls.items() if place[:2] == tp}
    nulls |= {record.offset: (record.key or b"").decode() for record in read(log, *tp) if record.value is None}
    steps = [(update.tables[tp.topic], *update.source[2:]) for update in updates]
    found = []
    for offset, user in nulls.items():
        if offset < committed:
            last = max((after for position, _, after in steps if position <= offset), default=0)
            first = min((first for position, first, _ in steps if position > offset), default=end)
            found.append((first, offset, last, user))
    return [((last, first), user) for first, _, last, user in sorted(found)]


def _support_is_the_fold(log: Log, names: dict[str, str], seen: Seen) -> Iterator[Finding]:
    """(a), and the order of last changes, by which users are evicted."""
    where = f"support[{seen.number}]"
    latest = dict[bytes | None, bytes | None]()
    for record in read(log, names["support"], seen.number):
        # In the order of last records, whether or not the broker has dropped the earlier ones by now.
        latest.pop(record.key, None)
        latest[record.key] = record.value
    position = latest.pop(POSITION, None)
    if position is None:
        if seen.committed:
            yield Finding("a", f"{where} has no position record, but {seen.committed} is committed")
        return
    stated = decode(position, Position, what="position")
    if (stated.offset, stated.users) != (seen.committed, seen.after.ordinals):
        yield Finding("a", f"{where} stands at {stated.offset} with {stated.users} users, not {seen.committed}, {seen.after.ordinals}")
    values = {key.decode(): value for key, value in latest.items() if key and value is not None}
    markers = {user: decode(value, Forgotten, what="marker") for user, value in values.items() if b"interactions" not in value}
    if markers.keys() != seen.after.forgotten.keys():
        yield Finding("a", f"{where} has markers of {sorted(markers)}, but {sorted(seen.after.forgotten)} are forgotten")
    for user in markers.keys() & seen.after.forgotten.keys():
        low, high = seen.after.forgotten[user]
        if not low <= markers[user].forgotten <= high or msgpack.unpackb(values[user]).keys() != {"forgotten", "format"}:
            yield Finding("a", f"{where} of {user} is {values[user]!r}, not a marker of {low} to {high}")
    held = {user: decode(value, Support, what="support") for user, value in values.items() if user not in markers}
    # Users of one step are written in the order of their last event, so the order of records is that of the fold.
    if list(held) != list(seen.after.users):
        missing, extra = set(seen.after.users) - set(held), set(held) - set(seen.after.users)
        yield Finding("a", f"{where} lacks users {sorted(missing)}, has {sorted(extra)} beyond, or has them in another order")
    for user in held.keys() & seen.after.users.keys():
        whole = seen.after.users[user]
        source = (names["interactions"], seen.number, whole.events[-1].offset)
        low, high = whole.since
        since = held[user].since if low <= held[user].since <= high else high
        wanted = Support(seen.after.support(user), source, len(whole.events), whole.ordinal, since)
        if held[user] != wanted:
            yield Finding("a", f"{where} of {user} is {held[user]}, not {wanted}")


def _one_score_for_each_event(names: dict[str, str], seen: Seen) -> Iterator[Finding]:
    """(b) and (d): each event has one score, which names it, what its user had, and a version that later scores do not go behind."""
    times = Counter(score.source for score in seen.scores)
    valid = {(names["interactions"], seen.number, event.offset): event for event in seen.events}
    for source in valid.keys() - times.keys():
        yield Finding("b", f"the event at {source} has no score")
    for source, count in times.items():
        if source not in valid:
            yield Finding("b", f"a score names {source}, where no event is committed")
        elif count > 1:
            yield Finding("b", f"the event at {source} has {count} scores")
    versions: dict[int, int] = {}
    last = 0
    for score in seen.scores:
        event = valid.get(score.source)
        if event is None:
            continue
        before = seen.before[event.offset]
        items = {earlier.item for earlier in before[-seen.after.size :]}
        if (score.user, score.item, score.timestamp) != (event.user, event.item, event.timestamp):
            yield Finding("d", f"the score of {score.source} is of {score.user} and {score.item}, not {event.user} and {event.item}")
        if (score.support_size, score.earlier) != (len(items), len(before)):
            yield Finding("d", f"the score of {score.source} states {score.support_size} of {score.earlier} earlier events")
        if score.model_version < last or versions.setdefault(score.step, score.model_version) != score.model_version:
            yield Finding("d", f"the score of {score.source} names version {score.model_version}, after {last} or within one step")
        last = score.model_version


def _meta_updates_are_complete_where_due(seen: Seen, offsets: list[int], size: int) -> Iterator[Finding]:
    """(c): an update completes a meta-update where a multiple of its size lies in the offsets that it speaks for.

    Those of a step's first one begin where the step before ended. Between the two there may have been a step of malformed records alone, of
    whose end the log says nothing: then either is right.
    """
    step, ended, counted = -1, 0, 0
    for offset, update in seen.updates:
        _, _, first, after = update.source
        if update.kind == "rehearsal":
            if not update.completes:
                yield Finding("c", f"the update before {offset} is of rehearsal and said to be a part")
            continue
        if first != step:
            step, counted, begun = first, 0, first
        else:
            begun = ended
        counted += update.events
        rest = offsets[bisect_left(offsets, first) + counted :]
        end = rest[0] if rest and rest[0] < after else after
        may, must = ended // size != end // size, begun // size != end // size
        if (update.completes and not may) or (must and not update.completes):
            yield Finding("c", f"the update before {offset} speaks for {begun} to {end}, and completes is {update.completes}")
        ended = end


def _updates_cover_the_events(seen: Seen, size: int) -> Iterator[Finding]:
    """(b): every event counts once in the query updates of its step, and these name the version that its scores name."""
    end, counted = 0, Counter[int]()
    ranges: dict[int, int] = {}
    versions: dict[int, set[int]] = {}
    for score in seen.scores:
        versions.setdefault(score.step, set()).add(score.model_version)
    for offset, update in seen.updates:
        _, partition, first, after = update.source
        if partition != seen.number or (first not in ranges and first < end):
            yield Finding("b", f"the update before {offset} covers {update.source}, which is taken already")
        if first in ranges and update.writes:
            yield Finding("c", f"the update before {offset} carries memory writes that its step's first one carries")
        ranges.setdefault(first, after)
        end = max(end, after)
        counted[first] += update.events if update.kind == "query" else 0
        if stated := versions.get(first, set()) - {update.version}:
            yield Finding("d", f"the update before {offset} was made at {update.version}, the scores of its step at {stated}")
    offsets = [event.offset for event in seen.events]
    yield from _meta_updates_are_complete_where_due(seen, offsets, size)
    for first, after in ranges.items():
        events = bisect_left(offsets, after) - bisect_left(offsets, first)
        if counted[first] != events:
            yield Finding("b", f"updates of the step {first} to {after} count {counted[first]} events, not {events}")
    firsts = sorted(ranges)
    covered = [0, *itertools.accumulate((ranges[first] for first in firsts), max)]
    if uncovered := [offset for offset in offsets if covered[bisect_right(firsts, offset)] <= offset]:
        yield Finding("b", f"no update covers the events of partition {seen.number} at {uncovered[:5]}")


def _updates_are_folded_once(log: Log, rules: Rules, names: dict[str, str], partitions: list[Seen]) -> Iterator[Finding]:
    """(c): versions follow one another, and each folds whole updates from where its parent ended, or states which it skips."""
    versions = [decode(value, Version, what="version") for _, _, value in joined(read(log, names["model"], 0))]
    whole = {seen.number: dict(seen.updates) for seen in partitions}
    places = {number: sorted(updates) for number, updates in whole.items()}
    known, parent, folded = {0}, 0, dict[int, int]()
    states: dict[int | None, dict[int, int]] = {None: {}, 0: {}}
    for version in versions:
        known.add(version.version)
        if version.replaces is not None:
            yield from _skips_what_it_states(version, parent, folded, states)
            parent, folded = version.version, version.folded
            states[parent] = folded
            continue
        taken = queries = 0
        oldest = version.version
        for seen in partitions:
            start, end = folded.get(seen.number, 0), version.folded.get(seen.number, 0)
            dropped = {offset for number, offset in version.dropped if number == seen.number}
            ends = places[seen.number]
            span = seen.updates[bisect_right(ends, start) : bisect_right(ends, end)]
            inside = [update for offset, update in span if offset not in dropped]
            # Parts are folded with the one that completes them.
            kept = False
            for offset, update in span:
                kept = kept or offset not in dropped
                taken += kept and update.completes
                kept = kept and not update.completes
            for offset in sorted(dropped & whole[seen.number].keys()):
                if not start < offset <= end or not _may_be_dropped(whole[seen.number][offset], parent, rules):
                    yield Finding(
                        "c", f"version {version.version} drops the update before {offset} of updates[{seen.number}]: against the rule"
                    )
            queries += sum(update.events for update in inside)
            oldest = min([oldest, *(update.version for update in inside)])
            if end < start or (end > start and not (end in whole[seen.number] and whole[seen.number][end].completes)):
                yield Finding("c", f"version {version.version} folds updates[{seen.number}] from {start} to {end}: no whole meta-updates")
        if version.parent != parent:
            yield Finding("c", f"version {version.version} follows {version.parent}, but {parent} was the last")
        # Of what was made long ago several are folded at once: how many depends on the order in which they were read.
        most = rules.round_updates
        if rules.stale_rounds:
            most = max(most, -(-(version.version - 1 - oldest) // rules.stale_rounds))
        if not max(1, -(-taken // most)) <= version.version - parent <= max(1, -(-taken // rules.round_updates)):
            yield Finding("c", f"version {version.version} holds {taken} meta-updates more than {parent}")
        if version.events != queries:
            yield Finding("c", f"version {version.version} states {version.events} queries, its updates have {queries}")
        parent, folded = version.version, version.folded
        states[parent] = folded
    for seen in partitions:
        end = max((offset for offset, update in seen.updates if update.completes), default=0)
        if folded.get(seen.number, 0) != end:
            yield Finding("c", f"updates[{seen.number}] are folded up to {folded.get(seen.number, 0)}, not {end}")
        if unknown := {score.model_version for score in seen.scores} - known:
            yield Finding("d", f"scores of partition {seen.number} name versions {sorted(unknown)}, which are not in the log")


def _skips_what_it_states(
    version: Version, last: int, folded: dict[int, int], states: dict[int | None, dict[int, int]]
) -> Iterator[Finding]:
    """Of a version that replaces the last: all that the last had folded is in its parent's values, or skipped and said to be."""
    name = f"version {version.version}, which replaces {version.replaces},"
    if (version.replaces, version.version) != (last, last + 1):
        yield Finding("c", f"{name} follows {last}")
    if version.parent not in states:
        yield Finding("c", f"{name} goes back to {version.parent}, which is not in the log")
        return
    if version.folded != folded or version.events or version.dropped:
        yield Finding("c", f"{name} folds something: {version.folded}, not {folded}; {version.events} queries")
    before = states[version.parent]
    missing = [(number, before.get(number, 0), end) for number, end in sorted(folded.items()) if before.get(number, 0) < end]
    if sorted(version.skipped) != missing:
        yield Finding("c", f"{name} states that it skips {version.skipped}, but not in its values are {missing}")


def _may_be_dropped(update: Update, version: int, rules: Rules) -> bool:
    """The stated rule: made too many versions ago, or with a value that is not finite or not below 1e15."""
    tensors = [*update.tensors.values(), *(rows.values for rows in update.rows.values()), *(update.writes or {}).values()]
    finite = all((np.abs(np.frombuffer(tensor.data, tensor.dtype)) < 1e15).all() for tensor in tensors)
    return not finite or (rules.max_staleness > 0 and update.version < version - rules.max_staleness)


def _dead_letters_once(log: Log, rules: Rules, names: dict[str, str], partitions: list[Seen]) -> Iterator[Finding]:
    """(e)"""
    letters = [decode(record.value, DeadLetter, what="dead letter") for record in read(log, names["dead-letters"], 0)]
    garbage = {(record.topic, record.partition, record.offset): record for seen in partitions for record in seen.garbage}
    ours = [letter for letter in letters if letter.source[0] == names["interactions"]]
    times = Counter(letter.source for letter in ours)
    for source in garbage.keys() - times.keys():
        yield Finding("e", f"the malformed record at {source} has no dead letter")
    for letter in ours:
        if letter.source not in garbage or times[letter.source] > 1:
            yield Finding("e", f"{times[letter.source]} dead letters name {letter.source}")
            continue
        record = garbage[letter.source]
        value = record.value or b""
        if letter.reason not in REASONS or letter.reason != rules.reasons.get(letter.source, letter.reason):
            yield Finding("e", f"the dead letter of {letter.source} gives {letter.reason}, not {rules.reasons.get(letter.source)}")
        kept = (letter.key, letter.value, letter.length, letter.digest)
        head = None if record.value is None else value[: len(letter.value or b"")]
        if kept != (record.key, head, len(value), hashlib.sha256(value).hexdigest()) or len(letter.value or b"") < min(1024, len(value)):
            yield Finding("e", f"the dead letter of {letter.source} holds other bytes than the record")
