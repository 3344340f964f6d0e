"""Files and folders written whole or not at all: under a temporary name first, then renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk or a share of it is full, or a file may not grow so large."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which gets its name once all is written, and goes away where that fails."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; make room for it") from error
        raise


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(file, json.dumps(value, ensure_ascii=False, indent=1))


def read_json(file: Path) -> Any:
    """Read JSON. Raises UserError for a file that is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; run the stage before this one") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run its stage again") from None


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and what lies below it, with their sizes in bytes."""
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def damage(folder: Path, written: dict[str, int]) -> str | None:
    """The first file that is missing or has another size than it was written with, or None."""
    here = sizes(folder)
    return next((name for name, size in written.items() if here.get(name) != size), None)


def checksums(folder: Path) -> dict[str, str]:
    """The same files with the SHA-256 of what they hold."""
    return {name: _sha256(folder / name) for name in sizes(folder)}


def altered(folder: Path, written: dict[str, str]) -> str | None:
    """The first file that is missing or holds something else than was written, or None. Reads every byte."""
    return next((n for n, sum in written.items() if not (folder / n).is_file() or _sha256(folder / n) != sum), None)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path, made_of: Any) -> None:
    """Write `files.json`, the last file of a folder: what it was made of, and the sizes and checksums of the others."""
    write_json(folder / "files.json", {"made_of": made_of, "files": sizes(folder), "sha256": checksums(folder)})


def sealed(folder: Path, made_of: Any) -> bool:
    """Whether the folder holds, whole, what is made of this. Raises UserError where it holds something else than ours,
    which is not replaced."""
    if not (folder / "files.json").is_file():
        if (folder / "made_of.json").is_file():
            return False  # of an earlier version
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already and was not written by sft; move it away, or name another one")
        return False
    before = read_json(folder / "files.json")
    if not isinstance(before, dict) or not {"made_of", "sha256"} <= before.keys():
        raise UserError(f"{folder}: holds a files.json that sft did not write; move it away, or name another one")
    return before["made_of"] == json.loads(json.dumps(made_of)) and altered(folder, before["sha256"]) is None
