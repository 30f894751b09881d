"""Many who wait for the same thing: what they ask is read once, and a few at a time are worked on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from moeplace.db.jobs import QuotaError
from moeplace.placement.errors import StoreError
from moeplace.service.changes import Topic
from moeplace.service.crowds import MOST_OF_CLIENT, OF_CLIENT, TOGETHER, Kept, Line, Reads, Turns


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
        scope = {"type": "http", "method": "GET", "path": "/v1/deployments/chat/plan", "query_string": b"wait=60"}
        return asyncio.create_task(turns(scope, None, send))  # type: ignore[arg-type]

    async def run() -> None:
        turns, go_on = Turns(app), asyncio.Event()

        async def slow(message: Any) -> None:
            await go_on.wait()

        async def quick(message: Any) -> None:
            pass

        crowd = [waiting(turns, slow) for _ in range(10 * TOGETHER)]
        await asyncio.sleep(0)
        health = {"type": "http", "method": "GET", "path": "/health", "query_string": b""}
        await turns(health, None, quick)  # type: ignore[arg-type]
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


def test_what_one_client_reads_at_once_leaves_place_to_others_and_bodies_take_none() -> None:
    at_work: dict[str, int] = {}
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        client = scope["client"][0]
        at_work[client] = at_work.get(client, 0) + 1
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> None:
        turns = Turns(app)
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        def asked(client: str, method: str = "GET", path: str = "/v1/jobs") -> asyncio.Task[None]:
            scope = {"type": "http", "method": method, "path": path, "query_string": b"wait=1", "client": (client, 1)}
            return asyncio.create_task(turns({**scope, "headers": []}, None, send))  # type: ignore[arg-type]

        crowd = [asked("10.0.0.1") for _ in range(OF_CLIENT + MOST_OF_CLIENT + 5)]
        other = [asked("10.0.0.2"), asked("2001:db8::1"), asked("2001:db8::2")]
        # Whoever sends a body slowly keeps nobody from waiting for a plan.
        bodies = [asked("10.0.0.3", "POST", "/v1/deployments/chat/plan") for _ in range(10 * TOGETHER)]
        holder = asked("10.0.0.4", path="/v1/deployments/chat/plan")
        for _ in range(20):
            await asyncio.sleep(0)
        assert at_work == {
            "10.0.0.1": OF_CLIENT,
            "10.0.0.2": 1,
            "2001:db8::1": 1,
            "2001:db8::2": 1,
            "10.0.0.3": len(bodies),
            "10.0.0.4": 1,
        }
        assert statuses == [429] * 5
        go_on.set()
        await asyncio.gather(*crowd, *other, *bodies, holder)
        assert statuses.count(200) == len(crowd) - 5 + len(other) + len(bodies) + 1
        assert not turns._clients

    asyncio.run(run())


def test_of_those_in_a_line_each_caller_has_a_turn() -> None:
    served: list[str] = []

    async def run() -> None:
        line, go_on = Line(most=20, most_of_caller=10), asyncio.Event()

        async def ask(caller: str) -> None:
            async with line.turn(caller):
                await go_on.wait()
                served.append(caller)

        many = [asyncio.create_task(ask("many")) for _ in range(11)]
        await asyncio.sleep(0)
        with pytest.raises(QuotaError, match="'many'"):
            await ask("many")
        few = [asyncio.create_task(ask(caller)) for caller in ("a", "b", "a", "b")]
        await asyncio.sleep(0)
        # Who has left is not waited for.
        gone = many.pop(1)
        gone.cancel()
        others = [asyncio.create_task(ask(f"c{number}")) for number in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(StoreError, match="too much waits"):
            await ask("late")
        go_on.set()
        await asyncio.gather(*many, *few, *others)
        assert line.empty
        async with line.turn("again"):
            assert not line.empty

    asyncio.run(run())
    assert served[:9] == ["many", "a", "b", "c0", "c1", "c2", "c3", "c4", "c5"]
    assert sorted(served[9:]) == ["a", "b"] + ["many"] * 9
