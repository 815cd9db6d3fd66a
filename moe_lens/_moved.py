"""Modules under the names that they had before: they import for one release, with a warning.

A name that a package has taken over (`moe_lens.model.cache`) hands on what the module of that name held.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "moe_lens."

MOVED = {
    "cli.config": "cli.config_file",
    "cli.loading": "cli.model_loading",
    "cli.working": "cli.study_command",
    "data.batches": "data.token_batches",
    "data.given": "data.as_domains",
    "data.presets": "data.paper_presets",
    "data.specs": "data.domain_specs",
    "data.tables": "data.in_memory",
    "interventions.attribution_paths": "interventions.attribution_gradients",
    "interventions.means": "interventions.expert_means",
    "interventions.replacing": "interventions.ablation_values",
    "interventions.selecting": "interventions.rerouting",
    "interventions.stacked": "interventions.batched_variants",
    "interventions.tracing": "interventions.causal_tracing",
    "lenses.base": "lenses.lens",
    "lenses.divergence": "lenses.tuned_loss",
    "lenses.geometry": "lenses.router_directions",
    "lenses.logit": "lenses.logit_lens",
    "lenses.reading": "lenses.metrics",
    "lenses.result": "lenses.lens_result",
    "lenses.routing_attribution": "lenses.router_attribution",
    "lenses.streams": "lenses.token_rows",
    "lenses.tuned": "lenses.tuned_lens",
    "lenses.tuning": "lenses.training_summary",
    "lenses.vocabulary": "lenses.expert_writing",
    "model.adapter": "model.hooks.adapter",
    "model.attribution": "model.cache.logit_attribution",
    "model.bridge": "model.hooks.forward",
    "model.bypass": "model.experts.nonstandard_experts",
    "model.caching": "model.cache.caching_hook",
    "model.checkpoint": "model.loading.checkpoint",
    "model.components": "model.hooks.components",
    "model.contract": "model.experts.expert_weights_view",
    "model.deepseek": "model.families.deepseek",
    "model.deepseek_config": "model.families.deepseek_config",
    "model.experts.elsewhere": "model.experts.offloaded_experts",
    "model.family": "model.families.family",
    "model.generic": "model.hooks.generic_adapter",
    "model.hook_cache": "model.cache.hook_cache",
    "model.hook_table": "model.hooks.hook_table",
    "model.hooks.bridge": "model.hooks.forward",
    "model.hooks.held_tokens": "model.hooks.key_value_padding",
    "model.hooks.key_value_cache": "model.hooks.cache_names",
    "model.info": "model.loading.model_info",
    "model.layer_hooks": "model.hooks.layer_hooks",
    "model.loading.formats.blocks": "model.loading.formats.bitsandbytes",
    "model.loading.formats.compressed": "model.loading.formats.compressed_tensors",
    "model.loading.formats.floats": "model.loading.formats.fp8_mxfp4",
    "model.loading.formats.words": "model.loading.formats.gptq_awq",
    "model.loading.memory_plan": "model.loading.device_map",
    "model.loading.packed_tensors": "model.loading.lazy_parameters",
    "model.loading.placement": "model.loading.dispatch",
    "model.loading.stored_names": "model.loading.key_mapping",
    "model.loading.streaming": "model.loading.load_streamed",
    "model.loading.whole_state": "model.loading.state_dict",
    "model.moe_block": "model.hooks.moe_block",
    "model.packing": "model.loading.lazy_parameters",
    "model.parameters": "model.experts.layer_parameters",
    "model.refusals": "model.families.refusals",
    "model.replay": "model.hooks.block_replay",
    "model.router": "model.hooks.router",
    "model.saving": "model.loading.saving",
    "model.scaling": "model.hooks.scaling",
    "model.selfcheck": "model.hooks.self_check",
    "model.sharding": "model.loading.validate",
    "model.sum_cache": "model.cache.sum_cache",
    "model.tokenizer": "model.loading.tokenizer",
    "model.wrappable": "model.loading.validate",
    "pruning.card": "pruning.model_card",
    "pruning.expert_averages": "pruning.weight_matching",
    "pruning.formats": "pruning.checkpoint_formats",
    "pruning.job": "pruning.prune_job",
    "report.collect": "report.run_report",
    "report.files": "report.report_files",
    "report.page": "report.report_page",
    "report.paper": "report.published_numbers",
    "report.pruning": "report.pruning_page",
    "report.saved": "report.report_page",
    "report.study_page": "report.report_page",
    "stats.batch": "stats.routed_batch",
    "stats.best": "stats.top_rows",
    "stats.domains": "stats.domain_tests",
    "stats.exchange": "stats.source_permutation",
    "stats.importance": "stats.importance_scores",
    "stats.information": "stats.information_given_token",
    "stats.live": "stats.observation",
    "stats.load": "stats.load_evenness",
    "stats.means": "stats.activation_means",
    "stats.nulls": "stats.null_routing",
    "stats.pairs": "stats.expert_pairs",
    "stats.parts": "stats.sums",
    "stats.prediction": "stats.domain_prediction",
    "stats.resampling": "resampling",
    "stats.routing": "stats.routing_stats",
    "stats.similarity": "stats.ensemble_similarity",
    "stats.unit_signs": "stats.sign_flip_test",
    "stats.vocabulary": "stats.vocabulary_specialisation",
    "studies.ensemble": "studies.single_expert_study",
    "studies.folder": "studies.study_folder",
    "studies.memory": "studies.batch_halving",
    "studies.model": "studies.model_facts",
    "studies.result": "studies.study_result",
    "studies.running": "studies.forward_passes",
    "studies.texts": "studies.texts_read",
    "studies.variants": "studies.variant_losses",
    "studies.verdict_bounds": "studies.verdict_answers",
    "studies.verdict_rules": "studies.paper_claims",
    "viz.similarity": "viz.single_expert",
    "viz.text": "viz.token_text",
    "viz.text_routing": "viz.circuitsvis_views",
    "viz.tokens": "viz.coloured_tokens",
}
"""From a module's former name to its present one, both below `moe_lens`."""


class FormerName(MetaPathFinder, Loader):
    """Imports a module of today under its former name: one module, two entries in `sys.modules`."""

    def find_spec(self, fullname: str, *_: Any, **__: Any) -> ModuleSpec | None:
        """A spec for the former names, nothing for all others."""
        if fullname.startswith(PACKAGE) and fullname.removeprefix(PACKAGE) in MOVED:
            return ModuleSpec(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today."""
        now = PACKAGE + MOVED[spec.name.removeprefix(PACKAGE)]
        _warn(spec.name, now)
        module = importlib.import_module(now)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; the import system has just written the former spec into it."""
        module.__spec__ = self._spec


def handed_on(package: str, module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package that stands where a module was: it looks names up in that module, and warns."""

    def look_up(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = importlib.import_module(module)
        if not hasattr(found, name):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{module}.{name}")
        return getattr(found, name)

    return look_up


def renamed(package: str, names: Mapping[str, str], others: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """A `__getattr__` for a package some of whose names are others now, from the former one to today's.

    Args:
        package: Its `__name__`.
        names: From former to today's.
        others: The `__getattr__` for all other names, if the package has one.
    """

    def look_up(name: str) -> Any:
        if name not in names:
            if others is not None:
                return others(name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{package}.{names[name]}")
        return getattr(importlib.import_module(package), names[name])

    return look_up


def _warn(former: str, now: str) -> None:
    text = f"{former} is now {now}; the former name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


sys.meta_path.append(FormerName())
