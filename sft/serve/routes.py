"""The HTTP interface: who may ask and how much, answers sent as they come, and clients that hang up."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from sft import UserError
from sft.serve.api import Answers, Chat, Completion, Part, RequestRefused, shaped
from sft.serve.prompts import ServerLimits, texts_of
from sft.serve.writer import Full, Writer
from sft.tokens.opened import Opened
from sft.write.stream import Text

REQUEST_BYTES = 2**20
"""Largest request in bytes."""


def application(
    opened: Opened, writer: Writer, limits: ServerLimits, key: str | None, ready: Callable[[], None] = lambda: None
) -> FastAPI:
    """The HTTP interface of a model."""
    name, started = opened.recipe.folder.name, int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        writer.start()
        ready()
        yield
        writer.stop()
        await asyncio.to_thread(writer.join)

    async def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # as it was sent
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestRefused(401, "wrong API key; send `Authorization: Bearer KEY`", "invalid_api_key")

    app = FastAPI(lifespan=lifespan, openapi_url=None, exception_handlers={HTTPException: _error, Exception: _error})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "answers": len(writer)}

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "sft"}]}

    @app.get("/v1/models/{model:path}", dependencies=[Depends(allowed)])
    async def model(model: str) -> dict[str, Any]:
        _check_name(model, name)
        return {"id": name, "object": "model", "created": started, "owned_by": "sft"}

    @app.post("/v1/completions", dependencies=[Depends(allowed)])
    async def completions(request: Request) -> Any:
        return await _answer(opened, writer, limits, request, await _read(request, Completion, name))

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)])
    async def chat(request: Request) -> Any:
        return await _answer(opened, writer, limits, request, await _read(request, Chat, name))

    return app


async def _read(request: Request, kind: type[Completion] | type[Chat], name: str) -> Completion | Chat:
    """The request, its size bounded while it comes in."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestRefused(415, "send `Content-Type: application/json`")  # a web page cannot send it to us unasked
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > REQUEST_BYTES:
            raise RequestRefused(413, f"the request is larger than {REQUEST_BYTES} bytes")
    try:
        given = json.loads(body)
        if not isinstance(given, dict):
            raise ValueError("it is not an object")
        json.dumps(given, ensure_ascii=False).encode()  # fails for half a character, which JSON can hold
        asked = kind.model_validate({field: value for field, value in given.items() if value is not None})
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise RequestRefused(400, f"the request is broken JSON: {error}") from None
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = "is not known here" if first["type"] == "extra_forbidden" else f"is refused: {first['msg']}"
        raise RequestRefused(400, f"`{place}` {message}", param=place) from None
    if asked.model is not None:
        _check_name(asked.model, name)
    return asked


def _check_name(model: str, name: str) -> None:
    if model != name:
        raise RequestRefused(
            404, f"there is no model `{model[:200]}` here; this is `{name}`", "model_not_found", "model"
        )


async def _answer(
    opened: Opened, writer: Writer, limits: ServerLimits, request: Request, asked: Completion | Chat
) -> JSONResponse | StreamingResponse:
    """Have the request's answers written and send them, as they come or at once."""
    try:
        texts = await asyncio.to_thread(texts_of, opened, limits, asked)
    except UserError as error:
        raise RequestRefused(400, str(error)) from error
    parts: asyncio.Queue[Part] = asyncio.Queue()
    loop, places = asyncio.get_running_loop(), {text: choice for choice, text in enumerate(texts)}

    def tell(text: Text) -> None:  # in the thread of the writer
        loop.call_soon_threadsafe(parts.put_nowait, Part(places[text], text.news(), text.end))

    try:
        writer.add(texts, tell)
    except Full as error:
        raise RequestRefused(429, str(error), "queue_full") from error
    shape = Answers(asked, opened.recipe.folder.name, texts)
    if asked.stream:
        return Stream(shape.events(parts), leave=partial(writer.drop, texts))
    try:
        whole, gone = asyncio.ensure_future(shape.whole(parts)), asyncio.ensure_future(_gone(request))
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        return JSONResponse(await whole if whole.done() else {})  # nobody is there to read the second
    finally:
        whole.cancel()
        writer.drop(texts)


async def _gone(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """Server-sent events; whatever ends them, `leave` is called."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.leave = leave

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self.leave()


async def _error(_: Request, error: Exception) -> JSONResponse:
    """Every error in OpenAI's shape."""
    if isinstance(error, RequestRefused):
        return JSONResponse(shaped(error.status_code, error.detail, error.code, error.param), error.status_code)
    if isinstance(error, HTTPException):
        return JSONResponse(shaped(error.status_code, error.detail), error.status_code, error.headers)
    return JSONResponse(shaped(500, "the server failed; its log says why"), 500)
