"""Engines asked for their routing, against a server that answers as SGLang's recorder does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
pytest.importorskip("torch", reason="SGLang's records are files of torch")
import engine_endpoints
from service_runs import POLICY, TOPOLOGY, serving

import moeplace as mp
from moeplace._http import Connections
from moeplace.db.records import EngineHold, EngineRecord
from moeplace.placement.errors import NotFoundError
from moeplace.service.polling import ask

pytestmark = pytest.mark.slow

MODEL = mp.ModelSpec(layers=3, experts=6, top_k=2, hidden_size=1024, ffn_size=512, name="served", moe_layers=(1, 2, 3))
COUNTED = np.tile(3 * np.arange(1, 7), (3, 1))
"""Of one recording: three passes of the counts that the endpoint answers."""


def ready(client: mp.Client, name: str = "chat") -> None:
    client.add_model(MODEL)
    client.add_topology(TOPOLOGY, "box")
    client.add_deployment(name, "served", "box", POLICY)


def recording(url: str) -> EngineRecord:
    return EngineRecord(
        deployment="chat",
        url=url,
        recorder="a",
        every=1.0,
        span=0.05,
        created=datetime.now(UTC),
        polled=None,
        windows=0,
        failures=0,
        failed=None,
        error=None,
    )


def until(client: mp.Client, what: Callable[[EngineRecord], Any], seconds: float = 150.0) -> EngineRecord:
    deadline = time.monotonic() + seconds
    while not what(found := client.engine("chat")):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


@pytest.mark.long
def test_an_engine_is_asked_again_and_again_and_failures_are_shown_and_back_off(tmp_path: Path) -> None:
    folder = tmp_path / "recorder"
    folder.mkdir()
    engine = engine_endpoints.SGLang(folder)
    engine.key = "its-key"
    with (
        serving(str(tmp_path / "store.db"), "--workers", "0", "--recorder", f"a={folder}") as server,
        server.client() as client,
        engine_endpoints.serving(engine) as url,
    ):
        ready(client)
        with pytest.raises(NotFoundError, match="no engine is asked"):
            client.engine("chat")
        with pytest.raises(mp.InputError, match=r"'/etc' is no folder of this server .*known: 'a'"):
            client.set_engine("chat", url, recorder="/etc")
        with pytest.raises(mp.InputError, match="must not be longer"):
            client.set_engine("chat", url, recorder="a", every=1, span=2)
        client.set_engine("chat", url, recorder="a", every=1, span=0.1, key="its-key")
        until(client, lambda found: found.windows >= 2)
        windows = list(client.windows("chat"))
        assert all((np.asarray(window.load) == COUNTED).all() for window in windows)
        assert client.totals("chat")[0] == len(windows) >= 2
        assert not [file for file in folder.iterdir() if file.stat().st_mtime < time.time() - 5], "files are taken in"
        assert "its-key" not in repr([client.engine("chat"), *client.audit()])

        engine.key = "another-key"
        failed = until(client, lambda found: found.failures >= 2)
        assert "401" in str(failed.error)
        asked = len(engine.called)
        time.sleep(1.5)
        assert len(engine.called) - asked <= 1, "the second failure is waited out for four times as long"
        changed = client.set_engine("chat", url, recorder="a", every=1, span=0.1, key="another-key")
        assert (changed.failures, changed.error) == (0, None)
        until(client, lambda found: found.windows >= failed.windows + 1)
        client.remove_engine("chat")
        assert [entry.action for entry in client.audit(subject="chat")][:3] == [
            "engine.remove",
            "engine.set",
            "engine.set",
        ]
        time.sleep(1.5)
        asked = len(engine.called)
        time.sleep(1.5)
        assert len(engine.called) == asked
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"mode": None}, MODEL, "recorder is off"),
        ({"mode": "per_token"}, MODEL, "counts are wanted"),
        ({"mode": "stat"}, MODEL.replace(experts=8), "counts 6 experts"),
    ],
)
def test_an_engine_that_cannot_be_read_says_why(
    tmp_path: Path, settings: dict[str, Any], model: mp.ModelSpec, message: str
) -> None:
    with engine_endpoints.serving(engine_endpoints.SGLang(tmp_path, **settings)) as url:
        record = recording(url)
        with pytest.raises(mp.MoeplaceError, match=message):
            ask(EngineHold(record, 1, "", 0, None), model, tmp_path, Event(), Connections())


@pytest.mark.long
def test_one_of_two_servers_asks_and_the_other_takes_over(tmp_path: Path) -> None:
    engine = engine_endpoints.SGLang(tmp_path)
    arguments = (str(tmp_path / "store.db"), "--workers", "0", "--recorder", f"a={tmp_path}", "--lease", "8")
    with engine_endpoints.serving(engine) as url, serving(*arguments) as other:
        with serving(*arguments) as first, first.client() as client:
            ready(client)
            client.set_engine("chat", url, recorder="a", every=1, span=0.05)
            found = until(client, lambda record: record.windows >= 2)
            starts = [path for path in engine.called if path.startswith("/start")]
            assert len(starts) <= found.windows + 2, "asked by one of them"
            first.kill()
        with other.client() as client:
            until(client, lambda record: record.windows >= found.windows + 2)


def test_an_engines_key_goes_nowhere_else_and_its_answers_are_not_shown(tmp_path: Path) -> None:
    """Whoever may name an engine's address could otherwise read what stands at any, and have the key sent on."""
    led: list[Any] = []

    class Elsewhere:
        def answer(self, method: str, path: str, headers: Any, body: Any) -> tuple[int, bytes]:
            led.append(headers.get("Authorization"))
            return 200, b"{}"

    with engine_endpoints.serving(Elsewhere()) as elsewhere:
        for status in (301, 302, 307, 308, 404, 500):
            answer = engine_endpoints.Other(lambda status=status: (status, b"credentials of the metadata service"))
            answer.headers = {"Location": elsewhere + "/server_info"}
            with engine_endpoints.serving(answer) as url:
                record = recording(url)
                with pytest.raises(mp.MoeplaceError) as refused:
                    ask(EngineHold(record, 1, "", 0, "its-key"), MODEL, tmp_path, Event(), Connections())
                assert "credentials" not in str(refused.value)
                assert status == 404 or str(status) in str(refused.value)
    assert led == []
