"""How good a shuffle is, measured on the order it gives.

    from mmscale.data.quality import shuffle_quality
    shuffle_quality(order.at(0, np.arange(num_samples)), batch_size=256)

Each figure is scaled so that a uniform permutation has 1 (or 0 for `displacement`) on average; `order` is an (n,) int64
permutation of [0, n): the sample at each position. All take time and memory in proportion to n. An order that
leaves out or repeats samples isn't a permutation, and is refused with ValueError.
"""

import numpy as np


def neighbour_distance(order: np.ndarray) -> float:
    """Mean |order[p + 1] - order[p]|, over (n + 1) / 3, its expectation under a uniform permutation. 1 is good, no
    shuffle has 3 / (n + 1)."""
    return float(np.abs(np.diff(order)).mean() * 3 / (len(order) + 1))


def class_imbalance(order: np.ndarray, batch_size: int, num_classes: int, stretch: int = 1) -> float:
    """How uneven classes are in `stretch` consecutive batches, if the data lie sorted by class: chi-squared over its
    expectation under uniform draws.

    Class of sample s: s * num_classes // n. For each stretch of m = stretch * batch_size positions, chi-squared is
    sum_c (count_c - m p_c)^2 / (m p_c) with p_c the share of class c; drawn without replacement its expectation is
    (num_classes - 1) (n - m) / (n - 1). 1 is good; below 1 is more even than chance; m or more for no shuffle.
    """
    n, size = len(order), stretch * batch_size
    num_stretches = n // size
    if not num_stretches or size == n:
        raise ValueError(f"{n} samples are no more than one stretch of {stretch} batches of {batch_size}")
    classes = order[: num_stretches * size].astype(np.int64) * num_classes // n
    cells = np.arange(len(classes)) // size * num_classes + classes
    counts = np.bincount(cells, minlength=num_stretches * num_classes).reshape(num_stretches, num_classes)
    expected = size * np.bincount(np.arange(n) * num_classes // n, minlength=num_classes) / n
    chi_squared = ((counts - expected) ** 2 / expected).sum(axis=1).mean()
    return float(chi_squared / ((num_classes - 1) * (n - size) / (n - 1)))


def displacement(order: np.ndarray) -> float:
    """Pearson's correlation of position and sample: how much of the stored order is left. 0 is good (its
    deviation under a uniform permutation is 1 / sqrt(n - 1)), 1 for no shuffle."""
    return float(np.corrcoef(np.arange(len(order)), order)[0, 1])


def neighbours_near(order: np.ndarray, batch_size: int, within: int = 64, stretch: int = 0) -> float:
    """How many pairs of samples that lie at most `within` apart come in the same batch (stretch 0) or at most `stretch`
    batches apart, over the number expected under a uniform permutation.

    Counted are the pairs (s, s + d), d = 1 ... within; P(two given samples come at most k batches apart) is the
    share of such pairs of positions. 1 is good, 0 means never, no shuffle has about n / batch_size / (1 + 2 stretch).
    """
    n = len(order)
    batches = np.empty(n, np.int64)
    batches[order] = np.arange(n) // batch_size
    near = total = 0
    for distance in range(1, min(within, n - 1) + 1):
        near += int(np.count_nonzero(np.abs(batches[distance:] - batches[:-distance]) <= stretch))
        total += n - distance
    sizes = np.bincount(batches)
    pairs = int((sizes * (sizes - 1) // 2).sum())
    pairs += sum(int((sizes[k:] * sizes[:-k]).sum()) for k in range(1, min(stretch, len(sizes) - 1) + 1))
    expected = total * pairs / (n * (n - 1) / 2)
    return near / expected if expected else 0.0


def shuffle_quality(
    order: np.ndarray, batch_size: int, *, num_classes: int = 100, stretch: int = 64, within: int = 64
) -> dict[str, float]:
    """All figures of an order, by name; the ones ending in `_stretch` look at that many batches together."""
    if len(order) < 2 or not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"not a permutation of [0, {len(order)})")
    return {
        "neighbour_distance": neighbour_distance(order),
        "displacement": displacement(order),
        "class_imbalance_batch": class_imbalance(order, batch_size, num_classes),
        "class_imbalance_stretch": class_imbalance(order, batch_size, num_classes, stretch),
        "neighbours_in_batch": neighbours_near(order, batch_size, within),
        "neighbours_in_next_batch": neighbours_near(order, batch_size, within, 1),
        "neighbours_in_stretch": neighbours_near(order, batch_size, within, stretch),
    }
