"""An honest plug-in of a few lines, and such as cheat: each in its own way, where a timed call could be cheated."""

import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.records import Generation, Prompt

MODULE = "tests.cheating_decoders"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """There are none."""


class Honest:
    """One prompt after the other, greedily. It reads the clock and fills in nothing that is optional but the time."""

    Params = Params
    VERSION = 1

    def __init__(self, model: Any, params: Params, *, clock: Callable[[], float] | None = None) -> None:
        self.model, self.params, self.clock = model, params, clock

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        max_batch_size: int | None = None,
        on_finish: Any = None,
    ) -> Any:
        self.budget, self.stop = max_new_tokens, stop
        started_s = self.clock() if self.clock else 0.0
        generations = []
        for prompt in prompts:
            generation = self.changed(self.answer(prompt, max_new_tokens, eos_token_ids))
            if self.clock and type(generation) is Generation and generation.finish_s is None:
                generation = dataclasses.replace(generation, finish_s=self.clock() - started_s)
            generations.append(generation)
            if on_finish:
                on_finish(generation)
        return self.handed(generations)

    def answer(self, prompt: Prompt, budget: int, eos: Sequence[int]) -> Generation:
        """Token by token; stop strings are left to others."""
        ids: list[int] = []
        finish = "length"
        context = self.model.prefill(torch.tensor([prompt.token_ids]))
        num = 1
        while True:
            token = int(self.model.next_logits(context).argmax())
            if token in eos:
                finish = "eos"
                break
            ids.append(token)
            self.text(ids)
            if len(ids) == budget:
                break
            context = self.extended(context, torch.tensor([[token]]))
            num += 1
        return Generation(
            prompt_id=prompt.id,
            token_ids=tuple(ids),
            text=self.text(ids),
            finish=finish,  # type: ignore[arg-type]
            num_prompt_tokens=len(prompt.token_ids),
            num_tokens=len(ids),
            num_discarded_tokens=0,
            num_context_forwards=num,
            num_denoiser_forwards=0,
        )

    def extended(self, context: Any, ids: torch.Tensor) -> Any:
        return self.model.extend(context, ids)

    def text(self, ids: list[int]) -> Any:
        return self.model.tokenizer.decode(ids)

    def changed(self, generation: Generation) -> Any:
        return generation

    def handed(self, generations: list[Any]) -> Any:
        return generations


# Counts


class Understates(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, num_context_forwards=1)


class Overstates(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, num_denoiser_forwards=3)


class ByTheTower(Honest):
    """Through the inside of the model that it was given."""

    def extended(self, context: Any, ids: torch.Tensor) -> Any:
        inside = getattr(self.model, "_model", self.model)
        return getattr(inside, "context_tower", inside).extend(context, ids)

    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, num_context_forwards=1)


class ByTheClass(ByTheTower):
    """By the class's own function, so that no method of the model is looked up."""

    def extended(self, context: Any, ids: torch.Tensor) -> Any:
        inside = getattr(self.model, "_model", self.model)
        return ContextTower.extend(getattr(inside, "context_tower", inside), context, ids)


class MoreTokens(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, num_tokens=generation.num_tokens + 50)


class OverBudget(Honest):
    def changed(self, generation: Generation) -> Any:
        ids = (*generation.token_ids, 5, 5, 5)
        text = self.model.tokenizer.decode(ids)
        return dataclasses.replace(generation, token_ids=ids, num_tokens=len(ids), text=text)


class OtherText(Honest):
    """A text that its tokens do not say."""

    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, text="remembered")


class ShorterPrompt(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, num_prompt_tokens=1)


class OtherPrompt(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, prompt_id="another")


class CountsTheEnd(Honest):
    """The end of the text as a token of the answer."""

    def answer(self, prompt: Prompt, budget: int, eos: Sequence[int]) -> Generation:
        made = super().answer(prompt, budget, ())
        ids = (*made.token_ids[:-1], *eos[:1])
        return dataclasses.replace(made, token_ids=ids, text=self.text(list(ids)))


class EndsEarly(Honest):
    """Says that the budget ended it, and did not use it."""

    def answer(self, prompt: Prompt, budget: int, eos: Sequence[int]) -> Generation:
        return super().answer(prompt, budget - 1, ())


class FinishesLate(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, finish_s=1e6)


class FinishesBefore(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, finish_s=-1.0)


# Values that are not there yet


