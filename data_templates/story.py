"""story: continue a story from its opening. English, Chinese, or any other language."""

from data_templates import Template


def template(separator: str = "\n") -> Template:
    """`separator` stands between opening and continuation. Spaces at its end begin the continuation: a tokenizer joins
    a space to the word after it."""
    ends = separator.rstrip(" ")
    begins = separator[len(ends) :]
    return Template(
        fields={"prompt": "the opening", "output": "what follows it"},
        prompt=lambda row: row["prompt"] + ends,
        completion=lambda row: begins + row["output"],
        metrics=("rouge", "bleu", "chrf", "distinct", "repetition"),
        example={
            "prompt": "Mira the miller found a silver key beside the well.",
            "output": "She tried it in every door of the village, and the last one opened.",
        },
    )
