"""The command line. Stages are named as text and imported when they run, so that `sft --help` answers at once."""

import argparse
import atexit
import gc
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from sft import UserError
from sft.decoding import DRAWN, SETTINGS, drawing

STAGES = {
    "train": "sft.train.stage:train",
    "eval": "eval.evaluate:evaluate_run",
    "score": "eval.evaluate:score_run",
    "report": "eval.report:report",
}
CLASSIFICATION = {"eval": "eval.classification:evaluate_run", "score": "eval.classification:score_run"}
"""The stages that `task: classification` has of its own."""

COMMANDS = {
    "before training": {
        "recipes": "list the shipped recipes with what they take",
        "templates": "list the dataset templates with an example each",
        "fit": "what a recipe takes on a GPU and on the disk, before a weight is downloaded",
        "check": "read every row, and show what training would see",
    },
    "a run": {
        "train": "train the recipe into its run folder",
        "eval": "let base and tuned model write on the held-out rows, and score them",
        "score": "score again what they wrote, without a model",
        "report": "write report.html, and print the same table",
    },
    "its result": {
        "generate": "what the tuned model writes after a prompt",
        "serve": "answer requests as OpenAI's API does",
        "merge": "write the trained model as one ordinary folder, and prove it equal",
        "export": "write the trained model as other programs read it",
    },
    "for scripts and editors": {
        "bases": "list the recipes to train for this one, it last, with their settings",
        "schema": "print the JSON Schema of recipes",
        "add-facts": "keep a model's config, so that `fit` knows it without the hub",
    },
}
"""Commands in the order in which a person uses them."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
ROUTES = ("dequantized", "original")
"""How a model is merged; `sft.merge.MergeOptions` says what they mean."""
ABOUT = {name: text for group in COMMANDS.values() for name, text in group.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0; 2 after a mistake the user can mend; 1 where `check` refuses,
    or `fit` finds that no card has enough."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:  # overrides that stand behind an option
        options.overrides += rest
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(100_000, 50, 100)  # what is imported is not garbage; looking for it takes a fifth of the time
    atexit.register(gc.freeze)  # nor at the end, where it takes more than a second
    _quieten()
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        print(f"sft: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        hint = "; a training goes on from its last whole checkpoint" if "target" in options else ""
        print(f"\nsft: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"sft: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    groups = [
        f"{group}:\n" + "".join(f"  {n:<10} {text}\n" for n, text in some.items()) for group, some in COMMANDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="sft",
        usage="sft COMMAND ...",
        description="Fine-tune a causal language model by a recipe.\n\n" + "\n".join(groups),
        epilog="`sft COMMAND --help` lists its options. Behind a recipe, key=value replaces a setting of it:\n"
        "sft train recipes/quickstart.yaml trainer.max_steps=10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(prog="sft", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name, target in STAGES.items():
        _with_recipe(_command(commands, name)).set_defaults(run=_run_stage, stage=name, target=target)
    check = _with_recipe(_command(commands, "check"))
    check.add_argument("--show", type=int, default=0, metavar="N", help="print N rows token by token with their mask")
    check.add_argument("--json", action="store_true", help="print it for machines")
    check.set_defaults(run=_check)
    fit = _with_recipe(_command(commands, "fit"))
    fit.add_argument("--gpu", action="append", default=[], metavar="SIZE", help="memory of a card, 24GiB unless given")
    fit.add_argument("--solve", choices=["max_length", "batch"], help="find the longest context or the largest batch")
    fit.add_argument("--measure", action="store_true", help="train two steps on the GPU here, and compare")
    fit.add_argument("--json", action="store_true", help="print it for machines")
    fit.set_defaults(run=_fit)
    _add_generate(commands)
    _add_merge(commands)
    _add_serve(commands)
    _add_export(commands)
    _with_recipe(_command(commands, "bases")).set_defaults(run=_bases)
    for name, run in (("schema", _schema), ("recipes", _recipes), ("templates", _templates)):
        _command(commands, name).set_defaults(run=run)
    add = _command(commands, "add-facts")
    add.add_argument("model", metavar="ORG/NAME", help="the model's id on the hub")
    add.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=os.path.expanduser,
        help="a folder with its config.json, in place of the hub",
    )
    add.set_defaults(run=_add_facts, overrides=[])
    return parser


class Version(argparse.Action):
    """Print the version of the installed package, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print(f"sft {version('sft-recipes')}")
        except PackageNotFoundError:
            print("sft, of a checkout that is not installed")
        parser.exit()


