"""Killed with SIGKILL and resumed, every training stage ends bit for bit where the uninterrupted run ends."""

import json
import random
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from launching import DDP, launch_two
from processes import start
from safetensors.torch import load_file
from short_runs import COMMON, STAGE_SETTINGS, run_here

from alignment.cli.pipeline import load_pipeline, run_stages
from alignment.cli.stages import STAGES
from alignment.data import write_rows
from alignment.errors import RunError
from alignment.headlines import one_line
from alignment.models import load_reward_model
from alignment.runs import Run
from reward_models.score import Scorer
from rlhf import evaluate

pytestmark = pytest.mark.e2e


def command(stage: str, settings: list[str], run_dir: Path, *options: str) -> list[str]:
    return [stage, *settings, f"run.dir={run_dir}", *options]


def kill_when(reached: Callable[[], bool], arguments: list[str], run_dir: Path, *, delay: float = 0.0) -> None:
    """Kills a training `delay` seconds after `reached` holds, wherever it is by then."""
    streams = run_dir.with_name(f"{run_dir.name}-streams")
    process = start(arguments, streams)
    deadline = time.monotonic() + 240
    while not reached():
        assert process.is_alive(), (streams / "stderr").read_text()[-2000:]
        assert time.monotonic() < deadline, "it did not get so far"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert json.loads((run_dir / "manifest.json").read_text())["status"] == "running", "it ended before the kill"


def kill_after_first_checkpoint(arguments: list[str], run_dir: Path) -> None:
    kill_when(lambda: any(run_dir.glob("checkpoints/*/complete")), arguments, run_dir)


def num_steps_logged(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def figures(run_dir: Path) -> dict:
    """A run's result but for what the machine decides."""
    result = json.loads((run_dir / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("time_seconds", "peak_memory_gb")}


def assert_same_outcome(first: Path, second: Path) -> None:
    one, two = (load_file(path / "model" / "model.safetensors") for path in (first, second))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)

    def metrics(path: Path) -> list[dict]:
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: value for name, value in row.items() if not name.endswith(("_seconds", "_per_second"))}
            for row in rows
        ]

    assert metrics(first) == metrics(second)


@pytest.mark.parametrize("name", STAGE_SETTINGS)
def test_a_killed_training_resumes_bit_for_bit(name, tmp_path):
    stage, settings = name.split("-")[0], STAGE_SETTINGS[name]
    run_here(stage, settings, tmp_path / "whole", resume=False)
    kill_after_first_checkpoint(command(stage, settings, tmp_path / "killed"), tmp_path / "killed")
    run_here(stage, settings, tmp_path / "killed", resume=True)
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("name", ["rm", "rm-lora"])
def test_a_training_killed_again_and_again_at_any_moment_resumes_bit_for_bit(name, tmp_path):
    """First before there is a checkpoint, then at two steps and delays drawn from the seed."""
    settings, rng = STAGE_SETTINGS[name], random.Random(name)
    run_here("rm", settings, tmp_path / "whole", resume=False)
    killed = tmp_path / "killed"
    for index, step in enumerate([1, *sorted(rng.sample(range(4, 12), 2))]):
        arguments = command("rm", settings, killed, *(["--resume"] if index else []))
        kill_when(lambda step=step: num_steps_logged(killed) >= step, arguments, killed, delay=rng.random() / 10)
    run_here("rm", settings, killed, resume=True)
    assert_same_outcome(tmp_path / "whole", killed)


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_a_run_killed_while_it_saves_its_model_ends_as_if_it_had_not_been(name, tmp_path, monkeypatch, request):
    """Its last checkpoint is the end of training: nothing is left to train, and the figures come from the log.

    PPO's end lies between two checkpoints of `train.save_every`.
    """
    last = 4 if name == "ppo" else 3
    if name == "ppo":
        settings = [*ppo_settings(request.getfixturevalue("reward_model")), f"train.max_steps={last}"]
    else:
        settings = [*STAGE_SETTINGS[name], "data.max_rows=24"]
    run_here(name, settings, tmp_path / "whole", resume=False)
    runner = import_module(STAGES[name].runner.split(":")[0])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "save_model", killed)
        run_here(name, settings, tmp_path / "killed", resume=False)
    assert list((tmp_path / "killed" / "checkpoints").glob(f"checkpoint-{last}/complete"))
    run_here(name, settings, tmp_path / "killed", resume=True)
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")
    one, two = (figures(tmp_path / run) for run in ("whole", "killed"))
    assert one == two and one_line(one) == one_line(two)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rm") / "run"
    run_here("rm", [*STAGE_SETTINGS["rm"], "data.max_rows=16"], folder, resume=False)
    return folder


