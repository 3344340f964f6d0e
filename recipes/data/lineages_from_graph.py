"""A citation graph to chains: `python recipes/data/lineages_from_graph.py GRAPH.json OUT.jsonl`.

The graph is `{"nodes": [...], "edges": [...]}`. A node is a step as the template algorithm_evolution reads it (`name`,
`pseudocode`, ...), with the `field` it belongs to and, where edges do not use its name, an `id`. An edge
`{"from": "B", "to": "A", "type": "improves"}` says that B improves A, as a paper cites an older one; it may carry
`drove`, what drove B, where A led to several. Edges of other types are passed over.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import networkx

Graph = Any  # networkx carries no type stubs


def rows(graph: Path, most: int = 1000) -> Iterator[dict[str, Any]]:
    """Chains from every algorithm that improves none to every one that none improves, at most `most` of them.

    An algorithm without edges is in none. Raises ValueError, before the first chain, that names the nodes or edges
    that are wrong.
    """
    improved = read_graph(graph)
    leaves = {node for node in improved if not improved.out_degree(node)}
    roots = (node for node in improved if not improved.in_degree(node) and node not in leaves)
    paths = (path for root in roots for path in networkx.all_simple_paths(improved, root, leaves))
    for number, path in enumerate(islice(paths, most), 1):
        steps = [
            {key: value for key, value in improved.nodes[node].items() if key not in ("id", "field")} for node in path
        ]
        for step, edge in zip(steps, pairwise(path), strict=False):
            step.update(improved.edges[edge])
        yield {"field": improved.nodes[path[0]].get("field", ""), "chain": f"{graph.stem}-{number}", "steps": steps}


def read_graph(path: Path) -> Graph:
    """The file as a directed graph from the older algorithm to the newer, found to be whole and without cycles."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON in UTF-8: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("nodes", "edges")):
        raise ValueError(f'{path}: is not a graph; write {{"nodes": [...], "edges": [...]}}')
    for number, node in enumerate(data["nodes"], 1):
        if not isinstance(node, dict) or not all(isinstance(node.get(key), str) for key in ("name", "pseudocode")):
            name = node.get("name") if isinstance(node, dict) else node
            raise ValueError(f"{path}: node {number} ({name!r}) needs a `name` and `pseudocode`, both text")
    for key in ("name", "id"):
        values = [str(node.get(key, node["name"])) for node in data["nodes"]]
        counts = Counter(value.casefold() for value in values)
        if twice := [value for value in values if counts[value.casefold()] > 1]:
            raise ValueError(f"{path}: the {key} of more than one node: {', '.join(twice)}")

    graph = networkx.DiGraph()
    for node in data["nodes"]:
        graph.add_node(str(node.get("id", node["name"])), **node)
    for number, edge in enumerate(data["edges"], 1):
        if not isinstance(edge, dict) or not {"from", "to", "type"} <= edge.keys():
            raise ValueError(f"{path}: edge {number} needs `from`, `to` and `type`: {edge!r}")
        if edge["type"] == "improves":
            newer, older = str(edge["from"]), str(edge["to"])
            if missing := [name for name in (newer, older) if name not in graph]:
                raise ValueError(f"{path}: edge {number}, {newer} improves {older}: no node is named {missing[0]}")
            graph.add_edge(older, newer, **{key: edge[key] for key in ("drove",) if key in edge})
    check_order(path, graph)
    return graph


def check_order(path: Path, graph: Graph) -> None:
    """No algorithm improves itself over others, and edges do not run from newer to older, which is easily mistaken."""
    if not graph.edges:
        raise ValueError(f"{path}: no edge has the type `improves`")
    if not networkx.is_directed_acyclic_graph(graph):
        cycle = [older for older, _ in networkx.find_cycle(graph)]
        raise ValueError(f"{path}: a cycle: {' -> '.join([*cycle, cycle[0]])}")
    years = {node: year for node, year in graph.nodes(data="year") if isinstance(year, int)}
    wrong = [edge for edge in graph.edges if years.keys() >= set(edge) and years[edge[1]] < years[edge[0]]]
    if len(wrong) * 2 > len(graph.edges):
        older, newer = wrong[0]
        raise ValueError(
            f"{path}: most edges go back in time: {newer} ({years[newer]}) improves {older} ({years[older]}); "
            "write the newer one in `from`"
        )


def main() -> int:
    """Write all chains, or a message and nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=int, default=1000, help="stop after this many chains (default: 1000)")
    options = parser.parse_args()
    try:
        chains = list(rows(options.graph, options.most + 1))
        written = options.out.with_name(options.out.name + ".part")
        lines = (json.dumps(chain, ensure_ascii=False) + "\n" for chain in chains[: options.most])
        written.write_text("".join(lines), encoding="utf-8")
        os.replace(written, options.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    more = " and there are more: raise --most" if len(chains) > options.most else ""
    print(f"{options.out}: {min(len(chains), options.most)} chains{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
