"""Suites and tasks: which documents and requests a name stands for, the same for every model."""

from twotower_eval.measure.suites.asked import Decoding, DecodingRequest, read_decoding_request, settings_text, settle
from twotower_eval.measure.suites.build import BuiltTask, TimedPrompt, build_requests, resolve_tasks
from twotower_eval.measure.suites.documents import (
    DEFAULT_MAX_NEW_TOKENS,
    FEWSHOT_SEED,
    BuiltDoc,
    instance_sha256,
    stops_and_budget,
)
from twotower_eval.measure.suites.groups import Suite, SuiteTask, load_suite, suite_names
from twotower_eval.measure.suites.included import Included, read_included
from twotower_eval.measure.suites.lm_tasks import LACKING, MISTAKEN, aggregation, aggregation_name, is_lacking, needing
from twotower_eval.measure.suites.selection import select

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "FEWSHOT_SEED",
    "LACKING",
    "MISTAKEN",
    "BuiltDoc",
    "BuiltTask",
    "Decoding",
    "DecodingRequest",
    "Included",
    "Suite",
    "SuiteTask",
    "TimedPrompt",
    "aggregation",
    "aggregation_name",
    "build_requests",
    "instance_sha256",
    "is_lacking",
    "load_suite",
    "needing",
    "read_decoding_request",
    "read_included",
    "resolve_tasks",
    "select",
    "settings_text",
    "settle",
    "stops_and_budget",
    "suite_names",
]
