"""An environment as a user makes it: a wheel of this tree, what it requires with some extras, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> Path:
    """The wheel of this tree."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return next(folder.glob("moeplace-*.whl"))


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment with the wheel in it. Requirements are links to what is installed here."""

    folder: Path
    wheel: Path

    @classmethod
    def made(cls, folder: Path, wheel: Path, extras: Iterable[str]) -> CleanEnvironment:
        """A new one, with what the extras bring."""
        made = cls(folder, wheel)
        venv.create(folder, with_pip=False)
        python = str(made.bin / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, str(wheel)], check=True, timeout=250)
        made._take_kernels()
        made.add(extras)
        return made

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def packages(self) -> Path:
        (found,) = (self.folder / "lib").glob("python*/site-packages")
        return found

    def add(self, extras: Iterable[str]) -> None:
        """Installs what the wheel requires with these extras."""
        (installed,) = metadata.distributions(name="moeplace", path=[str(self.packages)])
        self._link(installed.requires or (), list(extras))

    def variables(self, home: Path) -> dict[str, str]:
        """A user's environment variables, with a home of its own: none is set by whoever runs the tests.

        One thread for torch: two that wait for each other and for other tests take five times as long.
        """
        return {
            "PATH": os.pathsep.join([str(self.bin), "/usr/local/bin", "/usr/bin", "/bin"]),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
        }

    def _take_kernels(self) -> None:
        """What this tree has compiled by now serves the same sources there; compiling takes minutes."""
        for source in (self.packages / "moeplace").rglob("*.py"):
            here = ROOT / source.relative_to(self.packages / "moeplace")
            # Kernels belong to a source of this size and moment.
            os.utime(source, ns=(here.stat().st_atime_ns, here.stat().st_mtime_ns))
            for kernel in (here.parent / "__pycache__").glob(f"{here.stem}.*.nb[ci]"):
                shutil.copy2(kernel, source.parent / "__pycache__")

    def _link(self, requirements: Iterable[str], extras: list[str]) -> None:
        for requirement in map(Requirement, requirements):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            if requirement.name == "moeplace":
                self.add(requirement.extras)
                continue
            found = metadata.distribution(requirement.name)
            fits = requirement.specifier.contains(found.version, prereleases=True)
            assert fits, f"{requirement} is not {found.version}"
            tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            new = [top for top in tops if not (self.packages / top).exists()]
            for top in new:
                (self.packages / top).symlink_to(found.locate_file(top))
            if new or requirement.extras:
                self._link(found.requires or (), list(requirement.extras))
