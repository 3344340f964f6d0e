"""`sft generate`: text comes token by token in whole letters, is that of transformers, and is asked in many ways."""

import builtins
import json
import os
import pty
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROWS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from data_templates import Template
from sft.cli import main
from sft.model.adapter import in_weights
from sft.model.load import decoding
from sft.recipe import Recipe, load
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.write.ask import Conversation, ask, from_terminal, open_run
from sft.write.generate import read, write
from sft.write.next import explore, readable
from sft.write.stream import Text, TextBatch, _settled, processors, stream

PROMPTS = [[5, 6, 7], [9, 3, 17] * 10, [4, 8, 11, 3, 6], [77]]
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300,
                         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MLP, GROUPED = {"intermediate_size": 64}, {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {}, "openai-gpt": {}, "gpt_bigcode": {}, "falcon": {}, "gpt_neox": MLP, "llama": MLP, "qwen2": GROUPED,
    "gemma": GROUPED, "mistral": GROUPED | {"sliding_window": 12}, "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2, "window_size": 12},
}  # fmt: skip
"""The architectures of the recipes, those that attend to a window with one that the texts are longer than."""

TEXTS = ["从前有座山，山上有座庙。", "naïve café, “quotes” — 🦊 and 👩‍👩‍👧", "plain text", " 小明 12 \n\n the end"]


def numbers() -> Any:
    """Stands in for a codec where texts are of no interest: a token's text is its number."""
    tokenizer = SimpleNamespace(convert_ids_to_tokens=str)
    return SimpleNamespace(
        end=[2], lead="", tokenizer=tokenizer, text=lambda rows: [" ".join(map(str, r)) for r in rows]
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_texts_that_join_and_leave_each_other_are_those_written_alone(kind: str) -> None:
    set_seed(0)
    sizes = {
        k: v for k, v in SMALL.items() if kind != "gpt_neo" or k not in ("num_hidden_layers", "num_attention_heads")
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | ARCHITECTURES[kind]))).eval()
    for weight in model.parameters():
        weight.data *= 3  # what is attended to shall decide
    config = GenerationConfig(max_new_tokens=24, no_repeat_ngram_size=1, eos_token_id=2, pad_token_id=0)
    alone = [
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=config)[
            0, len(ids) :
        ]
        for ids in PROMPTS
    ]
    first, second, third, last = texts = [Text(numbers(), ids, config, 0) for ids in PROMPTS]
    batch, gone = TextBatch(model), Text(numbers(), [3] * 40, config, 0)
    for text in (first, gone, second, third):
        batch.join(text)
        batch.step()
    batch.leave(gone)
    batch.step()
    batch.join(last)
    while batch.texts:
        batch.step()
    assert [text.written for text in texts] == [ids.tolist() for ids in alone]
    assert len({token for text in texts for token in text.written}) > 20
    assert not gone.end


@pytest.mark.parametrize("text", TEXTS)
def test_text_only_grows_and_by_whole_letters(any_tokenizer: Path, text: str) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(any_tokenizer))
    ids, shown = codec.outputs([text])[0] + codec.end, ""
    for size in range(1, len(ids)):
        now = _settled(codec, ids[:size])
        assert now.startswith(shown)
        assert "\ufffd" not in now
        shown = now
    whole, ended = read(codec, ids)
    assert ended
    assert whole.startswith(shown)
    assert len(whole) - len(shown) < 30


def test_a_byte_that_is_no_letter_is_shown_once_that_is_certain(gpt2_like: Path) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(gpt2_like))
    start, letter = codec.outputs(["小"])[0][0], codec.outputs(["a"])[0][0]
    assert _settled(codec, [letter, start]) == "a"
    assert _settled(codec, [letter, start, letter]) == "a\ufffda"
    assert read(codec, [letter, start]) == ("a\ufffd", False)


