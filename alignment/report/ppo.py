"""PPO: reward and what it costs, by iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignment.report.charts import SMOOTHED_FROM, curve_chart, metric_curves, path_chart, smoothed
from alignment.report.drawing import Chart, style_of
from alignment.report.elements import Section, Table, interval, number, present, text
from alignment.report.reading import RunFolder, is_number

MAX_POINTS = 60  # of a path


@dataclass(frozen=True)
class _Plot:
    """Metrics (name to label) that belong into one figure, and what to look for."""

    name: str
    title: str
    caption: str
    metrics: Mapping[str, str]
    y_label: str
    percent: bool = False


_PLOTS = (
    _Plot(
        "reward",
        "Reward in training",
        "It should rise slowly; single iterations jump about, because each has other prompts.",
        {"ppo/reward": "gated reward"},
        "gated reward (logit)",
    ),
    _Plot(
        "held-out",
        "Held-out reward and guard",
        "A reward that rises while the guard falls is learned from the reward models' errors.",
        {"ppo/held_out_reward": "gated reward", "ppo/held_out_guard": "guard"},
        "mean score (logit)",
    ),
    _Plot(
        "scores",
        "What the reward is made of",
        "Both models' scores of the same responses. Where one pays for the other, look at the answers: refusals are "
        "safe and help nobody.",
        {"ppo/helpfulness": "helpfulness", "ppo/safety": "safety"},
        "mean score (logit)",
    ),
    _Plot(
        "gated",
        "Share decided by the safety model",
        "The upper curve contains the safety prompts; the lower, ordinary prompts whose answer was found unsafe, "
        "should fall.",
        {"ppo/gated_rate": "all prompts", "ppo/gated_unsafe_rate": "ordinary prompts"},
        "share of responses",
        percent=True,
    ),
    _Plot(
        "kl",
        "Distance from the reference",
        "It should grow slowly; a sudden rise means that the policy runs away: raise ppo.beta or lower optim.lr.",
        {"ppo/kl_k3": "KL"},
        "KL (nats a response)",
    ),
    _Plot(
        "entropy",
        "Entropy",
        "A fall towards zero means that the policy gives one answer to everything.",
        {"ppo/entropy": "entropy"},
        "entropy (nats a token)",
    ),
    _Plot(
        "lengths",
        "Length of responses",
        "Ever longer responses often mean that the reward models like length, not that answers get better.",
        {"ppo/length": "length"},
        "tokens a response",
    ),
    _Plot(
        "cut-off",
        "Responses cut off at the length limit",
        "Answers that are cut off are scored as if they ended there; a growing share wants more "
        "sampling.max_new_tokens or ppo.truncation=penalise.",
        {"ppo/truncated_rate": "cut off"},
        "share of responses",
        percent=True,
    ),
    _Plot(
        "explained",
        "Explained variance of the critic",
        "It starts at zero, as the critic's head does, and should rise towards one; near zero the critic is no help, "
        "and advantages are noise. Below zero for long: lower ppo.critic_lr.",
        {"ppo/explained_variance": "explained variance"},
        "explained variance",
    ),
    _Plot(
        "value-loss",
        "Loss of the critic",
        "It should fall; a critic that has not learned makes noise of the first updates (ppo.critic_warmup).",
        {"ppo/value_loss": "value loss"},
        "mean half squared error",
    ),
    _Plot(
        "policy-loss",
        "Loss of the policy",
        "The clipped objective with its sign turned: near zero, since advantages are whitened. It says little; a "
        "jump says that the updates are too large.",
        {"ppo/policy_loss": "policy loss"},
        "mean loss of a token",
    ),
    _Plot(
        "violations",
        "Unsafe answers to held-out safety prompts",
        "It should fall, or at least not rise while the reward does.",
        {"ppo/held_out_violation_rate": "unsafe"},
        "share of safety prompts",
        percent=True,
    ),
)


def section(runs: Sequence[RunFolder]) -> Section:
    """Curves of all PPO runs together, and a table of what they ended with."""
    trained = [run for run in runs if run.stage == "ppo"]
    plots = [
        curve_chart(
            f"ppo-{plot.name}",
            plot.title,
            plot.caption,
            metric_curves(trained, plot.metrics),
            x_label="iteration",
            y_label=plot.y_label,
            percent=plot.percent,
        )
        for plot in _PLOTS
    ]
    charts = present([*plots[:2], _frontier(trained), *plots[2:]])
    columns = (
        "run", "iterations", "reward, first quarter", "reward, last quarter", "KL at the end", "held-out reward gained",
        "guard gained", "held-out reward gained, both ended", "guard gained, both ended", "saved iteration", "alarms",
    )  # fmt: skip
    return Section("ppo", "PPO", charts=charts, tables=[Table("PPO runs", columns, list(map(_row, trained)))])


def _frontier(runs: Sequence[RunFolder]) -> Chart | None:
    paths = []
    windows = set()
    for index, run in enumerate(runs):
        rows = [(row.get("step"), row.get("ppo/kl_k3"), row.get("ppo/reward")) for row in run.metrics]
        found = [row for row in rows if all(map(is_number, row))]  # an iteration that went wrong may have logged NaN
        if not found:
            continue
        steps, kl, reward = (list(column) for column in zip(*found, strict=True))
        if len(steps) >= SMOOTHED_FROM:
            window = max(5, len(steps) // 12) // 2 * 2 + 1
            windows.add(window)
            kl, reward = smoothed(kl, window), smoothed(reward, window)
        last = len(steps) - 1
        shown = [*dict.fromkeys([*range(0, last + 1, 1 + last // MAX_POINTS), last])]
        named = {0: "start", last: f"iteration {steps[last]}"}
        points = ([kl[place] for place in shown], [reward[place] for place in shown])
        paths.append((run.label, *points, [named.get(place, "") for place in shown], style_of(index)))
    if not paths:
        return None
    caption = (
        "Up is gained reward, right is distance paid for it; where the path, which grows stronger with time, goes "
        "right without going up, stop."
    )
    if windows:
        caption += f" Points are moving means over {', '.join(map(str, sorted(windows)))} iterations."
    return path_chart(
        "ppo-frontier",
        "Reward against KL along the iterations",
        caption,
        paths,
        x_label="KL to the reference (nats a response)",
        y_label="gated reward (logit)",
    )


def _row(run: RunFolder) -> list:
    result = run.result or {}
    held_out = result.get("held_out") or {}
    alarms = ", ".join(f"{name} at {iteration}" for name, iteration in (result.get("alarms") or {}).items())
    return [
        text(run.label, "name"),
        number(result.get("iterations", len(run.series("ppo/reward")[0]))),
        number(result.get("reward_first"), "+.2f"),
        number(result.get("reward_last"), "+.2f"),
        number(result.get("kl"), ".2f"),
        interval(held_out.get("reward_gain"), "+.2f"),
        interval(held_out.get("guard_gain"), "+.2f"),
        interval(held_out.get("reward_gain_ended"), "+.2f"),
        interval(held_out.get("guard_gain_ended"), "+.2f"),
        number(result.get("saved_iteration")),
        text(alarms or ("none" if run.result else "–")),
    ]
