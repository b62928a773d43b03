"""What all tests share: no network, shapes checked at run time, tiny models and tokenizers made in process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

# Shapes written in these modules' signatures are checked in every call. Nothing above imports them, and a name
# without a module is no error.
SHAPE_CHECKED = (
    "alignment.tensor_ops",
    "alignment.prefix_batch",
    "alignment.logprobs",
    "alignment.sampling.cohort",
    "alignment.sampling.draw",
    "alignment.sampling.own_tokens",
    "alignment.sampling.prompt_cache",
    "alignment.sampling.torch_engine",
    "reward_models.losses",
    "rlhf.gating",
    "rlhf.rewards",
    "rlhf.advantages",
    "rlhf.losses",
)
install_import_hook(SHAPE_CHECKED, "beartype.beartype")

# The same examples in every run: a red test is red for everybody. `--hypothesis-profile=explore` looks further.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

NUM_THREADS = torch.get_num_threads()

# The files that take longest, in that order. Begun first, they leave no process at work alone at the end.
LONGEST_FIRST = (
    "test_documented_commands", "test_plan", "test_resume", "test_pipeline_runs", "test_e2e_rounds", "test_fsdp",
    "test_e2e_ppo", "test_sampling", "test_e2e_report", "test_e2e_gatt", "test_evaluation", "test_policy_sampler",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts these first; the others stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for tiny models: sharing their work out costs four times the work itself.

    Whole runs keep the number that the processes they start have, since it decides the last bits of a sum.
    """
    whole_runs = any(item.iter_markers("e2e")) or any(item.iter_markers("real"))
    torch.set_num_threads(NUM_THREADS if whole_runs else 1)


CORPUS = (
    "Hello there, how are you today? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "Napoleon wrote a letter to the queen. What did the letter say?",
    "user assistant system question answer instruction 1234567890",
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models that tests build go into a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def save_tuned() -> Callable[..., Path]:
    """`save_tuned(loaded, folder, rank=2, seed=1)`: random adapters on a model, saved as a run with LoRA saves them."""
    from alignment.config import LoraSection
    from alignment.models import add_lora, save_model

    def save(loaded: Any, folder: Path, *, rank: int, seed: int, std: float = 0.1, **lora: Any) -> Path:
        section = LoraSection(r=rank, **lora)
        adapted = add_lora(loaded.model, section, is_reward_model=not loaded.model.can_generate(), seed=0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        save_model(adapted, loaded, folder)
        return folder

    return save


@pytest.fixture(scope="session")
def save_judges() -> Callable[..., list[str]]:
    """`save_judges(folder, model="toy")`: two reward models with fresh heads, and the settings that name them."""
    from alignment.models import load_reward_model, save_model

    def save(folder: Path, model: str = "toy") -> list[str]:
        names = ("helpfulness", "safety")
        for seed, name in enumerate(names):
            reward = load_reward_model(model, new_head_seed=seed)
            save_model(reward.model, reward, folder / name)
        return [f"rewards.{name}={{path: {folder / name}, dtype: float32}}" for name in names]

    return save


def _llama_config(vocab: int, **extra: object) -> LlamaConfig:
    # Weights ten times the usual size: context then moves the outputs far beyond any tolerance used here.
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **extra,
    )


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """`make_llama(vocab=64, dtype=torch.float32, seed=0)`: a random two-layer Llama in evaluation mode."""

    def make(vocab: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(_llama_config(vocab)).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_reward_model() -> Callable[..., LlamaForSequenceClassification]:
    """The same with a scalar head."""

    def make(vocab: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForSequenceClassification:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForSequenceClassification(_llama_config(vocab, num_labels=1)).to(dtype).eval()
        model.config.pad_token_id = vocab  # an id that no text has: transformers refuses to batch without one
        return model

    return make


@pytest.fixture
def llama(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A fresh random causal model in float32."""
    return make_llama()


@pytest.fixture
def reward_llama(make_reward_model: Callable[..., LlamaForSequenceClassification]) -> LlamaForSequenceClassification:
    """A fresh random sequence classifier with one output, in float32."""
    return make_reward_model()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A byte-level BPE tokenizer trained on a few sentences.

    The control tokens come first, in the order given: `specials[0]` has id 0. After them stand the 256 bytes, then
    `merges` learned pairs. `pad` may be the end token, as in many published chat models.
    """

    def make(
        specials: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"),
        *,
        bos: str | None = "<|im_start|>",
        eos: str = "<|im_end|>",
        pad: str | None = "<pad>",
        merges: int = 40,
        template: str | None = None,
    ) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=len(specials) + 256 + merges,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(CORPUS, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens and a pad token of its own."""
    return make_tokenizer()


@pytest.fixture
def pad_is_eos_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The same with `<|im_end|>` as pad token: lengths inferred from pads would be wrong."""
    return make_tokenizer(pad="<|im_end|>")


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write_file("name.txt", "text")` in the test's own folder."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def reward_folder(tmp_path: Path, make_reward_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> str:
    """A tiny reward model on disk whose pad token is, as in many published tokenizers, its end of turn."""
    from alignment.chat_formats import CHATML

    tokenizer = make_tokenizer(template=CHATML, pad="<|im_end|>")
    model = make_reward_model(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    folder = tmp_path / "rm"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished toy pipeline, run in a fresh process with an empty cache, once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "toy-pipeline"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "runs" / "report.html").exists():  # what it writes last
            done = subprocess.run(
                [sys.executable, "-m", "alignment.cli.main", "run", "recipes/toy/pipeline.yaml", f"runs={folder}/runs"],
                capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
                env={**os.environ, "ALIGN_CACHE_DIR": str(folder / "cache")},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs"
