"""PostgreSQL tells who listens of changes; SQLite cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pytest

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow

PATIENCE = 30.0
BY = Actor("test", "approve")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_tells_of_what_others_change_and_of_nothing_else(url: str) -> None:
    told = threading.Event()
    with Store.open(url) as store, Store.open(url) as other:
        listener = store.listen(told.set)
        if not url.startswith("postgres"):
            assert listener is None
            pytest.skip("SQLite cannot tell")
        assert listener is not None
        try:
            until(lambda: listener.hears)
            model = other.add_model(mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8))
            topology = other.add_topology(mp.Topology.preset("h100-hgx", devices_per_node=2))
            told.clear()
            other.deployments.add("chat", model.id, topology.id, {}, BY)
            assert told.wait(PATIENCE)
            told.clear()
            other.jobs.submit("watch", {}, BY, deployment="chat")
            assert told.wait(PATIENCE)
            # A moment, for what was told twice.
            time.sleep(0.3)
            told.clear()
            # Many a second of these come in: nobody waits for them.
            other.windows.add({"chat": [CountWindow(datetime.now(UTC), np.ones((2, 4)))]})
            assert not told.wait(1.0)
        finally:
            listener.close()
        assert not any(thread.name == "listener" for thread in threading.enumerate())


def test_a_listener_comes_back_after_its_connection_is_lost(url: str) -> None:
    if not url.startswith("postgres"):
        pytest.skip("SQLite cannot tell")
    import psycopg

    told = threading.Event()
    listening = (
        "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_notify(%' AND pid <> pg_backend_pid() "
        "AND datname = current_database()"
    )
    with Store.open(url) as store, psycopg.connect(url, autocommit=True) as connection:
        others = set(connection.execute(listening).fetchall())
        listener = store.listen(told.set)
        assert listener is not None
        try:
            until(lambda: listener.hears)
            told.clear()
            mine = set(connection.execute(listening).fetchall()) - others
            assert mine
            for (pid,) in mine:
                connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
            # Who waits is woken, so that nothing told meanwhile is missed.
            assert told.wait(PATIENCE)
            until(lambda: listener.hears)
        finally:
            listener.close()
