"""What is read of sequences with common beginnings: everything that is asked for, the shared part once."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval.engine.models.context import (
    LEAST_SHARED,
    Branch,
    Segment,
    branches,
    logits_by_rows,
    walk,
)
from twotower_eval.engine.scorers.likelihood import CausalScorer
from twotower_eval.engine.scorers.pieces import Chunk, PathContexts, Row, ScoreRequest, ending_where_wanted, plan

Tokens = tuple[int, ...]


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Rows over two tokens, so that much is shared; some made by going on from an earlier one."""
    made: list[Row] = []
    for _ in range(draw(st.integers(0, 12))):
        start = draw(st.sampled_from([(), *(row.tokens for row in made)]))
        tokens = (*start, *draw(st.lists(st.integers(0, 1), max_size=14)))
        wanted = draw(st.sets(st.integers(-1, len(tokens) - 1), min_size=1))
        made.append(Row(tokens, tuple(sorted(wanted))))
    return made


def prefixes_of(segments: Sequence[Segment], path: Tokens) -> list[Tokens]:
    """What stands before each result of a chunk, the path's own first."""
    whole: list[Tokens] = []
    results = [path]
    for segment in segments:
        before = whole[segment.parent] if segment.parent >= 0 else path
        whole.append(before + segment.tokens)
        results += [before + segment.tokens[: at + 1] for at in segment.wanted]
    return results


def joined(path: Sequence[Tokens]) -> Tokens:
    return tuple(token for tokens in path for token in tokens)


def num_tokens(chunk: Chunk) -> int:
    return sum(len(segment.tokens) for segment in chunk.segments)


def distinct_prefixes(sequences: Sequence[Tokens]) -> int:
    return len({tokens[:end] for tokens in sequences for end in range(1, len(tokens) + 1)})


@given(rows(), st.integers(1, 40))
def test_every_row_is_answered_once_by_what_stands_before_it(given_rows: list[Row], max_tokens: int) -> None:
    chunks = plan(given_rows, max_tokens)
    assert sorted(index for chunk in chunks for index in chunk.places) == list(range(len(given_rows)))
    for chunk in chunks:
        results = prefixes_of(chunk.segments, joined(chunk.path))
        for index, places in chunk.places.items():
            row = given_rows[index]
            assert [results[place] for place in places] == [row.tokens[: at + 1] for at in row.wanted]


@given(rows(), st.integers(1, 40))
def test_a_chunk_is_small_and_reads_no_token_twice(given_rows: list[Row], max_tokens: int) -> None:
    for chunk in plan(given_rows, max_tokens):
        members = [given_rows[index].tokens for index in chunk.places]
        below = [tokens[len(joined(chunk.path)) :] for tokens in members]
        assert num_tokens(chunk) == distinct_prefixes(below)
        assert num_tokens(chunk) <= max_tokens or len({tokens for tokens in below if tokens}) == 1
        assert all(segment.tokens and segment.parent < at for at, segment in enumerate(chunk.segments))


@given(rows())
def test_what_fits_is_one_chunk(given_rows: list[Row]) -> None:
    chunks = plan(given_rows, 10_000)
    assert len(chunks) == bool(given_rows)
    assert all(chunk.path == () for chunk in chunks)


class Recall:
    """A model whose contexts are their tokens and whose logits depend on all of them. Counts what it reads."""

    vocab_size = 7
    branch_tokens = 0

    def __init__(self) -> None:
        self.num_read = 0

    def logits(self, tokens: Tokens) -> torch.Tensor:
        return torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(hash(tokens) % 2**31))

    def prefill(self, ids_BS: torch.Tensor, lengths: Any = None) -> "Known":
        self.num_read += ids_BS.numel()
        return Known([tuple(row) for row in ids_BS.tolist()])

    def extend(self, context: "Known", ids_BK: torch.Tensor, lengths: Any = None) -> "Known":
        lengths = lengths or [ids_BK.shape[1]] * ids_BK.shape[0]
        self.num_read += sum(lengths)
        rows = zip(context.rows, ids_BK.tolist(), lengths, strict=True)
        return Known([known + tuple(new[:length]) for known, new, length in rows])

    def next_logits(self, context: "Known") -> torch.Tensor:
        return torch.stack([self.logits(row) for row in context.rows])

    def extend_logits(self, context: "Known", ids_BK: torch.Tensor, lengths: Any, wanted: Any) -> Any:
        extended = self.extend(context, ids_BK, lengths)
        starts = [len(row) for row in context.rows]
        found = [self.logits(extended.rows[row][: starts[row] + column + 1]) for row, column in wanted]
        return extended, torch.stack(found) if found else torch.empty(0, self.vocab_size)

    def tree_logits(self, context: "Known | None", segments: Sequence[Segment]) -> torch.Tensor:
        return logits_by_rows(self, context or Known([()]), segments)


class Known:
    def __init__(self, rows: list[Tokens]) -> None:
        self.rows = rows

    def select(self, positions: Sequence[int]) -> "Known":
        return Known([self.rows[position] for position in positions])


