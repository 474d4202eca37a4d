"""Whether rows made now may join a run begun before: what two manifests say differently, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from twotower_eval.records import Arm, Cell, RunManifest
from twotower_eval.store.environment import SCORING_PACKAGES

PACKAGES_THAT_MUST_AGREE = (
    "torch",
    "transformers",
    "tokenizers",
    "lm-eval",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
)
RECORDED_LATER = tuple(name for name in SCORING_PACKAGES if name not in PACKAGES_THAT_MUST_AGREE)


def differences(old: RunManifest, new: RunManifest) -> list[str]:
    """What forbids adding rows made under ``new`` to a run begun under ``old``, in words."""
    pairs: list[tuple[str, Any, Any]] = [
        ("verb", old.verb, new.verb),
        ("twotower-eval", old.project_version, new.project_version),
        *((name, old.packages.get(name), new.packages.get(name)) for name in _packages(old)),
        ("active kernels", old.machine.get("kernels"), new.machine.get("kernels")),
    ]
    if old.verb == "run":  # what cells do not tell, or not where decoding is greedy
        pairs.append(("seed", old.plan.get("seed"), new.plan.get("seed")))
    if old.verb in ("speed", "size"):
        pairs.append(("how models are run", _flags(old), _flags(new)))
        keys = sorted(({*old.machine} | {*new.machine}) - {"kernels"})
        pairs += [(f"machine {key}", old.machine.get(key), new.machine.get(key)) for key in keys]
    found = [f"{name} was {before}, is {after}" for name, before, after in pairs if before != after]
    before, after = (float("inf") if m.plan.get("limit") is None else m.plan["limit"] for m in (old, new))
    if old.verb == "run" and after < before:  # fewer documents would close the run before it is complete
        found.append(f"limit was {old.plan.get('limit')}, is {new.plan['limit']} (it may only be raised)")
    edited = [*_file_differences(old, new), *_code_differences(old, new), *_task_differences(old, new)]
    return found + edited + _cell_differences(old, new, explained=bool(edited))


def _packages(old: RunManifest) -> tuple[str, ...]:
    """Packages whose versions must agree. Manifests of old tell of none that score beside lm-eval: nothing is known
    of these there, neither that they were installed nor that they were not."""
    later = RECORDED_LATER if any(name in old.packages for name in RECORDED_LATER) else ()
    return (*PACKAGES_THAT_MUST_AGREE, *later)


def _flags(manifest: RunManifest) -> list[tuple[object, ...]]:
    """What in the ways of its models changes how fast they are."""
    return [(ways.cached, ways.rows_together, ways.positions_passed, ways.plain_beyond) for ways in manifest.ways]


def warnings(old: RunManifest, new: RunManifest) -> tuple[str, ...]:
    """What is worth a note, though it forbids nothing: another commit, an edited checkout."""
    found = []
    if old.commit != new.commit:
        found.append(f"begun at commit {old.commit}, resumed at {new.commit}")
    if new.dirty:
        found.append("the checkout has uncommitted changes")
    return tuple(found)


def _file_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Files of either arm's checkpoint that hold something else than before."""
    arms: tuple[Arm, ...] = ("baseline", "candidate")
    for arm in arms:
        before, after = (next((c.checkpoint for c in m.cells if c.arm == arm), None) for m in (old, new))
        if before is None or after is None or before.identity == after.identity:
            continue
        pairs = [(before.files, after.files)]
        if before.digest != after.digest and not before.tower:  # the pair that it is of names the file
            pairs.append((before.weights, after.weights))
        for pair in pairs:
            then, now = ({file.name: file.sha256 for file in files} for files in pair)
            for name, done in _edits(then, now):
                yield f"{name} of the {arm} {after.name} {done}"


def _code_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Files of a plug-in decoder that hold something else than before."""
    then, now = ({cell.decoder.kind: cell.decoder.code for cell in manifest.cells} for manifest in (old, new))
    for kind in sorted(then.keys() & now.keys()):
        files = [{file.name: file.sha256 for file in code or ()} for code in (then[kind], now[kind])]
        for name, done in _edits(*files):
            yield f"{name} of the decoder {kind} {done}"


def _task_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Parts of a task that are not what they were: what it asks, or the code that makes scores of the answers."""
    for task in sorted(old.tasks.keys() & new.tasks.keys()):
        for part, done in _edits(old.tasks[task], new.tasks[task]):
            yield f"{part} of task {task!r} {done}"


def _edits(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names whose digests are not the same, and what happened to them."""
    for name in sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
        yield name, "is new" if name not in then else "is gone" if name not in now else "was changed"


def _cell_differences(old: RunManifest, new: RunManifest, *, explained: bool) -> list[str]:
    """Cells that only one of two plans has: the plans' own words where these differ, and an example, unless what made
    them others is ``explained`` already."""
    old_cells, new_cells = ({cell.id: cell for cell in manifest.cells} for manifest in (old, new))
    gone, added = (
        [have[name] for name in have if name not in lack]
        for have, lack in ((old_cells, new_cells), (new_cells, old_cells))
    )
    if not gone and not added:
        return []
    fields = sorted({*old.plan} | {*new.plan})
    told = [
        f"{name} was {_plain(old.plan.get(name))}, is {_plain(new.plan.get(name))}"
        for name in fields
        if old.plan.get(name) != new.plan.get(name)
    ]
    for cells, words in ((gone, "no longer has"), (added, "newly has")):
        if cells and not explained:
            more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
            told.append(f"the plan {words} {_cell_text(cells[0])}{more}")
    return told


def _plain(value: object) -> str:
    """A plan's value as one gives it."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_plain(inner)}" for name, inner in value.items())
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell_text(cell: Cell) -> str:
    decoder = f"{cell.decoder.label} version {cell.decoder.version}"
    return f"cell {cell.id} ({cell.arm} {cell.checkpoint.name}, {decoder}, {cell.workload.name})"
