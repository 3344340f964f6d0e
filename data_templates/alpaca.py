"""alpaca: an instruction, for some rows an input to it, and the output; the shape of Alpaca and its kin."""

from data_templates import Row, Template


def template(separator: str = "\n\n") -> Template:
    """`separator` stands between instruction, input and output. `input` may be empty or missing."""

    def prompt(row: Row) -> str:
        return separator.join(filter(None, [row["instruction"], row.get("input")])) + separator

    return Template(
        fields={"instruction": "what to do", "output": "the right answer"},
        prompt=prompt,
        completion=lambda row: row["output"],
        metrics=("rouge", "chrf"),
        example={
            "instruction": "Name the animal that is meant.",
            "input": "It carries its house.",
            "output": "A snail.",
        },
    )
