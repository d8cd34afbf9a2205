"""The command: train, eval, baseline, compare, replay, inspect, rank, fits, serve, join, tasks. Torch is imported once the arguments are known to be good.

Exit codes: 0; 2 for input that cannot be used (one line on stderr); 130 after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

import justforward
from justforward import catalog, launched
from justforward.config import (
    BaselineConfig,
    CompareConfig,
    EvalConfig,
    FitsConfig,
    InspectConfig,
    RankConfig,
    ReplayConfig,
    TasksConfig,
    TrainConfig,
)
from justforward.errors import NonFiniteLoss, UserError, memory_errors
from justforward.offers import JoinConfig, ServeConfig

COMMANDS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "baseline": BaselineConfig,
    "compare": CompareConfig,
    "replay": ReplayConfig,
    "inspect": InspectConfig,
    "rank": RankConfig,
    "fits": FitsConfig,
    "serve": ServeConfig,
    "join": JoinConfig,
    "tasks": TasksConfig,
}
# Settings that are true where they are named.
FLAGS = ("calibrate", "gradient_checkpointing", "private", "resume", "merge", "json")


# Settings that are files or folders; `load_model` looks for a model at home itself.
PLACES = ("out", "run", "data", "task", "base", "cache", "offload", "plot", "key_file", "folder")


class Parser(ArgumentParser):
    """Errors are `UserError`s of one line; options are shown with dashes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage."""
        program = self.prog.replace(" [options]", "")
        missing = re.match(r"the following arguments are required: (\w+)\.", message)
        if missing is not None:  # said by the parser of all commands
            program += f" {missing[1]}"
            message = message.replace(f"{missing[1]}.run", "DIR")
            if missing[1] == "fits":
                message = message.replace("fits.model", "MODEL")
            message = message.replace(f"{missing[1]}.", "--")
        raise UserError(f"{_plain(message)}: see {program} --help") from ex

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help with --max-forwards where the field is max_forwards."""
        return _dashed(super().format_help(*args, **kwargs))


def _plain(message: str) -> str:
    """jsonargparse's words for a bad value, in one line for those who do not read Python types."""
    text = " ".join(message.split())
    text = re.sub(r'Parser key "([\w.]+)": ', lambda m: f"--{m[1]}: ", text)
    for several_or_one in (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: ?(.*)",
        r"Expected a (typing\.Literal\[.*?\]|<class '\w+'>)\. Got value: ?(.*)",
    ):
        text = re.sub(several_or_one, _wrong_type, text)
    commands = f"name a command, one of {', '.join(COMMANDS)}"
    text = re.sub(r'expected "subcommand" to be one of .*?, but .*', commands, text)
    return _dashed(text).rstrip(".")


def _wrong_type(match: re.Match[str]) -> str:
    choices = re.search(r"Literal\[(.*?)\]", match[1])
    if choices is not None:
        return f"{match[2]!r} is not one of {choices[1]}"
    names = {
        "float": "a finite number",
        "int": "a whole number",
        "bool": "true or false",
        "dict": "label=word,label=word or a mapping",
        "str": "a text",
        "tuple": "a list such as [0, 1, 2]",
    }
    return f"{match[2]!r} is not {next((n for t, n in names.items() if t in match[1]), match[1])}"


def _dashed(text: str) -> str:
    return re.sub(r"--[a-z]+(?:_[a-z]+)+", lambda m: m[0].replace("_", "-"), text)


def parser() -> Parser:
    """The parser of all commands, made from the dataclasses in `config`."""
    top = Parser(
        prog="justforward",
        version=justforward.__version__,
        description="Fine-tune language models with forward passes only.",
    )
    commands = top.add_subcommands(title="commands", metavar="COMMAND")
    for name, kind in COMMANDS.items():
        first, help_of = _docs(kind)
        sub = Parser(description=first)
        if name in ("train", "eval", "baseline", "compare", "rank", "serve"):
            sub.add_argument(
                "--config", action="config", help="a YAML file with any of these options"
            )
        skip: set[str | int] = set(FLAGS)
        if name in ("replay", "inspect"):
            sub.add_argument("run", type=str, metavar="DIR", help=help_of["run"])
            skip.add("run")
        if name == "fits":
            sub.add_argument("model", type=str, metavar="MODEL", help=help_of["model"])
            skip.add("model")
        if name == "join":
            sub.add_argument("url", type=str, nargs="?", metavar="URL", help=help_of["url"])
            skip.add("url")
        sub.add_class_arguments(kind, skip=skip, help="settings")
        for flag in FLAGS:
            if flag in help_of:
                sub.add_argument(f"--{flag}", action="store_true", help=help_of[flag])
        commands.add_subcommand(name, sub, help=first)
    return top


