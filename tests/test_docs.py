"""What README and docs say of the project's files is so: links lead somewhere, tables of recipes are whole."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
PAGES = sorted([*HERE.glob("*.md"), *(HERE / "docs").glob("*.md")])
TABLES = [HERE / "README.md", HERE / "docs" / "README.zh.md"]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(HERE)) for page in pages]


def test_there_are_pages() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/how_to_add.md"} <= set(names(PAGES))


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", TABLES, ids=names(TABLES))
def test_the_table_of_recipes_has_each_with_the_peak_that_its_header_says(page: Path) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|(?:[^|]*\|){4} ([\d.]+ GiB) \|", page.read_text("utf-8"), re.MULTILINE)
    headers = {file.stem: file.read_text("utf-8") for file in sorted((HERE / "recipes").glob("*.yaml"))}
    assert headers
    peaks = {name: re.findall(r"; ([\d.]+ GiB) at the peak", text) for name, text in headers.items()}
    assert len(rows) == len(headers)
    assert {name: [peak] for name, peak in rows} == peaks


def test_the_chinese_page_has_the_figures_of_the_english_one() -> None:
    english, chinese = (page.read_text("utf-8") for page in TABLES)
    proofs = re.findall(r"^```\n(.*?)^```$", english[: english.index("## Your own rows")], re.DOTALL | re.MULTILINE)
    assert len(proofs) == 5
    assert [proof for proof in proofs[1:] if proof not in chinese] == []
