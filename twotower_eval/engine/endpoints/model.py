"""A model behind a server, as decoders, scorers and records see it: texts go in and come out, its weights are unknown.

What is known of it is stated: the URL, its name there, and what the server lists of it. Prompts are sent as token ids
where the server takes them and reads them like their text; else as text. Chats are sent as messages, which the server
writes with its own template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import tokenizers

from twotower_eval.engine.endpoints.chats import (
    BUDGETS,
    chat_body,
    check_continues,
    check_template_args,
    find_budget_name,
)
from twotower_eval.engine.endpoints.client import NO_ENTRY, PROBE, Address, Ask, Client, EndpointError, read_address
from twotower_eval.engine.endpoints.streams import Broken, Reply, read_reply
from twotower_eval.engine.models.chat import format_of
from twotower_eval.engine.models.identity import file_digests
from twotower_eval.engine.models.protocol import Model, TextCodec
from twotower_eval.engine.models.tokenizer import load_tokenizer, prompt_ids
from twotower_eval.errors import UserError
from twotower_eval.records import (
    CONFIG_FILES,
    ENDPOINT_FAMILY,
    Checkpoint,
    FileDigest,
    Prompt,
    Retried,
    ServedModel,
    canonical_json,
    sha256_text,
)

COMPLETIONS, CHATS, MODELS = "completions", "chat/completions", "models"
NUM_PROBED = 8
# Of what a server lists: what changes from one request or start to the next.
PASSING = ("created", "permission", "object", "status", "meta")
NO_WEIGHTS = "unknown"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The tokenizer that counts tokens in both arms: its name, and digests of its files."""

    codec: TextCodec
    name: str
    files: tuple[FileDigest, ...]


def reader_of(model: Model) -> Reader | None:
    """The tokenizer of a local model; None if it has none."""
    if model.tokenizer is None:
        return None
    files = tuple(file for file in model.checkpoint.files if _is_of_tokenizer(file))
    return Reader(codec=model.tokenizer, name=model.checkpoint.name, files=files)


def read_reader(folder: Path) -> Reader:
    """The tokenizer in a folder. UserError if there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: has no tokenizer.json to count tokens with")
    codec = load_tokenizer(folder, vocab_size=_vocab_size(file))
    assert codec is not None
    files = tuple(one for one in file_digests(folder) if _is_of_tokenizer(one))
    return Reader(codec=codec, name=folder.resolve().name, files=files)


def _is_of_tokenizer(file: FileDigest) -> bool:
    return file.name not in CONFIG_FILES and not file.name.startswith("chat_template")


def _vocab_size(file: Path) -> int:
    """One more than the largest id; what the model has no row for cannot be told. load_tokenizer says what is wrong."""
    try:
        known = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
    except Exception:  # the library raises bare Exception for a malformed file, and load_tokenizer names the file
        return 1
    return 1 + max(known, default=0)


class EndpointModel:
    """A model behind a server. It has the fields of every model and no forward: a decoder or a scorer of its own asks
    its server.

    ``asks_chats``: prompts are sent as messages, to its chat completions. ``sends_ids``: they are sent as token ids.
    ``on_retry`` hears of every request that failed and is asked again.
    """

    is_remote = True
    has_denoiser = False
    joins_contexts = False
    mask_token_id = None
    folder_settings: Mapping[str, object]

    def __init__(
        self, client: Client, name: str, listed: Mapping[str, object], reader: Reader, *, asks_chats: bool = False
    ) -> None:
        self.client, self.name, self.reader, self.asks_chats = client, name, reader, asks_chats
        self.path = CHATS if asks_chats else COMPLETIONS
        self.tokenizer = reader.codec
        self.vocab_size = int(getattr(reader.codec, "vocab_size", 2**31))
        eos = reader.codec.eos_token_id
        self.eos_token_ids = () if eos is None else (int(eos),)
        self.budget_name = BUDGETS[0]
        if asks_chats:
            find_budget_name(self)
        self.sends_ids = not asks_chats and self._reads_ids_like_text()
        longest = listed.get("max_model_len")
        # Only where a prompt is cut token by token does the server read what is left of it.
        self.max_length = longest if self.sends_ids and isinstance(longest, int) else None
        self.on_retry: Callable[[Retried], None] = lambda retried: None
        facts = tuple(sorted((key, canonical_json(value)) for key, value in listed.items() if key not in PASSING))
        self.context_digest = sha256_text(canonical_json([client.address.url, name, facts]))
        self.folder_settings = {"tokenizer": [[file.name, file.sha256] for file in reader.files]}
        self.checkpoint = Checkpoint(
            name=Path(name).name if name.startswith("/") else name,
            family=ENDPOINT_FAMILY,
            source=client.address.url,
            digest=self.context_digest,
            dtype=NO_WEIGHTS,
            devices=(ENDPOINT_FAMILY,),
            files=reader.files,
            served=ServedModel(
                url=client.address.url,
                name=name,
                facts=facts,
                prompts="messages" if asks_chats else "token ids" if self.sends_ids else "text",
                tokenizer=reader.name,
            ),
        )

    def body(self, prompt: str | Sequence[int], max_tokens: int, **more: object) -> dict[str, object]:
        """The body of a completion or a chat at temperature 0, unless ``more`` says otherwise."""
        common = {"model": self.name, self.budget_name: max_tokens, "temperature": 0.0}
        if self.asks_chats and isinstance(prompt, str):
            return {**common, **chat_body(prompt, format_of(self).template_args), **more}
        asked = prompt if isinstance(prompt, str) else list(prompt)
        return {**common, "prompt": asked, **more}

    def sent(self, prompt: Prompt) -> str | tuple[int, ...]:
        """A prompt as it is sent. A text goes without the BOS that the server's tokenizer adds itself."""
        if self.sends_ids:
            return prompt.token_ids
        if self.asks_chats:
            return self.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        codec = self.tokenizer
        text = codec.decode_with_special(prompt.token_ids) if prompt.text is None else prompt.text
        bos = codec.bos_token_id
        if bos is not None and codec.encode("", True)[:1] == [bos]:
            text = text.removeprefix(codec.decode_with_special([bos]))
        return text

    def _reads_ids_like_text(self) -> bool:
        """Whether the server takes token ids and reads those of a text as it reads the text: the same count, and the
        same answer. UserError if it does not even complete the text."""
        of_text = self.probed(PROBE)
        ids = prompt_ids(self, PROBE)  # type: ignore[arg-type]
        try:
            of_ids = self.probed(ids)
        except EndpointError:
            return False
        counts = {len(ids), of_text.num_prompt_tokens, of_ids.num_prompt_tokens} - {None}
        return len(counts) == 1 and of_text.text == of_ids.text

    def check_chats(self, prompts: Iterable[str]) -> None:
        """UserError, before they are asked, if the server would answer something else than these prompts."""
        told = format_of(self).template_args
        if told:
            check_template_args(self, told)
        check_continues(self, prompts, self.client.address.url)

    def probed(self, prompt: str | Sequence[int]) -> Reply:
        """The answer to a short question, asked once."""
        try:
            return read_reply(self.client.post(self.path, self.body(prompt, NUM_PROBED)))
        except Broken as error:
            what = "an answer" if self.asks_chats else "a completion"
            raise EndpointError(f"{self.client.address.url}: {what} of {self.name!r}: {error}") from error

    @cached_property
    def counts_streams(self) -> bool:
        """Whether the server takes being asked for the number of tokens at the end of a stream."""
        body = self.body(PROBE, 1, stream=True, stream_options={"include_usage": True})
        try:
            self.client.ask([Ask(path=self.path, body=body, label="a stream")], on_reply=lambda at, reply: None)
        except EndpointError as error:
            if error.status is None or error.status in NO_ENTRY:
                raise
            return False
        return True

    # What needs logits or states.

    def _no_logits(self, *_given: object, **_options: object) -> NoReturn:
        raise UserError(f"{self.checkpoint.name} is behind a server, which gives texts and no logits")

    prefill = extend = next_logits = context_logits = _no_logits


