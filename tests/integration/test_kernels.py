"""A model that reads its packed cache through the kernels says what it says through plain torch."""

from functools import partial

import pytest
import torch
from zoo import tokens

import kvsight
from interpreter import DEVICE, available
from kvsight.integrations import enable
from kvsight.ops.attend import attend

MASK = torch.ones(2, 7, dtype=torch.int64)
MASK[0, :3] = 0


def logits(subject, plan):
    """Of a left-padded prompt, a chunk and a step."""
    cache = kvsight.PackedCache(plan)
    parts = []
    with torch.no_grad(), kvsight.enable(subject):
        for start, stop in ((0, 4), (4, 6), (6, 7)):
            ids = tokens(2, 7, seed=3)[:, start:stop]
            parts.append(subject(ids, attention_mask=MASK[:, :stop], past_key_values=cache).logits)
    assert cache.reads.packed and not cache.reads.decoded
    return torch.cat(parts, dim=1)


@available
@pytest.mark.skipif(DEVICE == "cuda", reason="the model is on the CPU, where kernels need the interpreter")
@pytest.mark.parametrize("method", ["sight", "kivi"])
def test_logits_through_the_kernels(method, model, plan, monkeypatch):
    subject = model("llama-1layer")
    options = (("codebook", "uniform"),) if method == "sight" else ()
    made = plan("llama-1layer", method, options=options)
    expected = logits(subject, made)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(enable, "attend", partial(attend, backend="triton"))
    got = logits(subject, made)
    assert not torch.equal(got, expected)
    assert torch.allclose(got, expected, atol=2e-5)