def test_an_end_of_several_tokens_is_no_part_of_the_text(gpt2_like: Path) -> None:
    """A chat template in the manner of Llama 2, where a space stands before the end token."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    codec = Codec(tokenizer)
    assert len(codec.end) == 2
    ids = codec.outputs(["Mira was there."])[0]
    assert read(codec, ids + codec.end + [5, 6]) == ("Mira was there.", True)
    assert read(codec, ids + codec.end[-1:]) == ("Mira was there.", True), "a model may leave out the space"


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"do_sample": True},
        {"do_sample": True, "temperature": 0.4}, {"do_sample": True, "top_k": 3}, {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_p": 0.3, "top_k": 0}, {"do_sample": True, "top_p": 0.0, "top_k": 0},
        {"do_sample": True, "min_p": 0.2},
        {"do_sample": True, "typical_p": 0.4},
        {"do_sample": True, "temperature": 2.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
)  # fmt: skip
def test_scores_are_those_of_generate(tuned: Recipe, settings: dict[str, Any]) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(tuned.model))
    model = AutoModelForCausalLM.from_pretrained(tuned.model)
    model.generation_config = GenerationConfig()
    config = decoding(tuned.model_copy(update={"generation": {"max_new_tokens": 6} | settings}), codec)
    ids = codec.prompts(["Mira went to the mill and Mira went"])[0]
    theirs = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=config,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    change = processors(config)
    for step, (scores, logits) in enumerate(zip(theirs.scores, theirs.logits, strict=True)):
        assert torch.equal(change(theirs.sequences[:, : len(ids) + step], logits), scores)


def test_stop_texts_end_the_text_and_are_never_shown(tuned: Recipe) -> None:
    answerer = open_run(tuned)
    opened = answerer.opened
    ids = opened.codec.prompts(["Mira went to the well and found a map."])[0]
    config = decoding(tuned, opened.codec)
    whole = "".join(stream(answerer.model, Text(opened.codec, ids, config, 0)))
    stop = whole[10:14]
    text = Text(opened.codec, ids, config, 0, ["never there", stop])
    pieces = list(stream(answerer.model, text))
    assert "".join(pieces) == whole[: whole.index(stop)] == text.text
    assert text.end == "stop"
    unseen = Text(opened.codec, ids, config, 0, [whole[-3:] + "?"])
    assert "".join(stream(answerer.model, unseen)) == whole, "what was held back in vain is given at the end"


def only(token: int) -> torch.Tensor:
    """Logits of which one token alone is likely."""
    return torch.nn.functional.one_hot(torch.tensor(token), 20).float()


def test_of_two_stop_texts_in_one_token_the_first_ends_the_text() -> None:
    text = Text(numbers(), [3], GenerationConfig(max_new_tokens=5), 0, ["7", "1"])
    text.take(only(17))
    assert (text.text, text.end) == ("", "stop")


@pytest.mark.parametrize(("then", "shown", "end"), [(7, "5", "stop"), (8, "5 1 8", None)])
def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_one_or_not(
    then: int, shown: str, end: str | None
) -> None:
    text = Text(numbers(), [3], GenerationConfig(max_new_tokens=5), 0, [" 1 7"])
    text.take(only(5))
    text.take(only(1))
    assert (text.news(), text.end) == ("5", None)
    text.take(only(then))
    assert ("5" + text.news(), text.end) == (shown, end)


def test_pieces_join_to_what_evaluation_writes(tuned: Recipe) -> None:
    answerer = open_run(tuned)
    opened = answerer.opened
    questions = ["Mira went to the well and found a map.", "小明 went home.", "Tom"]
    prompts = opened.codec.prompts([f"{question}\n" for question in questions])
    written = write(answerer.model, opened.codec, prompts, decoding(tuned, opened.codec), 4096)
    for question, (text, ended) in zip(questions, written, strict=True):
        pieces = list(ask(answerer, [question]))
        assert "".join(piece.text for piece in pieces) == text
        assert pieces[-1].end == ("stop" if ended else "length")
        assert len(pieces) > 2
    assert any(ended for _, ended in written)


def test_the_seed_decides_what_is_drawn(tuned: Recipe) -> None:
    def drawn(seed: int) -> list[str]:
        recipe = load(tuned.folder / "recipe.yaml", ["generation.do_sample=true", "generation.temperature=1.5",
                                                     f"eval.seed={seed}"])  # fmt: skip
        pieces = list(ask(open_run(recipe), ["Mira", "Mira"]))
        end = next(i for i, piece in enumerate(pieces) if piece.end) + 1
        return ["".join(piece.text for piece in part) for part in (pieces[:end], pieces[end:])]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1)[0] != drawn(1)[1], "asked again, it answers anew"


def test_options_replace_the_generation_section(tuned: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tuned.folder)

    def out(*options: str) -> str:
        assert main(["generate", run, "--prompt", "Mira went home.", *options]) == 0
        return capsys.readouterr().out

    greedy = out()
    assert out("--temperature", "1.5", "--seed", "3") == out("--temperature", "1.5", "--seed", "3") != greedy
    assert out("--top-k", "1") == greedy, "drawing from one token"
    assert out("generation.do_sample=true", "generation.temperature=5.0", "--greedy") == greedy
    assert out("generation.do_sample=true", "generation.top_p=0.9", "--temperature", "0") == greedy
    assert len(out("--max-new-tokens", "3")) < len(greedy)
    assert out("--repetition-penalty", "2") != greedy
    assert out("generation.num_beams=2", "generation.stop_strings=[xyz]"), "what cannot be streamed comes whole"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "`generation.temperature` is -1.0; it takes a number above 0"),
        (["--top-p", "3"], "`generation.top_p` is 3.0; it takes a number from 0 to 1"),
        (["--top-k", "-1"], "`generation.top_k` is -1; it takes a whole number from 0 up"),
        (["generation.top_k=2.5"], "`generation.top_k` is 2.5; it takes a whole number or null"),
        (["--max-new-tokens", "300"], "300 new tokens leave no room for a prompt within the 256 tokens"),
        (["--samples", "2"], "greedy decoding writes the same each time; give --temperature 1"),
        (["--steps", "2"], "has no `next_row`"),
        (["--greedy", "--top-k", "5"], "draws nothing: take --top-k away"),
        (["--next", "3", "--samples", "2"], "take --samples and --steps away"),
        (["--seed", "-1"], "`eval.seed` is -1"),
    ],
)
def test_options_that_cannot_be_followed_are_told_in_one_message(
    tuned: Recipe, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["generate", str(tuned.folder), "--prompt", "x", *options]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_an_answer_that_was_cut_off_is_told_apart(tuned: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["generate", str(tuned.folder), "--prompt", "Tom went to the mill and found a lantern."]
    assert main([*prompt, "--max-new-tokens", "5"]) == 0
    assert "cut off at the limit" in capsys.readouterr().err
    assert main([*prompt, "--max-new-tokens", "200"]) == 0
    assert "cut off" not in capsys.readouterr().err


def test_a_file_holds_prompts_and_rows(tuned: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = str(tuned.folder), tmp_path / "asked.txt"
    assert main(["generate", run, "--prompt", "小明 went home."]) == 0
    one = capsys.readouterr().out
    file.write_text('小明 went home.\n{"prompt": "小明 went home."}\n', encoding="utf-8-sig")
    assert main(["generate", run, "--file", str(file)]) == 0
    assert capsys.readouterr().out == one * 2
    file.write_bytes("小明".encode("gb18030"))
    assert main(["generate", run, "--file", str(file)]) == 2
    assert main(["generate", run, "--file", str(tmp_path / "gone.txt")]) == 2
    file.write_text('Once.\n{"prompt"\n', encoding="utf-8")
    assert main(["generate", run, "--file", str(file)]) == 2
    errors = capsys.readouterr().err
    assert "not UTF-8; save it as UTF-8\n" in errors
    assert "gone.txt: No such file" in errors
    assert "asked.txt:2: the row is broken JSON at column 10" in errors


def test_a_folder_outside_its_run_answers_as_the_run(tuned: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    from sft.merge import MergeOptions, merge

    folder = merge(tuned, MergeOptions())
    capsys.readouterr()
    for place in (folder, tuned.folder):
        assert main(["generate", str(place), "--prompt", "Tom went home."]) == 0
    merged, _, run = capsys.readouterr().out.partition("\n")
    assert f"{merged}\n" == run
    assert main(["generate", str(folder), "--prompt", "Tom went home.", "--base"]) == 2
    assert "holds no base model" in capsys.readouterr().err


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`types(line, ...)` stands in for the person, who then presses Ctrl-D; gives the signs that are shown."""

    def begin(*lines: str) -> list[str]:
        left, signs = list(lines), list[str]()

        def read_line(sign: str = "") -> str:
            signs.append(sign)
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr(builtins, "input", read_line)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        return signs

    return begin


