"""The theorems' Q in exact games, where nothing is sampled.

    python -m reproduction theorems                 # a few minutes, no model is trained
"""

import torch
from tqdm import tqdm

from iopo import (ADVERSARIES, dpo_loss, iopo_weight, preference_margin, preference_probability,
                  turns)

OTHER = {"protagonist": "adversary", "adversary": "protagonist"}
TABLES, TURNS, TURN_STEPS = 20, 100, 25     # random games, turns of each player, steps of a turn
STEP_SIZES = (30.0, 3.0, 0.3)
STATED = 0.54                               # a Q_mu that turns are counted to
GAMES = {"as in training": {}, "as in training, r frozen": {"frozen": True},
         "no clip": {"clip": "none"}, "no clip, r frozen": {"clip": "none", "frozen": True},
         "two-sided clip": {"clip": "two_sided"},
         "r = 1": {"ratio": "one"},
         "zero-sum (negated)": {"adversary": "negated"},
         "zero-sum, r = 1": {"adversary": "negated", "ratio": "one"},
         "same labels": {"adversary": "same"},
         "same labels, r = 1": {"adversary": "same", "ratio": "one"}}


def exact_game(lr, n_iter=TURNS, adversary="swapped", frozen=False, **readings):
    """Algorithm 1 with nothing sampled, in TABLES random games at once: softmax policies over 8
    prompts x 5 answers in float64, the exact expected loss over all pairs with Bradley-Terry
    labels, plain gradient descent. Only r is float32, as in training: below e^-104 it is 1.
    `frozen`: r is computed once a turn, as Theorem 2 has it. Returns turn_values."""
    draws = [torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(seed),
                         dtype=torch.float64) for seed in range(TABLES)]
    rewards, start = torch.stack(draws, dim=1)                                 # (tables, 8, 5) each
    w, l = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T     # (20,) each
    weights = preference_probability(rewards[..., w] - rewards[..., l])        # (tables, 8, 20)
    weights /= weights.sum(dim=(1, 2), keepdim=True)
    policies = {player: start.clone().requires_grad_() for player in OTHER}

    def logps(policy):
        table = torch.log_softmax(policy, dim=-1)                              # (tables, 8, 5)
        return torch.stack([table[..., w], table[..., l]])                     # (2, tables, 8, 20)

    seen = []
    for _, player in turns(n_iter, 1, 1):
        exchange, sign = ADVERSARIES[adversary] if player == "adversary" else (False, +1)
        env, r = logps(policies[OTHER[player]]).detach(), None
        for _ in range(TURN_STEPS):
            both = [some.flip(0) if exchange else some for some in (logps(policies[player]), env)]
            if r is None or not frozen:
                r = iopo_weight(*both[0], *both[1], **readings)
            loss = sign * (weights * r * dpo_loss(*both[0], *both[1])).sum()   # Eq. 14
            [gradient] = torch.autograd.grad(loss, policies[player])
            policies[player].data -= lr * gradient
        seen.append({"player": player, "logps": logps(policies[player]).detach()})
    return turn_values(seen, logps(start), weights, adversary, **readings)


def turn_values(seen, start, weights, adversary="swapped", **readings):
    """Q of the player that has just trained, after each of its turns, by Eq. 6 and by Eq. 13:
    {"protagonist": {"eq6": [...], "eq13": [...]}, "adversary": ...}. `seen` and `start` hold the
    log-probabilities of both answers of every pair, as the human labels them, (2, tables, ...). A
    value is a list, of every table's sum over pairs by `weights` (tables, ...)."""
    values = {player: {"eq6": [], "eq13": []} for player in OTHER}
    latest = dict.fromkeys(values, start)
    for turn in seen:
        player = turn["player"]
        latest[player] = turn["logps"]
        exchange = player == "adversary" and ADVERSARIES[adversary][0]
        agent, env = (both.flip(0) if exchange else both
                      for both in (latest[player], latest[OTHER[player]]))
        margin, r = preference_margin(*agent, *env), iopo_weight(*agent, *env, **readings)
        for name, ratio in (("eq6", None), ("eq13", r)):
            q = preference_probability(margin, ratio)
            values[player][name].append((weights * q).flatten(1).sum(dim=1).tolist())
    return values


def exact_games(step_sizes):
    """{game: {step size: its numbers}}; a list has one number per table."""
    with tqdm(total=len(GAMES) * len(step_sizes), desc="exact games") as bar:
        games = {name: {} for name in GAMES}
        for name, options in GAMES.items():
            for lr in step_sizes:
                games[name][f"{lr:g}"] = numbers(exact_game(lr, **options))
                bar.update()
    return games


def numbers(values):
    """What the theorems speak of, from turn_values of many tables."""
    mu, nu = (torch.tensor(values[player]["eq6"], dtype=torch.float64)
              for player in OTHER)                                             # (turns, tables)
    change = mu.diff(dim=0)
    reached = mu >= STATED
    return {"mean": mu.mean(dim=1).tolist(), "last": mu[-1].tolist(),
            "sum": (mu[-1] + nu[-1]).tolist(), "eq13": values["protagonist"]["eq13"][-1],
            "rising": (change >= -1e-9).all(dim=0).tolist(),
            "falling": (change <= 1e-9).all(dim=0).tolist(),
            "d3_d2": (change[1] / change[0]).tolist(), "last_change": change[-1].tolist(),
            "until": [int(some.long().argmax()) + 1 if some.any() else None for some in reached.T]}
