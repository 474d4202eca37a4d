"""Import paths from before the rooms were moved. They still work, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "twotower_eval."
# Old path below the package -> where its names are now, the first that has one; the longest old path counts.
HOMES: dict[str, tuple[str, ...]] = {
    "calibration": ("analyse.calibration",),
    "claims": ("analyse.claims",),
    "claims.estimates": ("analyse.claims.match",),
    "claims.gates": ("analyse.compare.gates",),
    "claims.missing": ("analyse.claims.looks",),
    "claims.reading": ("analyse.claims.terms",),
    "claims.reasons": ("analyse.claims.ruling",),
    "closing": ("store.journal",),
    "comparability": ("store.resume",),
    "datafiles": ("measure.suites.datafiles",),
    "decoders": ("engine.decoders", "engine.scorers"),
    "decoders.commit": ("engine.decoders.block_diffusion",),
    "decoders.denoiser_likelihood": ("engine.scorers.likelihood",),
    "decoders.finish": ("engine.decoders.rows",),
    "decoders.mock_ar": ("engine.decoders.autoregressive",),
    "decoders.prefixes": ("engine.scorers.pieces",),
    "environment": ("store.environment",),
    "evidence": ("analyse.compare",),
    "evidence.alike": ("analyse.compare.tradeoff",),
    "evidence.alone": ("analyse.compare.runs",),
    "evidence.counts": ("analyse.compare.figures",),
    "evidence.degenerate": ("analyse.compare.clean",),
    "evidence.measured": ("analyse.compare.figures",),
    "evidence.naming": ("analyse.compare.points",),
    "evidence.nulls": ("analyse.compare.fairness",),
    "evidence.numbers": ("analyse.compare.figures",),
    "evidence.pairing": ("analyse.compare.quality",),
    "evidence.pareto": ("analyse.compare.tradeoff",),
    "evidence.samples": ("analyse.compare.documents",),
    "evidence.scale": ("analyse.compare.sizing",),
    "evidence.truncation": ("analyse.compare.documents",),
    "harness": ("measure.harness",),
    "harness.aggregates": ("measure.harness.scoring",),
    "harness.known": ("measure.harness.jobs",),
    "journal": ("store.journal",),
    "json_text": ("strict",),
    "miniature.batches": ("miniature.blocks",),
    "miniature.english": ("miniature.corpus",),
    "miniature.task_files": ("miniature.evaluate",),
    "miniature.tokenizer": ("miniature.export",),
    "models": ("engine.models", "engine.models.protocol"),
    "models.derived": ("engine.models.weights",),
    "models.direct": ("engine.models.weights",),
    "models.fixed": ("engine.models.graphs",),
    "models.initial": ("engine.models.nemotron_h",),
    "models.named_lengths": ("engine.models.probes",),
    "models.precision": ("engine.models.probes",),
    "models.prompts": ("engine.models.tokenizer",),
    "models.random_weights": ("measure.sizing.pairs",),
    "models.routing": ("measure.sizing.pairs", "records", "engine.models.config"),
    "models.sizes": ("engine.models.config",),
    "models.token_tree": ("engine.models.context",),
    "models.transformers_context": ("engine.models.transformers_model",),
    "models.transformers_tree": ("engine.models.transformers_model",),
    "ops": ("engine.ops",),
    "ops.conv": ("engine.ops.mamba",),
    "ops.fused.overlap": ("engine.ops.fused.product",),
    "ops.fused.router": ("engine.ops.fused.experts",),
    "plan_command": ("analyse.report.provenance",),
    "report": ("analyse.report",),
    "report.columns": ("analyse.report.text",),
    "report.flips": ("analyse.report.answers",),
    "report.headline": ("analyse.report.verdicts",),
    "report.others": ("analyse.report.quality_frames",),
    "report.scale": ("analyse.report.sizing",),
    "report.section": ("analyse.report.text",),
    "report.traces": ("analyse.report.answers",),
    "report.training": ("analyse.report.provenance",),
    "shortfalls": ("rules",),
    "speed": ("measure.speed",),
    "speed.captures": ("measure.speed.conditions",),
    "speed.configs": ("measure.sizing.run", "names"),
    "speed.cost_card": ("measure.sizing.card",),
    "speed.items": ("measure.sizing.items",),
    "speed.loop": ("measure.speed.session",),
    "speed.parts": ("measure.sizing.card",),
    "speed.phases": ("measure.speed.costs",),
    "speed.probe": ("measure.speed.conditions", "measure.speed.probes"),
    "speed.profiles": ("measure.sizing.items",),
    "speed.rounds": ("measure.speed.launches",),
    "speed.scale": ("measure.sizing.run",),
    "stats": ("analyse.stats",),
    "stats.figure": ("analyse.stats.intervals",),
    "stats.flips": ("analyse.stats.paired",),
    "stats.functions": ("analyse.stats.aggregates",),
    "stats.granularity": ("analyse.stats.power",),
    "stats.mean": ("analyse.stats.chance",),
    "stats.nulls": ("analyse.stats.decide",),
    "stats.scaling": ("analyse.compare.sizing",),
    "suites": ("measure.suites",),
    "suites.chance": ("measure.suites.documents",),
    "suites.files": ("measure.suites.groups",),
    "verify": ("measure.verify",),
    "verify.batches": ("measure.verify.checks",),
    "verify.decoding": ("measure.verify.checks",),
    "verify.finding": ("measure.verify.checks",),
    "verify.numerics": ("measure.verify.checks",),
    "verify.prompts": ("measure.verify.run",),
    "ways": ("rules",),
}
# Names that are others now, by their old path below the package.
RENAMED = {
    "comparability.differences": "what_differs",
    "comparability.warnings": "what_to_note",
    "models.BranchingModel": "Branching",
    "models.CausalModel": "Model",
    "models.TwoTowerModel": "Denoising",
}


def homes_of(name: str) -> tuple[str, ...]:
    """Full new paths of an old one, those that there are; nothing for a path that was never moved.

    >>> homes_of("twotower_eval.stats.paired")
    ('twotower_eval.analyse.stats.paired',)
    """
    below = name.removeprefix(PACKAGE)
    if below == name:
        return ()
    old = max((old for old in HOMES if f"{below}.".startswith(f"{old}.")), key=len, default=None)
    homes = () if old is None else tuple(PACKAGE + home + below[len(old) :] for home in HOMES[old])
    return tuple(home for home in homes if _is_there(home))


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent of it is no package
        return False


class MovedFinder(MetaPathFinder):
    """Finds old paths, after all other finders have given up."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec whose module looks every name up where it is now."""
        homes = homes_of(name)
        return ModuleSpec(name, _Forwarding(homes), is_package=True) if homes else None


class _Forwarding(Loader):
    def __init__(self, homes: tuple[str, ...]) -> None:
        self._homes = homes

    def exec_module(self, module: ModuleType) -> None:
        old, homes = module.__name__, self._homes
        message = f"{old} has moved to {' and '.join(homes)}; the old path goes with version 0.2"
        warnings.warn(message, DeprecationWarning, stacklevel=2)

        def look_up(name: str) -> object:
            if name.startswith("__") and name != "__all__":  # Python asks every module, torch while it is imported
                raise AttributeError(f"module {old!r} has no attribute {name!r}")
            now = RENAMED.get(f"{old.removeprefix(PACKAGE)}.{name}", name)
            for home in map(importlib.import_module, homes):
                if hasattr(home, now):
                    return getattr(home, now)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = look_up
        module.__class__ = Room


class Room(ModuleType):
    """A room under its old path."""
