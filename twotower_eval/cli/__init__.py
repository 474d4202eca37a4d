"""The command line: parse, build, call, print. Heavy imports stay inside the verbs, so that help is instant."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from twotower_eval.cli import analyse, measure
from twotower_eval.cli import listing as listing_verb
from twotower_eval.cli.options import dashes, hint_of, listing
from twotower_eval.cli.runs import EXIT_INTERRUPTED
from twotower_eval.errors import UserError
from twotower_eval.plugin_calls import TRACEBACK_VARIABLE
from twotower_eval.store.environment import let_threads_sleep
from twotower_eval.version import __version__

EXIT_USER_ERROR = 2
BUG = "This is a bug of twotower-eval or of a plug-in: please report it with this traceback and the command: {command}"

# What torchao, where it is installed, writes to a terminal while transformers imports it: logger -> how it begins.
# Kernels of other machines are not loaded, and names of its own are registered twice over; users can mend neither.
IMPORT_NOISE = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass and is now natively "}


class _WithoutNoise(logging.Filter):
    """Keeps all records of a logger but warnings of :data:`IMPORT_NOISE`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        noise = IMPORT_NOISE[record.name]
        return record.levelno != logging.WARNING or not str(record.msg).startswith(noise)


for _name in IMPORT_NOISE:  # here, not in main: a process that a verb starts only imports this module
    logging.getLogger(_name).addFilter(_WithoutNoise())

app = typer.Typer(
    help="Does a parallel decoder keep its quality, and is it faster? Evaluate, time and report two-tower and "
    "diffusion models, any Hugging Face causal LM, and models behind OpenAI-compatible servers.",
    epilog=f"Errors are one line; set {TRACEBACK_VARIABLE}=1 for the whole traceback.",
    add_completion=False,
    rich_markup_mode=None,  # rich would cost a third of the help's time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "token_normalize_func": dashes},
)
app.command(
    cls=listing("model family", "decoder"),
    help="Score baseline and candidate on the same documents; --resume continues a stopped run.",
)(measure.run)
app.command(
    cls=listing("model family", "decoder"),
    help="Time baseline and candidate in interleaved rounds; timed answers are scored afterwards.",
)(measure.speed)
app.command(help="Measure what a size of model costs per step, on random weights: no checkpoint is needed.")(
    measure.size
)
app.command(
    cls=listing("model family"), help="Check a checkpoint, its kernels and its decoding before anything is measured."
)(measure.verify)
app.command(
    cls=listing("report section"),
    help="Write a report with tables and plots from run folders; needs neither torch nor a GPU.",
)(analyse.report)
app.command(help="Check the statistics on simulated data with known truth: interval coverage and wrong verdicts.")(
    analyse.calibrate
)
app.command(
    "list",
    help="List tasks, suites, decoders, families, claims or sections: what can be named, and whether it is here.",
)(listing_verb.names)

claims_app = typer.Typer(help="Judge claims that were written before measuring.", rich_markup_mode=None)
claims_app.command(
    help="Judge claims. Exit code: 0 supported, 3 refuted, 5 invalid, 4 inconclusive, 6 not measured; of several, the "
    "first in the order refuted, invalid, inconclusive, not measured, supported. A speedup of fewer than 5 launches is "
    "supported in these launches (0; with --strict 4). Every run of a claim's point is a look, also those that lie "
    "beside the given ones; looks beyond the declared ones are judged more strictly."
)(analyse.check)
claims_app.command(help="Recompute published numbers from one another; exit code 3 if a stated one does not follow.")(
    analyse.audit
)
app.add_typer(claims_app, name="claims")

train_app = typer.Typer(help="Train the models that the project ships.", rich_markup_mode=None)
train_app.command(
    help="Train the miniature pair, or a small model of another family; the same command continues a stopped training."
)(measure.miniature)
app.add_typer(train_app, name="train")

data_app = typer.Typer(help="Prepare benchmark files.", rich_markup_mode=None)
data_app.command(help="Make DIR/TASK/SPLIT.jsonl for --data-dir from the files that benchmarks publish.")(
    measure.prepare
)
data_app.command(help="Say where benchmarks are published, under which licence, and which files to put where.")(
    measure.sources
)
app.add_typer(data_app, name="data")


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="lm-eval's own command, which knows our models: lm-eval run --model twotower --model_args pretrained=CKPT,"
    "decoder=block_diffusion,threshold=0.9 --tasks …",
)
def _lm_eval(context: typer.Context) -> None:
    from twotower_eval import api

    api.lm_eval(context.args)


@app.command("bench", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _bench() -> None:
    """A verb of earlier versions."""
    raise UserError("benches are no longer part of the package: run make bench in a checkout of the project")


@app.callback(invoke_without_command=True)
def _global(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code: 0 done, 2 a mistake in the input, 130 Ctrl-C.

    Errors that neither the user nor the system causes are bugs: they are raised, with a traceback and exit code 1.
    ``verify`` ends with 5 if a check failed, ``claims`` with 3 to 6 as its help says.
    """
    let_threads_sleep()  # before any verb loads torch
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(arguments or ["--help"], prog_name="twotower-eval", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(_missing_command(error) or hint_of(getattr(error, "option_name", "")) or error.format_message())
    except (UserError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(str(error) or type(error).__name__)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except Exception as error:
        error.add_note(BUG.format(command=shlex.join(["twotower-eval", *arguments])))  # Python's traceback ends with it
        raise
    return code if isinstance(code, int) else 0


def _missing_command(error: typer.TyperException) -> str:
    """What a verb of several commands wants after it; empty for other errors."""
    context = getattr(error, "ctx", None)
    commands = getattr(getattr(context, "command", None), "commands", None)
    if context is None or not commands or not error.format_message().startswith("Missing command"):
        return ""
    return f"{context.command_path} needs a command after it: {' or '.join(commands)}"


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return EXIT_USER_ERROR
