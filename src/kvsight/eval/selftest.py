"""A plan that claims to compress must be seen to do so, in bytes and in logits."""

from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Dense
from kvsight.integrations.hf import PackedCache
from kvsight.plan import SIDES, Plan

# nats per token: fp32 rounding alone costs 1e-12, codes of 8 bits in every layer 1e-5
_ROUNDING = 1e-9


def codes(plan: Plan, tokens: int) -> bool:
    """Whether the plan claims to code any of the first ``tokens`` tokens, instead of copying all."""
    return any(
        plan.stored(layer, side, tokens).coded > 0 and not isinstance(p.codec.format, Dense)
        for layer in plan.layers
        for side in SIDES
        for p in layer.side(side)
    )


def checked_bytes(cache: PackedCache, plan: Plan, ids: Tensor) -> int:
    """Bytes that the cache of ids [B, T] holds; raises unless they are the plan's, and a saving."""
    batch, tokens = ids.shape
    promised = plan.nbytes(tokens, batch)
    cache.to_rows()
    if cache.nbytes != promised:
        raise KVSightError(
            f"the cache holds {cache.nbytes} bytes for {ids.numel()} tokens, the plan's ledger says "
            f"{promised}: the saving is not real. Please report this plan."
        )
    copied = plan.dense_dtype.itemsize * plan.elements(tokens, batch)
    if codes(plan, tokens) and cache.nbytes >= copied:
        raise KVSightError(
            f"the plan codes its tokens, but the cache holds {cache.nbytes} bytes where copies would take "
            f"{copied}: nothing is compressed. Please report this plan."
        )
    return cache.nbytes


def check_logits(plan: Plan, tokens: int, kl: float) -> None:
    """Raise where a plan that codes gives the uncompressed model's logits, told by their KL."""
    if codes(plan, tokens) and kl < _ROUNDING:
        raise KVSightError(
            f"the plan stores {plan.true_bits:.3f} bits per element, but its logits are those of the "
            f"uncompressed model (KL {kl:.1g}): attention does not read the codes. Please report this plan."
        )


def check_reads(plan: Plan, tokens: int, uncoded: Tensor, coded: Tensor) -> None:
    """Raise where logits through the codes are to the bit those of the same attention without them.

    In half precision the two differ from the model's own logits by as much as good codes do.
    """
    if codes(plan, tokens) and bool((uncoded == coded).all()):
        raise KVSightError(
            f"the plan stores {plan.true_bits:.3f} bits per element, but its logits are to the bit those "
            "of the uncompressed numbers: attention does not read the codes. Please report this plan."
        )
