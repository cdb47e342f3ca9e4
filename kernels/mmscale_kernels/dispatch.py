"""Which form of an operator runs, and why.

Every public operator exists in up to three forms, its backends:

- ``"triton"``: Triton kernels, for CUDA and ROCm devices (and for CPU tensors under ``TRITON_INTERPRET=1``);
- ``"torch"``: plain PyTorch, tiled, bounded memory, any device;
- ``"reference"``: plain and dense, any dtype, the oracle of the tests. Never chosen by itself.

``backend=None`` takes ``"triton"`` where the tensors lie on such a device, triton is installed and its form
covers the call, and ``"torch"`` otherwise. ``explain(op, *args, **kwargs)`` says what a call would run::

    >>> print(explain(contrastive_loss, x, y, scale))
    contrastive_loss runs on "torch": the tensors lie on cpu
      passed over "triton": cpu tensors need Triton's interpreter (TRITON_INTERPRET=1)
      passed over "reference": dense, for tests; runs only when asked for

The trade-off: a form is chosen from shapes, dtypes and devices alone, never by timing, so the choice is the
same in every run.

For operators: build the decision with `choose`, and register a function of the operator's own arguments that
returns it with `register_decision`.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import CustomOpDef

BACKENDS = ("triton", "torch", "reference")

_DENSE = "dense, for tests; runs only when asked for"


@dataclass(frozen=True)
class Decision:
    """The backend of one call, the reason, and (backend, reason) of each one that was passed over."""

    op: str
    backend: str
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f'{self.op} runs on "{self.backend}": {self.reason}']
        lines += [f'  passed over "{name}": {reason}' for name, reason in self.passed_over]
        return "\n".join(lines)


# Looked up once, without importing it: a traced graph can't search for modules.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_refusal(device_type: str) -> str | None:
    """Why Triton kernels can't run on tensors of this device type here, or None if they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device_type == "cuda":  # ROCm devices carry this name too
        return None
    if device_type != "cpu":
        return f"Triton kernels run on CUDA and ROCm devices, not on {device_type}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "cpu tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if "triton.language" in sys.modules:
        # Triton's own library is decorated on its first import, and stays what it became then.
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(sys.modules["triton.language"].sum, InterpretedFunction):
            return "TRITON_INTERPRET=1 was set after triton had been imported; set it before Python starts"
    return None


def choose(op: str, backend: str | None, device: torch.device, form_refusal: str | None = None) -> Decision:
    """Decide the backend of one call.

    op: the operator's public name. backend: what the caller asked for. device: where the tensors are.
    form_refusal: why the operator's Triton form does not cover this call, as in "labels are given", or None.
    Raises ValueError if the backend is unknown, or "triton" was asked for and can't run this call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"{op}: backend is {backend!r}; it needs to be one of {', '.join(BACKENDS)}, or None"
        )
    if backend == "torch" or backend == "reference":
        return Decision(op, backend, "asked for")
    refusal = triton_refusal(device.type) or form_refusal
    if backend == "triton":
        if refusal is not None:
            raise ValueError(f'{op}: backend is "triton", which can\'t run this call: {refusal}')
        return Decision(op, "triton", "asked for")
    if device.type != "cuda":
        # Never the interpreter by itself: it is for tests, and thousands of times slower than the torch form.
        why = refusal or "the interpreter runs only when asked for"
        return Decision(
            op, "torch", f"the tensors lie on {device.type}", (("triton", why), ("reference", _DENSE))
        )
    if refusal is not None:
        return Decision(
            op, "torch", "the Triton form was passed over", (("triton", refusal), ("reference", _DENSE))
        )
    return Decision(
        op,
        "triton",
        f"the tensors lie on {device.type} and the kernels cover this call",
        (("torch", "slower on this device"), ("reference", _DENSE)),
    )


def is_torch_on_cpu(backend: str | None, device: torch.device) -> bool:
    """Say whether `choose` would answer "torch" for a CPU tensor, without the price of its reasons.

    False also where it would raise: then ask it.
    """
    return (backend is None or backend == "torch") and device.type == "cpu"


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`torch.library.custom_op` for a function that changes none of its arguments; a first call doesn't import torch's
    compiler.

    torch wraps the function so that it isn't traced, and that imports the compiler: over a second of a process's start.
    Nothing can be traced before something else has imported it, so until then the function is called as it is.
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(name, function, mutates_args=())
        kernels: dict[Any, Callable[..., Any]] = getattr(op, "_backend_fns", {})
        for device, untraced in kernels.items():
            kernels[device] = _until_compiled(untraced)
        return op

    return make


def _until_compiled(untraced: Callable[..., Any]) -> Callable[..., Any]:
    function = getattr(untraced, "__wrapped__", untraced)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (untraced if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call


_DECISIONS: dict[Callable[..., Any], Callable[..., Decision]] = {}


def register_decision(op: Callable[..., Any], decide: Callable[..., Decision]) -> None:
    """Make `explain(op, ...)` answer with `decide(...)`, which takes `op`'s arguments and runs nothing."""
    assert op not in _DECISIONS, f"{op.__name__} is registered already"
    _DECISIONS[op] = decide


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Decision:
    """Say which backend `op(*args, **kwargs)` would run on, why, and which were passed over; runs no kernel.

    Raises ValueError where the call itself would (bad shapes, dtypes, backend), and if `op` is no operator of
    this package. For a distributed loss it looks at this rank's tensors alone and communicates nothing.
    """
    decide = _DECISIONS.get(op)
    if decide is None:
        known = ", ".join(sorted(f.__name__ for f in _DECISIONS))
        raise ValueError(f"explain: op is {op!r}; it needs to be one of {known}")
    return decide(*args, **kwargs)
