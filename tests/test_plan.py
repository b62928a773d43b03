"""`align plan`: counts against real models, the tracker against real storages, plans that grow where they should."""

import gzip
import json
import random
import re
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3Config
from typer.testing import CliRunner

from alignment.chat import EncodedDialogue
from alignment.cli.main import app
from alignment.cli.plan import load_stages
from alignment.cli.plan_advice import advice
from alignment.cli.plan_stages import plan_stage
from alignment.cli.planner import Planner, fill, scoring_work
from alignment.config import LoraSection
from alignment.errors import ConfigError, DataError, ModelError
from alignment.logprobs import response_logprobs
from alignment.models import add_lora, load_chat_model, load_reward_model
from alignment.plan import devices, passes
from alignment.plan.devices import Device, find_device
from alignment.plan.passes import Pass, Rows, run_pass
from alignment.plan.phases import Work
from alignment.plan.sampling import Draws, draws_of
from alignment.plan.shapes import ModelSpec, fake_model, meta_model, model_config, spec_of, weights
from alignment.plan.tracker import MemoryTracker, Part
from alignment.plan.training import Setting, gathered, gradients, held, optimizer_state, reduced
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling.cohort import Cohort
from alignment.sampling.memory import kv_bytes, rows_that_fit
from alignment.sampling.prompt_cache import Prompts, attend_and_keep
from alignment.sampling.prompt_row import prompt_blocks, prompt_row
from sft.examples import dialogue_batches

BF16 = torch.bfloat16
CPU = Device("cpu", "cpu", 10**10, 1e12, 1e11, BF16)
GPU = Device("small", "gpu", 10**10, 1e14, 1e12, BF16)
SMALL = ["data.max_length=128", "train.max_tokens_per_batch=512", "train.batch_size=16"]


def small_spec(layers=6, **options):
    """A Llama of many small layers."""
    shape = {
        **{"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80},
        **{"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2},
        "max_position_embeddings": 512,
    }
    return ModelSpec(json.dumps(shape, sort_keys=True), **options)


def planned(stage, *overrides, device=CPU, processes=1, fsdp=False):
    configs, origins = load_stages(None, stage, ["model=toy", *overrides])
    [(name, config)] = configs.items()
    return plan_stage(config, name, Planner(Setting(device, processes, fsdp), origins))


def parts(plan, phase):
    return next(each.parts for each in plan.phases if each.name == phase)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("smollm2-135m-instruct", 134_515_008),
    ],
)
def test_built_in_shapes_have_the_published_numbers_of_parameters(name, count):
    found = weights(spec_of(name, dtype=BF16))
    assert found.parameters == count
    assert found.base == 2 * count


@pytest.mark.parametrize("lora", [LoraSection(), LoraSection(r=4), LoraSection(r=4, last_layers=1)])
@pytest.mark.parametrize("head", ["lm", "score"])
def test_counts_are_those_of_the_real_model(head, lora):
    load = {"lm": load_chat_model, "score": lambda name: load_reward_model(name, new_head_seed=0)}[head]
    real = add_lora(load("toy").model, lora, is_reward_model=head == "score", seed=0)
    found = weights(spec_of("toy", head=head, lora=lora, is_trained=True))
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.base + found.lora == sum(p.nbytes for p in real.parameters())
    assert found.trained > 0


def test_adapters_and_heads_are_float32_on_frozen_weights_of_bfloat16():
    lora = LoraSection(r=4)
    found = weights(spec_of("toy", head="score", dtype=BF16, lora=lora, is_trained=True))
    plain = weights(spec_of("toy", head="score"))
    hidden = 64  # of the toy model: its score head, once frozen and once trained
    assert found.base == 2 * (plain.parameters - hidden) + 4 * hidden
    assert found.lora == 4 * found.trained


def test_gradients_and_moments_are_those_of_adamw():
    spec = spec_of("toy", is_trained=True)
    real = load_chat_model("toy").model
    optimizer = torch.optim.AdamW(real.parameters())
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert optimizer_state(spec) == {"optimizer": sum(moment.nbytes for moment in moments)}
    size = sum(parameter.grad.nbytes for parameter in real.parameters())
    assert gradients(Setting(CPU), spec) == {"gradients": size, "exchange": 0}
    assert gradients(Setting(CPU, processes=2), spec) == {"gradients": size, "exchange": size}


def test_keys_and_values_are_the_tables_of_the_engine():
    draws = Draws(prompts=2, candidates=3, prompt_tokens=20, new_tokens=20)
    config = model_config("toy")  # two layers, two key-value heads of 16 numbers
    prompts = [[1] * 20, [2] * 20]
    row = prompt_row(prompts)
    kept = Prompts([20, 20], torch.device("cpu"))
    blocks = prompt_blocks(row, torch.float32, torch.device("cpu"))
    for _ in range(config.num_hidden_layers):
        attend_and_keep(kept, row, blocks, torch.zeros(4, 40, 16), torch.zeros(2, 40, 16), torch.zeros(2, 40, 16))
    cohort = Cohort(kept, [0, 0, 0, 1, 1, 1], most_columns=draws.new_tokens)
    for _ in range(draws.new_tokens):
        for layer in range(config.num_hidden_layers):
            cohort.attend(layer, torch.zeros(6, 4, 16), torch.zeros(6, 2, 16), torch.zeros(6, 2, 16))
        cohort.advance()
    tables = [table for layer in kept.layers for table in (*layer.keys, *layer.values)]
    tables += [table for layer in cohort.own for table in (layer.keys, layer.values)]
    found = kv_bytes(config, torch.float32, prompts=2, rows=6, prompt_tokens=20, new_tokens=20)
    assert found == sum(table.nbytes for table in tables)


def test_responses_side_by_side_are_whole_prompts_within_max_rows():
    options = {"prompt_tokens": 5, "new_tokens": 7}
    assert draws_of(total_prompts=100, candidates=8, max_rows=30, **options).rows == 24  # three prompts
    assert draws_of(total_prompts=2, candidates=8, max_rows=30, **options).rows == 16  # all there are
    assert draws_of(total_prompts=9, candidates=100, max_rows=30, **options).rows == 30  # one prompt in lots


