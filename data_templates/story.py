"""story: continue a story from its opening. English, Chinese, or any other language."""

from data_templates import Template


def template(separator: str = "\n") -> Template:
    """`separator` stands between the opening and its continuation."""
    return Template(
        fields={"prompt": "the opening", "output": "what follows it"},
        prompt=lambda row: row["prompt"] + separator,
        completion=lambda row: row["output"],
        metrics=("rouge", "bleu", "chrf", "distinct", "repetition"),
        example={
            "prompt": "Mira the miller found a silver key beside the well.",
            "output": "She tried it in every door of the village, and the last one opened.",
        },
    )
