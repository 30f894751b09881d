"""Runs a script under torchrun on hosts that are network namespaces of this machine, on Gloo, over links of a set rate.

    python benchmarks/cluster/run.py --hosts 2 --ranks 2 --rate 200mbit -- script.py --its-own arguments
    python benchmarks/cluster/run.py --hosts 4 --ranks 1 -- -m package.module

Needs Linux, iproute2 and util-linux; root, or the right to make user namespaces. Nothing is left behind, however it
ends. Exit status: 0; 1 when a host's torchrun failed or time was up; 3 where namespaces are not allowed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType

from hosts import Cluster, HostError, NamespacesUnavailableError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="processes a host")
    parser.add_argument("--rate", default="200mbit", help="of each host's link, each way, as tc takes it")
    parser.add_argument("--seconds", type=float, help="longest that the script may take")
    parser.add_argument("script", nargs="+", help="after --: a Python script, or -m module, and its arguments")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _ended)
    try:
        with Cluster(arguments.hosts, arguments.ranks, arguments.rate) as cluster:
            cluster.torchrun(*arguments.script, seconds=arguments.seconds)
    except NamespacesUnavailableError as error:
        print(error, file=sys.stderr)
        return 3
    except (HostError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _ended(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
