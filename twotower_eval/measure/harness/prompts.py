"""The prompts of a plan: its tasks as the candidate reads them, how each arm reads them, and how long they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twotower_eval.engine.models.chat import ArmChat, Messages, arm_chats, chat_uses, format_of
from twotower_eval.engine.models.protocol import Model, text_codec
from twotower_eval.errors import UserError
from twotower_eval.measure.suites import BuiltTask, resolve_tasks
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_chat import chat_options
from twotower_eval.plan_sources import chat_sources
from twotower_eval.records import ChatUse

SPARE_TOKENS = 8  # more special tokens than a tokenizer adds to a text


def asked_chats(plan: RunPlan | SpeedPlan) -> tuple[ArmChat, ...]:
    """The chat template of each arm, the candidate's first; none where the plan asks for none."""
    return arm_chats(chat_sources(plan), chat_options(plan)) if plan.apply_chat_template else ()


def built_tasks(plan: RunPlan, asked: Sequence[ArmChat]) -> list[BuiltTask]:
    """The tasks of a run, as the candidate reads them. UserError for a task that cannot be asked so."""
    tasks = resolve_tasks(
        plan.tasks,
        data_dir=plan.data_dir,
        limit=plan.limit,
        seed=plan.seed,
        samples=plan.samples,
        max_new_tokens=plan.max_new_tokens,
        temperature=plan.temperature,
        **_task_options(plan, asked),
    )
    scored = [task.name for task in tasks if task.request == "loglikelihood"]
    if plan.enable_thinking and scored:
        raise UserError(
            f"{', '.join(scored)}: options are scored and nothing is thought before them, so that lm-eval refuses "
            "enable_thinking there: leave them out, or drop --enable-thinking"
        )
    return tasks


def timed_tasks(plan: SpeedPlan) -> list[BuiltTask]:
    """The tasks whose prompts a speed run times and whose answers are scored."""
    return resolve_tasks(
        plan.tasks,
        data_dir=plan.data_dir,
        seed=plan.seed,
        samples=plan.samples,
        temperature=plan.temperature,
        **_task_options(plan, asked_chats(plan)),
    )


def _task_options(plan: RunPlan | SpeedPlan, asked: Sequence[ArmChat]) -> dict[str, Any]:
    """What both verbs pass on to the tasks as the plan says it."""
    return {
        "include_path": plan.include_path,
        "num_fewshot": plan.num_fewshot,
        "gen_kwargs": plan.gen_kwargs,
        "chat": chat_options(plan),
        "render": _render(asked),
    }


def _render(asked: Sequence[ArmChat]) -> Callable[[Messages, bool], str] | None:
    """What writes chats as the candidate reads them; beside a server, whose template is its own, as the first arm
    does that has one here."""
    here = [chat.render for chat in asked if chat.format.template is not None]
    return next(iter((*here, *(chat.render for chat in asked))), None)


def uses_of(tasks: Sequence[BuiltTask], chats: Sequence[ArmChat]) -> tuple[ChatUse, ...] | None:
    """How each arm reads the prompts of tasks. UserError if an arm's chat template fails on one of them."""
    return chat_uses(chats, first_texts(tasks), generates=any(task.generates for task in tasks))


def first_texts(tasks: Sequence[BuiltTask]) -> list[str]:
    """What is asked in these tasks, each text once."""
    asking = (task for task in tasks if task.request != "loglikelihood_rolling")  # whose texts are asked as they are
    firsts = (instance.args[0] for task in asking for doc in task.docs for instance in doc.instances)
    return list({getattr(prompt, "asked", prompt): prompt for prompt in firsts}.values())  # options share theirs


def longest_context(tasks: Sequence[BuiltTask], model: Model) -> int:
    """Tokens of the longest context that a model sees in these tasks, or slightly more.

    Texts are encoded only if their bytes, an upper bound, reach a length at which nothing was tried.
    """
    read = format_of(model).text
    asked = [
        ("".join(read(part) for part in instance.args if isinstance(part, str)), task.max_new_tokens or 0)
        for task in tasks
        for doc in task.docs
        for instance in doc.instances
    ]
    found = max((len(text.encode()) + budget for text, budget in asked), default=0)
    unproved: Sequence[int] = getattr(model, "unproved", ())
    if unproved and found + SPARE_TOKENS > unproved[0] - 2:
        found = max(len(text_codec(model).encode(text)) + budget for text, budget in asked)
    return min(found + SPARE_TOKENS, model.max_length or found + SPARE_TOKENS)