def test_a_terminal_is_asked_for_each_field_that_the_prompt_reads(
    types: Callable[..., list[str]], tuned: Recipe
) -> None:
    signs = types("Name it.", "It carries its house.", "Why?", "", "half a row")
    alpaca = Opened(tuned.model_copy(update={"template": "alpaca"})).template
    rows = list(from_terminal(alpaca))
    assert rows == [{"instruction": "Name it.", "input": "It carries its house."}, {"instruction": "Why?"}]
    assert signs[:2] == ["instruction> ", "input> "]
    types("Once.", "", "Twice.")
    assert list(from_terminal(Opened(tuned).template)) == ["Once.", "", "Twice."]
    types('["a", 1]', "[b", "text", "more")
    listed = Template(fields={"words": "", "style": ""}, prompt=lambda row: f"{row['words']}{row['style']}",
                      completion=str, example={"words": ["a"], "style": "b"})  # fmt: skip
    assert list(from_terminal(listed)) == [{"words": ["a", 1], "style": "[b"}, {"words": "text", "style": "more"}]


def test_next_shows_the_probabilities_of_the_model(tuned: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tuned.folder), "--prompt", "Mira went home.", "--next", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    answerer = open_run(tuned)
    opened = answerer.opened
    with torch.no_grad():
        logits = answerer.model(torch.tensor(opened.codec.prompts(["Mira went home.\n"]))).logits[0, -1]
    share, token = logits.softmax(-1).max(-1)
    assert lines[0].split()[:1] == ["1"]
    assert readable(opened.codec, int(token)) in lines[0]
    assert f" {int(token)}  {share:>6.1%}" in lines[0]
    assert main(["generate", str(tuned.folder), "--prompt", "M", "--next", "2", "--top-k", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("  100.0%  ████████████████████████")


def test_next_goes_on_by_hand(
    tuned: Recipe, types: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = open_run(tuned)
    opened = answerer.opened
    end = readable(opened.codec, opened.codec.end[-1])
    types("小明", "", " and")
    explore(answerer, ["Mira went home."], 600, by_hand=True)
    out = capsys.readouterr().out
    assert len(re.findall("^  1  ", out, re.M)) == 4, "a table at first, and after each line"
    shown = [line for line in out.splitlines() if line.startswith("小明")]
    assert len(shown) == 3
    assert shown[0] == "小明"
    assert shown[1].startswith(shown[0])
    assert shown[2] == f"{shown[1]} and"
    place = next(f"#{line.split()[0]}" for line in out.splitlines() if end in line)
    types(place, "never read")
    explore(answerer, ["Mira went home."], 600, by_hand=True)
    assert len(re.findall("^  1  ", capsys.readouterr().out, re.M)) == 1, "after the end token there is no next one"


def test_tokens_are_shown_readably(tuned: Recipe, sentencepiece_like: Path) -> None:
    codec = open_run(tuned).opened.codec
    assert readable(codec, codec.outputs(["\n"])[0][0]) == '"\\n"'
    assert readable(codec, codec.end[-1]) == "<|endoftext|> (end)"
    assert "\ufffd" not in readable(codec, codec.outputs(["座"])[0][0])
    pieces = Codec(AutoTokenizer.from_pretrained(sentencepiece_like))
    assert readable(pieces, pieces.tokenizer.convert_tokens_to_ids("<0xE5>")) == "<0xE5>"


CHATS = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["output"]}] for row in ROWS]


