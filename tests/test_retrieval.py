"""Retrieval scores against counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmscale.evals.retrieval import distinct_rows, retrieval


def by_hand(queries: torch.Tensor, candidates: torch.Tensor, k: int) -> float:
    found = 0
    for i, query in enumerate(queries):
        right = query @ candidates[i]
        ahead = sum(not bool(query @ other < right) for j, other in enumerate(candidates) if j != i)
        found += ahead < k
    return found / len(queries)


@given(num=st.integers(1, 12), dim=st.integers(1, 3), rows=st.integers(1, 5), seed=st.integers(0, 1000))
def test_equals_counting_by_hand(num: int, dim: int, rows: int, seed: int) -> None:
    # Small whole numbers: products are exact in any order of summing, and ties abound.
    draw = torch.Generator().manual_seed(seed)
    queries, candidates = (torch.randint(-2, 3, (num, dim), generator=draw).double() for _ in range(2))
    found = retrieval(queries, candidates, ks=(1, 3, 50), rows_at_once=rows)
    assert found == {k: by_hand(queries, candidates, k) for k in (1, 3, 50)}


def test_one_answer_to_everything_scores_zero() -> None:
    same = torch.ones(20, 4)
    assert retrieval(same, same) == {1: 0.0, 5: 0.0, 10: 0.0}


def test_perfect_and_shifted() -> None:
    eye = torch.eye(8)
    assert retrieval(eye, eye, ks=(1,)) == {1: 1.0}
    assert retrieval(eye, eye.roll(1, 0), ks=(1, 7)) == {
        1: 0.0,
        7: 0.0,
    }  # the right one ties with six others, below one


def test_nan_counts_against_the_query() -> None:
    queries = torch.eye(3)
    broken = torch.eye(3)
    broken[1] = torch.nan
    assert retrieval(queries, broken, ks=(1, 2)) == {
        1: 0.0,
        2: 2 / 3,
    }  # ahead of 0 and 2; 1 is behind everything
    assert retrieval(torch.full((3, 3), torch.nan), queries, ks=(1,)) == {1: 0.0}


def test_the_number_of_rows_at_once_does_not_matter() -> None:
    draw = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(2, 100, 8, generator=draw, dtype=torch.float64)
    found = [retrieval(queries, candidates, rows_at_once=rows) for rows in (1, 7, 100, 1000)]
    assert all(one == found[0] for one in found)
    assert 0 < found[0][1] < found[0][10] < 1


def test_empty_and_unequal() -> None:
    assert retrieval(torch.zeros(0, 4), torch.zeros(0, 4)) == {1: 0.0, 5: 0.0, 10: 0.0}
    with pytest.raises(ValueError, match=r"must pair up, got \(2, 4\) and \(3, 4\)"):
        retrieval(torch.zeros(2, 4), torch.zeros(3, 4))


def test_distinct_rows_are_the_first_of_each_label() -> None:
    assert distinct_rows(torch.tensor([7, 3, 7, 7, 5, 3])).tolist() == [0, 1, 4]
    assert distinct_rows(torch.tensor([], dtype=torch.int64)).tolist() == []
