"""The cluster that the tests of faults share: it takes some 8 s to start. Whoever takes nodes away puts them back."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest


@pytest.fixture(scope="session")
def _session_cluster() -> Iterator[harness.Nodes]:
    with harness.cluster() as nodes:
        yield nodes


@pytest.fixture
def shared_cluster(_session_cluster: harness.Nodes) -> Iterator[harness.Nodes]:
    """A head without CPUs and three nodes with two each, whole again before and after each test."""
    _session_cluster.refill()
    yield _session_cluster
    _session_cluster.refill()
