"""axe-core in a browser that Selenium drives."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

RELEASE = "axe-core@4.14.1"
RUN = """
const [rules, done] = arguments;
const which = rules.length ? {type: 'rule', values: rules} : {type: 'tag', values: ['wcag2a', 'wcag2aa', 'wcag21a',
    'wcag21aa', 'wcag22aa', 'best-practice']};
axe.run(document, {runOnly: which, resultTypes: ['violations']}).then(
    found => done(found.violations.map(v => [v.id, v.help, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200) + ' ' +
        (n.any[0]?.message ?? n.all[0]?.message ?? ''))])),
    error => done([['axe', String(error), []]]));
"""


@functools.cache
def source() -> str:
    """The script: of the file that MOEPLACE_TEST_AXE names, or from npm's registry."""
    named = os.environ.get("MOEPLACE_TEST_AXE")
    if named:
        return Path(named).read_text(encoding="utf-8")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("MOEPLACE_TEST_AXE names no axe.min.js, and there is no npm to get it with")
    with tempfile.TemporaryDirectory() as folder:
        asked = [npm, "pack", "--silent", RELEASE]
        try:
            done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm's registry did not answer for {RELEASE}")
        if done.returncode:
            pytest.skip(f"npm's registry has no {RELEASE} for us: {done.stderr.strip()[:200]}")
        with tarfile.open(Path(folder) / done.stdout.strip().splitlines()[-1]) as archive:
            script = archive.extractfile("package/axe.min.js")
            assert script is not None
            return script.read().decode()


def violations(browser: Any, rules: Sequence[str] = ()) -> list[Any]:
    """What axe-core finds wrong with the page at hand: by all of WCAG 2.2 A and AA and its best practices, or by these
    rules alone."""
    browser.execute_script(source())
    return list(browser.execute_async_script(RUN, list(rules)))