def _docs(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """First line of a configuration's docstring, and the sentence for each field."""
    lines = (kind.__doc__ or "").splitlines()
    found = (re.fullmatch(r"\s+(\w+): (.*)", line) for line in lines)
    helps = {match[1]: match[2] for match in found if match}
    return lines[0], {field.name: helps[field.name] for field in fields(kind)}


def _with_underscores(argv: Sequence[str]) -> list[str]:
    """`--max-forwards=9` -> `--max_forwards=9`; values stay as they are.

    `--lr -1e-3` becomes `--lr=-1e-3`, which argparse would take for two options.
    """
    out: list[str] = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        if re.fullmatch(r"--[a-z]+(?:-[a-z]+)*", option):
            argument = "--" + option[2:].replace("-", "_") + equals + value
        if out and re.fullmatch(r"-[\d.].*", argument) and re.fullmatch(r"--[a-z_]+", out[-1]):
            argument = f"{out.pop()}={argument}"
        out.append(argument)
    return out


def _with_run(argv: list[str]) -> list[str]:
    """`train --resume --out DIR`: what is not given is taken from the run's config.yaml.

    A run that torchrun starts again is resumed where there is one.
    """
    again = launched.attempt() > 0 and "--resume" not in argv
    if argv[:1] != ["train"] or ("--resume" not in argv and not again):
        return argv
    places = [i for i, argument in enumerate(argv) if re.fullmatch(r"--out(=.*)?", argument)]
    if not places:
        return argv
    place = places[-1]
    follows = argv[place + 1 : place + 2]
    out = argv[place].partition("=")[2] if "=" in argv[place] else "".join(follows)
    out = _at_home("out", out)
    if again and not os.path.isfile(os.path.join(out, "config.yaml")):
        return argv  # it had not begun
    if not os.path.isdir(out):
        raise UserError(
            f"{out}: there is no run folder to continue: check --out, or leave out --resume"
        )
    config = os.path.join(out, "config.yaml")
    if not os.path.isfile(config):
        raise UserError(f"{out}: not a run folder: config.yaml is missing")
    return ["train", "--config", config, *argv[1:], *(["--resume"] if again else [])]


def _at_home(name: str, value: Any) -> Any:
    """``~/runs`` where no shell has seen it: in a --config file, or behind ``--out=``. Else a folder called ~ would be made."""
    is_place = name in PLACES and isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_place else value


def _check_yaml(argv: list[str]) -> dict[str, str]:
    """Refuse a --config that is not a file of settings, naming file and line.

    Returns:
        Where each setting that it decides is: file and line.
    """
    command = argv[0] if argv else ""
    places: dict[str, str] = {}
    for place, argument in enumerate(argv):
        option, equals, path = argument.partition("=")
        if option != "--config" or command not in COMMANDS:
            continue
        path = path if equals else "".join(argv[place + 1 : place + 2])
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            tree = yaml.compose(text, yaml.SafeLoader)
            yaml.safe_load(text)  # which finds keys that are none, and numbers beyond all measure
        except OSError as error:
            raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path}: not UTF-8: save it as UTF-8") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = path if mark is None else f"{path}:{mark.line + 1}"
            said = getattr(error, "problem", None) or " ".join(str(error).split())
            raise UserError(f"--config {where}: not YAML: {said}") from error
        if not isinstance(tree, yaml.MappingNode):
            raise UserError(f"--config {path}: not a mapping: write one 'option: value' a line")
        try:
            _check_once(path, tree)
        except RecursionError:
            raise UserError(f"--config {path}: a mapping holds itself: write it out") from None
        known = {field.name for field in fields(COMMANDS[command])}
        for key, _ in tree.value:
            if key.value not in known:
                raise UserError(
                    f"--config {path}:{key.start_mark.line + 1}: {key.value!r} is no setting of {command}: "
                    f"see justforward {command} --help"
                )
            places["--" + key.value.replace("_", "-")] = f"{path}:{key.start_mark.line + 1}"
    said = {argument.partition("=")[0].replace("_", "-") for argument in argv}
    return {option: place for option, place in places.items() if option not in said}


def _located(error: UserError, places: dict[str, str]) -> str:
    """What was wrong; with the line of a --config where that has a setting which was."""
    named = re.match(r"(--[a-z-]+)(?= is |: )", str(error))
    place = named and places.get(named[1])
    return f"{place}: {error}" if place else str(error)


def _check_once(path: str, tree: yaml.MappingNode) -> None:
    """Refuse a key that a mapping has twice: YAML would take the last."""
    seen: set[str] = set()
    for key, value in tree.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise UserError(f"--config {path}:{line}: {key.value!r} is given twice: keep one")
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            _check_once(path, value)


