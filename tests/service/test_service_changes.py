"""Who waits for a change is woken when PostgreSQL tells of it, and by looking where nothing tells."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, PATIENCE, TOPOLOGY

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor
from moeplace.service import changes as module
from moeplace.service.changes import Changes, Topic

BY = Actor("test", "approve")


async def settled(topic: Topic) -> None:
    """Until it has been looked at."""
    async with asyncio.timeout(PATIENCE):
        while topic.sign is None:
            await asyncio.sleep(0.01)


def test_a_waiter_is_woken_when_a_plan_is_published(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody would look in time.
    monkeypatch.setattr(module, "TOLD_SECONDS", 10 * PATIENCE)
    with Store.open(url) as store, Store.open(url) as other:
        model, topology = store.add_model(MODEL), store.add_topology(TOPOLOGY)
        store.deployments.add("chat", model.id, topology.id, {}, BY)
        flat = mp.RoutingStatistics.from_counts([[1.0] * MODEL.experts] * MODEL.layers, top_k=2)
        plan = other.add_plan(mp.solve(mp.Problem(MODEL, TOPOLOGY, flat), "contiguous"))

        async def wait() -> None:
            changes = Changes(store)
            changes.listen(lambda: None)
            try:
                if url.startswith("postgres"):
                    async with asyncio.timeout(PATIENCE):
                        while changes._listener is None or not changes._listener.hears:
                            await asyncio.sleep(0.01)
                async with (
                    changes.watch("deployment", "chat", "engine") as topic,
                    changes.watch("page", "chat", "ann") as page,
                    changes.watch("page", "", "ann") as every,
                ):
                    for watched in (topic, page, every):
                        await settled(watched)
                    seen = topic.version
                    watching = [(watched, watched.version) for watched in (topic, page, every)]
                    waiting = [asyncio.create_task(one.wait(PATIENCE, version)) for one, version in watching]
                    await asyncio.sleep(0)
                    await asyncio.to_thread(other.deployments.publish, "chat", plan.id, BY, cause="manual")
                    assert await asyncio.gather(*waiting) == [True, True, True]
                    assert await topic.wait(PATIENCE, seen), "also for one who looked away meanwhile"
                    assert not await topic.wait(0.5, topic.version), "once a change"
            finally:
                changes.stop()
                changes.close()

        asyncio.run(wait())


def test_a_page_is_told_of_what_its_deployment_does_alone(tmp_path: object) -> None:
    with Store.open(f"{tmp_path}/store.db") as store:
        model, topology = store.add_model(MODEL), store.add_topology(TOPOLOGY)
        for name in ("chat", "code"):
            store.deployments.add(name, model.id, topology.id, {}, BY)

        def signs() -> dict[object, object]:
            return dict(store.signs(["chat"], [], ["", "chat", "code", "gone"]))

        before = signs()
        assert ("page", "gone") not in before
        job = store.jobs.submit("watch", {}, BY, deployment="chat")
        after = signs()
        changed = {key for key in after if after[key] != before[key]}
        assert changed == {("page", ""), ("page", "chat")}
        store.jobs.cancel(job.key, BY)
        assert signs()["page", "chat"] != after["page", "chat"]
