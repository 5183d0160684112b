"""How tasks become a batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.history import History
from model.numbering import distinct
from model.tasks import Part, Task, collate, cut
from tests.model_cases import small_model


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 3))
def test_distinct_values_come_in_the_order_in_which_they_are_first_seen_whatever_the_cells_hold(values: list[int], junk: int) -> None:
    cells = np.random.default_rng(junk).integers(-50, 50, 13)
    found = distinct(np.array(values, np.int64), cells)
    assert found.tolist() == list(dict.fromkeys(values))
    assert [found[cells[value]] for value in values] == values


@given(st.lists(st.integers(), max_size=9), st.integers(0, 9), st.integers(0, 12), st.integers(-9, 9), st.integers(-9, 9))
def test_a_part_is_what_a_slice_would_be(of: list[int], start: int, stop: int, low: int, high: int) -> None:
    start, stop = sorted(min(place, len(of)) for place in (start, stop))
    part, expected = Part(of, start, stop), of[start:stop]
    assert (list(part), len(part), part[low:high]) == (expected, len(expected), expected[low:high])
    assert [part[place] for place in range(len(part))] == expected


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True), min_size=1, max_size=5), st.data())
def test_a_batch_is_the_same_whether_its_items_are_looked_up_or_stand_in_histories(lists: list[list[str]], data: st.DataObject) -> None:
    model = small_model()
    histories = [History.of(items, [float(place) for place in range(len(items))]) for items in lists]
    rehearsed = cut([f"u{number}" for number in range(len(lists))], histories, 3, np.random.default_rng(data.draw(st.integers(0, 9))))
    events = [
        Task(f"e{number}", of.items, of.ratings, [data.draw(st.sampled_from("abxyz"))], [2.0], of) for number, of in enumerate(histories)
    ]
    groups = data.draw(st.sampled_from([[rehearsed], [events], [events, rehearsed], [rehearsed, events, rehearsed]]))
    found = collate(groups, model.users, model.items, model.scale, torch.float64)
    expected = collate(
        [[task._replace(history=None) for task in group] for group in groups], model.users, model.items, model.scale, torch.float64
    )
    for name, value in expected._asdict().items():
        if isinstance(value, (torch.Tensor, np.ndarray)):
            assert np.array_equal(getattr(found, name), value), name
    assert all(map(np.array_equal, found.ends, expected.ends))
    assert all(torch.equal(one, other) for one, other in zip(found.support, expected.support, strict=True))
