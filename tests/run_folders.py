"""Run folders as stages leave them, without the run."""

from __future__ import annotations

import json
from pathlib import Path

ENTRY = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 10}


def write_run(folder: Path, stage: str, result: dict | None = None, **files: list[dict]) -> Path:
    """A run folder: finished where there is a result; `files` are JSONL files by name, `_` for `-`."""
    folder.mkdir(parents=True)
    status = "running" if result is None else "finished"
    manifest = {
        "stage": stage,
        "status": status,
        "seed": 3,
        "settings": {},
        "started": f"2026-11-26T10:00:{len(stage)}",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if result is not None:
        full = {"stage": stage, "time_seconds": 75.0, "peak_memory_gb": 1.5, **result}
        (folder / "result.json").write_text(json.dumps(full))
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name.replace('_', '-')}.jsonl").write_text(text)
    return folder


def policy_figures() -> dict:
    names = ("helpfulness", "safety", "reward", "reward_gain", "kl", "win_rate", "safety_win_rate", "violation_rate",
             "refusal_rate", "false_refusal_rate")  # fmt: skip
    return {**dict.fromkeys(names, ENTRY), "truncated_rate": 0.25, "mean_words": 12.0}
