"""What the service's part of the store promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

import moeplace as mp
from moeplace.db import Store
from moeplace.db.jobs import SERVICE, QuotaError
from moeplace.db.records import Actor, CountWindow, Finding, JobOutcome, Judgement
from moeplace.placement.errors import ConflictError, NotFoundError
from moeplace.service.middleware import Metrics

pytestmark = pytest.mark.slow

ANN, BOB = Actor("ann", "approve"), Actor("bob", "submit")
MODEL = mp.ModelSpec(layers=2, experts=8, top_k=2, hidden_size=16, ffn_size=16, name="small")
TOPOLOGY = mp.Topology.preset("h100-hgx", devices_per_node=4)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        opened.add_model(MODEL)
        opened.add_topology(TOPOLOGY, name="box")
        opened.deployments.add("chat", "small", "box", {"solver": "eplb"}, ANN)
        yield opened


def plan(seed: int, model: mp.ModelSpec = MODEL) -> mp.Plan:
    statistics = mp.RoutingStatistics.from_counts(np.random.default_rng(seed).integers(1, 99, (3, 2, 8)), top_k=2)
    return mp.solve(mp.Problem(model, TOPOLOGY, statistics), "random", seed=seed)


def window(seed: int, minute: int = 0, workload: str = "") -> CountWindow:
    load = np.random.default_rng(seed).integers(0, 50, (2, 8))
    return CountWindow(NOON + timedelta(minutes=minute), load, workload)


def test_a_window_sent_again_is_stored_once_and_comes_back_as_sent(store: Store) -> None:
    sent = [window(i, i, "code" if i % 2 else "") for i in range(5)]
    assert store.windows.add({"chat": sent}) == {"chat": 5}
    assert store.windows.add({"chat": [*sent[2:], window(9, 9)]}) == {"chat": 1}
    found = store.windows.page("chat", limit=100)
    assert [entry.ended for entry in found] == [NOON + timedelta(minutes=i) for i in (0, 1, 2, 3, 4, 9)]
    for entry, original in zip(found, sent, strict=False):
        np.testing.assert_array_equal(entry.load, original.load)
        assert entry.workload == original.workload
    total = sum(int(entry.load.sum()) for entry in [*sent, window(9)])
    assert store.windows.totals("chat") == (6, total)
    assert store.windows.unchecked() == {"chat": (6, 0)}
    assert [entry.key for entry in store.windows.page("chat", limit=2)] == [entry.key for entry in found[-2:]]
    assert [entry.key for entry in store.windows.page("chat", limit=2, after=found[0].key)] == [
        entry.key for entry in found[1:3]
    ]


def test_windows_of_another_shape_are_refused_whole(store: Store) -> None:
    for load, message in (
        (np.zeros((2, 9), int), r"shape \[2, 9\]"),
        (np.full((2, 8), -1), "run from -1"),
        (np.full((2, 8), 1 << 60), "expected 0 to"),
    ):
        with pytest.raises(mp.InputError, match=message):
            store.windows.add({"chat": [window(1), CountWindow(NOON, load)]})
    assert store.windows.totals("chat") == (0, 0)
    with pytest.raises(NotFoundError, match="did you mean 'chat'"):
        store.windows.add({"chart": [window(1)]})


def test_a_shape_is_told_while_others_have_it_asked_anew(store: Store) -> None:
    """As when windows of several senders are refused at once."""

    def look(_: int) -> set[object]:
        windows = store.windows
        return {(windows.renewed("chat", (2, 8)), windows.shape("chat")) for _ in range(300)}

    with ThreadPoolExecutor(8) as pool:
        assert set().union(*pool.map(look, range(8))) == {(False, (2, 8))}
    assert store.windows.renewed("chat", (2, 9))


def test_large_counts_come_back_exactly(store: Store) -> None:
    load = np.zeros((2, 8), np.int64)
    load[0, 0] = (1 << 48) - 1
    store.windows.add({"chat": [CountWindow(NOON, load)]})
    np.testing.assert_array_equal(store.windows.page("chat", limit=1)[0].load, load)


def test_compaction_keeps_every_count_and_retention_the_newest(store: Store) -> None:
    sent = [window(i, i, "code" if 4 <= i < 7 else "") for i in range(11)]
    store.windows.add({"chat": sent})
    totals = store.windows.totals("chat")
    later = datetime.now(UTC) + timedelta(hours=1)
    assert store.windows.compact("chat", older_than=NOON, group=2, keep=100) == (0, 0)
    # 4 of no workload, 3 of code, 4 of none: joined by twos within each run.
    assert store.windows.compact("chat", older_than=later, group=2, keep=100) == (5, 0)
    assert store.windows.totals("chat") == totals
    found = store.windows.page("chat", limit=100)
    assert [(entry.workload, entry.merged) for entry in found] == [
        ("", 2), ("", 2), ("code", 2), ("code", 1), ("", 2), ("", 2),
    ]  # fmt: skip
    np.testing.assert_array_equal(found[0].load, sent[0].load + sent[1].load)
    assert store.windows.compact("chat", older_than=NOON, group=2, keep=2) == (0, 7)
    assert store.windows.totals("chat") == (4, sum(int(entry.load.sum()) for entry in sent[7:]))


def test_a_window_that_was_joined_is_not_counted_again_and_the_newest_stay_single(store: Store) -> None:
    """A clock that jumps a month makes every window old: what is sent again meanwhile still counts once."""
    sent = [window(i, i) for i in range(10)]
    store.windows.add({"chat": sent})
    totals = store.windows.totals("chat")
    month_later = datetime.now(UTC) + timedelta(days=30)
    assert store.windows.compact("chat", older_than=month_later, group=2, keep=100, spare=4) == (3, 0)
    assert [entry.merged for entry in store.windows.page("chat", limit=100)] == [2, 2, 2, 1, 1, 1, 1]
    assert store.windows.add_each([("chat", sent[:3]), ("chat", [*sent[2:], window(11)])]) == [0, 1]
    assert store.windows.totals("chat") == (11, totals[1] + int(window(11).load.sum()))
    # What was dropped is forgotten, with all that was joined into it.
    assert store.windows.compact("chat", older_than=NOON, group=2, keep=6) == (0, 4)
    assert store.windows.add({"chat": sent}) == {"chat": 4}


def test_an_upload_goes_on_where_it_stopped(store: Store) -> None:
    content = np.random.default_rng(0).bytes(5000)
    digest = hashlib.sha256(content).hexdigest()
    upload = store.uploads.begin("trace", "chat", digest, len(content))
    store.uploads.append(upload.key, 0, content[:3000])
    again = store.uploads.begin("trace", "chat", digest, len(content))
    assert (again.key, again.received_bytes) == (upload.key, 3000)
    with pytest.raises(ConflictError, match="3000 bytes; go on from there"):
        store.uploads.append(upload.key, 0, content[:3000])
    with pytest.raises(ConflictError, match="3,000 of 5,000"):
        store.uploads.finish(upload.key, lambda _: {})
    with pytest.raises(mp.InputError, match="exceeds the 5,000 announced"):
        store.uploads.append(upload.key, 3000, content)
    store.uploads.append(upload.key, 3000, content[3000:])
    done = store.uploads.finish(upload.key, lambda found: {"bytes": len(found)})
    assert (done.state, done.about) == ("complete", {"bytes": 5000})
    assert store.uploads.content(upload.key) == content
    assert store.uploads.begin("trace", "chat", digest, len(content)).state == "complete"
    assert store.uploads.complete("trace", "chat", limit=5) == [store.uploads.get(upload.key)]
    assert store.uploads.complete("trace", "", limit=5) == []


def test_an_upload_that_is_not_what_was_announced_is_refused_and_may_begin_again(store: Store) -> None:
    upload = store.uploads.begin("trace", "", "0" * 64, 4)
    store.uploads.append(upload.key, 0, b"four")
    with pytest.raises(mp.InputError, match="another SHA-256"):
        store.uploads.finish(upload.key, lambda _: {})
    assert store.uploads.get(upload.key).state == "refused"
    again = store.uploads.begin("trace", "", "0" * 64, 4)
    assert (again.state, again.received_bytes) == ("open", 0)
    for digest, size, message in (("", 4, "empty"), ("xyz", 4, "64 hexadecimal"), ("1" * 64, 0, "must be 1 to")):
        with pytest.raises(mp.InputError, match=message):
            store.uploads.begin("trace", "", digest, size)


def test_a_job_is_held_by_one_worker_and_finished_once(store: Store) -> None:
    job = store.jobs.submit("solve", {"seed": 1}, BOB, idempotency="x")
    assert store.jobs.submit("solve", {"seed": 1}, BOB, idempotency="x").key == job.key
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        store.jobs.submit("solve", {"seed": 2}, BOB, idempotency="x")
    other = store.jobs.submit("solve", {"seed": 2}, ANN, idempotency="x")
    assert other.key != job.key, "what key another one chose is nobody's business"
    assert store.jobs.submit("solve", {"seed": 2}, ANN, idempotency="x").key == other.key
    store.jobs.cancel(other.key, ANN)
    held = store.jobs.claim("worker 1")
    assert held is not None
    assert store.jobs.claim("worker 2") is None
    assert store.jobs.beat(held, {"value": 1.5})
    assert store.jobs.get(job.key).progress == {"value": 1.5}
    [pulse] = store.jobs.heartbeats()
    assert store.jobs.beat(held)
    assert not store.jobs.lost(pulse, attempts=3), "it showed life since"
    assert store.jobs.lost(store.jobs.heartbeats()[0], attempts=3)
    second = store.jobs.claim("worker 2")
    assert second is not None
    assert (second.key, second.attempts) == (job.key, 2)
    assert not store.jobs.beat(held)
    assert not store.jobs.finish(held, JobOutcome({"late": True}, plan=plan(1)))
    assert store.plans() == [], "what a worker finds after it lost its job is not stored"
    assert store.jobs.finish(second, JobOutcome({"value": 1}, plan=plan(2)))
    done = store.jobs.get(job.key)
    assert (done.state, done.result) == ("done", {"value": 1, "plan": store.plans()[0].id})
    assert not store.jobs.finish(second, JobOutcome({}))
    assert not store.jobs.fail(second, "late")
    with pytest.raises(ConflictError, match="done already"):
        store.jobs.cancel(job.key, BOB)


def test_a_job_whose_workers_keep_dying_fails(store: Store) -> None:
    job = store.jobs.submit("solve", {}, BOB)
    for _ in range(3):
        assert store.jobs.claim("w") is not None
        assert store.jobs.lost(store.jobs.heartbeats()[0], attempts=3)
    assert store.jobs.claim("w") is None
    failed = store.jobs.get(job.key)
    assert failed.state == "failed"
    assert "died 3 times" in str(failed.error)


def test_a_released_job_has_cost_no_attempt_and_a_cancelled_one_is_not_begun(store: Store) -> None:
    job = store.jobs.submit("solve", {}, BOB)
    held = store.jobs.claim("w")
    assert held is not None
    assert store.jobs.release(held)
    assert (store.jobs.get(job.key).state, store.jobs.get(job.key).attempts) == ("queued", 0)
    again = store.jobs.claim("w")
    assert again is not None
    assert store.jobs.cancel(job.key, BOB).state == "cancelled"
    assert not store.jobs.beat(again)
    assert not store.jobs.finish(again, JobOutcome({}))
    assert store.jobs.claim("w") is None
    assert store.jobs.waiting() == {"queued": 0, "running": 0}


def test_jobs_are_taken_in_turn_from_those_who_ask_and_drift_checks_first(store: Store) -> None:
    greedy, modest = Actor("greedy", "submit"), Actor("modest", "submit")
    many = [store.jobs.submit("solve", {"n": n}, greedy).key for n in range(4)]
    few = [store.jobs.submit("solve", {"n": n}, modest).key for n in range(2)]
    check = store.jobs.submit("watch", {}, SERVICE, deployment="chat").key
    assert store.jobs.claim("lane", "watch").key == check  # type: ignore[union-attr]
    assert store.jobs.claim("lane", "watch") is None, "whatever else waits"
    order = []
    for _ in range(6):
        held = store.jobs.claim("w")
        assert held is not None
        order.append(held.key)
        assert store.jobs.finish(held, JobOutcome({}))
    assert order == [many[0], few[0], many[1], few[1], many[2], many[3]]
    again = store.jobs.submit("watch", {}, SERVICE, deployment="chat", only=True).key
    assert again == check, "one at a time"


def test_nobody_fills_the_queue(store: Store) -> None:
    greedy, modest = Actor("greedy", "submit"), Actor("modest", "submit")
    for _ in range(3):
        store.jobs.submit("solve", {}, greedy, seconds=3600.0)
    with pytest.raises(QuotaError, match="3 jobs in the queue, and with this one they take 18,000 s"):
        store.jobs.submit("pareto", {}, greedy, seconds=7200.0)
    for _ in range(47):
        store.jobs.submit("solve", {}, greedy, seconds=1.0)
    with pytest.raises(QuotaError, match="50 jobs"):
        store.jobs.submit("solve", {}, greedy)
    store.jobs.submit("solve", {}, modest, seconds=3600.0)
    held = store.jobs.claim("w")
    assert held is not None
    assert store.jobs.submit("solve", {}, greedy, seconds=3000.0).state == "queued", "what runs is not waited for"


def test_workers_that_claim_together_get_different_jobs(store: Store) -> None:
    keys = [store.jobs.submit("solve", {"n": n}, BOB).key for n in range(6)]
    claimed: list[int] = []

    def work() -> None:
        while (held := store.jobs.claim("w")) is not None:
            claimed.append(held.key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == keys


def decide(
    store: Store, seed: int, *, publish: bool = False, action: str = "apply", version: int = 0, alarm: bool = True
) -> int:
    store.jobs.submit("watch", {}, BOB, deployment="chat")
    held = store.jobs.claim("w")
    assert held is not None
    judgement = Judgement(version, action, "because", {"gain": 0.1}, publish)  # type: ignore[arg-type]
    finding = Finding(last_window=7, alarm=alarm, figures={"p": 0.001, "regret": 0.2} if alarm else {"p": 0.9})
    assert store.jobs.finish(held, JobOutcome({}, plan=plan(seed), finding=finding, judgement=judgement))
    result = store.jobs.get(held.key).result
    assert result is not None
    return int(result["decision"])


def test_an_approved_decision_puts_its_plan_in_force_and_is_told_once(store: Store) -> None:
    record, secret = store.webhooks.add("chat", "http://127.0.0.1:1/", ANN)
    key = decide(store, 1)
    waiting = store.decisions.get(key)
    assert (waiting.state, waiting.current_id, waiting.deployment) == ("waiting", None, "chat")
    assert store.deployments.get("chat").plan_id is None
    closed = store.decisions.close(key, "approve", ANN, "looks good")
    assert store.decisions.close(key, "approve", ANN) == closed, "the same approval again changes nothing"
    with pytest.raises(ConflictError, match="is published"):
        store.decisions.close(key, "reject", ANN)
    deployment = store.deployments.get("chat")
    assert (deployment.plan_id, deployment.version, deployment.checked) == (waiting.candidate_id, 1, 7)
    [publication] = store.deployments.publications("chat", limit=9)
    assert (publication.cause, publication.decision, publication.actor) == ("approved", key, "ann")
    events = store.webhooks.take(9)
    assert [event.event["event"] for event in events] == ["drift.alarm", "decision.made"]
    assert all(event.url == record.url and event.secrets == (secret,) for event in events)
    assert store.webhooks.take(9, busy=[record.key]) == []
    [last] = store.webhooks.take(9)
    assert last.event["event"] == "plan.published", "two at once of one webhook, and whoever takes an event has it"
    assert store.webhooks.take(9) == []
    store.webhooks.sent(events[0].key, "204", state="sent")
    store.webhooks.sent(events[1].key, "refused", state="due")
    assert [(event.key, event.attempts) for event in store.webhooks.take(9)] == [(events[1].key, 1)]
    assert [(check.alarm, check.figures) for check in store.deployments.checks("chat", limit=9)] == [
        (True, {"p": 0.001, "regret": 0.2})
    ]


def test_policy_may_publish_and_a_stale_judgement_never_does(store: Store) -> None:
    assert store.decisions.get(decide(store, 1, publish=True)).state == "published"
    assert store.deployments.get("chat").version == 1
    assert store.decisions.get(decide(store, 2, publish=True, version=0)).state == "superseded"
    assert store.decisions.get(decide(store, 3, publish=True, version=1, action="keep")).state == "kept"
    assert store.deployments.get("chat").version == 1
    first = decide(store, 4, version=1)
    second = decide(store, 5, version=1)
    assert [store.decisions.get(key).state for key in (first, second)] == ["superseded", "waiting"]
    store.deployments.publish("chat", store.add_plan(plan(6)).id, ANN, cause="manual", expected=1)
    assert store.decisions.get(second).state == "superseded"
    assert [entry.key for entry in store.decisions.page("chat", limit=2)] == [second, first]


def test_publishing_checks_version_and_fit_and_everything_is_audited(store: Store) -> None:
    mine = store.add_plan(plan(1))
    other = store.add_plan(plan(2, MODEL.replace(hidden_size=32, name="other")))
    store.deployments.publish("chat", mine.id, ANN, cause="manual", expected=0, comment="first")
    with pytest.raises(ConflictError, match="at version 1, not 0"):
        store.deployments.publish("chat", mine.id, ANN, cause="manual", expected=0)
    with pytest.raises(mp.InputError, match="another model or topology"):
        store.deployments.publish("chat", other.id, ANN, cause="manual")
    with pytest.raises(mp.InputError, match="history of deployment 'chat'"):
        store.delete("plan", mine.id, dependants=True)
    with pytest.raises(mp.InputError, match="history of deployment 'chat'"):
        store.delete("model", "small", dependants=True)
    store.deployments.set_policy("chat", {"solver": "search"}, ANN)
    with pytest.raises(ConflictError, match="exists with another"):
        store.deployments.add("chat", "small", "box", {}, ANN)
    assert [(entry.action, entry.actor) for entry in store.audit.entries(limit=9)] == [
        ("deployment.policy", "ann"),
        ("plan.manual", "ann"),
        ("deployment.add", "ann"),
    ]
    assert store.deployments.version_of("chat", 1).plan_id == mine.id
    with pytest.raises(NotFoundError, match="no version 2"):
        store.deployments.version_of("chat", 2)


def test_tokens_are_kept_as_hashes_and_end_when_revoked(store: Store) -> None:
    token = store.tokens.add("ci", "submit", ANN)
    assert store.tokens.actor(token) == Actor("ci", "submit")
    for wrong in ("", token[:-1], token + "x", "\ud800"):
        assert store.tokens.actor(wrong) is None
    with pytest.raises(ConflictError, match="revoke it first"):
        store.tokens.add("ci", "read", ANN)
    with pytest.raises(mp.InputError, match="known: approve, read, submit"):
        store.tokens.add("x", "admin", ANN)  # type: ignore[arg-type]
    store.tokens.revoke("ci", ANN)
    assert store.tokens.actor(token) is None
    assert [(entry.name, entry.revoked is not None) for entry in store.tokens.all()] == [("ci", True)]
    with pytest.raises(NotFoundError):
        store.tokens.revoke("unknown", ANN)
    assert token not in repr(store.audit.entries(limit=9))


def test_a_roll_back_holds_until_traffic_changes_or_a_person_lets_go(store: Store) -> None:
    state = lambda key: store.decisions.get(key).state  # noqa: E731
    for version in (0, 1):
        assert state(decide(store, version + 1, publish=True, version=version)) == "published"
    first, second = (store.deployments.version_of("chat", version).plan_id for version in (1, 2))
    store.deployments.publish("chat", first, ANN, cause="rollback")
    hold = store.deployments.get("chat").hold
    assert hold is not None
    assert (hold["by"], hold["plans"]) == ("ann", [second])
    assert state(decide(store, 3, publish=True, version=3, alarm=False)) == "waiting", "nothing has changed"
    assert state(decide(store, 2, publish=True, version=3)) == "waiting", "not the very plan again"
    assert store.deployments.get("chat").plan_id == first
    assert state(decide(store, 4, publish=True, version=3)) == "published", "traffic has changed"
    assert store.deployments.get("chat").hold is None
    store.deployments.publish("chat", first, ANN, cause="rollback")
    assert state(decide(store, 3, publish=True, version=5, alarm=False)) == "waiting"
    store.deployments.release("chat", ANN)
    assert state(decide(store, 3, publish=True, version=5, alarm=False)) == "published"
    assert "deployment.release" in [entry.action for entry in store.audit.entries(limit=9)]


def test_an_alarm_stays_open_until_somebody_acts_on_it(store: Store) -> None:
    key = decide(store, 1)
    opened = store.deployments.get("chat").alarm
    assert opened is not None
    store.jobs.submit("watch", {}, SERVICE, deployment="chat")
    held = store.jobs.claim("w")
    assert held is not None
    assert store.jobs.finish(held, JobOutcome({}, finding=Finding(9, False, {"status": "no change"})))
    newest = store.deployments.checks("chat", limit=1)[0]
    assert newest.figures == {"status": "no change", "open_alarm": opened["at"]}
    [entry] = [each for each in store.deployments.overview(limit=9) if each.deployment.name == "chat"]
    assert (entry.regret, entry.alarms, entry.waiting) == (0.2, 1, 1)
    told = Metrics(store).text().decode()
    for line in (
        'moeplace_drift_alarm{deployment="chat"} 1.0',
        'moeplace_drift_alarms_total{deployment="chat"} 1.0',
        'moeplace_plan_regret{deployment="chat"} 0.2',
        'moeplace_deployment_decisions_waiting{deployment="chat"} 1.0',
    ):
        assert line in told, line
    store.decisions.close(key, "reject", ANN)
    assert store.deployments.get("chat").alarm is None
    decide(store, 2, action="keep")
    assert store.deployments.get("chat").alarm is None, "the service acted on it"
    assert 'moeplace_drift_alarm{deployment="chat"} 0.0' in Metrics(store).text().decode()
    assert 'moeplace_drift_alarms_total{deployment="chat"} 2.0' in Metrics(store).text().decode()