@pytest.fixture(scope="module")
def adapted_reward_model(tmp_path_factory, save_tuned) -> Path:
    """One that was trained with LoRA, so that PPO's models share their frozen weights."""
    folder = tmp_path_factory.mktemp("rm-lora") / "run"
    return save_tuned(load_reward_model("toy", new_head_seed=0), folder, seed=1, rank=2)


def reward_settings(reward_model: Path) -> list[str]:
    keys = (f"path={reward_model}", "dtype=float32")
    return [f"rewards.{kind}.{key}" for kind in ("helpfulness", "safety") for key in keys]


def ppo_settings(reward_model: Path) -> list[str]:
    return [
        *COMMON, *reward_settings(reward_model), "model=toy", "prompts.prompts=toy:prompts.train", "optim.lr=1e-3",
        "sampling.max_new_tokens=8", "sampling.num_candidates=2", "train.batch_size=8", "train.minibatch_size=4",
    ]  # fmt: skip


PPO_MODELS = {
    "full": ("reward_model", []),
    "lora": ("reward_model", ["lora.r=4"]),
    "shared": ("adapted_reward_model", ["lora.r=4", "ppo.share_backbone=always"]),
}


@pytest.mark.parametrize("models", PPO_MODELS)
def test_a_killed_ppo_resumes_bit_for_bit(models, tmp_path, request):
    looks = ["evaluation.prompts=toy:prompts.heldout", "evaluation.every=4", "evaluation.max_prompts=6"]
    extra = [*looks, "evaluation.patience=9", "ppo.target_kl=0.5", "ppo.kl_horizon=40"]
    reward_model, lora = PPO_MODELS[models]
    settings = [*ppo_settings(request.getfixturevalue(reward_model)), *lora, "train.max_steps=14", *extra]
    run_here("ppo", settings, tmp_path / "whole", resume=False)
    kill_after_first_checkpoint(command("ppo", settings, tmp_path / "killed"), tmp_path / "killed")
    run_here("ppo", settings, tmp_path / "killed", resume=True)
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")
    assert figures(tmp_path / "whole") == figures(tmp_path / "killed")


def test_a_ppo_killed_ten_times_at_any_moment_ends_with_the_same_weights_and_optimizers(
    reward_model, tmp_path, monkeypatch
):
    """Before the first checkpoint, and then in whatever phase of an iteration, look or checkpoint the seed chooses."""
    looks = ["evaluation.prompts=toy:prompts.heldout", "evaluation.every=5", "evaluation.max_prompts=6"]
    settings = [*ppo_settings(reward_model), "train.max_steps=45", "lora.r=2", "ppo.target_kl=0.5", *looks]
    killed, rng = tmp_path / "killed", random.Random("ppo")
    for trial in range(10):
        again = ["--resume"] if trial else []
        enough = 1 + 4 * trial
        arguments = command("ppo", settings, killed, *again)
        kill_when(lambda enough=enough: num_steps_logged(killed) >= enough, arguments, killed, delay=rng.random() / 3)
    monkeypatch.setattr(Run, "clear_checkpoints", lambda _: None)  # the last one holds the optimizers at the end
    run_here("ppo", settings, killed, resume=True)
    run_here("ppo", settings, tmp_path / "whole", resume=False)
    assert_same_outcome(tmp_path / "whole", killed)
    assert figures(tmp_path / "whole") == figures(killed)
    for learner in ("policy", "critic"):
        ends = [torch.load(path / f"checkpoints/checkpoint-45/{learner}.pt") for path in (tmp_path / "whole", killed)]
        one, two = (flat(end["optimizer"]["state"]) for end in ends)
        assert one.keys() == two.keys() and len(one) > 3
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A toy model that has learned to end its answers."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    run_here("sft", [*STAGE_SETTINGS["sft"], "data.valid=[]"], folder, resume=False)
    return folder


