"""Model families behind one protocol, and the function that loads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

from twotower_eval.engine.plugin_source import plugin_code
from twotower_eval.errors import FileError, UserError
from twotower_eval.names import Seam, resolve
from twotower_eval.plugin_calls import PluginError, calls_in
from twotower_eval.records import AUTO, CONFIG_FILES, ENDPOINT_FAMILY, HUB
from twotower_eval.sources import ENDPOINT, FOREIGN, GivenModel, Source, located, read_source

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from twotower_eval.engine.models.protocol import Model
    from twotower_eval.records import Checkpoint

FAMILIES = {
    "a2d_bd3lm": "twotower_eval.engine.families.a2d:load_blocks",
    "a2d_mdlm": "twotower_eval.engine.families.a2d:load",
    "bd3lm": "twotower_eval.engine.families.bd3lm:load",
    "diffusion_gemma": "twotower_eval.engine.families.diffusion_gemma:load",
    "dream": "twotower_eval.engine.families.dream:load",
    "e2d2": "twotower_eval.engine.families.e2d2:load",
    "fast_dllm_v2": "twotower_eval.engine.families.fast_dllm_v2:load",
    "llada": "twotower_eval.engine.families.llada:load",
    "llada2_moe": "twotower_eval.engine.families.llada2_moe:load",
    "mdlm": "twotower_eval.engine.families.mdlm:load",
    "radd": "twotower_eval.engine.families.radd:load",
    "sdar": "twotower_eval.engine.families.sdar:load",
    "nemotron_h": "twotower_eval.engine.models.checkpoint:load",
    "transformers": "twotower_eval.engine.models.transformers_ar:load",
    ENDPOINT_FAMILY: "twotower_eval.engine.endpoints.model:connect",
}
MODEL_TYPES = {
    "Dream": "dream",
    "Fast_dLLM_Qwen": "fast_dllm_v2",
    "a2d-qwen3": "a2d_mdlm",
}  # model_type of a config.json -> family, where they are not the same
RADD_KEYS = {"tokens", "model", "noise", "training"}  # of a config.json that names no model_type: that of its training
SEAM = Seam(what="model family", form="package.module:load", shipped=FAMILIES)
TOKENIZER_FILE = "tokenizer.json"
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def family_of(path: GivenModel) -> str:
    """The family of a model: ``openai`` of an endpoint; of a folder, by its config.json, ours, a registered one for
    its ``model_type``, else ``transformers``.

    UserError without a config.json, or if both transformers and an installed package know that type.
    """
    from twotower_eval.engine.models.checkpoint import read_json

    source = _existing(path)
    if source.kind == "endpoint":
        return ENDPOINT_FAMILY
    config = read_json(source.files / "config.json")
    kind = config.get("model_type", "radd" if config.keys() >= RADD_KEYS else None)
    kind = MODEL_TYPES.get(str(kind), kind)
    if kind in FAMILIES and kind not in ("transformers", ENDPOINT_FAMILY):
        return str(kind)
    if kind not in SEAM.registered():
        return "transformers"
    from twotower_eval.engine.models.transformers_ar import knows

    if knows(kind):
        raise UserError(
            f"{path}: an installed package and transformers both read model_type {kind!r}: choose with --family {kind} "
            "or --family transformers"
        )
    return str(kind)


@contextmanager
def family_calls(*arms: tuple[GivenModel | None, str | None]) -> Iterator[None]:
    """Around work with these models, each with the family that was chosen for it (None: what its config.json says):
    PluginError, in one line that says where, for what the code of a user's own family raises.

    An arm that is None has no checkpoint of its own. UserError where a model's family cannot be told.
    """
    import torch

    families = [family or family_of(model) for model, family in arms if model is not None]
    with ExitStack() as stack:
        for model in dict.fromkeys(read_source(model) for model, _ in arms if model is not None):
            stack.enter_context(_foreign_calls(model))
        for family in dict.fromkeys(families):
            module = SEAM.place(family).partition(":")[0]
            stack.enter_context(calls_in(module, f"family {family}", pass_through=(UserError, torch.OutOfMemoryError)))
        yield


def _foreign_calls(source: Source) -> AbstractContextManager[None]:
    """Around work with a model that may bring its own code: PluginError for what that raises."""
    import torch

    if not source.trust_remote_code:
        return nullcontext()
    return calls_in(FOREIGN, f"code of {source.name}", pass_through=(UserError, torch.OutOfMemoryError))


def _existing(given: GivenModel) -> Source:
    """A model whose small files are here; its weights may not be."""
    return located(read_source(given), extent="settings", needs_config=False)


def with_weights(source: Source, family: str | None = None, *, device: str = AUTO) -> Source:
    """A source whose files are all here; UserError before weights are downloaded that could not be used."""
    found = located(source, extent="settings", needs_config=family is None)
    check_settings(found, family, device=device)
    return located(found, needs_config=family is None)


def check_settings(source: Source, family: str | None = None, *, device: str = AUTO, reads_text: bool = False) -> None:
    """UserError for what a model's small files alone show: its weights, which may not be here yet, could not be used.

    Checked are the family, what its config.json says of architecture and quantisation, and with ``reads_text`` that
    there is a tokenizer. What a family of the user's own reads is its own affair. A model behind a server has no files.
    """
    _check_served(source, family)
    if source.kind == "endpoint":
        return
    folder = source.files
    family = family_of(folder) if family is None else family
    found_at = SEAM.place(family)
    if family not in FAMILIES:
        resolve(found_at)
        return
    try:
        with _foreign_calls(source):
            _check_shipped(source, family, device)
    except (PluginError, FileError):
        raise
    except UserError as error:
        raise FileError(f"{source}: {error}") from error
    if reads_text and not (folder / TOKENIZER_FILE).is_file():
        raise FileError(
            f"{source}: has no {TOKENIZER_FILE}{_other_tokenizer(folder)}, and tasks are text: it needs one"
        )


def _check_shipped(source: Source, family: str, device: str) -> None:
    """The part that depends on the family, of those that this project reads."""
    from twotower_eval.engine.models.checkpoint import read_json
    from twotower_eval.engine.models.quantised import quantisation_of

    data = read_json(source.files / CONFIG_FILES[0])
    if family == "transformers":
        from twotower_eval.engine.models.choices import choose_device
        from twotower_eval.engine.models.transformers_ar import check_files

        place = choose_device([family]).value if device == AUTO else device
        check_files(source.files, data, named=str(source), trust_remote_code=source.trust_remote_code, device=place)
        return
    if (quantised := quantisation_of(data)) is not None:
        raise UserError(f"is quantised ({quantised}), and family {family} reads weights that are plain numbers")
    if family == "nemotron_h":
        from twotower_eval.engine.models.config import parse_config

        parse_config(data)


def _other_tokenizer(folder: Path) -> str:
    """What a folder without a fast tokenizer has instead, and how to get one from it."""
    there = next((name for name in OTHER_TOKENIZERS if (folder / name).is_file()), None)
    if there is None:
        return ""
    return f", only {there} (transformers writes one: AutoTokenizer.from_pretrained(…).save_pretrained(…))"


def _check_served(source: Source, family: str | None) -> None:
    """UserError for a family that reads no files and a model that has some, or the other way round."""
    if source.kind != "endpoint" and family == ENDPOINT_FAMILY:
        raise UserError(f"{source}: family {ENDPOINT_FAMILY} is for servers, as in {ENDPOINT}http://HOST:PORT/v1#NAME")
    if source.kind == "endpoint" and family not in (None, ENDPOINT_FAMILY):
        raise UserError(f"{source}: family {family} reads files, and a server gives none: leave the family out")


def check_device_name(name: str) -> None:
    """UserError for what torch does not know as a device, and for one that computes nothing."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise _unusable(name, error) from error
    if kind == "meta":
        raise UserError(f"device {name!r} cannot be used here: its tensors have no values")