@pytest.mark.parametrize("stage", ["reject", "ppo"])
def test_a_gpu_is_planned_with_as_many_responses_as_the_engine_will_take(stage):
    """With what the plan says is held beside keys and values free for them."""
    sizes = ["prompts.max_prompt_length=40", "sampling={max_new_tokens: 24, num_candidates: 4}",
             "rewards={helpfulness: toy, safety: toy}"]  # fmt: skip
    sizes += ["lora.r=4"] if stage == "ppo" else []
    at_once = parts(planned(stage, *sizes, device=GPU), "sample")
    held_there = sum(size for kind, size in at_once.items() if kind not in ("kv_cache", "activations"))
    plan = planned(stage, *sizes, device=replace(GPU, memory=held_there + 700_000))
    options = {"candidates": 4, "prompt_tokens": 40, "new_tokens": 24}
    rows = rows_that_fit(700_000, model_config("toy"), BF16, **options)
    assert 4 < rows < 128 and f"{rows} responses side by side" in plan.notes[-1]
    kept = kv_bytes(model_config("toy"), BF16, prompts=rows // 4, rows=rows, prompt_tokens=40, new_tokens=24)
    assert parts(plan, "sample")["kv_cache"] == kept
    assert any(note.startswith("128 responses") for note in planned("reject", *sizes[:3]).notes)  # a CPU


def test_the_tracker_counts_storages_as_they_come_and_go():
    mode = FakeTensorMode()
    with mode:
        known = torch.empty(1000)
    with MemoryTracker([known]) as tracker:
        first = known * 2  # 4,000 bytes
        view = first.view(10, 100)[:5]
        first.add_(1)
        known.t()
        assert tracker.live == 4000
        second = torch.mm(view, view.T)  # 5 x 5 floats, 2 * 5 * 100 * 5 operations
        assert (tracker.live, tracker.parts[0].flops) == (4100, 5000)
        del first
        assert tracker.live == 4100  # the view keeps it
        del view
        assert tracker.live == second.nbytes
        tracker.next_part()
        assert tracker.parts == [Part(0, 4100, 5000), Part(second.nbytes, second.nbytes)]


def test_what_is_saved_for_the_backward_pass_is_what_the_real_model_saves():
    """After a forward pass with gradients, the storages alive are those that autograd holds of real tensors."""
    rows = Rows(3, 0, (40,))
    batch = collate([[Tree([], [Branch([5] * 40)])]] * 3)
    real = load_chat_model("toy").model.train()
    known = {each.untyped_storage()._cdata for each in (*real.parameters(), *real.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = response_logprobs(real, batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_model(spec_of("toy", is_trained=True), mode, layers=2, device="cpu")
    with MemoryTracker([*fake.parameters(), *fake.buffers()]) as tracker:
        logprobs = response_logprobs(fake, batch)
        live = tracker.live
    assert logprobs.shape == found.shape
    held_by_autograd = sum(storage.nbytes() for storage in saved.values())
    assert live == pytest.approx(held_by_autograd, rel=0.03)  # indices of the batch are real on both sides
    assert run_pass(spec_of("toy", is_trained=True), rows, "logprobs", device="cpu", train=True).peak > live


def most(run):
    return max(part.peak for part in run.parts)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "options",
    [
        {"compute": BF16},
        {"dtype": BF16, "lora": LoraSection(r=4)},
        {"dtype": BF16, "lora": LoraSection(r=4, last_layers=5)},
        {"compute": BF16, "checkpointing": True},
    ],
    ids=["full", "lora", "last-layers", "checkpointing"],
)
def test_three_layers_stand_for_all(device, options):
    spec = small_spec(is_trained=True, **options)
    rows = Rows(4, 10, (30, 20))
    whole = passes._run(spec, spec.adapted_layers, rows, "logprobs", device, True)
    found = run_pass(spec, rows, "logprobs", device=device, train=True)
    for part in (whole.forward[-1], whole.backward[0]):
        part.peak += 0 if device == "cpu" else 2 * 4 * 96 * (200 - 32)
    assert found.peak == most(whole)
    if spec.adapted_layers == 6:
        assert found.flops == sum(part.flops for part in whole.parts)


@pytest.mark.parametrize("vocab_size", [96, 13_000, 40_000])
@pytest.mark.parametrize(("head", "reader"), [("score", "scores"), ("lm", "logprobs")])
def test_few_layers_stand_for_all_wherever_their_peak_is(head, reader, vocab_size):
    """A large embedding's gradient is the peak of few layers, while six have theirs where the loss is."""
    spec = small_spec(head=head, is_trained=True, compute=BF16)
    spec = replace(spec, config=json.dumps(json.loads(spec.config) | {"vocab_size": vocab_size}))
    rows = Rows(4, 10, (30, 20))
    few, whole = (passes._run(spec, layers, rows, reader, "cpu", True) for layers in (3, spec.adapted_layers))
    assert run_pass(spec, rows, reader, device="cpu", train=True).peak == most(whole)
    if (head, vocab_size) == ("score", 13_000):
        at_embedding, at_loss = few.backward[-1].peak, max(few.forward[-1].peak, few.backward[0].peak)
        assert at_embedding > at_loss and most(whole) > whole.backward[-1].peak
    without = run_pass(spec, rows, reader, device="cpu").peak
    assert without == most(passes._run(spec, spec.adapted_layers, rows, reader, "cpu", False))


def test_a_pass_grows_with_tokens_and_shrinks_with_checkpointing_and_last_layers():
    spec = small_spec(is_trained=True, compute=BF16)
    few, many = (run_pass(spec, Rows(n, 0, (64,)), "logprobs", device="cpu", train=True) for n in (2, 4))
    assert 1.7 * few.peak < many.peak < 2.1 * few.peak
    again = replace(spec, checkpointing=True)
    lean = run_pass(again, Rows(4, 0, (64,)), "logprobs", device="cpu", train=True)
    assert lean.peak < 0.6 * many.peak and lean.flops > 1.2 * many.flops
    forward = run_pass(spec, Rows(4, 0, (64,)), "logprobs", device="cpu")
    assert forward.peak < 0.5 * many.peak and forward.flops < many.flops
    lora = LoraSection(r=4)
    adapted = replace(spec, dtype=BF16, lora=lora)
    upper = replace(adapted, lora=lora.model_copy(update={"last_layers": 3}))
    all_layers, half = (run_pass(each, Rows(4, 0, (64,)), "logprobs", device="cpu", train=True).peak
                        for each in (adapted, upper))  # fmt: skip
    assert half < 0.65 * all_layers


def test_on_a_gpu_masks_are_kept_by_every_layer():
    """Twice the row length at the same number of tokens: twice the mask, R L L numbers in bfloat16 a layer."""
    spec = small_spec(head="score", is_trained=True, compute=BF16)
    short, long = (run_pass(spec, rows, "scores", device="gpu", train=True)
                   for rows in (Rows(4, 0, (64,)), Rows(2, 0, (128,))))  # fmt: skip
    more = 6 * 2 * (2 * 128**2 - 4 * 64**2) + (2 * 128**2 - 4 * 64**2)  # all layers', and the mask itself
    assert long.peak - short.peak == pytest.approx(more, rel=0.1)


def test_nothing_is_allocated():
    spec = spec_of("llama-2-70b", dtype=BF16, lora=LoraSection(r=16), is_trained=True)
    assert all(parameter.is_meta for parameter in meta_model(spec).parameters())
    fake = fake_model(spec, FakeTensorMode(), layers=2, device="gpu")
    assert all(each.untyped_storage().device.type == "meta" for each in fake.parameters())
    assert weights(spec).lora == 4 * weights(spec).trained


def test_full_training_has_weights_gradients_and_moments_and_lora_only_its_own():
    full, lora = planned("sft", *SMALL), planned("sft", *SMALL, "lora.r=4")
    count = weights(spec_of("toy")).parameters
    assert parts(full, "train") | {"activations": 0} == {
        **{"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "activations": 0}
    }
    trained = weights(spec_of("toy", lora=LoraSection(r=4), is_trained=True)).trained
    found = parts(lora, "train")
    assert (found["weights"], found["adapters"], found["optimizer"]) == (2 * count, 4 * trained, 8 * trained)
    assert parts(lora, "save")["weights"] == (2 + 4) * count  # merged in float32 beside those in memory
    assert [phase.name for phase in planned("sft", *SMALL, "lora.r=4", device=GPU).phases] == ["train"]
    assert full.fits and full.peak == max(phase.total for phase in full.phases)


def test_several_processes_exchange_gradients_and_fsdp_splits_all_but_what_is_gathered():
    alone, two = (planned("rm", *SMALL, device=GPU, processes=count) for count in (1, 2))
    exchanged = parts(two, "train")["exchange"]
    assert exchanged == parts(alone, "train")["gradients"]
    split = planned("rm", *SMALL, device=GPU, processes=4, fsdp=True)
    assert parts(split, "train")["optimizer"] == parts(alone, "train")["optimizer"] // 4
    assert parts(split, "train").get("exchange") is None
    assert [phase.name for phase in split.phases] == ["train"]  # no device ever has the whole model
    assert any("--fsdp_cpu_ram_efficient_loading" in note for note in split.notes)


def test_a_micro_batch_holds_no_more_than_a_process_has():
    small = planned("sft", "data.max_length=128", "train.max_tokens_per_batch=4096", "train.batch_size=2")
    assert "micro-batches of 2 x 128 tokens" in small.notes


@pytest.mark.parametrize(
    ("row", "max_tokens", "filled"),
    [
        (Rows(1, 0, (100,)), 400, Rows(4, 0, (100,))),
        (Rows(1, 0, (300,)), 400, Rows(2, 0, (200,))),  # two dialogues of 200 tokens are one micro-batch
        (Rows(1, 0, (500,)), 400, Rows(1, 0, (500,))),  # one that is too long is one by itself
        (Rows(1, 200, (30,)), 400, Rows(2, 170, (30,))),
        (Rows(1, 10, (100, 100)), 400, Rows(2, 2, (99, 99))),
        (Rows(1, 0, (100,)), 4000, Rows(8, 0, (100,))),  # all there are
    ],
)
def test_a_full_micro_batch_holds_one_row_more_than_fit_of_the_longest(row, max_tokens, filled):
    assert fill(row, max_tokens, 8) == filled
    assert filled.num_tokens <= max(max_tokens, row.num_tokens)


def micro_batch_in(plan):
    """Rows of a micro-batch, and tokens of a row, by the plan's notes."""
    [note] = [note for note in plan.notes if note.startswith("micro-batches of ")]
    count, *lengths = map(int, re.findall(r"\d+", note))
    return count, sum(lengths)


@pytest.mark.parametrize(("length", "max_tokens"), [(128, 512), (300, 512), (512, 256)])
@pytest.mark.parametrize("packing", [True, False])
def test_no_micro_batch_of_sft_is_larger_than_planned(length, max_tokens, packing):
    """Dialogues of many lengths, the longest and others that fill rows better among them."""
    settings = [f"data.max_length={length}", f"train.max_tokens_per_batch={max_tokens}", "train.batch_size=64"]
    count, tokens = micro_batch_in(planned("sft", *settings, f"train.packing={str(packing).lower()}"))
    rng = random.Random(0)
    lengths = [length, *[min(length, max_tokens // 2)] * 4, *(rng.randint(1, length) for _ in range(59))]
    examples = [EncodedDialogue([1] * each, [True] * each) for each in lengths]
    row_tokens = min(length, max_tokens) if packing else None
    batches = dialogue_batches(examples, range(64), max_tokens=max_tokens, row_tokens=row_tokens)
    largest = max(batch.batch.input_ids.numel() for batch in batches)
    assert 0.95 * count * tokens <= largest <= count * tokens


def test_a_pair_of_long_responses_to_a_short_prompt_is_planned():
    """Prompt and longer response fit `data.max_length`, so both together may have nearly twice as many tokens."""
    count, tokens = micro_batch_in(planned("rm", "data.max_length=128", "train.max_tokens_per_batch=128"))
    assert (count, tokens) == (1, 16 + 2 * 112)


def test_fsdp_is_planned_for_models_whose_config_lists_the_kind_of_every_layer():
    shape = {
        **{"model_type": "qwen2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        "layer_types": ["full_attention"] * 3,
    }
    spec = ModelSpec(json.dumps(shape, sort_keys=True), compute=BF16, is_trained=True)
    model = meta_model(spec)
    layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert gathered(spec) == {"weights": 2 * (total - layer)}  # two of three layers, and what is in none
    assert reduced(spec) == {"gradients": 6 * layer + 2 * (total - 3 * layer)}


def test_ppo_on_one_backbone_is_smaller_than_models_of_their_own():
    sizes = ["prompts.max_prompt_length=32", "sampling={max_new_tokens: 16, max_rows: 8}",
             "rewards={helpfulness: toy, safety: toy, max_tokens_per_batch: 256}",
             "train={batch_size: 8, minibatch_size: 4, max_tokens_per_batch: 256}"]  # fmt: skip
    shared = planned("ppo", *sizes, "lora.r=4", device=GPU)
    apart = planned("ppo", *sizes, "lora.r=4", "ppo.share_backbone=never", device=GPU)
    full, lent = (planned("ppo", *sizes, f"ppo.offload={value}", device=GPU) for value in ("false", "true"))
    count = weights(spec_of("toy")).parameters
    assert parts(shared, "update")["weights"] == 2 * count
    critic = weights(spec_of("toy", head="score", dtype=BF16)).base
    assert parts(apart, "update")["weights"] == pytest.approx(2 * count + 3 * critic, abs=1000)
    assert parts(full, "update")["weights"] - parts(lent, "update")["weights"] == 4 * count + 2 * critic
    assert parts(lent, "measure")["weights"] > parts(lent, "update")["weights"]  # the reference is there
    kept = kv_bytes(model_config("toy"), BF16, prompts=8, rows=8, prompt_tokens=32, new_tokens=16)
    assert parts(shared, "sample")["kv_cache"] == kept
    assert shared.units == 200 and shared.unit == "iteration"


SIZES = ["prompts.max_prompt_length=32", "sampling={max_new_tokens: 16, max_rows: 8, num_candidates: 4}",
         "rewards={helpfulness: toy, safety: toy, max_tokens_per_batch: 256}",
         "train={batch_size: 8, minibatch_size: 4, max_tokens_per_batch: 256}"]  # fmt: skip


def test_a_guard_is_planned_where_it_is_and_the_held_out_answers_beside_it():
    looks = ["evaluation.guard=toy", "evaluation.prompts=toy:prompts.heldout"]
    judge, count = weights(spec_of("toy", head="score", dtype=BF16)), weights(spec_of("toy")).parameters
    without = planned("ppo", *SIZES, "evaluation.guard=toy", device=GPU)
    assert "guard" not in [phase.name for phase in without.phases]  # with no held-out prompts it is not loaded
    whole, lent = (planned("ppo", *SIZES, *looks, f"ppo.offload={value}", device=GPU) for value in ("false", "true"))
    assert parts(whole, "update")["weights"] - parts(without, "update")["weights"] == judge.base
    assert parts(lent, "guard")["weights"] - parts(lent, "update")["weights"] == judge.base  # comes to score
    shared = planned("ppo", *SIZES, *looks, "lora.r=4", device=GPU)
    assert parts(shared, "guard")["weights"] == 2 * count  # an adapter on the policy's weights
    kept = kv_bytes(model_config("toy"), BF16, prompts=8, rows=8, prompt_tokens=32, new_tokens=16)
    assert parts(whole, "sample")["kv_cache"] == kept  # of eight prompts, where rollouts have two


def test_the_best_policy_is_a_copy_in_the_memory_of_a_cpu():
    looks = ["evaluation.prompts=toy:prompts.heldout", "evaluation.patience=2"]
    count = weights(spec_of("toy")).parameters
    plain, patient = (planned("ppo", *SIZES, *looks[:n]) for n in (1, 2))
    assert parts(patient, "update")["weights"] - parts(plain, "update")["weights"] == 4 * count
    on_gpu = [planned("ppo", *SIZES, *looks[:n], device=GPU).peak for n in (1, 2)]
    assert on_gpu[0] == on_gpu[1]


def test_a_pipeline_knows_what_its_stages_made(tmp_path):
    stages = "\n".join(
        [
            "defaults: {lora: {r: 4}, data: {max_length: 64}, train: {batch_size: 4, max_tokens_per_batch: 128}}",
            "stages:",
            "  sft: {model: toy, data: {train: none.jsonl}}",
            "  rm-h: {stage: rm, kind: helpfulness, model: '${sft}', data: {train: none.jsonl}}",
            "  rm-s: {stage: rm, kind: safety, model: '${sft}', data: {train: none.jsonl}, lora: {r: RANK}}",
            "  ppo:",
            "    model: '${sft}'",
            "    rewards: {helpfulness: '${rm-h}', safety: '${rm-s}', max_tokens_per_batch: 128}",
            "    prompts: {prompts: none.jsonl, max_prompt_length: 32}",
            "    sampling: {max_new_tokens: 16, max_rows: 4}",
            "    train: {minibatch_size: 2}",
        ]
    )
    for rank, reason in ((4, "rewards and critic share"), (0, "models of their own: they were not all")):
        path = tmp_path / f"{rank}.yaml"
        path.write_text(stages.replace("RANK", str(rank)))
        configs, origins = load_stages(path, None, [])
        plan = plan_stage(configs["ppo"], "ppo", Planner(Setting(CPU), origins))
        assert plan.notes[0].startswith(reason)
        made = configs["ppo"].model.path
        assert origins[f"{made}/model"] == origins[made]  # either names it
        assert origins["runs/4/rm-h" if rank else "runs/0/rm-h"].rank == 8  # the SFT model's adapter and its own


def test_advice_is_planned_and_appears_where_it_does_not_fit():
    few_tokens = ["data.max_length=64", "train.max_tokens_per_batch=64"]  # weights decide, not activations
    configs, origins = load_stages(None, "sft", ["model=toy", *few_tokens])
    config = configs["sft"]
    plan = plan_stage(config, "sft", Planner(Setting(GPU), origins))
    tight = replace(GPU, memory=plan.peak - 1)
    planner = Planner(Setting(tight), origins)
    does_not = plan_stage(config, "sft", planner)
    assert plan.fits and not does_not.fits
    tips = advice(config, does_not, planner)
    assert any(tip.startswith("lora.r=16: ") and tip.endswith("fits") for tip in tips)
    assert any(tip.startswith("model.gradient_checkpointing=true: ") for tip in tips)
    assert any(tip.startswith("--gpu rtx4090-24gb: ") for tip in tips)


def test_ppo_is_told_to_split_its_models_where_they_are_trained_in_full():
    sizes = ["prompts.max_prompt_length=32", "sampling={max_new_tokens: 16, max_rows: 64}",
             "rewards={helpfulness: toy, safety: toy, max_tokens_per_batch: 256}",
             "train={batch_size: 64, minibatch_size: 32, max_tokens_per_batch: 256}"]  # fmt: skip
    whole = planned("ppo", *sizes, device=GPU).peak
    for lora, memory, is_told in (("lora.r=0", whole - 1, True), ("lora.r=4", 10**5, False)):
        configs, origins = load_stages(None, "ppo", ["model=toy", *sizes, lora])
        planner = Planner(Setting(replace(GPU, memory=memory)), origins)
        tips = advice(configs["ppo"], plan_stage(configs["ppo"], "ppo", planner), planner)
        assert any(tip.startswith("--fsdp --gpus 8") for tip in tips) == is_told
        assert any("more devices do not help" in tip for tip in tips) != is_told
        assert any(tip.startswith("ppo.offload=true") for tip in tips) == is_told


def test_fsdp_splits_ppos_policy_and_critic_and_leaves_the_others_whole():
    sizes = ["prompts.max_prompt_length=32", "sampling={max_new_tokens: 16, max_rows: 8}",
             "rewards={helpfulness: toy, safety: toy, max_tokens_per_batch: 256}",
             "train={batch_size: 8, minibatch_size: 4, max_tokens_per_batch: 256}"]  # fmt: skip
    copied, split = (planned("ppo", *sizes, device=GPU, processes=2, fsdp=fsdp) for fsdp in (False, True))
    spec, critic = spec_of("toy"), spec_of("toy", head="score")
    count, judge = 2 * weights(spec).parameters, weights(replace(critic, dtype=BF16)).base
    both = weights(spec).base + weights(critic).base
    assert parts(copied, "score")["exchange"] == both  # DDP's buckets
    frozen = count + 2 * judge  # all in bfloat16
    assert parts(split, "score")["weights"] == both // 2 + frozen
    assert parts(split, "sample")["weights"] == both // 2 + frozen + count
    assert parts(split, "update")["weights"] == both // 2 + frozen + count  # both layers, in bfloat16
    assert parts(split, "update")["optimizer"] == both and "exchange" not in parts(split, "update")
    assert split.notes[-1] == "FSDP has been run on CPUs only in this project"


def tips_on(memory, stage, *overrides):
    """Advice for a stage of the toy model on a GPU of that many bytes."""
    configs, origins = load_stages(None, stage, ["model=toy", *overrides])
    planner = Planner(Setting(replace(GPU, memory=memory)), origins)
    return advice(configs[stage], plan_stage(configs[stage], stage, planner), planner)


def test_fewer_responses_side_by_side_are_advised_though_their_number_was_left_to_the_plan():
    """`sampling.max_rows` is null by default: 128 in `reject` on a GPU with room, of which a half is named."""
    sizes = ["prompts.max_prompt_length=512", "sampling={max_new_tokens: 128, num_candidates: 8}",
             "rewards={helpfulness: toy, safety: toy, max_tokens_per_batch: 512}"]  # fmt: skip
    configs, origins = load_stages(None, "reject", ["model=toy", *sizes])
    assert configs["reject"].sampling.max_rows is None
    plan = plan_stage(configs["reject"], "reject", Planner(Setting(GPU), origins))
    assert plan.worst.name == "sample" and plan.responses > 8
    tight = Planner(Setting(replace(GPU, memory=plan.peak // 2)), origins)
    tips = advice(configs["reject"], plan, tight)
    assert any(tip.startswith(f"sampling.max_rows={plan.responses // 2}: ") for tip in tips)
    assert any(tip.startswith("prompts.max_prompt_length=256: ") for tip in tips)
    assert any(tip.startswith("sampling.max_new_tokens=64: ") for tip in tips)


@pytest.mark.parametrize(
    ("stage", "settings", "judges"),
    [
        ("distil", ["model=toy"], ["safety"]),
        ("reject", ["model=toy", "rewards.max_tokens_per_batch=64"], ["rewards.helpfulness", "rewards.safety"]),
        ("eval", ["policies.a=toy", "rewards.safety=llama-2-7b"], ["rewards.helpfulness"]),
        ("reject", ["model={path: toy, dtype: float32}"], ["rewards.helpfulness", "rewards.safety"]),
    ],
)
def test_a_reward_model_that_is_not_named_has_the_policys_shape(stage, settings, judges):
    configs, _ = load_stages(None, stage, settings)
    for judge in judges:
        assert attrgetter(judge)(configs[stage]).path == "toy"
        assert attrgetter(judge)(configs[stage]).dtype == "auto", "its own, not the policy's"


def test_a_reward_model_that_is_named_is_planned_as_it_is():
    configs, _ = load_stages(None, "reject", ["model={path: toy, dtype: float32}", "rewards.safety=llama-2-7b"])
    assert (configs["reject"].rewards.safety.path, configs["reject"].rewards.safety.dtype) == ("llama-2-7b", "auto")


@pytest.mark.parametrize("policies", ["policies={}", "policies=runs/x"])
def test_policies_of_another_form_are_the_users_mistake(policies):
    with pytest.raises(ConfigError, match="policies"):
        load_stages(None, "eval", [policies])


def test_smaller_minibatches_and_upper_layers_are_advised():
    short = tips_on(10**5, "ppo", "lora.r=4", "prompts.max_prompt_length=32", "sampling={max_new_tokens: 64}",
                    "rewards={helpfulness: toy, safety: toy, max_tokens_per_batch: 512}",
                    "train={batch_size: 8, minibatch_size: 4, max_tokens_per_batch: 512}")  # fmt: skip
    assert any(tip.startswith("train.minibatch_size=2: ") for tip in short)
    assert any(tip.startswith("lora.last_layers=1: ") for tip in tips_on(10**5, "sft", "lora.r=4"))


def test_changes_are_joined_until_they_are_enough():
    sizes = ["data.max_length=128", "train={max_tokens_per_batch: 4096, batch_size: 64}"]
    plan = planned("sft", *sizes, device=GPU)
    enough = [tip for tip in tips_on(plan.peak - 1, "sft", *sizes) if tip.startswith("together")]
    assert not enough  # the first change alone was
    [joined] = [tip for tip in tips_on(10**5, "sft", *sizes) if tip.startswith("together")]
    for part in ("model.gradient_checkpointing=true", "train.max_tokens_per_batch=1024", "lora.r=16"):
        assert part in joined
    assert joined.endswith("still too much")


def test_processes_that_cannot_share_a_minibatch_are_refused_as_the_run_refuses_them():
    sizes = ["sampling.num_candidates=4", "train={batch_size: 64, minibatch_size: 16}", "prompts.max_prompt_length=32"]
    with pytest.raises(ConfigError, match=r"minibatch_size = 16 cannot be shared by 8 processes with 4 rollouts"):
        planned("ppo", *sizes, device=GPU, processes=8)
    assert planned("ppo", *sizes, "sampling.max_new_tokens=16", device=GPU, processes=4).peak


def test_work_takes_as_long_as_the_slower_of_arithmetic_and_memory():
    assert Work(flops=4e13).seconds(GPU, 0.4) == pytest.approx(1.0)  # 1e14 a second, of which 0.4
    assert Work(flops=4e13, bytes_read=1.2e12).seconds(GPU, 0.4) == pytest.approx(3.0)


def test_every_stage_of_the_toy_pipeline_is_planned():
    found = CliRunner().invoke(app, ["plan", "recipes/toy/pipeline.yaml", "--gpu", "h100-80gb", "--json"])
    assert found.exit_code == 0, found.output
    plans = json.loads(found.stdout)
    assert {plan["stage"] for plan in plans} == {"sft", "gatt", "rm", "reject", "ppo", "eval"}
    assert all(plan["fits"] and plan["peak_gb"] > 0 and plan["seconds_per_unit"] > 0 for plan in plans)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "card", "options"),
    [
        ("llama2-7b/lora.yaml", "h100-80gb", []),
        ("llama2-7b/lora.yaml", "h100-80gb", ["--gpus", "8"]),
        ("llama2-7b/lora.yaml", "rtx4090-24gb", ["defaults.model.gradient_checkpointing=true"]),
        ("sft llama2-7b/sft-full.yaml", "h100-80gb", ["--gpus", "8", "--fsdp"]),
        ("rm llama2-7b/rm-helpfulness-full.yaml", "h100-80gb", ["model=llama-2-7b", "--gpus", "8", "--fsdp"]),
        ("rm llama2-7b/rm-safety-full.yaml", "h100-80gb", ["model=llama-2-7b", "--gpus", "8", "--fsdp"]),
        (
            "reject llama2-7b/reject-full.yaml",
            "h100-80gb",
            ["model=llama-2-7b", "rewards={helpfulness: llama-2-7b, safety: llama-2-7b}", "--gpus", "8"],
        ),
        (
            "sft llama2-7b/rs-full.yaml",
            "h100-80gb",
            ["data.train=[sft_general.train, sft_safety.train, sft_oasst_multiturn.train]", "--gpus", "8", "--fsdp"],
        ),
        (
            "ppo llama2-7b/ppo-full.yaml",
            "h100-80gb",
            ["model=llama-2-7b", "rewards={helpfulness: llama-2-7b, safety: llama-2-7b}", "--gpus", "8", "--fsdp"],
        ),
        ("sft llama2-70b/sft-lora.yaml", "h100-80gb", ["--gpus", "32", "--fsdp"]),
        ("sft llama2-70b/sft-full.yaml", "h100-80gb", ["--gpus", "32", "--fsdp"]),
        ("rm llama2-70b/rm-lora.yaml", "h100-80gb", ["model.path=llama-2-70b", "--gpus", "32", "--fsdp"]),
    ],
)
def test_the_recipes_of_llama_2_fit_the_cards_they_name(recipe, card, options):
    *stage, path = recipe.split()
    found = CliRunner().invoke(app, ["plan", *stage, f"recipes/{path}", *options, "--gpu", card, "--json"])
    assert found.exit_code == 0, found.output
    assert all(plan["fits"] for plan in json.loads(found.stdout))


def test_the_table_says_what_does_not_fit():
    arguments = ["plan", "sft", "model=llama-2-7b", "data.max_length=512", "train.max_tokens_per_batch=512"]
    found = CliRunner().invoke(app, [*arguments, "--gpu", "a100-40gb"])
    assert found.exit_code == 0, found.output
    assert "too much" in found.stdout and "sft does not fit" in found.stdout and "lora.r=16" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["plan", "sft", "model=toy", "--gpu", "tpu"], "no such device"),
        (["plan", "sft", "model=toy", "--gpus", "0"], "at least one"),
        (["plan", "sft", "model=toy", "--gpu", "cpu", "--gpus", "2", "--fsdp"], "accelerators"),
        (["plan", "sft", "model=toy", "--utilisation", "2"], "a share"),
        (["plan", "sft", "model=toy", "data.max_lenght=3"], 'Did you mean "max_length"'),
        (["plan", "model=toy", "sampling.max_rows=3"], "Name the stage"),
        (["plan", "sft", "recipes/toy/pipeline.yaml"], "is a pipeline, of which all stages are planned. Leave sft out"),
        (["plan", "model=toy", "sampling.rows=3"], "No stage has such settings"),
        (["plan", "ppo", "model=toy", "sampling.engine=vllm", "--gpus", "2"], "runs in one process"),
        (["plan", "gatt", "model=llama-2-70b", "sampling.engine=vllm", "--gpu", "h100-80gb"], "tensor_parallel_size"),
        (
            [
                "plan",
                "ppo",
                "model=toy",
                "lora.r=4",
                "ppo.share_backbone=always",
                "--gpu",
                "h100-80gb",
                "rewards.safety={path: toy, dtype: float32}",
            ],
            "ppo.share_backbone=always: rewards.safety: computes in float32",
        ),
        (["plan", "ppo", "model=toy", "lora.r=4", "--gpus", "2", "--fsdp", "--gpu", "h100-80gb"], "FSDP would split"),
        (
            ["plan", "reject", "model=llama-3-8b", "rewards.safety=llama-2-7b", "sampling.max_new_tokens=4096"],
            "leaves no room for a prompt",
        ),
    ],
)
def test_mistakes_are_the_users(arguments, problem):
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, ConfigError)
    assert problem in str(found.exception)


def test_a_model_out_of_reach_is_an_error_that_names_the_shapes_there_are():
    with pytest.raises(ModelError, match=r"config\.json.*llama-2-7b"):
        model_config("nobody/has-this-model")


def test_known_devices_have_memory_and_speed():
    assert find_device("h100-80gb").memory == 80 * 10**9
    here = find_device("cpu")
    assert here.memory > 10**9 and here.flops > 10**9 and here.bandwidth > 10**8
    half = here.shared(2)
    assert (half.memory, half.flops, half.bandwidth) == (here.memory // 2, here.flops / 2, here.bandwidth / 2)
    assert find_device("h100-80gb").shared(2) == find_device("h100-80gb"), "a card for every process"


def test_steps_are_of_the_rows_that_are_trained_on(tmp_path):
    """Of the 18 of `a` and the 40 of `b`: SFT's limit by source, and the mixes of reward models."""
    for name, count in (("a", 18), ("b", 40)):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * count)
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    one_by_one = ["train.batch_size=1", "train.epochs=1"]
    assert planned("sft", f"data.train=[{a},{b}]", f"data.max_rows_of={{{b}: 6}}", *one_by_one).units == 24
    for mix, pairs in (("all", 58), ("equal_parts", 36), ("90/10", 20), (f"{{{a}: 1, {b}: 2}}", 54)):
        data = [f"data.train=[{a}]", f"data.mix_in=[{b}]", f"data.mix={mix}"]
        assert planned("rm", "kind=helpfulness", *data, *one_by_one).units == pairs, mix


def test_rollouts_of_a_prompt_that_are_over_the_budget_are_planned_in_parts():
    """Of eight with 64 tokens to prompts of 64, two fit into 200 tokens; the prompt is computed four times."""
    sizes = ["sampling.num_candidates=8", "sampling.max_new_tokens=64", "prompts.max_prompt_length=64"]
    sizes += ["rewards={helpfulness: toy, safety: toy}", "train.batch_size=16", "train.minibatch_size=16"]
    whole, parted = (planned("ppo", *sizes, f"train.max_tokens_per_batch={budget}") for budget in (4096, 200))
    assert "2 x 64 + 8 x 64 tokens" in whole.notes[1]
    assert "2 x 2 + 2 x 49 tokens" in parted.notes[1], "two with short prompts hold more than one whole one"
    activations = [parts(plan, "update")["activations"] for plan in (whole, parted)]
    assert activations[1] < activations[0] / 2
    assert 1 < parted.unit_seconds / whole.unit_seconds < 2


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{}\n" * 9)[:-9]], ids=["no gzip", "cut off"])
def test_a_damaged_file_is_no_bug(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: is no whole gzip file"):
        planned("sft", f"data.train={tmp_path / 'a.jsonl.gz'}")


@pytest.mark.parametrize(("limit", "memory"), [("4000000", 4_000_000), ("max", None), (None, None)])
def test_a_container_has_the_memory_that_it_is_allowed(tmp_path, monkeypatch, limit, memory):
    monkeypatch.setattr(devices, "LIMIT_FILES", ())
    whole = find_device("cpu").memory
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(devices, "LIMIT_FILES", (tmp_path / "memory.max",))
    assert find_device("cpu").memory == (memory or whole)


@pytest.mark.parametrize(("name", "opener"), [("a.json", open), ("a.json.gz", gzip.open)])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_is_planned_by_its_rows_not_its_lines(tmp_path, indent, name, opener):
    with opener(tmp_path / name, "wt") as file:
        json.dump([{"messages": []}] * 7, file, indent=indent)
    plan = planned("sft", f"data.train={tmp_path / name}", "train.batch_size=1", "train.epochs=1")
    assert plan.units == 7


@pytest.mark.parametrize("device", ["cpu", "h100-80gb"])
def test_dialogues_take_as_long_as_their_turns(device):
    """Reading the weights for every token counts in every turn, too: on a GPU it is what decides."""
    lengths = ["prompts.max_prompt_length=256", "sampling.max_new_tokens=64", "sampling.max_rows=8"]
    at_work = CPU if device == "cpu" else find_device(device)
    for stage, model in (("gatt", ["model=llama-2-7b"]), ("eval", ["kind=gatt", "policies.a=llama-2-7b"])):
        seconds = []
        for turns in (2, 20):
            configs, origins = load_stages(None, stage, [*model, *lengths, f"prompts.turns={turns}"])
            [(name, config)] = configs.items()
            seconds.append(plan_stage(config, name, Planner(Setting(at_work, 1, False), origins)).unit_seconds)
        assert seconds[1] == pytest.approx(10 * seconds[0]), stage


def test_ppo_draws_all_rollouts_of_a_prompt_however_many_go_side_by_side():
    settings = ["sampling.num_candidates=16", "train.batch_size=64", "train.minibatch_size=64", "lora.r=4"]
    few, many = (
        planned("ppo", "model=llama-2-7b", *settings, f"sampling.max_rows={rows}", device=find_device("h100-80gb"))
        for rows in (4, 16)
    )
    assert few.unit_seconds > 1.5 * many.unit_seconds, "the weights are read four times as often"


@pytest.mark.parametrize(
    ("setting", "is_measured"),
    [("top_p=1.0", True), ("top_p=0.9", False), ("top_k=5", False), ("temperature=0", False)],
)
def test_an_evaluations_divergence_is_planned_where_it_is_measured(setting, is_measured):
    rewards = ["rewards.helpfulness=toy", "rewards.safety=toy"]
    settings = ["policies.a=toy", "policies.b=toy", *rewards, f"sampling.{setting}"]
    configs, origins = load_stages(None, "eval", settings)
    [(name, config)] = configs.items()
    plan = plan_stage(config, name, Planner(Setting(CPU, 1, False), origins))
    assert ("KL of b" in [phase.name for phase in plan.phases]) == is_measured


def test_a_round_is_planned_with_its_trials_and_the_candidates_of_earlier_rounds(tmp_path):
    prompts, earlier = tmp_path / "prompts.jsonl", tmp_path / "candidates.jsonl"
    prompts.write_text("{}\n" * 100)
    earlier.write_text("{}\n" * 400)
    base = [f"prompts.prompts={prompts}", "sampling.num_candidates=4", "sampling.max_rows=8"]
    plain = planned("reject", *base).seconds
    tried = planned("reject", *base, "sampling.temperature_grid=[0.6,1.0]", "sampling.temperature_prompts=50").seconds
    assert tried == pytest.approx(1.5 * plain)  # what the better of both drew is kept
    again = planned("reject", *base, "round=2", f"earlier_rounds=[{earlier}]").seconds
    to_come = planned("reject", *base, "round=2", f"earlier_rounds=[{tmp_path / 'no.jsonl'}]").seconds
    assert plain < again < 2 * plain and to_come == again, "as many as this round draws"
    assert planned("reject", *base, "round=2", f"earlier_rounds=[{earlier}]", "rescore_earlier=false").seconds == plain


def test_vllm_takes_its_share_of_a_gpu_and_a_cache_of_fixed_size_on_a_cpu():
    engine = ["sampling={engine: vllm, max_new_tokens: 64}", "prompts.max_prompt_length=64"]
    base = weights(spec_of("toy", dtype=BF16)).base
    assert parts(planned("gatt", *engine), "sample")["vllm"] == base + 2 * 2**30
    fixed = "sampling.vllm={kv_cache_memory_bytes: 1000}"
    assert parts(planned("gatt", *engine, fixed), "sample")["vllm"] == base + 1000
    assert parts(planned("gatt", *engine, device=GPU), "sample")["vllm"] == int(0.92 * GPU.memory)
    spread = ["model=llama-2-70b", *engine, "sampling.vllm={tensor_parallel_size: 4}"]
    assert planned("gatt", *spread, device=find_device("h100-80gb")).fits


def test_prompts_are_planned_as_long_as_every_reader_lets_them_be():
    sizes = ["model=llama-3-8b", "prompts.max_prompt_length=6000", "sampling.max_new_tokens=256"]
    plan = planned("reject", *sizes, "rewards.helpfulness=llama-3-8b", "rewards.safety=llama-2-7b")
    assert plan.notes[-1].endswith(f"prompts of {4096 - 256} tokens")


def test_answers_of_sft_are_planned_in_every_way_of_training_it():
    settings = [*SMALL, "data.valid=toy:sft.valid", "evaluation={num_answers: 1000, max_new_tokens: 16}"]
    kept = kv_bytes(model_config("toy"), BF16, prompts=128, rows=128, prompt_tokens=128, new_tokens=16)
    for options in ({}, {"processes": 2}, {"processes": 2, "fsdp": True}):
        plan = planned("sft", *settings, device=GPU, **options)
        assert parts(plan, "answers")["kv_cache"] == kept  # the engine's own limit, in every process
        assert ("exchange" in parts(plan, "answers")) == (options == {"processes": 2})
    no_room = planned("sft", *settings, "evaluation.max_new_tokens=100000")
    assert "answers" not in [phase.name for phase in no_room.phases]


def test_lora_on_the_upper_layers_goes_back_through_all_of_them_where_layers_are_computed_again():
    lora = LoraSection(r=4, last_layers=2)
    spec = small_spec(is_trained=True, dtype=BF16, lora=lora)
    assert spec.adapted_layers == 2 and replace(spec, checkpointing=True).adapted_layers == 6


def test_scoring_takes_the_tokens_of_whole_rows():
    """However few tokens rows are shortened to, so that a micro-batch is full."""
    rows, draws = Rows(2, 170, (30,)), Draws(4, 1, prompt_tokens=200, new_tokens=30)
    assert scoring_work(Pass(0, 400), rows, draws, responses=2) == Work(460)


def test_a_model_of_text_and_images_is_not_planned(tmp_path):
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gemma3 of text and images cannot be planned"):
        model_config(str(tmp_path))


def test_held_adds_up():
    spec = spec_of("toy")
    assert held(spec, spec) == {"weights": 2 * weights(spec).base}
    assert isinstance(run_pass(spec, Rows(1, 4, (4,)), "logprobs", device="cpu"), Pass)
    assert isinstance(meta_model(spec), nn.Module)
