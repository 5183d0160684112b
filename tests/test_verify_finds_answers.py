"""The verifier finds answers that are missing, double or wrong: each of these runs is spoiled on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers.requests import Requests
from consumers.scoring import Ranking, rank
from model.catalogue import Catalogue
from model.mamo import Mamo
from streaming.events import Request, Support
from streaming.log import Message
from tests.small_runs import Stream, fill, run, small
from tests.test_promises import findings
from tests.test_requests import request


def skip_a_request(patch: pytest.MonkeyPatch) -> None:
    take = Requests.take
    patch.setattr(Requests, "take", lambda requests, records: take(requests, [*records[:2], *records[3:]]))


def answer_a_request_twice(patch: pytest.MonkeyPatch) -> None:
    take = Requests.take
    patch.setattr(Requests, "take", lambda requests, records: take(requests, [*records[:3], *records[2:]]))


def refuse_without_a_letter(patch: pytest.MonkeyPatch) -> None:
    decoded = Requests._decode
    patch.setattr(Requests, "_decode", lambda requests, due: (decoded(requests, due)[0], [], []))


def answer_from_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("consumers.requests.rank", lambda model, asked, _: rank(model, [(request, None) for request, _ in asked]))


def answer_worst_first(patch: pytest.MonkeyPatch) -> None:
    def worst(model: Mamo, asked: Sequence[tuple[Request, Support | None]], _: Catalogue) -> list[Ranking]:
        return [ranking._replace(scores=ranking.scores[::-1]) for ranking in rank(model, asked)]

    patch.setattr("consumers.requests.rank", worst)


def answer_somebody_else(patch: pytest.MonkeyPatch) -> None:
    message = Requests._message

    def renamed(requests: Requests, each: Any, request: Request, *rest: Any) -> Message:  # noqa: ANN401 - as the method
        return message(requests, each, msgspec.structs.replace(request, request="another"), *rest)

    patch.setattr(Requests, "_message", renamed)


BREAKS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "a request skipped": ("b", skip_a_request),
    "a request answered twice": ("b", answer_a_request_twice),
    "a refusal without a dead letter": ("b", refuse_without_a_letter),
    "an answer from nothing": ("d", answer_from_nothing),
    "the worst first": ("d", answer_worst_first),
    "an answer with another's name": ("d", answer_somebody_else),
}


@pytest.mark.parametrize("what", BREAKS)
def test_it_finds(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promise, spoil = BREAKS[what]
    settings = small(tmp_path / "log.db")
    fill(settings, [*Stream(100, seed=7, garbage=0).messages, *(request(f"u{n}", f"r{n}") for n in range(5)), request("u1", n=0)])
    spoil(monkeypatch)
    run(settings)
    assert {finding.promise for finding in findings(settings)} == {promise}
