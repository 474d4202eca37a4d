"""Run folders: the only place where measuring and analysing meet."""

from twotower_eval.store.journal import MANIFEST, TRAINING_LOG
from twotower_eval.store.resume import (
    RunWriter,
    check_comparable,
    check_unedited,
    create,
    new_run_id,
    resume,
)
from twotower_eval.store.run import (
    EVENTS,
    FILES,
    JOURNALS,
    OfCell,
    Row,
    Run,
    find_runs,
    is_closed,
    load,
    paused_garbage_collection,
    read_manifest,
    unreadable_runs,
)

__all__ = [
    "EVENTS",
    "FILES",
    "JOURNALS",
    "MANIFEST",
    "TRAINING_LOG",
    "OfCell",
    "Row",
    "Run",
    "RunWriter",
    "check_comparable",
    "check_unedited",
    "create",
    "find_runs",
    "is_closed",
    "load",
    "new_run_id",
    "paused_garbage_collection",
    "read_manifest",
    "resume",
    "unreadable_runs",
]
