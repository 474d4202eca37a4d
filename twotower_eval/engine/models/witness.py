"""Whether the tokens of an answer come from logits that the model computed while it was asked for them.

A witness notes, for one call of a decoder on one prompt, every row of logits that the model hands over, with its few
likeliest tokens, and every token that the decoder hands to the model. Afterwards each token of the answer has to find a
row of its own that holds it. What was known before the call finds none, or only rows that came after the decoder had
given it to the model: such a token was drafted somewhere else, and then verified.

What a row may witness depends on what the model was given behind it. Nothing: any of its likeliest tokens. A token of
the prompt: none. Another token: that one, if it is among the likeliest, or the likeliest, which corrects it. Behind the
first token that is not among them nothing more is verified.

A row of a denoiser has a place in the answer, where its context says how many tokens it holds; it witnesses the two
likeliest tokens there. Otherwise one pass over many masks would witness any answer: nearly every token is among the
eight likeliest at one of so many places. Other rows have no place: a decoder may read and keep contexts as it likes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf

from torch import Tensor

from twotower_eval.engine.models.protocol import Segment

Lengths = Tensor | Sequence[int] | None  # of rows padded on the right; None where all are full

MOST_TOKENS = 512  # of an answer, from its beginning, that are matched with rows: quick, and enough to tell
LIKELIEST = 8  # tokens of a row of logits that it may witness: bans, penalties and near-ties pass over a few
PLACED_LIKELIEST = 2  # tokens that a row with a place may witness, the mask aside: a ban may pass over the first
# Of all places of a call: some denoisers are given the prompt's last token, or predict the next one.
SHIFTS = (0, -1, 1)
# The tokens that the model was given behind a row, and whether they are of the prompt.
GivenBehind = tuple[Collection[int], bool]
NOTHING: GivenBehind = ((), False)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of the first tokens of an answer: those that found a row of logits, and how many fewer do where a row has to be
    there before its token is given to the model (the drafted ones)."""

    num_rows: int
    num_tokens: int
    num_witnessed: int
    num_drafted: int


@dataclass(frozen=True)
class _Row:
    """What one row of logits may witness, when it was computed, and of which token of the answer, if that is known."""

    when: int
    tokens: tuple[int, ...]
    place: int | None = None


@dataclass(frozen=True)
class _Need:
    """A token of the answer, its place there, and the moment before which its row has to be computed."""

    token: int
    place: int
    before: float = inf