def connect(
    given: str,
    *,
    tokenizer: Path | None = None,
    other: Model | None = None,
    timeout_s: float | None = None,
    chat: bool = False,
) -> EndpointModel:
    """The model of an endpoint, such as ``openai:http://localhost:8000/v1#name``; ``chat``: it is sent messages.

    Its tokens are counted by the tokenizer in the folder ``tokenizer``, else by that of ``other``, a local model it is
    compared with, else by that in the folder that the server names as the model's own. UserError for a server that
    cannot be reached or refuses its key, a name that it does not have, and where no tokenizer is known.
    """
    address = read_address(given)
    client = Client(address, timeout_s=timeout_s)
    try:
        listed = dict(_listed(client))
        name = address.name or _only_name(address, listed)
        reader = _reader(address, name, listed.get(name, {}), tokenizer, other)
        try:
            return EndpointModel(client, name, listed.get(name, {}), reader, asks_chats=chat)
        except EndpointError as error:
            there = f"; it lists {', '.join(listed)}" if listed and name not in listed else ""
            raise EndpointError(f"{error} for the model {name!r}{there}") from error
    except BaseException:
        client.close()
        raise


def _listed(client: Client) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The models that a server lists, by name; none from a server that lists nothing, as some do not."""
    try:
        found = client.get(MODELS).get("data")
    except EndpointError as error:
        if error.status is None or error.status in NO_ENTRY:
            raise
        return
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict) and isinstance(one.get("id"), str):
            yield one["id"], one


def _only_name(address: Address, listed: Mapping[str, object]) -> str:
    if len(listed) != 1:
        there = f"it lists {', '.join(listed)}" if listed else "it lists none"
        raise EndpointError(f"{address.url}: name the model behind a #, as in {address.url}#NAME; {there}")
    return next(iter(listed))


def _reader(
    address: Address, name: str, listed: Mapping[str, object], folder: Path | None, other: Model | None
) -> Reader:
    if folder is not None:
        return read_reader(folder)
    if other is not None and (found := reader_of(other)) is not None:
        return found
    for own in (listed.get("root"), name):
        if isinstance(own, str) and (Path(own) / "tokenizer.json").is_file():
            return read_reader(Path(own))
    raise UserError(
        f"{address.url}: the tokens of {name!r} are counted with a tokenizer that is here: give --tokenizer FOLDER"
    )
