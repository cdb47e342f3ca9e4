"""The losses on 1, 2 and 3 ranks: the global loss everywhere, and the mean of the ranks' gradients is its
gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmscale_kernels import contrastive_loss, losses, sigmoid_loss, torch_losses
from ranks import run_ranks

pytestmark = pytest.mark.distributed

FEATURES = 6

# (name, op, rows on each of three ranks, columns on each, options). On fewer ranks the last ones are left
# out.
CASES: list[tuple[str, Callable[..., torch.Tensor], list[int], list[int], dict[str, Any]]] = [
    ("even", contrastive_loss, [4, 4, 4], [4, 4, 4], {}),
    ("uneven, one empty", contrastive_loss, [5, 0, 3], [5, 0, 3], {}),
    ("further negatives", contrastive_loss, [3, 0, 4], [5, 2, 4], {}),
    ("labels", contrastive_loss, [5, 2, 3], [5, 2, 3], {"labels": True}),
    ("weights", contrastive_loss, [2, 4, 0], [2, 4, 0], {"weights": True}),
    ("smoothing", contrastive_loss, [3, 1, 4], [3, 3, 4], {"label_smoothing": 0.2}),
    (
        "all at once",
        contrastive_loss,
        [4, 0, 5],
        [4, 0, 5],
        {"labels": True, "weights": True, "label_smoothing": 0.1},
    ),
    ("no weight at all", contrastive_loss, [3, 2, 4], [3, 2, 4], {"weights": 0.0}),
    ("sigmoid", sigmoid_loss, [5, 0, 3], [5, 0, 3], {}),
    ("sigmoid, further negatives", sigmoid_loss, [3, 0, 4], [5, 2, 4], {}),
    ("sigmoid, labels and weights", sigmoid_loss, [4, 1, 3], [4, 1, 3], {"labels": True, "weights": True}),
]


WAYS = [("torch", "gather"), ("torch", "ring"), ("torch", "auto"), ("reference", "auto")]


def make_case(index: int, num_ranks: int) -> dict[str, Any]:
    """The global batch of a case and the towers' parameters, the same on every rank."""
    _, op, rows, columns, options = CASES[index]
    rows, columns = rows[:num_ranks], columns[:num_ranks]
    generator = torch.Generator().manual_seed(index)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    options = dict(options)
    if "labels" in options:
        options["labels"] = torch.randint(0, 3, (sum(rows),), generator=generator)
    if options.get("weights") is True:
        options["weights"] = torch.rand(sum(rows), dtype=torch.float64, generator=generator)
    elif "weights" in options:
        options["weights"] = torch.zeros(sum(rows))
    return {
        "op": op,
        "rows": rows,
        "columns": columns,
        "options": options,
        "x": normal(sum(rows), FEATURES),
        "y": normal(sum(columns), FEATURES),
        # Parameters: gradients are compared on these, through which every rank's features go.
        "towers": [normal(FEATURES, FEATURES), normal(FEATURES, FEATURES)],
        "scalars": [torch.tensor(3.0).double(), torch.tensor(-1.5).double()],
    }


