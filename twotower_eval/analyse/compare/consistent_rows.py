"""Rows of a run against each other: timed calls against their answers, answers against their scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

from twotower_eval.analyse.compare.contradiction import Check, ContradictionKind, Place, Side
from twotower_eval.analyse.compare.figures import once
from twotower_eval.records import (
    GENERATION_COUNTS,
    MEAN,
    GenerationRow,
    PromptTiming,
    Score,
    SpeedSample,
    canonical_json,
    sha256_text,
)
from twotower_eval.store import Run

SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "pass@1", "pass_at_1")
COUNTED = (*GENERATION_COUNTS, "num_forced_commits", "num_draft_forwards", "finish")
of_counts = attrgetter(*COUNTED)
OF_CODE = ("pass@", "pass_at_", "pass_")  # how metrics begin that run the answer: it may run out of time by chance
CLOSE = 1e-9
Texts = tuple[str, ...]  # of a document, one for each request
Answers = dict[tuple[str, str, int], list[GenerationRow]]  # by cell, task and document


def _batch_sizes(run: Run) -> Iterator[Place]:
    cells = run.cells
    for call in run.speed:
        workload = cells[call.cell].workload
        planned = None if workload.batch_size is None and workload.requests is None else workload.prompts_per_call
        if planned is not None and call.batch_size != planned:
            yield Place(row=call, field="batch_size", stated=planned, found=call.batch_size)


def _prompts_of_calls(run: Run) -> Iterator[Place]:
    """A call has the same prompts in the same order in every round and cell."""
    known: dict[tuple[str, int], tuple[str, ...]] = {}
    for call in run.speed:
        prompts = tuple(prompt.prompt_id for prompt in call.prompts)
        if known.setdefault((call.call_id, call.batch_size), prompts) != prompts:
            yield Place(row=call, field="prompts")


def _prompt_tokens(run: Run) -> Iterator[Place]:
    known: dict[tuple[str, str, str], int] = {}
    for call, prompt in _prompts(run):
        num = known.setdefault((call.cell, call.call_id, prompt.prompt_id), prompt.num_prompt_tokens)
        if num != prompt.num_prompt_tokens:
            yield _of_prompt(call, prompt, "num_prompt_tokens", num, prompt.num_prompt_tokens)


def _prompt_tokens_of_arms(run: Run) -> Iterator[Place]:
    """Arms with the same tokenizer read a prompt as equally many tokens, unless it was cut."""
    if any(event.get("num_truncated") for event in run.events):
        return
    cells, readers = run.cells, _tokenizers(run)
    known: dict[tuple[str, str, str, tuple[str, ...]], int] = {}
    for call, prompt in _prompts(run):
        reader = readers[call.cell]
        if reader:
            key = (cells[call.cell].workload.digest, call.call_id, prompt.prompt_id, reader)
            num = known.setdefault(key, prompt.num_prompt_tokens)
            if num != prompt.num_prompt_tokens:
                yield _of_prompt(call, prompt, "num_prompt_tokens", num, prompt.num_prompt_tokens)


def _tokenizers(run: Run) -> dict[str, tuple[str, ...]]:
    """By cell, digests of its tokenizer's files; empty where they are not known."""
    return {
        cell.id: tuple(sorted(f"{file.name} {file.sha256}" for file in cell.checkpoint.files if "token" in file.name))
        for cell in run.manifest.cells
    }


def _prompts(run: Run) -> Iterator[tuple[SpeedSample, PromptTiming]]:
    return ((call, prompt) for call in run.speed for prompt in call.prompts)


def _lengths_of_hashes(run: Run) -> Iterator[Place]:
    known: dict[str, int] = {}
    for call, prompt in _prompts(run):
        if len(set(prompt.tokens_sha256)) > 1:  # else it is no digest of anything
            num = known.setdefault(prompt.tokens_sha256, prompt.num_tokens)
            if num != prompt.num_tokens:
                yield _of_prompt(call, prompt, "num_tokens", num, prompt.num_tokens)


