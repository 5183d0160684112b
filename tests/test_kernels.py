"""The compiled loops that number, scatter and follow, against the same in a few lines. `adapt` and `pull`: tests/test_engine.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model.compiled
from model import adam
from model.compiled import compiled
from model.meta import CLOCK
from model.numbering import Embedding, number, number_once, scatter

TASKS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=3)), min_size=1, max_size=5
)


@given(st.lists(TASKS, min_size=1, max_size=4), st.integers(0, 1000))
def test_numbers_are_given_in_the_order_of_first_coming_once_in_a_group(groups: list[list[tuple[list[int], list[int]]]], seed: int) -> None:
    tasks, rng = [task for group in groups for task in group], np.random.default_rng(seed)
    lengths, queries = (np.array([len(task[part]) for task in tasks]) for part in (0, 1))
    sizes, rating_of = np.array([len(group) for group in groups]), rng.random(10)
    # Some queries stand in what is held, behind the support and something else; the others are given beside it.
    held, ends, at, asked = list[int](), list[int](), list[int](), list[int]()
    for support, query in tasks:
        between = rng.integers(0, 10, rng.integers(0, 3)).tolist()
        within = bool(rng.integers(2))
        at.append(len(support) + len(between) if within else -1)
        held += support + between + (query if within else [])
        asked += [] if within else query
        ends.append(len(held))

    def rated(values: list[int]) -> np.ndarray:
        return np.array([(value, rating_of[value]) for value in values]).reshape(-1, 2)

    cells = rng.integers(-2, 12, (10, 2))
    found = number(rated(held), np.array(ends), lengths, np.array(at), queries, rated(asked), sizes, cells, np.empty(0))
    expected = [list(dict.fromkeys(value for support, query in group for value in support + query)) for group in groups]
    assert found.distinct[found.item_of].tolist() == [value for part in expected for value in part]
    assert found.distinct.tolist() == list(dict.fromkeys(value for part in expected for value in part))
    assert found.ends.tolist() == np.cumsum([len(part) for part in expected]).tolist()
    assert found.starts.tolist() == [0, *np.cumsum(lengths).tolist()]
    there = np.arange(found.query_mask.shape[1]) < queries[:, None]
    assert (found.query_mask == there).all()
    assert not found.query_items[~there].any()
    assert not found.query_ratings[~there].any()
    numbers = np.concatenate([found.items, found.query_items[there]])
    values = [value for part in (0, 1) for task in tasks for value in task[part]]
    assert found.distinct[found.item_of[numbers]].tolist() == values
    assert np.concatenate([found.ratings, found.query_ratings[there]]).tolist() == rating_of[values].tolist()
    group_of = np.repeat(np.arange(len(groups)), sizes)
    of_group = np.concatenate([np.repeat(group_of, lengths), np.repeat(group_of, queries)])
    assert (np.searchsorted(found.ends, numbers, side="right") == of_group).all()


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=4))
def test_users_are_numbered_once_in_a_group(groups: list[list[int]]) -> None:
    numbers, firsts, ends = number_once(np.array(list(chain(*groups))), np.array([len(group) for group in groups]), np.full((6, 2), 2))
    places = iter(numbers.tolist())
    kept = np.array(list(chain(*groups)))[firsts].tolist()
    begin = 0
    for group, end in zip(groups, ends.tolist(), strict=True):
        assert kept[begin:end] == list(dict.fromkeys(group))
        assert [kept[next(places)] for _ in group] == group
        begin = end


@given(st.data())
def test_gradients_reach_each_row_once_in_a_group(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    feature_of = np.array([0, 1, 1, 1, 2])
    first = np.array([True, True, False, False, True])
    rows, weights = rng.integers(0, 6, (7, 5)), rng.integers(0, 2, (7, 5)) * rng.random((7, 5))
    group_of = np.array(sorted(data.draw(st.lists(st.integers(0, 3), max_size=12))), np.int64)
    member, member_ends = rng.integers(0, 7, len(group_of)), np.searchsorted(group_of, np.arange(4), side="right")
    width = data.draw(st.integers(2, 3))
    at, rest = rng.standard_normal((len(group_of), 3, 2)), rng.standard_normal(len(group_of))
    expected: list[dict[int, np.ndarray]] = [{} for _ in range(4)]
    for place, (of, profile) in enumerate(zip(group_of, member, strict=True)):
        for slot in range(5):
            if weights[profile, slot] or first[slot]:
                row = int(rows[profile, slot])
                own = [*at[place, feature_of[slot]], rest[place]][:width]
                expected[of][row] = expected[of].get(row, np.zeros(width)) + weights[profile, slot] * np.array(own)
    of_all = Embedding(np.zeros((6, width)), rows, weights, member, feature_of, 3, 2)
    found, values, ends = scatter(of_all, member_ends, at.reshape(-1, 6), rest, np.full(6, 2))
    assert found.tolist() == [row for group in expected for row in group]
    assert ends.tolist() == np.cumsum([len(group) for group in expected]).tolist()
    np.testing.assert_allclose(values, np.array([value for group in expected for value in group.values()]).reshape(-1, width), atol=1e-12)


@given(st.integers(0, 1000), st.sampled_from([1, 5, CLOCK + 3]), st.sampled_from([0.0, 0.003, 50.0]), st.sampled_from([3, 16, 21]))
def test_rows_follow_their_gradient_and_catch_up_with_decay(seed: int, count: int, decay: float, width: int) -> None:
    rng, rate, b2, scale = np.random.default_rng(seed), 0.01, 0.999, 0.25
    values, moments, gradient = rng.standard_normal((6, width)), rng.random((6, width + 1)), rng.standard_normal((2, width))
    moments[:, width] = rng.integers(0, 5, 6)
    rows = rng.choice(6, 2, replace=False)
    expected, after = values.copy(), moments.copy()
    for slope, row in zip(gradient * scale, rows, strict=True):
        waited, unbiased = (count - moments[row, width]) % CLOCK, 1 - b2**count
        for k in range(width):
            second, value = moments[row, k] * b2**waited, values[row, k]
            if moments[row, width]:
                steps = (1 - math.sqrt(b2) ** waited) / (1 - math.sqrt(b2))
                p = rate * decay * steps / (math.sqrt(second / unbiased) + 1e-8) / 2
                shrunk = abs(value) / (1 + p + p**2 / 2 + p**3 / 6 + p**4 / 24) ** 2
                value = math.copysign(max(shrunk, abs(value) - rate * waited), value)
            second += (1 - b2) * slope[k] ** 2
            expected[row, k], after[row, k] = value - rate * slope[k] / (math.sqrt(second / unbiased) + 1e-8), second
        after[row, width] = count % CLOCK
    adam.follow_rows(values, moments, rows, gradient, scale, rate, decay, b2, count, CLOCK)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_allclose(moments, after, rtol=1e-12)


@pytest.mark.parametrize("second", [1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("idle", [1, 30, 1000, 3000])
def test_a_row_that_waited_is_where_adam_on_the_whole_table_has_it(second: float, idle: int) -> None:
    """Adam with L2 decay in the gradient, as torch has it, without momentum: once a row was touched, the table takes so many more steps."""
    rate, decay, b2, before = 0.002, 0.006, 0.999, 5000
    row = torch.nn.Parameter(torch.tensor([0.05, -0.5], dtype=torch.float64))
    whole = torch.optim.Adam([row], lr=rate, betas=(0.0, b2), weight_decay=decay)
    moment = torch.full((2,), second, dtype=torch.float64)
    whole.state[row] = {"step": torch.tensor(float(before)), "exp_avg": torch.zeros(2).double(), "exp_avg_sq": moment.clone()}
    values, moments = row.detach().numpy().copy()[None], np.array([[second, second, before]])
    for _ in range(idle):
        row.grad = torch.zeros(2, dtype=torch.float64)
        whole.step()
    adam.follow_rows(values, moments, np.array([0]), np.zeros((1, 2)), 1.0, rate, decay, b2, before + idle, CLOCK)
    # The decay is itself part of torch's second moment, which keeps it from vanishing.
    np.testing.assert_allclose(values[0], row.detach().numpy(), rtol=0.03, atol=0.003)


def test_to_wait_often_is_to_wait_once() -> None:
    once, often = ((np.array([[0.5, -0.05]]), np.array([[1e-3, 1e-5, 5000.0]])) for _ in range(2))

    def wait(values: npt.NDArray[np.float64], moments: npt.NDArray[np.float64], until: int) -> None:
        adam.follow_rows(values, moments, np.array([0]), np.zeros((1, 2)), 1.0, 0.002, 0.006, 0.999, until, CLOCK)

    wait(*once, 7000)
    for until in range(5100, 7100, 100):
        wait(*often, until)
    np.testing.assert_allclose(once[0], often[0], rtol=0.01, atol=0.001)
    np.testing.assert_allclose(once[1], often[1], rtol=1e-9)


def test_where_nothing_can_be_kept_loops_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[bool]()

    def njit(**options: Any) -> Callable[[Callable[[], int]], Callable[[], int]]:  # noqa: ANN401
        asked.append("cache" in options)
        if "cache" in options:
            raise RuntimeError("cannot cache function 'one': no locator available")
        return lambda function: function

    monkeypatch.setattr("model.compiled.njit", njit)
    assert compiled(lambda: 1)() == 1
    assert asked == [True, False]


def test_what_was_kept_is_made_anew_when_a_function_of_another_file_has_changed(tmp_path: Path) -> None:
    """Numba by itself looks at the file of the function that is called, and would go on with what was compiled into it."""
    package = tmp_path / "model"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "compiled.py").write_text(Path(model.compiled.__file__).read_text())
    (package / "outer.py").write_text(
        "from model.compiled import compiled\nfrom model.inner import inner\n\n@compiled\ndef outer():\n    return inner()\n"
    )

    def called(value: int) -> list[str]:
        inner = f"from model.compiled import compiled\n\n@compiled\ndef inner():\n    return {value}\n"
        (package / "inner.py").write_text(inner)
        code = "from model.outer import outer; print(outer(), sum(outer.stats.cache_hits.values()))"
        # Python takes what it kept of a module for the source's where that was written in the same second and is as long.
        kept = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=kept)
        return done.stdout.split()

    assert called(1) == ["1", "0"]
    assert called(1) == ["1", "1"]
    assert called(2) == ["2", "0"]


def test_a_full_disk_is_no_reason_not_to_use_what_was_compiled(tmp_path: Path) -> None:
    package = tmp_path / "model"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "compiled.py").write_text(Path(model.compiled.__file__).read_text())
    (package / "one.py").write_text("from model.compiled import compiled\n\n@compiled\ndef one():\n    return 1\n")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from model.one import one; print(one())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_two_processes_that_keep_different_types_at_once_never_load_each_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def one(x: float) -> float:
        return x

    file = cast("Any", compiled(one))._cache._cache_file
    load, save = file._load_index, file._save_data

    def interrupted(name: str, data: str) -> None:
        file._save_data = save
        file.save("another", "another's")
        save(name, data)

    # Both have read the index before either writes, and one writes between the other's two files.
    file._load_index, file._save_data = dict, interrupted
    file.save("one", "one's")
    file._load_index = load
    assert file.load("another") in (None, "another's")
    assert file.load("one") == "one's"
    file.save("another", "another's")
    assert [file.load(key) for key in ("one", "another")] == ["one's", "another's"]


@given(st.integers(0, 1000), st.integers(1, 6))
def test_phi_follows_as_torch_has_adam(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    value: np.ndarray = rng.standard_normal(4)
    moments: np.ndarray = np.zeros((2, 4))
    rates, decays = np.array([0.1, 0.1, 0.003, 0.003]), np.array([0.0, 0.0, 0.5, 0.5])
    parts = [torch.tensor(value[:2], requires_grad=True), torch.tensor(value[2:], requires_grad=True)]
    theirs = torch.optim.Adam(
        [{"params": [parts[0]], "lr": 0.1, "weight_decay": 0.0}, {"params": [parts[1]], "lr": 0.003, "weight_decay": 0.5}]
    )
    for count in range(1, steps + 1):
        gradient = rng.standard_normal(4)
        for part, of in zip(parts, np.split(gradient * 0.25, 2), strict=True):
            part.grad = torch.tensor(of)
        theirs.step()
        value, moments = adam.follow(value, moments, gradient, 0.25, rates, decays, 0.9, 0.999, count)
    np.testing.assert_allclose(value, torch.cat(parts).detach().numpy(), rtol=1e-9)
