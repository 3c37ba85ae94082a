"""Parametrise a test so that `make test` runs some cases and `make test-all` runs all of them."""

from collections.abc import Collection, Iterable

import pytest


def matrix(values: Iterable[object], quick: Collection[object]) -> list[object]:
    """All `values`, marked slow unless in `quick`. Raises ValueError if one of `quick` is not among them."""
    values = list(values)
    if unknown := [each for each in quick if each not in values]:
        raise ValueError(f"not among the values: {unknown}")
    return [value if value in quick else _slow(*(value if isinstance(value, tuple) else (value,))) for value in values]


def _slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)
