"""The options of verbs that take a plan, generated from its class: one per field, in the fields' order."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from twotower_eval.decoder_settings import parse_set
from twotower_eval.errors import UserError
from twotower_eval.names import registered
from twotower_eval.plan_baselines import table_of
from twotower_eval.plan_fields import option_of

if TYPE_CHECKING:
    from typer._click import Context

Given = dict[str, object]  # values from the command line by field; what was not given is not there
RESULTS, REPORTS, TRAINING = Path("results"), Path("reports"), Path("training/miniature")


def option(text: str, *names: str, metavar: str | None = None, hidden: bool = False) -> OptionInfo:
    """One option with its help text; the text in ``[…]`` states the default."""
    made: OptionInfo = typer.Option(*names, help=text, metavar=metavar, show_default=False, hidden=hidden)
    return made


PlanFile = Annotated[Path | None, option("TOML plan; options given here override it.", "--plan", metavar="FILE")]
Out = Annotated[Path, option("Parent folder of run folders [results].", "--out", "--output-path", metavar="DIR")]
Resume = Annotated[
    str | None, option("Continue an interrupted run: its folder, or its id under --out.", "--resume", metavar="RUN")
]


SWITCHED: Mapping[str, bool] = {"true": True, "false": False}

# Options of lm_eval's `run` that have another name here, or no counterpart: name -> what to give instead. Those that
# are called as here, with _ or -, are not among them.
OF_LM_EVAL: Mapping[str, str] = {
    "config": "--plan FILE, a TOML file",
    "model-args": "--model CKPT, with --revision, --dtype, --device, --trust-remote-code, --decoder and --set",
    "use-cache": "nothing: every answer is kept in the run's folder, and --resume RUN continues it",
    "max-batch-size": "--batch-size N",
    "cache-requests": "nothing: prompts are built anew in each run",
    "check-integrity": "twotower-eval list tasks PATTERN, which says whether a task's data is here",
    "write-out": "nothing: the prompts of all answers are in the run's lm_eval/…/samples_*.jsonl",
    "show-config": "nothing: the run's manifest.json holds the settings of every task",
    "predict-only": "twotower-eval lm-eval run --model twotower --predict_only",
    "verbosity": "nothing: errors are one line, TWOTOWER_EVAL_TRACEBACK=1 shows the whole traceback",
    "wandb-args": "twotower-eval lm-eval run --model twotower --wandb_args …",
    "wandb-config-args": "twotower-eval lm-eval run --model twotower --wandb_config_args …",
    "trackio-args": "twotower-eval lm-eval run --model twotower --trackio_args …",
    "hf-hub-log-args": "twotower-eval report --format model-card",
    "confirm-run-unsafe-code": "nothing: tasks that execute a model's output are refused",
    "metadata": "twotower-eval lm-eval run --model twotower --metadata …",
}
# The short names of lm_eval's options.
SHORT_OF_LM_EVAL: Mapping[str, str] = {
    **{"C": "config", "t": "tasks", "M": "model", "a": "model-args", "L": "limit", "c": "use-cache"},
    **{"f": "num-fewshot", "b": "batch-size", "o": "output-path", "s": "log-samples", "E": "samples"},
    **{"v": "verbosity", "w": "write-out", "x": "predict-only"},
}


def hint_of(option: str) -> str:
    """What to give instead of an option that only lm_eval has; empty for all others."""
    name = option.lstrip("-").replace("_", "-")
    long = name if option.startswith("--") else SHORT_OF_LM_EVAL.get(name[:1], "")
    if long in OF_LM_EVAL:
        return f"{option} is an option of lm_eval; here: {OF_LM_EVAL[long]}"
    return "" if option.startswith("--") or not long else f"{option} is an option of lm_eval; here: --{long}"


def dashes(name: str) -> str:
    """An option's or a verb's name as it is here; lm_eval writes ``_`` for ``-``."""
    return name.replace("_", "-")


class PlanCommand(TyperCommand):
    """A command whose options are also taken as lm_eval takes them.

    Options such as ``--apply-chat-template`` may be given without their value, switches with one
    (``--fewshot-as-multiturn false``), and words of a list one by one (``--tasks a b``).
    """

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Rewrite such options as the parser takes them."""
        options = [param for param in self.params if param.param_type_name == "option"]
        has_arguments = len(options) < len(self.params)
        bare = {name for param in options if str(param.metavar).startswith("[") for name in param.opts}
        switches = {param.opts[0]: param.secondary_opts[0] for param in options if param.secondary_opts}
        lists = {name for param in options if "," in str(param.metavar) and not param.multiple for name in param.opts}
        whole: list[str] = []
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            name = dashes(arg) if arg.startswith("--") else arg
            if name in bare and (not rest or rest[0].startswith("-")):
                arg = f"{name}=true"
            elif name in switches and rest and rest[0].lower() in SWITCHED and not has_arguments:
                arg = name if SWITCHED[rest.pop(0).lower()] else switches[name]
            elif name in lists and rest:
                words = [rest.pop(0)]
                while rest and not rest[0].startswith("-") and not has_arguments:
                    words.append(rest.pop(0))
                whole.append(arg)
                arg = ",".join(words)
            whole.append(arg)
        return super().parse_args(ctx, whole)


