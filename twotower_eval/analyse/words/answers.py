"""The words for what gates found in answers: whether they repeat, come from their own call, and fit together."""

from __future__ import annotations

from twotower_eval.analyse.compare import gate_facts as facts
from twotower_eval.analyse.compare.answers import Agreement, Differing, OtherLength
from twotower_eval.analyse.compare.fairness import Unlike
from twotower_eval.analyse.compare.figures import POINTS, interval
from twotower_eval.analyse.compare.same import SHOWN
from twotower_eval.analyse.compare.witness import ArmWitnessed, DraftedAnswers, Unknown, WitnessedAnswers
from twotower_eval.analyse.words.facts import fact_text
from twotower_eval.names import plural
from twotower_eval.records import document_of, document_prompt_id, scored_document_of

UNKNOWN: dict[Unknown, str] = {
    "at random": "draws its tokens at random",
    "several prompts": "its witnessed calls have several prompts each, whose rows of logits cannot be told apart",
    "no token": "has no token in any witnessed answer",
    "no call": "no call of these runs was witnessed",
    "behind a server": "decodes behind a server, which shows no logits",
}


@fact_text.register
def _same_answers(fact: facts.SameAnswers) -> str:
    if not fact.arms:
        return "no run scored this point's answers off the clock"
    wrong = [_differ(one) for one in fact.arms if one.arm in fact.differing]
    wrong += [_work(one) for one in fact.arms if one.arm in fact.idle]
    reasons = list(dict.fromkeys(f"{one.arm}: {one.reason}" for one in fact.arms if one.reason))
    what = "timed prompts" if fact.when == "again" else "documents timed and scored"
    return "; ".join(wrong or reasons) or "; ".join(_agree(one, what) for one in fact.arms)


def _agree(one: Agreement, what: str) -> str:
    if not one.differing:
        return f"{one.arm}: {one.num_compared:,} {what}, all equal"
    return _differ(one)


def _differ(one: Agreement) -> str:
    shown = "; ".join(_place(differing) for differing in one.differing[:SHOWN])
    more = f" and {len(one.differing) - SHOWN} more" if len(one.differing) > SHOWN else ""
    percent = 100 * one.share
    share = f"{percent:.1f}" if percent < 10 else f"{percent:.0f}"
    count = f"{len(one.differing)} of {one.num_compared:,} answers ({share} %)"
    return f"{one.arm}: {count} differ in {one.dtype} at temperature 0: {shown}{more}"


def _place(one: Differing) -> str:
    if one.same_tokens:
        return f"{prompt_text(one.prompt_id)} in its forwards"
    return prompt_text(one.prompt_id) + ("" if one.position is None else f" from token {one.position + 1} on")


def _work(one: Agreement) -> str:
    share = f"{100 * (one.work or 0):.3g} %"
    return f"{one.arm}: timed answers took {share} of the forwards that the same answers took when they were scored"


@fact_text.register
def _other_tokens(fact: facts.OtherTokens) -> str:
    if fact.timed:
        shown = "; ".join(dict.fromkeys(f"{arm}: {_lengths(one, ('scored', 'timed'))}" for arm, one in fact.first))
        return f"{plural(fact.num_prompts, 'prompt')} with other tokens when timed than when scored: {shown}"
    shown = "; ".join(_lengths(one, ("in the baseline", "in the candidate")) for _, one in fact.first)
    return f"{plural(fact.num_prompts, 'prompt')} with different tokens in the two arms: {shown}"


def _lengths(one: OtherLength, whose: tuple[str, str]) -> str:
    return f"{prompt_text(one.prompt_id)} ({one.num_tokens[0]} tokens {whose[0]}, {one.num_tokens[1]} {whose[1]})"


def prompt_text(prompt_id: str) -> str:
    """``task sorting, document 3``; ``prompt mine`` where a prompt is of no document."""
    document = document_of(prompt_id)
    return f"prompt {prompt_id}" if document is None else f"task {document[0]}, document {document[1]}"


@fact_text.register
def _effect(fact: facts.EffectOnScores) -> str:
    found = fact.effect.estimate
    if found is None or fact.stands is None:
        return f"{fact.arm}: {fact.effect.reason}"
    how = {"within": "within", "beyond": "beyond", "open": "not shown to be within"}[fact.stands]
    moved = f"{fact.arm}: timed answers score {interval(POINTS, found)} above the scored ones"
    return f"{moved}, {how} {100 * fact.limit:g} points"


