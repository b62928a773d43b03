"""Sampling with vLLM, which runs inside this process so that new weights can be handed over in memory.

vLLM is imported when a sampler is made, not before. Written for the interface of vLLM 0.32.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig

from alignment.errors import SamplerError
from alignment.model_checks import reach_of
from alignment.model_folders import context_length
from alignment.sampling.draw import seeds_of
from alignment.sampling.protocol import Sample, SamplingParams

if TYPE_CHECKING:
    import vllm

# Set before vLLM is imported, where the user has not: one process, errors only, nothing sent to its makers.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# On a CPU vLLM would take nine tenths of the machine's memory.
CPU_CACHE_BYTES = 2 * 2**30
# What the sampler's promises rest on.
RESERVED = ("model", "skip_tokenizer_init", "logprobs_mode")


class VllmSampler:
    """Samples from a model folder, on all GPUs that vLLM is told to use, or on CPUs with vLLM's build for them.

    One at a time in a process: vLLM's process groups are global, and go when one is closed.

    Equal settings give equal samples, on the same hardware and with the same prompts beside them: what else is in the
    batch decides the last bits of a logit. They are not those of the torch engine with the same seed.

    Log-probabilities are as `Sample` says where top-p and top-k are off. Where they are on, vLLM reports those of the
    distribution that is left, renormalised. It raises temperatures between 0 and 0.01 to 0.01.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        stop_ids: Sequence[int],
        dtype: torch.dtype,
        max_rows: int = 128,
        max_length: int,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the engine.

        Args:
            folder: a plain Hugging Face model.
            stop_ids: tokens that end a response; no others do, whatever the model's own configuration says.
            dtype: of the weights and the computation.
            max_rows: responses decoded side by side.
            max_length: tokens of prompt and response together; the model's context where that is less.
            engine_args: arguments of `vllm.LLM` that replace or join those made from the above.

        Raises:
            SamplerError: vLLM cannot be imported or started, or does not know one of `engine_args`.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.stop_ids = list(stop_ids)
        self._request_ids, self._adapter_ids = itertools.count(), itertools.count(1)
        self._adapter: Any = None  # the LoRARequest of the adapter that is in use
        self._llm: vllm.LLM | None = None
        given = dict(engine_args or {})
        _check_arguments(_import_vllm(), given)
        try:
            config = AutoConfig.from_pretrained(folder)
            length = min(max_length, context_length(config))
            if reach := reach_of(config):  # beyond it vLLM would take other positions, or a window, for all
                length = min(length, reach.tokens)
            defaults: dict[str, Any] = {"dtype": dtype, "max_num_seqs": max_rows, "max_model_len": length}
            if _on_cpu():
                # Compiling a model costs minutes there, and there are no launches of kernels to save.
                defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
            self._llm = _start(str(folder), defaults | given)
        except Exception as error:
            _clean_up()
            raise SamplerError(
                f"vLLM cannot start on {folder}: {_reason(error)} Its settings: sampling.vllm."
            ) from error

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
        on_prompt: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """See Sampler. A prompt's samples are reported together.

        Raises SamplerError where a prompt and its response may be longer than the engine's `max_model_len`, before
        anything is sampled, and where vLLM breaks down.
        """
        engine = self._engine()
        self._check_length(prompts, params)
        results: list[list[Sample]] = [[] for _ in prompts]
        pending: dict[str, int] = {}
        try:
            with _breakdown("sampling"):
                for index, request in enumerate(_requests(prompts, params, self.stop_ids)):
                    request_id = str(next(self._request_ids))
                    pending[request_id] = index
                    tokens = {"type": "token", "prompt_token_ids": list(prompts[index])}
                    engine.add_request(request_id, tokens, request, lora_request=self._adapter)
            while pending:
                with _breakdown("sampling"):
                    finished = [(output.request_id, _samples(output, params)) for output in engine.step()]
                for request_id, samples in finished:
                    index = pending.pop(request_id)
                    if on_progress:
                        on_progress(len(samples))
                    if on_prompt:
                        on_prompt(index, samples)
                    else:
                        results[index] = samples
        except BaseException:
            self._abort(list(pending))
            raise
        return results

    def refresh(self, model: nn.Module) -> None:
        """Samples from this model's weights from now on.

        Args:
            model: of the architecture that the engine was started on. A plain model's weights replace the engine's. Of
                a peft model only the adapter is handed over: the engine must hold its base's weights and have been
                started with `enable_lora=True` and a `max_lora_rank` of the adapter's rank at least.

        Raises:
            SamplerError: vLLM does not take it. An adapter that it refuses changes nothing; after refused weights of a
                plain model, start another sampler.
        """
        engine = self._engine()
        with _breakdown("taking new weights"):
            if isinstance(model, PeftModel):
                self._load_adapter(model)
            else:
                self._load_weights(model)
            engine.reset_prefix_cache()  # keys and values of the old weights

    def close(self) -> None:
        """Frees the engine and its memory. Harmless when called again."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        llm.llm_engine.engine_core.shutdown()
        del llm
        _clean_up()

    def _engine(self) -> Any:
        if self._llm is None:
            raise SamplerError("this vLLM sampler is closed.")
        return self._llm.llm_engine

    def _check_length(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        limit = self._engine().model_config.max_model_len
        longest = max(map(len, prompts), default=0)
        if prompts and longest + params.max_new_tokens > limit:
            raise SamplerError(
                f"a prompt of {longest} tokens and {params.max_new_tokens} new ones are more than the {limit} that "
                "vLLM was started with. Lower prompts.max_prompt_length or sampling.max_new_tokens, or, where the "
                "model's context is longer, raise sampling.vllm.max_model_len."
            )

    def _abort(self, request_ids: list[str]) -> None:
        """Drops requests that have not finished, so that the next call does not sample them."""
        with suppress(Exception):  # a broken engine refuses this too; its first error is the one to report
            engine = self._engine()
            engine.abort_request(request_ids)
            engine.reset_prefix_cache()  # an interrupted step may have left keys and values that were never computed

    def _load_weights(self, model: nn.Module) -> None:
        engine = self._engine()
        self._drop_adapter()
        if engine.vllm_config.parallel_config.world_size == 1:
            weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
            engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        else:  # vLLM's other processes do not see this one's memory
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        engine.apply_model(_pack_output_matrix)

    def _load_adapter(self, model: PeftModel) -> None:
        from vllm.lora.request import LoRARequest

        engine = self._engine()
        if engine.vllm_config.lora_config is None:
            raise SamplerError("vLLM was started without adapters. Set sampling.vllm.enable_lora and max_lora_rank.")
        number = next(self._adapter_ids)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            # A number and a name of its own: vLLM tells adapters apart by them.
            adapter = LoRARequest(f"adapter-{number}", number, folder)
            engine.add_lora(adapter)  # reads the folder now, and refuses an adapter before it lets the last one go
        self._drop_adapter()
        self._adapter = adapter

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._engine().remove_lora(self._adapter.lora_int_id)
            self._adapter = None


def _import_vllm() -> Any:
    try:
        import vllm
    except Exception as error:  # a build for other hardware or another torch fails in many ways
        raise SamplerError(
            f"vLLM cannot be imported ({_reason(error)}). "
            'Install it with pip install -e ".[vllm]", or on a machine without a GPU as make test-vllm does.'
        ) from error
    return vllm


def _check_arguments(vllm: Any, given: Mapping[str, Any]) -> None:
    known = {*inspect.signature(vllm.LLM.__init__).parameters, *(field.name for field in fields(vllm.EngineArgs))}
    if unknown := sorted(given.keys() - (known - {"self", "kwargs"})):
        raise SamplerError(
            f"sampling.vllm: vllm.LLM has no argument {', '.join(unknown)}. See vLLM's engine arguments."
        )
    if reserved := sorted(given.keys() & set(RESERVED)):
        raise SamplerError(f"sampling.vllm: {', '.join(reserved)} cannot be changed.")


def _start(model: str, arguments: Mapping[str, Any]) -> vllm.LLM:
    import vllm

    set_num_threads = torch.set_num_threads
    try:
        return vllm.LLM(model=model, skip_tokenizer_init=True, logprobs_mode="processed_logprobs", **arguments)
    finally:  # on CPUs vLLM puts a function there that does nothing, for good
        torch.set_num_threads = set_num_threads


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _requests(prompts: Sequence[Sequence[int]], params: SamplingParams, stop_ids: list[int]) -> Iterator[Any]:
    """Each prompt's parameters. vLLM gives the K samples of a request its seed and the K - 1 numbers that follow.

    A prompt that occurs again goes on with the numbers where its last occurrence ended.
    """
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    occurrences: Counter[tuple[int, ...]] = Counter()
    for prompt in map(tuple, prompts):
        first = int(seeds_of(prompt, params.seed).generate_state(1, np.uint64)[0]) >> 2  # no sum overflows int64
        yield VllmParams(
            n=params.num_candidates if params.temperature > 0 else 1,  # vLLM refuses equal samples
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_new_tokens,
            seed=first + occurrences[prompt] * params.num_candidates,
            stop_token_ids=stop_ids,
            ignore_eos=True,
            logprobs=0,  # of the sampled token, and of no other
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        occurrences[prompt] += 1


def _samples(output: Any, params: SamplingParams) -> list[Sample]:
    """K samples of a finished request, in the order of their numbers."""
    samples = [_sample(completion) for completion in sorted(output.outputs, key=lambda completion: completion.index)]
    if params.temperature > 0:
        return samples
    (only,) = samples
    return [Sample(list(only.token_ids), list(only.logprobs), only.finish_reason) for _ in range(params.num_candidates)]


def _sample(completion: Any) -> Sample:
    if completion.finish_reason not in ("stop", "length"):
        raise SamplerError(
            f"vLLM ended a sample for another reason than its end or length: {completion.finish_reason}."
        )
    token_ids = list(completion.token_ids)
    logprobs = [among[token].logprob for token, among in zip(token_ids, completion.logprobs, strict=True)]
    return Sample(token_ids, logprobs, completion.finish_reason)


def _pack_output_matrix(model: nn.Module) -> None:
    """On CPUs in bfloat16 vLLM multiplies with a packed copy of it, which stays the old one where weights are tied."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _breakdown(doing: str) -> Iterator[None]:
    """vLLM's exceptions as SamplerError."""
    try:
        yield
    except SamplerError:
        raise
    except Exception as error:
        raise SamplerError(f"vLLM broke down while {doing}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The last line of an exception's message, as a sentence."""
    if isinstance(error, ValidationError):  # whose message ends with the address of pydantic's manual
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        lines = [": ".join([*map(str, problem["loc"][:1]), problem["msg"]])]
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    return reason if reason.endswith(".") else f"{reason}."


def _clean_up() -> None:
    """Gives memory back, on GPUs too, and lets go of what a start that failed half-way left."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
