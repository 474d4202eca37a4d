"""A plan: what is to be run or timed, from TOML and the command line, checked before anything is loaded.

Nothing here imports torch; :func:`cross_decoders` asks a decoder for its own parameters only when called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from twotower_eval.decoder_settings import SHORT_NAMES, SHORTHANDS, check_given_once, one_value_each, settings_from
from twotower_eval.decoder_settings import cross_decoders as cross_decoders
from twotower_eval.errors import UserError
from twotower_eval.plan_baselines import CONTEXT_TOWER as CONTEXT_TOWER
from twotower_eval.plan_baselines import OfTwoArms, check_endpoints, hold_baselines
from twotower_eval.plan_baselines import baseline_name as baseline_name
from twotower_eval.plan_baselines import each_baseline as each_baseline
from twotower_eval.plan_baselines import named_baselines as named_baselines
from twotower_eval.plan_chat import hold_chat
from twotower_eval.plan_fields import (
    AllSteps,
    ApplyChatTemplate,
    Arrivals,
    AttentionKind,
    Baseline,
    BaselineAttentionKind,
    BaselineDecoder,
    BaselineDevice,
    BaselineFamily,
    BaselineNumberType,
    BaselineRevision,
    Baselines,
    BaselineSet,
    BaselineTrustRemoteCode,
    BlockSizes,
    ChatTemplateArgs,
    CountingTokenizer,
    CudaGraphs,
    DataDir,
    DecoderKind,
    Devices,
    EnableThinking,
    Family,
    FewshotAsMultiturn,
    Further,
    GenPrefix,
    GivenGenKwargs,
    IncludePath,
    MinSeconds,
    Model,
    NumberType,
    NumFewshot,
    Option,
    RequestRates,
    RequestTimeout,
    Revision,
    Seed,
    SizeNumberType,
    SystemInstruction,
    Tasks,
    TaskSeed,
    Temperature,
    ThinkEndToken,
    Threads,
    Thresholds,
    TrustRemoteCode,
    WarmupRounds,
    check_at_least,
    check_devices,
    check_fields,
    drop_refusals,
)
from twotower_eval.plan_speed import OfSpeed, check_speed
from twotower_eval.records import AUTO, LEFT_OUT, LikelihoodKind
from twotower_eval.task_options import read_gen_kwargs, read_seed, read_template_args


@dataclass(frozen=True, kw_only=True)
class VerifyPlan:
    """The plan of ``twotower-eval verify``; ``golden`` is a folder of reference outputs, ``draft`` a model that drafts
    for this one."""

    model: Annotated[
        str | None,
        Option(
            help="Checkpoint folder, or org/name[@revision] of the hub",
            metavar="[CKPT]",
            unset="the shipped miniature",
            argument=True,
        ),
    ] = None
    revision: Revision = field(default=None, metadata=LEFT_OUT)
    trust_remote_code: TrustRemoteCode = field(default=None, metadata=LEFT_OUT)
    family: Family = field(default=None, metadata=LEFT_OUT)
    golden: Annotated[str | None, Option(help="Folder of reference outputs and their checkpoint", metavar="DIR")] = None
    draft: Annotated[
        str | None, Option(help="Draft model: how many tokens a verified pass gives with it", metavar="CKPT")
    ] = field(default=None, metadata=LEFT_OUT)
    seed: Seed = 0
    dtype: NumberType = AUTO
    devices: Devices = (AUTO,)
    attention: AttentionKind = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        check_fields(self)
        drop_refusals(self)
        check_devices(self)
        check_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class RunPlan(OfTwoArms):
    """What ``twotower-eval run`` does.

    ``model`` is a checkpoint folder, ``None`` the shipped miniature. ``baseline`` is a checkpoint folder, a Hugging
    Face model folder, ``miniature``, or ``context-tower``: the context tower of ``model`` decoded autoregressively.
    ``family`` reads the model and ``baseline_family`` a baseline's folder, by default what their config.json says.
    ``baseline_decoder`` decodes the baseline, by default one token at a time; ``baseline_set`` gives one value to any
    of its parameters.
    ``baselines`` are several, each a table of a ``model``, whatever else ``baseline_…`` says of one, and a ``name``.
    Block sizes, steps, thresholds and then the parameters of ``set`` are crossed; steps ``auto`` means the block size.
    Those that are ``None`` are the decoder's own defaults.
    ``set`` reaches any parameter of the decoder, in TOML as a table: ``set = { width = [4, 8] }``. ``temperature``,
    ``samples`` per problem and ``max_new_tokens`` are what suite and task say unless given; so are ``num_fewshot`` and
    ``gen_kwargs``, which mean what they do in lm-eval. ``include_path`` are folders of tasks. ``seed`` is one number
    or lm-eval's list of python's, numpy's, torch's and that of few-shot examples. ``limit`` is documents per task, of
    which ``trace`` have their denoising journalled. ``log_samples`` keeps the documents' texts. ``cuda_graphs``
    launches small steps as a whole.

    ``decoder``, ``dtype``, ``devices`` and ``batch_size`` may be ``auto``: what that becomes depends on checkpoints and
    machine, and a run's own plan says what it became. ``baseline_dtype`` and ``baseline_device`` are for the baseline
    alone, by default as for the candidate. ``apply_chat_template`` and what follows say how prompts
    are asked and where answers begin, as in lm-eval: see ChatOptions.
    """

    model: Model = None
    revision: Revision = field(default=None, metadata=LEFT_OUT)
    trust_remote_code: TrustRemoteCode = field(default=None, metadata=LEFT_OUT)
    family: Family = field(default=None, metadata=LEFT_OUT)
    baseline: Baseline = CONTEXT_TOWER
    baseline_revision: BaselineRevision = field(default=None, metadata=LEFT_OUT)
    baseline_trust_remote_code: BaselineTrustRemoteCode = field(default=None, metadata=LEFT_OUT)
    baseline_family: BaselineFamily = field(default=None, metadata=LEFT_OUT)
    baseline_decoder: BaselineDecoder = field(default=None, metadata=LEFT_OUT)
    baseline_set: BaselineSet = field(default=None, metadata=LEFT_OUT)
    baselines: Baselines = field(default=None, metadata=LEFT_OUT)
    tasks: Tasks = ("miniature",)
    include_path: IncludePath = field(default=None, metadata=LEFT_OUT)
    num_fewshot: NumFewshot = field(default=None, metadata=LEFT_OUT)
    gen_kwargs: GivenGenKwargs = field(default=None, metadata=LEFT_OUT)
    decoder: DecoderKind = AUTO
    block_sizes: BlockSizes = None
    steps: AllSteps = None
    thresholds: Thresholds = None
    temperature: Temperature = None
    set: Further = field(default=None, metadata=LEFT_OUT)
    samples: Annotated[int | None, Option(help="Samples per problem", metavar="N", unset="as the tasks ask")] = None
    batch_size: Annotated[
        int | Literal["auto"],
        Option(
            help="Prompts per batch, of an endpoint concurrent requests; scores do not depend on it; auto: as many as "
            "fit on a GPU, else 8",
            metavar="N",
            other_names=("concurrency",),
        ),
    ] = 8
    limit: Annotated[int | None, Option(help="First N documents of each task only", metavar="N")] = None
    max_new_tokens: Annotated[
        int | None, Option(help="Token budget per answer", metavar="N", unset="the task's own")
    ] = None
    trace: Annotated[
        int, Option(help="Documents per task whose denoising steps are recorded for the report", metavar="N")
    ] = 2
    log_samples: Annotated[
        bool, Option(help="Keep questions and targets for reports, and lm-eval's samples_*.jsonl with every prompt")
    ] = True
    likelihood: Annotated[LikelihoodKind, Option(help="{choices}", metavar="KIND")] = "context_tower"
    seed: TaskSeed = 0
    dtype: NumberType = AUTO
    baseline_dtype: BaselineNumberType = field(default=None, metadata=LEFT_OUT)
    devices: Devices = (AUTO,)
    baseline_device: BaselineDevice = field(default=None, metadata=LEFT_OUT)
    attention: AttentionKind = field(default=None, metadata=LEFT_OUT)
    baseline_attention: BaselineAttentionKind = field(default=None, metadata=LEFT_OUT)
    cuda_graphs: CudaGraphs = False
    data_dir: DataDir = None
    apply_chat_template: ApplyChatTemplate = field(default=None, metadata=LEFT_OUT)
    system_instruction: SystemInstruction = field(default=None, metadata=LEFT_OUT)
    fewshot_as_multiturn: FewshotAsMultiturn = field(default=None, metadata=LEFT_OUT)
    gen_prefix: GenPrefix = field(default=None, metadata=LEFT_OUT)
    enable_thinking: EnableThinking = field(default=None, metadata=LEFT_OUT)
    think_end_token: ThinkEndToken = field(default=None, metadata=LEFT_OUT)
    chat_template_args: ChatTemplateArgs = field(default=None, metadata=LEFT_OUT)
    tokenizer: CountingTokenizer = field(default=None, metadata=LEFT_OUT)
    request_timeout: RequestTimeout = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        _hold_settings(self)
        hold_baselines(self)
        check_fields(self)
        check_devices(self)
        _check_arms(self)
        hold_chat(self)
        check_at_least(self, 1, "samples", "batch_size", "limit", "max_new_tokens")
        check_at_least(self, 0, "trace")


@dataclass(frozen=True, kw_only=True)
class SpeedPlan(OfSpeed):
    """What ``twotower-eval speed`` does; models, families, decoder options and graphs mean what they do in RunPlan.

    ``fixed`` workloads make exactly ``new_tokens`` tokens whatever the model says; ``answer`` workloads stop where
    the task stops, at ``new_tokens`` at the latest, or at the task's own budget where it is ``None``.
    ``num_prompts`` are spread over the lengths of all prompts of each task. ``None`` takes enough for a claim, or as
    many as there are; a number is held to.
    ``prompt_tokens`` cuts or repeats prompts to that length in tokens (``fixed`` only). Each round times one sample, so
    ``samples`` can only be 1: said where a task asks for several. Rounds go on until both
    ``min_rounds`` and ``min_seconds`` are reached. ``costs`` times the parts of decoding alone in the same rounds,
    ``probes`` are prompts per cell and round that nothing has read before: what remembers is slower on them.
    ``request_rates`` send requests to servers at so many a second, whatever these do, each rate a cell of its own, at
    the moments of ``arrivals``. Without them servers are kept at ``batch_sizes`` requests in flight.
    ``launches`` are separate processes, one after the other: each takes its part of ``min_rounds`` and of
    ``min_seconds``. Of two to four each makes at least 5 rounds, of more at least 4.
    """

    model: Model = None
    revision: Revision = field(default=None, metadata=LEFT_OUT)
    trust_remote_code: TrustRemoteCode = field(default=None, metadata=LEFT_OUT)
    family: Family = field(default=None, metadata=LEFT_OUT)
    baseline: Baseline = CONTEXT_TOWER
    baseline_revision: BaselineRevision = field(default=None, metadata=LEFT_OUT)
    baseline_trust_remote_code: BaselineTrustRemoteCode = field(default=None, metadata=LEFT_OUT)
    baseline_family: BaselineFamily = field(default=None, metadata=LEFT_OUT)
    baseline_decoder: BaselineDecoder = field(default=None, metadata=LEFT_OUT)
    baseline_set: BaselineSet = field(default=None, metadata=LEFT_OUT)
    baselines: Baselines = field(default=None, metadata=LEFT_OUT)
    tasks: Tasks = ("miniature",)
    include_path: IncludePath = field(default=None, metadata=LEFT_OUT)
    num_fewshot: NumFewshot = field(default=None, metadata=LEFT_OUT)
    gen_kwargs: GivenGenKwargs = field(default=None, metadata=LEFT_OUT)
    decoder: DecoderKind = AUTO
    block_sizes: BlockSizes = None
    steps: AllSteps = None
    thresholds: Thresholds = None
    temperature: Temperature = None
    set: Further = field(default=None, metadata=LEFT_OUT)
    samples: Annotated[
        int | None,
        Option(help="Can only be 1: each round times one sample, even if a task asks for several", metavar="1"),
    ] = None
    batch_sizes: Annotated[
        tuple[int, ...],
        Option(
            help="Prompts per timed call, crossed; of an endpoint concurrent requests",
            metavar="N,N",
            other_names=("concurrency",),
        ),
    ] = (1,)
    request_rates: RequestRates = field(default=None, metadata=LEFT_OUT)
    arrivals: Arrivals = field(default=None, metadata=LEFT_OUT)
    workload: Annotated[
        Literal["fixed", "answer"],
        Option(help="answer: stop where the task stops; fixed: exactly --new-tokens", metavar="KIND"),
    ] = "answer"
    prompt_tokens: Annotated[int | None, Option(help="Exact prompt length (fixed only)", metavar="N")] = None
    new_tokens: Annotated[int | None, Option(help="Tokens to make", metavar="N", unset="answer: the task's budget")] = (
        None
    )
    num_prompts: Annotated[
        int | None, Option(help="Prompts per cell and round", metavar="N", unset="384, or all there are")
    ] = None
    min_rounds: Annotated[int, Option(help="Minimum rounds, of all launches together", metavar="R")] = (
        20  # of 12 independent rounds one run in twelve could decide nothing, of 20 one in 250
    )
    min_seconds: MinSeconds = 0.0
    warmup_rounds: WarmupRounds = 1
    launches: Annotated[
        int,
        Option(
            help="Separate processes, one after the other, that share the rounds; 5 or more show how launches differ. "
            "Of 2 to 4 each makes at least 5 rounds, of more at least 4",
            metavar="N",
        ),
    ] = 1
    costs: Annotated[bool, Option(help="Also time the parts of decoding alone, in the same rounds")] = True
    probes: Annotated[
        int, Option(help="Prompts per cell and round that nothing has read before, 0 for none", metavar="N")
    ] = 2
    threads: Threads = None
    seed: TaskSeed = 0
    dtype: NumberType = AUTO
    baseline_dtype: BaselineNumberType = field(default=None, metadata=LEFT_OUT)
    devices: Devices = (AUTO,)
    baseline_device: BaselineDevice = field(default=None, metadata=LEFT_OUT)
    attention: AttentionKind = field(default=None, metadata=LEFT_OUT)
    baseline_attention: BaselineAttentionKind = field(default=None, metadata=LEFT_OUT)
    cuda_graphs: CudaGraphs = False
    data_dir: DataDir = None
    apply_chat_template: ApplyChatTemplate = field(default=None, metadata=LEFT_OUT)
    system_instruction: SystemInstruction = field(default=None, metadata=LEFT_OUT)
    fewshot_as_multiturn: FewshotAsMultiturn = field(default=None, metadata=LEFT_OUT)
    gen_prefix: GenPrefix = field(default=None, metadata=LEFT_OUT)
    enable_thinking: EnableThinking = field(default=None, metadata=LEFT_OUT)
    think_end_token: ThinkEndToken = field(default=None, metadata=LEFT_OUT)
    chat_template_args: ChatTemplateArgs = field(default=None, metadata=LEFT_OUT)
    tokenizer: CountingTokenizer = field(default=None, metadata=LEFT_OUT)
    request_timeout: RequestTimeout = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        _hold_settings(self)
        hold_baselines(self)
        check_fields(self)
        check_devices(self)
        _check_arms(self)
        hold_chat(self)
        check_speed(self)


@dataclass(frozen=True, kw_only=True)
class SizingPlan:
    """What ``twotower-eval size`` does: costs of a size of model, without its weights.

    ``config`` is a ``config.json``, a folder that holds one, or the name of a shipped one or of the hub. ``layers``
    builds the first so many of each tower and measures parts of them, to extrapolate; ``None`` builds all.
    ``share_towers`` gives both towers one set of weights; ``cuda_graphs`` launches each small step as a whole. Commits
    follow every rate of ``tokens_per_nfe`` that a block size can have, and the blocks that the run folder ``profile``
    holds. Contexts are ``prompt_tokens`` long. A timed sample is ``repeats`` repetitions; rounds as in SpeedPlan.
    """

    config: Annotated[
        str,
        Option(
            help="A config.json, a folder that holds one, or the name of a shipped one or of the hub",
            metavar="CONFIG",
            argument=True,
        ),
    ] = ""
    layers: Annotated[
        int | None, Option(help="Build only the first N layers and extrapolate", metavar="N", unset="all")
    ] = None
    share_towers: Annotated[bool, Option(help="One set of random weights for both towers: half the memory")] = False
    block_sizes: Annotated[tuple[int, ...], Option(help="Block sizes, crossed", metavar="N,N")] = (16,)
    batch_sizes: Annotated[tuple[int, ...], Option(help="Rows per step, crossed", metavar="N,N")] = (1,)
    prompt_tokens: Annotated[int, Option(help="Tokens of context before each step", metavar="N")] = 512
    tokens_per_nfe: Annotated[
        tuple[float, ...], Option(help="Tokens committed per denoise step (NFE), crossed", metavar="X,X")
    ] = (1.5, 2.5, 4.0)
    profile: Annotated[str | None, Option(help="Run whose recorded commits are timed, too", metavar="RUN")] = None
    repeats: Annotated[int, Option(help="Repetitions per timed cost", metavar="N")] = 8
    min_rounds: Annotated[int, Option(help="Minimum rounds", metavar="R")] = 5
    min_seconds: MinSeconds = 0.0
    warmup_rounds: WarmupRounds = 1
    threads: Threads = None
    seed: Seed = 0
    dtype: SizeNumberType = "bfloat16"
    devices: Devices = (AUTO,)
    cuda_graphs: CudaGraphs = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_devices(self)
        if not self.config:
            raise UserError("name the config.json whose size is to be measured: twotower-eval size CONFIG")
        check_at_least(self, 1, "layers", "block_sizes", "batch_sizes", "prompt_tokens", "tokens_per_nfe", "repeats")
        check_at_least(self, 1, "min_rounds", "threads")
        check_at_least(self, 0, "min_seconds", "warmup_rounds", "seed")
        if self.share_towers and len(self.devices) > 1:
            raise UserError("share_towers puts both towers on one device: name one device")
        if len(self.devices) > 2:
            raise UserError(f"a pair has two towers, but {len(self.devices)} devices are named")


Plan = RunPlan | SpeedPlan  # those that decode
AnyPlan = Plan | SizingPlan | VerifyPlan


def devices_of(plan: Plan) -> tuple[str, ...]:
    """The devices of all arms, the candidate's first, each once."""
    own = (single.baseline_device for single in each_baseline(plan))
    return tuple(dict.fromkeys((*plan.devices, *(device for device in own if device is not None))))


