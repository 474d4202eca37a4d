"""The command-line option of a plan's field, and checks of its value against annotation and bounds."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from twotower_eval.decoder_settings import Settings
from twotower_eval.errors import UserError
from twotower_eval.records import AUTO, GRAPH_DEVICES, Attention
from twotower_eval.strict import check_value, plain
from twotower_eval.task_options import (
    GenKwargs,
    GivenArguments,
    GivenSeed,
    read_gen_kwargs,
    read_seed,
    read_template_args,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# What others call the number types.
DTYPE_WORDS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


class OnDevices(Protocol):
    """A plan with devices."""

    @property
    def devices(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field's option on the command line, as ``Annotated[type, Option(…)]`` on the field.

    ``{choices}`` in ``help`` is replaced by the field's possible words; its default follows in brackets, or ``unset``
    if that is ``None``. ``other_names`` are further names of the option. An ``argument`` is positional. What is
    ``repeatable`` may be given several times. ``read`` makes the field's value of the option's text. Values of a list
    are ``distinct`` unless it says otherwise.
    """

    help: str
    metavar: str | None = None
    unset: str | None = None
    other_names: tuple[str, ...] = ()
    argument: bool = False
    repeatable: bool = False
    read: Callable[[str], object] | None = None
    distinct: bool = True


