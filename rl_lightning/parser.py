"""The command line's parser: jsonargparse's, whose errors are one sentence."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, NoReturn, get_type_hints

from lightning.pytorch.cli import LightningArgumentParser

KEY = re.compile(r'Parser key "([^"]+)":?\s*(.*)')
CLASS = re.compile(r"Problem with given class_path '([^']+)'")
UNKNOWN = re.compile(r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<option>[^']+)'")
UNRECOGNISED = re.compile(r"unrecognized arguments: (?:--)?(?P<option>[^\s=]+)")
EARLY = re.compile(r"Option '[^']+' is not accepted before subcommand '(?P<command>[^']+)'")
REQUIRED = re.compile(r"the following arguments are required: (?P<options>.+)")
NO_COMMAND = re.compile(r'expected "subcommand" to be one of \{(?P<commands>[^}]+)\}')
UNIMPORTABLE = re.compile(r"No module named|module '.*' has no attribute")
NO_KIND = re.compile(
    r"Import path .*?does not (?:implement protocol (?P<protocol>\w+)|correspond to a (?P<base>subclass of \w+))"
)
NO_PATH = re.compile(r"Expected a path but (?P<value>\S+) either")
EXPECTED = re.compile(r"Expected an? (?P<kind>.+?)(?:\. Got value: (?P<value>.*)|: (?P<name>.*))?$")
STRATEGIES = {"ray": "RayStrategy", "ray_model_parallel": "RayModelParallelStrategy"}
NOISE = ("Expected a path but", "Expected a <class 'NoneType'>")


class RunArgumentParser(LightningArgumentParser):
    """Says in one sentence which option is wrong, why, and which one may have been meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "rl-lightning", **kwargs})  # also as `python -m rl_lightning`

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with status 2, or raises where the caller asked for that."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
        sys.stderr.write(f"{self.prog.split()[0]}: error: {one_sentence(message, known)}\n")
        self.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        """`--trainer.strategy ray` is the class, too, where an option of it is given beside it."""
        return super().parse_args(strategy_as_class(sys.argv[1:] if args is None else args), *others, **options)

    def _apply_actions(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """`strategy: ray` in a file is the class where an option of it is given too (`--trainer.strategy.address`)."""
        trainer, given = cfg.get("trainer"), getattr(self, "args", None) or ()
        name = trainer.get("strategy") if isinstance(trainer, dict) else None
        if isinstance(name, str) and name in STRATEGIES and any(arg.startswith("--trainer.strategy.") for arg in given):
            cfg["trainer"] = {**trainer, "strategy": {"class_path": STRATEGIES[name]}}
        return super()._apply_actions(cfg, *args, **kwargs)


def strategy_as_class(args: Sequence[str]) -> list[str]:
    """`args` with a class for the strategy's short name, if they give an option of it: jsonargparse takes one of a class only."""
    if not any(arg.startswith("--trainer.strategy.") for arg in args):
        return list(args)
    joined = {f"--trainer.strategy={name}": f"--trainer.strategy={of_class}" for name, of_class in STRATEGIES.items()}
    changed = [joined.get(arg, arg) for arg in args]
    for place, arg in enumerate(changed[:-1]):
        if arg == "--trainer.strategy":
            changed[place + 1] = STRATEGIES.get(changed[place + 1], changed[place + 1])
    return changed


def one_sentence(message: str, known: Iterable[str] = ()) -> str:
    """The cause that stands deepest in jsonargparse's tree of reasons.

    Args:
        message: jsonargparse's error text, one line a reason, indented.
        known: options of the command line, to find the one that was meant.
    """
    keys: list[str] = []
    owner = ""
    wanted: list[str] = []
    reasons: list[str] = []
    given = ""
    for is_reason, line in ((line.strip().startswith("- "), line.strip().removeprefix("- ")) for line in message.splitlines()):
        if match := KEY.match(line):
            keys.append(match[1])
            line = match[2]
        if match := CLASS.match(line):
            owner = match[1]
        elif (whole := _whole(line, keys, owner, known)) is not None:
            return whole
        elif match := NO_KIND.match(line):
            reasons.append(f"{given} is no {match['base'] or match['protocol'] + ': it lacks its methods, or their annotations'}")
        elif match := NO_PATH.match(line):
            given = match["value"]
        elif match := EXPECTED.match(line):
            if not line.startswith(NOISE):
                wanted.append(_kind(match["kind"]))
            given = given or match["value"] or match["name"] or ""
        elif line.startswith("Given value:"):
            given = given or line.removeprefix("Given value:").strip()
        elif is_reason and not line.startswith("Does not validate"):
            reasons.append(line)
    if keys and reasons:
        return f"{'.'.join(keys)}: {reasons[0]}"
    if keys and wanted:
        return f"{'.'.join(keys)}: expected {' or '.join(dict.fromkeys(wanted))}, got {given!r}"
    return " ".join(KEY.sub(r"\1: \2", message, count=1).split())


def _whole(line: str, keys: list[str], owner: str, known: Iterable[str]) -> str | None:
    """The sentence for a reason that says everything by itself; None for others."""
    if match := NO_COMMAND.match(line):
        return f"the command is missing, one of {match['commands'].replace(',', ', ')}: rl-lightning fit --config RECIPE"
    if match := EARLY.match(line):
        return f"options come after the command: rl-lightning {match['command']} --config RECIPE"
    if match := REQUIRED.match(line):
        return _missing([".".join([*keys, option]) for option in match["options"].split(", ")], owner)
    if match := UNKNOWN.match(line) or UNRECOGNISED.match(line):
        return _unknown(".".join(filter(None, [*keys, match.groupdict().get("group"), match["option"]])), owner, known)
    if UNIMPORTABLE.match(line):
        return f"{'.'.join(keys)}: {line}; give an import path such as package.module.name"
    return None


def _missing(options: list[str], owner: str) -> str:
    """`model.path is missing, which AsyncPPOModule needs`"""
    if owner:
        return f"{', '.join(options)} is missing, which {owner.rsplit('.', 1)[-1]} needs"
    return f"{' and '.join('--' + option.partition('.')[2] for option in options)} missing: give a recipe by --config"


def _unknown(option: str, owner: str, known: Iterable[str]) -> str:
    """`data.batch_sze is not an option of RolloutDataModule; did you mean batch_size?`"""
    if option.endswith((".yaml", ".yml")):
        return f"{option} is not an option; did you mean --config {option}?"
    name = option.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(option, known, 1, 0.75) or difflib.get_close_matches(name, _parameters(owner), 1, 0.7)
    of = f" of {owner.rsplit('.', 1)[-1]}" if owner else ""
    return f"{option} is not an option{of}" + (f"; did you mean {close[0]}?" if close else "; --help lists all options")


def _parameters(class_path: str) -> list[str]:
    """Names of a class's options, of those that it hands on to its base, and of the options in their groups."""
    module, _, name = class_path.rpartition(".")
    if not module:
        return []
    names: list[str] = []
    for owner in getattr(import_module(module), name).__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters
        names += parameters
        with contextlib.suppress(NameError):  # annotations that only type checkers can read
            groups = (hint for hint in get_type_hints(owner.__init__).values() if is_dataclass(hint))
            names += [field.name for group in groups for field in fields(group)]
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _kind(text: str) -> str:
    """`<class 'int'>` -> `int`; `typing.Literal['a', 'b']` -> `'a' or 'b'`."""
    if match := re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", text):
        return match[1]
    if match := re.fullmatch(r"typing\.Literal\[(.+)\]", text):
        return match[1].replace(", ", " or ")
    return "an import path or the name of a known class" if text.startswith("dot import path") else text
