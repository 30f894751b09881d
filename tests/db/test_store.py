"""What the store promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sqlalchemy import NullPool, create_engine, text

import moeplace as mp
from moeplace.db import Store
from moeplace.db.schema import REVISION, REVISION_TABLE, Base

pytestmark = pytest.mark.slow


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


SPEC = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=64, ffn_size=128, moe_layers=(1, 3, 5), name="small")
TOPOLOGY = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2)


def make_plan(
    seed: int, *, solver: str = "eplb", slots: int = 10, spec: mp.ModelSpec = SPEC, trace: str = ""
) -> mp.Plan:
    """A random plan with replicas and uneven shares."""
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, spec.experts, size=(spec.layers, slots - spec.experts))
    table = np.stack([rng.permutation(np.concatenate([np.arange(spec.experts), row])) for row in extra])
    weights = rng.random(table.shape) + 0.1
    sums = np.stack([np.bincount(row, w, spec.experts) for row, w in zip(table, weights, strict=True)])
    return mp.Plan(
        model=spec,
        topology=TOPOLOGY,
        physical_to_logical=table,
        slot_device=np.sort(np.arange(slots) % TOPOLOGY.num_devices),
        shares=weights / np.take_along_axis(sums, table, axis=1),
        certificate=mp.Certificate("device load max/mean", 1.25, 1.0),
        provenance=mp.Provenance(
            solver=solver,
            version="0.1.0",
            seed=2**70 + seed,
            options={"sweeps": 3, "note": "naïve ☃"},
            seconds=0.5,
            stop="time limit",
            trace_fingerprint=trace,
            history=((0.1, 2.0, None), (0.4, 1.25, 1.0)),
        ),
        predicted={"step_seconds_mean": 0.1 + 0.2},
    )


def counts(seed: int = 0) -> mp.RoutingStatistics:
    load = np.random.default_rng(seed).integers(0, 100, size=(4, 3, 8)).astype(float)
    return mp.RoutingStatistics.from_counts({"chat": load[:2], "code": load[2:]}, moe_layers=(1, 3, 5), top_k=2)


def test_a_plan_comes_back_as_it_was_stored(store: Store) -> None:
    plan = make_plan(1)
    record = store.add_plan(plan, name="first")
    for found in (record, store.plan("first"), store.plan(record.id), store.plan(record.fingerprint[:5].upper())):
        assert found.name == "first"
        assert found.plan.fingerprint == plan.fingerprint
        np.testing.assert_array_equal(found.plan.shares, plan.shares)
        assert (found.plan.model, found.plan.topology) == (SPEC, TOPOLOGY)
        assert (found.plan.certificate, found.plan.provenance) == (plan.certificate, plan.provenance)
        assert found.plan.predicted == plan.predicted
    assert record.id == record.fingerprint[:12]
    assert abs(datetime.now(UTC) - store.plan("first").created) < timedelta(minutes=5)


def test_empty_slots_come_back_empty(store: Store) -> None:
    full = make_plan(1)
    table = np.where(full.replicas[np.arange(3)[:, None], full.physical_to_logical] == 1, full.physical_to_logical, -1)
    for row, expert in zip(*np.nonzero(full.replicas > 1), strict=True):
        table[row, full.logical_to_physical[row, expert, 0]] = expert
    plan = dataclasses.replace(full, physical_to_logical=table, shares=np.empty(0))
    assert not plan.filled.all()
    found = store.plan(store.add_plan(plan).id).plan
    assert found.fingerprint == plan.fingerprint
    np.testing.assert_array_equal(found.physical_to_logical, table)


def test_records_are_frozen(store: Store) -> None:
    record = store.add_plan(make_plan(1))
    with pytest.raises(ValidationError, match="frozen"):
        record.name = "other"


def test_the_same_plan_is_kept_once_however_long_it_took(store: Store) -> None:
    plan = make_plan(1)
    again = dataclasses.replace(plan, provenance=dataclasses.replace(plan.provenance, seconds=99.0, history=()))
    first, second = store.add_plan(plan), store.add_plan(again, name="named later")
    assert second.fingerprint == first.fingerprint
    assert second.plan.provenance.seconds == 0.5
    assert [found.name for found in store.plans()] == ["named later"]


def test_plans_that_differ_in_more_than_time_are_kept_apart(store: Store) -> None:
    plan = make_plan(1)
    made = plan.provenance
    variants = [
        plan,
        make_plan(2),
        dataclasses.replace(plan, topology=mp.Topology.preset("a100-hgx", devices_per_node=4)),
        dataclasses.replace(plan, certificate=mp.Certificate("device load max/mean", 1.25, 1.25)),
        dataclasses.replace(plan, provenance=dataclasses.replace(made, seed=7)),
        dataclasses.replace(plan, provenance=dataclasses.replace(made, options={})),
        dataclasses.replace(plan, provenance=dataclasses.replace(made, solver="chain")),
    ]
    assert len({store.add_plan(variant).fingerprint for variant in variants}) == len(variants)
    assert len(store.plans()) == len(variants)


def test_plans_are_listed_newest_first_by_model_solver_and_page(store: Store) -> None:
    other = SPEC.replace(name="large", hidden_size=128)
    for seed in range(6):
        store.add_plan(
            make_plan(seed, solver="eplb" if seed % 2 else "chain", spec=SPEC if seed < 4 else other), name=f"p{seed}"
        )
    names = lambda found: [summary.name for summary in found]  # noqa: E731
    assert names(store.plans()) == ["p5", "p4", "p3", "p2", "p1", "p0"]
    assert names(store.plans(model="small")) == ["p3", "p2", "p1", "p0"]
    assert names(store.plans(model=store.model("large").id, solver="eplb")) == ["p5"]
    assert names(store.plans(limit=2, offset=1)) == ["p4", "p3"]
    assert names(store.plans(offset=4)) == ["p1", "p0"]
    assert store.plans(solver="unused") == []
    summary = store.plans(limit=1)[0]
    assert (summary.model, summary.topology, summary.solver) == ("large", "h100-hgx", "eplb")
    assert (summary.layers, summary.experts, summary.devices, summary.slots) == (3, 8, 4, 10)
    assert summary.certificate is not None
    assert summary.certificate.gap == pytest.approx(0.2)
    with pytest.raises(mp.InputError, match=r"offset \(-1\)"):
        store.plans(offset=-1)


def test_listing_plans_does_not_read_their_tables(store: Store, url: str) -> None:
    record = store.add_plan(make_plan(1))
    engine = create_engine(_address(url), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("UPDATE plans SET document = 'not even JSON'"))
    assert [summary.id for summary in store.plans()] == [record.id]


def test_a_plan_changed_behind_the_store_is_refused(store: Store, url: str) -> None:
    store.add_plan(make_plan(1), name="p")
    engine = create_engine(_address(url), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("UPDATE plans SET document = replace(document, 'time limit', 'finished')"))
    with pytest.raises(mp.StoreError, match="changed or damaged"):
        store.plan("p")


def test_a_missing_reference_names_the_nearest(store: Store) -> None:
    with pytest.raises(mp.InputError, match="no plans yet"):
        store.plan("anything")
    record = store.add_plan(make_plan(1), name="decode-8-gpus")
    with pytest.raises(mp.InputError, match="did you mean 'decode-8-gpus'"):
        store.plan("decode-8-gpu")
    typo = record.id[:6] + ("0" if record.id[6] != "0" else "1") + record.id[7:]
    with pytest.raises(mp.InputError, match=f"did you mean '{record.id}'"):
        store.plan(typo)
    with pytest.raises(mp.InputError, match="no model '%' is stored"):
        store.model("%")
    with pytest.raises(mp.InputError, match="no plan '' is stored"):
        store.plan("")


def test_an_ambiguous_reference_lists_the_candidates(store: Store) -> None:
    first = store.add_model(SPEC, name="mine")
    second = store.add_model(SPEC.replace(ffn_size=256))
    with pytest.raises(mp.InputError, match=r"could be 2 models") as caught:
        store.model("small")
    assert first.id in str(caught.value)
    assert second.id in str(caught.value)
    assert store.model("mine") == first
    assert store.model(second.fingerprint[:8]) == second


def test_a_name_belongs_to_one_row_of_its_kind(store: Store) -> None:
    first = store.add_plan(make_plan(1), name="best")
    with pytest.raises(mp.InputError, match=f"'best' is taken by plan {first.id}"):
        store.add_plan(make_plan(2), name="best")
    assert len(store.plans()) == 1, "a refused plan must not be stored"
    with pytest.raises(mp.InputError, match="stored already, as 'best'"):
        store.add_plan(make_plan(1), name="better")
    store.add_topology(TOPOLOGY, name="best")
    store.rename("plan", "best", "better")
    assert store.add_plan(make_plan(2), name="best").name == "best"
    assert store.plan("better").id == first.id
    with pytest.raises(mp.InputError, match="'best' is taken"):
        store.rename("plan", "better", "best")


def test_names_that_cannot_be_typed_or_read_as_ids_are_refused(store: Store) -> None:
    for name in ("", " padded ", "new\nline", "zero\0byte", "deadbeef", "x" * 101, "\ud800", ".", "..", "e\u0301"):
        with pytest.raises(mp.InputError, match="name"):
            store.add_model(SPEC, name=name)
    assert store.models() == []


def test_models_and_topologies_are_kept_once(store: Store) -> None:
    assert store.add_model(SPEC).spec == SPEC
    assert store.add_topology(TOPOLOGY, name="cluster").topology == TOPOLOGY
    store.add_plan(make_plan(1))
    store.add_model(SPEC, name="m")
    assert [record.name for record in store.models()] == ["m"]
    assert [record.topology for record in store.topologies()] == [TOPOLOGY]
    assert store.plans()[0].topology == "cluster"


def test_statistics_come_back_with_their_file(store: Store) -> None:
    statistics = counts()
    content = np.random.default_rng(0).bytes((8 << 20) + 1)
    record = store.add_statistics(statistics, content, name="monday")
    assert store.add_statistics(counts(), b"the same counts in another file").id == record.id
    assert store.statistics_content("monday") == content
    assert store.statistics_records() == [store.statistics(record.id)] == [record]
    assert (record.trace_fingerprint, record.content_bytes) == (statistics.fingerprint, len(content))
    assert (record.workloads, record.moe_layers, record.windows) == (("chat", "code"), (1, 3, 5), 4)
    assert (record.top_k, record.has_transitions, record.sample_tokens) == (2, False, 0)
    other = store.add_statistics(counts(seed=1), b"x")
    assert store.statistics_content(other.id) == b"x"
    with pytest.raises(mp.InputError, match="0 bytes"):
        store.add_statistics(counts(seed=2), b"")


def test_a_plan_names_the_statistics_it_was_solved_on(store: Store) -> None:
    statistics = counts()
    record = store.add_statistics(statistics, b"file", name="monday")
    plan = make_plan(1, trace=statistics.fingerprint)
    assert store.add_plan(plan).statistics_id is None
    assert store.add_plan(plan, statistics="monday").statistics_id == record.id
    assert store.plans()[0].statistics_id == record.id
    with pytest.raises(mp.InputError, match="was solved on trace"):
        store.add_plan(make_plan(2, trace="0" * 64), statistics="monday")
    with pytest.raises(mp.InputError, match="no statistics 'tuesday'"):
        store.add_plan(make_plan(2), statistics="tuesday")
    assert len(store.plans()) == 1


def test_evaluations_belong_to_a_plan_and_are_kept_once(store: Store) -> None:
    store.add_plan(make_plan(1), name="p")
    other = store.add_plan(make_plan(2))
    figures = {"step_seconds_mean": 0.1 + 0.2, "load_max_mean": np.float32(1.5)}
    objective = mp.Objective(execution="context_coherent", risk="cvar:0.9")
    given = {"steps": "200 decode steps of 128", "steps_fingerprint": "ab" * 32}
    record = store.add_evaluation("p", summary=figures, objective=objective, **given)
    assert store.add_evaluation("p", summary=figures, objective=objective, **given) == record
    second = store.add_evaluation("p", summary=figures, **given)
    assert store.evaluations("p") == [record, second]
    assert store.evaluations(other.id) == []
    assert record.summary == {"step_seconds_mean": 0.1 + 0.2, "load_max_mean": 1.5}
    assert (record.objective, second.objective) == (objective, None)
    assert (record.plan_id, record.steps) == (store.plan("p").id, "200 decode steps of 128")


def test_an_evaluation_that_says_nothing_is_refused(store: Store) -> None:
    store.add_plan(make_plan(1), name="p")
    given: dict[str, Any] = {"summary": {"p99": 1.0}, "steps": "s", "steps_fingerprint": ""}
    for change, message in (
        ({"summary": {"p99": float("nan")}}, "evaluation summary cannot be stored"),
        ({"summary": {"p99": "slow"}}, "'p99' is 'slow', expected a number"),
        ({"summary": {}}, "at least one figure"),
        ({"steps_fingerprint": "abc"}, "64 hexadecimal digits"),
        ({"steps": "zero\0byte"}, "zero byte"),
    ):
        with pytest.raises(mp.InputError, match=message):
            store.add_evaluation("p", **{**given, **change})
    assert store.evaluations("p") == []


def test_a_plan_that_is_not_plain_data_is_refused(store: Store) -> None:
    for provenance, message in (
        (mp.Provenance(solver="given", version="", options={"tolerance": float("inf")}), "plan cannot be stored"),
        (mp.Provenance(solver="given", version="", options={"start": object()}), "not JSON serializable"),
        (mp.Provenance(solver="x" * 101, version=""), "plan solver has 101 characters"),
    ):
        with pytest.raises(mp.InputError, match=message):
            store.add_plan(dataclasses.replace(make_plan(1), provenance=provenance))
    assert store.plans() == []
    assert store.models() == [], "the model of a refused plan must not be left behind"


def test_exports_are_a_log(store: Store, tmp_path: Path) -> None:
    plan = store.add_plan(make_plan(1), name="p")
    first = store.add_export("p", format="sglang", path=tmp_path / "plan.json", sha256="cd" * 32)
    second = store.add_export(plan.id, format="sglang", path=tmp_path / "plan.json", sha256="cd" * 32)
    assert store.exports("p") == [first, second]
    assert (first.plan_id, first.path, first.sha256) == (plan.id, str(tmp_path / "plan.json"), "cd" * 32)
    with pytest.raises(mp.InputError, match="sha256 .'nonsense'"):
        store.add_export("p", format="sglang", path="x", sha256="nonsense")


def test_deleting_asks_before_it_takes_dependants_along(store: Store) -> None:
    statistics = counts()
    store.add_statistics(statistics, b"file", name="monday")
    for name, seed in (("keep", 1), ("drop", 2)):
        store.add_plan(make_plan(seed), name=name, statistics="monday" if name == "drop" else None)
        store.add_evaluation(name, summary={"p99": 1.0}, steps="s", steps_fingerprint="")
        store.add_export(name, format="vllm", path="x")
    with pytest.raises(mp.InputError, match="1 evaluations, 1 exports"):
        store.delete("plan", "drop")
    with pytest.raises(mp.InputError, match="1 plans, 1 evaluations, 1 exports"):
        store.delete("statistics", "monday")
    with pytest.raises(mp.InputError, match="did you mean 'plan'"):
        store.delete("plans", "drop")  # type: ignore[arg-type]
    store.delete("statistics", "monday", dependants=True)
    expected = {"models": 1, "topologies": 1, "statistics": 0, "plans": 1, "evaluations": 1, "exports": 1}
    assert expected.items() <= store.describe().counts.items()
    store.delete("plan", "keep", dependants=True)
    store.delete("model", "small")
    store.delete("topology", "h100-hgx")
    assert set(store.describe().counts.values()) == {0}


def test_description_tells_where_and_how_much(store: Store, url: str) -> None:
    store.add_plan(make_plan(1))
    description = store.describe()
    assert description.revision == REVISION
    assert description.url.startswith(description.backend)
    assert description.counts["plans"] == 1
    assert description.size_bytes > 4096


def test_one_store_serves_many_threads(store: Store) -> None:
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for seed in range(4):
                record = store.add_plan(make_plan(10 * worker + seed))
                shared = store.add_plan(make_plan(1000))
                store.add_evaluation(
                    shared.id, summary={"worker": worker, "seed": seed}, steps="s", steps_fingerprint=""
                )
                assert store.plan(record.id).id == record.id
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.describe().counts["plans"] == 21
    assert store.describe().counts["evaluations"] == 20


def test_opening_again_changes_nothing(store: Store, url: str) -> None:
    record = store.add_plan(make_plan(1))
    with Store.open(url) as again:
        assert again.plan(record.id).plan.fingerprint == record.plan.fingerprint
    assert store.plan(record.id) is not None


def test_migrations_make_the_tables_the_code_expects(store: Store, url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = create_engine(_address(url), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": REVISION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_the_newest_migration_is_the_one_the_code_expects() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    from moeplace.db.database import MIGRATIONS

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


def _address(url: str) -> str:
    if "://" not in url:
        return f"sqlite:///{url}"
    return url.replace("postgresql://", "postgresql+psycopg://")


def test_only_its_owner_may_read_a_new_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds secrets of webhooks and keys of engines."""
    before = os.umask(0o022)
    try:
        monkeypatch.delenv("MOEPLACE_DB", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        with Store.open() as store, store._sessions.reading() as session:
            session.execute(text("SELECT count(*) FROM models"))
            folder = tmp_path / "data" / "moeplace"
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            rights = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
            assert rights == {f"moeplace.db{tail}": 0o600 for tail in ("", "-wal", "-shm")}
    finally:
        os.umask(before)
