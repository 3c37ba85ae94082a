"""A local stub of the Hub's API for creating, committing to, listing and reading repositories."""

import base64
import hashlib
import http.server
import json
import os
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import warm_python

TOKEN = "hf_SecretOfTheTests"
_IMPORTS = """
import tokenizers
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from sentencepiece import sentencepiece_model_pb2
from saigakit.publish import adapter, gguf_file
from saigakit.core import hub, install
"""
OWNER = "someone"  # of the only valid token


@dataclass
class Hub:
    """Repositories, every request as "METHOD path", and the `faults` that happen on the way."""

    token: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    # "cut": large files lose their last byte; "swap": large files get other content of the same size; "drop": the
    # connection ends in the middle of every large file; "lose", "alter": the name of a committed file that is lost or
    # altered; "put", "create", "commit": the status of such a request; "role", "rights": what the token may do.
    faults: dict[str, object] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    commits: int = 0
    endpoint: str = ""

    def clear(self) -> None:
        """As at the start."""
        for each in (self.repositories, self.private, self.faults, self.objects, self.calls):
            each.clear()
        self.commits = 0

    @property
    def head(self) -> str:
        return f"{self.commits:040d}"


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # names of the standard library

    def _answer(self) -> None:
        hub, path = self.hub, urllib.parse.unquote(self.path.split("?")[0])
        hub.calls.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if path.startswith("/lfs/") and "drop" in hub.faults:
            self.rfile.read(size // 2)
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.rfile.read(size)
        if path.startswith("/lfs/"):
            return self._put(path.removeprefix("/lfs/"), body)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._reply(401, {"error": "Invalid user token."})
        if path == "/api/whoami-v2":
            rights = {"role": hub.faults.get("role", "write"), **dict(hub.faults.get("rights", {}))}
            orgs = [{"name": "cats-org"}]
            return self._reply(200, {"name": OWNER, "orgs": orgs, "auth": {"accessToken": rights}})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._reply(200, {})
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if repo not in hub.repositories:
            return self._reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self._answer_about(repo, path, body)

    def _answer_about(self, repo: str, path: str, body: bytes) -> None:
        hub, files = self.hub, self.hub.repositories[repo]
        if "/preupload/" in path:
            names = [item["path"] for item in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": _mode(name), "shouldIgnore": False} for name in names]
            return self._reply(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            oids = [item["oid"] for item in json.loads(body)["objects"]]
            to = {oid: {"upload": {"href": f"{hub.endpoint}/lfs/{oid}"}} for oid in oids}
            uploads = [{"oid": oid, "size": 1, "actions": to[oid]} for oid in oids]
            return self._reply(200, {"transfer": "basic", "objects": uploads})
        if "/commit/" in path:
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        if "/tree/" in path:
            return self._reply(200, [_row(name, content) for name, content in files.items()])
        if "/resolve/" in path:
            content = files[path.split("/resolve/")[1].split("/", 1)[1]]
            etag = f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"'
            return self._reply(200, content, {"ETag": etag, "X-Repo-Commit": hub.head})
        siblings = [{"rfilename": name} for name in files]
        return self._reply(200, {"id": repo, "sha": hub.head, "private": repo in hub.private, "siblings": siblings})

    def _create(self, wanted: dict[str, object]) -> None:
        if status := self.hub.faults.get("create"):
            return self._reply(int(str(status)), {"error": "You don't have the rights"})
        repo = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        self.hub.repositories[repo] = {".gitattributes": b"*.safetensors filter=lfs"}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(repo)
        return self._reply(200, {"url": f"{self.hub.endpoint}/{repo}", "id": repo})

    def _put(self, oid: str, body: bytes) -> None:
        faults = self.hub.faults
        if status := faults.get("put"):
            return self._reply(int(str(status)), {"error": "expired"})
        self.hub.objects[oid] = body[:-1] if "cut" in faults else bytes(len(body)) if "swap" in faults else body
        return self._reply(200, {})

    def _commit(self, repo: str, lines: list[dict[str, dict[str, str]]]) -> None:
        if status := self.hub.faults.get("commit"):
            return self._reply(int(str(status)), {"error": "forbidden"})
        files = self.hub.repositories[repo]
        for line in lines:
            value, name = line["value"], line["value"].get("path", "")
            if line["key"] == "deletedFile":
                del files[name]
            elif line["key"] == "lfsFile" and self.hub.faults.get("lose") != name:
                files[name] = self.hub.objects[value["oid"]]
            elif line["key"] == "file" and self.hub.faults.get("lose") != name:
                content = base64.b64decode(value["content"])
                files[name] = content.swapcase() if self.hub.faults.get("alter") == name else content
        self.hub.commits += 1
        url = f"{self.hub.endpoint}/{repo}/commit/{self.hub.head}"
        return self._reply(200, {"commitUrl": url, "commitOid": self.hub.head, "success": True})

    def _reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".gguf", ".png")) else "regular"


def _row(name: str, content: bytes) -> dict[str, object]:
    row: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
    if _mode(name) == "lfs":
        row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return row


@contextmanager
def serving(token: str) -> Iterator[Hub]:
    hub = Hub(token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()


@contextmanager
def pushing(endpoint: str, home: Path) -> Iterator[Callable[..., str]]:
    """A function that runs a program with arguments, the token and a directory for its files, and returns its output.

    The client, which reads its own directory and the Hub's address when it is imported, uses `home` and `endpoint`.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    of_client = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    with warm_python.started(_IMPORTS, {**plain, **of_client}) as run:

        def push(program: str, *arguments: object, token: str, directory: Path) -> str:
            places = {"TMPDIR": str(directory), "HOME": str(directory)}
            done = run(program, *arguments, env={**plain, **of_client, **places, "HF_TOKEN": token}, cwd=directory)
            assert "Traceback" not in done.stderr, done.stderr
            assert done.returncode == 0
            for text in (done.stdout.encode(), done.stderr.encode(), *_contents(directory), *_contents(home)):
                assert token.strip().encode() not in text
            return done.stdout

        yield push


def _contents(directory: Path) -> Iterator[bytes]:
    return (file.read_bytes() for file in directory.rglob("*") if file.is_file())
