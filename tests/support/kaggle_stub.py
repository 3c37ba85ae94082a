"""A stub of Kaggle's server for the real command line: a local proxy that records every call."""

import contextlib
import http.server
import json
import os
import threading
import zlib
from urllib.parse import urlsplit

import pytest

KERNELS, DATASETS = "kernels.KernelsApiService/", "datasets.DatasetApiService/"
MODELS = "models.ModelApiService/"
UPLOAD = "http://files.invalid/upload"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        call = self.path.split("/v1/", 1)[1]
        sent = json.loads(self._body() or "{}")
        self.server.calls.append((call, sent))
        answers = self.server.answers.get(call, [(404, {"code": 404, "message": call})])
        code, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = answer(sent)
        if isinstance(answer, bytes):  # such as a page
            self._reply(answer, code, **{"Content-Type": "text/html"})
        else:
            self._reply(json.dumps(answer).encode(), code, **{"Content-Type": "application/json"})

    def do_GET(self):
        """A file, or a part of it; what `server.stalled` names stops after so many bytes."""
        name = urlsplit(self.path).path.lstrip("/")
        if name not in self.server.files:
            self._reply(b"", 404)
            return
        content, begin = self.server.files[name], 0
        headers = {"ETag": f'"{zlib.crc32(content)}"', "Accept-Ranges": "bytes"}
        headers["Last-Modified"] = "Sun, 01 Nov 2026 00:00:00 GMT"  # the command line keeps files of this date and size
        if wanted := self.headers["Range"]:
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.server.downloads.append((name, begin))
        end = self.server.stalled.get(name)
        self._reply(content[begin:], 206 if wanted else 200, end, **headers)
        if end is not None:
            self.wfile.flush()
            self.server.released.wait(60)

    def do_PUT(self):
        self.server.uploads.append(self._body())
        self._reply(b"{}")

    def _body(self):
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _reply(self, body, code=200, sent=None, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *_):
        """Keep the output of the tests clean."""


class KaggleStub(http.server.ThreadingHTTPServer):
    """`answer` sets the response to a call; `calls` and `uploads` were received; `files` can be downloaded."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls, self.uploads, self.answers, self.files = [], [], {}, {}
        self.downloads, self.stalled, self.released = [], {}, threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()  # s until it notices the end

    def answer(self, call, *bodies, code=200):
        """Return the bodies in turn, and the last one from then on."""
        self.answers[call] = [(code, body) for body in bodies]

    def accept_pushes(self):
        """Number the versions of each notebook, as Kaggle does."""

        def save(sent):
            version = len([body for body in self.sent(KERNELS + "SaveKernel") if body["slug"] == sent["slug"]])
            url = f"https://www.kaggle.com/code/{sent['slug']}"
            return {"ref": f"/code/{sent['slug']}", "url": url, "versionNumber": version}

        self.answer(KERNELS + "SaveKernel", save)

    def sent(self, call):
        return [body for name, body in self.calls if name == call]

    def environment(self, home):
        """For the command line; LOCALHOST is the only Kaggle environment that a proxy can redirect."""
        return {
            "HOME": str(home),
            "KAGGLE_CONFIG_DIR": str(home),
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": "alice",
            "KAGGLE_KEY": "x",
            "HTTP_PROXY": f"http://127.0.0.1:{self.server_port}",
            "NO_PROXY": "",
        }


@contextlib.contextmanager
def serving(monkeypatch, home):
    """A stub to which the command line of this test is redirected, whatever the environment of the tests has."""
    pytest.importorskip("kagglesdk")
    stub = KaggleStub()
    for name in [name for name in os.environ if "PROXY" in name.upper() or "KAGGLE" in name]:
        monkeypatch.delenv(name)
    for name, value in stub.environment(home).items():
        monkeypatch.setenv(name, value)
    yield stub
    stub.shutdown()
    stub.server_close()


def listed(stub, sizes):
    files = [{"name": name, "size": size, "creationDate": "2026-11-01T00:00:00Z"} for name, size in sizes.items()]
    stub.answer(MODELS + "ListModelInstanceVersionFiles", {"files": files})


def sizes_of(stub):
    """By name, as Kaggle lists the last upload."""
    sent = stub.sent("blobs.BlobApiService/StartBlobUpload")
    return {blob["name"]: blob["contentLength"] for blob in sent}


class Listing(dict):
    """Lists what has been uploaded so far."""

    def __init__(self, stub):
        super().__init__(stub.answers)
        self.stub = stub

    def get(self, call, otherwise=None):
        if call == MODELS + "ListModelInstanceVersionFiles":
            listed(self.stub, sizes_of(self.stub))
        return super().get(call, otherwise)
