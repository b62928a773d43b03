"""Where models come from, read off their files without loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from alignment.adapters import fingerprint
from alignment.demo_model import DEMO_MODEL
from alignment.errors import ModelError
from alignment.model_folders import model_folder
from alignment.models import ADAPTER_FOLDER
from alignment.plan.shapes import meta_model, spec_of
from alignment.sources import cache_dir, find_model
from alignment.weight_files import read_weight, weight_files


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: `shape` names its architecture, `base` the weights that its adapter belongs on.

    `rank` is that of all adapters merged into it since.
    """

    shape: str
    base: str
    rank: int = 0


def origin_on_disk(name: str) -> Origin | None:
    """What a finished run's model was made from, as far as its adapter says so."""
    try:
        folder = find_model(name)
    except ModelError:
        return None
    weights = folder / ADAPTER_FOLDER / "adapter_model.safetensors" if isinstance(folder, Path) else None
    if weights is None or not weights.is_file():
        return None
    with safe_open(weights, framework="pt") as file:
        ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
        return Origin(str(folder), (file.metadata() or {}).get("backbone", str(folder)), max(ranks, default=0))


def known_base(base: str) -> str:
    """The fingerprint of the weights that are named so, where they are on this machine; else the name."""
    if base == DEMO_MODEL and not (cache_dir() / DEMO_MODEL).is_dir():
        return base  # planning fetches nothing
    try:
        folder = model_folder(base)
    except ModelError:
        return base
    files = weight_files(folder) if isinstance(folder, Path) else {}
    names = [name for name, _ in meta_model(spec_of(base)).get_decoder().named_parameters()] if files else []
    prefix = next((key.removesuffix(names[0]) for key in files if names and key.endswith(names[0])), "")
    if not names or any(prefix + name not in files for name in names):
        return base
    return fingerprint((name, read_weight(files[prefix + name], prefix + name)) for name in names)
