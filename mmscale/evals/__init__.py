"""Evaluation: scores on held-out samples, gathered from all ranks, with chance beside them."""
