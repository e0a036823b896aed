"""IOPO, Indirect Online Preference Optimization (Wang et al., IJCAI 2025): equations, Algorithm 1.

Reads top to bottom like the paper. The equations are pure functions of (B,) tensors: one number per
preference pair (x, y_w, y_l). log pi(y|x) is the log-probability of a whole response, *summed* over
its tokens (EOS included), in nats. Losses return (B,): the caller takes the mean that the paper
writes as an expectation. Eq. 2 to 4, 9 and 10 motivate these and 16 to 24 are proofs: not here.

Symbols          here
pi_mu, pi_nu     the protagonist mu and the adversary nu, two language models that train in turns
AGENT, ENV       the player that trains, and the frozen other one (the reference of the loss)
y_w, y_l         chosen and rejected as AGENT sees them: the adversary prefers what was rejected
rho              log pi_AGENT(y|x) - log pi_ENV(y|x), the log-ratio of one response
h                rho(y_w) - rho(y_l);  beta * h is the implicit-reward margin
"""

import math

import torch
import torch.nn.functional as F


# ---- Bradley-Terry preference and implicit reward (Section 3) ------------------------------------

def preference_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Implicit-reward margin beta * h = r(x, y_w) - r(x, y_l), shape (B,).

    Eq. 5 gives r(x, y) = beta * log(pi / pi_ref) + beta * log Z(x), whose Z(x) cancels. The
    protagonist's reference is the adversary (Eq. 9), the adversary's the protagonist (line 9)."""
    return beta * (chosen_logps - ref_chosen_logps) - beta * (rejected_logps - ref_rejected_logps)


def preference_probability(margin, ratio=None):
    """Q(y_w > y_l | x), the Bradley-Terry probability of preferring y_w, shape (B,).

    With the (clipped) ratio r it is Eq. 13, which may exceed 1 and is no part of the loss.
    Mended: Eq. 1's second line has the sign reversed and a stray log, and Eq. 2 repeats the sign.
    Eq. 13 says Q_mu = -Q_nu of two positive numbers: the sign is the payoff's."""
    q = torch.sigmoid(margin)                                              # Eq. 1, Eq. 6
    return q if ratio is None else q / ratio                               # Eq. 13


# ---- The clipped importance ratio and the loss of IOPO (Section 4.1) -----------------------------

def importance_ratio(agent_logps, env_logps, lengths=None):
    """r = pi_AGENT(y) / pi_ENV(y) of AGENT's rejected response y_l (Eq. 11), (B,), float32.

    A weight, not a term of the gradient: detached, as Eq. 15 has no gradient of r. A ratio that
    under- or overflows in float32 counts as 1, as the paper says; NaN stays NaN, so that a broken
    model shows. `lengths` (tokens of y) make it the geometric mean per token, as in GSPO. The paper
    states no normalisation, and only a ratio of whole sequences can come to 0 or inf.
    Mended: the second form, pi_nu(y_w) / pi_nu(y_l), is the first only for mirrored players."""
    log_ratio = (agent_logps.detach() - env_logps.detach()).float()
    if lengths is not None:
        log_ratio = log_ratio / lengths
    ratio = log_ratio.exp()                                                # Eq. 11, "other case"
    return torch.where((ratio == 0) | ratio.isinf(), 1.0, ratio)           # Eq. 11, "r = 0 or inf"


def clip_ratio(ratio, eps=0.3, mode="min"):
    """Proximal clip of the importance ratio (Eq. 12), shape (B,).

    "min"        min(r, clip(r, 1 - eps, 1 + eps)) as printed: the lower bound never acts
    "two_sided"  clip(r, 1 - eps, 1 + eps), what the paper's prose describes
    "none"       r
    Mended: Eq. 12 ends in "= -r_nu", but a ratio is positive. Both players use this formula."""
    clipped = ratio.clamp(1 - eps, 1 + eps)
    readings = {"min": torch.minimum(ratio, clipped), "two_sided": clipped, "none": ratio}
    if mode not in readings:
        raise ValueError(f"clip must be one of {', '.join(readings)}, not {mode!r}")
    return readings[mode]                                                  # Eq. 12


