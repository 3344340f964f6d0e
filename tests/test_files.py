"""Files and folders are written whole or not at all, and what was changed in them is noticed."""

from pathlib import Path
from typing import Any

import pytest

from sft import UserError
from sft.files import altered, checksums, damage, read_json, seal, sealed, sizes, whole_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.json"
    write_text(file, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "begun, then half a character: \ud800")
    assert (file.read_text(), names(tmp_path)) == ("first", ["scores.json"])

    def half(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as stream:
            stream.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)  # as where the process is stopped in the middle
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "second")
    assert (file.read_text(), names(tmp_path)) == ("first", ["scores.json"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_folder_keeps_what_it_held_until_the_new_one_is_whole(tmp_path: Path, stop: type[BaseException]) -> None:
    folder = tmp_path / "adapter"
    with whole_folder(folder) as part:
        (part / "weights").write_text("first")
        assert not folder.exists(), "it has its name once all is written"

    def interrupted() -> None:
        with whole_folder(folder) as part:
            (part / "weights").write_text("second")
            assert (folder / "weights").read_text() == "first"
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert ((folder / "weights").read_text(), names(tmp_path)) == ("first", ["adapter"])
    with whole_folder(folder) as part:
        (part / "other").write_text("third")
    assert names(folder) == ["other"], "nothing of the old folder is left among the new"


def test_what_was_changed_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "weights").write_text("weights")
    (tmp_path / "config").write_text("config")
    size, sums = sizes(tmp_path), checksums(tmp_path)
    assert damage(tmp_path, size) is altered(tmp_path, sums) is None
    (tmp_path / "below" / "weights").write_text("weightz")
    assert damage(tmp_path, size) is None, "of the same size"
    assert altered(tmp_path, sums) == "below/weights"
    (tmp_path / "below" / "weights").write_text("weight")
    assert damage(tmp_path, size) == "below/weights"
    (tmp_path / "config").unlink()
    assert damage(tmp_path, {"config": 6}) == altered(tmp_path, {"config": sums["config"]}) == "config"


def test_a_folder_is_kept_only_for_what_it_was_made_of_and_only_whole(tmp_path: Path) -> None:
    assert not sealed(tmp_path, {"rows": "a"})
    (tmp_path / "scores").write_text("1")
    seal(tmp_path, {"rows": "a"})
    assert sealed(tmp_path, {"rows": "a"})
    assert not sealed(tmp_path, {"rows": "b"})
    (tmp_path / "scores").write_text("2")
    assert not sealed(tmp_path, {"rows": "a"})


def test_json_that_is_missing_or_damaged_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: missing; run the stage before this one"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"rows": ')
    with pytest.raises(UserError, match=r"half\.json: damaged .*; delete it and run its stage again"):
        read_json(tmp_path / "half.json")
