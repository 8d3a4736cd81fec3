"""Every registered method is fitted, packed, read, saved and measured once, on a model dealt to it."""

import pytest
import torch
from zoo import KINDS, batches, tokens

import kvsight
from kvsight.planfile import plan_hash
from representatives import REPRESENTATIVES, dealt, shapes

METHODS = kvsight.methods()
# windows of 8 tokens have no room for blocks, and linear layers do not roll back
FULL = [
    name for name, kind in KINDS.items() if kind.interface and kind.sliding is None and not kind.stateful
]
# few stages of residual-vq are quick to fit
BITS = {"identity": None, "k8v4": 9.0, "residual-vq": 2.0}


def test_every_format_has_a_representative():
    covered = set().union(*map(shapes, REPRESENTATIVES))
    missing = {name: shapes(name) - covered for name in METHODS}
    missing = {name: formats for name, formats in missing.items() if formats}
    assert not missing, f"add one of these methods to REPRESENTATIVES: {missing}"


@pytest.mark.parametrize("method", METHODS)
def test_method(method, model, plan, tmp_path):
    (name,) = dealt(method, FULL)
    subject, bits = model(name), BITS.get(method, 8.0)
    made = plan(name, method, bits=bits)
    assert bits is None or made.true_bits <= bits
    made.save(tmp_path / "plan")
    back = kvsight.Plan.load(tmp_path / "plan")
    assert plan_hash(back) == plan_hash(made)
    assert back.ledger() == made.ledger()

    cache = kvsight.PackedCache(back)
    ids = tokens(2, 70)
    with kvsight.enable(subject), torch.no_grad():
        for piece in ids.split((40, 1, 29), dim=1):
            out = subject(piece, past_key_values=cache, use_cache=True).logits
        assert bool(out.isfinite().all())
        assert cache.reads.packed > 0 == cache.reads.decoded
        assert cache.nbytes == made.nbytes(70, 2)
        cache.crop(-6)
        cache.save(tmp_path / "cache")
        assert cache.nbytes == made.nbytes(64, 2)
        again = kvsight.PackedCache.load(tmp_path / "cache", back)
        longer = [
            subject(ids[:, :1], past_key_values=each, use_cache=True).logits for each in (cache, again)
        ]
        assert torch.equal(*longer)

    result = kvsight.evaluate(subject, made, batches())
    assert result.cache_bytes == made.nbytes(48, 6)
    assert result.true_bits == made.true_bits
    assert -1e-6 < result.kl.mean < 5


@pytest.mark.parametrize("method", METHODS)
def test_one_token_is_enough_to_fit(method, model):
    """Statistics are poor, but nothing is singular."""
    bits = None if method == "identity" else 16
    fitted = kvsight.fit(model("llama"), [tokens(1, 1)], bits=bits, method=method)
    with kvsight.enable(model("llama")), torch.no_grad():
        cache = kvsight.PackedCache(fitted)
        out = model("llama")(tokens(1, 40), past_key_values=cache, use_cache=True).logits
    assert bool(out.isfinite().all())
