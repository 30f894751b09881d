"""Databases of earlier tables: brought up to these with all they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import NullPool, create_engine, text

import moeplace as mp
from moeplace.db import Store
from moeplace.db.database import MIGRATIONS
from moeplace.db.records import Actor
from moeplace.db.schema import REVISION

ANN = Actor("ann", "approve")
CONTENT = b"content"


def test_uploads_and_deployments_of_earlier_tables_are_kept(url: str) -> None:
    address = url.replace("postgresql://", "postgresql+psycopg://") if "://" in url else f"sqlite:///{url}"
    with Store.open(url) as store:
        store.add_model(mp.ModelSpec(layers=1, experts=4, top_k=1, hidden_size=8, ffn_size=8, name="small"))
        store.add_topology(mp.Topology.preset("h100-hgx", devices_per_node=2), name="box")
        store.deployments.add("chat", "small", "box", {"solver": "eplb"}, ANN)
        upload = store.uploads.begin("trace", "chat", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
        store.uploads.append(upload.key, 0, CONTENT)
        store.uploads.finish(upload.key, lambda content: {"tokens": len(content)})
    config = Config()
    config.set_main_option("script_location", str(Path(MIGRATIONS)))
    engine = create_engine(address, poolclass=NullPool)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0002")
        assert connection.execute(text("SELECT version_num FROM moeplace_revision")).scalar_one() == "0002"
    with Store.open(url) as store:
        assert store.describe().revision == REVISION
        assert store.deployments.get("chat").policy == {"solver": "eplb"}
        assert (store.uploads.content(upload.key), store.uploads.place(upload.key)) == (CONTENT, None)
        made = store.engines.set("chat", ANN, url="http://engine:1", recorder="a", every=2.0, span=1.0, secret=None)
        assert store.engines.get("chat") == made
