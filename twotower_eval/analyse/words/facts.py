"""The words for a fact, by its kind: warnings beside a figure, and how its interval was made."""

from __future__ import annotations

from functools import singledispatch
from math import ceil

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare import warned
from twotower_eval.analyse.compare.figures import PERCENT, compared
from twotower_eval.analyse.compare.timing import Best
from twotower_eval.analyse.compare.witness import Likeness
from twotower_eval.names import plural
from twotower_eval.records import MIN_LAUNCH_ROUNDS, MIN_LAUNCHES, TELLING_ROUNDS, Estimate, Fact, FindingKind, Method
from twotower_eval.rules import unlike_kinds_text, unlike_text, void_text

EQUAL = "equal by construction: one computation scored both arms"


def method_text(found: Estimate) -> str:
    """``paired clustered bootstrap, 10,000 resamples, or linearised t interval where wider``."""
    return _text(found.method, found.n) if isinstance(found.method, Method) else found.method


def method_line(found: Estimate) -> str:
    """The same with a capital, to begin a sentence."""
    text = method_text(found)
    return text[:1].upper() + text[1:]


def _text(method: Method, n: int) -> str:
    if method.function is not None:
        return _function_text(method)
    text = _kind_text(method, n)
    if method.num_scoring is not None:
        text += f", exact bound where the candidate scores in {method.num_scoring} of {n} clusters"
    if method.widened:
        text += ", widened to the exact bound"
    if method.num_tasks is not None:
        text = f"mean over {method.num_tasks} tasks, {text}"
    if method.moved_out:
        text += ", widened for calls that were not timed"
    if method.devices is not None:
        text += f", times {method.devices[0]} / {method.devices[1]} devices"
    if method.least_of is not None:
        text += f", the least over {method.least_of} baselines: of their lower ends, and of upper ends for all at once"
    return text


def _function_text(method: Method) -> str:
    text = f"clustered bootstrap through {method.function}, {method.num_resamples:,} resamples"
    text += ", or jackknife where wider" if method.jackknife else ""
    return text if method.num_tasks is None else f"mean over {method.num_tasks} tasks, each by a {text}"


def _kind_text(method: Method, n: int) -> str:
    drawn = f"{method.num_resamples or 0:,} resamples"
    match method.kind:
        case "equal_by_construction":
            return EQUAL
        case "exact_binomial":
            return "exact binomial interval"
        case "exact_bound":
            return f"exact binomial bound, {method.num_differing} of {n} clusters discordant"
        case "exact_mcnemar":
            return "exact McNemar"
        case "sign_flips":
            return f"cluster sign flips, {drawn}"
        case "paired_bootstrap":
            return f"paired clustered bootstrap, {drawn}, or linearised t interval where wider"
        case "clustered_bootstrap" | "function_bootstrap":
            return f"clustered bootstrap, {drawn}, or linearised t interval where wider"
        case "crossed_bootstrap":
            of = f"{method.num_drawn} {method.drawn}" + (f" x {method.num_calls} calls" if method.num_calls else "")
            return f"crossed paired bootstrap of {of}, {drawn}, t interval on the log, corrected for skewness"
        case "round_bootstrap":
            return "bootstrap over rounds, Student tails"
        case "t_of_clusters":
            return "t interval over clusters, corrected for skewness"
        case "t_of_logs":
            return "t interval on the log"
        case "t_of_log_ratios":
            return f"mean of {n} log ratios, t interval"
        case "t_of_times":
            return f"mean of {n}, t interval corrected for skewness, its low end on the log scale"
        case "median":
            return f"median of {n}, order-statistic interval"
        case "range_of_ratios":
            return f"range of {n} ratios"


NOT_RECORDED = "how the baseline was run was not recorded"


@singledispatch
def fact_text(fact: Fact) -> str:
    """A fact in words, without a full stop; a kind that has no words is a bug."""
    raise TypeError(f"no words for {type(fact).__name__}")


KINDS: dict[FindingKind, str] = {"aa_null": "A/A null", "answers_are_answers": "quality floor"}