def _command(commands: Any, name: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, description=f"{ABOUT[name][0].upper() + ABOUT[name][1:]}."
    )
    return parser


def _add_merge(commands: Any) -> None:
    merge = _command(commands, "merge")
    merge.add_argument(
        "recipes",
        metavar="RECIPE",
        nargs="+",
        type=os.path.expanduser,
        help="a recipe or run, or several; and KEY=VALUE",
    )
    merge.add_argument("--route", choices=ROUTES, default=ROUTES[0], help="what a quantised run's adapter is added to")
    merge.add_argument("--dtype", choices=DTYPES, default=DTYPES[0],
                       help="of the weights; the smallest that keeps the gain unless given")  # fmt: skip
    merge.add_argument("--score", action="store_true", help="compare both models by the template's metrics, too")
    merge.add_argument("--shard", type=_size, default="5GB", metavar="SIZE", help="largest file of weights")
    merge.add_argument("--output", metavar="FOLDER", type=os.path.expanduser, help="runs/NAME/merged unless given")
    merge.add_argument("--weights", type=_numbers, metavar="W,W", help="of several adapters; equal unless given")
    merge.add_argument("--method", choices=["cat", "linear", "svd", "ties", "dare_ties"],
                       help="how peft sums several adapters; cat, which is exact, unless given")  # fmt: skip
    merge.add_argument("--density", type=_share, metavar="SHARE", help="what ties and dare_ties keep")
    merge.set_defaults(run=_merge, overrides=[])


def _add_generate(commands: Any) -> None:
    generate = _with_recipe(_command(commands, "generate"))
    asked = generate.add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="the template's first field; without it, a line of standard input each")
    asked.add_argument("--row", help="all of the template's fields, as JSON")
    asked.add_argument("--file", type=os.path.expanduser, help="a file with a prompt, or a row as JSON, on each line")
    generate.add_argument("--base", action="store_true", help="ask the base model instead")
    generate.add_argument("--samples", type=_positive, default=1, metavar="N", help="write N different answers")
    generate.add_argument("--steps", type=_positive, default=1, metavar="N", help="go on N times from what was written")
    generate.add_argument("--next", type=_positive, nargs="?", const=10, metavar="N",
                          help="show the N likeliest next tokens (10); on a terminal, go on by hand")  # fmt: skip
    decoding = generate.add_argument_group("decoding", "in place of what the recipe says under `generation:`")
    decoding.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help="always the likeliest")
    for name, setting in SETTINGS.items():
        if setting.help:
            decoding.add_argument(_option(name), type=setting.kind, metavar="N", help=setting.help)
    decoding.add_argument("--seed", type=int, metavar="N", help="decides what is drawn")
    generate.set_defaults(run=_generate)


def _add_export(commands: Any) -> None:
    export = _with_recipe(_command(commands, "export"))
    targets = ", ".join(sorted(file.stem for file in (Path(__file__).parent / "export").glob("[!_]*.py")))
    export.add_argument("--to", required=True, type=_names, metavar="TARGET,TARGET",
                        help=f"{targets}; or your own, a .py file")  # fmt: skip
    export.add_argument("--option", action="append", default=[], type=_pair, metavar="NAME=VALUE",
                        help="a setting of a target")  # fmt: skip
    for name, metavar, text in (
        ("gguf", "TYPE,TYPE", "weights of GGUF files, such as f32, bf16, q4_k_m; lora: the adapter alone"),
        ("llama-cpp", "FOLDER", "a checkout of llama.cpp, for its converter"),
        ("push", "REPO", "send the adapter's folder to this repository on the hub"),
    ):
        export.add_argument(f"--{name}", dest="option", action="append", metavar=metavar, help=text,
                            type=partial(_named, name))  # fmt: skip
    for name, choices in (("dtype", DTYPES), ("route", ROUTES)):
        export.add_argument(f"--{name}", choices=choices,
                            help="as of `sft merge`; that of the merged folder that is there unless given")  # fmt: skip
    export.set_defaults(run=_export)