def dense_loss(
    case: dict[str, Any], x: torch.Tensor, y: torch.Tensor, scalars: list[torch.Tensor]
) -> torch.Tensor:
    """The losses written down once more, over the global batch, as dense fp64."""
    options, rows, columns = case["options"], case["rows"], case["columns"]
    starts = [sum(columns[:r]) for r in range(len(columns))]
    paired = torch.cat([start + torch.arange(n) for start, n in zip(starts, rows, strict=True)])
    if "labels" in options:
        match = (options["labels"][:, None] == options["labels"]).double()
    else:
        match = torch.nn.functional.one_hot(paired, sum(columns)).double()
    weights = options.get("weights", torch.ones(sum(rows))).double()
    weights = weights / weights.sum() if weights.sum() > 0 else weights
    logits = scalars[0] * x @ y.T
    if case["op"] is sigmoid_loss:
        logits = logits + scalars[1]
        pairwise = torch.log1p(torch.exp(-(2 * match - 1) * logits))
        return weights @ pairwise.sum(1)
    smoothing = options.get("label_smoothing", 0.0)

    def cross_entropy(logits: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
        target = (1 - smoothing) * match / match.sum(1, keepdim=True) + smoothing / match.shape[1]
        return weights @ (torch.logsumexp(logits, 1) - (target * logits).sum(1))

    return (cross_entropy(logits, match) + cross_entropy(logits.T[paired], match.T[paired])) / 2


def global_gradients(case: dict[str, Any]) -> list[torch.Tensor]:
    """[loss, gradients of the towers and scalars] on one process."""
    towers = [tower.clone().requires_grad_() for tower in case["towers"]]
    scalars = [scalar.clone().requires_grad_() for scalar in case["scalars"]]
    loss = dense_loss(case, case["x"] @ towers[0], case["y"] @ towers[1], scalars)
    gradients = torch.autograd.grad(loss, [*towers, *scalars], allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def rank_gradients(case: dict[str, Any], rank: int, **how: Any) -> list[torch.Tensor]:
    """[loss, gradients of the towers and scalars] on one rank, from this rank's part of the batch."""
    own = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (case["rows"], case["columns"])]
    towers = [tower.clone().requires_grad_() for tower in case["towers"]]
    scalars = [scalar.clone().requires_grad_() for scalar in case["scalars"]]
    options = {k: v[own[0]] if isinstance(v, torch.Tensor) else v for k, v in case["options"].items()}
    used = scalars if case["op"] is sigmoid_loss else scalars[:1]
    x, y = case["x"][own[0]] @ towers[0], case["y"][own[1]] @ towers[1]
    loss = case["op"](x, y, *used, **options, **how)
    gradients = torch.autograd.grad(loss, [*towers, *scalars], allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def all_cases(num_ranks: int, group: Any) -> list[list[list[torch.Tensor]]]:
    """Of one rank of `group`, which has so many ranks: results[case][way], for each of WAYS."""
    return [
        [
            rank_gradients(
                make_case(index, num_ranks),
                dist.get_rank() if num_ranks > 1 else 0,
                group=group,
                backend=backend,
                exchange=exchange,
            )
            for backend, exchange in WAYS
        ]
        for index in range(len(CASES))
    ]


def assert_global(found: list[list[torch.Tensor]], case: dict[str, Any], name: str) -> None:
    """Every rank's loss, and the mean of the ranks' gradients, against the dense ones.

    1e-10 is the project's promise for fp64. Sums of some hundred products of order 1 to 100 stay within
    1e-13, so the absolute part (for gradients that cancel to 0) is as tight.
    """
    expected = global_gradients(case)
    for of_rank in found:
        torch.testing.assert_close(of_rank[0], expected[0], rtol=1e-10, atol=1e-12, msg=f"{name}: loss")
        assert torch.equal(of_rank[0], found[0][0]), f"{name}: ranks got different losses"
    for part, gradient in enumerate(expected[1:], 1):
        mean = torch.stack([of_rank[part] for of_rank in found]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-12, msg=f"{name}: gradient {part}")


def everything() -> dict[str, Any]:
    """All that three ranks are needed for, in one start of three processes."""
    first_two = dist.new_group([0, 1])
    return {
        3: all_cases(3, None),
        2: all_cases(2, first_two) if dist.get_rank() < 2 else None,
        1: all_cases(1, False),
        "groups": groups_and_frozen_towers(),
        "mistakes": mistakes_on_one_rank(),
        "largest": {exchange: largest_allocation(exchange) for exchange in ("gather", "ring")},
        "repeats": [rank_gradients(make_case(2, 3), dist.get_rank(), exchange="ring") for _ in range(2)],
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(3, everything)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, *_ in CASES])
def test_ranks_get_the_loss_and_gradients_of_the_global_batch(
    results: list[dict[str, Any]], index: int, num_ranks: int
) -> None:
    case = make_case(index, num_ranks)
    for way, (backend, exchange) in enumerate(WAYS):
        found = [of_rank[num_ranks][index][way] for of_rank in results[:num_ranks]]
        assert_global(found, case, f"{backend}, {exchange}")


def groups_and_frozen_towers() -> dict[str, Any]:
    """On three ranks: a group of ranks 0 and 2, and features that want no gradient."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 2])
    case = make_case(0, 2)
    result: dict[str, Any] = {}
    for exchange in ("gather", "ring"):
        if rank != 1:
            result[exchange] = rank_gradients(case, rank // 2, group=pair, exchange=exchange)
        else:
            with pytest.raises(ValueError, match="needs to be a process group that this"):
                rank_gradients(case, 0, group=pair)
        # Rank 1 trains nothing, rank 0 only y, and rank 2 everything: whoever wants a gradient gets the right
        # one.
        whole = make_case(2, 3)
        own = [
            slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (whole["rows"], whole["columns"])
        ]
        x, y = whole["x"][own[0]].requires_grad_(rank == 2), whole["y"][own[1]].requires_grad_(rank != 1)
        loss = contrastive_loss(x, y, whole["scalars"][0], exchange=exchange)
        if rank != 1:
            loss.backward()
        result[f"partly {exchange}"] = (loss.detach(), x.grad, y.grad)
    return result


def test_groups_and_frozen_towers(results: list[dict[str, Any]]) -> None:
    results = [result["groups"] for result in results]
    for exchange in ("gather", "ring"):
        assert_global([results[0][exchange], results[2][exchange]], make_case(0, 2), "subgroup")
        case = make_case(2, 3)
        x, y = case["x"].requires_grad_(), case["y"].requires_grad_()
        loss = dense_loss(case, x, y, case["scalars"])
        loss.backward()
        assert x.grad is not None
        assert y.grad is not None
        expected_y = y.grad.split(case["columns"])
        for rank, result in enumerate(results):
            found_loss, found_x, found_y = result[f"partly {exchange}"]
            # Same tolerances, and reasons, as in assert_global; 3 ranks, so 3 times the gradient on each.
            torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-10, atol=1e-12)
            assert (found_x is None) == (rank != 2)
            assert (found_y is None) == (rank == 1)
            if rank != 1:
                torch.testing.assert_close(found_y, 3 * expected_y[rank], rtol=1e-10, atol=1e-12)
            if rank == 2:
                torch.testing.assert_close(found_x, 3 * x.grad[-case["rows"][2] :], rtol=1e-10, atol=1e-12)


ROWS, WIDTH = 32, 2048


def largest_allocation(exchange: str) -> int:
    """Bytes of the largest tensor made on this rank by a loss of 3 x ROWS pairs and its gradients."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    x, y = torch.randn(2, ROWS, WIDTH).unbind()
    arguments = losses._Arguments(
        "contrastive_loss", x.clone(), y.clone(), torch.tensor(0.1), *[None] * 3, 0.0, exchange
    )
    with Watch():
        batch = losses._Batch(arguments, dist.group.WORLD.group_name, (True, True, True))
        losses._contrastive(arguments, batch, batch.contrastive_targets(), torch_losses)
    return largest


def test_a_ring_holds_nothing_of_the_size_of_all_ranks(results: list[dict[str, Any]]) -> None:
    own = ROWS * WIDTH * 4
    for result in results:
        assert result["largest"] == {"gather": 3 * own, "ring": own}


def test_a_ring_repeats_bit_for_bit(results: list[dict[str, Any]]) -> None:
    for result in results:
        first, second = result["repeats"]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def mistakes_on_one_rank() -> list[str]:
    """What each mistake raises on this rank, then the loss of a right call: nobody is left behind in a
    collective."""
    rank, scale = dist.get_rank(), torch.tensor(1.0)
    odd = rank == 1
    x = torch.randn(4, 3)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (contrastive_loss, (x, x[:, :2] if odd else x, scale), {}),
        (contrastive_loss, (None if odd else x, x, scale), {}),
        (contrastive_loss, (x, x, scale), {"backend": "fast" if odd else None}),
        (contrastive_loss, (x, x, scale), {"weights": torch.full((4,), -1.0 if odd else 1.0)}),
        (contrastive_loss, (x.double(), x.double(), scale) if odd else (x, x, scale), {}),
        (contrastive_loss, (x[:, :2], x[:, :2], scale) if odd else (x, x, scale), {}),
        (contrastive_loss, (x, x, scale), {"labels": torch.arange(4)} if odd else {}),
        (contrastive_loss, (x, x, scale), {"label_smoothing": 0.1 if odd else 0.2}),
        (contrastive_loss, (x, x, scale), {"exchange": "ring" if odd else "gather"}),
        (sigmoid_loss, (x, x, scale, scale), {}) if odd else (contrastive_loss, (x, x, scale), {}),
        (contrastive_loss, (x[:0], x, scale), {}),
        (contrastive_loss, (x, x, scale), {"backend": "reference", "label_smoothing": 0.1 if odd else 0.2}),
    ]
    messages = []
    for op, args, kwargs in calls:
        with pytest.raises(ValueError) as caught:
            op(*args, **kwargs)
        messages.append(str(caught.value))
    messages.append(f"{contrastive_loss(torch.eye(3), torch.eye(3), scale):.4f}")
    return messages


