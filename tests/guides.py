"""A guide in docs/ followed to the letter: what it says to write is written, and what it says to run is run."""

import contextlib
import io
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from sft.cli import main


@dataclass
class Followed:
    """What following a guide left behind."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    """Command -> what it said."""
    written: list[str] = field(default_factory=list)
    """Names of files, in the order in which the guide has them written."""


def follow(guide: Path, done: Followed) -> Followed:
    """Write the guide's files and run its commands in the working directory; each command must end with status 0.

    A block of `sh` is commands; any other is the file that the line before it names last.
    """
    text = guide.read_text("utf-8")
    for before, language, block in re.findall(r"([^\n]*)\n\n```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language != "sh":
            name = re.search(r"`([^`]+)`:$", before)
            assert name, f"what file is this? {before}"
            Path(name[1]).parent.mkdir(exist_ok=True)
            Path(name[1]).write_text(block, "utf-8")
            done.written.append(name[1])
            continue
        for command in block.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "sft"
            status, done.said[command] = said(*arguments)
            assert status == 0, f"{command}\n{done.said[command]}"
    return done


def said(*arguments: str) -> tuple[int, str]:
    """Exit status of a command, and all that it says."""
    with io.StringIO() as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        return main(arguments), text.getvalue()
