"""Audits the installed dependencies against the advisories of PyPI, with pip-audit.

    python .ci/audit.py

Exits 1 when a dependency has a known vulnerability. Where advisories cannot be reached it says so and exits 0: a build
does not fail because a service elsewhere is away. pip-audit itself passes then, so what it answers is first tried on a
release that is known to be vulnerable.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KNOWN = "jinja2==3.1.2"
"""CVE-2024-22195, among others."""


def audit(*arguments: str, seconds: float) -> dict[str, Any] | None:
    """pip-audit's answer; None where it gave none."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=seconds, check=False)
        answer: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return answer


def findings(answer: dict[str, Any]) -> list[str]:
    """A line for each known vulnerability."""
    return [
        f"{entry['name']} {entry['version']}: {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no release yet'}"
        for entry in answer["dependencies"]
        for vulnerability in entry.get("vulns", [])
    ]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "known.txt"
        known.write_text(KNOWN)
        tried = audit("-r", str(known), "--no-deps", "--disable-pip", seconds=60)
    if tried is None or not findings(tried):
        print(f"NOT AUDITED: PyPI's advisories cannot be reached from here ({KNOWN} was not found vulnerable)")
        return 0
    answer = audit("--skip-editable", seconds=600)
    if answer is None:
        print("NOT AUDITED: PyPI's advisories stopped answering")
        return 0
    vulnerabilities = findings(answer)
    skipped = [entry["name"] for entry in answer["dependencies"] if "skip_reason" in entry]
    print("\n".join(vulnerabilities))
    print(f"{len(answer['dependencies']) - len(skipped)} dependencies audited, {len(vulnerabilities)} vulnerabilities")
    if skipped:
        print(f"not on PyPI, not audited: {', '.join(skipped)}")
    return 1 if vulnerabilities else 0


if __name__ == "__main__":
    sys.exit(main())