def check_device(name: str) -> None:
    """UserError for a device that torch does not know or that is not available."""
    import torch

    check_device_name(name)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0].partition(". ")[0]  # behind it torch lists every backend
    return UserError(f"device {name!r} cannot be used here: {reason}")


def load_model(
    path: GivenModel,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    devices: Sequence[str | torch.device] | None = None,
    tower: Literal["context"] | None = None,
    family: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    tokenizer: GivenModel | None = None,
    request_timeout: float | None = None,
    other: Model | None = None,
    chat: bool = False,
) -> Model:
    """Load a checkpoint folder, a model of the Hugging Face hub (``"org/name"`` or ``"org/name@revision"``), the
    shipped pair as ``"miniature"``, or an endpoint such as ``"openai:http://localhost:8000/v1#name"``.

    ``device`` and ``dtype`` may be ``"auto"``, which means what it does on the command line. A pair gives a
    :class:`Denoising` model, an AR base checkpoint, ``tower="context"`` or any Hugging Face causal LM a
    :class:`Model` alone. ``devices`` places the towers, context first. ``family`` is a key of ``FAMILIES``, a name that
    an installed package registers, or a ``"module:function"`` (see docs/family.md); by default the folder's config.json
    decides. ``revision`` is a branch, tag or commit on the hub. ``trust_remote_code`` runs the code of a model that
    brings its own. ``attention`` is how a Hugging Face model computes it: ``sdpa``, ``eager``, ``flash_attention_2``
    or ``flex_attention``. An endpoint's tokens are counted with ``tokenizer``, a folder, else with that of the
    ``other`` arm; its server may be silent for ``request_timeout`` seconds, and with ``chat`` it is sent messages.
    UserError with one line that says what is wrong with the checkpoint, with such code, or with the server.
    """
    import torch

    from twotower_eval.engine.models.choices import choose_dtype
    from twotower_eval.engine.models.identity import file_digests, folder_settings

    source = _existing(read_source(path, revision, trust_remote_code=trust_remote_code, attention=attention))
    if attention is not None and (family or family_of(source)) != "transformers":
        raise UserError(f"{source} is no Hugging Face model, so attention {attention!r} has no effect on it: drop it")
    if source.kind == "endpoint" or family == ENDPOINT_FAMILY:
        return _connected(source, family, tokenizer, other=other, timeout_s=request_timeout, chat=chat)
    folder = source.files
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in (*DTYPES, AUTO):
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    located(source, extent="settings", needs_config=family is None)
    if family is None:
        family = family_of(folder)
    found_at = SEAM.place(family)
    devices = _usable(devices, device, family)
    source = with_weights(source, family, device=devices[0])
    dtype = choose_dtype(folder, devices[0]).value if dtype == AUTO else dtype
    options = {"devices": devices, "dtype": getattr(torch, dtype), "tower": tower}
    if family == "transformers":
        options |= {"trust_remote_code": source.trust_remote_code, "attention": source.attention}
    model = _loaded(source, family, cast("Callable[..., Model]", resolve(found_at)), options)
    stated = model.checkpoint if family in FAMILIES else dataclasses.replace(model.checkpoint, family=family)
    # What came with a transformers model and ran, or a family's own code.
    code = stated.files if family in FAMILIES else plugin_code(found_at) or ()
    model.checkpoint = _named(dataclasses.replace(stated, files=(*file_digests(folder), *code)), source)
    model.folder_settings = folder_settings(folder, getattr(model, "config", None))
    return model


