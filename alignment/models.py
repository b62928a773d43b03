"""Load, adapt and save models: chat models and reward models as plain Hugging Face folders."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from alignment.adapters import (
    Adapter,
    attach_frozen,
    backbone_weights,
    decoder_prefix,
    fingerprint,
    linear_layers,
    merged_weights,
    read_adapter,
    take_off,
    trained_adapter,
    write_adapter,
)
from alignment.chat import ChatFormat
from alignment.config import LoraSection
from alignment.distributed import gets_weights_later, whole, whole_weights
from alignment.errors import ModelError
from alignment.files import write_folder
from alignment.low_rank import use_low_rank_linear
from alignment.model_checks import check_complete, check_layers, check_logits, check_vocabulary
from alignment.model_folders import (
    COPY_AGAIN,
    check_is_chat_model,
    check_one_score,
    is_classifier,
    load_chat,
    model_folder,
    read_config,
)
from alignment.tree_attention import TREE_ATTENTION
from alignment.weight_files import read_weight, weight_files

ADAPTER_FOLDER = "adapter"
# transformers' name for computing activations anew in the backward pass: from 5.23 on, and before.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
NOT_REENTRANT = {"use_reentrant": False}
_NUMBER = re.compile(r"\.(\d+)\.")  # of a layer, in a weight's name
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and chat format, and the folder or Hub id that it comes from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    folder: Path | str


def load_chat_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    chat_template: str = "auto",
    keep_adapter: bool = False,
    for_training: bool = False,
) -> LoadedModel:
    """A causal language model in evaluation mode, on the CPU.

    Raises ModelError where it cannot be loaded, is a reward model, or computes what ours does not reckon with. With
    `keep_adapter` what LoRA has added stays an adapter, frozen, where `dtype` would round it away; with `for_training`
    there are no weights yet where FSDP brings them from the main process.
    """
    folder = model_folder(path)
    chat = load_chat(folder, chat_template)
    tokenizer = chat.tokenizer
    check_is_chat_model(path)
    model = _from_pretrained(AutoModelForCausalLM, folder, path, dtype, empty=for_training and gets_weights_later())
    check_vocabulary(model.get_output_embeddings(), tokenizer, path)
    check_logits(model, path)
    if keep_adapter:
        _keep_adapter(model, folder, dtype)
    _set_special_tokens(model, tokenizer, chat)
    return LoadedModel(model.eval(), tokenizer, chat, folder)


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    chat_template: str = "auto",
    new_head_seed: int | None = None,
    keep_adapter: bool = False,
    for_training: bool = False,
) -> LoadedModel:
    """A sequence classifier with one output and a float32 head, in evaluation mode, on the CPU.

    With `new_head_seed` a chat model is taken and its output matrix replaced by a fresh scalar head
    (Llama 2 Sec. 3.2.2). Without, the folder must hold a reward model: raises ModelError where it does not.
    `keep_adapter` and `for_training` as for a chat model.
    """
    folder = model_folder(path)
    chat = load_chat(folder, chat_template)
    tokenizer = chat.tokenizer
    config = read_config(folder, path)
    is_reward_model = is_classifier(config)
    if new_head_seed is None or is_reward_model:
        check_one_score(config, path)
    empty = for_training and gets_weights_later()
    model = _from_pretrained(AutoModelForSequenceClassification, folder, path, dtype, empty=empty, num_labels=1)
    check_vocabulary(model.get_input_embeddings(), tokenizer, path)
    float32_head(model)
    files = weight_files(folder) if isinstance(folder, Path) else {}
    if (name := "score.weight") in files:  # it was loaded in the backbone's type
        model.score.weight.data.copy_(read_weight(files[name], name))
    if keep_adapter:
        _keep_adapter(model, folder, dtype)
    if new_head_seed is not None and not is_reward_model:
        generator = torch.Generator().manual_seed(new_head_seed)
        # Stiennon et al. 2020 (arXiv:2009.01325): scores of unit order for hidden states of unit order.
        weight = torch.randn(model.score.weight.shape, generator=generator) / (model.score.in_features + 1) ** 0.5
        model.score.weight.data.copy_(weight)
    _set_special_tokens(model, tokenizer, chat)
    return LoadedModel(model.eval(), tokenizer, chat, folder)


def float32_head(model: PreTrainedModel) -> None:
    """Makes a classifier's head float32, and what it is given: a bfloat16 backbone's output comes in its own type."""
    model.score.float()
    model.score.register_forward_pre_hook(_as_float32)


def add_lora(model: PreTrainedModel, lora: LoraSection, *, is_reward_model: bool, seed: int) -> nn.Module:
    """Adapters on the linear layers of a frozen model; a reward model's head is trained whole.

    Adapter weights are float32 whatever the frozen weights are. With `r = 0` the model itself, trained in full. Of a
    model of text and images neither trains what sees images: no text reaches it, and DDP would wait for its gradients.
    """
    decoder = model.get_decoder()
    if lora.r == 0:
        heads = (model.get_output_embeddings(), getattr(model, "score", None))
        used = {id(weight) for part in (decoder, *heads) if part is not None for weight in part.parameters()}
        for weight in model.parameters():
            weight.requires_grad_(id(weight) in used and weight.requires_grad)
        return model
    linear = list(linear_layers(decoder))
    if not linear:
        raise ModelError(
            f"{model.config.model_type}: LoRA goes on linear layers (nn.Linear), and this model has none. Train it in "
            "full: lora.r=0."
        )
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    first = 0 if lora.last_layers is None else max(0, num_layers - lora.last_layers)
    if first:
        linear = [name for name in linear if (layer := _NUMBER.search(name)) and int(layer[1]) >= first]
    prefix = decoder_prefix(model)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, where the model is
        torch.manual_seed(seed)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=[f"{prefix}{name}" for name in linear],
            task_type=TaskType.SEQ_CLS if is_reward_model else TaskType.CAUSAL_LM,
        )
        with warnings.catch_warnings():
            # A frozen adapter of ours may be there already; peft takes it for one in training.
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            return get_peft_model(model, use_low_rank_linear(config))


def recompute_activations(model: PreTrainedModel) -> None:
    """Keeps one layer's activations at a time in training, with adapters too; the others are computed again."""
    getattr(model, f"{CHECKPOINTING}_enable")(NOT_REENTRANT)
    model.enable_input_require_grads()


