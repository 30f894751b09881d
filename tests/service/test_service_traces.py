"""Uploaded traces outside the database: in a folder, and on a server that speaks S3."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
pytest.importorskip("fsspec", reason="fsspec is an extra")
import fsspec
from cli_runs import run
from service_runs import MODEL, prepared, serving
from traces import make_trace

from moeplace.db import Store
from moeplace.placement.errors import InputError, StoreError, UnsupportedError
from moeplace.profiler.aggregate import aggregate
from moeplace.profiler.trace_files import write_trace
from moeplace.service.app import apply_retention
from moeplace.service.shards import Shards, read, remove

pytestmark = pytest.mark.slow


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty place of each kind."""
    if request.param == "folder":
        yield str(tmp_path / "traces")
        return
    pytest.importorskip("s3fs", reason="s3fs is an extra")
    server = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("routing")
    try:
        yield "s3://routing/traces"
    finally:
        running.stop()
        fsspec.filesystem("s3").clear_instance_cache()


def shard(folder: Path, seed: int) -> Path:
    if not (folder / f"trace{seed}").exists():
        write_trace(make_trace(seed, layers=3, experts=16), folder / f"trace{seed}", model=MODEL)
    return next((folder / f"trace{seed}").glob("*.parquet"))


def listed(place: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    system.invalidate_cache()
    return sorted(name.rpartition("/")[2] for name in system.find(path))


def test_traces_are_solved_on_from_where_they_are_kept(place: str, tmp_path: Path) -> None:
    db = str(tmp_path / "store.db")
    with serving(db, "--traces", place, "--check-windows", "1000") as server, server.client() as client:
        prepared(client, keep_traces=2, step_tokens=32)
        sent = [client.upload_trace("chat", shard(tmp_path, seed)) for seed in range(3)]
        again = client.upload_trace("chat", shard(tmp_path, 2))
        assert again.key == sent[2].key, "known by content, wherever it is"
        assert listed(place) == [f"{entry.key:08}-{entry.sha256}.parquet" for entry in sent]
        with sqlite3.connect(db) as connection:
            assert connection.execute("SELECT count(*) FROM upload_parts").fetchone() == (0,)
        found = client.wait(client.solve("chat", routing="tokens", solver="eplb"), timeout=120).result
        assert found is not None
        plan = client.plan(found["plan"])
        expected = aggregate(tmp_path / "trace1", workers=1)
        assert plan.provenance.trace_fingerprint == expected.fingerprint, "of the two kept, the newest is held out"
        assert client.wait(client.decide("chat", found["plan"], routing="tokens", record=False)).result is not None
        assert server.stop() == 0
    with Store.open(db) as store:
        apply_retention(store, keep_days=90.0)
    assert listed(place) == [f"{entry.key:08}-{entry.sha256}.parquet" for entry in sent[1:]], "the newest two are kept"
    damage(place, f"{sent[1].key:08}-{sent[1].sha256}.parquet")
    with serving(db, "--check-windows", "1000", "--lease", "2") as server, server.client() as client:
        job = client.solve("chat", routing="tokens", solver="eplb")
        server.wait_for("job given back", job=job.key)
        assert client.cancel(job.key).state == "cancelled", "damage is not solved on"


def damage(place: str, name: str) -> None:
    system, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    content = system.cat_file(f"{path}/{name}")
    system.pipe_file(f"{path}/{name}", content[:-1] + bytes([content[-1] ^ 1]))


def test_a_shard_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(str(tmp_path / "here"))
    kept = shards.put("one", b"content")
    assert shards.put("one", b"content") == kept
    assert (read(kept), listed(shards.url)) == (b"content", ["one.parquet"])
    local = type(fsspec.filesystem("file"))

    def torn(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local, "mv", torn)
    with pytest.raises(StoreError, match="No space left"):
        shards.put("two", b"content")
    assert listed(shards.url) == ["one.parquet"]
    remove([kept, kept])
    assert listed(shards.url) == []
    memory = Shards(f"memory://{uuid.uuid4()}")
    memory.check()
    assert listed(memory.url) == []


def test_a_place_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused = run("serve", "--db", tmp_path / "x.db", "--traces", tmp_path / "file" / "below", "--port", 0)
    assert refused.code == 1
    assert "traces at" in refused.err
    with pytest.raises(InputError, match="password"):
        Shards("ftp://ann:secret@host/traces")
    with pytest.raises(UnsupportedError, match="Protocol not known: nothing"):
        Shards("nothing://bucket/x")
