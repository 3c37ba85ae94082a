"""Bound the time and memory of chat templates, which may come from anyone."""

import re
import threading
from collections.abc import Callable, Sized
from functools import partial, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What the code of a template raises when it is compiled.
BROKEN = (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError)
_STEPS = 10**7  # of one rendering: rounds of loops, operations and outputs, and every 16 characters or items of them
_LONGEST = 200_000  # characters; the longest templates in use have 30,000
_WIDE = re.compile(r"%[-+ #0]*\d{9}")
_SIZED = (str, list, tuple)  # a union would be created at each call
_budget = threading.local()  # the steps left to the current rendering


def begin() -> None:
    """Give the next rendering in this thread all its steps."""
    _budget.left = _STEPS


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a rendering also ends with TemplateRuntimeError after too many steps."""

    intercepted_binops = frozenset(("*", "**", "%"))
    concat = staticmethod(lambda parts: "".join([_count(part) for part in parts]))

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(**settings)
        self.filters = {name: wraps(each)(partial(_run, name, each)) for name, each in self.filters.items()}
        self.filters |= {"_count": _count, "_loop": _count_rounds}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _LONGEST:
            raise jinja2.TemplateSyntaxError(f"it has over {_LONGEST:,} characters", 1)
        for line, kind, text in self.lex(source):
            # llama-cpp-python computes "a" * 1000000000 and "%1000000000d" % 1 when it loads a file.
            is_large = len(text.replace("_", "")) > 8 if kind == "integer" else _WIDE.search(text)
            if kind in ("integer", "string") and is_large:
                raise jinja2.TemplateSyntaxError("it has a number of nine digits", line)
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Add, nodes.Concat))):
            if isinstance(node, nodes.For):
                node.iter = _filtered(node.iter, "_loop")
            elif isinstance(node, nodes.Concat):
                node.nodes = [_filtered(each, "_count") for each in node.nodes]
            elif isinstance(node, nodes.Add):
                node.left, node.right = _filtered(node.left, "_count"), _filtered(node.right, "_count")
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        return _run(operator, self.binop_table[operator], left, right)

    def call(self, context: Any, called: Any, /, *values: Any, **named: Any) -> Any:  # noqa: ANN401
        return _run("a call", partial(super().call, context, called), *values, **named)


def _filtered(node: Any, name: str) -> nodes.Filter:  # noqa: ANN401
    return nodes.Filter(node, name, [], [], None, None)


def _count(value: Any, rounds: int = 1) -> Any:  # noqa: ANN401
    _budget.left -= rounds + (len(value) // 16 if isinstance(value, _SIZED) else 0)
    if _budget.left < 0:
        raise jinja2.TemplateRuntimeError(f"it takes over {_STEPS:,} steps or makes too much text")
    return value


def _count_rounds(items: Any) -> Any:  # noqa: ANN401
    """`items` of a loop, which needs their number anyway."""
    found = items if isinstance(items, Sized) else list(items)
    return _count(found, rounds=len(found))


def _run(name: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:  # noqa: ANN401
    """Call `function`, but refuse what multiplies a length by a large number."""
    given = [*values, *named.values()]
    largest = max([abs(each) for each in given if isinstance(each, int)], default=0)
    if name == "**" or largest * max([1, *(len(each) for each in given if isinstance(each, _SIZED))]) > 16 * _STEPS:
        raise jinja2.TemplateRuntimeError(f"{name} would make too much text")
    return _count(function(*values, **named), rounds=50)  # a call takes 50 times as long as a round