class Witness:
    """What goes into a model and comes out of it, in one call on a prompt of these token ids."""

    def __init__(self, prompt: Sequence[int], mask_token_id: int | None) -> None:
        self._prompt = Counter(prompt)
        self._num_prompt_tokens = len(prompt)
        self._unread = Counter(prompt)  # tokens of the prompt that no context holds yet
        self._mask = mask_token_id
        self._now = 0
        self._rows: list[_Row] = []
        self._asked: set[tuple[float, ...]] = set()  # rows that the contexts have given as they are
        self._extended: Counter[int] = Counter()  # tokens that contexts were extended by
        self._deadlines: dict[int, list[int]] = defaultdict(list)  # by token, when its first, second ... was given

    def prefilled(self, ids_BS: Tensor, lengths: Lengths = None) -> None:
        """Whole rows were read into a context."""
        self._step()
        given: Counter[int] = Counter()
        for row in _host_rows(ids_BS, lengths):
            of_prompt = _charged(row, Counter(self._prompt))
            given.update(token for token, is_of in zip(row, of_prompt, strict=True) if not is_of)
            self._charge([row], [of_prompt])
        self._give(given)

    def read(self, ids_BS: Tensor, lengths: Lengths, logits_BnV: Tensor) -> None:
        """Whole rows were read; logits behind all of their positions, or behind each row's last n."""
        self._step()
        rows, width = _host_rows(ids_BS, lengths), ids_BS.shape[1]
        tops_BnT, num = _tops_of_rows(logits_BnV), logits_BnV.shape[1]
        given: Counter[int] = Counter()
        for row, tops_nT in zip(rows, tops_BnT, strict=True):
            of_prompt = _charged(row, Counter(self._prompt))
            given.update(token for token, is_of in zip(row, of_prompt, strict=True) if not is_of)
            first = 0 if num == width else len(row) - num
            places = [(at, tops) for at, tops in enumerate(tops_nT, start=first) if 0 <= at < len(row)]
            self._verify([(self._given_behind(row, of_prompt, at), tops) for at, tops in places])
        self._give(given)

    def extended(
        self,
        ids_BK: Tensor,
        lengths: Lengths = None,
        wanted: Sequence[tuple[int, int]] = (),
        logits_MV: Tensor | None = None,
    ) -> None:
        """Contexts were extended; logits behind the wanted (row, column)."""
        self._step()
        rows = _host_rows(ids_BK, lengths)
        of_prompts = [_charged(row, Counter(self._unread)) for row in rows]
        self._charge(rows, of_prompts)
        tops = [] if logits_MV is None else _tops(logits_MV)
        for number, (row, of_prompt) in enumerate(zip(rows, of_prompts, strict=True)):
            self._extended.update(token for token, is_of in zip(row, of_prompt, strict=True) if not is_of)
            own = sorted((at, top) for (which, at), top in zip(wanted, tops, strict=True) if which == number)
            self._verify([(self._given_behind(row, of_prompt, at), top) for at, top in own])
        self._give(self._extended)

    def read_tree(self, segments: Sequence[Segment], logits_MV: Tensor) -> None:
        """A tree was read on a context; logits behind the wanted positions of its segments."""
        self._step()
        of_prompts = [_charged(segment.tokens, self._unread) for segment in segments]
        tops = iter(_tops(logits_MV))
        given: Counter[int] = Counter()
        ended: set[int] = set()
        for number, (segment, of_prompt) in enumerate(zip(segments, of_prompts, strict=True)):
            given.update(token for token, is_of in zip(segment.tokens, of_prompt, strict=True) if not is_of)
            children = [i for i, child in enumerate(segments) if child.parent == number and child.tokens]
            last: GivenBehind = ({segments[i].tokens[0] for i in children}, any(of_prompts[i][0] for i in children))
            rows = [(self._given_behind(segment.tokens, of_prompt, at, last), next(tops)) for at in segment.wanted]
            if segment.parent in ended or not self._verify(rows):
                ended.add(number)
        self._give(given)

    def denoised(self, block_BK: Tensor, logits_BKV: Tensor, held: Sequence[int] | None = None) -> None:
        """A block was denoised behind so many tokens: every position has a row of logits, whatever it holds."""
        self._step()
        given = Counter(token for row in _host_rows(block_BK, None) for token in row)
        for number, tops_KT in enumerate(_tops_of_rows(logits_BKV)):
            for at, tops in enumerate(tops_KT):
                if held is None:
                    self._rows.append(_Row(self._now, tops))
                else:
                    likeliest = tuple(token for token in tops if token != self._mask)[:PLACED_LIKELIEST]
                    self._rows.append(_Row(self._now, likeliest, held[number] + at - self._num_prompt_tokens))
        self._give(given - self._unread)  # some denoisers are given the prompt's last token

    def asked(self, logits_BV: Tensor) -> None:
        """Logits of contexts as they are: equal ones are one row, however often they are asked for."""
        values = [tuple(row) for row in logits_BV.float().topk(min(LIKELIEST, logits_BV.shape[-1])).values.tolist()]
        for value, tops in zip(values, _tops(logits_BV), strict=True):
            if value not in self._asked:
                self._asked.add(value)
                self._rows.append(_Row(self._now, tops))

    def tally(self, answer: Sequence[int]) -> Tally:
        """The first tokens of the answer matched with rows, each of which is taken once."""
        needs, met = [], Counter[int]()
        for place, token in enumerate(answer[:MOST_TOKENS]):
            moments = self._deadlines.get(token, ())
            before = float(moments[met[token]]) if met[token] < len(moments) else inf
            needs.append(_Need(token, place, before))
            met[token] += 1
        at_any_time = [_Need(need.token, need.place) for need in needs]
        shifts = SHIFTS if any(row.place is not None for row in self._rows) else SHIFTS[:1]
        by_shift = {shift: _num_matched(at_any_time, self._rows, shift) for shift in shifts}
        shift = max(shifts, key=by_shift.__getitem__)
        return Tally(
            num_rows=len(self._rows),
            num_tokens=len(needs),
            num_witnessed=by_shift[shift],
            num_drafted=by_shift[shift] - _num_matched(needs, self._rows, shift),
        )

    def _step(self) -> None:
        self._now += 1
        self._asked.clear()

    def _give(self, given: Counter[int]) -> None:
        """Note that so many of each token were with the model by now."""
        for token, num in given.items():
            if token != self._mask:
                times = self._deadlines[token]
                times += [self._now] * (num - len(times))

    def _charge(self, rows: Sequence[Sequence[int]], of_prompts: Sequence[Sequence[bool]]) -> None:
        """Contexts hold these tokens of the prompt by now; several may be reading the same."""
        read: Counter[int] = Counter()
        for row, of_prompt in zip(rows, of_prompts, strict=True):
            read |= Counter(token for token, is_of in zip(row, of_prompt, strict=True) if is_of)
        self._unread -= read

    def _given_behind(
        self, row: Sequence[int], of_prompt: Sequence[bool], at: int, last: GivenBehind = NOTHING
    ) -> GivenBehind:
        """What the model was given behind a position; a mask is nothing."""
        if at + 1 >= len(row):
            return last
        return NOTHING if row[at + 1] == self._mask else ((row[at + 1],), of_prompt[at + 1])

    def _verify(self, rows: Sequence[tuple[GivenBehind, tuple[int, ...]]]) -> bool:
        """Note what rows that follow each other may witness; whether all that was given behind them was likely."""
        for (behind, is_of_prompt), tops in rows:
            if is_of_prompt:
                continue
            likely = [token for token in behind if token in tops]
            if not behind:
                self._rows.append(_Row(self._now, tops))
            elif likely:
                self._rows.append(_Row(self._now, (*likely, tops[0])))
            else:
                self._rows.append(_Row(self._now, tops))
                return False
        return True