def sampling_settings(stage: str, chat_model: Path, reward_model: Path) -> list[str]:
    """For an evaluation of policies with a guard; of `eval-gatt` for one of Ghost Attention."""
    safety = [f"safety.path={reward_model}", "safety.dtype=float32"]
    policies = [f"policies={{a: {{path: {chat_model}, dtype: float32}}, b: {{path: toy, dtype: float32}}}}"]
    guard = [f"guard.path={reward_model}", "guard.dtype=float32"]
    extra = {
        "gatt": ["instructions.kinds=[hobby]", "prompts.turns=3"],
        "distil": safety,
        "reject": [
            *reward_settings(reward_model),
            "sampling.num_candidates=3",
            "sampling.temperature_grid=[0.7, 1.0]",
            "sampling.temperature_prompts=6",
        ],
        "eval": [*reward_settings(reward_model), *guard, *policies],
        "eval-gatt": ["kind=gatt", "prompts.turns=3", "sampling.temperature=1", *policies],
    }[stage]
    model = [] if stage.startswith("eval") else [f"model.path={chat_model}", "model.dtype=float32"]
    return [
        *model, "run.device=cpu", "run.seed=3", "prompts.prompts=toy:prompts.train", "prompts.max_prompts=24",
        "prompts.max_prompt_length=400", "sampling.max_new_tokens=24", *extra,
    ]  # fmt: skip


SAMPLED = {
    "gatt": ("sampled.jsonl", "dialogues.jsonl"),
    "distil": ("answers.jsonl", "distilled.jsonl"),
    "reject": ("sft.jsonl",),
    "eval": (),
    "eval-gatt": ("dialogues-a.jsonl", "dialogues-b.jsonl"),
}
SCORED = {"distil": ("scored.jsonl",), "reject": ("candidates.jsonl",), "eval": ("answers-a.jsonl", "answers-b.jsonl")}