def _hold_settings(plan: Plan) -> None:
    """``set`` and ``baseline_set`` with a tuple for each parameter; UserError for one that a field off its default
    says, too. ``ar`` is short for ``autoregressive``. Task options are read from whatever form they have."""
    object.__setattr__(plan, "seed", read_seed(plan.seed))
    object.__setattr__(plan, "gen_kwargs", read_gen_kwargs(plan.gen_kwargs))
    object.__setattr__(plan, "chat_template_args", read_template_args(plan.chat_template_args))
    for name in ("decoder", "baseline_decoder"):
        object.__setattr__(plan, name, SHORT_NAMES.get(getattr(plan, name), getattr(plan, name)))
    if plan.set is not None:
        settings = settings_from(plan.set)
        object.__setattr__(plan, "set", settings or None)
        check_given_once(settings, {name: True for name in SHORTHANDS if getattr(plan, name) is not None})
    if plan.baseline_set is not None:
        object.__setattr__(plan, "baseline_set", one_value_each(plan.baseline_set) or None)


def _check_arms(plan: Plan) -> None:
    drop_refusals(plan)
    if plan.baselines is not None:
        named_baselines(plan)  # each is checked as a plan with that one alone
    else:
        for name in ("baseline_family", "baseline_revision", "baseline_trust_remote_code", "baseline_attention"):
            if getattr(plan, name) is not None and plan.baseline == CONTEXT_TOWER:
                raise UserError(f"{name} has no effect on {CONTEXT_TOWER}: drop it, or name a baseline's folder")
    check_endpoints(plan)
    check_at_least(plan, 1, "block_sizes", "steps")
    check_at_least(plan, 0, "temperature", "thresholds", "num_fewshot")
