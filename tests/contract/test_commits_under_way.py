"""Commits that are begun, and waited for later: the same as those that are waited for at once."""

from __future__ import annotations

import time

import pytest

from streaming.errors import Fenced
from streaming.log import Log, Message, TopicPartition
from tests.contract.conftest import Broker, everything, values


def test_what_was_begun_goes_on_by_itself(broker: Broker, log: Log) -> None:
    source, out = broker.topic(log), broker.topic(log)
    tp, before = TopicPartition(source, 0), time.time()
    with log.writer("w") as writer:
        commit = writer.begin([Message(out, None, b"%d" % n) for n in range(3)], {tp: 7}, "g")
        deadline = time.monotonic() + 20
        while not commit.done:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert before <= commit.ended <= time.time()
        # Apache Kafka answers once the outcome is written down; readers see it a moment later.
        while values(everything(log, out)) != [b"0", b"1", b"2"]:
            assert time.monotonic() < deadline, "nobody waits for it, and yet it is there"
        assert commit.result() == [record.offset for record in everything(log, out)]
        assert commit.result() == commit.result()
        assert log.committed("g", [tp]) == {tp: 7}
        assert writer.begin([]).result() == []


def test_commits_of_several_writers_are_under_way_together(broker: Broker, log: Log) -> None:
    out = broker.topic(log, 3)
    writers = [log.writer(f"{out}-{number}") for number in range(3)]
    for turn in range(3):
        begun = [writer.begin([Message(out, None, b"%d" % turn, number)]) for number, writer in enumerate(writers)]
        for commit in reversed(begun):
            commit.result()
    assert [values(everything(log, out, number)) for number in range(3)] == [[b"0", b"1", b"2"]] * 3


def test_of_one_writer_one_is_under_way_at_a_time(broker: Broker, log: Log) -> None:
    if broker.can.commits_at_once:
        pytest.skip("nothing is under way here")
    out = broker.topic(log)
    with log.writer("w") as writer:
        commit = writer.begin([Message(out, None, b"first")])
        with pytest.raises(ValueError, match="under way"):
            writer.begin([Message(out, None, b"second")])
        commit.result()
        writer.commit([Message(out, None, b"third")])
    assert values(everything(log, out)) == [b"first", b"third"]


def test_one_that_failed_says_so_whenever_it_is_asked(broker: Broker, log: Log) -> None:
    source, out = broker.topic(log), broker.topic(log)
    tp = TopicPartition(source, 0)
    old = log.writer("w")
    broker.connect().writer("w")
    with pytest.raises(Fenced):
        old.begin([Message(out, None, b"late")], {tp: 9}, "g").result()
    with pytest.raises(Fenced):
        old.begin([Message(out, None, b"later")], {tp: 9}, "g").result()
    assert everything(log, out) == []
    assert log.committed("g", [tp]) == {}


def test_one_whose_end_nobody_waited_for_is_settled_by_the_next_writer(broker: Broker, log: Log) -> None:
    source, out = broker.topic(log), broker.topic(log)
    tp = TopicPartition(source, 0)
    for turn in range(1, 4):
        old = log.writer("w")
        old.begin([Message(out, None, b"%d" % turn)], {tp: turn}, "g")
        new = broker.connect().writer("w")
        took_place = log.committed("g", [tp]).get(tp, 0) == turn
        assert (b"%d" % turn in values(everything(log, out))) is took_place, "all of it or nothing"
        new.commit([Message(out, None, b"after %d" % turn)])
        assert (b"%d" % turn in values(everything(log, out))) is took_place, "and so it stays"
        old.close()
        new.close()
