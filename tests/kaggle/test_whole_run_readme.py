"""The commands of README's section on Kaggle, run as written in a fresh clone and a fresh environment."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from kaggle_runs import RECORD, FinishedRuns

REPOSITORY = Path(__file__).parents[2]
LOGIN = "security.OAuthService/ExchangeOAuthToken"


@pytest.mark.slow  # installs everything from the registry: a minute, or more without pip's cache
def test_the_four_commands_lead_from_a_clone_to_a_model(uploads, tmp_path, monkeypatch):
    section = (REPOSITORY / "README.md").read_text("utf-8").split("## On Kaggle")[1].split("\n## ")[0]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert len(commands) == 4
    clone, home = tmp_path / "clone", tmp_path / "home"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    venv.create(tmp_path / "fresh", with_pip=True, symlinks=True)
    (clone / "records.jsonl").write_text(f"{json.dumps(RECORD)}\n" * 3, encoding="utf-8")
    FinishedRuns(uploads, tmp_path)
    tokens = {"accessToken": "a" * 20, "refreshToken": "r" * 20, "expiresIn": 36000, "username": "alice", "userId": 1}
    uploads.answer(LOGIN, tokens)
    uploads.answer("security.OAuthService/IntrospectToken", {"active": True, "username": "alice", "userId": 1})
    environment = {
        name: value
        for name, value in {**os.environ, **uploads.environment(home)}.items()
        if name not in ("KAGGLE_USERNAME", "KAGGLE_KEY", "PYTHONPATH", "VIRTUAL_ENV")
    }
    cache = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True)
    environment |= {"PATH": f"{tmp_path / 'fresh' / 'bin'}:{os.environ['PATH']}", "PIP_CACHE_DIR": cache.stdout.strip()}
    for command in commands:
        shown = {**environment, "HTTP_PROXY": ""} if command.startswith("pip") else environment
        ended = subprocess.run(
            ["bash", "-c", command], cwd=clone, env=shown, input="code\n", capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    assert ended.stdout.splitlines()[-1].startswith("talk:   saigakit chat ")
    assert (clone / "runs" / "my-saiga" / "03_merge_gguf" / "model.gguf").read_bytes() == b"GGUF"
