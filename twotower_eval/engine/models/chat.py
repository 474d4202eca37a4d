"""Chat models: a checkpoint's own template writes messages as the text that its model was trained on, and what it
thinks is no part of its answer. Both as in lm-eval's ``hf``, with transformers' own templates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

from twotower_eval.engine.models.protocol import Model, remote, text_codec
from twotower_eval.errors import UserError
from twotower_eval.records import (
    Arm,
    ChatOptions,
    ChatPrompt,
    ChatUse,
    Generation,
    GenerationRow,
    canonical_json,
    plain_chat,
    sha256_text,
)
from twotower_eval.sources import Source, located
from twotower_eval.strict import parse_json, read_utf8

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
# What a template's code may raise on messages that it cannot write, beside jinja's own errors.
FAILURES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
DATE_CALL = "strftime_now"  # transformers' function for templates, by which some write today's date
NUM_KEPT = 64  # texts of one template: the options of a question share theirs

SERVERS_OWN = "the server's own"  # in the place of a template's digest, which nobody here knows

Messages = Sequence[Mapping[str, str]]
EMPTY: Mapping[str, object] = {}


class TemplateTokenizer(Protocol):
    """What is used here of transformers' tokenizers."""

    chat_template: str | dict[str, str] | None
    special_tokens_map: Mapping[str, object]

    def apply_chat_template(self, conversation: object, **options: object) -> str:
        """The conversation as text."""


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer has a chat template, by its files alone."""
    if (folder / TEMPLATE_FILE).is_file() or any((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        return True
    config = folder / "tokenizer_config.json"
    said = parse_json(read_utf8(config), str(config), infinities=True) if config.is_file() else None
    return isinstance(said, Mapping) and bool(said.get("chat_template"))


class ChatTemplate:
    """One template of a checkpoint's tokenizer, with the options that it is given.

    ``keeps_system``: a template without a system role is refused. Otherwise such messages are left out, as in lm-eval,
    and ``drops_system`` says that one was.
    """

    def __init__(
        self,
        tokenizer: TemplateTokenizer,
        *,
        checkpoint: str,
        source: str,
        name: str | None = None,
        template_args: Mapping[str, object] = EMPTY,
        keeps_system: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self.checkpoint, self.source, self.name = checkpoint, source, name
        self._given = dict(template_args)
        self._keeps_system = keeps_system
        self.drops_system = False
        self.text = lru_cache(maxsize=NUM_KEPT)(self._text)

    @property
    def sha256(self) -> str:
        """Over all that decides its texts: equal for two templates that write all messages alike."""
        tokens = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        return sha256_text(canonical_json([self.source, tokens, self._given]))

    @property
    def is_dated(self) -> bool:
        """Whether it writes today's date into its texts."""
        return DATE_CALL in self.source

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The messages as text, behind which an answer begins, or the last message goes on.

        UserError if the template fails on them, or takes no system message where one has to stay.
        """
        from jinja2 import TemplateError

        try:
            return self._written(messages, add_generation_prompt)
        except TemplateError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise self._refusal(error) from error
            first = error
        try:
            text = self._written(others, add_generation_prompt)
        except TemplateError as error:
            raise self._refusal(error) from error
        if self._keeps_system:
            why = " ".join(str(first).split())
            raise UserError(f"the chat template of {self.checkpoint} takes no system instruction ({why}): drop it")
        self.drops_system = True
        return text

    def _written(self, messages: Messages, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._given,
            )
        except TemplateError:
            raise
        except FAILURES as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> UserError:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(f"the chat template of {self.checkpoint} fails on the messages of these tasks ({why})")

    def _text(self, asked: str) -> str:
        """The text of a :attr:`ChatPrompt.asked`."""
        return self.render(**json.loads(asked))


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatFormat:
    """How a model reads prompts and where its answers begin; without anything given, as plain text and at once.

    ``served``: it is given messages, and its server writes them with the template there, which is told
    ``template_args``.
    """

    template: ChatTemplate | None = None
    served: bool = False
    template_args: Mapping[str, object] = field(default_factory=dict)
    think_end_token: str | int | None = None

    def text(self, prompt: str) -> str:
        """The text that a model of this format reads for a prompt; a server's has the messages with it."""
        if isinstance(prompt, ChatPrompt) and self.template is not None:
            return self.template.text(prompt.asked)
        return prompt if self.served else str(prompt)


