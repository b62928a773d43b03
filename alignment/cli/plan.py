"""`align plan`: memory and time of every stage of a configuration or pipeline on a device, from shapes alone."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.cli.pipeline import load_pipeline
from alignment.cli.plan_advice import advice
from alignment.cli.plan_stages import plan_stage
from alignment.cli.planner import Planner
from alignment.cli.stages import STAGES
from alignment.cli.summary import clock
from alignment.config import StageConfig, build_config, merge, parse_overrides, read_yaml
from alignment.errors import ConfigError
from alignment.plan.devices import find_device
from alignment.plan.origins import Origin, origin_on_disk
from alignment.plan.phases import KINDS, StagePlan
from alignment.plan.training import Setting

# What a stage needs to be told but its memory does not depend on.
_PLACEHOLDERS: Mapping[str, Any] = {
    "run": {"dir": "runs/plan"},
    "data": {"train": "not-read.jsonl"},
    "prompts": {"prompts": "not-read.jsonl"},
    "kind": "helpfulness",
}


def plan_command(
    path: Path | None,
    stage: str | None,
    overrides: Sequence[str],
    *,
    gpu: str,
    gpus: int,
    fsdp: bool,
    utilisation: float,
    as_json: bool,
) -> None:
    """Prints the plan. Raises ConfigError and ModelError."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation}: it is a share of the device's peak, above 0 and at most 1.")
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least one.")
    device = find_device(gpu).shared(gpus)
    if fsdp and (device.kind == "cpu" or gpus == 1):
        raise ConfigError("--fsdp splits models over several accelerators. Give --gpus N and a --gpu other than cpu.")
    setting = Setting(device, processes=gpus, fsdp=fsdp, utilisation=utilisation)
    configs, origins = load_stages(path, stage, overrides)
    planner = Planner(setting, origins)
    plans = [plan_stage(config, name, planner) for name, config in configs.items()]
    tips = {
        plan.name: advice(config, plan, planner)
        for plan, config in zip(plans, configs.values(), strict=True)
        if not plan.fits
    }
    if as_json:
        found = [{**plan.to_json(), "advice": tips.get(plan.name, [])} for plan in plans]
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        print_plans(plans, tips, setting)


def load_stages(
    path: Path | None, stage: str | None, overrides: Sequence[str]
) -> tuple[dict[str, StageConfig], dict[str, Origin]]:
    """The stages to plan by name, and what the run directories that they read hold. Data and models are not looked for.

    Raises ConfigError where settings are wrong, or it is not clear whose they are.
    """
    values = read_yaml(path) if path is not None else {}
    if "stages" in values:
        if stage:
            raise ConfigError(f"{path}: is a pipeline, of which all stages are planned. Leave {stage} out.")
        found = load_pipeline(path, overrides, check_inputs=False)
        configs = {each.name: each.config for each in found.stages}
    else:
        values = merge(values, parse_overrides(overrides))
        name = stage or _stage_of(values, path)
        configs = {name: _config(name, values, str(path or "command line"))}
    origins: dict[str, Origin] = {}
    for config in configs.values():
        for _, model, kind in config.input_names():
            if kind == "model" and model not in origins and (origin := origin_on_disk(model)):
                origins[model] = origin
        if config.stage in ("sft", "rm", "ppo"):
            made = _made(config, origins.get(config.model.path))
            origins |= {config.run.dir: made, f"{config.run.dir}/model": made}
    return configs, origins


def _made(config: Any, start: Origin | None) -> Origin:
    """What a stage that trains leaves behind."""
    start = start or Origin(config.model.path, config.model.path)
    if not config.lora.r:
        return Origin(start.shape, config.run.dir)
    return Origin(start.shape, start.base, start.rank + config.lora.r)


def _stage_of(values: Mapping[str, Any], path: Path | None) -> str:
    """The one stage whose settings these can be."""
    fitting = []
    for name in STAGES:
        try:
            _config(name, values, "")
        except ConfigError:
            continue
        fitting.append(name)
    if len(fitting) != 1:
        where = str(path or "command line")
        could = f"These settings could be those of {', '.join(fitting)}." if fitting else "No stage has such settings."
        raise ConfigError(f"{where}: {could} Name the stage: align plan ppo ...; its own errors are then shown.")
    return fitting[0]