def iopo_loss(chosen_logps, rejected_logps, env_chosen_logps, env_rejected_logps, *,
              beta=0.1, eps=0.3, clip="min", ratio="sequence", rejected_lengths=None):
    """-r * log sigmoid(beta * h) with the frozen ENV as reference (Eq. 14), (B,); take its mean.

    chosen_logps, rejected_logps      log pi_AGENT of y_w and y_l: (B,), nats, summed over tokens
    env_chosen_logps, env_rejected_logps   the same of ENV, computed under torch.no_grad()
    clip              reading of Eq. 12, see `clip_ratio`
    ratio             reading of Eq. 11:
      "sequence"           pi_AGENT(y_l) / pi_ENV(y_l), whole responses: the first form, our default
      "length_normalized"  the same as the geometric mean per token; needs `rejected_lengths` (B,)
      "env"                pi_ENV(y_w) / pi_ENV(y_l): the second form, of two different texts
      "one"                1: no ratio, so that IOPO against a frozen reference is DPO

    Minimised by both players. For the adversary the caller exchanges chosen and rejected, in every
    argument. A pair whose y_l AGENT has unlearned (r near 0) fades out, until r underflows
    (log r < -104) and Eq. 11 calls it 1 again.
    Mended: Eq. 14 prints pi_mu(y_w) in both numerators, which makes the gradient exactly zero; the
    second is pi_mu(y_l), as in Eq. 15. The text "maximizes" (14): it is a loss."""
    numerators = {"sequence": rejected_logps, "length_normalized": rejected_logps,
                  "env": env_chosen_logps, "one": env_rejected_logps}
    lengths = rejected_lengths if ratio == "length_normalized" else None
    if ratio not in numerators or ratio == "length_normalized" and lengths is None:
        raise ValueError(f"ratio must be one of {', '.join(numerators)}, not {ratio!r}; "
                         "length_normalized needs rejected_lengths, the tokens of each y_l")
    r = importance_ratio(numerators[ratio], env_rejected_logps, lengths)                  # Eq. 11
    r = clip_ratio(r, eps, clip)                                                          # Eq. 12
    margin = beta * (chosen_logps - env_chosen_logps) - beta * (rejected_logps - env_rejected_logps)
    return -r * F.logsigmoid(margin)                                                      # Eq. 14


def iopo_weight(*logps, **readings):
    """The r of `iopo_loss` for its four logps and readings (eps, clip, ratio, ...), (B,).

    With beta = 0 Eq. 14 is r * -log sigmoid(0) = r * log 2. clip="none" gives r before Eq. 12."""
    return iopo_loss(*logps, beta=0.0, **readings).detach() / math.log(2)


def iopo_gradient_weight(chosen_logps, rejected_logps, env_chosen_logps, env_rejected_logps, *,
                         beta=0.1, **readings):
    """What multiplies (grad log pi(y_w) - grad log pi(y_l)) in the gradient of iopo_loss, (B,).

    Eq. 15, and Eq. 8 with ratio="one". Training leaves it to autograd, which is tested against it.
    Mended: Eq. 15 prints log sigmoid(beta * h) where Eq. 8 has sigmoid(-beta * h); descent along
    the printed vector would lower y_w."""
    logps = chosen_logps, rejected_logps, env_chosen_logps, env_rejected_logps
    r = iopo_weight(*logps, **readings)
    return -beta * r * torch.sigmoid(-preference_margin(*logps, beta))                    # Eq. 15


# ---- The baselines' losses -----------------------------------------------------------------------
# All are loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, ...) -> (B,)

def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """-log sigmoid(beta * h) (Eq. 7; Rafailov et al., arXiv 2305.18290), shape (B,)."""
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    return -F.logsigmoid(preference_margin(*logps, beta))                                 # Eq. 7


