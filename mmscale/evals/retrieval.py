"""Retrieval: how often the right one of N candidates is among the k most similar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval(
    queries: Tensor, candidates: Tensor, *, ks: Sequence[int] = (1, 5, 10), rows_at_once: int = 1024
) -> dict[int, float]:
    """R@k for each k: the share of queries[i] that have candidates[i] among their k most similar candidates.

    queries, candidates: (N, D) of unit length. Memory O(rows_at_once * N). A tie counts against the query: the right
    candidate stands behind all that are as similar, so that a model that gives one answer to everything scores zero.
    """
    if queries.shape != candidates.shape:
        raise ValueError(
            f"queries and candidates must pair up, got {tuple(queries.shape)} and {tuple(candidates.shape)}"
        )
    num = len(queries)
    if num == 0:
        return dict.fromkeys(ks, 0.0)
    ranks = []
    for start in range(0, num, rows_at_once):
        similarity = queries[start : start + rows_at_once] @ candidates.T
        rows = torch.arange(len(similarity), device=similarity.device)
        right = similarity[rows, rows + start].unsqueeze(1)
        ahead = ~(similarity < right)  # NaN counts as ahead
        ahead[rows, rows + start] = False
        ranks.append(ahead.sum(1))
    rank = torch.cat(ranks)
    return {k: (rank < k).double().mean().item() for k in ks}


def distinct_rows(labels: Tensor) -> Tensor:
    """The rows that are the first of their label, in order: candidates that can't be mistaken for each other."""
    seen: set[int] = set()
    rows = []
    for row, label in enumerate(labels.tolist()):
        if label not in seen:
            seen.add(label)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)
