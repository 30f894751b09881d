"""Records routing from live models, reads what was recorded, and counts it."""

from .aggregate import aggregate
from .profile import profile
from .read import Recording, open_routing, read_any
from .recorders import merge_counts
from .statistics_file import read_statistics, write_statistics
from .trace_files import TraceWriter, read_trace, scan_trace, write_trace

__all__ = [
    "Recording",
    "TraceWriter",
    "aggregate",
    "merge_counts",
    "open_routing",
    "profile",
    "read_any",
    "read_statistics",
    "read_trace",
    "scan_trace",
    "write_statistics",
    "write_trace",
]
