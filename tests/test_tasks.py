"""How tasks become a batch."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.numbering import first_seen


@given(arrays.arrays(np.int64, arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=20), elements=st.integers(0, 12)))
def test_distinct_values_come_in_the_order_in_which_they_are_first_seen(values: np.ndarray) -> None:
    unique, inverse = first_seen(values)
    assert unique.tolist() == list(dict.fromkeys(values.ravel().tolist()))
    assert inverse.shape == values.shape
    assert (unique[inverse] == values).all()
