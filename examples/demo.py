"""The main job on recorded routing of a small OLMoE-style model: look, compare, solve, judge, export, report.

    python examples/demo.py --out demo

Every step is a `moeplace` command, printed before it runs. The trace was recorded by examples/train_moe.py; its expert
sizes are replaced by those of OLMoE-1B-7B, so that predicted times are those of a model people run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

TRACE = Path(__file__).resolve().parent / "data" / "olmoe_small"
CLUSTER = "--topology a100-pcie --nodes 2 --devices-per-node 4"
MODEL = "--hidden-size 2048 --ffn-size 1024"


def run(command: str, out: Path) -> None:
    """Runs one moeplace command as a user would type it."""
    print(f"\n$ moeplace {command}", flush=True)
    environment = os.environ | {"MOEPLACE_DB": f"sqlite:///{out / 'moeplace.db'}"}
    done = subprocess.run([sys.executable, "-m", "moeplace.cli", *shlex.split(command)], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for plans and the report")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    trace = shlex.quote(str(TRACE))
    plan, report = shlex.quote(str(out / "plan.json")), shlex.quote(str(out / "report.html"))
    placed = shlex.quote(str(out / "init_expert_location.json"))
    run(f"stats {trace}", out)
    run(
        f"report {trace} {CLUSTER} {MODEL} --decode 512 --solvers contiguous,eplb,exflow,moetuner,search "
        f"--seconds 10 -o {report}",
        out,
    )
    run(f"solve {trace} {CLUSTER} {MODEL} --decode 512 --solver search --seconds 10 -o {plan}", out)
    run(f"evaluate {plan} {trace} --decode 512", out)
    run(f"export {plan} --for sglang -o {placed}", out)
    print(f"\n{time.monotonic() - started:.0f} s. Open {out / 'report.html'} in a browser.")


if __name__ == "__main__":
    main()
