"""Answers of one cell: their keys, their journal rows, their sums, and their witnesses."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower_eval.engine.decoders import Decoder
from twotower_eval.engine.decoders.reported import (
    CallRequest,
    check_all_counted,
    check_answers,
    check_forwards,
    finished,
    generating,
)
from twotower_eval.engine.models.counting import UncountedForwards, WatchedModel, watched_in_place
from twotower_eval.engine.models.protocol import Model, reads_on
from twotower_eval.engine.models.witness import Tally
from twotower_eval.errors import UserError
from twotower_eval.measure.suites import instance_sha256, read_decoding_request, settings_text
from twotower_eval.measure.suites.lm_types import Instance
from twotower_eval.records import (
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodKind,
    LikelihoodRow,
    Prompt,
    Witnessed,
    WitnessedAnswer,
)

Key = tuple[str, int, int, int]  # task, doc_id, request_index, repeat


@dataclass(kw_only=True, eq=False)
class CellJournal:
    """The journal rows of one cell, and where new ones are written."""

    cell: str
    append: Callable[[GenerationRow | LikelihoodRow], None] = lambda row: None
    generations: dict[Key, GenerationRow] = field(default_factory=dict)
    likelihoods: dict[Key, LikelihoodRow] = field(default_factory=dict)

    def add(self, row: GenerationRow | LikelihoodRow) -> None:
        """Write a row, then keep it."""
        self.append(row)
        self.keep(row)

    def keep(self, row: GenerationRow | LikelihoodRow) -> None:
        """Remember a row that is on disk."""
        key = (row.task, row.doc_id, row.request_index, row.repeat)
        if isinstance(row, GenerationRow):
            self.generations[key] = row
        else:
            self.likelihoods[key] = row


def join_likelihoods(likelihoods: Sequence[Likelihood], kind: LikelihoodKind) -> Likelihood:
    """The likelihood of consecutive pieces; their errors are independent."""
    if len(likelihoods) == 1:
        return likelihoods[0]
    errors = [piece.stderr_nats for piece in likelihoods if piece.stderr_nats is not None]
    draws = {piece.num_draws for piece in likelihoods}
    return Likelihood(
        logprob_nats=math.fsum(piece.logprob_nats for piece in likelihoods),
        is_greedy=all(piece.is_greedy for piece in likelihoods),
        kind=kind,
        stderr_nats=math.sqrt(math.fsum(error**2 for error in errors)) if errors else None,
        num_draws=draws.pop() if len(draws) == 1 else None,
    )


def with_repeats(requests: Iterable[Instance]) -> list[tuple[Instance, Key]]:
    """Each request with its key; a repeated request is the next sample."""
    seen: Counter[tuple[str, int, int]] = Counter()
    numbered = []
    for request in requests:
        name = (request.task_name, request.doc_id, request.idx)
        numbered.append((request, (*name, seen[name])))
        seen[name] += 1
    return numbered


def missing_of(numbered: Iterable[tuple[Instance, Key]], rows: Mapping[Key, GenerationRow | LikelihoodRow]) -> set[Key]:
    """Keys that are not journalled yet. UserError for a journalled answer to another prompt."""
    missing = set()
    for request, key in numbered:
        row = rows.get(key)
        if row is None:
            missing.add(key)
        elif row.prompt_sha256 != instance_sha256(request):
            raise UserError(f"the journal answers {'/'.join(map(str, key))} for another prompt: start a new run")
    return missing


def generation_row(cell: str, key: Key, request: Instance, generation: Generation) -> GenerationRow:
    """The journal row of an answer to lm-eval's request."""
    task, doc_id, index, repeat = key
    return GenerationRow(
        cell=cell,
        task=task,
        doc_id=doc_id,
        request_index=index,
        repeat=repeat,
        prompt_sha256=instance_sha256(request),
        generation=generation,
    )


def answer_text(row: GenerationRow) -> str:
    """What filters and metrics receive: the answer behind the model's thinking, else the whole text."""
    return (row.generation.text or "") if row.answer is None else row.answer


