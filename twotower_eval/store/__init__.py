"""Run folders: the only place where the two halves of the house meet."""

from twotower_eval.store.publish import MANIFEST, TRAINING_LOG
from twotower_eval.store.run import EVENTS, FILES, JOURNALS, Row, Run, find_runs, load, no_collection, read_manifest
from twotower_eval.store.writer import RunWriter, check_comparable, check_unedited, create, new_run_id, resume

__all__ = [
    "EVENTS",
    "FILES",
    "JOURNALS",
    "MANIFEST",
    "TRAINING_LOG",
    "Row",
    "Run",
    "RunWriter",
    "check_comparable",
    "check_unedited",
    "create",
    "find_runs",
    "load",
    "new_run_id",
    "no_collection",
    "read_manifest",
    "resume",
]
