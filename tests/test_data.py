"""The mask and its promises, on tokenizers of every kind, on any text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_templates import Segment
from sft import UserError
from sft.recipe import Recipe, load
from sft.rows.template import read_prompt
from sft.tokens.check import Refused, problems, refuse
from sft.tokens.codec import Codec, special
from sft.tokens.counts import looks
from sft.tokens.example import pieces
from sft.tokens.opened import Opened
from sft.tokens.prepare import MASKED, Tokens

TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(list(" \n\t  aAbe.,!▁好的é</s>|<"))),
    min_size=0,
    max_size=40,
)
OUTPUT = TEXT.filter(str.strip)
SEAMS = [
    ("The quick ", "brown fox"),  # ends in a space
    ("a jo", "ke"),  # would merge into one token
    ("", "no prompt at all"),
    ("Q:\n", "\n\nblank lines first"),
    ("x =", " 1"),
    ("中", "文"),
    ("end</s>", "<|endoftext|> in the text, </s> too"),
    ("e", "\u0301 combining"),
    ("tabs\t", "\tand   runs    of spaces  "),
]


def codec_of(folder: Path) -> Codec:
    return Codec(AutoTokenizer.from_pretrained(folder))


def tokens_of(recipe_file: Path, *overrides: str) -> tuple[Recipe, Codec, Tokens]:
    recipe = load(recipe_file, overrides)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    return recipe, Codec(tokenizer, recipe.prompt_format), Opened(recipe).tokens


def asked(recipe: Recipe, codec: Codec, row: dict[str, Any]) -> list[int]:
    """The ids that `sft generate` and `sft serve` give the model for a row without its output."""
    return codec.prompts([read_prompt(Opened(recipe).template, row, "row")])[0]


def normalised(codec: Codec, text: str) -> str:
    """What the tokenizer makes of a text before it cuts it up: NFC, and ▁ for a space in the SentencePiece kind."""
    normalizer = codec._outputs.normalizer
    text = normalizer.normalize_str(text) if normalizer is not None else text
    return text.replace("▁", " ")


@given(prompt=TEXT, output=OUTPUT)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_output_ids_give_back_the_output_and_nothing_else(any_tokenizer: Path, prompt: str, output: str) -> None:
    codec = codec_of_cached(any_tokenizer)
    (tail,) = codec.outputs([output])
    assert codec.text([tail])[0].replace("▁", " ") == normalised(codec, output)
    assert not set(tail) & set(codec.end), "an end token inside an output would teach the model to stop early"
    (head,) = codec.prompts([prompt])
    assert head, "even an empty prompt gives the model something to start from"
    bos = codec.tokenizer.bos_token_id
    assert head[:2] != [bos, bos]


@pytest.mark.parametrize(("prompt", "output"), SEAMS)
def test_no_space_is_lost_or_gained_at_the_seam(any_tokenizer: Path, prompt: str, output: str) -> None:
    codec = codec_of_cached(any_tokenizer)
    (head,), (tail,) = codec.prompts([prompt]), codec.outputs([output])
    before = codec.tokenizer.decode(head, clean_up_tokenization_spaces=False)
    whole = codec.tokenizer.decode(head + tail, clean_up_tokenization_spaces=False)
    assert whole == before + codec.text([tail])[0]
    assert codec.text([tail])[0].replace("▁", " ") == normalised(codec, output)
    assert not set(tail) & set(special(codec.tokenizer).values()), "the name of a special token is text"


def merges_unseen(codec: Codec) -> list[str]:
    """Prompts and outputs, of every two ASCII characters at the seam, whose merging the quick look passes over."""
    characters = [chr(i) for i in range(1, 127)]
    pairs = [
        (f"{a}{x}", f"{y}{b}")
        for a, b in (("an", "ing"), ("12", "34"), ("((", "s"), ("it'", " "))
        for x in characters
        for y in characters
    ]
    prompts, outputs = map(list, zip(*pairs, strict=True))
    heads, tails = codec.prompts(prompts), codec.outputs(outputs)
    together = codec._prompts.encode_batch_fast([a + b for a, b in pairs], add_special_tokens=False)
    whole = [
        encoding.ids != [*head[len(codec.start) :], *tail]
        for encoding, head, tail in zip(together, heads, tails, strict=True)
    ]
    assert any(whole)
    assert not all(whole)
    found = codec.merged(prompts, outputs, heads, tails)
    return [repr(pair) for pair, is_merged, seen in zip(pairs, whole, found, strict=True) if is_merged != seen]


def test_the_quick_look_at_a_seam_misses_no_merge(any_tokenizer: Path) -> None:
    codec = Codec(codec_of_cached(any_tokenizer).tokenizer, "plain")
    assert merges_unseen(codec) == []


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "mistral-v1"])
def test_the_quick_look_at_a_seam_misses_no_merge_of_real_tokenizers(real_data: Path, name: str) -> None:
    codec = codec_of(real_data / "tokenizers" / name)
    assert merges_unseen(codec) == []
    assert codec._apart("Once upon a time.", "The fox") or codec._apart("a time.\n", "The fox"), "else it saves nothing"


_codecs: dict[Path, Codec] = {}


def codec_of_cached(folder: Path) -> Codec:
    return _codecs.setdefault(folder, codec_of(folder))


@pytest.fixture
def prepared(tmp_path: Path, any_tokenizer: Path, write_recipe: Callable[..., Path]) -> tuple[Recipe, Codec, Tokens]:
    return tokens_of(write_recipe(tmp_path, model=str(any_tokenizer), trainer={"max_length": 400}))


def rows_of(tokens: Tokens) -> list[dict[str, Any]]:
    return [*tokens.train, *tokens.test]


def test_the_ids_at_inference_are_the_prefix_of_those_of_training(prepared: tuple[Recipe, Codec, Tokens]) -> None:
    recipe, codec, tokens = prepared
    assert len(tokens.test) >= 6
    for row in tokens.test:
        ids = asked(recipe, codec, {"prompt": row["prompt"].removesuffix("\n")})
        assert ids == row["input_ids"][: len(ids)]
        assert row["labels"][: len(ids)] == [MASKED] * len(ids)
        assert row["labels"][len(ids) :] == row["input_ids"][len(ids) :]
        assert row["prompt_tokens"] == len(ids)


def test_the_loss_falls_on_the_output_and_its_end_token_alone(prepared: tuple[Recipe, Codec, Tokens]) -> None:
    _, codec, tokens = prepared
    for row in tokens.test:
        learned = [label for label in row["labels"] if label != MASKED]
        assert learned[-len(codec.end) :] == codec.end
        assert codec.text([learned[: -len(codec.end)]]) == [normalised(codec, row["reference"])]
        assert learned.count(codec.end[-1]) == 1
    assert all(counts.ended == counts.rows for counts in tokens.counts.values())


def test_what_is_shown_joins_to_the_whole_row(prepared: tuple[Recipe, Codec, Tokens]) -> None:
    _, codec, tokens = prepared
    row = tokens.test[0]
    shown = pieces(codec.tokenizer, row["input_ids"], row["labels"])
    assert [learned for _, learned in shown] == [False, True]
    assert "".join(text for text, _ in shown) == codec.tokenizer.decode(row["input_ids"])


def test_a_pad_token_equal_to_the_end_token_never_masks_the_end(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from sft.train.collator import WeightedCollator

    _, codec, tokens = tokens_of(write_recipe(tmp_path, model=str(gpt2_like)))
    end = codec.end[0]
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in tokens.train]
    labels = DataCollatorForLanguageModeling(pad_token_id=end)(rows)["labels"]
    assert ((labels == end).sum(1) == 1).all()
    weighted = [row | {"weights": [1.0] * len(row["labels"])} for row in rows]
    assert (WeightedCollator(pad_token_id=end)(weighted)["labels"] == labels).all()


@pytest.mark.parametrize("overflow", ["trim_prompt", "drop", "error"])
def test_a_long_row_follows_overflow_and_its_output_is_never_cut(
    tmp_path: Path, sentencepiece_like: Path, write_recipe: Callable[..., Path], overflow: str
) -> None:
    rows = [{"prompt": f"{i} " + "long " * 200 + f"and last {i}", "output": f"The end of {i}."} for i in range(4)]
    rows += [{"prompt": f"short {i}", "output": "very " * 300} for i in range(4)]
    rows += [{"prompt": f"fits {i}", "output": "yes"} for i in range(8)]
    file = write_recipe(tmp_path, rows=rows, model=str(sentencepiece_like), data={"overflow": overflow})
    if overflow == "error":
        with pytest.raises(UserError, match=r"rows\.jsonl:\d+: \d+ tokens, `trainer\.max_length` is 256"):
            tokens_of(file)
        return
    recipe, codec, tokens = tokens_of(file)
    kept, counts = rows_of(tokens), tokens.counts.values()
    assert sum(c.dropped for c in counts) == (4 if overflow == "trim_prompt" else 8)
    assert sum(c.trimmed for c in counts) == (4 if overflow == "trim_prompt" else 0)
    assert len(kept) == sum(c.rows for c in counts) == 16 - sum(c.dropped for c in counts)
    assert max(len(row["input_ids"]) for row in kept) <= 256
    for row in kept:
        assert row["input_ids"][0] == codec.start[0], "the start of sequence survives trimming"
        assert row["labels"][-1] == codec.end[-1]
        text = codec.text([row["input_ids"]])[0]
        number = text.partition("The end of ")[2][:1]
        assert f"and last {number}" in text if number else "yes" in text, "the prompt's last words are there"
    with pytest.raises(Refused, match=r"of 16 rows do not fit .*check\.max_dropped="):
        refuse(recipe, tokens)


def test_a_trimmed_prompt_keeps_its_start_and_its_newest_tokens(any_tokenizer: Path) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(any_tokenizer), "plain")
    (head,) = codec.prompts([" ".join(map(str, range(100)))])
    start = len(codec.start)
    assert codec.trimmed(head, start + 5) == head[:start] + head[-5:]
    assert codec.trimmed(head, start) is None, "nothing of the prompt would be left"


def test_a_prompt_in_a_chat_template_is_dropped_rather_than_beheaded(
    tmp_path: Path, chat_like: Path, write_recipe: Callable[..., Path]
) -> None:
    rows = [{"prompt": "long " * 300 + str(i), "output": "x"} for i in range(2)]
    rows += [{"prompt": f"fits {i}", "output": "yes"} for i in range(8)]
    _, codec, tokens = tokens_of(write_recipe(tmp_path, rows=rows, model=str(chat_like)))
    assert sum(c.dropped for c in tokens.counts.values()) == 2
    assert all(codec.tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user") for row in rows_of(tokens))


def test_a_chat_prompt_is_rendered_and_ends_with_the_turn(chat_like: Path) -> None:
    codec = codec_of(chat_like)
    (ids,) = codec.prompts(["Hi"])
    assert codec.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert codec.tokenizer.decode(codec.end) == "<|im_end|>"
    plain = Codec(codec.tokenizer, "plain")
    assert plain.tokenizer.decode(plain.prompts(["Hi"])[0]) == "Hi"


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


@pytest.mark.parametrize("template", [INST, TURNS])
@pytest.mark.parametrize("kind", ["sentencepiece_like", "metaspace_like", "gpt2_like"])
def test_an_answer_in_a_chat_template_is_what_the_template_itself_would_render(
    request: pytest.FixtureRequest, kind: str, template: str
) -> None:
    """Templates in the manner of Llama 2 (a space before the answer) and Gemma (an end of turn apart from EOS)."""
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(kind))
    tokenizer.chat_template = template
    if template == TURNS:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>", "</turn>"]})
    codec = Codec(tokenizer)
    (head,), (tail,) = codec.prompts(["Who is there?"]), codec.outputs(["Mira was there."])
    question = {"role": "user", "content": "Who is there?"}
    rendered = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    assert head == rendered
    written = codec._outputs.decode(tail + codec.end, skip_special_tokens=False)
    assert written == (" Mira was there. " + tokenizer.eos_token if template == INST else "Mira was there.</turn>")
    assert codec.text([tail]) == ["Mira was there."]
    assert codec.weights([Segment("a", "Mira", 1.0), Segment("b", " was there.", 2.0)])[-1] == 2.0


def test_chat_without_a_chat_template_is_refused(gpt2_like: Path) -> None:
    with pytest.raises(UserError, match="no chat template; write `plain`"):
        Codec(AutoTokenizer.from_pretrained(gpt2_like), "chat")


def test_a_normaliser_that_loses_spaces_is_counted_as_a_change(gpt2_like: Path) -> None:
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    codec = Codec(tokenizer)
    texts = [" went home.", "went home.", "e\u0301"]
    assert codec.unchanged(texts, codec.outputs(texts)) == [False, True, True]


def test_a_tokenizer_that_loses_spaces_is_refused(
    tmp_path: Path, sentencepiece_like: Path, write_recipe: Callable[..., Path]
) -> None:
    """As a folder has it whose config names a class of tokenizer that its files are not of."""
    from tokenizers import decoders

    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_like)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", ""), decoders.ByteFallback()])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="its tokenizer does not give back what it is given"):
        tokens_of(write_recipe(tmp_path))


def test_a_new_tokenizer_is_trained_on_the_training_side_alone(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    rows = [{"text": f"{i} Mira went to the mill."} for i in range(8)] + [{"text": "zqxzqxzqx " * 10}] * 2
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 256}
    new = {"model": config, "tokenizer": {"vocab_size": 300}, "lora": None, "template": "running_text"}
    merged = set()
    for seed in range(20):
        opened = Opened(load(write_recipe(tmp_path, rows, data={"seed": seed}, **new)))
        held_out = "zqx" in "".join(opened.tokens.test["reference"])
        known = any("zqx" in token for token in opened.tokenizer.get_vocab())
        assert known != held_out
        merged.add(known)
        if merged == {True, False}:
            break
    assert merged == {True, False}, "once it was held out, once not"


def test_an_end_token_that_the_tokenizer_reads_in_an_output_is_an_error(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    """A Unigram vocabulary holds `</s>` as an ordinary piece, which no setting keeps it from using."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [(letter, -5.0) for letter in '▁abcdefghijklmnopqrstuvwxyz0123456789.,;"?!\n OTM']
    unigram = Tokenizer(models.Unigram([("<unk>", -9.0), ("<s>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=unigram, **names).save_pretrained(tmp_path / "unigram")
    rows = [{"prompt": f"p{i}", "output": "stop </s> here"} for i in range(4)]
    with pytest.raises(UserError, match=r"rows.jsonl:1: the output holds the text of the end token"):
        tokens_of(write_recipe(tmp_path, rows=rows, model=str(tmp_path / "unigram")))


def test_a_chat_template_that_refuses_a_row_is_a_message_about_the_row(
    tmp_path: Path, chat_like: Path, write_recipe: Callable[..., Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_like)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"messages": asked}, {"messages": [{"role": "system", "content": "Be brief."}, *asked]}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: the chat template .* refuses it .*no system role"):
        tokens_of(write_recipe(tmp_path, rows=rows, template="chat"))


def test_no_row_stands_on_both_sides(tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]) -> None:
    rows = [{"prompt": f"opening {i % 10}", "output": f"end {i % 20}"} for i in range(60)]
    _, codec, tokens = tokens_of(write_recipe(tmp_path, rows=rows, model=str(gpt2_like)))
    held = {row["prompt"] for row in tokens.test}
    trained = {codec.tokenizer.decode(row["input_ids"][: row["labels"].count(MASKED)]) for row in tokens.train}
    assert held
    assert held.isdisjoint(trained)
    assert sum(c.duplicates for c in tokens.counts.values()) == 40


def test_records_that_share_any_key_stand_on_one_side(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    """Chains of records, each of which shares one key with the next: first and last are tied through the others."""
    (tmp_path / "chains.py").write_text(
        "from data_templates import Template\n"
        "def template():\n"
        "    return Template(fields={'prompt': '', 'output': ''}, prompt=lambda row: row['prompt'],\n"
        "                    completion=lambda row: row['output'],\n"
        "                    keys=lambda row: [f\"{row['chain']} {row['link'] + i}\" for i in range(2)])\n"
    )
    links = [(k, c) for k in (0, 2, 4, 1, 3) for c in range(6)]  # pairs are tied before what ties them to others
    rows = [{"chain": c, "link": k, "prompt": f"chain {c} link {k}", "output": "x"} for k, c in links]
    for seed in range(3):
        file = write_recipe(tmp_path, rows, model=str(gpt2_like), template=str(tmp_path / "chains.py"))
        held = [row["prompt"].split()[1] for row in tokens_of(file, f"data.seed={seed}")[2].test]
        assert held
        assert all(held.count(chain) == 5 for chain in held)


def test_the_split_follows_the_rows_and_not_their_order(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"opening {i}", "output": f"end {i}"} for i in range(40)]
    held = []
    for order in (rows, rows[::-1]):
        tokens = tokens_of(write_recipe(tmp_path, rows=order, model=str(gpt2_like)))[2]
        held.append({row["prompt"] for row in tokens.test})
    other = tokens_of(write_recipe(tmp_path, rows=rows, model=str(gpt2_like), data={"seed": 1}))[2]
    assert held[0] == held[1] != {row["prompt"] for row in other.test}
    assert len(held[0]) == 10


def test_training_rows_that_the_test_file_has_too_are_left_out_and_counted(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    test = [{"prompt": f"p{i}", "output": "same"} for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    rows = [{"prompt": f"p{i}", "output": "same" if i < 3 else "other"} for i in range(20)]
    file = write_recipe(tmp_path, rows=rows, model=str(gpt2_like), data={"test": str(tmp_path / "test.jsonl")})
    counts = tokens_of(file)[2].counts
    assert (counts["train"].repeated, counts["train"].rows, counts["test"].rows) == (3, 17, 5)


def test_many_batches_give_the_rows_and_counts_of_one(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"p{i}" * (1 + i % 7), "output": f"x {i % 19}\ufffd" if i % 5 == 0 else "same"} for i in range(90)
    ]
    rows[70]["output"] = "long " * 300
    path, found = write_recipe(tmp_path, rows=rows, model=str(gpt2_like)), []
    for i, (batch, letters, together) in enumerate([(1024, 2**24, 2**22), (3, 2**24, 100), (1024, 20, 1)]):
        monkeypatch.setattr("sft.tokens.prepare.BATCH_ROWS", batch)
        monkeypatch.setattr("sft.tokens.prepare.BATCH_CHARACTERS", letters)
        monkeypatch.setattr("sft.tokens.prepare.PIECE_BYTES", together)
        tokens = tokens_of(path, "trainer.max_length=128", f"output={tmp_path}/{i}/run")[2]
        found.append((rows_of(tokens), tokens.counts))
    assert sum(c.dropped for c in tokens.counts.values()) == 1
    assert sum(c.damaged for c in tokens.counts.values()) == 17
    assert found[0] == found[1] == found[2]


def test_a_side_whose_records_make_no_row_is_named(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    (tmp_path / "some.py").write_text(
        "from data_templates import Template\n\n\n"
        "def template():\n"
        "    return Template({'prompt': '', 'output': ''}, lambda r: r['prompt'], lambda r: r['output'],\n"
        "                    samples=lambda record: [record] if 'kept' in record['prompt'] else [])\n"
    )
    (tmp_path / "test.jsonl").write_text('{"prompt": "none", "output": "of these"}\n')
    rows = [{"prompt": f"kept {i}", "output": "x"} for i in range(5)]
    data = {"test": str(tmp_path / "test.jsonl")}
    recipe = write_recipe(tmp_path, rows=rows, model=str(gpt2_like), template=str(tmp_path / "some.py"), data=data)
    with pytest.raises(UserError, match=r"no row is left to hold out; the template makes no row of its records"):
        tokens_of(recipe)


def test_an_edited_file_is_never_read_from_an_old_cache(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"p{i}", "output": "first"} for i in range(8)]
    first = tokens_of(write_recipe(tmp_path, rows=rows, model=str(gpt2_like)))[2]
    again = tokens_of(write_recipe(tmp_path, rows=rows, model=str(gpt2_like)))[2]
    rows[0]["output"] = "other"
    edited = tokens_of(write_recipe(tmp_path, rows=rows, model=str(gpt2_like)))[2]
    assert first.digests == again.digests != edited.digests


@pytest.mark.parametrize("when", ["at load", "when called"])
def test_a_file_that_is_read_for_a_late_row_alone_makes_other_tokens(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path], when: str
) -> None:
    """The first records, which are read again each time, are the same as before."""
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "from data_templates import Template\n"
        "HINT = Path(__file__).with_name('hint.txt')\n"
        + ("TEXT = HINT.read_text()\n" if when == "at load" else "")
        + "def completion(row):\n"
        f"    return row['output'] + {'TEXT' if when == 'at load' else 'HINT.read_text()'} * ('7' in row['prompt'])\n"
        "def template():\n"
        "    return Template(fields={'prompt': ''}, prompt=lambda row: row['prompt'], completion=completion)\n"
    )
    (tmp_path / "hint.txt").write_text(" as before")
    rows = [{"prompt": f"p{i}", "output": "x"} for i in range(10)]
    file = write_recipe(tmp_path, rows, model=str(gpt2_like), template=str(tmp_path / "own.py"))
    first = tokens_of(file)[2].digests
    assert tokens_of(file)[2].digests == first
    (tmp_path / "hint.txt").write_text(" and after")
    assert tokens_of(file)[2].digests != first


def test_another_tokenizer_or_option_is_another_cache(
    tmp_path: Path, gpt2_like: Path, neox_like: Path, write_recipe: Callable[..., Path]
) -> None:
    changes: list[dict[str, Any]] = [
        {"model": str(gpt2_like)},
        {"model": str(neox_like)},
        {"model": str(gpt2_like), "template_options": {"separator": " "}},
        {"model": str(gpt2_like), "trainer": {"max_length": 100}},
    ]
    for change in changes:
        tokens_of(write_recipe(tmp_path, **change))
    assert len([*(tmp_path / "runs" / ".tokens").iterdir()]) == len(changes)


def test_damaged_texts_are_counted_with_their_first_row(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"p{i}", "output": "fine"} for i in range(20)]
    rows[3]["output"] = "lost \ufffd byte"
    rows[4]["output"] = "bell \x07"
    rows[5]["prompt"] = "cafÃ© au lait"
    recipe, _, tokens = tokens_of(write_recipe(tmp_path, rows=rows, model=str(gpt2_like)))
    assert sum(sum(c.suspicious.values()) for c in tokens.counts.values()) == 3
    (problem,) = problems(recipe, tokens)
    assert problem.startswith("3 of 20 rows hold text that looks damaged (15.00%, allowed are 1.00%; the first: ")
    assert "check.max_damaged=0.15" in problem
    assert not problems(load(tmp_path / "recipe.yaml", ["check.max_damaged=0.15"]), tokens)


def test_seams_that_would_merge_are_counted(tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]) -> None:
    rows = [{"prompt": f"{i} Mira went to the ", "output": "well, the well"} for i in range(8)]
    rows += [{"prompt": f"{i} Mira went to the", "output": " well, the well"} for i in range(4)]
    file = write_recipe(tmp_path, rows=rows, model=str(gpt2_like), template_options={"separator": ""})
    assert sum(c.seams for c in tokens_of(file)[2].counts.values()) == 8


