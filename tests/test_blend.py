"""Blends: never off by one sample, the same from any position, exact over changes of the weights."""

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data.order import MAX_HISTORY_BYTES, Blend, BlendHistory, sample_weights
from mmscale.errors import ConfigError, DataError

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)


def named(weights: list[Any]) -> dict[str, Any]:
    return {f"s{i}": weight for i, weight in enumerate(weights)}


def largest_deviation(sources: np.ndarray, shares: list[Fraction]) -> Fraction:
    """Over all positions and sources: |times drawn - position * share|, exactly."""
    period = math.lcm(*(share.denominator for share in shares))
    positions = np.arange(1, len(sources) + 1, dtype=np.int64)
    worst = 0
    for i, share in enumerate(shares):
        drawn = np.cumsum(sources == i, dtype=np.int64)
        worst = max(worst, int(np.abs(drawn * period - positions * int(share * period)).max()))
    return Fraction(worst, period)


@given(weights=WEIGHTS)
@settings(max_examples=100, deadline=None)
def test_never_off_by_one_sample(weights: list[int]) -> None:
    """Tijdeman's bound: 1 - 1 / (2n - 2), in whole numbers, so without a tolerance."""
    blend = Blend(named(weights))
    sources, _ = blend.at(np.arange(3 * blend.period))
    num_drawn = sum(weight > 0 for weight in weights)
    bound = 1 - Fraction(1, 2 * num_drawn - 2) if num_drawn > 1 else Fraction(0)
    assert largest_deviation(sources, list(blend.effective.values())) <= bound
    assert [blend.effective[name] for name in blend.names] == [Fraction(w, sum(weights)) for w in weights]
    assert all(weights[source] for source in set(sources.tolist()))


def test_never_off_by_one_sample_with_many_uneven_sources() -> None:
    rng = np.random.default_rng(0)
    weights = named([*rng.lognormal(0, 2, 60).tolist(), 0])
    blend = Blend(weights, resolution=20_000)
    sources, _ = blend.at(np.arange(2 * blend.period))
    assert largest_deviation(sources, list(blend.effective.values())) <= 1 - Fraction(1, 2 * 60 - 2)
    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(float(blend.effective[name]) - weight / total) < 1 / 20_000


@given(weights=WEIGHTS, start=st.integers(0, 10**15))
@settings(max_examples=50, deadline=None)
def test_counters_and_counts_agree_from_any_position(weights: list[int], start: int) -> None:
    blend = Blend(named(weights))
    counts = blend.counts(start)
    assert counts.sum() == start
    sources, counters = blend.at(start + np.arange(200))
    for source, counter in zip(sources.tolist(), counters.tolist(), strict=True):
        assert counter == counts[source]
        counts[source] += 1
    assert np.array_equal(counts, blend.counts(start + 200))


def test_schedule_never_changes() -> None:
    """Pinned: a run resumed with a later version must draw from the same sources."""
    sources, _ = Blend({"a": 5, "b": 3, "c": 1}).at(np.arange(18))
    assert "".join("abc"[source] for source in sources) == "ababaacbaababaacba"


def test_decimals_mean_what_they_say() -> None:
    blend = Blend({"a": 0.1, "b": 0.2, "c": 0.7})
    assert blend.effective == {"a": Fraction(1, 10), "b": Fraction(2, 10), "c": Fraction(7, 10)}
    assert Blend({"a": 3, "b": 3}).period == 2
    assert Blend({"a": Fraction(1, 3), "b": Fraction(2, 3)}).effective["a"] == Fraction(1, 3)
    assert Blend({"only": 2.5}).at(np.array([7]))[1].tolist() == [7]