def test_a_terminal_remembers_the_turns_of_a_chat(
    tmp_path: Path, chat_like: Path, tiny_model: Any, write_recipe: Any, types: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from sft.train.stage import train

    tiny_model(tmp_path / "model", chat_like, "llama", initializer_range=0.2)
    rows = [{"messages": chat} for chat in CHATS]
    trainer = {"max_steps": 40, "learning_rate": 2e-2}
    train(load(write_recipe(tmp_path, rows, template="chat", trainer=trainer, generation={"max_new_tokens": 40})))
    types("Tom went to the mill.", "And why?", "", "And why?")
    read_line, mark = builtins.input, "\x1e\n"
    monkeypatch.setattr(builtins, "input", lambda sign: print(end=mark) or read_line(sign))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    capsys.readouterr()
    run = str(tmp_path / "runs" / "run")
    assert main(["generate", run]) == 0
    shown = capsys.readouterr()
    assert "an empty line begins a new conversation" in shown.err
    first, second, alone = (answer.removesuffix("\n") for answer in shown.out.split(mark) if answer)
    turns = [("user", "Tom went to the mill."), ("assistant", first), ("user", "And why?")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert main(["generate", run, "--row", json.dumps(row)]) == 0
    assert capsys.readouterr().out == f"{second}\n"
    assert main(["generate", run, "--prompt", "And why?"]) == 0
    assert capsys.readouterr().out == f"{alone}\n"
    assert alone != second


def test_an_empty_answer_is_not_remembered(types: Callable[..., list[str]], tuned: Recipe) -> None:
    types("One.", "Two.", "Three.")
    conversation = Conversation(Opened(tuned.model_copy(update={"template": "chat"})).template)
    questions = conversation.questions()
    assert [turn["content"] for turn in next(questions)["messages"]] == ["One."]
    conversation.answered(" ")
    assert [turn["content"] for turn in next(questions)["messages"]] == ["Two."]
    conversation.answered("Yes.")
    assert [turn["content"] for turn in next(questions)["messages"]] == ["Two.", "Yes.", "Three."]


@pytest.mark.slow
def test_a_terminal_shows_a_sign_and_ctrl_d_ends(tuned: Recipe) -> None:
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-m", "sft", "generate", str(tuned.folder), "--max-new-tokens", "9"])
    shown = b""
    for line in ("Mira went home.\n", "小明 went home.\n", "\x04"):
        shown += _until(terminal, b"> ")
        os.write(terminal, line.encode())
    shown += _until(terminal, None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert shown.count(b"cut off") == 2
    assert b"Traceback" not in shown


def _until(terminal: int, sign: bytes | None) -> bytes:
    """What a terminal shows, up to a sign or to its end."""
    shown = b""
    while sign is None or not shown.endswith(sign):
        try:
            shown += os.read(terminal, 1)
        except OSError:
            break
    return shown


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_an_adapter_is_merged_for_speed_only_where_the_model_stays_the_same(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], targets: list[str]
) -> None:
    """In a model with a tied head, the sum of an adapted embedding would change the head as well."""
    from peft import LoraConfig, get_peft_model

    folder = tiny_model(tmp_path / "model", gpt2_like, "llama", tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    ids = torch.arange(20)[None] + 40
    with torch.no_grad():
        apart = model.eval()(ids).logits
        with in_weights(model):
            assert torch.allclose(model(ids).logits, apart, atol=1e-3)
        assert torch.allclose(model(ids).logits, apart, atol=1e-3)
