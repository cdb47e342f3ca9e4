"""What `--search FIELD=EXPRESSION` may say: `optim.lr=loguniform(1e-5,1e-3)`, `optim.schedule=choice(cosine,linear)`.

The expressions are those of Ray Tune by the same names. They are read as literals and checked, never evaluated.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmscale.errors import ConfigError

# what of ray.tune may be written, and the arguments
EXPRESSIONS = {
    "uniform": "lower, upper",
    "quniform": "lower, upper, q",
    "loguniform": "lower, upper",
    "qloguniform": "lower, upper, q",
    "randint": "lower, upper",  # upper is left out
    "qrandint": "lower, upper, q",
    "lograndint": "lower, upper",
    "qlograndint": "lower, upper, q",
    "randn": "mean, sd",
    "choice": "value, ...",
}
_HELP = "give one of " + ", ".join(f"{name}({arguments})" for name, arguments in EXPRESSIONS.items())


@dataclass(frozen=True, kw_only=True)
class Search:
    """One `FIELD=EXPRESSION`."""

    field: str
    text: str  # the expression
    function: str
    arguments: tuple[Any, ...]


def parse_search(texts: Sequence[str]) -> list[Search]:
    """Reads `field=expression` texts. Raises ConfigError with all problems of all of them."""
    searches, problems = [], []
    for text in texts:
        try:
            searches.append(_parse(text))
        except ValueError as error:
            problems.append(f"--search {text}: {error}")
    fields = [search.field for search in searches]
    problems += [
        f"--search {field}: given twice" for field in dict.fromkeys(fields) if fields.count(field) > 1
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return searches


def _parse(text: str) -> Search:
    field, equals, expression = text.partition("=")
    if not (field and equals and expression):
        raise ValueError("must have the form optim.lr=loguniform(1e-5,1e-3)")
    if field.split(".")[0] in ("run", "launch"):
        raise ValueError(f"{field} doesn't change what is computed, or names the run")
    try:
        call = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"{expression} is not an expression: {_HELP}") from None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.keywords:
        raise ValueError(f"{expression} is not one of the expressions known: {_HELP}")
    name = call.func.id
    if name not in EXPRESSIONS:
        match = difflib.get_close_matches(name, EXPRESSIONS, n=1)
        raise ValueError(f"{name} is not known; " + (f"did you mean {match[0]}?" if match else _HELP))
    values = [_value(argument) for argument in call.args]
    if name == "choice":
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        if not values:
            raise ValueError("choice() needs values to choose from")
    else:
        _check_numbers(name, values)
    return Search(field=field, text=expression, function=name, arguments=tuple(values))


def _value(node: ast.expr) -> Any:
    """A literal; a bare word is a text, or JSON's true, false and null."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is neither a number, a text, nor a list of such") from None


def _check_numbers(name: str, values: list[Any]) -> None:
    takes = EXPRESSIONS[name].split(", ")
    if len(values) != len(takes):
        raise ValueError(f"{name} takes {len(takes)} numbers: {name}({EXPRESSIONS[name]})")
    kinds = int if "int" in name else (int, float)
    for value in values:
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} takes {'whole ' if 'int' in name else ''}numbers, {value!r} is none")
    if name == "randn":
        if values[1] <= 0:
            raise ValueError(f"randn's standard deviation is {values[1]}, it must be above 0")
        return
    if values[0] >= values[1]:
        raise ValueError(f"{name} goes from {values[0]} to {values[1]}, which holds nothing")
    if "log" in name and values[0] <= 0:
        raise ValueError(f"{name} begins at {values[0]}, it must be above 0")
    if len(values) == 3 and values[2] <= 0:
        raise ValueError(f"{name} goes in steps of {values[2]}, they must be above 0")
