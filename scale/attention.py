"""Attention of a row of pairs on a GPU, in half precision: flash, without a mask tensor.

A pair [context | chosen | rejected] is two sequences of queries: context and chosen read
themselves, rejected reads the context and itself. Both are causal and end with their keys.
"""

import inspect
import itertools

import torch
from torch.nn.attention.varlen import varlen_attn

# key/value heads of groups: torch 2.11 takes them unasked, later ones are asked
GROUPS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def of_pairs(batch, head_dim):
    """What model.response_logps takes for `attend`; None where the GPU or its kernels cannot."""
    if head_dim % 8 or head_dim > 256 or \
            not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    keys, queries, seen, place = [], [], [], 0
    for context, w, l in zip(batch.contexts, batch.lengths[::2], batch.lengths[1::2]):
        end = place + context
        keys += [*range(place, end + w), *range(place, end), *range(end + w, end + w + l)]
        queries += [context + w, l]
        seen += [context + w, context + l]
        place = end + w + l
    device = batch.input_ids.device
    keys = torch.tensor(keys, device=device)                                        # (S,)
    ends = [torch.tensor([0, *itertools.accumulate(some)], dtype=torch.int32, device=device)
            for some in (queries, seen)]                                            # (2B + 1,) each

    def attend(layer, q, k, v):
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))             # (T, H, d)
        read = varlen_attn(q, k[keys], v[keys], *ends, max(queries), max(seen),
                           window_size=(-1, 0), **GROUPS)                           # (T, H, d)
        return read.transpose(0, 1)[None]                                           # (1, H, T, d)
    return attend
