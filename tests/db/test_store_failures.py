"""What the store says, and that it stays whole, when the database cannot do what is asked."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import NullPool, create_engine, text

import moeplace as mp
from moeplace.db import Store

pytestmark = pytest.mark.slow

WRITE_UNTIL_FULL = """
import sys
import numpy as np
import moeplace as mp
from moeplace.db import Store

def add(store, seed, size):
    load = np.random.default_rng(seed).random((2, 4))
    sample = np.random.default_rng(seed).bytes(size)
    store.add_statistics(mp.RoutingStatistics.from_counts(load), sample, name=f"s{seed}")

def write_until_full(path):
    store = Store.open(path)
    seed = 0
    try:
        while seed < 1000:
            seed += 1
            add(store, seed, 200_000)
    except mp.StoreError as error:
        print(seed)
        print(error)
        return store, seed - 1
    raise SystemExit("the limit did not stop the writes")
"""


def make_plan(seed: int = 0) -> mp.Plan:
    table = np.random.default_rng(seed).permutation(8)[None]
    spec = mp.ModelSpec(layers=1, experts=8, top_k=2, hidden_size=8, ffn_size=8)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
    return mp.Plan(model=spec, topology=topology, physical_to_logical=table, slot_device=np.repeat([0, 1], 4))


def execute(url: str, statement: str) -> None:
    address = url.replace("postgresql://", "postgresql+psycopg://") if "://" in url else f"sqlite:///{url}"
    with create_engine(address, poolclass=NullPool).begin() as connection:
        connection.execute(text(statement))


def test_a_locked_database_says_who_holds_it_and_can_still_be_read(url: str) -> None:
    with Store.open(url, lock_seconds=0.2) as store:
        first = store.add_plan(make_plan(1))
        if "://" in url:
            address = url.replace("postgresql://", "postgresql+psycopg://")
            hold = "SELECT pg_advisory_xact_lock(hashtext('moeplace'), hashtext(current_schema()))"
        else:
            address, hold = f"sqlite:///{url}", "BEGIN IMMEDIATE"
        holder = create_engine(address, poolclass=NullPool)
        with holder.connect() as connection:
            connection.exec_driver_sql(hold)
            with pytest.raises(mp.StoreError, match="locked: another process has been writing for too long"):
                store.add_plan(make_plan(2))
            assert [plan.id for plan in store.plans()] == [first.id]
        store.add_plan(make_plan(2))
        assert len(store.plans()) == 2


def test_tables_of_a_newer_release_are_left_alone(url: str) -> None:
    Store.open(url).close()
    execute(url, "UPDATE moeplace_revision SET version_num = '9999'")
    with pytest.raises(mp.StoreError, match=r"newer release of moeplace .*9999.*upgrade moeplace"):
        Store.open(url)


def test_tables_of_another_program_are_left_alone(url: str) -> None:
    execute(url, "CREATE TABLE plans (title TEXT)")
    with pytest.raises(mp.StoreError, match=r"tables of another program \(plans\)"):
        Store.open(url)
    execute(url, "INSERT INTO plans VALUES ('still theirs')")


def test_a_refusal_half_way_leaves_nothing(url: str) -> None:
    with Store.open(url) as store:
        if "://" in url:
            execute(
                url,
                "CREATE FUNCTION refuse() RETURNS trigger AS "
                "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$ LANGUAGE plpgsql",
            )
            execute(url, "CREATE TRIGGER refuse BEFORE INSERT ON plans FOR EACH ROW EXECUTE FUNCTION refuse()")
        else:
            execute(url, "CREATE TRIGGER refuse BEFORE INSERT ON plans BEGIN SELECT raise(ROLLBACK, 'no'); END")
        expected = "disk is full; free some space" if "://" in url else "the database refused"
        with pytest.raises(mp.StoreError, match=expected):
            store.add_plan(make_plan())
        assert set(store.describe().counts.values()) == {0}, "the model and the topology were added before the plan"
        execute(url, "DROP TRIGGER refuse" + (" ON plans" if "://" in url else ""))
        store.add_plan(make_plan())


def test_an_unreachable_server_is_told_without_its_password() -> None:
    pytest.importorskip("psycopg")
    password = "hunter" + str(2)
    with pytest.raises(mp.StoreError, match="cannot be reached; check that the server runs") as caught:
        Store.open(f"postgresql://someone:{password}@127.0.0.1:1/plans?sslpassword={password}&connect_timeout=3")
    assert "someone:***@127.0.0.1:1/plans" in str(caught.value)
    assert password not in "".join(traceback.format_exception(caught.value))


def test_a_missing_database_on_a_server_is_named() -> None:
    server = os.environ.get("MOEPLACE_TEST_POSTGRES")
    if not server:
        pytest.skip("MOEPLACE_TEST_POSTGRES does not name a PostgreSQL database")
    with pytest.raises(mp.StoreError, match="moeplace_no_such_database"):
        Store.open(server.partition("?")[0].rpartition("/")[0] + "/moeplace_no_such_database")


def test_connections_the_server_drops_are_replaced() -> None:
    server = os.environ.get("MOEPLACE_TEST_POSTGRES")
    if not server:
        pytest.skip("MOEPLACE_TEST_POSTGRES does not name a PostgreSQL database")
    import psycopg

    name = f"moeplace_test_{secrets.token_hex(6)}"
    join = "&" if "?" in server else "?"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
        try:
            with Store.open(f"{server}{join}application_name={name}&options=-csearch_path%3D{name}") as store:
                store.add_plan(make_plan(1))
                dropped = connection.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = %s", (name,)
                ).fetchone()
                assert dropped == (1,)
                store.add_plan(make_plan(2))
                assert len(store.plans()) == 2
        finally:
            connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("missing/store.db", "missing: no such folder"),
        ("sqlite:///missing/store.db", "missing: no such folder"),
        (".", "in memory|a folder"),
        ("", "address is empty"),
        (":memory:", "gone with its process"),
        ("sqlite://", "gone with its process"),
        ("sqlite:///store.db?mode=ro", "without options"),
        ("mysql://user:hunter2@host/plans", "'mysql' databases are not supported"),
        ("postgresql://user:hunter2@host", "names no database"),
        ("postgresql://user:hunter2@host:port/plans", "cannot be read"),
        ("://user:hunter2@host/plans", "cannot be read"),
    ],
)
def test_addresses_that_name_no_database_are_refused(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mp.StoreError, match=message) as caught:
        Store.open(address)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    with pytest.raises(mp.StoreError, match="a folder; give a file in it"):
        Store.open(tmp_path)


def test_a_file_of_something_else_is_not_a_database_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database " * 100)
    with pytest.raises(mp.StoreError, match="not an SQLite database; name another file"):
        Store.open(file)
    assert file.read_text() == "not a database " * 100
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    with Store.open(file) as store:
        store.add_plan(make_plan())
    content = bytearray(file.read_bytes())
    content[8192:] = os.urandom(len(content) - 8192)
    file.write_bytes(content)
    with pytest.raises(mp.StoreError, match="damaged; restore a copy"):
        Store.open(file).plans()


@pytest.mark.parametrize("name", ["plain.db", "with blank.db", "100%25.db", "a?b.db", "snow☃.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    with Store.open(tmp_path / name) as store:
        store.add_plan(make_plan())
    assert (tmp_path / name).is_file()


def test_the_environment_names_the_database_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLACE_DB", f"sqlite:///{tmp_path}/elsewhere.db")
    with Store.open() as store:
        assert store.url == f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv("MOEPLACE_DB", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with Store.open() as store:
        assert str(tmp_path) in store.url
    assert len(list(tmp_path.rglob("moeplace.db"))) == 1


def test_a_file_size_limit_in_the_middle_of_a_write_leaves_the_rest_whole(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_FSIZE is not None
    script = f"""{WRITE_UNTIL_FULL}