def _named(name: str, value: str) -> tuple[str, str]:
    return name, os.path.expanduser(value)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


def _add_serve(commands: Any) -> None:
    serve = _with_recipe(_command(commands, "serve"))
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on, 127.0.0.1 unless given")
    serve.add_argument("--port", type=_port, default=8000, metavar="N", help="8000 unless given; 0 is any free one")
    serve.add_argument("--api-key", help="what clients must show; SFT_API_KEY in the environment does the same")
    serve.add_argument("--max-tokens", type=_positive, metavar="N", help="bound on the tokens of an answer")
    serve.add_argument("--max-requests", type=_positive, default=64, metavar="N",
                       help="answers written or waiting at once, 64 unless given; more get a 429")  # fmt: skip
    serve.add_argument("--engine", choices=["sft", "vllm"], default="sft", help="vllm: for merged folders, on a GPU")
    serve.set_defaults(run=_serve)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number above 0")
    return int(text)


def _numbers(text: str) -> tuple[float, ...]:
    numbers = _floats(text)
    if not any(numbers) or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError("write a number for each run, not all of them 0, such as 0.7,0.3")
    return numbers


def _size(text: str) -> str:
    if not re.fullmatch(r"0*[1-9]\d*(KB|MB|GB|TB)", text.upper()):
        raise argparse.ArgumentTypeError("write a number with KB, MB, GB or TB, such as 5GB")
    return text


def _share(text: str) -> float:
    numbers = _floats(text)
    if len(numbers) != 1 or not 0 < numbers[0] <= 1:
        raise argparse.ArgumentTypeError("write a share above 0 and up to 1")
    return numbers[0]