@given(rows(), st.integers(1, 40))
def test_rows_read_level_by_level_give_every_result_in_order(given_rows: list[Row], max_tokens: int) -> None:
    model = Recall()
    for chunk in plan(given_rows, max_tokens):
        path = joined(chunk.path)
        found = logits_by_rows(model, Known([path]), chunk.segments)
        wanted = [model.logits(prefix) for prefix in prefixes_of(chunk.segments, path)[1:]]
        assert torch.equal(found, torch.stack(wanted) if wanted else found[:0])


@given(rows(), st.integers(1, 40), st.integers(1, 3))
def test_contexts_stand_behind_every_wanted_position(given_rows: list[Row], max_tokens: int, max_rows: int) -> None:
    model = Recall()
    for chunk in plan(given_rows, max_tokens):
        seen: dict[int, Tokens] = {}

        def read(chosen: Any, ids: torch.Tensor, lengths: Any, read_rows: Sequence[Branch], seen: Any = seen) -> Any:
            extended = model.extend(chosen, ids, lengths)
            for row, branch in enumerate(read_rows):
                assert [at for at, _ in branch.wanted] in ([], [len(branch.tokens) - 1])
                seen.update((result + 1, extended.rows[row]) for _, result in branch.wanted)
            return extended

        cut = ending_where_wanted(chunk.segments)
        walk(Known([joined(chunk.path)]), branches(cut, contexts=True), read, max_rows=max_rows)
        results = prefixes_of(chunk.segments, joined(chunk.path))
        assert seen == dict(enumerate(results[1:], start=1))


def test_short_inner_segments_are_read_by_their_children() -> None:
    """A pass for a token or two costs more than the tokens."""
    short = Segment(-1, (1,) * (LEAST_SHARED - 1), (0,))
    long = Segment(-1, (2,) * LEAST_SHARED, (0,))
    leaves = [Segment(parent, (token,), (0,)) for parent in (0, 1) for token in (3, 4)]
    first, second, third = branches([short, long, *leaves])
    assert (first.tokens, second.tokens) == ((*short.tokens, 3), (*short.tokens, 4))
    assert (first.wanted, second.wanted) == ([(0, 0), (LEAST_SHARED - 1, 2)], [(LEAST_SHARED - 1, 3)])
    assert (third.tokens, len(third.children)) == (long.tokens, 2)


SHOTS, QUESTION, OPTION = tuple(range(40)), 11, 5


def multiple_choice(num_questions: int, option: int = OPTION) -> list[ScoreRequest]:
    """Examples, then a question of its own, then four options of which two begin alike."""
    digits = [tuple(int(d) for d in f"{n:0{QUESTION}b}") for n in range(num_questions)]
    return [
        ScoreRequest(
            context_ids=tuple(t % 7 for t in SHOTS) + digits[n][::-1],
            continuation_ids=(2 + choice // 2, *((choice + n) % 7,) * (option - 1)),
        )
        for n in range(num_questions)
        for choice in range(4)
    ]


def test_examples_are_read_once_and_each_question_once() -> None:
    """However small the chunks; what rows alone would read is a multiple."""
    requests = multiple_choice(16)
    alone = Recall()
    wanted = [
        sum(float(alone.logits(r.context_ids + r.continuation_ids[:i]).log_softmax(-1)[token])
            for i, token in enumerate(r.continuation_ids))
        for r in requests
    ]  # fmt: skip
    read = [(r.context_ids + r.continuation_ids)[:-1] for r in requests]
    for max_tokens in (30, 60, 200):
        model = Recall()
        model.branch_tokens = max_tokens
        found = CausalScorer(model, "exact").score(requests)
        assert torch.allclose(torch.tensor([f.logprob_nats for f in found]), torch.tensor(wanted), atol=1e-4)
        # Besides the distinct beginnings: short inner segments, which their children read again.
        assert distinct_prefixes(read) <= model.num_read < 1.6 * distinct_prefixes(read)
        assert model.num_read < sum(map(len, read)) / 4


def test_one_letter_options_cost_one_reading_of_their_question() -> None:
    requests = multiple_choice(8, option=1)
    model = Recall()
    model.branch_tokens = 30
    CausalScorer(model, "exact").score(requests)
    assert model.num_read < len(SHOTS) + 8 * QUESTION + 8 * LEAST_SHARED


def test_contexts_along_a_path_are_kept_only_as_long_as_they_serve() -> None:
    model = Recall()
    contexts = PathContexts(model)
    assert contexts.at([]) is None
    assert contexts.at([(1, 2), (3,)]).rows == [(1, 2, 3)]
    assert contexts.at([(1, 2), (4, 5)]).rows == [(1, 2, 4, 5)]
    assert model.num_read == 2 + 1 + 2
    assert contexts.at([(1, 2)]).rows == [(1, 2)]
    assert model.num_read == 5
    assert contexts.at([(1, 2), (4, 5)]).rows == [(1, 2, 4, 5)]
    assert model.num_read == 7
