"""The table of broken promises fits the code as it is now, and what breaks them mends it again, whatever happens."""

from pathlib import Path

import pytest
from mutants import ROOT, edited
from promises import PROMISES, Promise


def test_every_promise_can_be_broken_and_names_tests_that_there_are() -> None:
    assert len(PROMISES) >= 32
    for promise in PROMISES:
        count = (ROOT / promise.file).read_text("utf-8").count(promise.old)
        assert count == 1, f"{promise.file}: {promise.old!r} stands there {count} times; mend it in tests/promises.py"
        assert promise.tests
        for test in promise.tests:
            file, _, function = test.partition("::")
            code = (ROOT / "tests" / file).read_text("utf-8")
            assert f"def {function.partition('[')[0]}(" in code or not function, test


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_broken_file_is_mended_whatever_happens(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "sum.py").write_text("total = a + b\n")

    def broken() -> None:
        with edited(tmp_path, Promise("sums", "sum.py", "a + b", "a - b", ())):
            assert (tmp_path / "sum.py").read_text() == "total = a - b\n"
            raise stop

    with pytest.raises(stop):
        broken()
    assert (tmp_path / "sum.py").read_text() == "total = a + b\n"


@pytest.mark.parametrize("old", ["a", "c"])
def test_a_text_that_does_not_stand_there_once_is_refused(tmp_path: Path, old: str) -> None:
    (tmp_path / "sum.py").write_text("total = a + b\n")
    with (
        pytest.raises(SystemExit, match=r"stands there . times; mend it in tests/promises\.py"),
        edited(tmp_path, Promise("sums", "sum.py", old, "b", ())),
    ):
        pass
    assert (tmp_path / "sum.py").read_text() == "total = a + b\n"
