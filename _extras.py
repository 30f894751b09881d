"""Which extra of this package brings a library that is not installed."""

from __future__ import annotations

EXTRAS = {
    **dict.fromkeys(("scipy", "pyarrow", "pulp", "highspy", "ortools", "ijson", "joblib", "numba"), "solve"),
    **dict.fromkeys(("sqlalchemy", "alembic", "platformdirs", "yaml", "jinja2", "urllib3"), "solve"),
    **dict.fromkeys(("typer", "rich"), "solve"),
    "torch": "torch",
    "transformers": "torch",
    "safetensors": "torch",
    "psycopg": "postgres",
    "ray": "ray",
    "resvg_py": "plot",
    "PIL": "plot",
    "fsspec": "traces",
    "s3fs": "traces",
    "fastapi": "service",
    "starlette": "service",
    "uvicorn": "service",
    "prometheus_client": "service",
    "standardwebhooks": "service",
}


def missing_libraries() -> dict[str, list[str]]:
    """Of each extra, its libraries that are not installed."""
    from importlib.util import find_spec

    missing: dict[str, list[str]] = {extra: [] for extra in EXTRAS.values()}
    for library, extra in EXTRAS.items():
        if find_spec(library) is None:
            missing[extra].append(library)
    return missing


def extra_in_words(extra: str, missing: list[str]) -> str:
    """Whether it is installed, else what to install."""
    return f"{', '.join(missing)} not installed: pip install 'moeplace[{extra}]'" if missing else "installed"


def missing_extra(error: ImportError) -> str | None:
    """What to install, in a sentence, where `error` is of a library that an extra brings; else None."""
    library = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(library)
    return None if extra is None else f"this needs {library}, which is not installed: pip install 'moeplace[{extra}]'"
