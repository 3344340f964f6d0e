"""ollama: a Modelfile beside a GGUF, whose template and stop words make the prompt that the model was trained on."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from sft.export import Source, gguf, travel
from sft.files import write_text
from sft.model import parity
from sft.model.load import decoding
from sft.tokens.codec import ANSWER, Codec

NEEDS = gguf.NEEDS
OPTIONS = gguf.OPTIONS
check = gguf.check

QUESTION, SYSTEM = f"q{ANSWER}", f"s{ANSWER}"
"""Stand for texts where the chat template is tried out."""


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write `model.gguf`, of the first type asked for, and `Modelfile`; compare the ids that they make of prompts."""
    kind = next((kind for kind in gguf.kinds_of(source.options) if kind != "lora"), "f16")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf.write_model(source, folder / "model.gguf", kind, Path(scratch))
    go = template(source.opened.codec, source.opened.tokenizer)
    write_text(folder / "Modelfile", modelfile(source, go))
    travel(source, folder, "recipe.yaml", "template.py")
    found = gguf.compare(source, folder / "model.gguf", parity.of_model(source.model))
    found |= {"bytes": (folder / "model.gguf").stat().st_size}
    tried, wrong = _tried(source, folder, go)
    problems = gguf.unseen_window(source) + gguf.judged(found, kind)
    problems += [f"{len(wrong)} prompts get other ids than in training, such as {wrong[0]!r}"] if wrong else []
    lines = [
        gguf.kinds_table({kind: found}),
        f"the Modelfile gives {tried - len(wrong)} of {tried} prompts the ids of training",
    ]
    return found | {"tried": tried, "problems": problems, "table": "\n".join(lines)}


def modelfile(source: Source, go: str) -> str:
    """The Modelfile: `ollama create NAME -f Modelfile` in its folder makes the model. What ollama has a default of its
    own for is written out, as it decodes otherwise than transformers."""
    codec, config = source.opened.codec, decoding(source.recipe, source.opened.codec)
    positions = getattr(source.model.config, "max_position_embeddings", 2**31)
    parameters: dict[str, Any] = {
        "num_ctx": min(positions, source.recipe.max_length), "num_predict": config.max_new_tokens,
        "temperature": config.temperature or 1.0, "top_k": config.top_k or 0, "top_p": config.top_p or 1.0,
        "min_p": config.min_p or 0.0, "repeat_penalty": config.repetition_penalty or 1.0,
    }  # fmt: skip
    if not config.do_sample:
        parameters |= {"temperature": 0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}
    stop = "".join(codec.tokenizer.convert_ids_to_tokens(codec.end[-1:]))
    lines = ["FROM ./model.gguf", f'TEMPLATE """{go}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def template(codec: Codec, tokenizer: Any) -> str:
    """The prompt as a Go template: what stands around the user's text, the answer, and a system text where the chat
    template takes one. Found by trying out the chat template of the merged folder; BOS is left to llama.cpp."""
    if tokenizer.chat_template is None:
        return "{{ .Prompt }}{{ .Response }}"
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    before, after = _around(codec, tokenizer, turns[:1])
    tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(ANSWER)[2]
    user = "{{ .Prompt }}" + _literal(after) + "{{ .Response }}" + _literal(tail)
    system = _system(codec, tokenizer, after) if codec.chat else None
    if system is None:
        return _literal(before) + user
    head, between = map(_literal, system)
    return "{{ if .System }}" + head + "{{ .System }}" + between + "{{ else }}" + _literal(before) + "{{ end }}" + user


def _system(codec: Codec, tokenizer: Any, after: str) -> tuple[str, str] | None:
    """What stands before and after a system text, or None where the chat template does not take one."""
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    try:
        head, rest = _around(codec, tokenizer, turns, SYSTEM)
    except TemplateError:
        return None
    between, found, end = rest.partition(QUESTION)
    return (head, between) if found and end == after else None


def _around(codec: Codec, tokenizer: Any, turns: list[dict[str, str]], text: str = QUESTION) -> tuple[str, str]:
    """What stands before and after a text, without the BOS and the space that llama.cpp puts there itself."""
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    if gguf.adds_bos(codec):
        whole = whole.removeprefix(str(tokenizer.bos_token))
    if not codec.chat and gguf.adds_space(codec):
        whole = whole.removeprefix(" ")
    before, _, after = whole.partition(text)
    return before, after


def rendered(template: str, prompt: str, system: str = "") -> str:
    """What Go's text/template makes of the few forms that `template` writes, up to the response."""
    text = template.partition("{{ .Response }}")[0]
    choice = re.fullmatch(r"\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}(.*)", text, re.DOTALL)
    if choice:
        text = (choice[1] if system else choice[2]) + choice[3]
    values = {".Prompt": prompt, ".System": system}

    def value(found: re.Match[str]) -> str:
        inner = found[1]
        return values[inner] if inner in values else str(json.loads(inner))

    return re.sub(r'\{\{ (\.\w+|"(?:[^"\\]|\\.)*") \}\}', value, text)


def _tried(source: Source, folder: Path, go: str) -> tuple[int, list[str]]:
    """How many held-out prompts were tried, and those of which Modelfile and llama.cpp make other ids than training."""
    codec, test = source.opened.codec, source.opened.tokens.test.select(range(min(len(source.opened.tokens.test), 100)))
    before, _, after = go.partition("{{ .Prompt }}")
    before, after = rendered(before, ""), rendered(after, "")
    prompts = [text for text in test["prompt"] if codec.chat or (text.startswith(before) and text.endswith(after))]
    with gguf.LlamaCpp(folder / "model.gguf", 512) as opened:
        wrong = []
        for prompt, ids in zip(prompts, codec.prompts(prompts), strict=True):
            content = prompt if codec.chat else prompt[len(before) : len(prompt) - len(after)]
            if opened.ids(rendered(go, content), codec.chat) != ids:
                wrong.append(prompt)
    return len(prompts), wrong


def _literal(text: str) -> str:
    """Text that Go's template and the Modelfile's quotes leave as it is."""
    return re.sub(r'\{\{|^"|"""', lambda found: "{{ " + json.dumps(found[0]) + " }}", text)