def listing(*kinds: str) -> type[TyperCommand]:
    """A command class whose help ends with the names that installed packages register.

    ``kinds`` are keys of names.GROUPS. Packages are searched only when that help is shown.
    """

    class Listing(PlanCommand):
        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            super().format_epilog(ctx, formatter)
            for kind in kinds:
                try:
                    found = ", ".join(registered(kind))
                except UserError as error:
                    found = str(error)
                if found:
                    formatter.write(f"\nFrom installed packages, as {kind}: {found}\n")

    return Listing


def plan_options(cls: type, *, hidden: type | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb one option for each field of a plan's class, before its own parameters.

    The verb's first parameter is a dictionary of values by field, converted to the fields' types, of those that
    were given. Fields of ``hidden`` that ``cls`` lacks become options that the help does not list.
    """
    fields = dict.fromkeys((field.name for field in dataclasses.fields(cls)), cls)
    for field in dataclasses.fields(hidden) if hidden else ():
        if not option_of(typing.cast(type, hidden), field.name)[0].argument:
            fields.setdefault(field.name, typing.cast(type, hidden))

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def command(**values: object) -> None:
            read_values = {name: read(owner, name, values.pop(name)) for name, owner in fields.items()}
            verb({name: value for name, value in read_values.items() if value is not None}, **values)

        own = typing.get_type_hints(verb, include_extras=True)
        parameters = [_parameter(owner, name, hidden=owner is not cls) for name, owner in fields.items()]
        for parameter in list(inspect.signature(verb).parameters.values())[1:]:
            parameters.append(parameter.replace(annotation=own[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))
        described: Any = command
        described.__name__, described.__doc__, described.__module__ = verb.__name__, verb.__doc__, verb.__module__
        described.__signature__ = inspect.Signature(parameters)
        described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(cls: type, name: str, *, hidden: bool) -> inspect.Parameter:
    """A field as a typer parameter; ``None`` if not given, so that the plan's default applies."""
    declared, hint = option_of(cls, name)
    text = help_of(cls, name)
    if declared.argument:
        info = typer.Argument(help=text, metavar=declared.metavar, show_default=False)
    else:
        info = option(text, *option_names(cls, name), metavar=declared.metavar, hidden=hidden)
    kind = _inner(hint)
    several = declared.repeatable or (_is_table(kind) and declared.read is None)
    taken = list[str] if several else bool if kind is bool else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[taken | None, info]
    )


