"""mep.pareto: fronts, fronts of sums and the knapsack, each against all there is."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mep.pareto import front, knapsack, merge

numbers = st.integers(0, 6).map(float)  # few values, so that ties are common
points = st.lists(st.tuples(numbers, numbers), max_size=30)
blocks = st.lists(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=4
)


def columns(blocks):
    "Costs and values of each block"
    costs = [[c for c, _ in b] for b in blocks]
    values = [[v for _, v in b] for b in blocks]
    return costs, values


def total(tables, choice):
    return sum(t[i] for t, i in zip(tables, choice))


def every(costs, values):
    "(choice, cost, value) of all choices"
    choices = product(*(range(len(c)) for c in costs))
    return [(p, total(costs, p), total(values, p)) for p in choices]


# The front


def beats(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(points)
def test_front_is_the_set_of_unbeaten_points(ps):
    kept = front([c for c, _ in ps], [v for _, v in ps])
    assert {ps[i] for i in kept} == {p for p in ps if not any(beats(q, p) for q in ps)}
    assert [ps[i][0] for i in kept] == sorted({ps[i][0] for i in kept})


@given(points)
def test_of_equal_points_the_first_is_kept(ps):
    for i in front([c for c, _ in ps], [v for _, v in ps]):
        assert ps.index(ps[i]) == i


def test_infinite_points_are_points():
    assert front([0, 1, np.inf], [-np.inf, 1, np.inf]).tolist() == [0, 1, 2]
    assert front([0, 0], [-np.inf, 1]).tolist() == [1]


@pytest.mark.parametrize("cost, value", [([0, np.nan], [1, 1]), ([0, 1], [1, np.nan])])
def test_nan_is_refused_and_named(cost, value):
    with pytest.raises(ValueError, match="Point 1 is .*nan.*Leave the point out"):
        front(cost, value)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 costs and 1 values"):
        front([1, 2], [1])
    with pytest.raises(ValueError):
        merge([[1.0], [2.0]], [[1.0]])
    with pytest.raises(ValueError):
        knapsack([[1.0], [2.0]], [[1.0]], 5)


# Fronts of sums


@settings(max_examples=60, deadline=None)
@given(blocks, st.none() | st.integers(0, 20))
def test_merged_blocks_are_the_listed_front(blocks, limit):
    limit = np.inf if limit is None else limit
    costs, values = columns(blocks)
    listed = [(c, v) for _, c, v in every(costs, values) if c <= limit]
    picks, c, v = merge(costs, values, limit)
    kept = front([a for a, _ in listed], [b for _, b in listed])
    assert list(zip(c, v)) == [listed[i] for i in kept]
    for pick, a, b in zip(picks, c, v):
        assert (total(costs, pick), total(values, pick)) == (a, b)


def test_merging_is_exact_in_a_large_space():
    rng = np.random.default_rng(0)
    costs = [rng.gamma(2, 1, 100) for _ in range(8)]
    values = [rng.gamma(2, 1, 100) for _ in range(8)]
    picks, c, v = merge(costs, values)
    assert len(picks) > 50
    assert (np.diff(c) > 0).all() and (np.diff(v) > 0).all()
    for choice in rng.integers(0, 100, (2000, 8)):
        at = np.searchsorted(c, total(costs, choice) + 1e-9) - 1
        assert v[at] >= total(values, choice) - 1e-9


# The knapsack

amounts = st.integers(1, 30) | st.floats(0.01, 30)
items = st.lists(
    st.lists(st.tuples(amounts, st.floats(-3, 3)), min_size=1, max_size=5), min_size=1, max_size=5
)
scales = st.sampled_from([1e-9, 1.0, 1e9])


@settings(max_examples=200, deadline=None)
@given(items, st.data(), scales, scales)
def test_knapsack_is_exact(blocks, data, cost_scale, value_scale):
    costs, values = columns(blocks)
    costs = [[c * cost_scale for c in b] for b in costs]
    values = [[v * value_scale for v in b] for b in values]
    listed = every(costs, values)
    _, budget, _ = data.draw(st.sampled_from(listed))  # so that rounding would show
    best = max(v for _, c, v in listed if c <= budget)
    chosen = knapsack(costs, values, budget)
    assert total(costs, chosen) <= budget
    assert total(values, chosen) == pytest.approx(best, abs=1e-10 * value_scale)


def test_the_best_density_is_not_the_best_choice():
    costs = [[0, 6], [0, 5], [0, 5]]
    values = [[0, 7], [0, 5], [0, 5]]
    assert knapsack(costs, values, 10) == [0, 1, 1]


def most_by_table(costs, values, budget):
    "The highest sum of values, for whole costs: one entry per amount that may be spent"
    best = np.zeros(budget + 1)
    for c, v in zip(costs, values):
        rows = [np.append(np.full(a, -np.inf), best[: budget + 1 - a]) + b for a, b in zip(c, v)]
        best = np.max(rows, axis=0)
    return best[-1]


@pytest.mark.parametrize("seed", range(5))
def test_many_layers_against_a_table(seed):
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 300, 12) for _ in range(30)]
    values = [c**0.3 * rng.uniform(0.5, 1.5, 12) for c in costs]
    chosen = knapsack(costs, values, 1500)
    assert total(costs, chosen) <= 1500
    assert total(values, chosen) == pytest.approx(most_by_table(costs, values, 1500), rel=1e-9)


def test_knapsack_says_what_the_least_costs():
    with pytest.raises(ValueError, match="cost 7 together, more than the budget of 5"):
        knapsack([[3], [4]], [[0], [0]], 5)
    with pytest.raises(ValueError, match="more than the budget of nan"):
        knapsack([[3], [4]], [[0], [0]], float("nan"))


def test_knapsack_of_nothing_and_of_what_can_not_be():
    assert knapsack([], [], 0) == []
    with pytest.raises(ValueError, match="no options"):
        knapsack([[1], []], [[1], []], 5)
    with pytest.raises(ValueError, match="infinite"):
        knapsack([[1, 2]], [[0, np.inf]], 5)
