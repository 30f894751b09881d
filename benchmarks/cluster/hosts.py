"""Hosts that are network namespaces, on links of a set rate: a cluster for torchrun where there is one machine.

A host is a network namespace with one interface, `eth0`, on a bridge that all hosts share. `tc tbf` holds what each
host sends and what it receives to the rate; ranks of one host talk over its loopback device, unlimited.

Everything lives in namespaces of its own (network, processes, mounts) that hang on one process, which ends when a pipe
from this process closes. So nothing is left behind whatever happens to this process, SIGKILL included: the kernel ends
what runs on the hosts and takes the interfaces down. Nothing is made in the machine's own network, names cannot clash,
no packet leaves, and any number of clusters can stand side by side. Without root, a user namespace is made as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

PORT = 29500
"""Of torchrun's rendezvous on the first host: nobody else has ports there."""

_SETUP = r"""
set -e
mount -t tmpfs tmpfs /run
mkdir /run/netns
cp /etc/hosts /run/hosts
ip link set lo up
ip link add bridge0 type bridge
ip link set bridge0 mtu 9000 up
i=0
while [ $i -lt "$1" ]; do
    ip netns add host$i
    ip link add port$i mtu 9000 type veth peer name eth0 mtu 9000 netns host$i
    ip link set port$i master bridge0 up
    ip -n host$i link set lo up
    ip -n host$i link set eth0 up
    ip -n host$i address add "10.77.0.$((i + 1))/24" dev eth0
    printf "%s\n" "10.77.0.$((i + 1)) host$i" "::ffff:10.77.0.$((i + 1)) host$i" >> /run/hosts
    # As on the fabrics that are stood in for: a link that was idle is not found out anew.
    nsenter --net=/run/netns/host$i sh -c 'echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle' 2> /dev/null || true
    tc qdisc add dev port$i root tbf rate "$2" burst 32kb limit 16mb
    tc -n host$i qdisc add dev eth0 root tbf rate "$2" burst 32kb limit 16mb
    i=$((i + 1))
done
mount --bind /run/hosts /etc/hosts
echo ready
"""


class NamespacesUnavailableError(RuntimeError):
    """This machine does not let this user make network namespaces; the message says what failed."""


class HostError(RuntimeError):
    """A host's command ended with an error, or all ran past their time."""


@dataclass
class Cluster:
    """A context: hosts that exist inside the block.

    hosts: how many. ranks: torchrun's processes on each. rate: of a host's link to the others, each way, as `tc` takes
    it.

    Raises, on entry:
        NamespacesUnavailableError: `ip`, `tc`, `unshare` or the kernel's leave is missing.
        ValueError: numbers below 1, or a rate that is none.
    """

    hosts: int
    ranks: int = 1
    rate: str = "200mbit"
    _keeper: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _enter: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (1 <= self.hosts <= 250 and self.ranks >= 1):
            raise ValueError(
                f"{self.hosts} hosts of {self.ranks} ranks asked for, expected 1 to 250 hosts of 1 or more"
            )
        if not re.fullmatch(r"\d+(\.\d+)?[kmgt]?bit", self.rate):
            raise ValueError(f"rate {self.rate!r} is none; expected bits a second as tc writes them, such as 200mbit")

    def __enter__(self) -> Cluster:
        missing = [tool for tool in ("unshare", "nsenter", "ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise NamespacesUnavailableError(f"{', '.join(missing)} not found; install iproute2 and util-linux")
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        # The keeper is process 1 of its namespace: when it ends, the kernel ends all others there.
        hold = 'sh -c "$0" setup "$@" && exec cat'
        command = ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        self._keeper = subprocess.Popen(
            [*command, hold, _SETUP, str(self.hosts), self.rate],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "ready\n":
            assert self._keeper.stderr is not None
            said = " ".join(self._keeper.stderr.read().split())
            self.close()
            raise NamespacesUnavailableError(f"network namespaces cannot be made here: {said or 'no reason was given'}")
        keeper = self._keeper.pid
        credentials = ["--user", "--preserve-credentials"] if user else []
        self._enter = ["nsenter", "--target", str(keeper), *credentials, "--mount"]
        self._enter += [f"--pid=/proc/{keeper}/ns/pid_for_children", "nsenter"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all that runs on the hosts, and the hosts."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        for pipe in (keeper.stdin, keeper.stdout, keeper.stderr):
            assert pipe is not None
            pipe.close()
        try:
            keeper.wait(timeout=30)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def start(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host; its output goes where this process's goes, or into `stdout`."""
        if self._keeper is None:
            raise RuntimeError("the cluster is not up: use it in a with block")
        return subprocess.Popen(
            # Entering a mount namespace leads to its root folder.
            [*self._enter, f"--net=/run/netns/host{host}", "env", "-C", os.getcwd(), *command],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
        )

    def torchrun(
        self,
        *script: str,
        env: Mapping[str, str] | None = None,
        seconds: float | None = None,
        stdout: IO[Any] | None = None,
    ) -> None:
        """Runs a Python script (or `-m module`) with its arguments under torchrun on all hosts, on Gloo.

        env: more environment. seconds: the longest that it may take. stdout: a file for what ranks print.

        Raises:
            HostError: a host's torchrun ended with an error (the others are ended), or the time was up.
        """
        gloo = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **(env or {})}
        every = [self.start(host, [*self._launcher(host), *script], gloo, stdout) for host in range(self.hosts)]
        try:
            self._follow(dict(enumerate(every)), seconds)
        except BaseException:
            self.close()
            for process in every:
                process.wait()
            raise

    @staticmethod
    def _follow(running: dict[int, subprocess.Popen[bytes]], seconds: float | None) -> None:
        """Waits until all have ended well."""
        ends = None if seconds is None else time.monotonic() + seconds
        while running:
            for host, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[host]
                if process.returncode:
                    raise HostError(f"torchrun on host {host} ended with {process.returncode}; all hosts were ended")
            if ends is not None and time.monotonic() > ends:
                raise HostError(f"hosts {sorted(running)} had not ended after {seconds:.0f} s; all were ended")
            time.sleep(0.05)

    def _launcher(self, host: int) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nnodes", str(self.hosts), "--node-rank", str(host), "--nproc-per-node", str(self.ranks)]
        torchrun += ["--master-addr", self.address(0), "--master-port", str(PORT)]
        return [*torchrun, "--local-addr", self.address(host)]
