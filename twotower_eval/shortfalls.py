"""What tasks ask for and are not given, in words for terminals and reports: overridden settings, prompts cut short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower_eval.records import Override, RunManifest, Scalar


def asked_and_not_done(manifest: RunManifest) -> list[str]:
    """All that the tasks and the checkpoints of a run ask of decoding and are not given."""
    return [*override_lines(manifest.overrides), *unheeded_lines(manifest.unheeded)]


def override_lines(overrides: Sequence[Override]) -> list[str]:
    """One line for each thing asked for, with all the tasks that ask for it."""
    tasks: dict[tuple[str, str, str], list[str]] = {}
    for one in overrides:
        held = "not done" if one.done is None else f"done with {_plain(one.done)}"
        tasks.setdefault((f"{one.setting}: {_plain(one.asked)}", held, one.option), []).append(one.task)
    return [
        f"{', '.join(names)} ask{'s' if len(names) == 1 else ''} for {asked}, {held}: --{option} overrides it"
        for (asked, held, option), names in tasks.items()
    ]


def unheeded_lines(unheeded: Mapping[str, Mapping[str, object]]) -> list[str]:
    """One line for each checkpoint whose generation settings ask for what no decoder here does."""
    return [
        f"generation_config.json of {name} asks for {', '.join(f'{key} {value}' for key, value in asked.items())}, "
        "which is not done here and would be by transformers' generate: texts are those of plain decoding"
        for name, asked in unheeded.items()
    ]


def joined_lines(manifest: RunManifest) -> list[str]:
    """One line for each task with documents that are nearly the same as others."""
    return [
        f"{task}: {num:,} document{'s are' if num > 1 else ' is'} nearly the same as others and share"
        f"{'' if num > 1 else 's'} their clusters, in which they count once"
        for task, num in manifest.joined.items()
    ]


def truncation_line(task: str, arm: str, num_requests: int | None, num_truncated: int) -> str:
    """How many of a task's requests lost the beginning of their prompt; how many there were is not always known."""
    of = "" if num_requests is None else f" of {num_requests:,}"
    were = "prompt was" if num_truncated == 1 else "prompts were"
    return f"{task}, {arm}: {num_truncated:,}{of} {were} longer than the model has room for and lost the beginning"


def _plain(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
