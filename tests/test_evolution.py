"""Chains of algorithms: the shipped lineages, what the model reads and writes, and the ways to bring chains in."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from data_templates import Segment
from data_templates.algorithm_evolution import checked, key, next_row, read_step, template

DATA = Path(__file__).parents[1] / "recipes" / "data"
CHAINS = [json.loads(line) for line in (DATA / "lineages.jsonl").read_text(encoding="utf-8").splitlines()]
ROWS = [row for chain in CHAINS for row in template().samples(chain)]
EXAMPLE = template().example


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def segments(row: Any, weight: float = 1.0) -> list[Segment]:
    return [part for part in template(weight).completion(row) if isinstance(part, Segment)]


def written(row: Any) -> str:
    return "".join(part.text for part in segments(row))


def chain(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"field": "toys", "chain": "toy", "steps": list(steps)}


def step(name: str, **parts: Any) -> dict[str, Any]:
    return {"name": name, "pseudocode": f"do {name}\nreturn"} | parts


# The shipped lineages


def test_there_are_forty_lineages_of_forty_fields_with_names_of_their_own() -> None:
    assert len(CHAINS) >= 40
    assert len({chain["field"] for chain in CHAINS}) >= 40
    assert len({chain["chain"] for chain in CHAINS}) == len(CHAINS)


@pytest.mark.parametrize("lineage", CHAINS, ids=[chain["chain"] for chain in CHAINS])
def test_a_lineage_has_four_full_steps_that_go_forward_in_time(lineage: dict[str, Any]) -> None:
    *earlier, last = steps = lineage["steps"]
    assert len(steps) >= 4
    parts = {"name", "year", "authors", "paper", "pseudocode", "ideas", "weaknesses", "drove"}
    assert all(step.keys() == parts and all(step[part] for part in parts - {"drove"}) for step in steps)
    assert all(step["drove"] for step in earlier)
    assert not last["drove"]
    assert all(older["year"] <= newer["year"] for older, newer in pairwise(steps))
    assert all(4 <= len(step["pseudocode"].splitlines()) <= 12 for step in steps)


def test_each_pseudocode_differs_from_every_other() -> None:
    steps = [step for chain in CHAINS for step in chain["steps"]]
    assert len({step["pseudocode"] for step in steps}) == len(steps)


def test_an_algorithm_in_two_lineages_has_the_same_source_in_both() -> None:
    sources: dict[str, set[tuple[Any, ...]]] = {}
    for lineage in CHAINS:
        for one in lineage["steps"]:
            sources.setdefault(key(one), set()).add((one["name"], one["year"], one["authors"], one["paper"]))
    assert all(len(source) == 1 for source in sources.values())


def test_few_lineages_hang_together_so_that_a_split_can_part_them() -> None:
    names = [name for chain in CHAINS for name in template().keys(chain)]
    assert len(names) - len(set(names)) <= 5


# What the model is shown and must write


def test_every_prefix_is_a_row() -> None:
    assert len(ROWS) == sum(len(chain["steps"]) - 1 for chain in CHAINS)
    first, second, *_ = template().samples(CHAINS[0])
    assert [step["name"] for step in first["steps"]] == [CHAINS[0]["steps"][0]["name"]]
    assert first["next"] == CHAINS[0]["steps"][1]
    assert second["next"] == CHAINS[0]["steps"][2]


def test_no_prompt_holds_its_answer() -> None:
    for row in ROWS:
        prompt = template().prompt(row)
        assert row["next"]["pseudocode"] not in prompt
        assert f"\n{row['next']['name']}\n" not in prompt
        assert row["steps"][-1]["drove"] not in prompt


def test_a_prompt_holds_every_step_its_diff_and_the_weaknesses_of_the_last() -> None:
    row = ROWS[2]
    prompt = template().prompt(row)
    for one in row["steps"]:
        assert all(one[part] in prompt for part in ("name", "authors", "paper", "pseudocode", "ideas"))
    for older, newer in pairwise(row["steps"]):
        assert f"\n## Diff\n--- {older['name']}\n+++ {newer['name']}\n@@ " in prompt
        assert f"\n## Reasons\n{older['drove']}\n" in prompt
    assert prompt.count("## Weaknesses") == 1
    assert row["steps"][-1]["weaknesses"] in prompt
    assert prompt.endswith(f"\n# Step {len(row['steps']) + 1}\n")


def test_a_whole_chain_asks_for_the_step_after_it() -> None:
    assert template().prompt(EXAMPLE).endswith("\n# Step 3\n")


def test_the_weight_of_innovation_reaches_new_lines_and_ideas_alone() -> None:
    [row] = template().samples(EXAMPLE)
    weights = {part.name: part.weight for part in segments(row, 3.0)}
    assert weights == {"algorithm": 1, "pseudocode": 1, "innovation": 3, "ideas": 3, "reasons": 1, "weaknesses": 1}
    [row] = template().samples(
        chain(step("A", pseudocode="for x:\n    a\n\nend"), step("B", pseudocode="for x:\n    b\n\nend"))
    )
    assert [part.text for part in segments(row, 0.0) if not part.weight] == ["    b\n"]


def test_what_is_written_is_read_back() -> None:
    for row in ROWS:
        read, last, step = read_step(written(row)), row["steps"][-1], row["next"]
        assert read == {part: step[part] for part in ("name", "pseudocode", "ideas", "weaknesses")} | {
            "reasons": last["drove"]
        }


def test_blank_lines_of_pseudocode_stay() -> None:
    code = "# Step 1: begin\na\n\n\n    b\n\nc"
    [row] = template().samples(chain(step("A"), step("B", pseudocode=code)))
    assert f"## Pseudocode\n{code}" in written(row)
    assert read_step(written(row))["pseudocode"] == code


@pytest.mark.parametrize(
    "text",
    ["", "\n", "## Algorithm", "## Algorithm\n\n## Algorithm\n", "## Ideas\nx", "nonsense", "# Step 3", "\0\ud800"],
)
def test_any_text_can_be_read(text: str) -> None:
    assert read_step(text).keys() == {"name", "pseudocode", "ideas", "reasons", "weaknesses"}
    assert isinstance(template().answer(text), str)


def test_reading_stops_where_the_model_begins_a_further_step() -> None:
    text = "## Algorithm\nC\n## Pseudocode\nc\n\n# Step 4\n## Algorithm\nD\n## Ideas\nmore"
    assert read_step(text) == {"name": "C", "pseudocode": "c", "ideas": "", "reasons": "", "weaknesses": ""}


def test_a_chain_rolls_forward() -> None:
    row: Any = EXAMPLE
    for number, name in enumerate("DEF", 3):
        text = f"## Algorithm\n{name}\n## Pseudocode\ndo {name}\n## Reasons\nwhy {name}\n## Weaknesses\nweak {name}"
        row = next_row(row, text)
        prompt = template().prompt(row)
        assert f"# Step {number}\n## Algorithm\n{name}\n## Pseudocode\ndo {name}\n## Diff\n" in prompt
        assert f"## Reasons\nwhy {name}\n## Weaknesses\nweak {name}\n\n# Step {number + 1}\n" in prompt
    assert "next" not in next_row(ROWS[0], "## Algorithm\nD")


def test_an_unusable_step_stops_the_roll_with_a_message() -> None:
    with pytest.raises(ValueError, match="chain `sorted-search`, step 3: has no `name`"):
        template().prompt(next_row(EXAMPLE, "I do not know."))


def test_missing_parts_leave_no_heading() -> None:
    [row] = template().samples(chain(step("A", paper=None), step("B", ideas=["one", "two"], year=1999)))
    assert template().prompt(row).count("## ") == 2
    assert "## Ideas\none\ntwo" in written(row)
    assert "Reasons" not in written(row)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chain(), "chain `toy`: `steps` is not a list of steps"),
        (chain(step("A")), "chain `toy`: has 1 step; write two or more"),
        (chain(step("A"), {"name": "B"}), "chain `toy`, step 2: has no `pseudocode`"),
        (chain(step("A"), {"pseudocode": "b"}), "chain `toy`, step 2: has no `name`"),
        (chain(step("A"), step("B", ideas={"a": 1})), "chain `toy`, step 2: `ideas` is not text"),
        (chain(step("A"), step("B", ideas=[1])), "chain `toy`, step 2: `ideas` is not text"),
        (chain(step("A"), step("B", ideas="x\n## Ideas\ny")), "step 2: `ideas` has the line `## Ideas`"),
        (chain(step("A\nA"), step("B")), "step 1: `name` has more than one line"),
        (
            chain(step("Quick sort"), step("B"), step("quicksort")),
            "step 3: `quicksort` has the name or pseudocode of step 1",
        ),
        (chain(step("A"), step("B", pseudocode="do A\nreturn")), "step 2: `B` has the name or pseudocode of step 1"),
        (chain(step("A")) | {"steps": ["A", "B"]}, "chain `toy`, step 1: is not an object"),
        (chain(step("A")) | {"steps": "A, B"}, "chain `toy`: `steps` is not a list of steps"),
    ],
)
def test_a_broken_chain_is_refused_by_chain_and_step(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 # the message is compared below
        list(template().samples(record))
    assert message in str(error.value)


def test_names_are_the_same_algorithm_whatever_their_case_and_hyphens() -> None:
    assert key(step("Quick-Sort")) == key(step("quick sort"))
    assert key(step("k-means")) != key(step("k-means++"))
    assert checked(chain(step("A"), step("A*")))


# A citation graph


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def from_graph(tmp_path: Path) -> Command:
    def run(nodes: Any, edges: Any, *options: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "graph.json"
        path.write_text(json.dumps({"nodes": nodes, "edges": edges}), encoding="utf-8")
        command = [
            sys.executable,
            str(DATA / "lineages_from_graph.py"),
            str(path),
            str(tmp_path / "out.jsonl"),
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def improves(newer: str, older: str, **more: str) -> dict[str, str]:
    return {"from": newer, "to": older, "type": "improves", **more}


def test_chains_run_from_roots_to_leaves_of_the_graph(tmp_path: Path) -> None:
    nodes = [step(name, year=year, drove=f"from {name}") for name, year in zip("ABCDE", range(2000, 2005), strict=True)]
    edges = [improves("B", "A"), improves("C", "B", drove="B to C"), improves("D", "B"), improves("D", "C")]
    edges.append({"from": "E", "to": "A", "type": "cites"})
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"nodes": [node | {"field": "toys"} for node in nodes], "edges": edges}))
    first, second = chains = list(load("lineages_from_graph").rows(path))
    assert sorted("".join(step["name"] for step in chain["steps"]) for chain in chains) == ["ABCD", "ABD"]
    assert {first["chain"], second["chain"]} == {"graph-1", "graph-2"}
    assert first["field"] == "toys"
    long = max(chains, key=lambda chain: len(chain["steps"]))
    assert [step["drove"] for step in long["steps"]] == ["from A", "B to C", "from C", "from D"]
    assert [len(list(template().samples(chain))) for chain in chains] == [len(chain["steps"]) - 1 for chain in chains]


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        ("ABC", [("B", "A"), ("C", "B"), ("A", "C")], "a cycle: "),
        ("AB", [("A", "A"), ("B", "A")], "a cycle: A -> A"),
        ("AB", [("B", "A"), ("B", "Z")], "edge 2, B improves Z: no node is named Z"),
        ("ABA", [("B", "A")], "the name of more than one node: A, A"),
        ("AB", [], "no edge has the type `improves`"),
    ],
)
def test_a_broken_graph_is_named_and_writes_nothing(
    from_graph: Command, tmp_path: Path, nodes: str, edges: list[tuple[str, str]], message: str
) -> None:
    done = from_graph([step(name) for name in nodes], [improves(*edge) for edge in edges])
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]


def test_a_cycle_is_told_node_by_node(from_graph: Command) -> None:
    done = from_graph([step(name) for name in "ABC"], [improves("B", "A"), improves("C", "B"), improves("B", "C")])
    assert "a cycle: B -> C -> B" in done.stderr


def test_edges_the_wrong_way_round_are_told(from_graph: Command) -> None:
    done = from_graph([step("A", year=1990), step("B", year=1995)], [improves("A", "B")])
    assert done.returncode == 2
    assert "A (1990) improves B (1995)" in done.stderr


def test_a_node_without_pseudocode_is_told(from_graph: Command) -> None:
    done = from_graph([step("A"), {"name": "B"}], [improves("B", "A")])
    assert "node 2 ('B') needs a `name` and `pseudocode`" in done.stderr


def test_a_file_that_is_no_graph_is_told(from_graph: Command, tmp_path: Path) -> None:
    assert "is not a graph" in from_graph({}, []).stderr
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        list(load("lineages_from_graph").rows(tmp_path / "broken.json"))


def test_a_graph_with_very_many_paths_is_cut_and_says_so(from_graph: Command, tmp_path: Path) -> None:
    names = [f"{layer}{side}" for layer in range(30) for side in "ab"]
    edges = [improves(f"{layer + 1}{n}", f"{layer}{o}") for layer in range(29) for n in "ab" for o in "ab"]
    done = from_graph([step(name) for name in names], edges, "--most", "7")
    assert done.returncode == 0
    assert "7 chains and there are more" in done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 7


# Recorded chains of another making


def test_a_recorded_chain_takes_our_shape(tmp_path: Path) -> None:
    steps = [
        {"generation": n, "algorithm": f"idea {n}", "code": code, "objective": 9 - n} for n, code in enumerate("xyyz")
    ]
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps({"problem": "toy", "steps": steps}))
    [chain] = load("eoh_chains").rows(path)
    assert [step["pseudocode"] for step in chain["steps"]] == ["x", "y", "z"]
    assert chain["steps"][0]["name"] == "toy, generation 0"
    assert chain["steps"][1]["ideas"] == "idea 1"
    assert len(list(template().samples(chain))) == 2


def test_a_line_that_is_no_recorded_chain_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "chains.jsonl"
    path.write_text('{"problem": "toy", "steps": []}\n{"problem": "toy"}')
    with pytest.raises(ValueError, match=r"chains\.jsonl:2: not a recorded chain"):
        list(load("eoh_chains").rows(path))


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names no folder with datasets")
def test_the_recorded_chains_come_in(tmp_path: Path) -> None:
    source = Path(os.environ["REAL_DATA"]) / "datasets" / "eoh_chains" / "chains.jsonl"
    out = tmp_path / "eoh.jsonl"
    subprocess.run([sys.executable, str(DATA / "eoh_chains.py"), str(source), str(out)], check=True)
    chains = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(chains) == 22
    rows = [row for chain in chains for row in template().samples(chain)]
    assert len(rows) == 57
    assert all(read_step(written(row))["pseudocode"] == row["next"]["pseudocode"] for row in rows)