def _floats(text: str) -> tuple[float, ...]:
    """The numbers between commas; none where one of them is not a number."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        return ()


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 0 to 65535")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(os.path.expanduser(word.strip()) for word in text.split(",") if word.strip())


def _with_recipe(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("recipe", metavar="RECIPE", type=os.path.expanduser, help="a YAML file, or the folder of a run")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[],
                        help="settings that replace those of the recipe")  # fmt: skip
    return parser


def _load(options: argparse.Namespace) -> Any:
    from sft.recipe import load

    return load(options.recipe, options.overrides)


def _run_stage(options: argparse.Namespace) -> None:
    recipe = _load(options)  # before the heavy import: a typo is reported in a blink
    own = CLASSIFICATION if recipe.task == "classification" else {}
    if options.stage == "train" and os.environ.get("RANK", "0") == "0":
        _opened_with_metrics(recipe)
    module, function = own.get(options.stage, options.target).split(":")
    getattr(importlib.import_module(module), function)(recipe)


def _opened_with_metrics(recipe: Any) -> Any:
    """The recipe opened; a data file that is not there, a wrong name of a metric, and a model that is not to be had are
    reported now, not after hours of training."""
    from eval.open_metric import check_metrics
    from sft.hub import check_published
    from sft.rows.read import check_sources
    from sft.tokens.opened import Opened
    from sft.tokens.tokenizer import named_revision

    opened = Opened(recipe)
    check_sources(recipe.data)
    check_metrics(opened.template)
    if isinstance(recipe.model, str) and recipe.base is None:
        check_published(recipe.model, named_revision(recipe))
    return opened


def _check(options: argparse.Namespace) -> None:
    opened = _opened_with_metrics(_load(options))
    from sft.recipe.checks import judged_by_their_bounds

    if not judged_by_their_bounds(opened.recipe):
        from sft.train.settings import check_settings

        check_settings(opened)
    if opened.recipe.task == "classification":
        from sft.show import say
        from sft.train.classification import labelled

        say(labelled(opened).line())
    from sft.tokens.check import check

    check(opened, options.show, options.json)


def _fit(options: argparse.Namespace) -> int:
    recipe = _load(options)
    if options.measure:
        from sft.train.measure import measure

        measure(recipe)
        return 0
    from sft.memory.fit import show

    return 0 if show(recipe, options.gpu, options.solve, options.json) else 1


def _recipes(options: argparse.Namespace) -> None:
    from sft.memory.fit import listing

    print(listing(shutil.get_terminal_size().columns))


def _generate(options: argparse.Namespace) -> None:
    if options.next and (options.samples > 1 or options.steps > 1):
        raise UserError("--next shows what may come, and writes nothing: take --samples and --steps away")
    by_hand = options.prompt is options.row is options.file is None and sys.stdin.isatty()
    options.overrides += _decoding(options)
    questions = _questions(options)
    answerer = _answerer(options, options.base)
    conversation = None
    if by_hand:
        from sft.write.ask import Conversation, from_terminal, takes_turns

        template = answerer.opened.template
        conversation = Conversation(template) if takes_turns(template) and not options.next else None
        questions = conversation.questions() if conversation else from_terminal(template)
    if options.next:
        from sft.write.next import explore

        explore(answerer, questions, options.next, sys.stdin.isatty() and sys.stdout.isatty())
        return
    from sft.write.ask import ask

    several = options.samples > 1 or options.steps > 1
    begins, answer = True, ""
    for piece in ask(answerer, questions, options.samples, options.steps):
        if several and begins:
            print(f"--- step {piece.step}, sample {piece.sample}")
        print(piece.text, end="\n" if piece.end else "", flush=True)
        if piece.end == "length":
            print("(cut off at the limit of tokens; --max-new-tokens N gives more)", file=sys.stderr, flush=True)
        begins = piece.end is not None
        answer += piece.text if piece.sample == 1 else ""
        if conversation and begins and piece.sample == options.samples:
            conversation.answered(answer)
            answer = ""


def _decoding(options: argparse.Namespace) -> list[str]:
    """The options about decoding as overrides of the recipe, in which one that draws tokens says so."""
    given = {name: value for name in SETTINGS if (value := vars(options).get(name)) is not None}
    if given.get("temperature") == 0 and (useless := given.keys() & {*DRAWN} - {"temperature"}):
        names = ", ".join(_option(name) for name in sorted(useless))
        raise UserError(f"greedy decoding, or a temperature of 0, draws nothing: take {names} away")
    given = drawing(given)
    seed = [] if options.seed is None else [f"eval.seed={options.seed}"]
    return [f"generation.{name}={json.dumps(value)}" for name, value in given.items()] + seed


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _questions(options: argparse.Namespace) -> Any:
    """Prompts and rows, one after the other; a broken --row is reported before any model is loaded."""
    if options.row is not None:
        return [_row(options.row)]
    return _lines(options.file) if options.prompt is None else [options.prompt]


def _lines(file: str | None) -> Any:
    try:
        with open(file, encoding="utf-8-sig") if file else nullcontext(sys.stdin) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file or 'standard input'}:{number}: "
                yield _row(line.strip(), where) if line.lstrip().startswith("{") else line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError(f"{file or 'standard input'}: not UTF-8; save it as UTF-8") from None


def _answerer(options: argparse.Namespace, base: bool = False) -> Any:
    """The model of a run, or of a folder outside its run, such as `sft merge` writes."""
    folder = Path(options.recipe)
    if (folder / "config.json").is_file():
        from sft.write.ask import open_folder

        return open_folder(folder, options.overrides, base)
    recipe = _load(options)
    from sft.write.ask import open_run

    return open_run(recipe, base)


def _serve(options: argparse.Namespace) -> None:
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed; pip install fastapi uvicorn")
    from sft.serve import serve, serve_with_vllm

    if options.api_key == "":
        raise UserError("--api-key is empty; name a key, or leave the option out")
    key = options.api_key or os.environ.get("SFT_API_KEY")
    if options.engine == "vllm":
        serve_with_vllm(Path(options.recipe), options.host, options.port, key)
    else:
        limits = {"max_tokens": options.max_tokens, "max_requests": options.max_requests}
        serve(lambda: _answerer(options), options.host, options.port, key, **limits)


def _merge(options: argparse.Namespace) -> int:
    names = [word for word in options.recipes if "=" not in word]
    options.overrides += [word for word in options.recipes if "=" in word]
    if not names:
        raise UserError("name a recipe or the folder of a run to merge")
    given = [name for name in ("weights", "method", "density") if getattr(options, name) is not None]
    if len(names) == 1 and given:
        raise UserError(f"--{given[0]} is for several runs; name them all, or leave it out")
    if len(names) > 1 and not options.output:
        raise UserError(f"name a folder for the sum of {len(names)} adapters with --output")
    from sft.recipe import load

    recipes = [load(name, options.overrides) for name in names]
    from sft.files import read_json
    from sft.merge import MergeOptions, merge, merge_several
    from sft.model.adapter import Mix

    if options.score:
        from eval.score import score as scorer

    score = scorer if options.score else None
    how = MergeOptions(options.route, options.dtype, options.score, options.shard)
    if len(names) == 1:
        folder = merge(recipes[0], how, Path(options.output).resolve() if options.output else None, score)
    else:
        weights = options.weights or (1 / len(names),) * len(names)
        mix = Mix(weights, options.method or "cat", options.density)
        folder = merge_several(recipes, mix, Path(options.output).resolve(), how, score)
    return 1 if read_json(folder / "parity.json")["problems"] else 0


def _export(options: argparse.Namespace) -> int:
    recipe = _load(options)
    from sft.export import export

    merging = {name: value for name in ("dtype", "route") if (value := getattr(options, name))}
    problems = export(recipe, options.to, dict(options.option), merging)
    for problem in problems:
        print(f"sft: past the tolerance: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _row(text: str, where: str = "") -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}the row is broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise UserError("a row is a JSON object of the template's fields, {...}")
    return row


def _bases(options: argparse.Namespace) -> None:
    recipe = _load(options)
    lines = [[str(recipe.eval.scratch), *recipe.on_same_data()]] if recipe.eval.scratch else []
    lines.append([options.recipe])
    while (base := recipe.base) is not None:
        lines.insert(0, [str(recipe.model)])
        recipe = base
    print("\n".join("\t".join(words) for words in lines))


def _schema(options: argparse.Namespace) -> None:
    from sft.recipe.json_schema import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))


def _add_facts(options: argparse.Namespace) -> None:
    from sft.memory.model_facts import add

    print(add(options.model, options.folder))


def _templates(options: argparse.Namespace) -> None:
    from sft.rows.template import template_names

    for name in template_names():
        module = importlib.import_module(f"data_templates.{name}")
        print(f"{(module.__doc__ or name).splitlines()[0]}")
        print(f"  {json.dumps(dict(module.template().example), ensure_ascii=False)}\n")


def _quieten() -> None:
    """Leave out what other libraries say to their own developers, so that what is said to the user is seen."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional package of no use here
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # of each cast of an 8-bit layer
    for name, said in (("trainer", "['lm_head.weight']"), ("modeling_utils", "input_ids may be padded")):
        # a head that is tied to the embedding is in no checkpoint; and rows that ended before others do hold padding
        logging.getLogger(f"transformers.{name}").addFilter(_without(said))
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers about its own deprecated names
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # peft sets GPT-2's right by itself


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """End as on an interrupt, so that nothing half-written is left, with the status of a terminated process."""
    sys.exit(128 + signal.SIGTERM)