def test_a_mistake_on_one_rank_is_raised_on_all(results: list[dict[str, Any]]) -> None:
    expected = [
        "y has 2 features; it needs to have 3",
        "x is NoneType; it needs to be a tensor",
        "backend is 'fast'; it needs to be",
        "weights has -1.0; they need to be 0 or more",
        "torch.float32 and rank 1 with torch.float64",
        "num_features=3 and rank 1 with num_features=2",
        "has_labels=0 and rank 1 with has_labels=1",
        "label_smoothing=0.2 and rank 1 with label_smoothing=0.1",
        "gather and rank 1 with ring",
        "contrastive_loss and rank 1 with sigmoid_loss",
        "x has no rows on any rank",
        "label_smoothing=0.2 and rank 1 with label_smoothing=0.1",
    ]
    for rank, result in enumerate(results):
        *messages, loss = result["mistakes"]
        for found, part in zip(messages, expected, strict=True):
            assert part in found, f"rank {rank}"
        assert ("rank 1 of 3: " in messages[0]) == (rank != 1)
        # 9 pairs of unit vectors in 3 directions: a row's logits are 1 for three of them and 0 for six.
        assert loss == f"{math.log(3 * math.e + 6) - 1:.4f}"


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def test_run_ranks_raises_what_a_rank_raised_and_leaves_nobody_waiting() -> None:
    with pytest.raises(KeyError, match="only here") as caught:
        run_ranks(2, fail_on_rank_one)
    assert any("fail_on_rank_one" in note for note in caught.value.__notes__)