def _compare(config: CompareConfig, source: str | None) -> int:
    """Apart from the others: it stays without torch, whose memory its cells would be charged with."""
    if os.name != "posix":
        raise UserError(
            "compare measures processes as Linux and macOS count: run it on one of them"
        )
    from justforward.compare import compare, spell_compare

    try:
        result = compare(config, source)
    except KeyboardInterrupt:
        kept = os.path.join(config.out, "compare.yaml")
        _say(f"stopped: go on with: justforward compare --config {kept} --out {config.out}")
        return 130
    _print(config.json, result, spell_compare(result))
    return 2 if result["failed"] else 0


def _fits(config: FitsConfig) -> None:
    from justforward import shown
    from justforward.fits import as_json, fits

    if config.plot is not None:
        shown.check_plot(config.plot)
    found = fits(config)
    if config.plot is not None:
        shown.plot_family(Path(config.plot), found)
    _print(config.json, as_json(found), shown.spell_fits(found))


def _serve(config: ServeConfig) -> int:
    from justforward.serve import serve

    try:
        status = serve(config)
    except KeyboardInterrupt:
        _say(
            f"stopped: go on with: justforward serve --resume --out {config.out}, and where it listened"
        )
        return 130
    text = f"{status['steps']} steps in {config.out}: make the model with: justforward replay {config.out} --out MODEL"
    _print(config.json, status, text)
    return 0


def _run(command: str, config: Any, source: str | None = None) -> int:
    """Carry out a command and print its result on stdout; returns the exit code."""
    if command == "tasks":
        listed = [
            catalog.load(name) for name in ([config.task] if config.task else catalog.names())
        ]
        _print(config.json, [catalog.described(d) for d in listed], catalog.spell_tasks(listed))
        return 0
    if command == "compare":
        return _compare(config, source)
    if command == "serve":  # it needs no model, and none of what loads one
        return _serve(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a fork would make it complain
    from justforward import rebuild, report, run
    from justforward.outcome import Interrupted

    if command == "eval":
        found = rebuild.evaluate(config)
        _print(config.json, found, report.spell_eval(found))
    elif command == "baseline":
        from justforward.baselines import run_baseline

        figure = run_baseline(config)
        _print(config.json, figure, report.spell_baseline(figure))
    elif command == "replay":
        made = rebuild.rebuild(config)
        _print(config.json, made, report.spell_replay(made))
    elif command == "rank":
        from justforward.rank import rank, spell_rank

        measured = rank(config)
        _print(config.json, measured, spell_rank(measured))
    elif command == "fits":
        _fits(config)
    elif command == "join":
        from justforward.join import join

        took = join(config)
        _print(
            config.json,
            took,
            f"{took['name']}: {took['steps']} steps, fingerprint {took['fingerprint'][:16]}",
        )
    elif command == "inspect":
        shown = report.inspect_run(config)
        _print(config.json, shown, report.spell_inspect(shown))
    else:
        try:
            result = run.train(config)
        except Interrupted as stopped:
            if launched.number():
                return 130
            if stopped.result is not None:
                report.plot(config.out)
                _print(config.json, stopped.result, report.spell_train(stopped.result))
            if stopped.result is None and not config.resume:
                _say("stopped before the first step: nothing was written")
            else:
                _say(f"stopped: continue with: justforward train --resume --out {config.out}")
            return 130
        if not launched.number():  # the others' folder has gone
            report.plot(config.out)
            _print(config.json, result, report.spell_train(result))
    return 0


def _print(as_json: bool, result: Any, text: str) -> None:
    print(json.dumps(result) if as_json else text, flush=True)


def _say(text: str) -> None:
    who = f"worker {launched.number()}: " if launched.number() else ""
    print(who + " ".join(text.split("\n")), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    places: dict[str, str] = {}
    try:
        arguments = _with_run(_with_underscores(sys.argv[1:] if argv is None else argv))
        places = _check_yaml(arguments)
        values = parser().parse_args(arguments)
        command: str = values.subcommand
        given = values[command].as_dict()
        files = given.pop("config", None)
        source = str(files[-1]) if files else None
        config = COMMANDS[command](**{name: _at_home(name, v) for name, v in given.items()})
    except SystemExit as stop:  # --help, --version
        return stop.code if isinstance(stop.code, int) else 2
    except UserError as error:
        _say(f"error: {_located(error, places)}")
        return 2
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    try:
        with memory_errors(
            lambda: "free memory, or use smaller batches; 'justforward fits MODEL' says what fits"
        ):
            return _run(command, config, source)
    except UserError as error:
        _say(f"error: {_located(error, places)}")
        return 2
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        _say(f"error: {name[:60]}... has {len(name)} characters: no path is so long: check it")
        return 2
    except NonFiniteLoss as error:
        _say(f"error: {error}; the run up to there is in {config.out}")
        return 2
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def entry() -> NoReturn:
    """The console script."""
    try:
        code = main()
    except BrokenPipeError:  # the reader has gone, as `| head` does once it has its lines
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 128 + 13  # what a shell reports for SIGPIPE
    sys.exit(code)
