"""How tasks become a batch."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.numbering import first_seen, first_seen_by_group


@given(arrays.arrays(np.int64, arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=20), elements=st.integers(0, 12)))
def test_distinct_values_come_in_the_order_in_which_they_are_first_seen(values: np.ndarray) -> None:
    unique, inverse = first_seen(values)
    assert unique.tolist() == list(dict.fromkeys(values.ravel().tolist()))
    assert inverse.shape == values.shape
    assert (unique[inverse] == values).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=40))
def test_by_group_they_stand_group_after_group_and_are_told_apart(pairs: list[tuple[int, int]]) -> None:
    groups, values = (np.array([pair[part] for pair in pairs], np.int64) for part in (0, 1))
    distinct, place, ends = first_seen_by_group(groups, values, 4)
    expected = [list(dict.fromkeys(value for of, value in pairs if of == group)) for group in range(4)]
    assert distinct.tolist() == [value for part in expected for value in part]
    assert ends == np.cumsum([len(part) for part in expected]).tolist()
    for (group, value), at in zip(pairs, place.tolist(), strict=True):
        assert distinct[at] == value
        assert at < ends[group]
        assert group == 0 or at >= ends[group - 1]
