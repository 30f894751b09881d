"""Requests sent to a running vLLM or SGLang, and the routing that comes back with the answers.

vLLM started with --enable-return-routed-experts puts `routed_experts` into every choice (vllm/entrypoints/openai, 0.33);
SGLang started with the same option does so for requests with `return_routed_experts`: in `meta_info` of /generate, in `sglext`
of the OpenAI endpoints (sglang/srt/managers/tokenizer_manager.py, entrypoints/openai, 0.5.23).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from ..placement.errors import EngineError, InputError
from .engine_server import AnswerError, EngineServer
from .record_sglang import server_info

Engine = Literal["vllm", "sglang"]
Request = dict[str, Any]
"""A completion ({"prompt": ...}) or chat ({"messages": ...}) request, in OpenAI's terms."""

OPTION = "--enable-return-routed-experts"
REQUEST_LIMIT = 1 << 24


@dataclass(frozen=True)
class Answers:
    """How many requests were answered with routing, and what the others were told."""

    answered: int
    failed: int
    first_failure: str = ""


def read_requests(path: Path) -> Iterator[Request]:
    """Requests of a text file: a prompt a line, or a JSON object with `prompt` or `messages` a line.

    Raises:
        InputError: no such file, a line that is neither, or longer than 16 MB; the line is named.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open(encoding="utf-8", errors="replace") as handle:
        number = 0
        while line := handle.readline(REQUEST_LIMIT):
            number += 1
            if len(line) >= REQUEST_LIMIT:
                raise InputError(f"{path}: line {number} is longer than {REQUEST_LIMIT:,} characters")
            if not line.strip():
                continue
            if not line.lstrip().startswith("{"):
                yield {"prompt": line.rstrip("\n")}
                continue
            try:
                request = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} begins like JSON and is none ({error})") from None
            if ("prompt" in request) == ("messages" in request):
                raise InputError(f"{path}: line {number} must have prompt or messages, one of them")
            yield request


def record_requests(
    server: EngineServer,
    engine: Engine,
    requests: Iterator[Request],
    out: TextIO,
    *,
    max_tokens: int = 128,
    seconds: float | None = None,
    concurrency: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Sends requests, and writes the routing of each answer as a line of JSON, as `read_routed_experts` takes it.

    max_tokens: tokens to answer with where a request does not say. seconds: no request is sent later than so long after
    the first; those on their way are waited for. concurrency: requests on their way at once. progress: called with the
    number of answers.

    Raises:
        EngineError: unreachable, set up without routing in its answers, or every request failed; says what to do.
    """
    defaults: Request = {"max_tokens": max_tokens, "stream": False}
    if engine == "vllm":
        defaults["model"] = _model(server)
    elif server_info(server).get("enable_return_routed_experts") is False:
        raise EngineError(f"{server.url}: SGLang does not keep routed experts; start the server with {OPTION}")
    started = time.monotonic()
    answered = failed = 0
    first_failure = ""
    stop = threading.Event()
    waiting: set[Future[Request]] = set()

    def ask(request: Request) -> Request:
        if stop.is_set():
            raise EngineError("stopped")
        return _ask(server, engine, {**defaults, **request})

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            more = True
            while more or waiting:
                while more and len(waiting) < concurrency:
                    request = None
                    if seconds is None or time.monotonic() - started < seconds:
                        request = next(requests, None)
                    more = request is not None
                    if request is not None:
                        waiting.add(pool.submit(ask, request))
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        out.write(json.dumps(future.result()) + "\n")
                    except AnswerError as error:
                        # Refusing one request (too long a prompt) is the server's right; anything else ends it all.
                        if error.status != 400:
                            raise
                        failed += 1
                        first_failure = first_failure or str(error)
                    else:
                        answered += 1
                        if progress is not None:
                            progress(answered)
        finally:
            stop.set()
    if not answered:
        raise EngineError(first_failure or f"{server.url}: no request was sent; the file of requests is empty")
    return Answers(answered, failed, first_failure)


def _model(server: EngineServer) -> str:
    """The name vLLM serves its model under."""
    models = server.json("GET", "/v1/models").get("data")
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise EngineError(f"{server.url}: /v1/models names no model; is a vLLM server there?")
    return str(models[0]["id"])


def _ask(server: EngineServer, engine: Engine, request: Request) -> Request:
    """The routing of one answer, without the answer."""
    completions = "/v1/completions" if engine == "vllm" else "/generate"
    path = "/v1/chat/completions" if "messages" in request else completions
    if engine == "sglang":
        request = {**request, "return_routed_experts": True}
        if path == "/generate":
            request = _generate(request)
    answer = server.json("POST", path, request)
    kept = _routing(answer)
    if not kept:
        raise EngineError(f"{server.url}: an answer came without routed experts; start the server with {OPTION}")
    return kept


def _generate(request: Request) -> Request:
    """A completion request in the terms of SGLang's own endpoint, whose answer counts its tokens."""
    sampling = {"max_new_tokens": request["max_tokens"]}
    sampling |= {name: request[name] for name in ("temperature", "top_p", "top_k", "stop") if name in request}
    return {"text": request["prompt"], "sampling_params": sampling, "return_routed_experts": True}


def _routing(answer: Request) -> Request:
    """What `read_routed_experts` reads of an answer; empty where there is nothing."""
    kept: Request = {}
    for name in ("prompt_routed_experts", "routed_experts"):
        if answer.get(name) is not None:
            kept[name] = answer[name]
    for name in ("meta_info", "sglext"):
        inner = answer.get(name)
        if isinstance(inner, dict) and inner.get("routed_experts") is not None:
            counts = ("routed_experts", "prompt_tokens", "completion_tokens")
            kept[name] = {key: inner[key] for key in counts if key in inner}
    choices: Sequence[Any] = answer["choices"] if isinstance(answer.get("choices"), list) else ()
    inside = [_routing(choice) for choice in choices if isinstance(choice, dict)]
    if any(inside):
        kept["choices"] = inside
    return kept
