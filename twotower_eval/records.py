"""Every noun of the project, as frozen records; how they are shown is decided elsewhere.

Units and counts live in field names (``wall_s``, ``num_tokens``). Absence is ``None`` with a reason beside it,
never 0 or NaN. Each record turns into a JSON object with :func:`to_json` and back with
``strict.from_json``, where msgspec holds every value against its field's annotation, the bounds below included.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from twotower_eval.errors import UserError

SCHEMA_VERSION = 1


MOST = 2**63 - 1  # whole numbers beyond 64 bits are carried by no table
Whole = Annotated[int, Meta(ge=-MOST - 1, le=MOST)]
Count = Annotated[int, Meta(ge=0, le=MOST)]
Size = Annotated[int, Meta(ge=1, le=MOST)]
Replica = Annotated[int, Meta(ge=0, le=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
LogProbability = Annotated[float, Meta(le=0)]

FinishReason = Literal["eos", "stop", "length"]
LikelihoodKind = Literal["exact", "context_tower", "denoiser_left_to_right", "bound"]
SpeedPhase = Literal["warmup", "measure", "probe"]
TimeFault = Literal[
    "not finite", "negative", "no time", "after the end", "graph made", "clock stood", "retried", "failed"
]
WorkloadKind = Literal["task", "fixed", "answer", "costs", "checks"]
RequestFault = Literal["refused for now", "server error", "dropped", "timed out", "broken reply"]
RequestKind = Literal["closed", "poisson", "constant"]
PassKind = Literal["prefill", "extend", "denoise"]
CostPart = Literal["prefill", "ar_step", "bookkeeping", "denoise", "context_pass", "forced_block"]
WitnessedKind = Literal["timed", "document", "made up", "scored"]
CheckOutcome = Literal["passed", "failed", "not_checked"]
GateKind = Literal[
    "files_agree",
    "complete_run",
    "same_inputs",
    "all_scored",
    "above_chance",
    "whole_prompts",
    "same_prompts",
    "same_rounds",
    "same_answers",
    "effect_on_scores",
    "drawn_answers",
    "fastest_way",
    "busy_arms",
    "own_generate",
    "possible_times",
    "kept_up",
    "probes",
    "witnessed_answers",
    "drafts",
    "aa_null",
    "residual",
    "baseline_lag",
    "degenerate_outputs",
    "answers_are_answers",
    "verify",
    "one_thing",
    "same_tasks",
    "answers_are_timed",
]
WarningKind = Literal[
    "incomplete_rounds",
    "void_calls",
    "resumed_with_fewer",
    "lengths_differ",
    "unlike_lengths",
    "few_rounds",
    "wide_null",
    "unlike_answers",
    "slower_than_generate",
    "far_above_floor",
    "unpaired_scores",
    "unscored_documents",
    "standard_errors_differ",
    "lone_clusters",
    "unlike_arms",
    "unlike_scoring",
    "cached_prompts",
    "late_requests",
]
FindingKind = Literal[GateKind, WarningKind]
Severity = Literal["invalid", "warning", "note"]
MethodKind = Literal[
    "equal_by_construction",
    "exact_binomial",
    "exact_bound",
    "exact_mcnemar",
    "sign_flips",
    "paired_bootstrap",
    "clustered_bootstrap",
    "function_bootstrap",
    "crossed_bootstrap",
    "round_bootstrap",
    "t_of_clusters",
    "t_of_logs",
    "t_of_log_ratios",
    "t_of_times",
    "median",
    "range_of_ratios",
]
Verb = Literal["run", "speed", "size", "verify"]
Arm = Literal["baseline", "candidate"]
Routing = Literal["shared", "half", "independent"]  # forced on random weights: how far a block's tokens share experts
ProofCheck = Literal["cached steps", "rows beside each other", "whole rows in batches", "options in one row"]
Outcome = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE", "INVALID", "NOT_MEASURED"]
MIN_LAUNCHES = 5  # fewer do not show how launches differ
MIN_LAUNCH_ROUNDS = 4  # of each of them: fewer do not show whether drift continues from one launch into the next
TELLING_ROUNDS = 5  # of a single launch: fewer do not show how rounds depend on each other
VerdictScope = Literal["in this launch", "in these launches"]
Relation = Literal["at_least", "at_most", "equal"]
Averaging = Literal["ratio_of_means", "mean_of_ratios"]
Quantity = Literal[
    "retention",
    "decoder_exercised_retention",
    "speedup_time",
    "speedup_throughput",
    "speedup_time_per_device",
    "score",
    "score_difference",
    "joint",
]

Scalar = str | Whole | float | bool | None
AUTO: Final = "auto"  # of a plan's field: what fits the checkpoint and the machine
HALF_PRECISION = ("float16", "bfloat16")
ROUNDED = (*HALF_PRECISION, "unknown")  # number types in which rounding parts answers, or may: a server does not say
ROUTINGS: tuple[Routing, ...] = typing.get_args(Routing)
GRAPH_DEVICES = ("cuda",)  # device types that can run a whole step as one graph
COMMIT = re.compile(r"[0-9a-f]{40}")  # of git, written out
HUB = "hf://"  # what the source of a checkpoint of the Hugging Face hub begins with
SINGLE_FILE = "model.safetensors"  # a checkpoint's weights, or with several files their index
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")  # files of a checkpoint that do not affect how text is read
Params = Mapping[str, Scalar]
STATIC_CACHE = "static_cache"  # the decoder that steps over buffers of fixed size
ENDPOINT_FAMILY = "openai"  # of models behind an OpenAI-compatible server
FAMILY_DECODERS = (
    *("ancestral", "bd3lm", "dream", "e2d2", "entropy_bound", "fast_dllm_v1", "fast_dllm_v2", "llada2"),
    *("low_confidence", "radd", "sdar"),
)  # of families of diffusion language models besides the two-tower one
OWN_DECODERS = (
    *(
        "autoregressive",
        "prompt_lookup",
        "draft",
        "static_cache",
        "mock_ar",
        "block_diffusion",
        "reference",
        "endpoint",
    ),
    *FAMILY_DECODERS,
)

# Of a generation, what its row of a timed call repeats.
GENERATION_COUNTS = (
    "num_prompt_tokens",
    "num_tokens",
    "num_discarded_tokens",
    "num_context_forwards",
    "num_denoiser_forwards",
)
MEAN = "mean"  # lm-eval's name of the aggregation under which every document has a value
LABEL_AGGREGATIONS = frozenset({"f1", "matthews_corrcoef"})
# lm-eval's names of aggregations that are functions of sums over documents.
SUMMED_AGGREGATIONS = LABEL_AGGREGATIONS | {
    "perplexity",
    "weighted_perplexity",
    "bits_per_byte",
    "nanmean",
    "bleu",
    "chrf",
    "chrf++",
    "ter",
}


# Of a field that came later: left out of JSON where it is None, so that ids over the whole record stay what they were.
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]  # of Hugging Face models
LEFT_OUT: Mapping[str, bool] = {"left out where None": True}


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """A file's name within its folder, and the sha256 of what it holds."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How a checkpoint's weights are quantised, by its config.json.

    ``method`` is the library's name there, ``scheme`` what it says of numbers and widths. ``dequantised``: the weights
    were widened as they were loaded, since nothing here computes with them as they are stored.
    """

    method: str
    scheme: str | None = None
    dequantised: bool = False

    def __str__(self) -> str:
        """``int8 weight-only by torchao``."""
        how = f"{self.scheme} by {self.method}" if self.scheme else f"quantised by {self.method}"
        return f"{how}, dequantised as it was loaded" if self.dequantised else how


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What is known of a model behind a server; its weights are not.

    ``url`` and ``name`` are how it is asked for, ``facts`` what the server lists of it, as JSON texts. ``prompts`` says
    how they are sent: ``messages`` go to its chat completions, where the server applies its own chat template.
    ``tokenizer`` names the one that counts the tokens of its prompts and answers here.
    """

    url: str
    name: str
    facts: tuple[tuple[str, str], ...]
    prompts: Literal["token ids", "text", "messages"]
    tokenizer: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Identity of a model, stated and never inferred from a path.

    ``digest`` is a sha256 over the tensors' content; ``tower`` is ``None`` for a whole checkpoint and
    ``"context"`` where only the context tower of a pair is used (the AR baseline ``context-tower``). ``files`` are
    those beside the weights that affect a logit or a text: config, generation settings, tokenizer; older runs have
    none. ``weights`` are the files of a whole checkpoint's tensors, each with a sha256 over those in it.
    ``quantisation`` is ``None`` where weights are stored as plain numbers, ``attention`` where a Hugging Face model
    computes it by transformers' own choice.

    A model behind a server is ``served``: its ``digest`` is over what is said there, so that two of them are the same
    by name only, and its ``dtype`` is ``unknown``.
    """

    name: str
    family: str
    source: str
    digest: str
    dtype: str
    devices: tuple[str, ...]
    tower: Literal["context"] | None = None
    revision: str | None = None
    files: tuple[FileDigest, ...] = ()
    weights: tuple[FileDigest, ...] = ()
    quantisation: Quantisation | None = field(default=None, metadata=LEFT_OUT)
    served: ServedModel | None = field(default=None, metadata=LEFT_OUT)
    attention: Attention | None = field(default=None, metadata=LEFT_OUT)

    @property
    def identity(self) -> str:
        """One digest over the tensors and ``files``: equal tensors under another config are another model."""
        if not self.files:
            return self.digest
        return sha256_text(canonical_json([self.digest, sorted([file.name, file.sha256] for file in self.files)]))

    @property
    def foreign_code(self) -> tuple[FileDigest, ...]:
        """The source files that came with a Hugging Face model and were run."""
        of_others = self.family == "transformers"
        return tuple(file for file in self.files if of_others and file.name.endswith(".py"))


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder's kind, its full parameters and the version that is raised when its outputs may change.

    ``approximate``: tokens are predicted from keys and values of earlier tokens than those that stand there.
    ``sampled``: tokens or places are drawn at random whatever the temperature is.
    ``code`` are the source files of a plug-in, ``None`` for the decoders of this project, whose version says it, and
    where it was not recorded; ``draft`` is a digest of the draft model's files, ``None`` for decoders without one. What
    is ``None`` is no part of a cell's id.
    """

    kind: str
    params: Params = field(default_factory=dict)
    version: Whole = 1
    code: tuple[FileDigest, ...] | None = field(default=None, metadata=LEFT_OUT)
    draft: str | None = field(default=None, metadata=LEFT_OUT)
    approximate: bool | None = field(default=None, metadata=LEFT_OUT)  # never False, so that ids stay what they were
    sampled: bool | None = field(default=None, metadata=LEFT_OUT)  # nor this

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not self.kind:
            raise UserError(f"a decoder's kind must be a name, not {self.kind!r}")
        if not isinstance(self.params, Mapping) or not all(isinstance(name, str) for name in self.params):
            raise UserError(f"decoder {self.kind!r}: params must be a table of parameters, not {self.params!r}")

    @property
    def own_steps(self) -> str | None:
        """Whose steps they are, where they cost otherwise than those of other decoders with the same model."""
        return canonical_json(self.params) if self.kind == STATIC_CACHE else None

    @property
    def is_plug_in(self) -> bool:
        """Whether it is not one of this project's own, so that the defaults of its parameters are not known here."""
        return self.kind not in OWN_DECODERS

    @property
    def label(self) -> str:
        """Short name with parameters in their declared order, as in ``block_diffusion(block_size=16, threshold=0.8)``.

        Switches that are off are left out. An approximate cache is named.
        """
        parts = [f"{key}={value}" for key, value in self.params.items() if value is not False]
        inside = ", ".join([*parts, *(["approximate cache"] if self.approximate else [])])
        return f"{self.kind}({inside})" if inside else self.kind


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt. ``seed`` makes sampling independent of the batch a prompt happens to be in.

    ``trace`` asks for the trace of its generation, which changes no token. ``token_ids`` may be given as any sequence
    of whole numbers: a list, a tuple, a tensor. :meth:`from_text` makes them of a text.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str | None = None
    seed: int = 0
    trace: bool = False

    def __post_init__(self) -> None:
        try:
            token_ids = tuple(map(operator.index, self.token_ids))  # which takes no part of a number, as int() does
        except TypeError as error:
            raise UserError(f"prompt {self.id!r}: token_ids must be a sequence of whole numbers: {error}") from error
        if min(token_ids, default=0) < 0:
            raise UserError(f"prompt {self.id!r}: token id {min(token_ids)} is below 0")
        if not isinstance(self.id, str):
            raise UserError(f"a prompt's id must be a text, not {self.id!r}")
        object.__setattr__(self, "token_ids", token_ids)

    @classmethod
    def from_text(
        cls, text: str, model: object, *, id: str | None = None, seed: int = 0, trace: bool = False
    ) -> Prompt:
        """A prompt of the tokens that a model reads in ``text``, as the prompts of tasks are read.

        ``model`` is what ``load_model`` gives, or its tokenizer. Equal texts have equal ids unless ``id`` is given.
        UserError where the model has no tokenizer, or where it finds no token in the text.

        >>> import twotower_eval as tt
        >>> model = tt.load_model("twotower_eval/miniature/pair")  # doctest: +SKIP
        >>> prompt = tt.Prompt.from_text("add 193 151=", model)  # doctest: +SKIP
        """
        reader = getattr(model, "tokenizer", model)
        if reader is None:
            raise UserError("this model has no tokenizer files, and reads no text: give the prompt's token_ids")
        if not hasattr(reader, "prompt_ids"):
            raise UserError(f"a {type(model).__name__} reads no text: give a model of load_model, or its tokenizer")
        token_ids = tuple(reader.prompt_ids(text))
        if not token_ids:
            raise UserError("an empty text has no tokens to begin with: give the prompt's token_ids")
        named = f"text-{sha256_text(text)[:12]}" if id is None else id
        return cls(id=named, token_ids=token_ids, text=text, seed=seed, trace=trace)


