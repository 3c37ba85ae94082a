"""A fresh Python for the real pip."""

from pathlib import Path

import pytest
import small_wheels


@pytest.fixture
def machine(tmp_path) -> Path:
    """The interpreter of a fresh environment that has only pip."""
    return small_wheels.new_python(tmp_path / "python")