# Fields of several plans, with their help texts.
Model = Annotated[
    str | None,
    Option(help="Checkpoint folder, or org/name[@revision] of the hub", metavar="CKPT", unset="the shipped miniature"),
]
Baseline = Annotated[
    str,
    Option(
        help="Baseline: checkpoint folder (ours or Hugging Face's), org/name[@revision] of the hub, miniature, or "
        "context-tower; repeat it for several",
        metavar="CKPT",
        repeatable=True,
    ),
]
Baselines = Annotated[
    tuple[Mapping[str, object], ...] | None,
    Option(
        help="One of several baselines as a table of what --baseline… say, and a name; repeat it for each",
        metavar="{KEY=V,…}",
        repeatable=True,
    ),
]
FROM_CONFIG = "what config.json says"
REVISION = Option(
    help="Branch, tag or commit of a model of the hub", metavar="REV", unset="what follows its @, or the default branch"
)
Revision = Annotated[str | None, REVISION]
BaselineRevision = Annotated[str | None, dataclasses.replace(REVISION, help="Branch, tag or commit of the baseline")]
TrustRemoteCode = Annotated[bool | None, Option(help="Run the Python code that comes with the model's files")]
BaselineTrustRemoteCode = Annotated[
    bool | None, Option(help="Run the Python code that comes with the baseline's files")
]
Family = Annotated[str | None, Option(help="Model family, or package.module:load", metavar="NAME", unset=FROM_CONFIG)]
BaselineFamily = Annotated[
    str | None, Option(help="Model family of the baseline's folder", metavar="NAME", unset=FROM_CONFIG)
]
AttentionKind = Annotated[
    Attention | None,
    Option(help="Attention of Hugging Face models: {choices}", metavar="KIND", unset="transformers' own"),
]
BaselineAttentionKind = Annotated[
    Attention | None, Option(help="The same for the baseline alone", metavar="KIND", unset="as --attention")
]
Tasks = Annotated[
    tuple[str, ...],
    Option(
        help="Tasks, groups, tags and suites, also as arc_* or by a file's path; -NAME leaves one out", metavar="A,B"
    ),
]
DecoderKind = Annotated[str, Option(help="Decoder, or package.module:Class", metavar="KIND")]
OWN = "the decoder's own, "  # a default of its Params; behind it that of block_diffusion
BlockSizes = Annotated[tuple[int, ...] | None, Option(help="Block sizes, crossed", metavar="N,N", unset=f"{OWN}16")]
AllSteps = Annotated[
    tuple[int | Literal["auto"], ...] | None,
    Option(help="Steps per block; auto: the block size", metavar="N,auto", unset=f"{OWN}auto"),
]
Thresholds = Annotated[
    tuple[float, ...] | None, Option(help="Confidence thresholds, crossed", metavar="X,X", unset=f"{OWN}0.8")
]
Temperature = Annotated[
    float | None, Option(help="Sampling temperature; 0 is greedy", metavar="T", unset="as the tasks ask")
]
Further = Annotated[
    Settings | None,
    Option(help="Any parameter of the decoder, crossed; one --set for each", metavar="NAME=V,V"),
]
BaselineDecoder = Annotated[
    str | None,
    Option(help="The baseline's decoder, or package.module:Class", metavar="KIND", unset="autoregressive"),
]
BaselineSet = Annotated[
    Settings | None,
    Option(help="Any parameter of the baseline's decoder; one --baseline-set for each", metavar="NAME=V"),
]
ApplyChatTemplate = Annotated[
    bool | str | None,
    Option(help="Ask through each model's own chat template, or the one of that name", metavar="[NAME]", unset="no"),
]
SystemInstruction = Annotated[str | None, Option(help="System instruction in front of every prompt", metavar="TEXT")]
FewshotAsMultiturn = Annotated[
    bool | None, Option(help="Examples as turns of the chat, not in one message", unset="with a chat template")
]
GenPrefix = Annotated[
    str | None, Option(help="What every answer begins with, given to the model", metavar="TEXT", unset="the task's own")
]
EnableThinking = Annotated[
    bool | None, Option(help="Tell the chat template whether the model may think", unset="the template's default")
]
ThinkEndToken = Annotated[
    str | int | None,
    Option(help="Text or id of the token that ends thinking; answers begin behind it", metavar="TOKEN", read=str),
]
ChatTemplateArgs = Annotated[
    GivenArguments | None,
    Option(
        help="What else the chat template is told, as key=value,… or JSON; a server hears it as chat_template_kwargs",
        metavar="K=V,…",
        unset="nothing",
        other_names=("chat_template_kwargs",),
        read=read_template_args,
    ),
]
RequestRates = Annotated[
    tuple[float, ...] | None,
    Option(
        help="Of endpoints only: send so many requests a second whatever the server does, crossed",
        metavar="R,R",
        unset="--concurrency in flight",
        other_names=("request_rate",),
    ),
]
Arrivals = Annotated[
    Literal["poisson", "constant"] | None,
    Option(help="Moments of --request-rates: {choices}", metavar="KIND", unset="poisson, by the seed"),
]
MinSeconds = Annotated[float, Option(help="Minimum seconds of rounds", metavar="S")]
WarmupRounds = Annotated[int, Option(help="Warm-up rounds: recorded, not reported", metavar="R")]
Threads = Annotated[int | None, Option(help="CPU threads", metavar="N", unset="torch's own choice")]
Seed = Annotated[int, Option(help="Random seed", metavar="S")]
TaskSeed = Annotated[
    GivenSeed,
    Option(
        help="Random seed, or lm-eval's list (python, numpy, torch, few-shot), in which None stands for its default",
        metavar="S[,S,S,S]",
        read=read_seed,
        distinct=False,
    ),
]
NumFewshot = Annotated[
    int | None,
    Option(help="Examples in each prompt; tasks that set 0 keep it", metavar="N", unset="as suite and task say"),
]
GivenGenKwargs = Annotated[
    GenKwargs | None,
    Option(
        help="Settings over those of generation tasks, as temperature=0,max_gen_toks=64 or JSON",
        metavar="K=V,K=V",
        read=read_gen_kwargs,
    ),
]
IncludePath = Annotated[
    tuple[str, ...] | None,
    Option(help="Folder with tasks of your own; may be given several times", metavar="DIR", repeatable=True),
]
SizeNumberType = Annotated[Literal["float32", "bfloat16", "float16"], Option(help="{choices}", metavar="TYPE")]
NumberType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option(help="{choices}; auto: the checkpoint's own, float32 on a CPU", metavar="TYPE"),
]
BaselineNumberType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    Option(help="The same for the baseline alone", metavar="TYPE", unset="as --dtype"),
]
Devices = Annotated[
    tuple[str, ...],
    Option(
        help="Devices, the context tower's first, e.g. cuda:0,cuda:1; auto: CUDA, then MPS, then the CPU",
        metavar="D,D",
        other_names=("device",),
    ),
]
BaselineDevice = Annotated[
    str | None,
    Option(
        help="The baseline's device", metavar="D", unset="the first of --devices", other_names=("baseline_devices",)
    ),
]
CudaGraphs = Annotated[bool, Option(help="Run small steps of both arms as CUDA graphs")]
CountingTokenizer = Annotated[
    str | None,
    Option(
        help="Of an endpoint: the tokenizer that counts tokens in both arms", metavar="FOLDER", unset="the other arm's"
    ),
]
RequestTimeout = Annotated[
    float | None,
    Option(help="Of an endpoint: seconds that its server may be silent", metavar="S", unset="600"),
]
DataDir = Annotated[str | None, Option(help="Folder with TASK/SPLIT.jsonl, as `data prepare` makes it", metavar="DIR")]