def likelihood_row(cell: str, key: Key, request: Instance, likelihood: Likelihood, num_tokens: int) -> LikelihoodRow:
    """The journal row of a log-likelihood that lm-eval requests."""
    task, doc_id, index, repeat = key
    return LikelihoodRow(
        cell=cell,
        task=task,
        doc_id=doc_id,
        request_index=index,
        repeat=repeat,
        request="loglikelihood_rolling" if request.request_type == "loglikelihood_rolling" else "loglikelihood",
        prompt_sha256=instance_sha256(request),
        num_tokens=num_tokens,
        likelihood=likelihood,
    )


def check_asked(request: Instance, key: Key, decoder: Decoder | None) -> None:
    """UserError if a request asks for something that the decoder does not do."""
    asked = read_decoding_request(request.args[1])
    if asked.unsupported:
        raise UserError(f"task {key[0]!r} asks for {settings_text(asked.unsupported)}: no decoder here does that")
    params = getattr(decoder, "params", None)  # a plug-in may ignore them: its cell names its own
    has = float(getattr(params, "temperature", 0.0))
    if params is not None and asked.temperature and asked.temperature != has:
        raise UserError(
            f"task {key[0]!r} asks for temperature {asked.temperature:g}, and the decoder's is {has:g}: "
            "make the decoder with that temperature"
        )


def shares_beginnings(decoder: Decoder, model: Model) -> bool:
    """Whether a decoder reads once what prompts share, on a model that goes on from it as it reads whole rows. What the
    model has to show for that it shows here, where no forwards are counted."""
    return "share_beginnings" in inspect.signature(decoder.generate).parameters and reads_on(model) is not None


@dataclass(frozen=True, kw_only=True)
class DecoderCall:
    """Calls a decoder for texts; ``uncounted`` counts forwards that bypass the watched model. ``shares_beginnings``:
    what prompts have in common is read once, as no clock runs."""

    decoder: Decoder
    batch_size: int
    uncounted: UncountedForwards
    shares_beginnings: bool = False

    def __call__(
        self,
        prompts: list[Prompt],
        asked: CallRequest,
        watched: WatchedModel,
        on_finish: Callable[[Generation], None],
        failed: Sequence[BaseException] = (),
    ) -> object:
        """The decoder's generations for prompts; ``failed`` collects what ``on_finish`` raised."""
        more: dict[str, Any] = {"share_beginnings": True} if self.shares_beginnings else {}
        with self.uncounted.noted(watched), generating(self.decoder, asked.name, "--batch-size", failed):
            return self.decoder.generate(
                prompts,
                max_new_tokens=asked.max_new_tokens,
                eos_token_ids=asked.eos_token_ids,
                stop=asked.stop,
                max_batch_size=self.batch_size,
                on_finish=on_finish,
                **more,
            )

    def check(self, made: Sequence[Generation], asked: CallRequest, watched: WatchedModel) -> None:
        """ReportError if the model ran other forwards than the answers report."""
        check_all_counted(self.uncounted.num, asked.name)
        check_forwards(made, watched, asked.name)


def witnessed_answer(call: DecoderCall, model: Model, prompt: Prompt, asked: CallRequest) -> tuple[Generation, Tally]:
    """The answer to a prompt that is decoded alone, and its witness's tally."""
    received: list[Generation] = []
    with watched_in_place(model) as watched, watched.witnessed(prompt.token_ids) as witness:
        given = call([prompt], asked, watched, received.append)
    made = finished(received or given, asked.name)
    check_answers(made, [prompt], asked)
    call.check(made, asked, watched)
    (generation,) = made
    return generation, witness.tally(generation.token_ids)


def witnessed_row(cell: str, generation: Generation, tally: Tally) -> Witnessed:
    """The journal row of a scored answer's witness."""
    return Witnessed(
        cell=cell,
        launch_id="",
        round=0,
        call_id=generation.prompt_id,
        kind="scored",
        answers=(WitnessedAnswer(prompt_id=generation.prompt_id, token_ids=generation.token_ids),),
        num_rows=tally.num_rows,
        num_tokens=tally.num_tokens,
        num_witnessed=tally.num_witnessed,
        num_drafted=tally.num_drafted,
    )
