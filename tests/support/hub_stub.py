"""A loopback stand-in for the Hub's API: repositories as dictionaries, and the answers of a repository that is not.

A data set has the name "datasets/owner/name". Every repository has the commit COMMIT, which is main; other content of a
branch stands under "owner/name@branch", with a commit of its own. Weights have their SHA-256 as ETag, other files a
SHA-1, as on the Hub; for names that begin with SWAPPED it is that of other content.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

COMMIT = "0" * 39 + "1"
OTHER_BRANCH, OTHER_COMMIT = "old", "0" * 39 + "2"
SWAPPED = "someone/swapped"
EXPIRED = "someone/expired"  # answers as every repository does to a token that is not valid
LARGE = (".safetensors", ".bin", ".model")
REFUSALS = {  # as the Hub answers: status, X-Error-Code
    "someone/gated": (403, "GatedRepo"),
    "someone/vanished": (404, "RepoNotFound"),
    "someone/private": (401, "RepoNotFound"),
    EXPIRED: (401, ""),
    "someone/broken": (400, ""),
    "someone/overloaded": (503, ""),
}


class Calls(list[str]):
    """The paths that were asked for, and the Authorization headers that came with them."""

    def __init__(self) -> None:
        super().__init__()
        self.authorizations: list[str | None] = []


class _Answers(http.server.BaseHTTPRequestHandler):
    repositories: Mapping[str, Mapping[str, bytes]]
    calls: Calls

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(with_body=True, asked=urllib.parse.parse_qs(asked.decode()).get("paths", []))

    def _answer(self, *, with_body: bool, asked: list[str] | None = None) -> None:
        self.calls.append(self.path)
        self.calls.authorizations.append(self.headers.get("Authorization"))
        path = self.path.split("?")[0].removeprefix("/api").removeprefix("/models")
        parts = 3 if path.startswith("/datasets/") else 2
        repository = "/".join(path.split("/")[1 : parts + 1])
        if (name := repository.removeprefix("datasets/")) in REFUSALS:
            status, code = REFUSALS[name]
            expired = {"X-Error-Message": "Invalid credentials in Authorization header"} if name == EXPIRED else {}
            self._reply(status, b"{}", with_body, {"X-Error-Code": code} if code else expired)
        elif repository in self.repositories:
            self._serve(path, repository, with_body, asked or [])
        else:
            self._reply(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

    def _serve(self, path: str, repository: str, with_body: bool, asked: list[str]) -> None:
        named = re.search(r"/(?:revision|resolve|tree|paths-info)/([^/]+)", path)
        revision = urllib.parse.unquote(named[1]) if named else "main"
        if revision not in ("main", COMMIT, OTHER_BRANCH, OTHER_COMMIT):
            return self._reply(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        is_other = revision in (OTHER_BRANCH, OTHER_COMMIT) and f"{repository}@{OTHER_BRANCH}" in self.repositories
        files = self.repositories[f"{repository}@{OTHER_BRANCH}" if is_other else repository]
        commit = OTHER_COMMIT if is_other else COMMIT
        listed: object
        if "/resolve/" in path:
            name = urllib.parse.unquote(path.split("/resolve/")[1].split("/", 1)[1])
            if name not in files:
                return self._reply(404, b"{}", with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            published = files[name][::-1] if repository.startswith(SWAPPED) else files[name]
            digest = hashlib.sha256(published) if name.endswith(LARGE) else hashlib.sha1(published)
            etag = f'"{digest.hexdigest()}"'
            return self._reply(200, files[name], with_body, {"ETag": etag, "X-Repo-Commit": commit})
        if "/tree/" in path:
            below = urllib.parse.unquote(path.split("/tree/")[1].partition("/")[2])
            if below and not any(name.startswith(f"{below}/") for name in files):
                return self._reply(404, b"{}", with_body, {"X-Error-Code": "EntryNotFound"})
            listed = self._entries(files, below, is_deep="recursive=true" in self.path.lower())
        elif "/paths-info/" in path:
            everything = [*self._entries(files, "", is_deep=True)]
            listed = [entry for entry in everything if entry["path"] in asked]
        else:
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            listed = {"id": repository.removeprefix("datasets/"), "sha": commit, "siblings": siblings}
        return self._reply(200, json.dumps(listed).encode(), with_body, {})

    @staticmethod
    def _entries(files: Mapping[str, bytes], below: str, *, is_deep: bool) -> list[dict[str, object]]:
        begin = f"{below}/" if below else ""
        inside = [name.removeprefix(begin) for name in files if name.startswith(begin)]
        shown = [name for name in inside if is_deep or "/" not in name]
        parents = {"/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)}
        folders = sorted(name for name in parents if is_deep or "/" not in name)
        made: list[dict[str, object]] = [{"type": "directory", "path": begin + name, "oid": COMMIT} for name in folders]
        made += [
            {"type": "file", "path": begin + name, "size": len(files[begin + name]), "oid": COMMIT} for name in shown
        ]
        return made

    def _reply(self, status: int, body: bytes, with_body: bool, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, Calls]]:
    """The endpoint's address, and what was asked for."""
    calls = Calls()
    answers = type("Answers", (_Answers,), {"repositories": repositories, "calls": calls})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", calls
        server.shutdown()