@fact_text.register
def _witnessed(fact: WitnessedAnswers) -> str:
    least = _percent(fact.least_share)
    accounted = f", fewer than {least}: no logits of these calls explain the others"
    wrong = [f"{_share(one)}{accounted}" for one in fact.arms if one.arm in fact.short]
    wrong += [_two_faced(one) for one in fact.arms if one.arm in fact.two_faced]
    reasons = dict.fromkeys(_unknown(one, one.unknown) for one in fact.arms if one.unknown)
    return "; ".join(wrong or reasons) or "; ".join(map(_share, fact.arms))


def _unknown(one: ArmWitnessed, unknown: Unknown) -> str:
    return UNKNOWN[unknown] if unknown == "no call" else f"{one.arm}: {UNKNOWN[unknown]}"


def _share(one: ArmWitnessed) -> str:
    return (
        f"{one.arm}: {_percent(one.share)} of the {one.num_tokens:,} tokens of {one.num_calls:,} witnessed answers are "
        "among the likeliest of a row of logits of their own call"
    )


def _two_faced(one: ArmWitnessed) -> str:
    shown = "; ".join(dict.fromkeys(prompt_text(_document(one.prompt_id)) for one in one.differing[:SHOWN]))
    return (
        f"{one.arm}: {len(one.differing)} of {one.num_compared:,} answers of witnessed calls differ from those of the "
        f"other calls: {shown}"
    )


def _document(prompt_id: str) -> str:
    """The id without the request and the sample that prompts of ``run`` have at its end."""
    document = scored_document_of(prompt_id)
    return prompt_id if document is None else document_prompt_id(*document)


@fact_text.register
def _drafted(fact: DraftedAnswers) -> str:
    text = "; ".join(map(_drafts, fact.arms))
    more = ": too few prompts to decide, time more prompts (--num-prompts) or more launches (--launches)"
    return text + more if fact.too_few else text


def _drafts(one: ArmWitnessed) -> str:
    known, new = one.known, one.new
    return (
        f"{one.arm}: drafts were {_percent(known.share)} of the tokens on {plural(known.num_prompts, 'timed prompt')} "
        f"and {_percent(new.share)} on {plural(new.num_prompts, 'made-up prompt')}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# Quality and speed of one setting


@fact_text.register
def _one_thing(fact: facts.OneThing) -> str:
    if fact.parts is None:
        same = "checkpoint, dtype, decoder and device are the same in both arms"
        return same if fact.of == "settings" else "budgets and prompts are the same"
    budgets = [Unlike(setting=f"the budget of {task}", values=pair) for task, pair in fact.budgets]
    unlike = [_unlike(one, fact.parts) for one in (*fact.unlike, *budgets)]
    unlike += [
        f"{one.arm}: {plural(len(one.other_prompts), 'document')} timed on other prompts than scored, first "
        f"{prompt_text(one.other_prompts[0])}"
        for one in fact.other_prompts
    ]
    return "; ".join(dict.fromkeys(unlike))


def _unlike(unlike: Unlike, names: tuple[str, str]) -> str:
    whose = f"{unlike.arm}: " if unlike.arm else ""
    one, other = (_value(value) for value in unlike.values)
    return f"{whose}{unlike.setting} {one} in {names[0]}, {other} in {names[1]}"


def _value(value: object) -> str:
    text = "none" if value is None else f"{value}"
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_digest else text


@fact_text.register
def _same_tasks(fact: facts.SameTasks) -> str:
    if fact.tasks is None:
        return "timed on the tasks that the claim's point names"
    found = fact.tasks
    if not found.timed:
        return "the ids of the timed prompts name no task"
    wrong = [f"also timed: {', '.join(found.beyond)}, outside the claimed quality"] if found.beyond else []
    wrong += [f"not timed: {', '.join(found.untimed)}"] if found.untimed else []
    if not wrong:
        return "the timed tasks are those of the claimed quality"
    how = " (speed --num-prompts: at least one for each task)" if found.untimed else ""
    return f"{'; '.join(wrong)}: time the tasks in scope{how}, or name the timed ones in the claim file (timed_tasks)"


@fact_text.register
def _answers_timed(fact: facts.AnswersTimed) -> str:
    if fact.answers:
        return "answers were timed"
    return "outputs of the fixed workload are no answers: time the answer workload"
