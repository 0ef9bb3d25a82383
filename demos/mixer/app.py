"""The page's server: what it answers, and how it is started.

The page is one HTML file with its own script. It holds the mix, and asks here what the mix means; what
runs is told to it line by line, as JSON. Gradio's engine serves the API beside it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import anyio
import gradio as gr
import torch
from fastapi import Body, Depends, Header, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from composable_ebm.experts.library import Library
from composable_ebm.pipelines import Pipeline

from .answers import Answers
from .api import add_api
from .guard import Guard
from .runs import FAILURES, Message, Runs, sentences
from .state import Limits

PAGE = Path(__file__).with_name("page")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page asks no other host for anything, and runs no script but its own.
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
# Gradio keeps a quarter of a megabyte for each visitor of its API who was ever here, up to this many.
_SESSIONS = 200
_VISITOR = re.compile(r"[A-Za-z0-9-]{8,64}", re.ASCII)

__all__ = ["build", "serve"]


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    max_chains: int = 64,
    device: torch.device | str = "cpu",
    root_path: str = "",
    pipeline: Pipeline | None = None,
) -> None:
    """Serves the page until interrupted.

    Args:
        host: Address to serve on.
        port: Port to serve on.
        auth: User and password that a visitor must give.
        max_chains: Most samples that a visitor may ask for at once.
        device: Where to run.
        root_path: Where a proxy shows the page, such as /mixer.
        pipeline: Whose prompts visitors may type.
    """
    keeps = auth is not None or host == "127.0.0.1"
    server, runs = build(Limits(max_chains), device, keeps, pipeline)
    count, families = len(runs.offer.cards), len({card.family for card in runs.offer.cards.values()})
    print(f"Found {count} experts in {families} families. Starting the page.", flush=True)
    try:
        server.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            run_history=False,
            ssr_mode=False,
            state_session_capacity=_SESSIONS,
            root_path=root_path or None,
            # Gradio's tools ask for no password.
            mcp_server=auth is None and importlib.util.find_spec("mcp") is not None,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(f"cannot serve on {host}, port {port}; is it taken? Give another --port.") from error
    print(f"The mixer is at http://{host}:{port}{root_path} until you press Ctrl+C.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nThe mixer has stopped.", flush=True)
    finally:
        runs.close()


def build(
    limits: Limits, device: torch.device | str = "cpu", keeps: bool = True, pipeline: Pipeline | None = None
) -> tuple[gr.Server, Runs]:
    """The server of the page and its API, not yet listening, and what it runs.

    Args:
        limits: What a visitor may ask for.
        device: Where to run.
        keeps: Whether visitors may save the experts that they taught.
        pipeline: Whose prompts visitors may type.
    """
    others = {} if pipeline is None else {str(pipeline): pipeline}
    runs = Runs(Library(device, others), limits)
    answers = Answers(runs, keeps)
    server = gr.Server(title="Composable energies", openapi_url=None)
    server.add_middleware(Guard)
    add_api(server, runs)
    _add_page(server)
    _add_answers(server, answers)
    # Loads the first experts and draws the starts, while the first visitor reads.
    threading.Thread(target=answers.prepare, name="mixer opens").start()
    return server, runs


# -- the page itself ----------------------------------------------------------------------------------------


def _allowed(request: Request) -> bool:
    """Whether whoever asks has given the password, where one is asked for."""
    app = request.app
    if app.auth is None:
        return True
    tokens = (request.cookies.get(f"access-token{kind}-{app.cookie_id}") for kind in ("", "-unsecure"))
    return any(token in app.tokens for token in tokens if token)


def _add_page(server: gr.Server) -> None:
    def page(request: Request) -> Response:
        name = "index.html" if _allowed(request) else "login.html"
        return FileResponse(PAGE / name, media_type="text/html", headers=HEADERS)

    def file(name: str) -> Response:
        path = PAGE / name
        if path.suffix not in KINDS or path.name != name or not path.is_file():
            raise HTTPException(404, "There is nothing here.")
        return FileResponse(path, media_type=KINDS[path.suffix], headers=HEADERS)

    server.add_api_route("/", page, methods=["GET", "HEAD"])
    server.add_api_route("/page/{name}", file, methods=["GET"])


# -- what the page asks -------------------------------------------------------------------------------------


def _visitor(request: Request, x_visitor: Annotated[str, Header()] = "") -> str:
    """The name that the page gives itself; other sites cannot send this header."""
    if not _allowed(request):
        raise HTTPException(401, "Log in first.")
    if not _VISITOR.fullmatch(x_visitor):
        raise HTTPException(400, "A visitor is named by a header: reload the page.")
    return x_visitor


Asked = Annotated[dict, Body()]
By = Annotated[str, Depends(_visitor)]


def _add_answers(server: gr.Server, answers: Answers) -> None:
    def answering(answer: Callable[[dict, str], Any]) -> Callable[..., Response]:
        def answered(sent: Asked, by: By) -> Response:
            try:
                said = answer(sent, by)
            except FAILURES as error:
                return JSONResponse({"problem": sentences(error)}, headers=HEADERS)
            return said if isinstance(said, Response) else JSONResponse(said, headers=HEADERS)

        return answered

    for name in (
        "world",
        "thumbs",
        "read",
        "stop",
        "shake",
        "heat",
        "example",
        "code",
        "film",
        "pack",
        "forget",
        "keep",
    ):
        server.add_api_route(f"/ask/{name}", answering(getattr(answers, name)), methods=["POST"])

    def run(sent: Asked, by: By) -> Response:
        messages = answers.run(sent, by)
        return StreamingResponse(
            _lines(messages),
            media_type="application/x-ndjson",
            headers={**HEADERS, "X-Accel-Buffering": "no"},
        )

    server.add_api_route("/ask/run", run, methods=["POST"])


async def _lines(messages: Iterator[Message]) -> AsyncIterator[bytes]:
    """Messages as lines of JSON, each fetched in a thread; what makes them ends with whoever reads."""
    limiter = anyio.CapacityLimiter(1)  # its own: forty visitors would use up the threads of all others
    try:
        while (message := await anyio.to_thread.run_sync(next, messages, None, limiter=limiter)) is not None:
            yield json.dumps(message).encode() + b"\n"
    finally:
        messages.close()  # type: ignore[attr-defined]