import resource
Store.open(sys.argv[1]).close()
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
write_until_full(sys.argv[1])
"""
    _check_full(tmp_path / "store.db", run(script, tmp_path / "store.db"), "make room")


def test_a_full_disk_in_the_middle_of_a_write_leaves_the_rest_whole(tmp_path: Path) -> None:
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = f"mount -t tmpfs -o size=4m none {disk}"
    if not shutil.which("unshare") or subprocess.run([*mount, probe], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    script = f"""{WRITE_UNTIL_FULL}
import pathlib, shutil
ballast = pathlib.Path(sys.argv[1]).with_name("ballast")
ballast.write_bytes(bytes(1 << 20))
store, stored = write_until_full(sys.argv[1])
assert len(store.statistics_records()) == stored
ballast.unlink()
add(store, 5000, 200_000)
print(len(store.statistics_records()))
del store
shutil.copy(sys.argv[1], sys.argv[2])
"""
    command = f'{probe} && exec {sys.executable} -c "$SCRIPT" {disk}/store.db {tmp_path}'
    done = subprocess.run(
        [*mount, command], env={**os.environ, "SCRIPT": script}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seed, error, kept = done.stdout.splitlines()
    assert "the disk is full; free some space" in error
    assert int(kept) == int(seed), "all from before the disk was full, and the one after"
    with Store.open(tmp_path / "store.db") as store:
        for record in store.statistics_records():
            assert len(store.statistics_content(record.fingerprint)) == record.content_bytes


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of this system are another matter")
def test_files_and_folders_without_permission_are_told() -> None:
    # Not under tmp_path: its parents are closed to the user this runs as when root runs the tests.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("readable", "closed"):
            (folder / part).mkdir()
            Store.open(folder / part / "store.db").close()
        (folder / "readable" / "store.db").chmod(0o444)
        (folder / "readable").chmod(0o555)
        (folder / "closed").chmod(0o000)
        folder.chmod(0o755)
        script = f"""{WRITE_UNTIL_FULL}
import os
import alembic.command, sqlalchemy.dialects.sqlite.pysqlite
if os.geteuid() == 0:
    os.setuid(65534)
for file in ("readable/store.db", "readable/new.db", "closed/store.db"):
    try:
        model = mp.ModelSpec(layers=1, experts=2, top_k=1, hidden_size=1, ffn_size=1)
        Store.open(sys.argv[1] + "/" + file).add_model(model)
        print("no error")
    except mp.StoreError as error:
        print(error)
"""
        try:
            existing, new, closed = run(script, folder)
        finally:
            (folder / "readable").chmod(0o755)
            (folder / "closed").chmod(0o755)
    assert "may not be written; check the permissions" in existing or "you may read and write in it" in existing
    assert "you may read and write in it" in new
    assert "Permission denied" in closed


def run(script: str, file: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _check_full(file: Path, said: list[str], expected: str) -> None:
    seed, error = said
    assert expected in error
    assert sqlite3.connect(file).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Store.open(file) as store:
        assert {record.name for record in store.statistics_records()} == {f"s{i}" for i in range(1, int(seed))}
        for record in store.statistics_records():
            assert len(store.statistics_content(record.fingerprint)) == 200_000
        store.add_plan(make_plan())