class ChatPrompt(str):
    """A prompt that is asked as a chat: the text of one model's template, and in ``asked`` what every model is asked.

    ``asked`` is JSON of the messages and of whether the template begins the answer; other models write their own text
    of it. What a task's own code makes of such a text is a plain text again.
    """

    asked: str

    def __new__(cls, text: str, asked: str) -> ChatPrompt:
        made = super().__new__(cls, text)
        made.asked = asked
        return made

    def __reduce__(self) -> tuple[type[ChatPrompt], tuple[str, str]]:  # for the processes of launches
        return ChatPrompt, (str(self), self.asked)


def chat_json(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """``ChatPrompt.asked``; the task's digest is over it, so that it is the same under every template."""
    return canonical_json({"messages": [dict(one) for one in messages], "add_generation_prompt": add_generation_prompt})


def plain_chat(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """What is said in a chat, without any template: a text for counting, as that of a server's template is unknown."""
    return "\n".join(one["content"] for one in messages)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How prompts are asked and answers read, beside what tasks say; the names and meanings are lm-eval's.

    ``template`` is True for a tokenizer's own chat template, or the name of one of several; None: prompts are plain
    text. ``template_args`` and ``enable_thinking`` are handed to the template, which reads what it knows of them.
    ``think_end_token`` ends the thinking, which is no part of the
    answer: its text, or its id.
    """

    template: bool | str | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    gen_prefix: str | None = None
    enable_thinking: bool | None = None
    think_end_token: str | int | None = None
    template_args: Mapping[str, object] | None = None

    @property
    def handed(self) -> dict[str, object]:
        """All that is handed to the template beside the messages; ``enable_thinking`` counts before the others."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.template_args or {}), **thinking}

    @property
    def parts(self) -> dict[str, str]:
        """What changes answers without changing what is asked, as a part of a task's identity; empty by default."""
        chosen: list[object] = [self.template, self.enable_thinking, self.think_end_token]
        if self.template_args:
            chosen.append(dict(self.template_args))
        return {} if chosen == [None, None, None] else {"chat options": sha256_text(canonical_json(chosen))}


PLAIN_TEXT = ChatOptions()


@dataclass(frozen=True, kw_only=True)
class ChatUse:
    """How one model of a run reads prompts, if its tokenizer has a chat template.

    ``applied``: through that template, else as plain text. ``template`` is its source and ``name`` that of one among
    several; ``sha256`` is over all that decides its text. ``drops_system``: it takes no system message, and the
    descriptions of tasks are left out, as in lm-eval. ``is_dated``: it writes today's date. ``generates``: some task is
    answered by generated text. ``reads_alike``: its texts are those that the candidate reads. ``served``: its server
    applies a template of its own, of which nothing is known here.
    """

    arm: Arm
    checkpoint: str
    applied: bool
    generates: bool = True
    name: str | None = None
    template: str | None = None
    sha256: str | None = None
    drops_system: bool = False
    is_dated: bool = False
    reads_alike: bool = True
    served: bool | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a cell is made to do: a task with its documents' digest, or a timed workload.

    ``requests`` says how a server is sent all prompts of a round in one stream, each of which is a timed call: in a
    ``closed`` loop that keeps ``batch_size`` of them in flight, or at ``request_rate`` a second whatever the server
    does, at random moments (``poisson``) or evenly (``constant``). ``None``: the prompts of a call are given together.
    """

    kind: WorkloadKind
    name: str
    digest: str
    max_new_tokens: Size | None = None
    batch_size: Size | None = None  # only for timed workloads: quality must not depend on it
    prompt_tokens: Size | None = None
    num_devices: Size | None = None
    requests: RequestKind | None = field(default=None, metadata=LEFT_OUT)
    request_rate: Positive | None = field(default=None, metadata=LEFT_OUT)

    @property
    def prompts_per_call(self) -> int:
        """Prompts of one timed call."""
        return 1 if self.requests is not None else self.batch_size or 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One checkpoint, one decoder, one workload. ``id`` comes from :func:`cell_id`, with ``extra`` in it.

    Older runs do not record what else was in it (``None``). ``baseline`` is the name of a baseline among several, and
    ``likelihoods_of`` the cell whose log-likelihoods score this one beside several baselines; neither is part of the
    id.
    """

    id: str
    arm: Arm
    checkpoint: Checkpoint
    decoder: DecoderSpec
    workload: Workload
    extra: Params | None = field(default=None, metadata=LEFT_OUT)
    baseline: str | None = field(default=None, metadata=LEFT_OUT)
    likelihoods_of: str | None = field(default=None, metadata=LEFT_OUT)

    @property
    def who(self) -> str:
        """``candidate``, ``baseline``, or among several baselines ``baseline prompt_lookup``."""
        return self.arm if self.baseline is None else f"{self.arm} {self.baseline}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitStep:
    """One denoiser call on one block: which positions it committed, of them how many the step floor forced."""

    block: Count
    step: Count
    positions: tuple[Count, ...]
    token_ids: tuple[Count, ...]
    confidences: tuple[float, ...]
    num_forced: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """How a server gave an answer. Tokens are as it counts them, ``None`` where it does not.

    ``num_retries`` attempts failed before it. What follows is of answers that came in pieces: ``num_pieces`` of text in
    ``num_arrivals`` groups that lie apart, the first and the last so many seconds after the request was sent.
    ``num_cached_tokens`` of the prompt were in the server's cache, where it says so. ``failure``: what kept the server
    from a whole answer, which then has no token.
    """

    num_prompt_tokens: Count | None
    num_tokens: Count | None
    num_retries: Count = 0
    num_pieces: Count | None = None
    num_arrivals: Count | None = None
    first_s: NotNegative | None = None
    last_s: NotNegative | None = None
    num_cached_tokens: Count | None = field(default=None, metadata=LEFT_OUT)
    failure: RequestFault | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class Retried:
    """A request to a server that failed and is asked again after ``wait_s``: what it was for, the number of its failed
    attempt, and what went wrong. The ``retried`` event of a run holds it.
    """

    label: str
    attempt: Size
    fault: RequestFault
    detail: str
    wait_s: NotNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The answer to one prompt. Useful tokens only: those before the first EOS or stop string, neither counted.

    ``num_context_forwards`` counts the prefill as one and each extension as one; ``num_denoiser_forwards`` (NFE)
    counts denoiser calls. ``num_draft_forwards`` counts those of a draft model (``None`` where there is none), which
    are no forwards of this model. ``num_forced_commits`` counts tokens that the step floor committed although their
    confidence did not exceed the threshold (``None`` where the decoder has no threshold).

    Of an answer that a server gave (``served``), ``token_ids`` are those of its useful text, and no forward is counted.
    """

    prompt_id: str
    token_ids: tuple[Count, ...]
    text: str | None
    finish: FinishReason
    num_prompt_tokens: Count
    num_tokens: Count
    num_discarded_tokens: Count
    num_context_forwards: Count
    num_denoiser_forwards: Count
    num_forced_commits: Count | None = None
    finish_s: NotNegative | None = None
    trace: tuple[CommitStep, ...] | None = None
    num_draft_forwards: Count | None = field(default=None, metadata=LEFT_OUT)
    served: Served | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """Log-likelihood (nats) of a continuation; ``stderr_nats`` only for a Monte-Carlo bound, over ``num_draws``."""

    logprob_nats: LogProbability
    is_greedy: bool
    kind: LikelihoodKind
    stderr_nats: NotNegative | None = None
    num_draws: Size | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRow:
    """One line of ``generations.jsonl``. Key: cell, task, doc_id, request_index, repeat.

    ``prompt_sha256`` is over what was asked: a text, or the messages of a chat, which each model's template writes.
    ``answer`` is what is scored where thinking is left out of it (``None``: the whole text), and the thinking took the
    first ``num_thinking_tokens`` of the useful tokens; ``None`` where no end of it was found.
    """

    cell: str
    task: str
    doc_id: Count
    request_index: Count
    repeat: Count
    prompt_sha256: str
    generation: Generation
    answer: str | None = field(default=None, metadata=LEFT_OUT)
    num_thinking_tokens: Count | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodRow:
    """One line of ``likelihoods.jsonl``. Key: cell, task, doc_id, request_index, repeat.

    ``request`` says which lm-eval request it answers; ``num_tokens`` is the continuation's length, never 0: what has
    no token has no log-likelihood.
    """

    cell: str
    task: str
    doc_id: Count
    request_index: Count
    repeat: Count
    request: Literal["loglikelihood", "loglikelihood_rolling"]
    prompt_sha256: str
    num_tokens: Size
    likelihood: Likelihood


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One line of ``scores.jsonl``: a document's score under one metric and one filter.

    ``arm`` and ``decoder`` are found through the cell. ``value`` is ``None`` only with ``missing_reason``.
    ``scored_by`` names how: ``generation`` or a likelihood kind. ``doc_sha256``, ``prompt_sha256`` and
    ``target_sha256`` must agree between baseline and candidate.

    ``aggregation`` names lm-eval's function over all documents (``None``: rows of versions that did not say). Only
    under ``mean`` has a document a ``value``. Other functions take sums of the documents' ``parts``, or the documents
    themselves: see :class:`Aggregate`.

    ``group`` has its figure from this row among others: the mean over its members, which counts once in an average;
    ``by_size``: weighted by their documents.

    ``chance`` is the document's expected value under uniform guessing among its options, ``None`` where there are none
    to guess among.

    ``main``: metric and filter are those that stand for the task (``None``: rows of versions that did not say).

    ``filtered`` is what the filter made of the first sample's answer, where that is another text: what was scored.
    """

    cell: str
    task: str
    doc_id: Count
    cluster_id: str
    doc_sha256: str
    prompt_sha256: str
    target_sha256: str
    metric: str
    filter: str
    higher_is_better: bool
    headline: bool
    scored_by: str
    value: float | None
    missing_reason: str | None = None
    group: str | None = None
    aggregation: str | None = None
    parts: tuple[float, ...] | None = None
    by_size: bool = False
    chance: Share | None = None
    main: bool | None = None
    filtered: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentText:
    """One line of ``documents.jsonl``: a document's own texts, the same for all cells.

    ``question`` is its part of the prompt, without examples and templates; ``target`` is what the task calls the right
    answer, whose hash is the ``target_sha256`` of its scores: of ``choices``, where it has some, often the place.
    """

    task: str
    doc_id: Count
    question: str
    target: str
    choices: tuple[str, ...] = ()

    @property
    def gold(self) -> str:
        """The right answer as a text: a choice where the target is the place of one."""
        at = int(self.target) if self.target.isdecimal() else -1
        return self.choices[at] if 0 <= at < len(self.choices) else self.target


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One line of ``aggregates.jsonl``: what lm-eval's own function makes of all documents of a task together.

    ``replicates`` are its values over the documents of resampled clusters, kept where reports cannot compute them from
    the documents' ``parts``. The draws depend on the names of the clusters and on ``seed`` alone, so that both arms of
    a run have the same. What is missing, for ``missing_reason``, is ``None``.
    """

    cell: str
    task: str
    metric: str
    filter: str
    aggregation: str
    num_documents: Count
    num_clusters: Count
    seed: Whole
    value: float | None
    replicates: tuple[float, ...] | None
    missing_reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTiming:
    """Counts of one prompt within one timed call; ``finish_s`` is from the call's start to its last useful id.

    Where an arm of the run is behind a server, ``num_recounted`` are the useful tokens of the answer's text by the one
    tokenizer that counts those of both arms. ``served`` says how a server gave the answer. ``num_lookup_passes`` are
    the passes in which a prompt lookup finds the answer, which depend on prompt and answer alone; None where every
    token takes a forward of its own, and for denoisers.
    """

    prompt_id: str
    num_prompt_tokens: Count
    num_tokens: Count
    num_discarded_tokens: Count
    num_context_forwards: Count
    num_denoiser_forwards: Count
    num_forced_commits: Count | None
    finish: FinishReason
    finish_s: float
    tokens_sha256: str
    num_draft_forwards: Count | None = field(default=None, metadata=LEFT_OUT)
    num_recounted: Count | None = field(default=None, metadata=LEFT_OUT)
    served: Served | None = field(default=None, metadata=LEFT_OUT)
    num_lookup_passes: Count | None = field(default=None, metadata=LEFT_OUT)

    @property
    def num_useful(self) -> int:
        """Useful tokens as both arms count them."""
        return self.num_tokens if self.num_recounted is None else self.num_recounted


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """``num`` calls of a model of one kind and size: so many rows, each ``tokens`` wide, padding included."""

    kind: PassKind
    rows: Size
    tokens: Count
    num: Size

    def part(self, decoder: DecoderSpec) -> tuple[CostPart, Size | None]:
        """The part of decoding that they are timed as, with its block size.

        An autoregressive step chooses a token besides; other extensions of the context choose none.
        """
        if self.kind == "prefill":
            return "prefill", None
        if self.kind == "denoise":
            return "denoise", self.tokens
        is_step = self.tokens == 1 and decoder.kind in ("autoregressive", STATIC_CACHE)
        return ("ar_step", None) if is_step else ("context_pass", self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedSample:
    """One timed call: one ``generate`` on one batch, prompt ids on host to last useful id on host.

    Calls of the phase ``probe`` are on prompts that nothing had read before, or had once: they are no part of a
    speedup. Those that are ``held_out`` are on documents as they are, the others on made-up prompts. ``fault`` says
    what is wrong with the times, which may then be any number; those that show it themselves need not have it
    (``times.fault_of``).
    ``passes`` are the model calls that the harness counted, those over whole rows (``context_logits``) as prefills.
    ``cpu_s`` are the seconds that all threads of the process and its child processes were busy, ``caller_cpu_s``
    those of the thread that called the decoder; both from the call's start to its end, ``off_clock_s`` included: the
    time for texts, which is no part of ``wall_s``. Older runs have none of these. ``energy_j`` are the joules that the
    cell's GPUs drew meanwhile by their own counters, which tick some ten times a second: short calls tell it together.

    Of a request in a stream to a server, ``due_s`` is when it was to be sent, from the stream's start, and ``late_s``
    how much later it was. All its times are from the moment when it was due.
    """

    call_id: str
    launch_id: str
    cell: str
    replica: Replica  # 0, or 1 for the second copy of the baseline in the A/A null
    round: Count
    phase: SpeedPhase
    batch_size: Size
    wall_s: float
    prefill_s: float | None
    first_output_s: float | None
    peak_memory_bytes: Count | None
    peak_memory_reason: str | None
    started_at: str
    prompts: tuple[PromptTiming, ...]
    passes: tuple[Passes, ...] = ()
    cpu_s: NotNegative | None = None
    caller_cpu_s: NotNegative | None = None
    off_clock_s: NotNegative | None = None
    fault: TimeFault | None = None
    held_out: bool = False
    energy_j: NotNegative | None = field(default=None, metadata=LEFT_OUT)
    due_s: NotNegative | None = field(default=None, metadata=LEFT_OUT)
    late_s: NotNegative | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class WitnessedAnswer:
    """The useful tokens of one answer of a witnessed call."""

    prompt_id: str
    token_ids: tuple[Count, ...]


@dataclass(frozen=True, kw_only=True)
class Witnessed:
    """One line of ``witness.jsonl``: a call that was not timed, in which every row of logits was looked at.

    ``kind`` says what its prompt is: one that is ``timed``, a document that is not timed, a made-up one, or one that a
    run has scored. Of the first ``num_tokens`` of its answer ``num_witnessed`` were among the likeliest of a row of
    logits that the model computed in this very call, a row for each; ``num_drafted`` fewer were, where that row has to
    be there before its token is given to the model. A scored one has no launch (empty), and round 0; a warm-up's has
    round 0. Older runs have calls of several prompts as well, with figures of all of them.
    """

    cell: str
    launch_id: str
    round: Count
    call_id: str
    kind: WitnessedKind
    answers: tuple[WitnessedAnswer, ...]
    num_rows: Count
    num_tokens: Count
    num_witnessed: Count
    num_drafted: Count


@dataclass(frozen=True, kw_only=True)
class CostSample:
    """One line of ``costs.jsonl``: one part of decoding timed by itself, ``num_repeats`` times in a row.

    ``prefill`` reads ``context_tokens`` per row, ``ar_step`` makes one token and extends by it, ``bookkeeping`` is what
    the autoregressive loop does beside such a step (which rows end, which go on), ``denoise`` is one denoiser call on
    a block, ``context_pass`` extends by a finished block; ``block_size`` is ``None`` for the first three.
    ``batch_size`` rows are passed at a time, which may be fewer than the cell's batch has. ``wall_s`` is for all
    repeats together. What is not above 0 is no time, and left out of every figure.

    What follows ``started_at`` belongs to random weights and is ``None`` otherwise: ``routing`` that was forced,
    distinct ``num_experts_touched`` per layer and step (mean over layers), the ``pattern`` of the layers that each
    tower had, and the ``num_steps`` of ``forced_block``: one whole block, its commits forced into so many denoiser
    calls, then its context pass.
    """

    cell: str
    launch_id: str
    round: Count
    phase: SpeedPhase
    part: CostPart
    replica: Replica  # as in SpeedSample
    batch_size: Size
    context_tokens: Count
    block_size: Size | None
    num_repeats: Size
    wall_s: float
    started_at: str
    routing: str | None = None
    num_experts_touched: NotNegative | None = None
    pattern: str | None = None
    num_steps: Size | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineBest:
    """What shows whether a baseline cell is at its best; the ``baseline_best`` event of a launch holds it.

    ``engine``: the project's own, or transformers. ``step_bytes`` are the least that one autoregressive step of the
    whole batch reads, ``bytes_per_s`` what a copy reaches on the device, each ``None`` where it is not known. A few
    prompts were decoded by the baseline in ``own_s`` seconds and, to as many tokens, by transformers' own ``generate``
    in ``generate_s``, in turn; ``same_tokens``: they gave the same. Why they were not: ``reason``.
    """

    cell: str
    engine: Literal["own", "transformers"]
    cuda_graphs: bool
    attention: str | None
    num_threads: Size | None
    step_bytes: NotNegative | None
    bytes_per_s: NotNegative | None
    own_s: tuple[NotNegative, ...] = ()
    generate_s: tuple[NotNegative, ...] = ()
    same_tokens: bool | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of ``checks.jsonl``: one check that ``verify`` made before anything is measured.

    ``value`` is what was measured and ``limit`` what it is held against, each ``None`` where there is no number.
    ``not_checked`` carries its reason in ``detail``.
    """

    cell: str
    name: str
    outcome: CheckOutcome
    detail: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Override:
    """Something that a task or its suite asks for and that does not hold, because an option of the plan says so.

    ``setting`` is the task's own key; ``asked`` its value, as JSON text where it is a list or a table. ``done`` is what
    holds instead, ``None`` where nothing of the kind is done; ``asked`` itself where the option does not count, as with
    a task that sets 0 examples. ``published``: the suite says that ``asked`` was published.
    """

    task: str
    setting: str
    asked: Scalar
    done: Scalar
    option: Literal["temperature", "samples", "num_fewshot", "gen_kwargs"]
    published: bool | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class FailedTrial:
    """One way of running a model that was tried on ``num_tokens`` of context and did not give what whole rows give.

    ``difference`` is the largest one of logits, in units of their spread (``None`` where none could be had: then
    ``error`` says why), ``limit`` what it is held against. ``positions_passed`` and ``rows_together`` are the way's,
    ``precision`` is that of the trial.
    """

    check: ProofCheck
    num_tokens: Whole
    difference: float | None
    limit: float
    error: str | None = None
    positions_passed: bool = False
    rows_together: bool = True
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How a Hugging Face model is run, proved against passes over whole rows, alone and without a cache.

    ``checkpoint`` is its identity. ``cached``: steps read one token each. ``rows_together``: prompts of a batch run
    beside each other, else one prompt after the other; ``unlike_lengths_together``: also where their lengths differ.
    ``passes_together``: so do whole rows that are scored.
    ``options_packed``: the options of a question are read in one row. ``positions_passed``: token positions are named
    where the model would count them wrongly. Contexts longer than ``plain_beyond`` are read whole, alone and without
    a cache; ``resets_first``: behind a short row that undoes what the last long one left in the model. No more than
    ``proved_tokens`` of context were tried, in ``precision`` (``None``: not recorded); in half precision faults hide
    behind rounding, and no fast way is taken. ``short_of_memory_at``: the length whose trial did not fit into memory.
    """

    checkpoint: str = ""
    cached: bool = True
    rows_together: bool = True
    unlike_lengths_together: bool = True
    passes_together: bool = True
    options_packed: bool = False
    positions_passed: bool = False
    plain_beyond: Whole | None = None
    resets_first: bool = False
    proved_tokens: Whole = 0
    precision: str | None = None
    short_of_memory_at: Whole | None = None
    failed: tuple[FailedTrial, ...] = ()


ChosenSetting = Literal["device", "dtype", "decoder", "batch_size", "likelihood"]
ChosenReason = Literal[
    "first there is",
    "no accelerator",
    "needs float64",
    "as stored",
    "slow on CPUs",
    "not computed in",
    "not stated",
    "no denoiser",
    "of the family",
    "no causal tower",
    "usual",
    "fits",
]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What ``auto`` became for one setting of a run, and why; what was named by the user has no entry.

    ``arm`` is ``None`` where it holds for both, ``name`` that of one of several baselines. ``stored`` is the dtype that
    the checkpoint is stored in.
    """

    setting: ChosenSetting
    value: str
    reason: ChosenReason
    arm: Arm | None = None
    stored: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """First file of a run, written once. ``plan`` is the resolved plan as JSON; ``packages`` name -> version.

    ``tasks`` are those whose answers are scored: name -> part (settings, documents, files by name) -> sha256.
    ``ways`` has one entry for each Hugging Face model. ``unheeded``: by checkpoint what its generation settings ask of
    greedy decoding and is not done. ``joined``: by task how many documents are nearly the same as others, which no
    cluster id of the task's own says, and share their clusters. ``omp_wait_policy`` is the variable that says whether
    idle threads of torch sleep (``PASSIVE``) or spin; ``None`` where it was not set, and in older runs. ``chosen``:
    what ``auto`` became; the plan holds it as well. ``chats`` has one entry for each arm whose tokenizer has a chat
    template; ``None``: no arm's has.
    """

    schema: Whole
    run_id: str
    verb: Verb
    argv: tuple[str, ...]
    plan: Mapping[str, Any]
    plan_sha256: str
    cells: tuple[Cell, ...]
    started_at: str
    project_version: str
    commit: str | None
    dirty: bool | None
    packages: Mapping[str, str]
    machine: Mapping[str, Any]
    seeds: Mapping[str, Whole]
    notes: tuple[str, ...] = ()
    tasks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    unheeded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    joined: Mapping[str, Whole] = field(default_factory=dict)
    ways: tuple[Ways, ...] = ()
    omp_wait_policy: str | None = None
    chosen: tuple[Chosen, ...] = ()
    chats: tuple[ChatUse, ...] | None = field(default=None, metadata=LEFT_OUT)


def sizing_config(verb: str, plan: Mapping[str, object]) -> str | None:
    """The config whose size a plan is to measure without weights, as it was named; ``None`` for every other plan.

    The one place that tells these apart, also from before they had the verb ``size``: then ``speed`` made them, and
    ``random_weights`` named the config.
    """
    if verb == "size":
        return str(plan.get("config", ""))
    return str(plan["random_weights"]) if "random_weights" in plan else None


def verb_of(manifest: RunManifest) -> Verb:
    """The verb that makes such a run today."""
    return manifest.verb if sizing_config(manifest.verb, manifest.plan) is None else "size"


@dataclass(frozen=True, kw_only=True)
class SerialDependence:
    """How much timed rounds depend on their neighbours, and what the interval of their figure makes of it.

    ``lag1`` is the correlation of the logs of neighbouring rounds' ratios within launches, ``lag1_bound`` the largest
    that it may well be, which the interval reckons with; ``None`` where launches are too short to tell. The rounds say
    as much as ``effective_rounds`` independent ones. ``widening`` is the factor on the standard error of independent
    rounds, by the variance of means of ``block`` rounds on end. Where ``launches`` are what is resampled,
    ``effective_rounds`` is their number, and ``widening`` is the factor on the standard error of independent launches,
    at the level of the interval: above 1 where rounds wander as if one launch went on into the next.
    """

    lag1: float | None
    lag1_bound: float | None
    effective_rounds: float
    block: int = 1
    widening: float = 1.0
    launches: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """How an interval or a test was computed. The words for it are made where it is shown.

    ``num_resamples`` were drawn. ``function`` is what was computed on all documents together, ``jackknife`` whether the
    bootstrap was widened to it. ``num_tasks`` is given for a mean over so many tasks. Of the estimate's clusters
    ``num_differing`` differ between the arms, and ``num_scoring`` are those in which the candidate scores at all, where
    these are so few that an exact bound widens the interval. ``widened``: some other exact bound does. ``drawn`` says
    what a speedup's bootstrap drew, ``num_drawn`` of them, crossed with ``num_calls`` where prompts are a sample;
    ``moved_out``: for calls that were not timed. ``devices`` of baseline and candidate scaled it. ``least_of``: the
    least over so many baselines.
    """

    kind: MethodKind
    num_resamples: Count | None = None
    function: str | None = None
    jackknife: bool = False
    num_tasks: Count | None = None
    num_differing: Count | None = None
    num_scoring: Count | None = None
    widened: bool = False
    drawn: Literal["rounds", "launches"] | None = None
    num_drawn: Count | None = None
    num_calls: Count | None = None
    moved_out: bool = False
    devices: tuple[Count, Count] | None = None
    least_of: Count | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its two-sided interval at ``level``, its sample size and how it was obtained.

    ``method`` is a text where the estimate was not made by this package. ``serial`` is there where it rests on timed
    rounds.
    """

    value: float
    low: float
    high: float
    level: float
    n: int
    method: Method | str
    seed: int | None = None
    serial: SerialDependence | None = None

    @property
    def method_kind(self) -> MethodKind | None:
        """``None`` where the estimate was not made by this package."""
        return self.method.kind if isinstance(self.method, Method) else None

    def __str__(self) -> str:
        """``0.9895 [0.9821, 0.9964] at 95 %``; ``repr`` shows every field."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] at {100 * self.level:g} %"


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Where a claim holds: one full decoder setting and, for speed, how it was timed.

    A decoder parameter that is not named has to be off (0, false, absent) in what is measured. ``dtype`` and
    ``hardware`` (part of a device's name, such as ``H100``) are ``None`` where the claim leaves them open.
    ``timed_tasks`` are those whose prompts are timed, of a group its members; without them a speed beside a quality is
    of all tasks that the quality is over and that are generated. ``requests`` and ``request_rate`` are as in Workload,
    of arms behind servers, whose devices nobody counts.
    """

    name: str
    decoder: DecoderSpec
    batch_size: Size | None = None
    num_devices: Size | None = None
    workload: Literal["fixed", "answer"] | None = None
    dtype: str | None = None
    hardware: str | None = None
    timed_tasks: tuple[str, ...] = ()
    requests: RequestKind | None = field(default=None, metadata=LEFT_OUT)
    request_rate: Positive | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What has to hold before a claim can be SUPPORTED; the A/A null's limits are on the log scale.

    ``degenerate_share``: how far the candidate's share of degenerate outputs may lie above the baseline's.
    ``min_retention``: floor under which outputs are no answers, whatever their speed. Outside ``min_length_ratio`` to
    ``max_length_ratio`` neither reading of a speedup suffices alone. ``above_chance_level``: how sure it has to be that
    a task's baseline does better than guessing, for all tasks of the claim together.

    ``differing_answers``: the share of prompts whose timed answers may differ from the scored ones, or from round to
    round, at temperature 0; ``differing_answers_half`` holds in half precision, where rounding parts one answer in some
    dozen as soon as batches differ, and there ``score_effect`` is how far that may move the mean score. Equal answers
    may take no less than ``least_work`` of their passes when timed. Above ``warn_retention`` of the baseline's score a
    verdict warns of a baseline that may be broken.

    ``residual``: share of an arm's time by which it may be off what its timed parts predict. ``own_generate``: how much
    longer than transformers' own ``generate`` a Hugging Face baseline may take, as a share of that.

    On a CPU an arm may not be busy for less than ``busy_share`` of the share of its time that the other is, and not
    take more than ``processors_per_thread`` of the CPU threads that the plan gives it.

    ``void_share``: of timings, those left out for impossible times. ``seen_gain``: how many times as fast
    either arm may be on prompts that it has seen. ``witnessed_share``: of the tokens of witnessed answers, those that
    have to come from logits of their own call.
    """

    null_offset: float = 0.02
    null_half_width: float = 0.03
    null_share: float = 0.25
    degenerate_share: float = 0.05
    min_retention: float = 0.5
    min_length_ratio: float = 0.9
    max_length_ratio: float = 1.1
    above_chance_level: float = 0.95
    differing_answers: float = 0.0
    differing_answers_half: float = 0.2
    score_effect: float = 0.02
    least_work: float = 0.5
    warn_retention: float = 1.1
    residual: float = 0.25
    own_generate: float = 0.25
    busy_share: float = 0.75
    processors_per_thread: float = 1.5
    void_share: float = 0.05
    seen_gain: float = 1.25
    witnessed_share: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim written down before measuring.

    ``subject`` and ``baseline`` name checkpoints (or begin their digests; ``context-tower`` is the subject's own). A
    ``baseline`` may also be the name of a decoder or, among several, a baseline's own; empty, it is any.
    ``scope`` names the tasks of a quality claim. ``expected`` is a fraction of 1, or a factor for speedups;
    ``margin`` is in the same unit, for speedups a share of ``expected``. A ``joint`` claim has ``parts``, the names
    of other claims at the same point, and neither ``expected`` nor ``margin``.

    ``metric`` names the score of a single task in scope that a ``score`` or ``score_difference`` is about, as lm-eval
    writes it (``metric`` or ``metric,filter``); ``None``: the one that stands for the task. Of scores outside
    retention ``expected`` and ``margin`` are in the metric's own unit.

    ``looks`` says beforehand how many runs shall be looked at, each of which is then judged more strictly.
    """

    name: str
    quantity: Quantity
    subject: str
    baseline: str
    point: OperatingPoint
    source: str
    scope: tuple[str, ...] = ()
    averaging: Averaging = "ratio_of_means"
    relation: Relation = "at_least"
    expected: float | None = None
    margin: float | None = None
    parts: tuple[str, ...] = ()
    limits: GateLimits = field(default_factory=GateLimits)
    metric: str | None = None
    looks: Size = 1


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One finding, as fields. Every kind is a record of its own; the words for it are made where it is shown."""

    @property
    def alike(self) -> tuple[object, ...]:
        """What two of one kind must share to be shown as one: everything but numbers and places."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a reader of a figure has to know. ``invalid``: it must not be read as what it seems to be; ``note``: some of
    what was measured is left out of it.
    """

    kind: FindingKind
    severity: Severity
    facts: Fact


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition that must hold before the evidence counts; ``facts`` say what was found, or why nothing."""

    kind: GateKind
    outcome: CheckOutcome
    facts: Fact
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgainstBaseline:
    """Which baseline a verdict is against, of how many in its runs; ``decoder`` is its label.

    ``strongest`` is another one with more useful tokens per second, and ``speedup`` the one over that.
    """

    name: str
    decoder: str
    num_baselines: Size = 1
    strongest: str | None = None
    speedup: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class UnlikeSetting:
    """A setting of how models are run that differs between the arms."""

    setting: Literal["dtype", "device", "weights"]
    baseline: str
    candidate: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the evidence says about a claim, and which runs it rests on.

    ``estimate`` has at either end a one-sided bound at ``level``. ``num_points`` operating points of the subject
    were measured in the runs looked at, and the claim's own ``num_looks`` times. ``near_chance`` names the tasks of a
    retention whose baseline is not clearly above guessing, and ``above_chance`` is the estimate without them.
    ``metric``, where it is given, is the score outside retention that was judged, in whose own unit the estimate is.
    ``level`` is the one-sided level that it was judged at, which ``num_looks`` decide: runs towards the claim,
    ``not_given`` among them, which lie beside those that were.
    ``num_launches`` are those that a speedup was timed in. With too few of them to see how they differ, what is decided
    holds in them alone: ``scope`` says so. ``high_retention`` is a share of the baseline's score so far above 1 that
    the baseline may be broken. ``against`` is the baseline, where it is one of several or no plain one.
    ``unlike_arms``: what the arms differ in besides model and decoder.
    """

    claim: str
    outcome: Outcome
    estimate: Estimate | None
    reason: str
    evidence: tuple[str, ...]
    gates: tuple[Gate, ...] = ()
    num_points: int = 0
    num_looks: int = 0
    near_chance: tuple[str, ...] = ()
    above_chance: Estimate | None = None
    metric: str | None = None
    num_launches: Count | None = None
    scope: VerdictScope | None = None
    level: float = 0.95
    not_given: tuple[str, ...] = ()
    high_retention: float | None = None
    against: AgainstBaseline | None = field(default=None, metadata=LEFT_OUT)
    unlike_arms: tuple[UnlikeSetting, ...] = ()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of the UTF-8 bytes of ``text``. Half a surrogate pair, which web text may hold and strict UTF-8
    refuses, is hashed as lm-eval's own logs do."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def derive_seed(*parts: object) -> int:
    """63 bits that depend on all parts and nothing else, so that no answer depends on its batch or on a resume."""
    return int(sha256_text(canonical_json(list(parts)))[:16], 16) >> 1


def document_prompt_id(task: str, doc_id: int) -> str:
    """The id of the prompt made from one document: ``sorting/3``."""
    return f"{task}/{doc_id}"


def document_of(prompt_id: str) -> tuple[str, int] | None:
    """Task and document of a :func:`document_prompt_id`; ``None`` of any other id.

    >>> document_of("sorting/3"), document_of("text-9f86d0")
    (('sorting', 3), None)
    """
    task, _, number = prompt_id.rpartition("/")
    return (task, int(number)) if task and number.isdecimal() else None


def scored_prompt_id(task: str, doc_id: int, request_index: int, repeat: int) -> str:
    """The id of a prompt that lm-eval asks for: ``sorting/3/0/0``, its document, its request and its sample."""
    return f"{document_prompt_id(task, doc_id)}/{request_index}/{repeat}"


def scored_document_of(prompt_id: str) -> tuple[str, int] | None:
    """Task and document of a :func:`scored_prompt_id`; ``None`` of any other id."""
    task, *numbers = prompt_id.rsplit("/", 3)
    return (task, int(numbers[0])) if len(numbers) == 3 and all(map(str.isdecimal, numbers)) else None


def run_id_of(time: str, verb: str, digits: str) -> str:
    """``20261123T101500Z-run-3f9a1c``: time in UTC, verb, random hex digits."""
    return f"{time}-{verb}-{digits}"


def time_and_verb(run_id: str) -> tuple[str, str]:
    """The first two parts of a :func:`run_id_of`; the verb is empty where an id has none."""
    time, _, rest = run_id.partition("-")
    return time, rest.partition("-")[0]


def launch_id_of(run_id: str, number: int) -> str:
    """The id of a run's launch: ``20261123T101500Z-speed-3f9a1c/2``."""
    return f"{run_id}/{number}"


def run_and_launch(launch_id: str) -> tuple[str, str]:
    """The run's id and the launch's number in a :func:`launch_id_of`; the whole of an id that has no number."""
    run_id, slash, number = launch_id.rpartition("/")
    return (run_id, number) if slash else (launch_id, "")


def draws(cell: Cell) -> bool:
    """Whether a decoder samples its tokens, so that two answers to one prompt may differ."""
    return draws_at_random(cell.decoder)


def draws_at_random(decoder: DecoderSpec) -> bool:
    """The same of a decoder. A plug-in's word for it counts for nothing: answers that differ have to be explained."""
    temperature = decoder.params.get("temperature")
    is_drawn = bool(decoder.sampled) and not decoder.is_plug_in
    return is_drawn or (isinstance(temperature, (int, float)) and temperature > 0)


def make_cell(
    arm: Arm,
    checkpoint: Checkpoint,
    decoder: DecoderSpec,
    workload: Workload,
    extra: Params | None = None,
    baseline: str | None = None,
) -> Cell:
    """A cell with the id that follows from all else but the baseline's name."""
    identity = cell_id(checkpoint, decoder, workload, extra)
    return Cell(
        id=identity,
        arm=arm,
        checkpoint=checkpoint,
        decoder=decoder,
        workload=workload,
        extra=extra or {},
        baseline=baseline,
    )


def cell_id(checkpoint: Checkpoint, decoder: DecoderSpec, workload: Workload, extra: Params | None = None) -> str:
    """First 12 hex digits of a hash over everything that may change a cell's outputs, and nothing else.

    Device type counts (numerics), device index does not; batch size counts only for timed workloads.
    ``extra`` holds whatever else a verb lets change outputs (seed, likelihood kind).
    """
    return digest_of_identity(cell_identity(checkpoint, decoder, workload), extra)


def cell_identity(checkpoint: Checkpoint, decoder: DecoderSpec, workload: Workload) -> dict[str, object]:
    """What :func:`cell_id` hashes, without ``extra``."""
    attention = [] if checkpoint.attention is None else [checkpoint.attention]
    device = checkpoint.devices[0].split(":")[0]
    return {
        "checkpoint": [checkpoint.identity, checkpoint.tower, checkpoint.dtype, device, *attention],
        "decoder": to_json(decoder),
        "workload": to_json(workload),
    }


def digest_of_identity(identity: Mapping[str, object], extra: Params | None) -> str:
    """The id of a cell of this :func:`cell_identity`."""
    return sha256_text(canonical_json({**identity, "extra": dict(extra or {})}))[:12]


def to_json(record: object) -> dict[str, object]:
    """A record as a plain JSON object, field order kept."""
    return typing.cast(dict[str, object], _plain(record))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if not f.metadata or getattr(value, f.name) is not None]
        return {f.name: _plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
