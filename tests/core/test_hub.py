"""The Hub's token is one, stays secret, and errors of the Hub are explained."""

import errno
import json
import os
import subprocess
import sys

import hub_stub
import pytest

from saigakit.core import hub
from saigakit.errors import SaigaError, masked

TOKEN = "hf_OnlyForTheTests1234567890abcdef"
_DOWNLOAD = """
from saigakit.core import hub
print(hub.snapshot("owner/model", ("*.json",)))
"""


def test_a_full_disk_during_a_download_is_not_blamed_on_the_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device")
    refused = pytest.raises(SaigaError, match=r"Downloading a/b needs .*SAIGAKIT_CACHE")
    with refused, hub.download_errors_explained("a/b", "model"):
        raise full


def download(tmp_path, *, token=None, stored=None):
    """Download a model in a process of its own; returns what it printed and the tokens that arrived."""
    home = tmp_path / "home"
    home.mkdir()
    if stored is not None:
        (home / "token").write_text(stored, encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with hub_stub.serving({"owner/model": {"config.json": b"{}"}}) as (endpoint, calls):
        places = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "SAIGAKIT_CACHE": str(tmp_path / "cache")}
        given = {} if token is None else {"HF_TOKEN": token}
        command = [sys.executable, "-c", _DOWNLOAD]
        done = subprocess.run(command, env={**plain, **places, **given}, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, calls


@pytest.mark.parametrize(
    "given", [{"token": f" {TOKEN}\r\n"}, {"stored": f"{TOKEN}\n"}, {"token": "\n", "stored": TOKEN}]
)
def test_the_token_is_sent_without_the_spaces_around_it(tmp_path, given):
    printed, calls = download(tmp_path, **given)
    assert "Traceback" not in printed
    sent = {token for path, token in zip(calls, calls.authorizations, strict=True) if "owner/model" in path}
    assert sent == {f"Bearer {TOKEN}"}, list(zip(calls, calls.authorizations, strict=True))
    assert TOKEN not in printed


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(tmp_path):
    printed, calls = download(tmp_path, token=f"{TOKEN}\n{TOKEN}")
    assert "HF_TOKEN contains characters that no token has" in printed
    assert TOKEN not in printed.replace(_DOWNLOAD, "")
    assert not calls


def test_an_error_of_a_library_does_not_show_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"secret value\n{TOKEN}")
    quoted = OSError(f"Illegal header value b'Bearer {json.dumps(TOKEN)}'")
    with pytest.raises(SaigaError) as refused, hub.download_errors_explained("a/b", "model"):
        raise quoted
    assert TOKEN not in str(refused.value)
    assert "Illegal header value" in str(refused.value)


@pytest.mark.parametrize("name", ["KAGGLE_KEY", "HF_TOKEN", "WANDB_API_KEY"])
def test_secrets_of_the_environment_are_masked(monkeypatch, name):
    monkeypatch.setenv(name, "abcdef0123456789\n")
    assert masked("sent abcdef0123456789 to it") == "sent … to it"
    assert str(SaigaError("sent abcdef0123456789")) == "sent …"
