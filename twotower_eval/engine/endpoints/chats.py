"""Chats of models behind servers: their requests, and what a server takes of these.

What a server ignores is found before anything long, as it would answer another question: what its template is told,
and a message that it should continue.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Protocol

from twotower_eval.engine.endpoints.client import NO_ENTRY, PROBE, EndpointError
from twotower_eval.engine.endpoints.streams import Reply
from twotower_eval.errors import UserError
from twotower_eval.records import ChatPrompt, chat_json

BUDGETS = ("max_tokens", "max_completion_tokens")  # OpenAI's own models take only the second
CONTINUED: Mapping[str, object] = {"add_generation_prompt": False, "continue_final_message": True}
WORD = "A"  # an answer is begun with one, or with two


class Probed(Protocol):
    """A model that is asked chats: ``probed`` asks a short question once."""

    budget_name: str

    def probed(self, prompt: str) -> Reply: ...


def chat_body(prompt: str, template_args: Mapping[str, object]) -> dict[str, object]:
    """What a request has of a prompt. One without messages is that of a user; a last message of the assistant goes
    on."""
    said = json.loads(prompt.asked if isinstance(prompt, ChatPrompt) else _one_turn(prompt))
    told = {"chat_template_kwargs": dict(template_args)} if template_args else {}
    return {"messages": said["messages"], **told, **({} if said["add_generation_prompt"] else CONTINUED)}


def _one_turn(text: str) -> str:
    return chat_json([{"role": "user", "content": text}], add_generation_prompt=True)


def find_budget_name(model: Probed) -> None:
    """Set what the server calls a chat's budget of tokens. EndpointError if it answers no chat."""
    refused: list[EndpointError] = []
    for model.budget_name in BUDGETS:
        try:
            model.probed(PROBE)
        except EndpointError as error:
            if error.status is None or error.status in NO_ENTRY:
                raise
            refused.append(error)
        else:
            return
    raise refused[0]


def check_template_args(model: Probed, template_args: Mapping[str, object]) -> None:
    """EndpointError for a server that refuses what its template is told."""
    try:
        model.probed(PROBE)
    except EndpointError as error:
        raise EndpointError(
            f"{error}: this server may not take chat_template_kwargs ({', '.join(template_args)})", error.status
        ) from error


def check_continues(model: Probed, prompts: Iterable[str], source: str) -> None:
    """UserError for a server that answers behind a message which it should continue, if one of the prompts has one."""
    begun = (json.loads(prompt.asked) for prompt in prompts if isinstance(prompt, ChatPrompt))
    if not all(said["add_generation_prompt"] for said in begun) and not continues_messages(model):
        raise UserError(
            f"{source}: this server begins another message where an answer is begun for it: leave out gen_prefix, or "
            "the tasks that have one"
        )


def continues_messages(model: Probed) -> bool:
    """Whether the server goes on with a last message of the assistant, by the tokens that it counts of prompts.

    A second word of the message costs as much as the first. If the first costs more, the message was closed and
    another one begun behind it. A server that does not count tokens is taken for one that does not continue.
    """
    try:
        counts = [model.probed(_begun(words)).num_prompt_tokens for words in ("", WORD, f"{WORD} {WORD}")]
    except EndpointError as error:
        if error.status is None:
            raise
        return False
    if None in counts:
        return False
    none, one, two = (count or 0 for count in counts)
    return one - none <= two - one


def _begun(words: str) -> ChatPrompt:
    """A question, and the beginning of its answer if there is one."""
    begun = [{"role": "assistant", "content": words}] if words else []
    asking = {"role": "user", "content": PROBE}
    return ChatPrompt(words, chat_json([asking, *begun], add_generation_prompt=not words))