def _named(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    """A checkpoint of the hub is called as its repository is, wherever the cache keeps it."""
    if source.repo is None:
        return checkpoint
    at = f"@{source.revision}" if source.revision else ""
    return dataclasses.replace(checkpoint, name=source.name, source=f"{HUB}{source.repo}{at}", revision=source.commit)


def _loaded(source: Source, family: str, load: Callable[..., Model], options: dict[str, Any]) -> Model:
    """The model that a family's ``load`` makes of a source's files; errors name the folder."""
    import torch

    folder = source.files
    try:
        with torch.inference_mode(False), _foreign_calls(source):
            if family in FAMILIES:
                return load(folder, **options)
            from twotower_eval.engine.models.contract import load_own

            return load_own(family, load, folder, **options)
    except (PluginError, FileError):
        raise
    except UserError as error:
        raise FileError(f"{folder}: {error}") from error


def _connected(source: Source, family: str | None, tokenizer: GivenModel | None, **options: object) -> Model:
    """The model behind a server; further options are those of its ``connect``."""
    _check_served(source, family)
    folder = None
    if tokenizer is not None:
        folder = located(read_source(tokenizer), extent="tokenizer", needs_config=False).files
    connect = cast("Callable[..., Model]", resolve(FAMILIES[ENDPOINT_FAMILY]))
    return connect(source.url or "", tokenizer=folder, **options)


def _usable(devices: Sequence[str | torch.device] | None, device: str | torch.device, family: str) -> tuple[str, ...]:
    """Names of the towers' devices, by default the single one; ``auto`` is the first that torch can use. UserError for
    devices that torch cannot use."""
    from twotower_eval.engine.models.choices import choose_device

    if isinstance(devices, str):
        raise UserError(f"devices names one for each tower, as in ({devices!r},): for a single one take device")
    places = tuple(str(place) for place in devices or (device,))
    if places == (AUTO,):
        places = (choose_device([family]).value,)
    if len(places) > 2:
        raise UserError(f"a pair has two towers, but {len(places)} devices are named")
    for place in places:
        check_device(place)
    return places