def _beyond_budget(run: Run) -> Iterator[Place]:
    # A server keeps to the budget in its own tokens, which are counted in those of another tokenizer here.
    budgets = {cell.id: None if cell.checkpoint.served else cell.workload.max_new_tokens for cell in run.manifest.cells}
    for call, prompt in _prompts(run):
        budget = budgets[call.cell]
        if budget is not None and prompt.num_tokens > budget:
            yield _of_prompt(call, prompt, "num_tokens", budget, prompt.num_tokens)
    for row in run.generations:
        budget, num = budgets[row.cell], row.generation.num_tokens
        if budget is not None and num > budget:
            yield Place(row=row, field="num_tokens", stated=budget, found=num)


def _forwards_counted(run: Run) -> Iterator[Place]:
    """A decoder's reported forwards against the model calls of the call; every row of a model call counts once."""
    for call in (call for call in run.speed if call.passes):
        counted = {"context": 0, "denoiser": 0}
        for one in call.passes:
            counted["denoiser" if one.kind == "denoise" else "context"] += one.rows * one.num
        for kind, num in counted.items():
            reported = sum(getattr(prompt, f"num_{kind}_forwards") for prompt in call.prompts)
            if reported != num:
                yield Place(row=call, field=f"num_{kind}_forwards", stated=reported, found=num)


def _timed_answers(run: Run) -> dict[tuple[str, int, str], GenerationRow]:
    """Answers of timed cells by cell, round and prompt."""
    return once([run], ("timed answers",), lambda: _of_timed(run))


def _of_timed(run: Run) -> dict[tuple[str, int, str], GenerationRow]:
    timed = {cell.id for cell in run.manifest.cells if cell.workload.kind == "answer"}
    return {(row.cell, row.repeat, row.generation.prompt_id): row for row in run.generations if row.cell in timed}


def _kept_calls(run: Run) -> Iterator[tuple[SpeedSample, PromptTiming]]:
    """Calls whose answers are kept."""
    return ((call, prompt) for call, prompt in _prompts(run) if call.phase == "measure" and call.replica == 0)


def _calls_and_answers(run: Run) -> Iterator[Place]:
    answers = _timed_answers(run)
    digest = lru_cache(maxsize=100_000)(_digest)  # most answers are the same in every round
    for call, prompt in _kept_calls(run) if answers else ():
        row = answers.get((call.cell, call.round, prompt.prompt_id))
        if row is None:
            continue
        if of_counts(prompt) != of_counts(row.generation):
            for name, stated, found in zip(COUNTED, of_counts(prompt), of_counts(row.generation), strict=True):
                if stated != found:
                    yield _of_prompt(call, prompt, name, stated, found)
        made = digest(row.generation.token_ids)
        if prompt.tokens_sha256 != made:
            yield _of_prompt(call, prompt, "tokens_sha256", prompt.tokens_sha256, made)


def _digest(token_ids: tuple[int, ...]) -> str:
    return sha256_text(canonical_json(list(token_ids)))


def _of_prompt(
    call: SpeedSample, prompt: PromptTiming, field: str | None = None, stated: Side = None, found: Side = None
) -> Place:
    return Place(row=call, prompt=prompt.prompt_id, field=field, stated=stated, found=found)


def _call_keys(run: Run) -> set[tuple[str, int, str]]:
    calls = _kept_calls(run)
    return once([run], ("timed calls",), lambda: {(call.cell, call.round, prompt.prompt_id) for call, prompt in calls})


def _calls_without_answers(run: Run) -> Iterator[Place]:
    answers = _timed_answers(run)
    kept = {cell for cell, *_ in answers.keys() & _call_keys(run)}  # cells whose answers are named like their prompts
    for call, prompt in _kept_calls(run):
        is_answered = prompt.served is None or prompt.served.failure is None
        if is_answered and call.cell in kept and (call.cell, call.round, prompt.prompt_id) not in answers:
            yield _of_prompt(call, prompt)


