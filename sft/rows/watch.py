"""Which files are read while a user's code runs: what that code makes follows from them, and not from one file's text.

Python itself says of every file that is opened and every folder that is listed (an audit hook, PEP 578). What C or Rust
code opens by itself is not seen; `sft.tokens.prepare` therefore also compares the first rows with what they were.
"""

import hashlib
import importlib.util
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from inspect import isgenerator
from pathlib import Path
from typing import Any

Files = Mapping[str, str | None]
"""Name of a file -> SHA-256 of what it holds; of a folder, of the names in it. None where it does not exist."""


class _Active(threading.local):
    """The watches that are on in a thread."""

    watches: "tuple[Watch, ...]" = ()


_active = _Active()


class Watch:
    """The files that were read in a thread while it was on."""

    def __init__(self) -> None:
        self.places: dict[str, None] = {}
        _install()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within, what is read is noted."""
        others = _active.watches
        _active.watches = (*others, self)
        try:
            yield
        finally:
            _active.watches = others

    def during(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched whenever it is called; what it yields is made there and then."""

        @wraps(function)
        def watched(*arguments: Any) -> Any:
            others = _active.watches  # written out, as it happens several times a row
            _active.watches = (*others, self)
            try:
                result = function(*arguments)
                return list(result) if isgenerator(result) else result
            finally:
                _active.watches = others

        return watched

    def files(self, home: Path) -> dict[str, str | None]:
        """What was read, as it is now; what lies below `home` is named from there, so that it may move with it."""
        home = home.resolve()
        names = {str(path.relative_to(home)) if (path := Path(place)).is_relative_to(home) else place: place
                 for place in self.places}  # fmt: skip
        return {name: content_of(names[name]) for name in sorted(names)}


def unchanged(files: Files, home: Path) -> bool:
    """Whether all of these files hold what they held; names that are not whole paths start at `home`."""
    return all(content_of(home / name) == held for name, held in files.items())


def content_of(place: str | Path) -> str | None:
    """The SHA-256 of a file, or of the names in a folder; None where there is neither."""
    try:
        if os.path.isdir(place):
            return hashlib.sha256("\0".join(sorted(os.listdir(place))).encode()).hexdigest()
        with open(place, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


@cache
def _install() -> None:
    """Add the hook, once a process: Python has none that can be taken away again."""
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("open", "os.listdir", "os.scandir") or not (watches := _active.watches):
        return
    _active.watches = ()  # what follows opens nothing, but asks where paths lead
    try:
        place = _read_from(event, *arguments)
        for watch in watches if place is not None else ():
            watch.places[str(place)] = None
    finally:
        _active.watches = watches


def _read_from(event: str, path: Any, *how: Any) -> str | None:
    """The whole path of what is read, or None for what is written, is not a file of the user's, or has no name."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None  # a file that was opened before, by its number
    if event == "open" and (set(str(how[0] or "")) & set("wax+") or (how[0] is None and how[1] & os.O_ACCMODE)):
        return None
    place = os.path.realpath(os.fsdecode(path))
    if place.endswith(".pyc"):
        place = _source(place)
    if event != "open" and place in map(os.path.realpath, sys.path):
        return None  # the search for a module lists these
    return None if is_library(place) else place


def _source(compiled: str) -> str:
    try:
        return importlib.util.source_from_cache(compiled)
    except (NotImplementedError, ValueError):
        return compiled


def is_library(place: str) -> bool:
    """Whether a whole path is of Python, an installed package or this project, whose versions a run names apart."""
    return place.startswith(_libraries())


@cache
def _libraries() -> tuple[str, ...]:
    """The folders of all these, and those whose entries are not files."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), "/proc", "/sys", "/dev"]
    ours = [str(Path(__file__).parents[1])]
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in (*folders, *ours))
