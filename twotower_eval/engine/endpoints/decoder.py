"""The decoder of a model behind a server: it asks for completions, several at a time.

How the server makes tokens is its own affair. Answers are counted in tokens of one tokenizer, the same for both arms of
a comparison, from the text before the first stop string.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from twotower_eval.engine.decoders.rows import (
    Clock,
    OnFinish,
    check_batch_size,
    check_prompts,
    check_temperature,
    make_rules,
)
from twotower_eval.engine.endpoints.client import Ask, EndpointError, Failure
from twotower_eval.engine.endpoints.model import EndpointModel
from twotower_eval.engine.endpoints.streams import Reply
from twotower_eval.engine.models.chat import format_of
from twotower_eval.engine.models.protocol import Model, TextCodec, remote
from twotower_eval.errors import UserError
from twotower_eval.records import FinishReason, Generation, Prompt, Served


@dataclass(frozen=True, kw_only=True)
class EndpointParams:
    """``temperature`` 0 is greedy. All else is the server's own."""

    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


@dataclass(frozen=True, kw_only=True)
class Order:
    """One request of a stream; ``due_s`` is when it is to be sent, in seconds from the stream's start."""

    prompt: Prompt
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    stop: Sequence[str]
    due_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What became of an :class:`Order`: its answer, or what failed. Moments are in seconds from the stream's start."""

    result: Generation | Failure
    due_s: float
    sent_s: float
    ended_s: float


