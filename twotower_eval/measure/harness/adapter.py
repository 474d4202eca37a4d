"""The lm-eval adapter: every model and decoder answers lm-eval's requests through it, into the journal.

Requests whose answer is journalled are not computed again. lm-eval sees only texts and log-likelihoods; counts, finish
reasons and traces stay in the journal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache, partial

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from twotower_eval.engine.decoders import Decoder
from twotower_eval.engine.decoders.reported import (
    CallRequest,
    ReportError,
    call_request,
    check_answer,
    check_returned,
    decoder_name,
    finished,
)
from twotower_eval.engine.models import tokenizer
from twotower_eval.engine.models.chat import ChatTemplate, format_of, with_answer
from twotower_eval.engine.models.counting import UncountedForwards, watched_in_place
from twotower_eval.engine.models.protocol import Model, remote, text_codec
from twotower_eval.engine.scorers import Scorer
from twotower_eval.engine.scorers.pieces import Piece, ScoreRequest
from twotower_eval.errors import UserError
from twotower_eval.measure.harness.answers import (
    CellJournal,
    DecoderCall,
    Key,
    answer_text,
    check_asked,
    generation_row,
    join_likelihoods,
    likelihood_row,
    missing_of,
    shares_beginnings,
    with_repeats,
    witnessed_answer,
    witnessed_row,
)
from twotower_eval.measure.suites import (
    DEFAULT_MAX_NEW_TOKENS,
    stops_and_budget,
)
from twotower_eval.measure.suites.lm_types import Instance
from twotower_eval.plugin_calls import noting
from twotower_eval.progress import Advance
from twotower_eval.records import (
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodKind,
    LikelihoodRow,
    Prompt,
    Witnessed,
    derive_seed,
    scored_prompt_id,
)

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # context ids, continuation ids
Batch = Callable[[], None]  # answers some requests and journals them
_Item = tuple[Instance, Prompt, Key]  # a generation request, as a decoder receives it


@dataclass(frozen=True, eq=False)
class _PendingLikelihood:
    """A log-likelihood request as pairs of ids: one, or the windows of a long text."""

    request: Instance
    key: Key
    pairs: Sequence[Pair]


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a model with a decoder and a scorer.

    ``seed`` is the run's; each prompt's seed is derived from it. ``batch_size`` generation requests run at a time,
    log-likelihoods in the pieces that the scorer plans; answers depend on neither. ``advance`` is called for every
    finished request. Documents in ``traced`` have their denoising traces journalled. ``num_truncated`` counts the
    requests, answered or not, whose prompt or context lost its beginning because it was too long. Requests in
    ``witnessed`` are decoded first, each alone, with a witness of every row of logits; ``testify`` receives its result.
    """

    def __init__(
        self,
        model: Model,
        *,
        decoder: Decoder | None = None,
        scorer: Scorer | None = None,
        kind: LikelihoodKind = "exact",
        batch_size: int = 8,
        seed: int = 0,
        journal: CellJournal | None = None,
        advance: Advance = lambda num=1, /: None,
        traced: Set[int] = frozenset(),
        witnessed: Set[Key] = frozenset(),
        testify: Callable[[Witnessed], None] = lambda row: None,
    ) -> None:
        super().__init__()
        self.model = model
        self._codec = text_codec(model)
        self.decoder = decoder
        self.scorer = scorer
        self.kind: LikelihoodKind = kind
        self.batch_size = batch_size
        self.seed = seed
        self.journal = journal or CellJournal(cell="")
        self.num_truncated = 0
        # The choices of one question share their context, which is most of the text to encode.
        self._text_ids = lru_cache(maxsize=16)(partial(tokenizer.text_ids, model))
        self._prompt_ids = lru_cache(maxsize=16)(partial(tokenizer.fitted_prompt_ids, model))
        self.advance = advance
        self.traced = traced
        self.witnessed, self.testify = witnessed, testify
        self._uncounted = UncountedForwards([model])
        self._shares = decoder is not None and shares_beginnings(decoder, model)

    @property
    def eot_token_id(self) -> int:
        """End of text: the tokenizer's EOS, else the first of the model's."""
        return tokenizer.end_of_text_id(self.model)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS if the tokenizer has one, else EOS, as in lm-eval's hf."""
        return tokenizer.prefix_id(self.model)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: object) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds itself, unless ``add_special_tokens`` says
        otherwise or the text begins with the prefix token."""
        if add_special_tokens is None:
            return list(self._text_ids(string))
        return list(self._codec.encode(string, add_special_tokens))

    # Chats, as lm-eval's evaluator asks for them

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint's name."""
        return self.model.checkpoint.name

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the model's own template writes them. UserError if none is attached."""
        return self._template.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the attached template, which lm-eval logs."""
        return self._template.source if chat_template else None

    @property
    def _template(self) -> ChatTemplate:
        template = format_of(self.model).template
        if template is None:
            name = self.model.checkpoint.name
            raise UserError(f"no chat template is attached to {name}: load it with chat.load_format, and attach it")
        return template

    # Generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts of the requests' continuations; a request given several times is answered by that many samples."""
        numbered = with_repeats(requests)
        for answer in self.batches(numbered):
            answer()
        return [answer_text(self.journal.generations[key]) for _, key in numbered]

    def check_texts(self, numbered: Sequence[tuple[Instance, Key]]) -> None:
        """UserError, naming the document, for the first request whose texts this model cannot read."""
        for request, key in numbered:
            if request.request_type == "generate_until":
                self._prompt(request.args[0], key, stops_and_budget(request.args[1], DEFAULT_MAX_NEW_TOKENS)[1])
            else:
                self._split(request, key, request.request_type)

    def batches(self, numbered: Sequence[tuple[Instance, Key]]) -> list[Batch]:
        """Calls that, in order, answer and journal every missing request.

        Generations with one budget are one batch: rows are journalled as they finish, and waiting prompts take their
        places. Log-likelihood batches are made from all requests, answered or not, so that a resumed run computes the
        same batches as an uninterrupted one, with the same bits.
        """
        kinds = {request.request_type for request, _ in numbered}
        assert len(kinds) <= 1, kinds
        if kinds == {"generate_until"}:
            return list(self._generation_batches(numbered))
        return list(self._likelihood_batches(numbered, *kinds)) if kinds else []

    def _generation_batches(self, numbered: Sequence[tuple[Instance, Key]]) -> Iterator[Batch]:
        missing = self._missing(numbered, self.journal.generations)
        groups: dict[tuple[int, tuple[str, ...]], list[_Item]] = defaultdict(list)
        for request, key in numbered:
            stop, budget = stops_and_budget(request.args[1], DEFAULT_MAX_NEW_TOKENS)
            check_asked(request, key, self.decoder)
            groups[budget, stop].append((request, self._prompt(request.args[0], key, budget), key))
        for (budget, stop), items in groups.items():
            left = [item for item in items if item[2] in missing]
            for item in left:
                if item[2] in self.witnessed:
                    yield partial(self._generate_witnessed, item, budget, stop)
            rest = [item for item in left if item[2] not in self.witnessed]
            if rest:
                yield partial(self._generate, rest, budget, stop)

    def _prompt(self, prompt: str, key: Key, budget: int) -> Prompt:
        text = format_of(self.model).text(prompt)
        with tokenizer.naming(_where(key)):
            ids, is_truncated = self._prompt_ids(text, budget)
        self.num_truncated += is_truncated
        name = scored_prompt_id(*key)
        traced = key[1] in self.traced
        return Prompt(id=name, token_ids=tuple(ids), text=text, seed=derive_seed(self.seed, *key), trace=traced)

    def _generate(self, items: Sequence[_Item], budget: int, stop: tuple[str, ...]) -> None:
        by_id = {prompt.id: (request, prompt, key) for request, prompt, key in items}
        asked = self._asked(budget, stop)
        received: list[Generation] = []
        heard: set[str] = set()
        failed: list[BaseException] = []

        def journal(given: Generation) -> None:
            (generation,) = finished([given], asked.name)
            if generation.prompt_id not in by_id:
                raise ReportError(f"{asked.name}: an answer to prompt {generation.prompt_id!r}, which was not asked")
            if generation.prompt_id in heard:
                raise ReportError(f"{asked.name}: prompt {generation.prompt_id!r}: on_finish received its answer twice")
            heard.add(generation.prompt_id)
            request, prompt, key = by_id[generation.prompt_id]
            check_answer(generation, prompt, asked)
            received.append(generation)
            self._keep(request, key, generation)

        with watched_in_place(self.model) as watched:
            given = self._call([prompt for _, prompt, _ in items], asked, watched, noting(failed, journal), failed)
        for generation in check_returned(given, [prompt for _, prompt, _ in items], received, asked.name):
            journal(generation)
        self._call.check(received, asked, watched)

    def _generate_witnessed(self, item: _Item, budget: int, stop: tuple[str, ...]) -> None:
        """Decode one prompt with a witness, whose result is journalled before the answer, so that no answer lacks
        it."""
        request, prompt, key = item
        generation, tally = witnessed_answer(self._call, self.model, prompt, self._asked(budget, stop))
        self.testify(witnessed_row(self.journal.cell, generation, tally))
        self._keep(request, key, generation)

    def _asked(self, budget: int, stop: tuple[str, ...]) -> CallRequest:
        stops = tokenizer.stops_of(self.model, stop)
        return call_request(self.model, decoder_name(self.decoder), budget, self.model.eos_token_ids, stops)

    @property
    def _call(self) -> DecoderCall:
        assert self.decoder is not None, "a generation task without a decoder"
        return DecoderCall(
            decoder=self.decoder,
            batch_size=self.batch_size,
            uncounted=self._uncounted,
            shares_beginnings=self._shares,
        )

    def _keep(self, request: Instance, key: Key, generation: Generation) -> None:
        self.journal.add(with_answer(generation_row(self.journal.cell, key, request, generation), self.model))
        self.advance()

    # Log-likelihoods

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation given its context, and whether greedy decoding would give it."""
        return [(found.logprob_nats, found.is_greedy) for found in self._likelihoods(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, in windows where it is longer than the model reads."""
        return [found.logprob_nats for found in self._likelihoods(requests)]

    def _likelihoods(self, requests: Sequence[Instance]) -> list[Likelihood]:
        numbered = with_repeats(requests)
        for answer in self.batches(numbered):
            answer()
        return [self.journal.likelihoods[key].likelihood for _, key in numbered]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, Sequence[int], Sequence[int]]], **_options: object
    ) -> list[tuple[float, bool]]:
        assert self.scorer is not None, "a likelihood task without a scorer"
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = self.scorer.score(self._score_requests(pairs))
        return [(likelihood.logprob_nats, likelihood.is_greedy) for likelihood in found]

    def _likelihood_batches(self, numbered: Sequence[tuple[Instance, Key]], request_type: str) -> Iterator[Batch]:
        """Batches in which every distinct pair of context and continuation is scored once, for all requests that need
        it."""
        missing = self._missing(numbered, self.journal.likelihoods)
        asked = [self._split(request, key, request_type) for request, key in numbered]
        askers: dict[Pair, list[_PendingLikelihood]] = defaultdict(list)
        for one in asked:
            for pair in one.pairs:
                askers[pair].append(one)
        self.num_truncated += sum(any(self._room_for(*pair) != pair[0] for pair in one.pairs) for one in asked)
        known: dict[Pair, Likelihood] = {}
        for pairs, piece in self._pieces(list(askers)):
            left = [pair for pair in pairs if any(one.key in missing for one in askers[pair])]
            whole = len(left) == len(pairs)
            for part, rest in [(pairs, piece)] if whole else self._pieces(left):
                yield partial(self._score_and_finish, part, rest, known, askers, missing)

    def _pieces(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[Pair], Piece]]:
        """Pairs that the scorer takes together, with its piece for them."""
        assert self.scorer is not None, "a likelihood task without a scorer"
        for piece in self.scorer.plan(self._score_requests(pairs), self.batch_size) if pairs else ():
            yield [pairs[index] for index in piece.requests], piece

    def _score_and_finish(
        self,
        batch: Sequence[Pair],
        piece: Piece,
        known: dict[Pair, Likelihood],
        askers: Mapping[Pair, Sequence[_PendingLikelihood]],
        missing: Set[Key],
    ) -> None:
        known.update(zip(batch, piece.score(), strict=True))
        touched = {one.key: one for pair in batch for one in askers[pair] if one.key in missing}
        self._finish([one for one in touched.values() if all(pair in known for pair in one.pairs)], known)

    def _finish(self, asked: Sequence[_PendingLikelihood], known: Mapping[Pair, Likelihood]) -> None:
        for one in asked:
            likelihood = join_likelihoods([known[pair] for pair in one.pairs], self.kind)
            num_tokens = sum(len(continuation) for _, continuation in one.pairs)
            self.journal.add(likelihood_row(self.journal.cell, one.key, one.request, likelihood, num_tokens))
        self.advance(len(asked))

    def _split(self, request: Instance, key: Key, request_type: str) -> _PendingLikelihood:
        """The request as pairs of ids, each with something to score. UserError, naming the document, if there is
        nothing."""
        is_rolling = request_type == "loglikelihood_rolling"
        split = self._windows if is_rolling else self._context_and_continuation
        with tokenizer.naming(_where(key) + ("" if is_rolling else f", option {key[2] + 1}")):
            pairs = split(*request.args)
            for pair in pairs:
                self._room_for(*pair)
        return _PendingLikelihood(request, key, pairs)

    def _context_and_continuation(self, prompt: str, continuation: str) -> list[Pair]:
        context = format_of(self.model).text(prompt)
        if context == "":
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        else:
            before, after = self._encode_pair(context, continuation)
        if not before:
            # lm-eval takes a continuation's own BOS for the context; without one, the prefix token stands in.
            starts = after[:1] == [self.prefix_token_id]
            before, after = (after[:1], after[1:]) if starts else ([self.prefix_token_id], after)
        if not after:
            raise UserError(
                f"{continuation!r} adds no token to its context, so there is nothing to score: mend the document "
                "or leave the task out"
            )
        return [(tuple(before), tuple(after))]

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text)
        if not ids:
            raise UserError("the text is empty, so there is nothing to score: leave the document out")
        longest = self._longest_scored
        width = len(ids) if longest is None else longest - 1
        windows = get_rolling_token_windows(ids, self.prefix_token_id, width, 1)
        return [(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]

    def _score_requests(self, pairs: Sequence[Pair]) -> list[ScoreRequest]:
        requests = []
        for context, continuation in pairs:
            kept = self._room_for(context, continuation)
            seed = derive_seed(self.seed, context, continuation)
            requests.append(ScoreRequest(context_ids=kept, continuation_ids=continuation, seed=seed))
        return requests

    def _room_for(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[int, ...]:
        """The end of the context that fits before the continuation."""
        longest = self._longest_scored
        if longest is None or len(context) + len(continuation) <= longest:
            return context
        room = longest - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit into {self.model.max_length} tokens"
            )
        return context[-room:]

    @property
    def _longest_scored(self) -> int | None:
        """The most tokens of context and continuation together. The last one is predicted and never read; but a server
        reads it, and makes one more behind it."""
        longest = self.model.max_length
        if longest is None:
            return None
        return longest - 1 if remote(self.model) else longest + 1

    def _missing(
        self, numbered: Sequence[tuple[Instance, Key]], rows: Mapping[Key, GenerationRow | LikelihoodRow]
    ) -> set[Key]:
        missing = missing_of(numbered, rows)
        self.advance(len(numbered) - len(missing))
        return missing


def _where(key: Key) -> str:
    return f"task {key[0]!r}, document {key[1]}"