def kind_text(kind: FindingKind) -> str:
    """``A/A null``, ``quality floor``, ``possible times``."""
    return KINDS.get(kind) or kind.replace("_", " ")


@fact_text.register
def _incomplete(_fact: warned.Incomplete) -> str:
    return "**the run is INCOMPLETE**"


@fact_text.register
def _incomplete_rounds(fact: warned.IncompleteRounds) -> str:
    return f"{plural(fact.num_rounds, 'round')} left out: not complete in both arms"


@fact_text.register
def _void_calls(fact: warned.VoidCalls) -> str:
    where = "their prompts are left out in every round, or their rounds are left out"
    return f"{void_text(fact.num_timed, fact.faults)}; {where}"


@fact_text.register
def _resumed_with_fewer(fact: warned.ResumedWithFewer) -> str:
    return (
        f"run {fact.run_id} was planned with {plural(fact.num_asked, 'round')} and resumed with fewer: it has "
        f"{plural(fact.num_whole, 'whole round')}"
    )


@fact_text.register
def _lengths_differ(_fact: warned.LengthsDiffer) -> str:
    return (
        "the arms' outputs differ in length by more than a tenth: read the speedup in useful tokens per second "
        "beside the wall-clock speedup"
    )


@fact_text.register
def _unlike_lengths(_fact: warned.UnlikeLengths) -> str:
    return (
        "the timed answers clearly differ in length from those of all known documents: the interval allows for that, "
        "and more prompts would narrow it"
    )


@fact_text.register
def _wide_null(fact: warned.WideNull) -> str:
    width, limit = compared(PERCENT, fact.half_width, fact.widest)
    return (
        f"close to 1x beside the noise of its A/A null: the null's half-width of {width} is above {limit}, "
        f"{share_text(fact.share)}; noise may explain much of the difference, time more rounds"
    )


def share_text(share: float) -> str:
    """``25 % of the log speedup``."""
    return f"{100 * share:g} % of the log speedup"


@fact_text.register
def _slower_than_generate(_fact: warned.SlowerThanGenerate) -> str:
    return "the baseline is slower than transformers' own generate"


@fact_text.register
def _far_above_floor(fact: warned.FarAboveFloor) -> str:
    return f"the baseline takes more than {fact.limit:g} times as long as reading its weights"


@fact_text.register
def _unlike_answers(fact: Likeness) -> str:
    return (
        f"the candidate's answers share {100 * fact.new:.3g} % of their tokens with the baseline's on made-up prompts, "
        f"{100 * fact.known:.3g} % on timed prompts: read them, it may answer new prompts carelessly"
    )


@fact_text.register
def _unpaired(fact: warned.Unpaired) -> str:
    return f"{plural(fact.num_scores, 'score')} left out: not yet in the other arm"


@fact_text.register
def _no_headline(fact: warned.NoHeadline) -> str:
    return f"{plural(fact.num_documents, 'document')} left out of both arms: no headline score in one of them"


@fact_text.register
def _standard_errors(fact: warned.StandardErrorsDiffer) -> str:
    figures = f"{100 * fact.bootstrap:.2f} points by bootstrap, {100 * fact.linear:.2f} by linearisation"
    return f"the headline's standard errors by two methods differ by more than {100 * fact.tolerance:g} %: {figures}"


@fact_text.register
def _cached_prompts(fact: warned.CachedPrompts) -> str:
    told = [
        f"{100 * share:.0f} % of the {arm}'s prompt tokens" if share is not None else f"nothing said of the {arm}'s"
        for arm, share in (("baseline", fact.baseline), ("candidate", fact.candidate))
    ]
    return (
        f"the servers' caches held {told[0]} and {told[1]}: prompts repeat from round to round, so that the speedup "
        "may be that of a cache; time both servers with it or both without"
    )


@fact_text.register
def _late_requests(fact: warned.LateRequests) -> str:
    beside = "" if fact.median_s is None else f", beside a median latency of {1000 * fact.median_s:.0f} ms"
    return (
        f"requests to the {fact.arm} left this machine up to {1000 * fact.late_s:.0f} ms late (99th percentile){beside}"
        ": latencies hold that too, take a lower rate or a machine with nothing else to do"
    )