def option_of(cls: type, name: str) -> tuple[Option, object]:
    """A field's option, and its type without it; KeyError for a field without one."""
    said, bare = _parted(_hints(cls)[name])
    if said is None:
        raise KeyError(f"{cls.__name__}.{name} has no Option beside it")
    return said, bare


@functools.cache
def list_fields(cls: type) -> frozenset[str]:
    """The fields of a plan that hold a list of values."""
    hints = {name: _parted(hint)[1] for name, hint in _hints(cls).items()}
    return frozenset(
        name
        for name, hint in hints.items()
        if tuple in (typing.get_origin(hint), *map(typing.get_origin, typing.get_args(hint)))
    )


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    """A class's annotations with their options; cached, as help has to be instant."""
    return typing.get_type_hints(cls, include_extras=True)


def _parted(hint: object) -> tuple[Option | None, object]:
    """An annotation's option, and the annotation without it."""
    if typing.get_origin(hint) is not typing.Annotated:
        return None, hint
    base, *extras = typing.get_args(hint)
    said = next((extra for extra in extras if isinstance(extra, Option)), None)
    rest = tuple(extra for extra in extras if extra is not said)
    return said, typing.Annotated[(base, *rest)] if rest else base


def check_fields(plan: DataclassInstance) -> None:
    """Convert each field of a frozen plan to its type's form: 1.0 for 1, a tuple for a list.

    Equal plans then make cells with the same ids. UserError for a value that does not fit its field's type, and for a
    list that is empty or has duplicates.
    """
    hints = _hints(type(plan))
    for name in ("dtype", "baseline_dtype"):
        if (meant := DTYPE_WORDS.get(str(getattr(plan, name, "")))) is not None:
            raise UserError(f"{name} {getattr(plan, name, '')!r} is unknown; did you mean {meant}?")
    for field in dataclasses.fields(plan):
        value = check_value(field.name, _parted(hints[field.name])[1], plain(getattr(plan, field.name)))
        object.__setattr__(plan, field.name, value)
        if isinstance(value, tuple):
            if not value:
                raise UserError(f"{field.name} is empty: name at least one")
            if not option_of(type(plan), field.name)[0].distinct:
                continue
            twice = sorted({str(item) for item in value if value.count(item) > 1})
            if twice:
                raise UserError(f"{field.name} names {', '.join(twice)} twice")


def drop_refusals(plan: DataclassInstance) -> None:
    """Foreign code is not run unless that is asked for: to say so is to say nothing."""
    for name in ("trust_remote_code", "baseline_trust_remote_code"):
        if getattr(plan, name, None) is False:
            object.__setattr__(plan, name, None)


def check_at_least(plan: object, least: int, *names: str) -> None:
    """UserError if one of the named fields is below ``least`` or not finite; ``None`` is allowed."""
    for name in names:
        value = getattr(plan, name)
        for item in value if isinstance(value, tuple) else (value,):
            # "not >=" and not "<", so that NaN is refused too.
            if isinstance(item, (int, float)) and not least <= item < float("inf"):
                raise UserError(f"{name} must be {least} or more, not {item}")


def check_devices(plan: OnDevices) -> None:
    """UserError for ``auto`` beside other devices, as it stands for one, and for CUDA graphs on devices that have none;
    both are known from the plan before anything is loaded."""
    if AUTO in plan.devices and len(plan.devices) > 1:
        raise UserError("devices: auto stands for one device; name each tower's, or give auto alone")
    places = {*plan.devices, getattr(plan, "baseline_device", None)} - {AUTO, None}
    graphs = getattr(plan, "cuda_graphs", False)
    if graphs and any(str(device).partition(":")[0] not in GRAPH_DEVICES for device in places):
        raise UserError("CUDA graphs need CUDA devices: name some with --devices, or drop --cuda-graphs")