class LazyTokens(Sequence[int]):
    """Token ids that are computed when somebody asks for them."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[index]


class LazyTuple(tuple[int, ...]):
    def __iter__(self) -> Iterator[int]:
        return super().__iter__()


class LazyText(str):
    pass


class LazyNumber(int):
    pass


class LazyAnswer(Generation):
    pass


class Lazy(Honest):
    def changed(self, generation: Generation) -> Any:
        lazy: Any = LazyTokens(generation.token_ids)
        return dataclasses.replace(generation, token_ids=lazy)


class LazyAsATuple(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, token_ids=LazyTuple(generation.token_ids))


class SubclassedText(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, text=LazyText(generation.text))


class SubclassedNumber(Honest):
    def changed(self, generation: Generation) -> Any:
        ids = tuple(LazyNumber(token) for token in generation.token_ids)
        return dataclasses.replace(generation, token_ids=ids)


class TensorTokens(Honest):
    def changed(self, generation: Generation) -> Any:
        ids: Any = torch.tensor(generation.token_ids)
        return dataclasses.replace(generation, token_ids=ids)


class YesForOne(Honest):
    def changed(self, generation: Generation) -> Any:
        return dataclasses.replace(generation, num_denoiser_forwards=False)


class SubclassedAnswer(Honest):
    def changed(self, generation: Generation) -> Any:
        return LazyAnswer(**{f.name: getattr(generation, f.name) for f in dataclasses.fields(generation)})


class Later(Honest):
    """A generator of answers: nothing is decoded before it is asked."""

    def handed(self, generations: list[Any]) -> Any:
        return (generation for generation in generations)


# Clocks and texts


class WorksInText(Honest):
    """Does a forward while a list of its own is looked at by the tokenizer."""

    def text(self, ids: list[int]) -> Any:
        model = self.model

        class Working(list[int]):
            def __iter__(self) -> Iterator[int]:
                model.prefill(torch.tensor([[5]]))
                return super().__iter__()

        return self.model.tokenizer.decode(Working(ids))


class WorksInTokenizer(Honest):
    """Puts a tokenizer of its own in the place of the model's."""

    def text(self, ids: list[int]) -> Any:
        raw = self.model._model.tokenizer
        if not isinstance(raw._inner, Working):
            raw._inner = Working(raw._inner, self.model)
        return self.model.tokenizer.decode(ids)


class Working:
    def __init__(self, inner: Any, model: Any) -> None:
        self.inner, self.model = inner, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, ids: Any, **options: Any) -> Any:
        self.model.prefill(torch.tensor([[5]]))
        return self.inner.decode(ids, **options)


class SleepsInTokenizer(WorksInTokenizer):
    """The same, with work of which the model knows nothing."""

    def text(self, ids: list[int]) -> Any:
        raw = self.model._model.tokenizer
        if not isinstance(raw._inner, Sleeping):
            raw._inner = Sleeping(raw._inner, self.model)
        return self.model.tokenizer.decode(ids)


class Sleeping(Working):
    seconds = 0.1

    def decode(self, ids: Any, **options: Any) -> Any:
        time.sleep(self.seconds)
        return self.inner.decode(ids, **options)


class StallsOnce(WorksInTokenizer):
    """Its tokenizer is held up once, as a neighbour on the machine may hold it up."""

    def text(self, ids: list[int]) -> Any:
        raw = self.model._model.tokenizer
        if not isinstance(raw._inner, Stalling):
            raw._inner = Stalling(raw._inner, self.model)
        return self.model.tokenizer.decode(ids)


class Stalling(Working):
    has_stalled = False

    def decode(self, ids: Any, **options: Any) -> Any:
        if not self.has_stalled:
            self.has_stalled = True
            time.sleep(0.2)
        return self.inner.decode(ids, **options)


class OtherClock(Honest):
    """Another ``time.perf_counter``."""

    def handed(self, generations: list[Any]) -> Any:
        time.perf_counter = lambda: 0.0
        return generations


# Threads, processes


def work(seconds: float = 0.5) -> None:
    """Keep a processor busy."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        pass


class LeavesAThread(Honest):
    """Hands over an answer that a thread is still at work on."""

    def handed(self, generations: list[Any]) -> Any:
        threading.Thread(target=work, name="postponed", daemon=True).start()
        return generations


class StartsAThread(Honest):
    def __init__(self, model: Any, params: Params, *, clock: Any = None) -> None:
        super().__init__(model, params, clock=clock)
        threading.Thread(target=work, name="worker", daemon=True).start()


class WorksLater(Honest):
    """Leaves a thread that does nothing yet, and goes to work between the calls that follow."""

    def handed(self, generations: list[Any]) -> Any:
        if not [thread for thread in threading.enumerate() if thread.name == "later"]:
            threading.Thread(target=self.later, name="later", daemon=True).start()
        return generations

    def later(self) -> None:
        time.sleep(0.1)
        work(1.0)


class HasIdleThreads(Honest):
    """Keeps a pool of threads, as torch.compile does, and one that wakes now and then, as a progress bar's does."""

    def handed(self, generations: list[Any]) -> Any:
        self.pool = ThreadPoolExecutor(1)
        self.pool.submit(int).result()
        threading.Thread(target=wake_now_and_then, name="monitor", daemon=True).start()
        return generations


def wake_now_and_then() -> None:
    for _ in range(50):
        time.sleep(0.01)


class RaisesThreads(Honest):
    def handed(self, generations: list[Any]) -> Any:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return generations


class RaisesThreadsMeanwhile(Honest):
    """And takes them back before the call ends."""

    def extended(self, context: Any, ids: torch.Tensor) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            return super().extended(context, ids)
        finally:
            torch.set_num_threads(before)


class HasItDoneElsewhere(Honest):
    """A process of its own works for it."""

    def handed(self, generations: list[Any]) -> Any:
        subprocess.run(["sh", "-c", "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"], check=True, env=os.environ)
        return generations