def test_segments_weigh_what_they_say_and_zero_masks(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    (tmp_path / "parts.py").write_text(
        "from data_templates import Segment, Template\n"
        "def template():\n"
        "    parts = [Segment('plain', 'one two'), Segment('new', ' three four', 2.0), Segment('not', ' five', 0.0)]\n"
        "    return Template(fields={'prompt': ''}, prompt=lambda row: row['prompt'], completion=lambda row: parts)\n"
    )
    _, codec, tokens = tokens_of(write_recipe(tmp_path, model=str(gpt2_like), template=str(tmp_path / "parts.py")))
    assert tokens.counts["train"].weighted == len(tokens.train)
    for row in tokens.train:
        weights, labels = row["weights"], row["labels"]
        assert set(weights) == {0.0, 1.0, 2.0}
        assert [label == MASKED for label in labels] == [weight == 0 for weight in weights]
        assert codec.text([[i for i, w in zip(row["input_ids"], weights, strict=True) if w == 2]]) == [" three four"]
        assert weights[-1] == 1, "the end token weighs as an ordinary one"


def test_packing_keeps_labels_and_never_trains_across_a_border(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    _, codec, tokens = tokens_of(write_recipe(tmp_path, model=str(gpt2_like)))
    packed = pack_dataset(tokens.train, 256, "bfd")
    assert sum(len(row["seq_lengths"]) for row in packed) == len(tokens.train)
    whole = sorted(map(tuple, tokens.train["input_ids"]))
    documents = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            documents.append((tuple(row["input_ids"][start : start + length]), row["labels"][start]))
            start += length
    assert sorted(ids for ids, _ in documents) == whole, "no document is cut or lost"
    batch = DataCollatorForLanguageModeling(codec.end[0], padding_free=True)([dict(row) for row in packed])
    starts = batch["position_ids"][0] == 0
    assert int(starts.sum()) == len(tokens.train)
    assert (batch["labels"][0][starts] == MASKED).all(), "the last token of one document does not predict the next one"


REAL = ["tokenizers/gpt2", "tokenizers/gpt-neox-20b", "tokenizers/mistral-v1", "models/stories260K"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_promises_hold_on_real_tokenizers_and_rows(
    tmp_path: Path, real_data: Path, write_recipe: Callable[..., Path], name: str
) -> None:
    for source in ("fairytale_continuation/test.jsonl", "zh_xiehouyu/pairs.jsonl"):
        with (real_data / "datasets" / source).open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream][:300]
        file = write_recipe(tmp_path, rows=rows, model=str(real_data / name), trainer={"max_length": 4096})
        recipe, codec, tokens = tokens_of(file)
        counts = tokens.counts.values()
        assert sum(c.rows for c in counts) == len(rows)
        assert sum(c.changed for c in counts) == 0
        assert all(c.ended == c.rows for c in counts)
        for row in tokens.test:
            ids = asked(recipe, codec, {"prompt": row["prompt"].removesuffix("\n")})
            assert ids == row["input_ids"][: row["prompt_tokens"]]


def test_rows_are_arrow_files_on_disk(prepared: tuple[Recipe, Codec, Tokens]) -> None:
    assert isinstance(prepared[2].train, Dataset)
    assert prepared[2].train.cache_files


@pytest.fixture
def letters_alone(tmp_path: Path) -> Path:
    """Folder of a Unigram tokenizer without byte fallback: what is neither an ASCII letter nor a sign is `<unk>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [(chr(i), -5.0) for i in range(33, 127)] + [("▁", -5.0), ("\n", -5.0)]
    unigram = Tokenizer(models.Unigram([("<unk>", -9.0), ("<s>", -99.0), ("</s>", -99.0), *letters], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=unigram, **names).save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_that_the_tokenizer_does_not_give_back_are_counted_and_refused(
    tmp_path: Path, letters_alone: Path, write_recipe: Callable[..., Path], chat: bool
) -> None:
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(letters_alone)
        tokenizer.chat_template = INST
        tokenizer.save_pretrained(letters_alone)
    rows = [{"prompt": f"opening {i}", "output": f"end {i}"} for i in range(18)]
    rows += [{"prompt": "从前有座山", "output": "A hill."}, {"prompt": "the café", "output": "closed"}]
    recipe, _, tokens = tokens_of(write_recipe(tmp_path, rows, model=str(letters_alone)))
    assert sum(c.prompts_changed for c in tokens.counts.values()) == 2
    assert sum(c.changed for c in tokens.counts.values()) == 0
    with pytest.raises(Refused, match=r"2 of 20 prompts are not given back .* the first: .*:(19: '从前|20: 'the café)"):
        refuse(recipe, tokens)
    refuse(load(tmp_path / "recipe.yaml", ["check.max_prompts_changed=0.1"]), tokens)


@given(prompt=TEXT)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prompt_that_is_not_lost_is_given_back(any_tokenizer: Path, prompt: str) -> None:
    codec = codec_of_cached(any_tokenizer)
    written = codec.rendered([prompt.replace("▁", "")])
    assert codec.prompts_unchanged(written, codec.prompts([prompt.replace("▁", "")])) == [True]


def test_a_normaliser_that_lowers_a_prompt_is_counted_as_a_change(gpt2_like: Path) -> None:
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    codec, prompts = Codec(tokenizer), ["Mira", "mira", "e\u0301", ""]
    assert codec.prompts_unchanged(codec.rendered(prompts), codec.prompts(prompts)) == [False, True, True, True]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cafÃ© au lait", "mojibake"),
        ("the dogâ€™s", "mojibake"),
        ("the dog\x92s", "mojibake"),
        ("the dogâ\x80\x99s", "mojibake"),
        ("ðŸ˜€", "mojibake"),
        ("Ã‰cole", "mojibake"),
        ("caf\ufffd", "replacement character"),
        ("a\x00b", "control character"),
        ("one\r\ntwo", "carriage return"),
        ("one\rtwo", "carriage return"),
    ],
)
def test_what_looks_wrong_in_a_text_is_named(text: str, what: str) -> None:
    (found,) = looks(text, None)
    assert what in found


@pytest.mark.parametrize(
    "text",
    ["«voilà»", "voilà\u00a0»", "NÃO, AMANHÃ”", "AMANHÃ…", "Âge, âge", "naïve café €5", "从前", "one\n\ttwo", "ð Ÿ"],
)
def test_what_is_written_right_looks_right(text: str) -> None:
    assert looks(text, None) == []


def test_carriage_returns_are_counted_with_their_first_row_and_never_refused(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"p{i}", "output": f"def f():\r\n    return {i}"} for i in range(20)]
    recipe, _, tokens = tokens_of(write_recipe(tmp_path, rows, model=str(gpt2_like)))
    (what,) = {what for c in tokens.counts.values() for what in c.suspicious}
    assert what.startswith("a carriage return")
    assert sum(c.suspicious[what] for c in tokens.counts.values()) == 20
    assert any("rows.jsonl:1: 'def f():\\r\\n" in c.examples[what] for c in tokens.counts.values())
    assert sum(c.damaged for c in tokens.counts.values()) == 0
    assert problems(recipe, tokens) == []


PARTS = [
    Segment("plain", "one "),
    Segment("new", "two three\n", 2.0),
    Segment("none", "\tfour", 0.0),
    Segment("é", " 五é", 3),
]


def weighs_where_it_begins(codec: Codec) -> None:
    text = "".join(segment.text for segment in PARTS)
    (ids,) = codec.outputs([text])
    begins = [len(codec.text([ids[:i]])[0].rstrip("\ufffd")) for i in range(len(ids))]
    assert codec.text([ids]) == [text]
    of = [segment.weight for segment in PARTS for _ in segment.text]
    assert codec.weights(PARTS) == [of[begin] for begin in begins]
    assert set(codec.weights(PARTS)) == {0, 1, 2, 3}


def test_a_token_weighs_as_the_segment_that_it_begins_in(any_tokenizer: Path) -> None:
    weighs_where_it_begins(Codec(codec_of_cached(any_tokenizer).tokenizer, "plain"))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "mistral-v1"])
def test_a_token_of_a_real_tokenizer_weighs_as_the_segment_that_it_begins_in(real_data: Path, name: str) -> None:
    """GPT-NeoX's own offsets leave the space before a word out of its token."""
    weighs_where_it_begins(codec_of(real_data / "tokenizers" / name))


def test_offsets_that_leave_out_spaces_change_no_weight(neox_like: Path) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(neox_like)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    weighs_where_it_begins(Codec(tokenizer))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("Segment('a', 'went to th', 0.0), Segment('tail', 'e', 1.0)", "weight 1: "),
        ("Segment('a', 'to th'), Segment('tail', 'e', 2.0), Segment('b', ' well')", "weight 2: "),
        ("Segment('a', 'to th'), Segment('tail', 'e', 1.0), Segment('b', ' well', 2.0)", None),  # learned as it says
        ("Segment('a', 'to th', 2.0), Segment('empty', '', 1.0), Segment('b', ' well', 2.0)", None),
        ("Segment('a', 'to th'), Segment('tail', 'e', 0.0), Segment('b', ' well', 2.0)", None),  # shall not be learned
    ],
)
def test_a_segment_of_which_no_token_is_learned_is_an_error(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path], parts: str, said: str | None
) -> None:
    (tmp_path / "parts.py").write_text(
        "from data_templates import Segment, Template\n"
        "def template():\n"
        "    return Template(fields={'prompt': ''}, prompt=lambda row: row['prompt'],\n"
        f"                    completion=lambda row: [{parts}] if row['odd'] else row['prompt'])\n"
    )
    rows = [{"prompt": f"p{i}", "odd": i == 6} for i in range(8)]
    file = write_recipe(tmp_path, rows, model=str(gpt2_like), template=str(tmp_path / "parts.py"))
    if said is None:
        assert sum(c.weighted for c in tokens_of(file)[2].counts.values()) == 1
        return
    with pytest.raises(UserError, match=rf"rows\.jsonl:7: no token begins in segment `tail` \('e'\), .*{said}"):
        tokens_of(file)
