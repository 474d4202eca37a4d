"""The one lm-eval adapter: every model and every decoder answers lm-eval's requests through it, into the journal.

Requests whose answer is journalled are not computed again. lm-eval sees texts and log-likelihoods only; counts,
finish reasons and traces stay in the journal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from twotower_eval.harness.answers import CellJournal, Key, derive_seed, join_likelihoods
from twotower_eval.progress import Advance
from twotower_eval.records import (
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodKind,
    LikelihoodRow,
    Prompt,
)
from twotower_eval.suites import DEFAULT_MAX_NEW_TOKENS, instance_sha256, stops_and_budget

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # context ids, continuation ids


class Decoder(Protocol):
    """What makes text."""

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, eos_token_ids: Sequence[int], stop: Sequence[str]
    ) -> list[Generation]: ...


class Scorer(Protocol):
    """What makes log-likelihoods."""

    def score(self, requests: Sequence[Any]) -> list[Likelihood]: ...


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a model with a decoder and a scorer.

    ``seed`` is the run's: every prompt gets one of its own, derived from it. Requests go in batches of
    ``batch_size``, longest first; answers do not depend on either. ``advance`` hears of every finished request.
    """

    def __init__(
        self,
        model: Any,
        *,
        decoder: Decoder | None = None,
        scorer: Scorer | None = None,
        kind: LikelihoodKind = "exact",
        batch_size: int = 8,
        seed: int = 0,
        journal: CellJournal | None = None,
        advance: Advance = lambda num=1, /: None,
    ) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise ValueError(f"checkpoint {model.checkpoint.name} has no tokenizer files: tasks are text, it needs one")
        self.model = model
        self.decoder = decoder
        self.scorer = scorer
        self.kind: LikelihoodKind = kind
        self.batch_size = batch_size
        self.seed = seed
        self.journal = journal or CellJournal(cell="")
        self.num_truncated = 0
        self._advance = advance

    @property
    def eot_token_id(self) -> int:
        """End of text: the first of the model's EOS ids."""
        ids = [*self.model.eos_token_ids, *(i for i in (self.model.tokenizer.eos_token_id,) if i is not None)]
        if not ids:
            raise ValueError(f"checkpoint {self.model.checkpoint.name} names no EOS token, which empty contexts need")
        return int(ids[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS where the tokenizer has one, else EOS, as in lm-eval's hf."""
        bos = self.model.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return str(self.model.tokenizer.name)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself unless told otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.model.tokenizer.encode(string, add_special_tokens=special))

    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts of the requests' continuations; a request given several times is answered by as many samples."""
        numbered = _with_repeats(requests)
        self.answer_generations(numbered)
        return [self.journal.generations[key].generation.text or "" for _, key in numbered]

    def answer_generations(self, numbered: Sequence[tuple[Any, Key]]) -> None:
        """Generate and journal what the journal does not hold."""
        pending = self._pending(numbered, self.journal.generations)
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[Any, Prompt, Key]]] = defaultdict(list)
        for request, key in pending:
            stop, budget = stops_and_budget(request.args[1], DEFAULT_MAX_NEW_TOKENS)
            groups[budget, stop].append((request, self._prompt(request.args[0], key, budget), key))
        for (budget, stop), items in groups.items():
            items.sort(key=lambda item: (-len(item[1].token_ids), item[2]))
            for batch in _batches(items, self.batch_size):
                self._generate_batch(batch, budget, stop)

    def _prompt(self, text: str, key: Key, budget: int) -> Prompt:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        if self.model.max_length is not None:
            room = self.model.max_length - budget
            if room < 1:
                raise ValueError(
                    f"task {key[0]!r}: a budget of {budget} leaves no room in {self.model.max_length} tokens"
                )
            self.num_truncated += len(ids) > room
            ids = ids[-room:]
        name = "/".join(str(part) for part in key)
        return Prompt(id=name, token_ids=tuple(ids), text=text, seed=derive_seed(self.seed, *key))

    def _generate_batch(self, batch: Sequence[tuple[Any, Prompt, Key]], budget: int, stop: tuple[str, ...]) -> None:
        assert self.decoder is not None, "a generation task without a decoder"
        prompts = [prompt for _, prompt, _ in batch]
        answers = self.decoder.generate(
            prompts, max_new_tokens=budget, eos_token_ids=self.model.eos_token_ids, stop=stop
        )
        for (request, _, (task, doc_id, index, repeat)), generation in zip(batch, answers, strict=True):
            row = GenerationRow(
                cell=self.journal.cell,
                task=task,
                doc_id=doc_id,
                request_index=index,
                repeat=repeat,
                prompt_sha256=instance_sha256(request),
                generation=generation,
            )
            self.journal.add(row)
        self._advance(len(batch))

    # Log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation given its context, and whether greedy decoding would give it."""
        numbered = _with_repeats(requests)
        self.answer_likelihoods(numbered, "loglikelihood")
        found = [self.journal.likelihoods[key].likelihood for _, key in numbered]
        return [(likelihood.logprob_nats, likelihood.is_greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, in windows where it is longer than the model reads."""
        numbered = _with_repeats(requests)
        self.answer_likelihoods(numbered, "loglikelihood_rolling")
        return [self.journal.likelihoods[key].likelihood.logprob_nats for _, key in numbered]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_options: Any) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found: dict[int, Likelihood] = {}
        self._score([[pair] for pair in pairs], lambda at, likelihoods: found.update({at: likelihoods[0]}))
        return [(found[at].logprob_nats, found[at].is_greedy) for at in range(len(pairs))]

    def answer_likelihoods(self, numbered: Sequence[tuple[Any, Key]], kind: Any) -> None:
        """Score and journal what the journal does not hold; ``kind`` is lm-eval's name of the request."""
        pending = self._pending(numbered, self.journal.likelihoods)
        split = self._windows if kind == "loglikelihood_rolling" else self._context_and_continuation
        pieces = [split(*request.args) for request, _ in pending]

        def finished(at: int, likelihoods: Sequence[Likelihood]) -> None:
            request, (task, doc_id, index, repeat) = pending[at]
            row = LikelihoodRow(
                cell=self.journal.cell,
                task=task,
                doc_id=doc_id,
                request_index=index,
                repeat=repeat,
                request=kind,
                prompt_sha256=instance_sha256(request),
                num_tokens=sum(len(continuation) for _, continuation in pieces[at]),
                likelihood=join_likelihoods(likelihoods, self.kind),
            )
            self.journal.add(row)
            self._advance(1)

        self._score(pieces, finished)

    def _context_and_continuation(self, context: str, continuation: str) -> list[Pair]:
        if context == "":
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        else:
            before, after = self._encode_pair(context, continuation)
        if not before:
            # lm-eval takes a continuation's own BOS for the context; without one, the prefix token stands in.
            starts = after[:1] == [self.prefix_token_id]
            before, after = (after[:1], after[1:]) if starts else ([self.prefix_token_id], after)
        return [(tuple(before), tuple(after))]

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text)
        width = self.model.max_length or max(len(ids), 1)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, width, 1)
        return [(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]

    def _score(self, pieces: Sequence[Sequence[Pair]], finished: Callable[[int, list[Likelihood]], None]) -> None:
        """Score every distinct pair once, and report each list of pairs as soon as all of it is there."""
        users = defaultdict(set)
        for at, pairs in enumerate(pieces):
            for pair in pairs:
                users[pair].add(at)
        known: dict[Pair, Likelihood] = {
            pair: Likelihood(logprob_nats=0.0, is_greedy=True, kind=self.kind) for pair in users if not pair[1]
        }
        waiting = {at: {pair for pair in pairs if pair not in known} for at, pairs in enumerate(pieces)}
        for at in [at for at, missing in waiting.items() if not missing]:
            finished(at, [known[pair] for pair in pieces[at]])
        todo = sorted((pair for pair in users if pair not in known), key=lambda p: (-len(p[0]) - len(p[1]), p))
        for batch in _batches(todo, self.batch_size):
            for pair, likelihood in zip(batch, self._score_batch(batch), strict=True):
                known[pair] = likelihood
                for at in sorted(users[pair]):
                    waiting[at].discard(pair)
                    if not waiting[at]:
                        finished(at, [known[piece] for piece in pieces[at]])

    def _score_batch(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        from twotower_eval.decoders.likelihood import ScoreRequest

        assert self.scorer is not None, "a likelihood task without a scorer"
        requests = []
        for context, continuation in pairs:
            kept = self._room_for(context, continuation)
            seed = derive_seed(self.seed, context, continuation)
            requests.append(ScoreRequest(context_ids=kept, continuation_ids=continuation, seed=seed))
        return self.scorer.score(requests)

    def _room_for(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[int, ...]:
        """The end of the context that fits before the continuation; the last token is predicted, never read."""
        longest = self.model.max_length
        if longest is None or len(context) + len(continuation) <= longest + 1:
            return context
        room = longest + 1 - len(continuation)
        if room < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into {longest} tokens")
        self.num_truncated += 1
        return context[-room:]

    def _pending(
        self, numbered: Sequence[tuple[Any, Key]], rows: Mapping[Key, GenerationRow | LikelihoodRow]
    ) -> list[tuple[Any, Key]]:
        """What is not journalled yet. A journalled answer to another prompt is a ValueError."""
        pending = []
        for request, key in numbered:
            row = rows.get(key)
            if row is None:
                pending.append((request, key))
            elif row.prompt_sha256 != instance_sha256(request):
                raise ValueError(f"the journal answers {'/'.join(map(str, key))} for another prompt: start a new run")
        self._advance(len(numbered) - len(pending))
        return pending


def _with_repeats(requests: Iterable[Any]) -> list[tuple[Any, Key]]:
    """Each request with its key; the same one again is the next sample."""
    seen: Counter[tuple[str, int, int]] = Counter()
    numbered = []
    for request in requests:
        name = (request.task_name, request.doc_id, request.idx)
        numbered.append((request, (*name, seen[name])))
        seen[name] += 1
    return numbered


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