@pytest.mark.parametrize("stage", ["gatt", "distil", "reject"])
def test_killed_sampling_resumes_with_the_same_rows(stage, chat_model, reward_model, tmp_path):
    """Killed with one lot of six or more on disk, at any place in the next."""
    settings = [*sampling_settings(stage, chat_model, reward_model), "sampling.max_rows=1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run_here(stage, settings, whole, resume=False)
    rows = killed / ("sampled.0.jsonl" if stage == "reject" else SAMPLED[stage][0])
    kill_when(
        lambda: rows.exists() and rows.read_text().count("\n") >= 2,
        command(stage, settings, killed),
        killed,
        delay=random.Random(stage).random() / 50,
    )
    assert 2 <= rows.read_text().count("\n") < 24
    run_here(stage, settings, killed, resume=True)
    for name in (*SAMPLED[stage], *(("candidates.jsonl", "potential.json") if stage == "reject" else ())):
        assert (killed / name).read_text() == (whole / name).read_text()


def test_an_evaluation_killed_between_its_last_rows_ends_with_the_same_answers_and_figures(
    chat_model, reward_model, tmp_path, monkeypatch
):
    """The first policy's answers are there with their scores, the second's as they were sampled."""
    settings = sampling_settings("eval", chat_model, reward_model)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run_here("eval", settings, whole, resume=False)
    written: list[str] = []

    def write_three(path: Path, rows: Iterable[dict]) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        write_rows(path, rows)
        written.append(path.name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write_rows", write_three)
        run_here("eval", settings, killed, resume=False)
    assert written == ["answers-a.jsonl", "answers-b.jsonl", "answers-a.jsonl"]
    first, second = SCORED["eval"]
    assert (killed / first).read_text() == (whole / first).read_text()
    assert "reward" not in (killed / second).read_text()
    monkeypatch.setattr(evaluate, "_sample_answers", lambda *_, **__: pytest.fail("sampled again"))
    run_here("eval", settings, killed, resume=True)
    for name in (first, second):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert figures(killed) == figures(whole)


def test_dialogues_killed_between_turns_go_on_after_the_last_whole_one(chat_model, reward_model, tmp_path):
    """All dialogues are one lot, so no row is on disk before the last turn: the finished turns are."""
    settings = [
        *sampling_settings("gatt", chat_model, reward_model),
        "prompts.turns=8",
        "prompts.max_prompt_length=480",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run_here("gatt", settings, whole, resume=False)
    turns = killed / "sampled.turns.jsonl"
    kill_when(
        lambda: turns.exists() and turns.read_text().count("\n") >= 2,
        command("gatt", settings, killed),
        killed,
        delay=random.Random("turns").random() / 50,
    )
    assert not (killed / "sampled.jsonl").exists()
    run_here("gatt", settings, killed, resume=True)
    for name in (*SAMPLED["gatt"], "as_sampled.jsonl"):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert not turns.exists()


def test_a_round_killed_in_every_phase_has_the_same_pool_and_samples_nothing_twice(chat_model, reward_model, tmp_path):
    """Killed while temperatures are tried, while the rest is sampled, and while all is scored."""
    slow = ["sampling.max_rows=1", "rewards.max_tokens_per_batch=32"]
    settings = [*sampling_settings("reject", chat_model, reward_model), *slow]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run_here("reject", settings, whole, resume=False)
    num_prompts = json.loads((whole / "result.json").read_text())["prompts"]
    rows = killed / "sampled.0.jsonl"

    def lines() -> list[str]:
        return rows.read_text().splitlines() if rows.exists() else []

    before: list[str] = []
    for count in (3, 12 + 3, 12 + num_prompts - 6):
        again = ["--resume"] if before else []
        kill_when(lambda count=count: len(lines()) >= count, command("reject", settings, killed, *again), killed)
        # What was there is there still, and no prompt is there twice at a temperature; the last line may be cut off.
        kept = [json.loads(line)[0] for line in lines()[:-1]]
        assert lines()[: len(before)] == before
        assert len({(json.dumps(row["prompt"]), row["temperature"]) for row in kept}) == len(kept)
        before = lines()[:-1]
    run_here("reject", settings, killed, resume=True)
    for name in ("candidates.jsonl", "sft.jsonl", "potential.json"):
        assert (killed / name).read_text() == (whole / name).read_text()


def test_a_stage_made_from_an_older_run_is_not_passed_off_as_finished(tmp_path):
    """What an interrupted `--from` leaves: the first stage is new, the second still has the old one's model in it."""
    data = "data: {train: toy:sft.train, max_rows: 8, max_length: 128}, train: {max_steps: 1, batch_size: 8}"
    path = tmp_path / "two.yaml"
    path.write_text(
        "defaults: {run: {device: cpu}}\nstages:\n"
        f"  first: {{stage: sft, model: toy, {data}}}\n  second: {{stage: sft, model: '${{first}}', {data}}}\n"
    )
    run_stages(load_pipeline(path, [f"runs={tmp_path}/runs"]))
    run_stages(load_pipeline(path, [f"runs={tmp_path}/runs"]))
    first = tmp_path / "runs" / "first"
    before = json.loads((first / "manifest.json").read_text())["id"]
    config = load_pipeline(path, [f"runs={tmp_path}/runs", "first.run.overwrite=true"]).stages[0].config
    STAGES["sft"].run_function()(config)
    assert json.loads((first / "manifest.json").read_text())["id"] != before
    with pytest.raises(RunError, match=r"second: was made from an earlier version of model.*Add --from second"):
        run_stages(load_pipeline(path, [f"runs={tmp_path}/runs"]))
    run_stages(load_pipeline(path, [f"runs={tmp_path}/runs"], from_stage="second"))


def run_in_two_processes(stage: str, settings: list[str], run_dir: Path, **options: bool) -> None:
    launch_two(DDP, stage, settings, run_dir, **options)
    assert json.loads((run_dir / "manifest.json").read_text())["num_processes"] == 2


def test_two_killed_processes_that_drop_out_resume_bit_for_bit(reward_model, tmp_path):
    settings = [*ppo_settings(reward_model), "lora={r: 4, dropout: 0.2}", "train.max_steps=4"]
    launch_two(DDP, "ppo", settings, tmp_path / "whole")
    launch_two(DDP, "ppo", settings, tmp_path / "killed", dies=True)
    assert list((tmp_path / "killed" / "checkpoints").glob("checkpoint-3/complete"))
    launch_two(DDP, "ppo", settings, tmp_path / "killed", "--resume")
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("stage", ["sft", "rm", "rm-lora", "ppo-full", "ppo-lora", "ppo-shared"])
def test_two_processes_take_the_same_steps_as_one(stage, tmp_path, request):
    """The same prompts are sampled with the same streams, rewards and advantages whitened over both processes."""
    name, *models = stage.split("-")
    if name == "ppo":
        reward_model, lora = PPO_MODELS[models[0]]
        looks = ["evaluation.prompts=toy:prompts.heldout", "evaluation.max_prompts=5"]
        settings = [*ppo_settings(request.getfixturevalue(reward_model)), *lora, "train.max_steps=3", *looks]
        # In most minibatches one process has two micro-batches and the other one.
        settings += ["train.max_tokens_per_batch=60", "train.batch_size=16", "train.minibatch_size=8"]
    else:
        settings = [*STAGE_SETTINGS[stage], "data.max_rows=44", *(["lora.dropout=0"] if models else [])]
    run_here(name, settings, tmp_path / "one", resume=False)
    run_in_two_processes(name, settings, tmp_path / "two", by_torchrun=stage == "sft")
    one, two = (load_file(tmp_path / count / "model" / "model.safetensors") for count in ("one", "two"))
    for key in one:
        assert (one[key] - two[key]).abs().max() < 1e-5, key
    if name == "ppo":
        first, second = (
            [json.loads(line) for line in (tmp_path / count / "metrics.jsonl").read_text().splitlines()]
            for count in ("one", "two")
        )
        names = ("reward", "kl", "length", "policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm")
        for key in (*names, "held_out_reward"):
            found, expected = ([row[f"ppo/{key}"] for row in rows if f"ppo/{key}" in row] for rows in (second, first))
            count = 2 if key == "held_out_reward" else 3
            assert len(found) == count and found == pytest.approx(expected, abs=1e-5), key
    elif stage == "sft":
        assert_same_held_out_loss(tmp_path / "one", tmp_path / "two")
    elif stage == "rm":
        assert_held_out_scores_are_of_their_pairs(tmp_path / "one", tmp_path / "two")


def assert_same_held_out_loss(one: Path, two: Path) -> None:
    """Of which each process measures a share, every dialogue once."""
    first, second = (json.loads((path / "result.json").read_text())["valid_by_source"] for path in (one, two))
    for part in ("before", "after"):
        assert first[part].keys() == second[part].keys()
        for source, figures in first[part].items():
            assert second[part][source]["tokens"] == figures["tokens"] > 0
            assert second[part][source]["loss"] == pytest.approx(figures["loss"], abs=1e-5)


def assert_held_out_scores_are_of_their_pairs(one: Path, two: Path) -> None:
    """Each pair beside the scores that the saved model gives it, whichever process computed them."""
    scorer = Scorer.load(str(one), device="cpu", dtype="float32")
    first, second = (list(map(json.loads, (path / "held_out_scores.jsonl").open())) for path in (one, two))
    responses = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in first]
    expected = scorer.score([row["prompt"] for row in first], responses)
    assert len({chosen for chosen, _ in expected}) > 10
    for rows in (first, second):
        found = [[row["score_chosen"], row["score_rejected"]] for row in rows]
        assert [score for row in found for score in row] == pytest.approx(
            [s for row in expected for s in row], abs=1e-4
        )


@pytest.mark.parametrize("kind", SAMPLED)
def test_two_processes_sample_and_score_the_same_as_one(kind, chat_model, reward_model, tmp_path):
    """Each samples and scores a share of the prompts, of which some are equal."""
    stage, settings = kind.split("-")[0], sampling_settings(kind, chat_model, reward_model)
    run_here(stage, settings, tmp_path / "one", resume=False)
    run_in_two_processes(stage, settings, tmp_path / "two")
    for name in SAMPLED[kind]:
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    for name in SCORED.get(kind, ()):
        assert_same_rows(tmp_path / "one" / name, tmp_path / "two" / name)
    assert flat(figures(tmp_path / "two")) == pytest.approx(flat(figures(tmp_path / "one")), abs=1e-5)


def assert_same_rows(one: Path, two: Path) -> None:
    """The same texts in the same order, with the same scores but for the order of sums."""
    first, second = (list(map(json.loads, path.open(encoding="utf-8"))) for path in (one, two))
    assert first and len(first) == len(second)
    for expected, found in zip(first, second, strict=True):
        assert flat(found) == pytest.approx(flat(expected), abs=1e-5)


def flat(result: object, name: str = "") -> dict[str, object]:
    """Nested figures by their path."""
    if isinstance(result, list):
        result = dict(enumerate(result))
    if isinstance(result, dict):
        return {key: value for part in result for key, value in flat(result[part], f"{name}.{part}").items()}
    return {name: result}
