"""Servers that answer as SGLang's and vLLM's do where routing is recorded, on a port of this machine.

From sglang 0.5.23: entrypoints/http_server.py (paths, methods, texts of the answers), utils/auth.py (the key),
eplb/expert_distribution.py (what the recorder does and writes, and that it raises where it is off, which ends the
server), managers/tokenizer_manager.py and state_capturer/routed_experts.py (routed experts). From vllm 0.33.0:
entrypoints/openai (completion, chat_completion, models) and utils/serial_utils.py (`numpy2base64`).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYERS, EXPERTS, SLOTS, TOP_K, WIDTH = 4, 6, 8, 2, 8
"""Layer 0 is dense."""


class GoneError(Exception):
    """The connection ends without an answer."""


class SGLang:
    """The recorder of a server of some ranks, and its /generate."""

    def __init__(self, folder: Path, mode: str | None = "stat", ranks: int = 1, **settings: Any) -> None:
        self.folder, self.mode, self.ranks = folder, mode, ranks
        self.info = {"tp_size": ranks, "pp_size": 1, "dp_size": 1, "enable_eplb": False, "version": "0.5.23"}
        self.info |= {"expert_distribution_recorder_mode": mode, "enable_return_routed_experts": True} | settings
        self.key: str | None = None
        self.mapping = torch.arange(SLOTS).expand(LAYERS, SLOTS) % EXPERTS
        self.recording = False
        self.passes = 0
        self.called: list[str] = []
        self.late = 0.0
        self.dead = False

    def answer(self, method: str, path: str, headers: Any, body: Any) -> tuple[int, bytes]:
        self.called.append(path)
        if self.dead:
            raise GoneError
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, b'{"error":"Unauthorized"}'
        if (method, path) == ("GET", "/server_info"):
            return 200, json.dumps(self.info).encode()
        if path.endswith("_expert_distribution_record") and path.count("/") == 1:
            if self.mode is None:
                self.dead = True
                raise GoneError
            return 200, getattr(self, path[1:].split("_")[0])()
        if (method, path) == ("POST", "/generate"):
            return self.generate(body)
        if (method, path) == ("POST", "/v1/chat/completions") and body.get("return_routed_experts"):
            ids = routed(body["max_tokens"])
            text = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
            return 200, json.dumps({"choices": [{"index": 0}], "sglext": {"routed_experts": text}}).encode()
        return 404, b'{"detail":"Not Found"}'

    def start(self) -> bytes:
        self.recording, self.passes = True, 3
        return b"Start recording the expert distribution.\n"

    def stop(self) -> bytes:
        self.recording = False
        return b"Stop recording the expert distribution.\n"

    def dump(self) -> bytes:
        if self.mode in ("stat", "stat_approx"):
            buffer = torch.zeros(8, LAYERS, EXPERTS, dtype=torch.int32)
            buffer[: self.passes, 1:] = torch.arange(1, EXPERTS + 1, dtype=torch.int32)
            self.write(None, {"rank": 0, "logical_count": buffer, "average_utilization_rate_over_window": None})
        else:
            for rank in range(self.ranks):
                records = [self.record(step, rank) for step in range(self.passes)]
                content = {"records": records, "last_physical_to_logical_map": self.mapping.contiguous()}
                if rank and self.late:
                    threading.Timer(self.late, self.write, (rank, content)).start()
                else:
                    self.write(rank, content)
        self.passes = 0
        return b"Dump expert distribution record.\n"

    def record(self, step: int, rank: int) -> dict[str, Any]:
        record: dict[str, Any] = {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary"}
        if self.mode == "per_pass":
            table = torch.ones(LAYERS, SLOTS, dtype=torch.int32)
            table[0] = 0
            return {**record, "global_physical_count": table}
        ids = torch.full((LAYERS, 2, WIDTH), -1, dtype=torch.int32)
        ids[1:, :, :TOP_K] = torch.tensor([[rank, 5], [2, 3]], dtype=torch.int32)
        tokens = {"input_ids": [5, 6], "positions": [0, 1], "extend_seq_lens": [2], "forward_mode": 1}
        return {**record, **tokens, "topk_ids_of_layer": ids, "misc_objects": []}

    def write(self, rank: int | None, content: dict[str, Any]) -> None:
        tail = "" if rank is None else f"_{rank}"
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path = self.folder / f"expert_distribution_recorder_{time.time()}{tail}.pt"
        with path.open("wb") as handle:
            # As a large file is seen while it is written.
            handle.write(buffer.getvalue()[:100])
            handle.flush()
            time.sleep(0.1)
            handle.write(buffer.getvalue()[100:])

    def generate(self, body: dict[str, Any]) -> tuple[int, bytes]:
        prompt = len(body["text"].split())
        new = body["sampling_params"]["max_new_tokens"]
        meta: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": new}
        if body.get("return_routed_experts"):
            ids = routed(prompt + new - 1)
            meta["routed_experts"] = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
        return 200, json.dumps({"text": "...", "meta_info": meta}).encode()


class VLLM:
    """Completions and chats, with routed experts in each choice where the server was started so."""

    def __init__(self, returns: bool = True, longest: int = 1000) -> None:
        self.returns, self.longest = returns, longest
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.delay = 0.0

    def answer(self, method: str, path: str, headers: Any, body: Any) -> tuple[int, bytes]:
        if (method, path) == ("GET", "/v1/models"):
            return 200, json.dumps({"object": "list", "data": [{"id": "served", "object": "model"}]}).encode()
        if method != "POST" or path not in ("/v1/completions", "/v1/chat/completions"):
            return 404, b'{"detail":"Not Found"}'
        with self.lock:
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        with self.lock:
            self.at_once -= 1
        text = body["prompt"] if path == "/v1/completions" else body["messages"][-1]["content"]
        prompt = len(text.split())
        if prompt > self.longest:
            return 400, json.dumps({"error": {"message": f"maximum context length is {self.longest} tokens"}}).encode()
        encoded = None
        if self.returns:
            buffer = io.BytesIO()
            np.save(buffer, routed(prompt + body["max_tokens"] - 1).astype(np.uint8), allow_pickle=False)
            encoded = base64.b64encode(buffer.getbuffer()).decode("ascii")
        return 200, json.dumps({"choices": [{"index": 0, "routed_experts": encoded}]}).encode()


def routed(tokens: int) -> np.ndarray[Any, Any]:
    """[tokens, LAYERS, TOP_K], zeros in the dense layer."""
    ids = np.zeros((tokens, LAYERS, TOP_K), np.int64)
    ids[:, 1:, 0] = np.arange(tokens)[:, None] % EXPERTS
    ids[:, 1:, 1] = (np.arange(tokens)[:, None] + 1) % EXPERTS
    return ids


@contextlib.contextmanager
def serving(engine: Any) -> Iterator[str]:
    """Serves until the block ends; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            try:
                status, content = engine.answer(self.command, self.path, self.headers, body)
            except GoneError:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in getattr(engine, "headers", {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_: Any) -> None:
            pass

    class Listening(ThreadingHTTPServer):
        # Requests that come at once on a busy machine are not turned away.
        request_queue_size = 128

    server = Listening(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Other:
    """A server that answers anything the same way. headers: of each answer."""

    def __init__(self, reply: Callable[[], tuple[int, bytes]]) -> None:
        self.reply = reply
        self.headers: dict[str, str] = {}

    def answer(self, *_: Any) -> tuple[int, bytes]:
        return self.reply()