def rounded_copy(model: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """A separate chat model with weights in `dtype`, e.g. to sample from a policy whose own are float32.

    Collective where FSDP has split the model: every process gets all weights, one by one. Buffers keep their type: in
    bfloat16 the frequencies of rotary positions would be others.
    """
    config, options = copy.deepcopy(model.config), {"dtype": dtype, "attn_implementation": TREE_ATTENTION}
    with no_init_weights(), next(model.parameters()).device:
        twin = AutoModelForCausalLM.from_config(config, **options)
    twin.tie_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            twin.get_parameter(name).copy_(whole(weight))
        for name, buffer in model.named_buffers():
            twin.get_buffer(name).copy_(buffer)
    return twin.requires_grad_(False).eval()


def save_model(model: nn.Module, loaded: LoadedModel, path: Path) -> None:
    """Writes a plain Hugging Face folder in float32, atomically; the model itself stays as it is.

    Collective: every process calls it, since FSDP may have split the model, and the main one writes. Adapters are
    merged on the CPU, weight by weight. What was trained with LoRA is written a second time as an adapter, into a
    folder of its own inside.
    """
    weights, adapter = whole_weights(model), None
    if not weights:
        return
    if isinstance(model, PeftModel):
        adapter = _whole_adapter(model, weights, loaded)
        weights, model = merged_weights(model, weights), model.get_base_model()
    # CPU bf16 kernels may leave views that safetensors refuses.
    weights = {name: weight.float().contiguous() for name, weight in weights.items()}
    _set_special_tokens(model, loaded.tokenizer, loaded.chat)  # trainers overwrite them with the tokenizer's
    score = None if model.can_generate() else weights["score.weight"]

    def fill(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=dict(weights))
        config = copy.deepcopy(model.config)
        config.dtype = torch.float32  # what it has just been written with is the type in memory
        config.use_cache = True  # Trainer turns it off
        config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        if adapter is not None:
            base, changes = adapter
            place = folder / ADAPTER_FOLDER
            write_adapter(changes, place, base=base, score=score, decoder=decoder_prefix(model))

    write_folder(path, fill)


def _whole_adapter(model: PeftModel, weights: dict[str, torch.Tensor], loaded: LoadedModel) -> tuple[str, Adapter]:
    """The trained adapter on top of the one that the model began with, and the name of the model both belong on."""
    earlier = saved_adapter(loaded.folder)
    if earlier is None:
        return str(loaded.folder), trained_adapter(model, weights, fingerprint(backbone_weights(model, weights)))
    config = LoraConfig.from_pretrained(str(Path(loaded.folder) / ADAPTER_FOLDER))
    return str(config.base_model_name_or_path), earlier + trained_adapter(model, weights, earlier.backbone)


def saved_adapter(folder: Path | str) -> Adapter | None:
    """The adapter beside the weights in a folder of `model_folder`, where these were fine-tuned with LoRA."""
    return read_adapter(folder / ADAPTER_FOLDER) if isinstance(folder, Path) else None


def _from_pretrained(
    cls: type, folder: Path | str, name: str, dtype: torch.dtype, *, empty: bool = False, **extra: object
) -> PreTrainedModel:
    """The model of a folder or Hub id; an empty one has weights that nothing was written to, and so takes no memory."""
    options = {"dtype": dtype, "attn_implementation": TREE_ATTENTION}
    try:
        config = AutoConfig.from_pretrained(folder, **extra)
        check_layers(cls, config, name)
        if not empty:
            model, found = cls.from_pretrained(folder, output_loading_info=True, **options, **extra)
            check_complete(model, found["missing_keys"], name)
            return _as_used_here(model, name)
        with no_init_weights():
            model = cls.from_config(config, **options)
        model.tie_weights()
        return _as_used_here(model, name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: cannot be loaded ({error}). Check the name, the network and HF_HUB_OFFLINE."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, SafetensorError, TypeError, LookupError) as error:
        raise ModelError(f"{name}: its weights cannot be read ({error}). {COPY_AGAIN}") from error


def _as_used_here(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Without a model's own dropout, which PPO's first ratios and margins are not to have; Llama has none.

    Some have it in modules, others call the function with a rate of theirs: `dropout`, `layerdrop`, `attn_pdrop`. A
    mixture of experts computes no loss of its own, for which it would want masks of two axes. Flags of sampling that
    are given without `do_sample` mean that; transformers would not save them so, nor anything else that is invalid.
    """
    text_config = model.config.get_text_config(decoder=True)
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False
    if model.can_generate():
        _mend_generation_config(model, name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _mend_generation_config(model: PreTrainedModel, name: str) -> None:
    """What transformers would refuse to save: sampling is switched on, or the configuration left out."""
    config = model.generation_config
    for do_sample in (config.do_sample, True):
        config.do_sample = do_sample
        try:
            config.validate(strict=True)
        except ValueError as error:
            problem = str(error)
        else:
            return
    logger.warning("%s: its generation_config.json is left out, for it is invalid: %s", name, problem)
    model.generation_config = GenerationConfig.from_model_config(model.config)


def _keep_adapter(model: PreTrainedModel, folder: Path | str, dtype: torch.dtype) -> None:
    """Takes what LoRA added off the weights of a model in fewer bits than float32, and puts it beside them.

    In bfloat16 a weight has 8 bits, and what changes it by less than half the last one is lost: of the policy of a
    short PPO run two fifths of the change. The model that was trained had rounded weights and the adapter apart.
    """
    if dtype == torch.float32 or (adapter := saved_adapter(folder)) is None:
        return
    take_off(model, adapter, weight_files(Path(folder)))
    attach_frozen(model.get_decoder(), adapter)


def _as_float32(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].float(),)


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    """Tells saved models where to pad and stop: a plain classifier finds its score by the pad token."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = chat.end_of_turn_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = chat.end_of_turn_id
