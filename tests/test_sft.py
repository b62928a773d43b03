"""Demonstrations on their way to training, and the held-out loss."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from alignment.chat import EncodedDialogue, encode_dialogue
from alignment.chat_formats import CHATML, chat_format
from alignment.cli.summary import print_result
from alignment.config import load_config
from alignment.data import load_dialogues
from alignment.dialogue import Dialogue, Message, PreferencePair
from alignment.errors import DataError, ModelError, RunError, TrainingError
from alignment.headlines import one_line
from alignment.logprobs import response_logprobs
from alignment.model_folders import load_chat_of
from alignment.prefix_batch import Branch, Tree, collate
from alignment.runs import mark_complete
from reward_models.preferences import encode_pairs
from sft import trainer
from sft.config import SFTConfig, SFTEvaluation
from sft.evaluate import evaluate, response_loss, sample_answers
from sft.examples import Examples, dialogue_batches, make_examples
from sft.trainer import as_dataset


@pytest.fixture
def chat(make_tokenizer):
    return chat_format(make_tokenizer(template=CHATML))


def dialogue(turns: int, *, train_on: str = "all", system: bool = False, source: str = "s") -> Dialogue:
    texts = ["How are you today?", "I am fine, thank you."]
    messages = [Message(("user", "assistant")[index % 2], f"{texts[index % 2]} {index}") for index in range(turns)]
    head = [Message("system", "Be brief.")] if system else []
    return Dialogue(messages=(*head, *messages), train_on=train_on, source=source)


def test_a_dialogue_of_just_the_longest_length_stays_whole(chat):
    length = len(encode_dialogue(chat, dialogue(4)).input_ids)
    found = make_examples(chat, [dialogue(4)], max_length=length, overlong="truncate")
    assert (len(found.encoded[0].input_ids), found.cut, found.dropped) == (length, 0, {})


def test_one_token_more_and_the_oldest_exchange_goes_but_the_system_turn_stays(chat):
    long = dialogue(6, system=True)
    length = len(encode_dialogue(chat, long).input_ids)
    found = make_examples(chat, [long], max_length=length - 1, overlong="truncate")
    shorter = Dialogue(messages=(long.messages[0], *long.messages[3:]), source="s")
    assert found.encoded == [encode_dialogue(chat, shorter)]
    assert (found.cut, found.dialogues) == (1, [shorter])


def test_rows_are_dropped_where_that_is_asked_for_or_nothing_is_left_to_cut(chat):
    length = len(encode_dialogue(chat, dialogue(2)).input_ids)
    rows = [dialogue(2, source="short"), dialogue(4, source="long")]
    found = make_examples(chat, rows, max_length=length, overlong="drop")
    assert (found.dialogues, found.cut, found.dropped) == (rows[:1], 0, {"too_long": 1})
    found = make_examples(chat, rows, max_length=length - 1, overlong="truncate")
    assert (found.dialogues, found.dropped) == ([], {"too_long": 2})


def test_a_ghost_attention_dialogue_never_loses_its_first_turn(chat):
    """Its instruction stands there: without it the kept answers would make no sense. The exchange after it goes."""
    long = dialogue(6, train_on="last", system=True)
    shorter = Dialogue(messages=(*long.messages[:3], *long.messages[5:]), train_on="last", source="s")
    length = len(encode_dialogue(chat, long).input_ids)
    found = make_examples(chat, [long], max_length=length - 1, overlong="truncate")
    assert (found.dialogues, found.cut, found.dropped) == ([shorter], 1, {})
    assert found.encoded == [encode_dialogue(chat, shorter)]
    length = len(found.encoded[0].input_ids)
    found = make_examples(chat, [long], max_length=length - 1, overlong="truncate")
    assert (found.encoded, found.dropped) == ([], {"too_long": 1})


def test_a_text_that_the_layout_refuses_is_named_with_its_line_or_counted(make_tokenizer, write_file):
    chat = chat_format(make_tokenizer(), "llama2")
    rows = [[user, "Fine."] for user in ("Hi", "What is [INST]?", "And <<SYS>>?")]
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), row, strict=True)]})
        for row in rows
    ]
    path = write_file("demos.jsonl", "\n".join(lines))
    loaded = load_dialogues([str(path)]).rows
    with pytest.raises(DataError) as caught:
        make_examples(chat, loaded, max_length=100, overlong="truncate")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:2", f"{path}:3"]
    found = make_examples(chat, loaded, max_length=100, overlong="truncate", on_error="skip")
    assert (len(found.encoded), found.dropped) == (1, {"refused_by_chat_format": 2})


def test_a_pair_that_the_layout_refuses_is_named_or_counted(make_tokenizer):
    chat = chat_format(make_tokenizer(), "llama2")
    prompt = (Message("user", "Hi"),)
    pairs = [PreferencePair(prompt=prompt, chosen="a", rejected=bad, where=f"f:{bad}") for bad in ("b", "[/INST]")]
    options = {"margins": {}, "unrated_margin": 0.0, "max_length": 100, "overlong": "drop"}
    with pytest.raises(DataError, match=r"f:\[/INST\]: a assistant turn contains \[/INST\]"):
        encode_pairs(chat, pairs, **options)
    assert encode_pairs(chat, pairs, **options, on_error="skip").dropped == {"refused_by_chat_format": 1}


def example(length: int, trained: int) -> EncodedDialogue:
    ids = torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return EncodedDialogue(ids, [False] * (length - trained) + [True] * trained)


def test_the_held_out_loss_is_a_mean_over_tokens_overall_and_by_source(llama):
    encoded = [example(9, 2), example(20, 15), example(6, 1)]
    losses = []
    for one in encoded:
        batch = collate([[Tree([], [Branch(one.input_ids, one.loss_mask)])]])
        losses.append(-response_logprobs(llama, batch).detach())
    named = [dialogue(2, source=name) for name in ("a", "b", "a")]
    found = evaluate(llama, Examples(encoded, named, 0, {}), max_tokens=30, dtype=torch.float32)
    assert found["tokens"] == 18
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
    by_source = {name: row["loss"] for name, row in found["by_source"].items()}
    assert by_source == {
        "a": pytest.approx(torch.cat([losses[0], losses[2]]).mean().item(), abs=1e-5),
        "b": pytest.approx(losses[1].mean().item(), abs=1e-5),
    }
    assert [row["tokens"] for row in found["by_source"].values()] == [3, 15]
    assert evaluate(llama, Examples([], [], 0, {}), max_tokens=30, dtype=torch.float32) == {}


def test_the_held_out_loss_is_measured_without_dropout(llama):
    examples = Examples([example(12, 8)], [dialogue(2)], 0, {})
    still = evaluate(llama, examples, max_tokens=30, dtype=torch.float32)
    llama.model.layers[0].mlp.down_proj = nn.Sequential(llama.model.layers[0].mlp.down_proj, nn.Dropout(0.5))
    assert evaluate(llama.train(), examples, max_tokens=30, dtype=torch.float32)["loss"] == pytest.approx(still["loss"])


def test_trl_sees_labels_on_trained_tokens_only():
    one = example(5, 2)
    row = as_dataset([one])[0]
    assert row == {"input_ids": one.input_ids, "labels": [-100] * 3 + one.input_ids[3:]}


ATTENTIONS = ["eager", "sdpa", "align_tree"]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_dialogues_have_the_loss_and_gradient_of_dialogues_alone(make_llama, attention):
    """Four dialogues of 9, 20, 6 and 14 tokens, in rows of 30, against rows of their own, on every attention."""
    encoded = [example(9, 2), example(20, 15), example(6, 1), example(14, 14)]
    model = make_llama()
    losses = [-response_logprobs(model, collate([[Tree([], [Branch(e.input_ids, e.loss_mask)])]])) for e in encoded]
    num_tokens = sum(map(len, losses))
    expected = torch.cat(losses).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.set_attn_implementation(attention)
    parts = list(dialogue_batches(encoded, range(4), max_tokens=60, row_tokens=30))
    [part] = parts
    assert part.batch.input_ids.shape[0] == 2 and part.batch.num_branches == 4
    loss = response_loss(model, part)[0] / num_tokens
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_packed_dialogue_is_blind_to_the_one_before_it(make_llama, attention):
    """Other tokens in the first dialogue of a row leave the log-probabilities of the second as they are."""
    model = make_llama()
    model.set_attn_implementation(attention)
    found = []
    for first in (example(12, 12), EncodedDialogue([5] * 12, [True] * 12)):
        [part] = dialogue_batches([first, example(9, 9)], range(2), max_tokens=60, row_tokens=30)
        assert part.batch.branch_lengths.tolist() == [12, 9]
        found.append(response_logprobs(model, part.batch).detach()[part.batch.target_branches == 1])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_an_attention_that_takes_no_mask_is_refused(llama, attention):
    [part] = dialogue_batches([example(9, 2)], range(1), max_tokens=60, row_tokens=30)
    llama.config._attn_implementation = attention
    with pytest.raises(ModelError, match="cannot keep responses in a row apart"):
        response_logprobs(llama, part.batch)


def test_a_truncated_dialogue_is_counted_and_its_answer_whole(chat):
    rows = [dialogue(6), dialogue(2)]
    length = len(encode_dialogue(chat, dialogue(4)).input_ids)
    found = make_examples(chat, rows, max_length=length, overlong="truncate")
    assert (found.cut, found.dropped) == (1, {})
    answer = chat.encode_response(rows[0].messages[-1].content)
    ids = found.encoded[0].input_ids
    closing = ids[len(ids) - 1 :]
    assert ids[-len(answer) - len(closing) : -len(closing)] == answer


def test_trained_answers_that_go_with_old_exchanges_are_counted(chat):
    """Two of three answers go; where only the last one is trained, none that was."""
    length = len(encode_dialogue(chat, dialogue(2)).input_ids)
    assert make_examples(chat, [dialogue(6)], max_length=length, overlong="truncate").answers_cut == 2
    length = len(encode_dialogue(chat, dialogue(4)).input_ids)
    assert make_examples(chat, [dialogue(6, train_on="last")], max_length=length, overlong="truncate").answers_cut == 0


def sft_config(folder, *extra: str) -> SFTConfig:
    settings = ["model=toy", "model.dtype=float32", "run.device=cpu", "train.max_steps=1", "train.batch_size=2"]
    return load_config(SFTConfig, None, [*settings, "evaluation.num_answers=0", *extra, f"run.dir={folder}"])


@pytest.fixture
def experts(make_tokenizer, tmp_path) -> Path:
    """A random Mixtral of two layers and two experts."""
    tokenizer = make_tokenizer(template=CHATML)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_local_experts=2,
        num_experts_per_tok=1,
        router_aux_loss_coef=0.02,
    )
    for part in (MixtralForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_mixture_of_experts_is_trained_without_its_own_loss_and_keeps_its_settings(experts, tmp_path):
    data = ["data.train=toy:sft.train", "data.valid=toy:sft.valid", "data.max_rows=4", "data.max_valid_rows=4"]
    settings = [f"model.path={experts}", *data, "evaluation.num_answers=1", "train.max_steps=2"]
    result = trainer.run(sft_config(tmp_path / "run", *settings))
    assert result["steps"] == 2 and result["valid_loss_after"] < result["valid_loss_before"]
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (saved["router_aux_loss_coef"], saved["output_router_logits"]) == (0.02, False)


def test_a_resumed_mixture_of_experts_goes_on_with_its_trained_weights(experts, tmp_path, monkeypatch):
    """In files it has an array for each expert, in memory one for all."""
    settings = [f"model.path={experts}", "data.train=toy:sft.train", "data.max_rows=8", "optim.lr=1e-2"]
    settings += ["train.max_steps=4", "train.save_every=2"]
    trainer.run(sft_config(tmp_path / "whole", *settings))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_model", lambda *_: pytest.fail("no disk"))
        with pytest.raises(pytest.fail.Exception, match="no disk"):
            trainer.run(sft_config(tmp_path / "cut", *settings))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    trainer.run(sft_config(tmp_path / "cut", *settings), resume=True)
    whole, cut, base = (load_file(next(folder.glob("*.safetensors"))) for folder in
                        (tmp_path / "whole" / "model", tmp_path / "cut" / "model", experts))  # fmt: skip
    moved = [name for name, weight in whole.items() if not weight.equal(base[name])]
    assert any("experts" in name for name in moved)
    assert whole.keys() == cut.keys() and all(cut[name].equal(weight) for name, weight in whole.items())


def test_a_checkpoint_without_a_weight_is_refused(experts, tmp_path, monkeypatch):
    settings = [f"model.path={experts}", "data.train=toy:sft.train", "data.max_rows=8"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_model", lambda *_: pytest.fail("no disk"))
        with pytest.raises(pytest.fail.Exception, match="no disk"):
            trainer.run(sft_config(tmp_path / "run", *settings))
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if "experts" in name)
    del weights[name]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    mark_complete(checkpoint)
    with pytest.raises(RunError, match=rf"checkpoints: its checkpoint has no {name} and 0 others"):
        trainer.run(sft_config(tmp_path / "run", *settings), resume=True)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_after_the_last_step_is_no_model(loss, tmp_path, monkeypatch):
    found = iter([{"loss": 2.0}, {"loss": loss}])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: next(found))
    data = ["data.train=toy:sft.train", "data.valid=toy:sft.valid", "data.max_rows=4", "data.max_valid_rows=4"]
    message = rf"the held-out loss is {loss} after the last step: lower optim\.lr .*, in a pipeline --from STAGE"
    with pytest.raises(TrainingError, match=message):
        trainer.run(sft_config(tmp_path / "run", *data))
    assert not (tmp_path / "run" / "model").exists()


def as_line(found: Dialogue) -> str:
    return json.dumps(found.to_json()) + "\n"


def test_what_a_run_left_out_is_in_its_result_and_its_line(tmp_path, write_file):
    """A row of three exchanges loses two, one is too long, one unreadable; held out, one is too long."""
    long = Dialogue(messages=(Message("user", "x" * 200), Message("assistant", "y")))
    rows = [as_line(dialogue(2)), as_line(dialogue(6)), as_line(long), '{"messages": []}\n']
    train, valid = write_file("train.jsonl", "".join(rows)), write_file("valid.jsonl", as_line(long) + rows[0])
    chat = load_chat_of("toy")[0]
    length = len(encode_dialogue(chat, dialogue(2)).input_ids)
    settings = [f"data.train={train}", f"data.valid={valid}", f"data.max_length={length}", "data.on_error=skip"]
    result = trainer.run(sft_config(tmp_path / "run", *settings))
    assert result["left_out"] == {
        "train": {"unreadable": 1, "too_long": 1, "history_cut": 1, "answers_cut": 2},
        "valid": {"too_long": 1},
    }
    assert one_line(result).endswith(
        "; train left out 1 unreadable, 1 too long, cut the history of 1 (with 2 answers); valid left out 1 too long"
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["train"] == {"rows": 2, "history_cut": 1, "answers_cut": 2, "dropped": {"too_long": 1}}


def test_where_nothing_is_left_to_train_on_the_reason_is_told(tmp_path, write_file):
    context = load_chat_of("toy")[1]
    path = write_file("long.jsonl", as_line(Dialogue(messages=(Message("user", "x" * 600), Message("assistant", "y")))))
    for length, limit in (
        (100, "100 tokens, data.max_length"),
        (9999, f"{context} tokens, the model's context"),
    ):
        with pytest.raises(DataError, match=rf"1 too_long \(even without their older turns over {limit}\)"):
            trainer.run(sft_config(tmp_path / "run", f"data.train={path}", f"data.max_length={length}"))
    path = write_file("tags.jsonl", as_line(Dialogue(messages=(Message("user", "[INST]"), Message("assistant", "y")))))
    settings = [f"data.train={path}", "data.on_error=skip", "model.chat_template=llama2"]
    with pytest.raises(DataError, match=r"1 refused_by_chat_format \(the chat format refuses their text"):
        trainer.run(sft_config(tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()


class NoteTaker:
    """The parts of a run directory that answers need."""

    def __init__(self, path):
        self.path, self.writes = path, True


def test_answers_before_and_after_stand_beside_the_reference(make_llama, chat, tmp_path):
    first, second = (make_llama(len(chat.tokenizer), seed=seed) for seed in (0, 1))
    asked, settings = [dialogue(4, source="a"), dialogue(2, source="b\u2028b")], SFTEvaluation(max_new_tokens=6)
    run = NoteTaker(tmp_path)
    for model, part in ((first, "before"), (second, "before"), (second, "after")):
        sample_answers(model, chat, asked, settings, run, dtype=torch.float32, part=part)
    rows = list(map(json.loads, (tmp_path / "answers.jsonl").open()))
    assert [row["source"] for row in rows] == ["a", "b\u2028b"]  # a line separator is no end of a row
    assert rows[0]["reference"] == "I am fine, thank you. 3" and len(rows[0]["prompt"]) == 3
    sample_answers(first, chat, asked, settings, run, dtype=torch.float32, part="after")
    again = list(map(json.loads, (tmp_path / "answers.jsonl").open()))
    assert [row["before"] for row in rows] == [row["after"] for row in again], "a resumed run keeps what was before"
    assert [row["after"] for row in rows] != [row["after"] for row in again]
    for damaged in ("[1]\n[2]\n", json.dumps(rows[0]) + "\n"):
        (tmp_path / "answers.jsonl").write_text(damaged)
        with pytest.raises(RunError, match=r"answers\.jsonl.+(damaged, on a line that is whole|1 whole lines instead)"):
            sample_answers(first, chat, asked, settings, run, dtype=torch.float32, part="after")


def test_the_result_shows_loss_and_perplexity_of_every_source(tmp_path, capsys):
    before, after = ({"loss": loss, "perplexity": p, "tokens": 12} for loss, p in ((2.0, 7.389), (800.0, None)))
    print_result(
        {
            "stage": "sft",
            "valid_loss_before": 2.0,
            "valid_loss_after": 800.0,
            "valid_by_source": {"before": {"dolly": before}, "after": {"dolly": after}},
            "time_seconds": 60,
            "peak_memory_gb": 1.0,
        },
        tmp_path,
    )
    shown = capsys.readouterr().out
    for part in ("held-out loss 2.000 -> 800.000", "dolly", "12", "2.000 -> 800.000", "7.39 -> -"):
        assert part in shown
