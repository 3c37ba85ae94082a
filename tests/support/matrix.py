"""Parameters of a test of which `make test` runs some, and `make test-all` every one."""

from collections.abc import Collection, Iterable

import pytest


def matrix(values: Iterable[object], quick: Collection[object]) -> list[object]:
    """All `values`; those that are not in `quick` are marked slow. Raises ValueError for a quick one that is absent."""
    values = list(values)
    if unknown := [each for each in quick if each not in values]:
        raise ValueError(f"not among the parameters: {unknown}")
    return [value if value in quick else _slow(*(value if isinstance(value, tuple) else (value,))) for value in values]


def _slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)
