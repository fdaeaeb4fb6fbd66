from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.timing import Sample, alternate, difference, ratio

VALUES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=50)


def test_median_and_quartiles_of_a_known_sample() -> None:
    sample = Sample((9.0, 1.0, 5.0, 3.0, 7.0))
    assert (sample.low, sample.median, sample.high) == (3.0, 5.0, 7.0)


def test_few_measurements_are_spread_from_smallest_to_largest() -> None:
    sample = Sample((2.0, 8.0, 3.0))
    assert (sample.low, sample.median, sample.high) == (2.0, 3.0, 8.0)


@given(VALUES)
def test_spread_encloses_the_median(values: list[float]) -> None:
    sample = Sample(tuple(values))
    assert min(values) <= sample.low <= sample.median <= sample.high <= max(values)


def test_percentile_is_the_nearest_rank() -> None:
    sample = Sample(tuple(float(n) for n in range(100, 0, -1)))
    assert [sample.percentile(p) for p in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert Sample((5.0,)).percentile(99) == 5.0


def test_an_empty_sample_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Sample(())


def test_ratio_and_difference_compare_within_a_round() -> None:
    # The machine is twice as slow in the second round; the ratio must not show it.
    ours, theirs = Sample((1.0, 2.0, 1.0)), Sample((4.0, 8.0, 4.0))
    assert ratio(ours, theirs).values == (0.25, 0.25, 0.25)
    assert difference(theirs, ours).values == (3.0, 6.0, 3.0)


def test_samples_of_unequal_length_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio(Sample((1.0,)), Sample((1.0, 2.0)))


def test_alternate_takes_turns_and_varies_the_order() -> None:
    order: list[str] = []

    def meter(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = alternate({name: partial(meter, name) for name in "abc"}, 60, warmup=1)
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert len(rounds) == 61
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    # The warm-up round is not counted.
    assert samples["a"].values == tuple(i + 1.0 for i in range(3, 183) if order[i] == "a")
    behind = Counter(pair for pair in pairwise(order) if pair[1] == "a")
    assert min(behind["b", "a"], behind["c", "a"]) > 15
    assert list(samples) == ["a", "b", "c"]


def test_no_round_begins_after_the_time_is_up() -> None:
    samples = alternate({name: partial(float, 1) for name in "ab"}, 60, warmup=2, budget=0)
    assert {name: len(sample.values) for name, sample in samples.items()} == {"a": 1, "b": 1}
