"""Packages that are imported when they are first used."""

import sys

import numpy
import pytest

from saigakit.core import lazy


def test_every_name_is_that_of_the_package_itself(monkeypatch):
    assert lazy.np.zeros is numpy.zeros
    monkeypatch.setattr(numpy, "zeros", numpy.ones)
    assert lazy.np.zeros is numpy.ones


def test_a_package_that_is_not_installed_is_named_at_its_first_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    unused = type(lazy.torch)("gguf")
    with pytest.raises(ModuleNotFoundError) as raised:
        _ = unused.GGUFReader
    assert raised.value.name == "gguf"
