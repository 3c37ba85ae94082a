"""Errors of the Hub are explained."""

import errno

import pytest

from saigakit.core import hub
from saigakit.errors import SaigaError


def test_a_full_disk_during_a_download_is_not_blamed_on_the_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device")
    refused = pytest.raises(SaigaError, match=r"Downloading a/b needs .*SAIGAKIT_CACHE")
    with refused, hub.download_errors_explained("a/b", "model"):
        raise full
