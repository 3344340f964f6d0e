"""Breaks promises on purpose, one at a time, in a copy of the tree, and says which the tests did not notice.

    python tests/mutants.py             all of tests/promises.py, some ten minutes on two cores
    python tests/mutants.py split seam  those that have one of these words in their sentence or file

Ends with status 1 where a promise was broken and no test failed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from promises import PROMISES, Promise

ROOT = Path(__file__).parents[1]
LONGEST_RUN = 300
"""Seconds after which tests of broken code are taken to hang, which is noticed too."""
TESTS_FAILED, ALL_PASSED = 1, 0
"""Exit statuses of pytest; others mean that the tests could not be run."""


class Outcome(NamedTuple):
    """What became of a broken promise."""

    noticed: bool
    how: str


def main(words: Sequence[str]) -> int:
    wanted = [p for p in PROMISES if not words or any(word in f"{p.said} {p.file}" for word in words)]
    unnoticed = 0
    with copy_of(ROOT) as tree:
        whole = pytest(tree, sorted({test for promise in wanted for test in promise.tests}))
        if whole.returncode != ALL_PASSED:
            print(f"{whole.stdout}\nthe tests fail before anything is broken; mend them first")
            return 2
        for promise in wanted:
            started = time.monotonic()
            noticed, how = broken(tree, promise)
            unnoticed += not noticed
            print(f"{how:>8}  {time.monotonic() - started:4.0f} s  {promise.file}: {promise.said}", flush=True)
    print(f"{len(wanted) - unnoticed} of {len(wanted)} broken promises were noticed")
    return 1 if unnoticed else 0


def broken(tree: Path, promise: Promise) -> Outcome:
    """Break a promise in the tree, run its tests, and mend it."""
    with edited(tree, promise):
        try:
            done = pytest(tree, ["-x", *promise.tests])
        except subprocess.TimeoutExpired:
            return Outcome(True, "hangs")
    if done.returncode == TESTS_FAILED:
        return Outcome(True, "noticed")
    if done.returncode != ALL_PASSED:
        return Outcome(False, "NOT RUN")
    return Outcome(False, "SURVIVED" if " passed" in done.stdout else "SKIPPED")


@contextmanager
def edited(tree: Path, promise: Promise) -> Iterator[None]:
    """Within, the edit stands in the file. Refuses a text that does not stand there exactly once."""
    file = tree / promise.file
    text = file.read_text(encoding="utf-8")
    if (count := text.count(promise.old)) != 1:
        raise SystemExit(f"{promise.file}: {promise.old!r} stands there {count} times; mend it in tests/promises.py")
    try:
        file.write_text(text.replace(promise.old, promise.new), encoding="utf-8")
        yield
    finally:
        file.write_text(text, encoding="utf-8")


@contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """A copy of the files that git knows, or would take, as they are now: nobody works in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, Path(folder) / name)
        yield Path(folder)


def pytest(tree: Path, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run tests of the tree on the code of the tree. No compiled code is kept, which could be that of the last edit;
    and on models so small a second thread costs more than it brings."""
    places = [argument if argument.startswith("-") else f"tests/{argument}" for argument in arguments]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *places]
    own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    timeout = LONGEST_RUN if "-x" in arguments else None
    return subprocess.run(command, cwd=tree, env=os.environ | own, capture_output=True, text=True, timeout=timeout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