def option_names(cls: type, name: str) -> list[str]:
    """The names of a field's option, such as ``--devices`` and ``--device``; a switch that is on by default, or that
    may also be left open, has ``--no-…`` too."""
    declared, hint = option_of(cls, name)
    names = [f"--{one.replace('_', '-')}" for one in (name, *declared.other_names)]
    default = default_of(cls, name)
    has_no = default is True or (default is None and _inner(hint) is bool)
    return [f"{names[0]}/--no-{names[0][2:]}"] if has_no else names


def help_of(cls: type, name: str) -> str:
    """The help text of a field, with its default in brackets."""
    declared, hint = option_of(cls, name)
    default = default_of(cls, name)
    shown = declared.unset if default is None else name if default is True else _text(default)
    words = [str(arg) for arg in typing.get_args(_inner(hint))]
    text = declared.help.format(choices=" or ".join([", ".join(words[:-1]), *words[-1:]]))
    return f"{text} [{shown}]." if shown else f"{text}."


def default_of(cls: type, name: str) -> object:
    """The default of a field."""
    return next(field.default for field in dataclasses.fields(cls) if field.name == name)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return "" if value is False else f"{value:g}" if isinstance(value, float) else str(value)


def read(cls: type, name: str, value: object) -> object:
    """A value from the command line, converted to the field's type; UserError names the option."""
    declared, hint = option_of(cls, name)
    kind = _inner(hint)
    if declared.read is not None:
        return None if value is None else declared.read(str(value))
    if _is_switch_or_value(kind) and isinstance(value, str):
        return SWITCHED.get(value.lower(), value)
    if _is_table(kind):
        return parse_set(cast(Sequence[str], value)) if value else None
    if declared.repeatable:
        given = tuple(cast(Sequence[str], value or ()))
        if kind == tuple[str, ...]:
            return given or None
        if kind is not str:
            return tuple(map(table_of, given)) or None
        return given if len(given) > 1 else next(iter(given), None)
    number = next((arg for arg in typing.get_args(kind) if arg in (int, float)), kind)
    words = [word for arg in typing.get_args(kind) for word in typing.get_args(arg)]
    if value is not None and number in (int, float) and typing.get_origin(kind) is not tuple:
        return value if value in words else _number(str(value), number, option_names(cls, name)[0], words)
    if value is None or typing.get_origin(kind) is not tuple:
        return value
    item = typing.get_args(kind)[0]
    text = str(value)
    return numbers(text, item, option_names(cls, name)[0]) if item is not str else texts(text)


def _number(text: str, kind: object, option: str, words: Sequence[object] = ()) -> int | float:
    try:
        return float(text) if kind is float else int(text)
    except ValueError as error:
        wanted = " or ".join([f"a {'' if kind is float else 'whole '}number", *map(str, words)])
        raise UserError(f"{option} takes {wanted}, not {text!r}") from error


def _is_switch_or_value(kind: object) -> bool:
    """Whether a field's option may be given with a value or alone, as a switch."""
    return bool in typing.get_args(kind)


def _is_table(kind: object) -> bool:
    """Whether a field is a table: its option may be repeated."""
    return isinstance(origin := typing.get_origin(kind), type) and issubclass(origin, Mapping)


def _inner(hint: object) -> object:
    """An annotation without ``| None``."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    held = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    return held[0] if len(held) == 1 else typing.Union[tuple(held)]  # noqa: UP007


def texts(text: str | None) -> tuple[str, ...] | None:
    """Texts separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str, kind: object, option: str) -> tuple[str | float, ...]:
    """Numbers of one kind, or words that stand for one, separated by commas; UserError names the option."""
    words = [word for arg in typing.get_args(kind) for word in typing.get_args(arg)]
    number = float if kind is float else int
    try:
        return tuple(part if part in words else number(part) for part in texts(text) or ())
    except ValueError as error:
        wanted = " or ".join(["numbers" if number is float else "whole numbers", *words])
        raise UserError(f"{option} takes {wanted} separated by commas, not {text!r}") from error