def test_weights_beyond_the_resolution_are_rounded() -> None:
    blend = Blend({"c": 1.0, "b": math.e, "a": math.pi}, resolution=100)
    assert blend.effective == {"a": Fraction(46, 100), "b": Fraction(40, 100), "c": Fraction(14, 100)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"good": 1, "bad": -0.5}, r"weight of source 'bad': must be finite and not negative, got -0\.5"),
        ({"good": 1, "bad": math.nan}, "weight of source 'bad': must be finite and not negative, got nan"),
        ({"good": 1, "bad": math.inf}, "weight of source 'bad': must be finite"),
        ({"good": 1, "bad": "2"}, "weight of source 'bad': must be a number, got '2'"),
        ({"good": 1, "bad": True}, "weight of source 'bad': must be a number, got True"),
        ({"good": 1.0, "bad": 1e-7}, r"source 'bad': 1e-07 of the samples is less than .* 1 / 65536"),
        ({"a": 0, "b": 0.0}, "at least one source must have a positive weight"),
        ({}, "at least one source must have a positive weight"),
    ],
)
def test_bad_weights_are_named(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Blend(weights)


def test_weights_by_tokens() -> None:
    weights = sample_weights({"short": 0.5, "long": 0.5}, {"short": 25, "long": 100})
    assert weights == {"short": Fraction(4, 5), "long": Fraction(1, 5)}
    counts = Blend(weights).counts(1000)
    assert (counts * [25, 100]).tolist() == [20_000, 20_000]
    for mean in (0, math.nan, None):
        with pytest.raises(ConfigError, match="mean tokens of source 'b': must be a positive number"):
            sample_weights({"a": 1, "b": 1}, {"a": 1} if mean is None else {"a": 1, "b": mean})


# --- weights that change ---


def changing(num_changes: int) -> BlendHistory:
    history = BlendHistory({"a": 0.7, "b": 0.3, "c": 0})
    for i in range(1, num_changes + 1):
        history.change(997 * i, {"c": i / 1000, "a": 0.7, "b": 0.3})
    return history


def test_the_bound_holds_in_each_segment_and_counters_go_on() -> None:
    history = changing(5)
    sources, counters = history.at(np.arange(6 * 997))
    seen = [0, 0, 0]
    for source, counter in zip(sources.tolist(), counters.tolist(), strict=True):
        assert counter == seen[source]
        seen[source] += 1
    assert history.counts(6 * 997).tolist() == seen
    for i, record in enumerate(history.records()):
        shares = [Fraction(share) for share in record["weights"].values()]
        assert record["position"] == 997 * i
        part = sources[997 * i : 997 * (i + 1)]
        assert largest_deviation(part, shares) < 1
        assert list(record["counts"].values()) == [int((sources[: 997 * i] == s).sum()) for s in range(3)]
    assert history.effective["c"] == Fraction(5, 1005)


def test_state_is_small_and_replays_what_it_says() -> None:
    history = changing(300)
    text = json.dumps(history.to_json())
    assert len(text) <= MAX_HISTORY_BYTES < 4096
    read = BlendHistory.from_json(json.loads(text))
    assert read.replay_from == read.to_json()["replay_from"] > 0
    assert len(read.records()) > 20
    assert len(history.records()) == 301
    positions = np.arange(read.replay_from, 310 * 997)
    for ours, theirs in zip(read.at(positions), history.at(positions), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(read.counts(305 * 997), history.counts(305 * 997))
    with pytest.raises(DataError, match=rf"position 5 .* replay from position {read.replay_from} on"):
        read.at(np.array([10**6, 5]))
    with pytest.raises(DataError, match="can replay from"):
        read.counts(5)
    # Going on from the state and from the history is the same.
    for each in (read, history):
        each.change(310 * 997, {"a": 1, "b": 1, "c": 1})
    assert read.to_json() == history.to_json()


def test_changing_twice_in_a_place_or_to_the_same() -> None:
    history = BlendHistory({"a": 1, "b": 1})
    history.change(100, {"a": 2, "b": 2})
    assert len(history.records()) == 1
    history.change(100, {"a": 1, "b": 2})
    history.change(100, {"a": 1, "b": 3})
    assert [record["position"] for record in history.records()] == [0, 100]
    assert history.counts(104).tolist() == [51, 53]
    with pytest.raises(ValueError, match="changed at position 100 already, 99 is before"):
        history.change(99, {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match=r"the sources are \['a', 'b'\], got \['a'\]"):
        history.change(200, {"a": 1})


def test_too_many_sources_for_a_state() -> None:
    BlendHistory(named([1] * 60))
    with pytest.raises(ConfigError, match="200 sources: their names and weights don't fit"):
        BlendHistory(named([1] * 200))


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"sources": ["a"]},
        {"segments": []},
        {"segments": [[10, [4, 5], [1, 1]]]},
        {"segments": [[0, [0, 0], [1, -1]]]},
        {"segments": [[5, [2, 3], [1, 1]], [0, [0, 0], [1, 1]]]},
        {"resolution": "many"},
    ],
)
def test_damaged_states_are_refused(damage: dict[str, Any]) -> None:
    state = BlendHistory({"a": 1, "b": 1}).to_json()
    BlendHistory.from_json(state)
    with pytest.raises(DataError, match="not a history of a blend"):
        BlendHistory.from_json({**state, **damage})