def _host_rows(ids_BS: Tensor, lengths: Lengths) -> list[list[int]]:
    rows: list[list[int]] = ids_BS.tolist()
    if lengths is None:
        return rows
    return [row[: int(length)] for row, length in zip(rows, lengths, strict=True)]


def _tops(logits_NV: Tensor) -> list[tuple[int, ...]]:
    """The likeliest tokens behind every position, the likeliest first."""
    return [tuple(likeliest) for likeliest in logits_NV.topk(min(LIKELIEST, logits_NV.shape[-1])).indices.tolist()]


def _tops_of_rows(logits_BNV: Tensor) -> list[list[tuple[int, ...]]]:
    """The same for the positions of several rows."""
    found = logits_BNV.topk(min(LIKELIEST, logits_BNV.shape[-1])).indices.tolist()
    return [[tuple(likeliest) for likeliest in row] for row in found]


def _charged(row: Sequence[int], prompt: Counter[int]) -> list[bool]:
    """Which tokens of a row are the prompt's: the first ones, as many of each as it has; these are taken from it."""
    found = []
    for token in row:
        is_of = prompt[token] > 0
        prompt[token] -= is_of
        found.append(is_of)
    return found


def _num_matched(needs: Sequence[_Need], rows: Sequence[_Row], shift: int) -> int:
    """The most tokens that find a row each, in time and at their place moved by ``shift``: augmenting paths."""
    holding: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        for token in dict.fromkeys(row.tokens):
            holding[token].append(number)
    taken: dict[int, int] = {}  # row -> need
    own: dict[int, int] = {}  # need -> row
    closed: set[int] = set()  # rows from which no free one was reached: none ever will be
    for need in range(len(needs)):
        closed.update(_augment(need, needs, rows, shift, holding, taken, own, closed))
    return len(own)


def _augment(
    need: int,
    needs: Sequence[_Need],
    rows: Sequence[_Row],
    shift: int,
    holding: dict[int, list[int]],
    taken: dict[int, int],
    own: dict[int, int],
    closed: Collection[int],
) -> Collection[int]:
    """Find the need a row, others giving way; where there is none, the rows that were looked at in vain."""
    came: dict[int, int] = {}  # row -> the need from which it was reached
    waiting = [need]
    while waiting:
        one = waiting.pop()
        wanted = needs[one]
        for row in holding.get(wanted.token, ()):
            if row in came or row in closed or rows[row].when >= wanted.before:
                continue
            if rows[row].place not in (None, wanted.place + shift):
                continue
            came[row] = one
            if row not in taken:
                _take(row, came, taken, own)
                return ()
            waiting.append(taken[row])
    return came.keys()


def _take(row: int, came: dict[int, int], taken: dict[int, int], own: dict[int, int]) -> None:
    """Give every need on the path to a free row the row that it was reached by."""
    at: int | None = row
    while at is not None:
        need = came[at]
        before = own.get(need)
        taken[at], own[need] = need, at
        at = before
