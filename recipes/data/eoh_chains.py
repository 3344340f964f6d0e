"""Recorded runs of Evolution of Heuristics to chains: `python recipes/data/eoh_chains.py IN.jsonl OUT.jsonl`.

A line of IN is a `problem` with its `steps`: for each time the best heuristic improved its `generation`, the
`algorithm` in words, the `code` and the `objective`, of which less is better.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Chains in the shape of the template algorithm_evolution; steps that only repeat the code before are left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problem, steps = record["problem"], [step_row(record["problem"], step) for step in record["steps"]]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}:{number}: not a recorded chain of problem and steps: {error!r}") from None
        code = {step["pseudocode"]: step for step in reversed(steps)}
        steps = [step for step in steps if code[step["pseudocode"]] is step]
        if len(steps) > 1:
            yield {"field": f"heuristic for {problem}", "chain": f"eoh-{problem}", "steps": steps}


def step_row(problem: str, step: dict[str, Any]) -> dict[str, Any]:
    """A recorded step, named by its problem and generation; what it reached is what the next one had to better."""
    return {
        "name": f"{problem}, generation {step['generation']}",
        "pseudocode": step["code"],
        "ideas": step["algorithm"],
        "weaknesses": f"Its objective is {step['objective']}; less is better.",
    }


def main() -> int:
    """Write all chains, or a message and nothing."""
    if len(sys.argv) != 3:
        print(f"usage: python {sys.argv[0]} IN.jsonl OUT.jsonl", file=sys.stderr)
        return 2
    source, out = map(Path, sys.argv[1:])
    try:
        chains = list(rows(source))
        written = out.with_name(out.name + ".part")
        written.write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chains), encoding="utf-8")
        os.replace(written, out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: {len(chains)} chains")
    return 0


if __name__ == "__main__":
    sys.exit(main())
