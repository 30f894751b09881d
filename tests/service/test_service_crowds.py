"""Many who wait for the same thing: what they ask is read once, and a few at a time are worked on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from moeplace.placement.errors import StoreError
from moeplace.service.changes import Topic
from moeplace.service.crowds import TOGETHER, Kept, Reads, Turns


def test_who_asks_together_shares_a_reading_and_who_asks_later_gets_a_newer_one() -> None:
    state, calls = ["old"], 0
    begun, go_on = threading.Event(), threading.Event()

    def load(key: str) -> str:
        nonlocal calls
        calls += 1
        value = state[0]
        begun.set()
        go_on.wait(30)
        return f"{key} {value}"

    async def run() -> tuple[list[str], list[str]]:
        reads = Reads(load)
        early = [asyncio.create_task(reads("chat")) for _ in range(50)]
        await asyncio.to_thread(begun.wait, 30)
        state[0] = "new"
        late = [asyncio.create_task(reads("chat")) for _ in range(50)]
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*early), await asyncio.gather(*late)

    early, late = asyncio.run(run())
    assert set(early) == {"chat old"}
    assert set(late) == {"chat new"}, "what was read before somebody asked is no answer to him"
    assert calls == 2


def test_a_reading_that_failed_is_made_again_and_one_who_leaves_takes_nobody_along() -> None:
    failures = [StoreError("the database is away")]

    def load(key: int) -> int:
        if failures:
            raise failures.pop()
        return key

    async def run() -> None:
        reads = Reads(load)
        answers = await asyncio.gather(*(reads(1) for _ in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreError] * 3
        first, second = asyncio.create_task(reads(2)), asyncio.create_task(reads(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == 2
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())


def test_content_is_made_once_and_kept_while_there_is_room() -> None:
    made: list[str] = []

    def make(key: str) -> bytes:
        made.append(key)
        if key == "bad":
            raise StoreError("no such plan")
        return key.encode() * 10

    async def run() -> None:
        kept = Kept(make, most_bytes=25)
        assert await asyncio.gather(*(kept("a") for _ in range(20))) == [b"a" * 10] * 20
        await kept("b")
        await kept("a")
        await kept("c")
        await kept("a")
        assert made == ["a", "b", "c"], "the one asked for longest ago makes room"
        await kept("b")
        for _ in range(2):
            with pytest.raises(StoreError):
                await kept("bad")
        assert made == ["a", "b", "c", "b", "bad", "bad"]

    asyncio.run(run())


def test_of_those_that_wait_a_few_are_worked_on_at_a_time_and_nobody_else_waits_for_them() -> None:
    at_work, most, served = 0, 0, 0
    topic = Topic()

    async def work() -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        for _ in range(5):
            await asyncio.sleep(0)
        at_work -= 1

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal served
        if scope["path"] == "/health":
            return
        await work()
        await topic.wait(30, 0)
        await work()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        served += 1

    def waiting(turns: Turns, send: Any) -> asyncio.Task[None]:
        scope = {"type": "http", "path": "/v1/deployments/chat/plan", "query_string": b"wait=60"}
        return asyncio.create_task(turns(scope, None, send))  # type: ignore[arg-type]

    async def run() -> None:
        turns, go_on = Turns(app), asyncio.Event()

        async def slow(message: Any) -> None:
            await go_on.wait()

        async def quick(message: Any) -> None:
            pass

        crowd = [waiting(turns, slow) for _ in range(10 * TOGETHER)]
        await asyncio.sleep(0)
        await turns({"type": "http", "path": "/health", "query_string": b""}, None, quick)  # type: ignore[arg-type]
        assert most <= TOGETHER
        async with asyncio.timeout(30):
            while len(topic._waiting) < len(crowd):
                await asyncio.sleep(0)
            topic.version += 1
            topic.wake()
            # Whoever does not read his answer stands in nobody's way.
            await waiting(turns, quick)
            assert served == 1
            go_on.set()
            await asyncio.gather(*crowd)
        assert most <= TOGETHER
        assert served == len(crowd) + 1

    asyncio.run(run())
