"""What the processes beside the server do alike."""

from __future__ import annotations


def bound_memory(most: int) -> None:
    """What this process allocates beyond fails at once, should whoever watches it come too late."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
