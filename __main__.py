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
    from ._lazy import missing_extra

    try:
        from .cli.app import main as run
    except ImportError as error:
        reason = missing_extra(error)
        if reason is None:
            raise
        said = _of_the_core(sys.argv[1:])
        if said:
            print(said)  # noqa: T201
            return
        sys.exit(f"error: {reason}")
    run()


def _of_the_core(arguments: list[str]) -> str | None:
    """Which version is here, and of the doctor what is missing; None where the command line's libraries are needed."""
    from ._lazy import extra_in_words, missing_libraries
    from .placement.version import __version__

    if arguments not in (["--version"], ["doctor"]):
        return None
    lines = [f"moeplace {__version__}"]
    if arguments == ["doctor"]:
        lines[0] += f", Python {sys.version.split()[0]}: the core, which reads and exports plans in Python"
        lines += [f"extra {extra}: {extra_in_words(extra, missing)}" for extra, missing in missing_libraries().items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
