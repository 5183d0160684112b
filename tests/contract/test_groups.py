from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from streaming.errors import Fenced, LogError, UnknownTopic
from streaming.log import Assignment, Log, Member, Message, TopicPartition
from tests.contract.conftest import Broker, everything


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def settled(broker: Broker, log: Log, *members: Member) -> list[Assignment]:
    """The assignments, once all members agree on the generation and every partition has its owner."""
    found: list[Assignment] = []
    partitions = log.topics()[members[0].assignment().topic].partitions

    def agree() -> bool:
        found[:] = [member.assignment() for member in members]
        owned = sum(len(assignment.partitions) for assignment in found)
        return len({assignment.generation for assignment in found}) == 1 and found[0].generation >= 0 and owned == partitions

    while True:
        until(agree)
        agreed = list(found)
        # Where clients find out about topics by and by, a first generation may be followed by another.
        time.sleep(broker.can.settle_seconds)
        if agree() and found == agreed:
            return found


def test_a_lone_member_owns_everything(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 5)
    (assignment,) = settled(broker, log, log.member("g", name))
    assert assignment.partitions == frozenset(range(5))
    assert (assignment.group, assignment.topic) == ("g", name)


@pytest.mark.parametrize(("partitions", "members"), [(8, 3), (3, 3), (2, 4)])
def test_members_share_the_partitions_out_evenly(broker: Broker, log: Log, partitions: int, members: int) -> None:
    name = broker.topic(log, partitions)
    assignments = settled(broker, log, *[(log, broker.connect())[n % 2].member("g", name) for n in range(members)])
    owned = sorted(partition for assignment in assignments for partition in assignment.partitions)
    assert owned == list(range(partitions))
    sizes = [len(assignment.partitions) for assignment in assignments]
    assert max(sizes) - min(sizes) <= 1
    assert len({assignment.member_id for assignment in assignments}) == members


def test_an_assignment_stays_as_it_is_while_nobody_comes_or_goes(broker: Broker, log: Log) -> None:
    member = log.member("g", broker.topic(log, 2))
    (first,) = settled(broker, log, member)
    assert [member.assignment() for _ in range(20)] == [first] * 20


def test_a_join_begins_a_new_generation(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 4)
    member = log.member("g", name)
    (before,) = settled(broker, log, member)
    after = settled(broker, log, member, log.member("g", name))
    assert after[0].generation > before.generation
    assert len(after[0].partitions) == 2


def test_who_leaves_frees_its_partitions_at_once(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 4)
    stays, leaves = log.member("g", name), log.member("g", name)
    before = settled(broker, log, stays, leaves)
    leaves.close()
    leaves.close()
    until(lambda: stays.assignment().partitions == frozenset(range(4)))
    assert stays.assignment().generation > before[0].generation
    with pytest.raises(LogError, match="g"):
        leaves.assignment()


def test_a_silent_member_is_evicted_told_so_once_and_rejoins(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 4)
    lively, silent = log.member("g", name), broker.connect().member("g", name)
    settled(broker, log, lively, silent)
    until(lambda: lively.assignment().partitions == frozenset(range(4)))
    evicted = silent.assignment()
    assert evicted.generation < 0
    assert evicted.partitions == frozenset()
    assert {len(assignment.partitions) for assignment in settled(broker, log, lively, silent)} == {2}


def test_groups_do_not_disturb_each_other(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    first, second = log.member("g", name), log.member("h", name)
    assert settled(broker, log, first)[0].partitions == settled(broker, log, second)[0].partitions == frozenset({0, 1})


def test_a_group_of_an_unknown_topic_is_refused(log: Log) -> None:
    with pytest.raises(UnknownTopic, match="nowhere"):
        log.member("g", "nowhere")


def test_an_assignment_in_force_commits_offsets_of_the_same_partitions_of_any_topic(broker: Broker, log: Log) -> None:
    name, follower = broker.topic(log, 2), broker.topic(log, 2)
    member = log.member("g", name)
    (assignment,) = settled(broker, log, member)
    tps = {TopicPartition(name, 0): 3, TopicPartition(follower, 1): 4}
    log.writer("w").commit([Message(name, None, b"out")], tps, assignment)
    assert log.committed("g", tps) == tps


def test_an_old_generation_commits_nothing(broker: Broker, log: Log) -> None:
    name, out = broker.topic(log, 2), broker.topic(log)
    member = log.member("g", name)
    (old,) = settled(broker, log, member)
    settled(broker, log, member, broker.connect().member("g", name))
    tp = TopicPartition(name, 0)
    with pytest.raises(Fenced, match="g"):
        log.writer("w").commit([Message(out, None, b"late")], {tp: 1}, old)
    assert everything(log, out) == []
    assert log.committed("g", [tp]) == {}


def test_an_evicted_member_commits_nothing_by_its_old_or_its_empty_assignment(broker: Broker, log: Log) -> None:
    name, out = broker.topic(log, 2), broker.topic(log)
    lively, silent = log.member("g", name), broker.connect().member("g", name)
    old = settled(broker, log, lively, silent)[1]
    until(lambda: len(lively.assignment().partitions) == 2)
    writer = log.writer("w")
    tp = TopicPartition(name, min(old.partitions))
    for assignment in (old, silent.assignment()):
        with pytest.raises(Fenced):
            writer.commit([Message(out, None, b"late")], {tp: 1}, assignment)
    assert everything(log, out) == []


def test_a_partition_that_is_not_owned_is_not_committed(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    member = log.member("g", name)
    assignment = settled(broker, log, member, log.member("g", name))[0]
    (owned,) = assignment.partitions
    with pytest.raises(Fenced, match=f"{name}/{1 - owned}"):
        log.writer("w").commit([], {TopicPartition(name, owned): 1, TopicPartition(name, 1 - owned): 1}, assignment)
    assert log.committed("g", [TopicPartition(name, owned)]) == {}


def test_a_plain_group_name_does_not_commit_past_members(broker: Broker, log: Log) -> None:
    if not broker.can.plain_group_is_fenced:
        pytest.skip("this broker takes a plain group's offsets at any time")
    name = broker.topic(log, 2)
    member = log.member("g", name)
    (assignment,) = settled(broker, log, member)
    writer = log.writer("w")
    tp = TopicPartition(name, 0)
    with pytest.raises(Fenced, match="g has members"):
        writer.commit([], {tp: 1}, "g")
    time.sleep(broker.can.session_ms / 1000 + 0.05)
    writer.commit([], {tp: 2}, "g")
    with pytest.raises(Fenced):
        writer.commit([], {tp: 1}, assignment)
    assert log.committed("g", [tp]) == {tp: 2}
