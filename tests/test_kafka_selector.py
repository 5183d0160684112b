"""The selector that kafka-python is given does what the system's does, but for how it says that a file is none of its own."""

from __future__ import annotations

import selectors
import socket

import pytest

from streaming.kafka.client import Selector


class Silent(socket.socket):
    """A socket that must not be described: it takes two calls of the system's."""

    def __repr__(self) -> str:
        raise AssertionError("described")


def test_it_knows_what_was_registered_until_it_is_no_more() -> None:
    here, there = socket.socketpair()
    with here, there, Selector() as selector:
        first = selector.register(here, selectors.EVENT_WRITE, "data")
        assert selector.get_key(here) == first
        assert selector.modify(here, selectors.EVENT_READ, "other") == selector.get_key(here)
        assert selector.get_key(here).data == "other"
        assert selector.select(0) == []
        there.send(b"x")
        ((key, events),) = selector.select(1)
        assert (key, events) == (selector.get_key(here), selectors.EVENT_READ)
        assert len(selector.get_map()) == 1
        selector.unregister(here)
        assert not selector.get_map()
        with pytest.raises(KeyError):
            selector.get_key(here)
        with pytest.raises(KeyError):
            selector.unregister(there)


def test_a_socket_that_it_does_not_know_is_not_described() -> None:
    with Silent() as unknown, Selector() as selector, pytest.raises(KeyError):
        selector.get_key(unknown)
