"""The theorems' Q: of trained models, and in an exact game, where nothing is sampled."""

import torch

from iopo import (ADVERSARIES, iopo_loss, iopo_weight, preference_margin, preference_probability,
                  turns)

OTHER = {"protagonist": "adversary", "adversary": "protagonist"}
GAMES = {"as in training": {},
         "no clip": {"clip": "none"},
         "two-sided clip": {"clip": "two_sided"},
         "r = 1": {"ratio": "one"},
         "adversary with the same labels": {"adversary": "same"},
         "the same, r = 1": {"adversary": "same", "ratio": "one"}}


def exact_game(n_iter=100, steps=25, lr=30.0, adversary="swapped", **readings):
    """Algorithm 1 with nothing sampled: softmax policies over a table of 8 prompts x 5 answers in
    float64, the exact expected loss over all pairs with Bradley-Terry labels, plain gradient
    descent. Returns turn_values."""
    generator = torch.Generator().manual_seed(0)
    rewards, start = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    w, l = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T     # (20,) each
    weights = preference_probability(rewards[:, w] - rewards[:, l])                   # (8, 20)
    weights /= weights.sum()
    tables = {player: start.clone().requires_grad_() for player in OTHER}

    def logps(player):
        table = torch.log_softmax(tables[player], dim=-1)                             # (8, 5)
        return torch.stack([table[:, w], table[:, l]])                                # (2, 8, 20)

    before = torch.log_softmax(start, dim=-1)
    before = torch.stack([before[:, w], before[:, l]])
    schedule, seen = list(turns(n_iter, steps, steps)), []
    for place, turn in enumerate(schedule):
        player = turn[1]
        exchange, sign = ADVERSARIES[adversary] if player == "adversary" else (False, +1)
        agent, env = (both.flip(0) if exchange else both
                      for both in (logps(player), logps(OTHER[player]).detach()))
        loss = sign * (weights * iopo_loss(*agent, *env, **readings)).sum()
        [gradient] = torch.autograd.grad(loss, tables[player])
        tables[player].data -= lr * gradient
        if turn not in schedule[place + 1:place + 2]:                  # the turn ends here
            seen.append({"player": player, "logps": logps(player).detach()})
    return turn_values(seen, before, weights, adversary, **readings)


def turn_values(seen, start, weights=None, adversary="swapped", **readings):
    """Q of the player that has just trained, after each of its turns, by Eq. 6 and by Eq. 13:
    {"protagonist": {"eq6": [...], "eq13": [...]}, "adversary": ...}. `seen` and `start` hold the
    log-probabilities of both answers of every pair, as the human labels them."""
    values = {player: {"eq6": [], "eq13": []} for player in OTHER}
    latest = dict.fromkeys(values, torch.as_tensor(start))
    for turn in seen:
        player = turn["player"]
        latest[player] = torch.as_tensor(turn["logps"])
        exchange = player == "adversary" and ADVERSARIES[adversary][0]
        agent, env = (both.flip(0) if exchange else both
                      for both in (latest[player], latest[OTHER[player]]))
        margin, r = preference_margin(*agent, *env), iopo_weight(*agent, *env, **readings)
        for name, ratio in (("eq6", None), ("eq13", r)):
            q = preference_probability(margin, ratio)
            mean = q.mean() if weights is None else (weights * q).sum()
            values[player][name].append(mean.item())
    return values