class EndpointDecoder:
    """Completions of a server. With a ``clock`` replies are streamed and timed, and texts are read behind the last."""

    KIND = "endpoint"
    Params = EndpointParams
    VERSION = 1

    def __init__(self, model: Model, params: EndpointParams, *, clock: Clock | None = None) -> None:
        if remote(model) is None:
            raise UserError(
                f"decoder 'endpoint' is for models behind a server, and {model.checkpoint.name} is here: "
                "leave --decoder out or take another"
            )
        self.model: EndpointModel = model  # type: ignore[assignment]
        self.params, self.clock = params, clock
        self._counts = clock is not None and self.model.counts_streams  # asked for now, not on a clock

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        max_batch_size: int | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Generation]:
        """See :class:`twotower_eval.engine.decoders.Decoder`; ``max_batch_size`` requests at a time."""
        model = self.model
        make_rules(model, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)  # type: ignore[arg-type]
        check_prompts(model, prompts)  # type: ignore[arg-type]
        sent_stop = self._sent_stop(stop, eos_token_ids)
        asks = [self._ask(prompt, max_new_tokens, sent_stop) for prompt in prompts]
        replies: dict[int, Reply] = {}
        made: dict[int, Generation] = {}
        now = self.clock or time.perf_counter
        began_s = now()

        def read(index: int) -> None:
            made[index] = self._generation(prompts[index], replies[index], stop, bool(sent_stop), began_s)
            if on_finish:
                on_finish(made[index])

        def hear(index: int, reply: Reply) -> None:
            replies[index] = reply
            if self.clock is None:  # a clock stands while texts are read, and the other requests go on
                read(index)

        model.client.ask(
            asks, at_once=check_batch_size(max_batch_size), on_reply=hear, on_retry=model.on_retry, now=now
        )
        for index in replies if self.clock else ():
            read(index)
        return [made[index] for index in range(len(prompts))]

    def stream(self, orders: Sequence[Order], *, in_flight: int | None = None) -> list[Answered]:
        """Send every order once, and what became of each.

        With ``in_flight`` in a closed loop: so many at a time, each due as soon as a place is free. Else each when it
        is due, whatever the server does. An answer's ``finish_s`` is from the moment when it was due. EndpointError
        where a request is refused, as another one would be, or where none is answered.
        """
        now = self.clock or time.perf_counter
        found: dict[int, Reply | Failure] = {}
        stops = [self._sent_stop(order.stop, order.eos_token_ids) for order in orders]
        asks = [
            self._ask(order.prompt, order.max_new_tokens, stop, order.due_s)
            for order, stop in zip(orders, stops, strict=True)
        ]
        began_s = now()
        self.model.client.ask(
            asks, at_once=in_flight, on_reply=found.__setitem__, on_failure=found.__setitem__, now=now
        )
        failures = [one for one in found.values() if isinstance(one, Failure)]
        if len(failures) == len(orders) > 0:
            url = self.model.client.address.url
            raise EndpointError(f"{url}: none of {len(orders)} requests was answered: {failures[0].detail}")
        answered = []
        for at, order in enumerate(orders):
            one = found[at]
            due_s = one.sent_s - began_s if in_flight is not None else order.due_s
            made: Generation | Failure = (
                one
                if isinstance(one, Failure)
                else self._generation(order.prompt, one, order.stop, bool(stops[at]), began_s + due_s)
            )
            answered.append(
                Answered(result=made, due_s=due_s, sent_s=one.sent_s - began_s, ended_s=one.ended_s - began_s)
            )
        return answered

    def _sent_stop(self, stop: Sequence[str], eos_token_ids: Sequence[int]) -> list[str]:
        """The stop strings but for those that the server knows."""
        return [text for text in stop if text not in _texts_of(self.model, eos_token_ids)]

    def _ask(self, prompt: Prompt, max_new_tokens: int, stop: Sequence[str], due_s: float = 0.0) -> Ask:
        temperature = self.params.temperature
        more: dict[str, object] = {"temperature": temperature, **({"stop": list(stop)} if stop else {})}
        if temperature > 0:
            more["seed"] = prompt.seed % 2**31  # more bits than some servers read
        if self.clock is not None:
            more["stream"] = True
            if self._counts:
                more["stream_options"] = {"include_usage": True}
        body = self.model.body(self.model.sent(prompt), max_new_tokens, **more)
        return Ask(path=self.model.path, body=body, label=prompt.id, start_s=due_s)

    def _generation(
        self, prompt: Prompt, reply: Reply, stop: Sequence[str], asked_to_stop: bool, began_s: float
    ) -> Generation:
        answer, finish = cut(reply, stop, asked_to_stop)
        text, ids = self._whole(reply, answer)
        num_made = len(ids) if text == reply.text and not reply.reasoning else self._num_made(reply)
        timed = self.clock is not None
        return Generation(
            prompt_id=prompt.id,
            token_ids=ids,
            text=text,
            finish=finish,
            num_prompt_tokens=len(prompt.token_ids),
            num_tokens=len(ids),
            num_discarded_tokens=max(0, num_made - len(ids)),
            num_context_forwards=0,
            num_denoiser_forwards=0,
            finish_s=reply.ended_s - began_s if timed else None,
            served=Served(
                num_tokens=reply.num_tokens,
                num_prompt_tokens=reply.num_prompt_tokens,
                num_retries=reply.num_retries,
                num_cached_tokens=reply.num_cached_tokens,
                num_pieces=len(reply.arrivals_s) if timed else None,
                num_arrivals=reply.num_arrivals if timed else None,
                first_s=reply.arrivals_s[0] - reply.sent_s if reply.arrivals_s else None,
                last_s=reply.arrivals_s[-1] - reply.sent_s if reply.arrivals_s else None,
            ),
        )

    def _whole(self, reply: Reply, answer: str) -> tuple[str, tuple[int, ...]]:
        """The text up to the end of an answer, and its tokens. What a server tells apart as thoughts stands in front of
        the answer, as models here write it, where it is known what ends thoughts; else it is left out."""
        codec, end = self.model.tokenizer, format_of(self.model).think_end_token
        if not reply.reasoning or end is None:
            return answer, ids_of(codec, answer)
        has_ended = bool(reply.text) or reply.finish != "length"
        if isinstance(end, int):  # a special token, which is no part of a text
            ending = (end,) if has_ended else ()
            return reply.reasoning + answer, (*ids_of(codec, reply.reasoning), *ending, *ids_of(codec, answer))
        text = reply.reasoning + (end if has_ended else "") + answer
        return text, ids_of(codec, text)

    def _num_made(self, reply: Reply) -> int:
        """Tokens of all that a server gave."""
        text, ids = self._whole(reply, reply.text)
        return len(ids_of(self.model.tokenizer, reply.reasoning + text)) if text == reply.text else len(ids)


def ids_of(codec: TextCodec, text: str) -> tuple[int, ...]:
    """The tokens of an answer; none of a text that the tokenizer cannot read."""
    try:
        return tuple(codec.encode(text)) if text else ()
    except UserError:
        return ()


def cut(reply: Reply, stop: Sequence[str], asked_to_stop: bool) -> tuple[str, FinishReason]:
    """The useful text of a reply, before the first stop string, and why it ended.

    Servers call both a stop string and the model's own end ``stop``. Where one does not tell which it was, and was
    given stop strings (``asked_to_stop``), it is taken for one of them.
    """
    text = reply.text
    for one in stop:
        text = text.split(one, 1)[0]
    if text != reply.text:
        return text, "stop"
    if reply.finish == "length":
        return text, "length"
    by_string = isinstance(reply.stop_reason, str) if reply.tells_stop else asked_to_stop
    return text, "stop" if by_string else "eos"


def _texts_of(model: EndpointModel, token_ids: Sequence[int]) -> set[str]:
    return {model.tokenizer.decode_with_special([token]) for token in token_ids}
