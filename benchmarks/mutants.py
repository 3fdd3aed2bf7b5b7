"""Whether the tests find faults: deliberate ones, one at a time, in copies of the package.

    python -m benchmarks.mutants [--only L1 W3] [--likely]

Each fault of `tests/mutants.json` is a small change to one place in the code, with a sentence on what is wrong then. A
copy runs the tests that are likely to see it, until one fails; where none does, all other tests of `make test`
(`--likely` leaves those out). Writes `benchmarks/results/mutants.json` after each fault and leaves out those that are
in it already. A fault whose place is gone is an error: find its new place, or another fault of the kind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .turns import RESULTS

ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "tests" / "mutants.json"
RESULT = RESULTS / "mutants.json"
_COPIED = ("sgl_diffusion_accel", "tests", "benchmarks", "miniatures", "examples", "docs")
# They look at text, not at behaviour.
_TEXT = ("test_house.py", "test_public.py", "test_documents.py", "test_layout.py", "test_benchmarks.py")


@dataclass(frozen=True)
class Fault:
    """A deliberate fault.

    Attributes:
        id: Its name, a letter for the area and a number.
        area: Part of the library.
        what: What is wrong then.
        old: Code that stands once in the package.
        new: What takes its place.
        likely: Tests that should see it: names of files, with `::` and a regular expression for some of their tests.
    """

    id: str
    area: str
    what: str
    old: str
    new: str
    likely: list[str]

    def place(self, root: Path) -> Path:
        """The file that it is in.

        Raises:
            LookupError: Its code stands nowhere, or more than once.
        """
        found = [path for path in sorted((root / "sgl_diffusion_accel").rglob("*.py")) if self.old in path.read_text()]
        if len(found) != 1 or found[0].read_text().count(self.old) != 1:
            raise LookupError(
                f"{self.id}: its code stands in {len(found)} files, once in one is expected: {self.old!r}"
            )
        return found[0]


def faults() -> list[Fault]:
    """All faults."""
    return [Fault(**each) for each in json.loads(FAULTS.read_text())]


def make_copy(to: Path) -> None:
    """Copies what the tests need."""
    for name in _COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "out"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, to)


def failing(root: Path, arguments: list[str]) -> str | None:
    """The first test that fails, None where all pass."""
    settings = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *arguments]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode in (0, 5):  # 5: no test was chosen
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else f"pytest ended with {done.returncode}"


def judge(fault: Fault, root: Path, is_likely_only: bool) -> dict[str, Any]:
    """Puts a fault into a copy and runs the tests."""
    place, began = fault.place(root), time.monotonic()
    sound = place.read_text()
    place.write_text(sound.replace(fault.old, fault.new))
    try:
        test = None
        for likely in fault.likely:
            name, _, pattern = likely.partition("::")
            chosen = ["-k", pattern.replace("|", " or ")] if pattern else []
            if (root / "tests" / name).exists():
                test = test or failing(root, [f"tests/{name}", *chosen])
        if test is None and not is_likely_only:
            test = failing(root, ["-n", "auto", *(f"--ignore=tests/{name}" for name in _TEXT)])
    finally:
        place.write_text(sound)
    return {"id": fault.id, "what": fault.what, "test": test, "seconds": round(time.monotonic() - began)}


def main() -> None:
    """Runs the faults that are not in the file yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="ids of some faults, which are run again")
    parser.add_argument("--likely", action="store_true", help="run the likely tests alone")
    options = parser.parse_args()
    done = {each["id"]: each for each in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    wanted = [each for each in faults() if (each.id in options.only if options.only else each.id not in done)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_copy(root)
        for fault in wanted:
            found = done[fault.id] = judge(fault, root, options.likely)
            print(f"{fault.id:3s} {found['seconds']:4d} s  {found['test'] or 'NOT FOUND'}  ({fault.what})", flush=True)
            RESULT.write_text(json.dumps([done[key] for key in sorted(done)], indent=1) + "\n")
    print(f"{sum(each['test'] is not None for each in done.values())} of {len(done)} faults found")


if __name__ == "__main__":
    main()