def _config(stage: str, values: Mapping[str, Any], where: str) -> StageConfig:
    """Settings with placeholders for what is not planned with."""
    if stage not in STAGES:
        raise ConfigError(f"{stage}: no such stage. Use one of {', '.join(STAGES)}.")
    kind = values.get("kind")
    cls = STAGES[stage].of_kind(kind).config_class()
    filled = {key: value for key, value in _PLACEHOLDERS.items() if key in cls.model_fields}
    if stage == "eval":
        filled.pop("kind")
    if shape := _policy(values):
        if "rewards" in cls.model_fields:
            filled["rewards"] = _unnamed(values.get("rewards"), shape)
        if "safety" in cls.model_fields and "safety" not in values:
            filled["safety"] = shape
    return build_config(cls, merge(filled, values), where, check_inputs=False)


def _policy(values: Mapping[str, Any]) -> str | None:
    """The path of the stage's model, or of its first policy."""
    policies = values.get("policies")
    model = values.get("model") or (next(iter(policies.values()), None) if isinstance(policies, Mapping) else None)
    return model.get("path") if isinstance(model, Mapping) else model


def _unnamed(rewards: Any, shape: str) -> dict[str, str]:
    """The policy's shape for each reward model that is not named."""
    named = rewards if isinstance(rewards, Mapping) else {}
    return {kind: shape for kind in ("helpfulness", "safety") if kind not in named}


def print_plans(plans: Sequence[StagePlan], tips: Mapping[str, Sequence[str]], setting: Setting) -> None:
    """A table of peaks by kind of memory, the stages that do not fit with what to change, and what was assumed."""
    device, share = setting.device, setting.utilisation
    # A pipe gets lines as long as they come.
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    copies = f"{setting.processes} x " if setting.processes > 1 else ""
    shown = [kind for kind in KINDS if any(plan.worst.parts.get(kind) for plan in plans)]
    title = f"{copies}{device.name}, {device.memory / 1e9:.0f} GB each: one device at its peak, in GB of 1e9 bytes"
    table = Table("stage", "peak in", *(kind.replace("_", " ") for kind in shown), "peak", "", title=title)
    table.title_justify = "left"
    table.add_column("time")
    for plan in plans:
        cells = [f"{size / 1e9:.2f}" if (size := plan.worst.parts.get(kind, 0)) else "" for kind in shown]
        verdict = "fits" if plan.fits else "too much"
        table.add_row(plan.name, plan.worst.name, *cells, f"{plan.peak / 1e9:.2f}", verdict, _time(plan))
    console.print(table)
    tera, dtype = device.flops / 1e12, str(device.dtype).removeprefix("torch.")
    console.print(
        f"Times are those of {share:.0%} of {tera:.3g} TFLOP/s ({dtype}) and {device.bandwidth / 1e12:.3g} TB/s, with "
        "every row as long as it may be: an upper bound of the work, not a measurement."
    )
    if device.kind == "gpu":
        console.print("On a GPU nothing of this has been measured; on CPU it is checked by benchmarks/plan.py.")
    else:
        console.print(
            "It is what tensors need. align keeps freed memory for speed: gaps may take as much again as activations."
        )
    for plan in plans:
        console.print(f"{plan.name}: {'; '.join(plan.notes)}")
    for plan in plans:
        if not plan.fits:
            console.print(f"\n{plan.name} does not fit: {plan.worst.name} needs {plan.peak / 1e9:.1f} GB of "
                          f"{device.memory / 1e9:.0f}.", style="bold")  # fmt: skip
            for tip in tips[plan.name]:
                console.print(f"  {tip}")


def _time(plan: StagePlan) -> str:
    unit = f"{_seconds(plan.unit_seconds)} / {plan.unit}"
    return unit if plan.seconds is None or plan.units == 1 else f"{unit}, {_seconds(plan.seconds)} in all"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{clock(seconds)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
