"""Calls over HTTP end in time, whatever the other side does, and take no more than was asked for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from moeplace._http import Answer, Connections, UnansweredError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n"


@contextmanager
def answering(pieces: Sequence[bytes], pause: float = 0.0) -> Iterator[str]:
    """A server of one answer, which comes piece by piece."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                for piece in pieces:
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return
                    over.wait(pause)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        over.set()
        thread.join(60)


def get(url: str, *, timeout: float = 60.0, most: int = 1 << 20) -> Answer:
    return Connections().request("GET", url, timeout=timeout, most=most)


@pytest.mark.parametrize("head", [HEAD + b"X: ", HEAD + b"\r\n"], ids=["headers", "body"])
def test_an_answer_that_drips_is_given_up_when_its_time_is_over(head: bytes) -> None:
    with answering([head, *[b"a"] * 600], pause=0.1) as url:
        began = time.monotonic()
        with pytest.raises(UnansweredError) as refused:
            get(url, timeout=1.0)
        assert refused.value.timed_out
        assert time.monotonic() - began < 30, "each byte came in time, all of them would take a minute"


def test_an_answer_cut_short_is_none() -> None:
    with answering([HEAD + b"\r\nabc"]) as url, pytest.raises(UnansweredError, match="3 bytes read"):
        get(url)


def test_no_more_is_read_than_was_asked_for() -> None:
    with answering([HEAD + b"\r\n" + b"a" * 10]) as url:
        assert get(url, most=4).body == b"aaaa"


def test_redirects_are_answers() -> None:
    with answering([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"]) as url:
        assert get(url).status == 302


@pytest.mark.parametrize("url", ["http://[bad/", "http://host:99999/", f"http://{'x' * 70}.test/"])
def test_an_address_that_is_none_is_no_answer(url: str) -> None:
    with pytest.raises(UnansweredError):
        get(url)