def _answers_without_calls(run: Run) -> Iterator[Place]:
    """Answers without their timed call. Answers are written first, so a stopped launch may leave those of one call."""
    calls, answers = _call_keys(run), _timed_answers(run)
    kept = {cell for cell, *_ in answers.keys() & calls} if run.complete else set()
    lone = [key for key in answers if key not in calls and key[0] in kept]
    # All answers of a stream are written before its calls.
    widest = max((len(prompts) for prompts in _of_streams(run).values()), default=0)
    widest = max([widest, *(call.batch_size for call in run.speed)])
    stops = sum(event["kind"] in ("resumed", "failed", "launched") for event in run.events)
    if len(lone) > widest * stops:
        yield from (Place(row=answers[key]) for key in lone)


def _of_streams(run: Run) -> dict[tuple[object, ...], list[SpeedSample]]:
    """The requests of every stream to a server."""
    found: dict[tuple[object, ...], list[SpeedSample]] = defaultdict(list)
    for call in run.speed:
        if call.due_s is not None:
            found[call.launch_id, call.round, call.phase, call.cell, call.replica].append(call)
    return found


def _texts_of_equal_tokens(run: Run) -> Iterator[Place]:
    """Texts of equal tokens, per document and tokenizer. A stop string may end within a token and is left out."""
    readers = _tokenizers(run)
    known: dict[tuple[Any, ...], str] = {}
    for row in run.generations:
        made = row.generation
        if made.text is None or made.finish == "stop":
            continue
        reader = readers[row.cell] or row.cell
        key = (reader, row.task, row.doc_id, row.request_index, made.finish, made.token_ids)
        if known.setdefault(key, made.text) != made.text:
            yield Place(row=row, field="text")


def _answers(run: Run) -> Answers:
    return once([run], ("answers of documents",), lambda: _by_document(run))


def _by_document(run: Run) -> Answers:
    found: Answers = defaultdict(list)
    for row in run.generations:
        found[row.cell, row.task, row.doc_id].append(row)
    return found


def _scores_without_answers(run: Run) -> Iterator[Place]:
    answers = _answers(run)
    kept = {cell for cell, _, _ in answers}
    for score in run.scores:
        is_kept = score.scored_by == "generation" and score.cell in kept
        if is_kept and (score.cell, score.task, score.doc_id) not in answers:
            yield Place(row=score)


def _answers_without_scores(run: Run) -> Iterator[Place]:
    """Answers without a score, in complete runs, for tasks whose documents are scored one by one."""
    if not run.complete:
        return
    scored: dict[tuple[str, str], set[int]] = defaultdict(set)
    for score in run.scores:
        if score.aggregation in (None, MEAN):
            scored[score.cell, score.task].add(score.doc_id)
    for (cell, task, doc_id), rows in _answers(run).items():
        if scored.get((cell, task)) and doc_id not in scored[cell, task]:
            yield Place(row=rows[0])


def _scores_of_other_prompts(run: Run) -> Iterator[Place]:
    """Scores on another prompt than the answer; only for documents with one request."""
    answers = _answers(run)
    for score in run.scores:
        rows = answers.get((score.cell, score.task, score.doc_id), [])
        asked_once = all(row.request_index == 0 for row in rows)
        if asked_once and any(row.prompt_sha256 != score.prompt_sha256 for row in rows):
            yield Place(row=score, field="prompt_sha256", stated=score.prompt_sha256, found=rows[0].prompt_sha256)


def _scores_of_no_share(run: Run) -> Iterator[Place]:
    for score in run.scores:
        if score.metric in SHARES and score.value is not None and not -CLOSE <= score.value <= 1 + CLOSE:
            yield Place(row=score, field="value", found=score.value)