PLAIN = ChatFormat()


def load_format(source: Source, options: ChatOptions) -> ChatFormat:
    """The format of a located model. UserError if it has no such template. A server applies its own."""
    if not options.template:
        return ChatFormat(think_end_token=options.think_end_token)
    if source.kind == "endpoint":
        return ChatFormat(served=True, template_args=options.handed, think_end_token=options.think_end_token)
    name, tokenizer = source.name, _tokenizer(source)
    chosen = None if options.template is True else str(options.template)
    template = ChatTemplate(
        tokenizer,
        checkpoint=name,
        source=_source(tokenizer.chat_template, chosen, name),
        name=chosen,
        template_args=options.handed,
        keeps_system=options.system_instruction is not None,
    )
    return ChatFormat(template=template, think_end_token=options.think_end_token)


def _tokenizer(source: Source) -> TemplateTokenizer:
    """transformers' tokenizer of a folder; the plain class where its own needs code or a model class that is not
    here."""
    import transformers

    library, folder, code = cast(Any, transformers), source.files, bool(source.trust_remote_code)
    found: TemplateTokenizer
    try:
        found = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
    except (ValueError, KeyError, AttributeError, ImportError, OSError) as first:
        try:
            found = library.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (ValueError, KeyError, AttributeError, ImportError, OSError):
            why = " ".join(str(first).split())
            raise UserError(
                f"the tokenizer of {source.name}, which holds its chat template, cannot be read ({why})"
            ) from first
    return found


def _source(templates: str | dict[str, str] | None, chosen: str | None, checkpoint: str) -> str:
    """The template that is meant; lm-eval's rule, but that a name which is not there is refused."""
    if not templates:
        raise UserError(f"{checkpoint} has no chat template: drop --apply-chat-template, or take an instruct model")
    named = templates if isinstance(templates, dict) else {"default": templates}
    if (source := named.get(chosen or "default")) is None:
        there = ", ".join(sorted(named))
        what = f"no chat template {chosen!r}" if chosen else "several chat templates and no default one"
        raise UserError(f"{checkpoint} has {what}: give --apply-chat-template one of {there}")
    return source


def attach_format(model: Model, chat: ChatFormat) -> None:
    """Have the model read prompts in this format, wherever its prompts are encoded."""
    cast(Any, model).chat = chat


def attach_formats(models: Sequence[Model], chats: Sequence[ArmChat], prompts: Sequence[str] = ()) -> None:
    """The same for the models of every baseline and, behind them, of the candidate. UserError for a server that would
    answer something else than ``prompts``."""
    for model, chat in zip((models[-1], *models[:-1]), chats, strict=True):
        attach_format(model, chat.format)
        if (served := remote(model)) is not None and served.asks_chats:
            served.check_chats(prompts)


def format_of(model: object) -> ChatFormat:
    """The model's own format; plain where none is attached."""
    found: ChatFormat = getattr(model, "chat", PLAIN)
    return found


def chat_extra(model: Model) -> dict[str, str]:
    """What a cell's id is over beside its checkpoint: the template that its prompts are read through."""
    read = format_of(model)
    if read.served:
        return {"chat_template": SERVERS_OWN}
    return {} if read.template is None else {"chat_template": read.template.sha256}


def with_answer(row: GenerationRow, model: Model) -> GenerationRow:
    """The row with its answer behind the last end of thinking, if the model has one: lm-eval's rule.

    Blanks in front of the answer go too, also where no end of thinking is found.
    """
    end = format_of(model).think_end_token
    if end is None:
        return row
    made = row.generation
    if isinstance(end, int):
        answer, num_thinking = _behind_token(made, end, model)
    else:
        answer, num_thinking = _behind_text(made, end, model)
    return dataclasses.replace(row, answer=answer.lstrip(), num_thinking_tokens=num_thinking)


