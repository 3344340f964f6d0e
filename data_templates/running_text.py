"""running_text: whole texts without a prompt, all of it learned; for style, or for a model from scratch."""

from data_templates import Template


def template() -> Template:
    """No options."""
    return Template(
        fields={"text": "the whole text"},
        prompt=lambda row: "",
        completion=lambda row: row["text"],
        example={"text": "One day Mira the miller found a silver key beside the well, and it fitted no door at all."},
    )
