"""`python -m moeplace` is the same program as `moeplace`; torchrun takes it as `-m moeplace`."""

from __future__ import annotations

import sys

from . import _interrupts


def main() -> None:
    """The program; without the command line's libraries, what to install."""
    _interrupts.listen()
    try:
        _run()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)  # noqa: T201
        sys.exit(_interrupts.INTERRUPTED)
    finally:
        _interrupts.deafen()


def _run() -> None:
    from ._extras import missing_extra

    try:
        from .cli.app import main as run
    except ImportError as error:
        reason = missing_extra(error)
        if reason is None:
            raise
        sys.exit(f"error: {reason}")
    run()


if __name__ == "__main__":
    main()
