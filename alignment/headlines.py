"""What a stage reached, in a few words: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.metrics import show

Result = Mapping[str, Any]


def one_line(result: Result) -> str:
    """What a stage reached, in a few words, and which rows it left out."""
    return "; ".join([_figures(result), *what_was_left_out(result.get("left_out", {}))])


def _figures(result: Result) -> str:
    kind = result.get("stage")
    if kind == "sft":
        return _sft(result)
    if kind == "rm":
        return _reward_model(result)
    if kind == "gatt":
        dropped = counted(result["dropped"])
        return f"{result['dialogues']} dialogues" + (f"; left out {dropped}" if dropped else "")
    if kind == "distil":
        return _distillation(result)
    if kind == "reject":
        mean, best = show(result["mean_reward"], "+.2f"), show(result["mean_best_reward"], "+.2f")
        prompts = result.get("pool_prompts", result["prompts"])
        rounds = " of all rounds" if prompts > result["prompts"] else ""
        return f"{result['kept']} answers kept, of {prompts} prompts{rounds}; reward {mean} -> best {best}"
    if kind == "ppo":
        rewards = f"reward {result['reward_first']:+.2f} -> {result['reward_last']:+.2f}"
        held_out = result.get("held_out")
        gain = f"; held-out reward {show(held_out['reward_gain'], '+.2f', bounds=True)}" if held_out else ""
        stopped = f"; stopped ({result['stopped']}) at {result['iterations']}" if result["stopped"] else ""
        return f"{rewards}, KL to reference {result['kl']:.2f} nats a response{gain}{stopped}"
    if kind == "eval" and result.get("kind") == "gatt":
        return f"{len(result['policies'])} policies in {result['dialogues']} dialogues"
    if kind == "eval":
        return f"{len(result['policies'])} policies on {result['prompts']} prompts"
    return ""


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts, `3 vetoed, 2 too long`; empty where there are none."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in reasons.items())


def by_part(left_out: Mapping[str, Mapping[str, int]]) -> str:
    """` train: 3 vetoed, 2 too_long. valid: 1 vetoed.`, to go behind a sentence; no part that lost nothing."""
    return "".join(
        f" {part}: {', '.join(f'{count} {name}' for name, count in reasons.items())}."
        for part, reasons in left_out.items()
        if reasons
    )


def what_was_left_out(parts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """`train left out 3 vetoed, 2 too long, cut the history of 4`, for each part that lost something.

    A cut history may have taken answers with it that would have been trained: `cut the history of 4 (with 9 answers)`.
    """
    found = []
    for part, reasons in parts.items():
        rows = counted({name: count for name, count in reasons.items() if name not in ("history_cut", "answers_cut")})
        words = [f"left out {rows}"] if rows else []
        if cut := reasons.get("history_cut"):
            answers = f" (with {reasons['answers_cut']} answers)" if reasons.get("answers_cut") else ""
            words.append(f"cut the history of {cut}{answers}")
        if words:
            found.append(f"{part} {', '.join(words)}".strip())
    return found


def clock(seconds: float) -> str:
    """Minutes and seconds, `4:07`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _distillation(result: Result) -> str:
    kept, gain = show(result["kept_rate"], ".0%", bounds=True), show(result["score_gain"], "+.2f")
    figures = f"{kept} of {result['prompts']} distilled answers kept, safety score {gain} by the preprompt"
    left_out = {**result.get("dropped", {}), "history_cut": result.get("history_cut", 0)}
    return "; ".join([figures, *what_was_left_out({"": left_out})])


def _sft(result: Result) -> str:
    before, after = result["valid_loss_before"], result["valid_loss_after"]
    if before is None:
        return f"{result['train_dialogues']} dialogues, last training loss {result['train_loss_last']:.3f}"
    return f"held-out loss {before:.3f} -> {after:.3f}"


def _reward_model(result: Result) -> str:
    if not result["valid"]:
        return f"{result['train_pairs']} pairs, last training loss {result['train_loss_last']:.3f}"
    accuracy = result["valid"]["accuracy"]
    interval = f"[{accuracy['low']:.2f}, {accuracy['high']:.2f}]"
    label = result["valid"].get("safety_label_accuracy")
    extra = f", safety label right {label['value']:.1%}" if label and result["kind"] == "safety" else ""
    return f"held-out accuracy {accuracy['value']:.1%} {interval}, {accuracy['count']} pairs{extra}"