def hinge_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """max(0, 1 - beta * h), the paper's "RSO or HINGE" (Liu et al., arXiv 2309.06657), (B,)."""
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    return F.relu(1 - preference_margin(*logps, beta))


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *,
             beta=0.1, chosen_lengths, rejected_lengths):
    """(h - 1 / (2 beta))^2, h made of per-token *means* (Azar et al., arXiv 2310.12036), (B,).

    The IPO paper's Eq. 17 writes sums. TRL from v0.7.11 on, which the IOPO paper's baselines
    probably used, divides each log-ratio by the response's tokens, as the IPO authors confirmed."""
    chosen_logratios = (chosen_logps - ref_chosen_logps) / chosen_lengths
    rejected_logratios = (rejected_logps - ref_rejected_logps) / rejected_lengths
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def kto_pair_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """Mean of a pair's chosen and rejected KTO-pair term (Ethayarajh et al., 2402.01306), (B,).

    Each half is measured from the *other* half's batch mean of rho, floored at 0 and not detached
    (TRL v0.7.8 to v0.9.4). So the whole optimiser batch must come in one call."""
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    chosen_kl = chosen_logratios.mean().clamp(min=0)
    rejected_kl = rejected_logratios.mean().clamp(min=0)
    chosen_losses = 1 - torch.sigmoid(beta * (chosen_logratios - rejected_kl))
    rejected_losses = 1 - torch.sigmoid(beta * (chosen_kl - rejected_logratios))
    return (chosen_losses + rejected_losses) / 2


def sft_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, chosen_lengths):
    """Negative log-likelihood of the chosen response, mean over its tokens: (B,). No reference."""
    return -chosen_logps / chosen_lengths


def aipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *,
              beta=0.1, alpha=0.07, lam=0.2, chosen_lengths):
    """Agreement-aware iterative preference optimization (AIPO, arXiv 2409.08845), shape (B,).

    -log sigmoid(beta * D - (1 + alpha) * beta * D_ref) - lam / |y_w| * log pi(y_w), where D is
    log pi(y_w) - log pi(y_l) and D_ref the reference's. alpha > 0 asks for a larger margin where
    the reference agrees with the label. alpha = lam = 0 is DPO."""
    logits = chosen_logps - rejected_logps
    ref_logits = ref_chosen_logps - ref_rejected_logps
    preference = -F.logsigmoid(beta * logits - (1 + alpha) * beta * ref_logits)
    return preference - lam * chosen_logps / chosen_lengths


LOSSES = {"iopo": iopo_loss, "dpo": dpo_loss, "hinge": hinge_loss, "ipo": ipo_loss,
          "kto_pair": kto_pair_loss, "sft": sft_loss, "aipo": aipo_loss}


# ---- Algorithm 1 ---------------------------------------------------------------------------------

# How the adversary reads a pair: (exchange chosen and rejected?, sign of its loss). The paper calls
# the game zero-sum, but gives both players one loss (Algorithm 1, lines 5 and 10) and lets the
# adversary prefer y_l: "swapped". With r = 1 both raise one h: mu makes y_w likelier, nu y_l.
ADVERSARIES = {"swapped": (True, +1), "negated": (False, -1), "same": (False, +1)}


def turns(n_iter, n_mu, n_nu):
    """Whose optimiser step it is, from the first to the last: yields (iteration from 1, player).

    The player named is AGENT and trains. The other one is ENV and frozen. With n_nu = 0 the
    adversary never trains and stays the SFT model: then "iopo" is DPO with a clipped ratio."""
    for iteration in range(1, n_iter + 1):                        # Algorithm 1, line 1
        for _ in range(n_mu):                                     # lines 3 to 5: AGENT mu, ENV nu
            yield iteration, "protagonist"
        for _ in range(n_nu):                                     # lines 8 to 10: AGENT nu, ENV mu
            yield iteration, "adversary"
