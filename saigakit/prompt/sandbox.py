"""Bound the time and memory of chat templates, which may come from anyone."""

import re
import threading
from collections.abc import Callable, Iterable, Sized
from functools import wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What the code of a template raises when it is compiled.
BROKEN = (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError)
_STEPS = 10**7  # of one rendering: rounds of loops, operations and outputs, and every 16 characters or items of them
_CALL = 40  # steps: a call takes 40 times as long as a round of a loop
_LONGEST = 200_000  # characters; the longest templates in use have 30,000
_WIDE = re.compile(r"%[-+ #0]*\d{9}")
_WIDE_FORMAT = re.compile(r"\d{9}|\{[^{}]*:[^{}]*\{")  # also a width that is an argument
_SIZED = (str, list, tuple)  # a union would be created at each call
_NESTED = ("join", "pprint", "string", "tojson")  # filters that make text of values within values
_MULTIPLYING = ("indent", "join", "replace", "wordwrap")  # filters and methods that repeat one text within another
_COMPARING = ("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "gt", "in", "le", "lower", "lt", "ne", "upper")


_budget = threading.local()  # `left`: steps of the current rendering


def begin() -> None:
    """Give the next rendering in this thread all its steps."""
    _budget.left = _STEPS


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a rendering also ends with TemplateRuntimeError after too many steps."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(finalize=lambda value: value if isinstance(value, str) else _count_all(value), **settings)
        tests: dict[str, Any] = self.tests
        for table, names in ((self.filters, [*self.filters]), (tests, _COMPARING)):
            table |= {name: bounded(name, table[name]) for name in names if name in table}
        self.filters |= {"_count": _count, "_count_all": _count_all, "_loop": _count_rounds}
        del self.globals["lipsum"]

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        found, size = [], 0
        for part in parts:
            found.append(part)
            if (size := size + 16 + len(part)) > 16 * _STEPS:
                break
        _spend(size // 16)
        return "".join(found)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _LONGEST:
            raise jinja2.TemplateSyntaxError(f"it has over {_LONGEST:,} characters", 1)
        for line, kind, text in self.lex(source):
            # llama-cpp-python computes "a" * 1000000000 and "%1000000000d" % 1 when it loads a file.
            is_large = len(text.replace("_", "")) > 8 if kind == "integer" else _WIDE.search(text)
            if kind in ("integer", "string") and is_large:
                raise jinja2.TemplateSyntaxError("it has a number of nine digits", line)
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Add, nodes.Concat, nodes.Compare, nodes.Getitem))):
            _count_in(node)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        return bounded(operator, self.binop_table[operator])(left, right)

    def call(self, context: Any, called: Any, /, *values: Any, **named: Any) -> Any:  # noqa: ANN401
        is_method = isinstance(called, BuiltinMethodType)
        given = [called.__self__] if is_method else []
        _require_bounded(called.__name__ if is_method else "a call", [*given, *values, *named.values()])
        return _count(super().call(context, called, *values, **named), _CALL)

    def wrap_str_format(self, value: Any) -> Any:  # noqa: ANN401
        """What Jinja calls in place of a method `format`, which it finds only here."""
        if (wrapped := super().wrap_str_format(value)) is not None:
            _require_bounded("format", [value.__self__])
        return wrapped


def _count_in(node: nodes.Node) -> None:
    """Let what the operation reads be counted."""

    def counted(value: Any, by: str = "_count") -> nodes.Filter:  # noqa: ANN401
        return nodes.Filter(value, by, [], [], None, None)

    if isinstance(node, nodes.For):
        node.iter = counted(node.iter, "_loop")
    elif isinstance(node, nodes.Concat):
        node.nodes = [counted(each, "_count_all") for each in node.nodes]
    elif isinstance(node, nodes.Add):
        node.left, node.right = counted(node.left), counted(node.right)
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node.node = counted(node.node)
    elif isinstance(node, nodes.Compare):
        for operand in node.ops:  # a comparison with a constant ends at its length
            if not any(isinstance(each, nodes.Const) for each in (node.expr, operand.expr)) or "in" in operand.op:
                operand.expr = counted(operand.expr, "_count_all")


def _spend(steps: int) -> None:
    _budget.left = left = _budget.left - steps
    if left < 0:
        raise jinja2.TemplateRuntimeError(f"it takes over {_STEPS:,} steps or makes too much text")


def _count(value: Any, rounds: int = 1) -> Any:  # noqa: ANN401
    _spend(rounds + (len(value) // 16 if isinstance(value, _SIZED) else 0))
    return value


def _count_all(value: Any) -> Any:  # noqa: ANN401
    """`value`, with all that is in it, which may be the same list a million times."""
    if isinstance(value, str):
        return _count(value)
    steps, rest = 1, [value]
    while rest:
        each = rest.pop()
        if isinstance(each, dict | list | tuple):
            rest.extend(each.values() if isinstance(each, dict) else each)
            steps += len(each)
        elif isinstance(each, str):
            steps += len(each) // 16
        if steps > _STEPS:
            break
    _spend(steps)
    return value


def _count_rounds(items: Any) -> Any:  # noqa: ANN401
    """`items` of a loop, which needs their number anyway."""
    found = items if isinstance(items, Sized) else list(items)
    return _count(found, len(found))


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a filter, test or operation, with what it reads and makes counted."""

    @wraps(function)
    def counted(*values: Any, **named: Any) -> Any:  # noqa: ANN401
        if len(values) > 1 or named or name in _NESTED:
            _require_bounded(name, [*values, *named.values()])
        else:
            _count(values[0])
        return _count(function(*values, **named), _CALL)

    return counted


def _require_bounded(name: str, given: list[Any]) -> None:
    """Count what a call reads, and refuse it if it multiplies a length by a large number or another length."""
    given += [each for value in given if isinstance(value, tuple) for each in value]  # the operands of "%"
    for each in given:
        (_count_all if name in _NESTED else _count)(each)
    lengths = sorted([1, 1, *(len(each) for each in given if isinstance(each, _SIZED))])
    numbers = [abs(each) for each in given if isinstance(each, int)]
    largest = max([*numbers, lengths[-2] if name in _MULTIPLYING else 1])
    is_wide = name in ("%", "format") and isinstance(given[0], str) and _WIDE_FORMAT.search(given[0])
    if name == "**" or is_wide or largest * lengths[-1] > 16 * _STEPS:
        raise jinja2.TemplateRuntimeError(f"{name} would make too much text")