@fact_text.register
def _unlike_arms(fact: warned.UnlikeArms) -> str:
    return unlike_text(fact.settings)


@fact_text.register
def _unlike_scoring(fact: warned.UnlikeScoring) -> str:
    return unlike_kinds_text(fact.tasks, fact.baseline, fact.candidate)


@fact_text.register
def _lone_clusters(fact: warned.LoneClusters) -> str:
    return (
        f"{plural(fact.num_clusters, 'cluster')} with a set of tasks that no other cluster has: the intervals do not "
        "include how such clusters vary"
    )


@fact_text.register
def _too_few(fact: stats.TooFew) -> str:
    if fact.serial is not None:
        return _alike_rounds(fact.num, fact.serial.effective_rounds, fact.serial.lag1)
    if fact.of == "clusters":
        return f"{plural(fact.num, 'cluster')}: fewer than {stats.MIN_CLUSTERS} cannot support a claim"
    if fact.of == "rounds":
        return f"{plural(fact.num, 'measured round')}: a verdict needs {stats.MIN_ROUNDS}, time more rounds"
    few = f"{plural(fact.num, 'call')} of sampled prompts: fewer than {stats.MIN_CALLS}"
    return f"{few} cannot support a claim, time more prompts"


def _alike_rounds(num_rounds: int, effective_rounds: float, lag1: float | None) -> str:
    are = "is" if num_rounds == 1 else "are"
    worth = f"{plural(num_rounds, 'round')} {are} worth {effective_rounds:.1f} independent ones"
    few = f"a verdict needs {stats.MIN_ROUNDS}"
    if lag1 is None:
        why = f"fewer than {TELLING_ROUNDS} rounds of a launch do not show how much neighbours resemble each other"
        enough = f"{MIN_LAUNCHES} launches or more of {MIN_LAUNCH_ROUNDS} rounds or more"
        return f"{worth}, as {why}; {few}: time more rounds in each launch, or {enough}"
    why = f"neighbouring rounds resemble each other (correlation {lag1:.2f} before its correction for few rounds)"
    more = ceil(num_rounds * stats.MIN_ROUNDS / effective_rounds)
    return f"{worth}, as {why}; {few}: time {more:,} rounds or more, further apart, or {MIN_LAUNCHES} launches or more"


# Is the baseline at its best?


def best_text(best: Best | None) -> str:
    """How the baseline was run; its rate beside its memory floor and beside transformers' own generate."""
    if best is None:
        return NOT_RECORDED
    facts = best.facts
    how = [f"batch {best.batch_size}", best.dtype]
    how.append("transformers' model in our loop" if facts.engine == "transformers" else "our engine")
    how += [f"{facts.attention} attention"] if facts.attention else []
    how += ["CUDA graphs" if facts.cuda_graphs else "no CUDA graphs"]
    how += [f"{facts.num_threads} CPU threads"] if facts.num_threads else []
    rate = "" if best.tokens_per_s is None else f"{best.tokens_per_s:,.4g} useful tokens/s "
    beside = f"; {generate_text(best)}" if facts.engine == "transformers" else ""
    return f"{rate}({', '.join(how)}); {_floor_text(best)}{beside}"


def _floor_text(best: Best) -> str:
    facts = best.facts
    if best.above_floor is None or facts.step_bytes is None or facts.bytes_per_s is None:
        return "its memory floor is not known"
    return (
        f"{best.above_floor:.2g} times its memory floor, the time to read {facts.step_bytes / 1e6:,.3g} MB a step at "
        f"{facts.bytes_per_s / 1e9:,.3g} GB/s, as a copy does"
    )


def generate_text(best: Best) -> str:
    """``1.05 [1.02, 1.09] times as long as transformers' own generate``, or why that is not known."""
    facts, found = best.facts, best.over_generate
    if found is not None:
        return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] times as long as transformers' own generate"
    return f"not compared with transformers' own generate: {facts.reason or 'it gives other tokens'}"