def _behind_token(made: Generation, end: int, model: Model) -> tuple[str, int | None]:
    places = [place for place, token in enumerate(made.token_ids) if token == end]
    if not places:
        return made.text or "", None
    codec, num_thinking = text_codec(model), places[-1] + 1
    before, text = codec.decode(made.token_ids[:num_thinking]), made.text or ""
    # In front of a stop string there may be a part of a token that is not counted, so the text itself is cut.
    return (
        text[len(before) :] if text.startswith(before) else codec.decode(made.token_ids[num_thinking:]),
        num_thinking,
    )


def _behind_text(made: Generation, end: str, model: Model) -> tuple[str, int | None]:
    *thoughts, answer = (made.text or "").split(end)
    if not thoughts:
        return answer, None
    codec, low, high = text_codec(model), 0, len(made.token_ids)
    while low < high:  # the fewest tokens whose text holds every end of thinking
        middle = (low + high) // 2
        enough = codec.decode(made.token_ids[:middle]).count(end) >= len(thoughts)
        low, high = (low, middle) if enough else (middle + 1, high)
    return answer, low


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmChat:
    """The format in which an arm reads prompts; known before its weights are loaded."""

    arm: Arm
    source: Source
    options: ChatOptions
    format: ChatFormat

    @property
    def render(self) -> Callable[[Messages, bool], str] | None:
        """What writes messages as text; ``None`` where prompts are plain text. Of a server's template nothing is known
        here."""
        if self.format.template is not None:
            return self.format.template.render
        return plain_chat if self.format.served else None

    def use(self, prompts: Iterable[str], *, generates: bool) -> ChatUse | None:
        """How the arm reads these prompts, for a manifest; ``None`` if its tokenizer has no chat template.

        ``prompts`` are those that the candidate reads. UserError if the template fails on one of them.
        """
        alike = [self.format.text(prompt) == str(prompt) for prompt in prompts]
        template = self.format.template
        if self.format.served:
            return ChatUse(
                arm=self.arm,
                checkpoint=self.source.name,
                applied=True,
                generates=generates,
                served=True,
            )
        if template is None:
            plain = ChatUse(arm=self.arm, checkpoint=self.source.name, applied=False, generates=generates)
            return plain if self.source.folder is not None and has_chat_template(self.source.folder) else None
        return ChatUse(
            arm=self.arm,
            checkpoint=self.source.name,
            applied=True,
            generates=generates,
            name=template.name,
            template=template.source,
            sha256=template.sha256,
            drops_system=template.drops_system,
            is_dated=template.is_dated,
            reads_alike=all(alike),
        )


def arm_chats(sources: Sequence[Source], options: ChatOptions) -> tuple[ArmChat, ...]:
    """The formats of the candidate and of every baseline; each tokenizer is read once, and none without a template."""
    formats: dict[str, ChatFormat] = {}
    made = []
    for place, given in enumerate(sources):
        source = located(given, extent="settings", needs_config=False)
        if source.place not in formats:
            formats[source.place] = load_format(source, options)
        arm: Arm = "baseline" if place else "candidate"
        made.append(ArmChat(arm=arm, source=source, options=options, format=formats[source.place]))
    return tuple(made)


def chat_uses(chats: Sequence[ArmChat], prompts: Sequence[str], *, generates: bool) -> tuple[ChatUse, ...] | None:
    """How each arm reads these prompts; ``None`` where no tokenizer has a chat template.

    UserError if templates differ, or one is a server's, and a prompt is no longer the text of messages, so that it is
    of one template only.
    """
    templates = {chat.format.template.sha256 for chat in chats if chat.format.template is not None}
    is_served = any(chat.format.served for chat in chats)
    is_changed = any(not isinstance(prompt, ChatPrompt) for prompt in prompts if prompt or is_served)
    if is_changed and is_served:
        raise UserError("a task changes the text that a chat template wrote, and servers take messages: leave it out")
    if is_changed and len(templates) > 1:
        raise UserError(
            "a task changes the text that a chat template wrote, and baseline and candidate have unlike templates: "
            "evaluate them apart, or leave the task out"
        )
    found = [(chat, chat.use(prompts, generates=generates)) for chat in chats]
    if is_served:  # of the texts of a server's template nothing is known
        own = chats[0].source.place
        found = [(chat, use and dataclasses.replace(use, reads_alike=chat.source.place == own)) for chat, use in found]
    return tuple(use for _, use in found if use is not None) or None