def _one_text(rows: list[GenerationRow]) -> Texts | None:
    """The text that a document was answered with, if equal in every round and sample; else ``None``."""
    if len(rows) == 1:
        text = rows[0].generation.text
        return None if text is None else (text,)
    by_repeat: dict[int, dict[int, str | None]] = defaultdict(dict)
    for row in rows:
        by_repeat[row.repeat][row.request_index] = row.generation.text
    texts = {tuple(one[index] for index in sorted(one)) for one in by_repeat.values()}
    if len(texts) != 1:
        return None
    found = next(iter(texts))
    return None if None in found else found  # type: ignore[return-value]


def _scored_texts(run: Run) -> Iterator[tuple[Score, Texts]]:
    texts = once([run], ("texts of documents",), partial(_texts, run))
    for score in run.scores:
        text = texts.get((score.cell, score.task, score.doc_id))
        if score.scored_by == "generation" and score.value is not None and text is not None:
            yield score, text


def _texts(run: Run) -> dict[tuple[str, str, int], Texts | None]:
    return {key: _one_text(rows) for key, rows in _answers(run).items()}


def _scores_of_equal_answers(run: Run) -> Iterator[Place]:
    """Different scores of equal answers to a document; by exact match also across documents with the same target."""
    known: dict[tuple[Any, ...], float] = {}
    for score, text in _scored_texts(run):
        if score.metric.startswith(OF_CODE):
            continue
        asked = score.target_sha256 if score.metric == "exact_match" else score.doc_sha256
        value = known.setdefault((score.task, score.metric, score.filter, asked, text), score.value or 0.0)
        if abs(value - (score.value or 0.0)) > CLOSE:
            yield Place(row=score, field="value", stated=value, found=score.value)


def _scores_of_targets(run: Run) -> Iterator[Place]:
    """Answers that equal the target letter by letter but are not scored as right by exact match."""
    for score, text in _scored_texts(run):
        plain = (score.metric, score.filter) == ("exact_match", "none") and len(text) == 1 and text[0] != ""
        if (
            plain
            and score.value != 1
            and sha256_text(text[0].encode("utf-8", "replace").decode()) == score.target_sha256
        ):
            yield Place(row=score, field="value", stated=1, found=score.value)


def _scores_of_one_likelihood(run: Run) -> Iterator[Place]:
    """Scores of cells that share one computation of log-likelihoods but differ."""
    answering: dict[str, set[str]] = defaultdict(set)
    for row in run.likelihoods:
        answering[row.task].add(row.cell)
    given: dict[tuple[object, ...], set[Any]] = defaultdict(set)
    for score in run.scores:
        if score.cell in answering[score.task]:
            for whose in (None, score.cell):
                given[whose, *_likelihood_key(score)].add((score.value, score.parts))
    for score in run.scores:
        donor = run.cells[score.cell].likelihoods_of  # recorded beside several baselines
        known = given.get((donor, *_likelihood_key(score)), set())
        if score.scored_by != "generation" and known and (score.value, score.parts) not in known:
            yield Place(row=score, field="value", stated=next(iter(known))[0], found=score.value)


def _likelihood_key(score: Score) -> tuple[str, int, str, str, str]:
    return (score.task, score.doc_id, score.metric, score.filter, score.scored_by)


ROW_CHECKS: Mapping[ContradictionKind, Check] = {
    "batch size": _batch_sizes,
    "prompts of a call": _prompts_of_calls,
    "prompt tokens": _prompt_tokens,
    "prompt tokens of arms": _prompt_tokens_of_arms,
    "tokens of equal hash": _lengths_of_hashes,
    "tokens beyond budget": _beyond_budget,
    "forwards counted": _forwards_counted,
    "call and answer": _calls_and_answers,
    "call without answer": _calls_without_answers,
    "answer without call": _answers_without_calls,
    "text of equal tokens": _texts_of_equal_tokens,
    "score without answer": _scores_without_answers,
    "answer without score": _answers_without_scores,
    "score of another prompt": _scores_of_other_prompts,
    "score outside 0 to 1": _scores_of_no_share,
    "scores of equal answers": _scores_of_equal_answers,
    "score of the target": _scores_of_targets,
    "scores of one likelihood": _scores_of_one_likelihood,
}
