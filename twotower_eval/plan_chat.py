"""What a plan says of chats: how prompts are asked, and where answers begin behind thinking."""

from __future__ import annotations

from typing import Protocol

from twotower_eval.errors import UserError
from twotower_eval.records import ChatOptions
from twotower_eval.task_options import GivenArguments


class AsksChats(Protocol):
    """A plan with these fields."""

    @property
    def apply_chat_template(self) -> bool | str | None: ...
    @property
    def system_instruction(self) -> str | None: ...
    @property
    def fewshot_as_multiturn(self) -> bool | None: ...
    @property
    def gen_prefix(self) -> str | None: ...
    @property
    def enable_thinking(self) -> bool | None: ...
    @property
    def think_end_token(self) -> str | int | None: ...
    @property
    def chat_template_args(self) -> GivenArguments | None: ...


def chat_options(plan: AsksChats) -> ChatOptions:
    """How a plan's prompts are asked: few-shot examples are turns of a chat unless it says otherwise, as in lm-eval."""
    multiturn = plan.fewshot_as_multiturn
    return ChatOptions(
        template=plan.apply_chat_template,
        system_instruction=plan.system_instruction,
        fewshot_as_multiturn=bool(plan.apply_chat_template) if multiturn is None else multiturn,
        gen_prefix=plan.gen_prefix,
        enable_thinking=plan.enable_thinking,
        think_end_token=plan.think_end_token,
        template_args=plan.chat_template_args,
    )


def hold_chat(plan: AsksChats) -> None:
    """The chat options of a frozen plan in one form each; UserError for one that would have no effect."""
    if not plan.apply_chat_template:
        object.__setattr__(plan, "apply_chat_template", None)
    token = plan.think_end_token
    if isinstance(token, str) and token.isdecimal():
        object.__setattr__(plan, "think_end_token", int(token))
    if token == "":
        raise UserError("think_end_token is empty: name the token that ends the model's thinking, such as </think>")
    if plan.system_instruction == "":
        object.__setattr__(plan, "system_instruction", None)
    if plan.fewshot_as_multiturn and not plan.apply_chat_template:
        raise UserError("fewshot_as_multiturn makes examples turns of a chat: give apply_chat_template, too")
    for name in ("enable_thinking", "chat_template_args"):
        if getattr(plan, name) is not None and not plan.apply_chat_template:
            raise UserError(f"{name} is told to the chat template: give apply_chat_template, too")
    if plan.enable_thinking and plan.think_end_token is None:
        raise UserError("enable_thinking needs think_end_token, behind which answers begin, such as </think>")
