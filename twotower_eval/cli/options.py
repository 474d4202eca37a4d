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
Out = Annotated[Path, option("Parent folder of run folders [results].", "--out", metavar="DIR")]
Resume = Annotated[
    str | None, option("Continue an interrupted run: its folder, or its id under --out.", "--resume", metavar="RUN")
]


SWITCHED: Mapping[str, bool] = {"true": True, "false": False}


class PlanCommand(TyperCommand):
    """A command with options that may be given without their value, as ``--apply-chat-template``."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Give a value to such options that are given alone: in front of another option, or at the end."""
        bare = {name for param in self.params if str(param.metavar).startswith("[") for name in param.opts}
        whole: list[str] = []
        for arg, following in zip(args, [*args, "-"][1:], strict=True):
            whole.append(f"{arg}=true" if arg in bare and following.startswith("-") else arg)
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
    words = [str(arg) for arg in typing.get_args(hint)]
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
