"""Answer OpenAI's chat completions over HTTP with a GGUF file; the engine is llama.cpp's own server."""

import asyncio
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import xllamacpp
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from saigakit.core import workspace
from saigakit.core.lazy import llama_cpp
from saigakit.errors import SaigaError
from saigakit.infer import chat_request, engine
from saigakit.infer.chat_request import ChatRequest, RefusedError
from saigakit.llamacpp import forward
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.weights.memory import inference_memory

_LONGEST_BODY = 10 * 2**20
_Json = dict[str, Any]


def serve(gguf_file: str | Path, *, host: str, port: int, n_ctx: int, parallel: int) -> None:
    """Until SIGTERM or Ctrl-C: then what is running is finished. A second one ends at once."""
    file = engine.require_gguf(gguf_file)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise SaigaError(f"Cannot listen on {host}, port {port}: {reason}. Give another --port.") from None
    with listener, ExitStack() as stack:
        with engine.explaining(file, n_ctx * parallel):
            llm = stack.enter_context(gguf_vocabulary(file))
            app: ASGIApp = _Service(file, llm, n_ctx, parallel).application()
        address, port = listener.getsockname()[:2]
        if ip_address(address).is_loopback:  # a web page that makes its name lead here could ask, too
            app = TrustedHostMiddleware(app, ["localhost", "127.0.0.1", "[::1]", host])
        else:
            print(f"warning: anyone in the network can use this server ({host}).", file=sys.stderr)
        print(f"{file.name}: http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C stops it)", flush=True)
        _Server(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False)).run([listener])


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True  # uvicorn's own method makes the process die of the signal in the end


class _Service:
    """llama.cpp's server behind OpenAI's routes."""

    def __init__(self, file: Path, llm: "llama_cpp.Llama", n_ctx: int, parallel: int) -> None:
        trained = int(llm.metadata[f"{llm.metadata['general.architecture']}.context_length"])
        engine.stop_ids(llm)  # Raises SaigaError for a file without a chat template
        engine.require_as_exported(llm, file)
        self._llm, self._n_ctx = llm, min(n_ctx, trained)  # beyond its training length a model answers with noise
        self._head = {"model": file.stem, "created": int(time.time())}
        self._reader, self._slots = ThreadPoolExecutor(1), ThreadPoolExecutor(parallel)
        tokens, free = self._n_ctx * parallel, workspace.available_memory()
        if (needed := inference_memory(forward.read_shape(llm), "none", 2, tokens)["keys and values"]) > free:
            raise SaigaError(
                f"{parallel} contexts of {self._n_ctx} tokens need {needed / workspace.GB:.1f} GB, and "
                f"{free / workspace.GB:.1f} GB are free. Give a smaller --n-ctx or --parallel."
            )
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), tokens, parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
        params.n_batch = 512  # after each a prompt can be cancelled
        params.cache_ram_mib, params.verbosity, params.enable_chat_template = 0, 1, False
        params.port, params.api_keys, params.ui = 0, [secrets.token_hex()], False  # it listens, but to nobody
        self._engine = xllamacpp.Server(params)

    def application(self) -> Starlette:
        model = {"id": self._head["model"], "object": "model", "created": self._head["created"], "owned_by": "saigakit"}
        routes = [
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [model]})),
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
        ]
        refused = (RefusedError, ClientDisconnect, HTTPException, Exception)
        return Starlette(routes=routes, exception_handlers=dict.fromkeys(refused, _refuse))

    async def _complete(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():  # to its end: a client that is still writing does not read
            body += part[: _LONGEST_BODY + 1 - len(body)]
        if len(body) > _LONGEST_BODY:
            raise RefusedError("The body has more than 10 MB.", status=413)
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self._reader, chat_request.read, bytes(body), self._llm, self._n_ctx)
        if asked.given.get("stream"):
            return StreamingResponse(self._stream(asked), media_type="text/event-stream")
        found: list[_Json] = []
        async with aclosing(self._chunks(asked)) as chunks:
            async for chunk in chunks:
                found.append(chunk)
                if await request.is_disconnected():
                    return Response(status_code=499)
        *pieces, last, usage = found
        end = last["choices"][0]
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in [*pieces, last])
        calls = [{key: call[key] for key in ("id", "type", "function")} for call in end["delta"].get("tool_calls", ())]
        message = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end["finish_reason"]}
        return JSONResponse({**usage, "object": "chat.completion", "choices": [choice]})

    async def _stream(self, asked: ChatRequest) -> AsyncGenerator[str, None]:
        has_usage = asked.given.get("stream_options", {}).get("include_usage")
        try:
            async with aclosing(self._chunks(asked)) as chunks:
                async for chunk in chunks:
                    if chunk["choices"] or has_usage:
                        yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            yield f"data: {json.dumps(error.content)}\n\n"

    async def _chunks(self, asked: ChatRequest) -> AsyncGenerator[_Json, None]:
        """OpenAI's chunks, the last with the usage. Raises RefusedError before the end if the answer does not fit."""
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion.chunk", **self._head}

        def chunk(end: str | None = None, **delta: object) -> _Json:
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": end}], "usage": None}

        yield chunk(role="assistant", content="")  # before there is a free slot
        written = sent = ""
        async with aclosing(self._events(asked.settings)) as events:
            async for event in events:
                if "error" in event:
                    raise RefusedError(event["error"]["message"], status=event["error"]["code"])
                choice = event["choices"][0]
                written, end = written + choice["text"], choice["finish_reason"]
                message, end = asked.read(written, end) if end else ({"content": asked.settled(written)}, None)
                calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls", ()))]
                yield chunk(end, content=message["content"][len(sent) :], **({"tool_calls": calls} if calls else {}))
                sent = message["content"]
        yield {**head, "choices": [], "usage": event["usage"]}

    async def _events(self, settings: _Json) -> AsyncGenerator[_Json, None]:
        """What llama.cpp reports as it works; closing this stops it."""
        loop, events, is_closed = asyncio.get_running_loop(), asyncio.Queue[_Json | None](), False

        def tell(event: _Json) -> bool:
            loop.call_soon_threadsafe(events.put_nowait, event)
            return is_closed

        running = loop.run_in_executor(self._slots, self._engine.handle_completions, settings, tell)
        running.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await running
        finally:
            is_closed = True
            running.cancel()


def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    headers = error.headers if isinstance(error, HTTPException) else None
    if isinstance(error, HTTPException):
        error = RefusedError(f"{request.method} {request.url.path}: {error.detail}.", status=error.status_code)
    elif not isinstance(error, RefusedError):
        error = RefusedError("The server has failed; its output says why.", status=500)
    return JSONResponse(error.content, error.status, headers)
