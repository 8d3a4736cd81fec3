"""Attention on codes against brute force over the decoded tensors in fp64.

The bound is the one a kernel has to meet: an error at most twice that of plain torch in the same
precision, both against fp64.
"""

import math

import pytest
import torch

from kvsight.codec import Codec, joined
from kvsight.formats import Dense, Grouped, Indexed, Polar
from kvsight.ops.attend import Segment, attend
from kvsight.ops.attend import ref as definition
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.quantizers.polar import polar_quantizer
from kvsight.quantizers.sketch import SketchQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.quantizers.vector import VectorQuantizer
from kvsight.rope import pairs
from kvsight.transforms import centre, haar, identity, sketch, subspace

DIM = 12
HEADS = 2
ROPE = pairs(torch.tensor([1.0, 0.3, 0.01]), DIM, first=4)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codecs(heads=HEADS):
    """One codec of each kind; those with per-head tensors are made for ``heads`` heads."""
    mean = draw(heads, DIM, seed=50).double()
    books = draw(heads, 3, 2, 512, 4, seed=51)
    turned = centre(mean).then(haar(DIM, seed=1)).stored()
    few = subspace(haar(DIM, seed=3).matrix[..., :5]).stored()
    signs = sketch(DIM, 2 * DIM).stored()
    parts = {
        "subspace": Codec("rank", few, row_quantizer((6, 6, 4, 4, 0), gaussian)),
        "sketch": Codec("qjl", signs, SketchQuantizer.of(signs.matrix)),
        "groups": Codec("int", identity(DIM), GroupedQuantizer(Grouped(DIM, 2, 4, "token"))),
    }
    return parts | {
        "joined": joined("sum", parts["groups"], parts["subspace"], parts["sketch"]),
        "dense": Codec("dense", identity(DIM), DenseQuantizer(Dense(DIM, torch.bfloat16))),
        "rows": Codec("rows", turned, row_quantizer((8, 7, 6, 5, 4, 4, 3, 3, 2, 2, 1, 0), gaussian)),
        "plain rows": Codec("rows", identity(DIM), row_quantizer((6,) * 4 + (0,) * 8, gaussian)),
        "normed rows": Codec("norm", haar(DIM, seed=2).stored(), row_quantizer((4,) * DIM, gaussian, True)),
        "channel groups": Codec("int", identity(DIM), GroupedQuantizer(Grouped(DIM, 4, 5, "channel"))),
        "indices": Codec("vq", identity(DIM), VectorQuantizer(Indexed(DIM, 4, 9, 2, norm=True), books)),
        "polar": Codec("polar", haar(DIM, seed=3).stored(), polar_quantizer(Polar(DIM, (4, 2)))),
        "token groups": Codec("kivi", identity(DIM), GroupedQuantizer(Grouped(DIM, 3, 4, "token"))),
        "turning rows": Codec("rows", turned, row_quantizer((5,) * 8 + (0,) * 4, gaussian), ROPE),
        "turning groups": Codec("int", identity(DIM), GroupedQuantizer(Grouped(DIM, 3, 4, "token")), ROPE),
    }


KINDS = list(codecs())


def coded(kind, x, skip=0, first=9):
    """All heads of x in one codec; ``skip`` tokens are stored in front and hidden."""
    codec = codecs(x.shape[1])[kind]
    block = codec.format.block
    missing = -(x.shape[2] + skip) % block
    assert not missing, f"{kind} takes blocks of {block}"
    hidden = draw(x.shape[0], x.shape[1], skip, x.shape[3], seed=60)
    packed = codec.encode(torch.cat((hidden, x), dim=2), first)
    return Segment(x.shape[2], coded=(codec.coded(tuple(range(x.shape[1])), packed, first),), skip=skip)


def split_by_head(kinds, x):
    """Head h in the codec ``kinds[h]``, listed in reverse order."""
    parts = []
    for head in reversed(range(x.shape[1])):
        codec = codecs(1)[kinds[head]]
        parts.append(codec.coded((head,), codec.encode(x[:, head : head + 1])))
    return Segment(x.shape[2], coded=tuple(parts))


def decoded(side, dtype=torch.float64):
    """What the bytes mean, taken through the transforms in ``dtype``."""
    parts = []
    for segment in side:
        if segment.dense is not None:
            parts.append(segment.dense.to(dtype))
            continue
        heads = {}
        for c in segment.coded:
            numbers = c.folded.decode(c.packed.read(c.tables).to(dtype))
            numbers = numbers if c.rope is None else c.rope.forth(numbers, c.first)
            numbers = numbers[:, :, segment.skip :]
            heads |= dict(zip(c.heads, numbers.unbind(1), strict=True))
        parts.append(torch.stack([heads[h] for h in sorted(heads)], dim=1))
    return torch.cat(parts, dim=2)


def plain(q, keys, values, dtype, **settings):
    """softmax(q kᵀ) v as a textbook writes it, in ``dtype``, on decoded keys and values."""
    q, k, v = q.to(dtype), decoded(keys, dtype), decoded(values, dtype)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * settings["scaling"]
    softcap, mask, sinks = (settings.get(name) for name in ("softcap", "mask", "sink_logits"))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        scores = (
            scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
        )
    elif settings.get("causal", True):
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(
            k.shape[2] - q.shape[2] + 1
        )
        scores = scores.masked_fill(ahead, -math.inf)
    if sinks is not None:
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def check(q, keys, values, **settings):
    """attend, after comparing it with brute force and with itself."""
    settings = {"scaling": DIM**-0.5} | settings
    out = attend(q, keys, values, **settings)
    assert out.shape == (q.shape[0], q.shape[2], q.shape[1], decoded(values).shape[3])
    assert out.dtype == q.dtype
    assert torch.equal(out, attend(q, keys, values, **settings))
    exact = plain(q, keys, values, torch.float64, **settings)
    same = plain(q, keys, values, torch.promote_types(q.dtype, torch.float32), **settings).to(q.dtype)
    for norm in (lambda e: float(e.abs().max()), lambda e: float(e.square().mean().sqrt())):
        ours, theirs = norm(out.double() - exact), norm(same.double() - exact)
        assert ours <= 2 * theirs + 2e-7, f"error {ours:.3g}, plain torch {theirs:.3g}"
    return out


def test_segments_decode_to_what_their_bytes_mean():
    for side in mixed():
        shown = torch.cat([segment.decode(torch.float32) for segment in side], dim=2)
        assert torch.allclose(shown.double(), decoded(side), atol=1e-6)
        assert shown.dtype == torch.float32
    hidden = coded("token groups", draw(1, 2, 9, DIM, seed=40), skip=3)
    assert torch.allclose(hidden.decode(torch.float64), decoded([hidden]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [64, 1000])
def test_every_format_on_both_sides(kind, tokens):
    q, k, v = draw(2, 4, 3, DIM, seed=1), draw(2, 2, tokens, DIM, seed=2), draw(2, 2, tokens, DIM, seed=3)
    check(q, [coded(kind, k)], [coded(kind, v)])


@pytest.mark.parametrize("tokens", [1, 63, 65, 1000])
@pytest.mark.parametrize("kind", ["rows", "normed rows", "channel groups"])
def test_odd_numbers_of_tokens(kind, tokens):
    q, k, v = draw(1, 4, 1, DIM, seed=1), draw(1, 2, tokens, DIM, seed=2), draw(1, 2, tokens, DIM, seed=3)
    check(q, [coded(kind, k)], [coded(kind, v)])


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_query_heads_share_kv_heads(group, dtype):
    q = draw(2, HEADS * group, 5, DIM, seed=group).to(dtype)
    k, v = draw(2, HEADS, 64, DIM, seed=2), draw(2, HEADS, 64, DIM, seed=3)
    check(q, [coded("rows", k)], [coded("channel groups", v)])


def mixed(seed=4, tokens=40):
    """Sinks, codes and tail; keys and values change format at other tokens and split heads otherwise."""
    k, v = draw(2, HEADS, tokens, DIM, seed=seed), draw(2, HEADS, tokens, DIM, seed=seed + 1)
    keys = [
        Segment(3, dense=k[:, :, :3].bfloat16()),
        split_by_head(["token groups", "rows"], k[:, :, 3:27]),
        Segment(tokens - 27, dense=k[:, :, 27:].bfloat16()),
    ]
    values = [
        Segment(1, dense=v[:, :, :1]),
        split_by_head(["rows", "channel groups"], v[:, :, 1:17]),
        coded("token groups", v[:, :, 17:33]),
        Segment(tokens - 33, dense=v[:, :, 33:].half()),
    ]
    return keys, values


MASKS = {
    "causal": {},
    "not causal": {"causal": False},
    "bool": {"mask": draw(2, 1, 7, 40, seed=20) > -0.5},
    "bool per head": {"mask": draw(1, 4, 7, 40, seed=21) > -0.5},
    "additive": {"mask": 3 * draw(2, 1, 7, 40, seed=22)},
    "additive with holes": {"mask": torch.where(draw(2, 4, 7, 40, seed=23) > 0, 0, -math.inf)},
    "wider than the cache": {"mask": draw(2, 1, 7, 55, seed=24) > -0.5},
}


@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"sink_logits": draw(4, seed=30)}], ids=str)
def test_mixed_segments_masks_softcap_and_sinks(settings, extras):
    keys, values = mixed()
    check(draw(2, 4, 7, DIM, seed=6), keys, values, **settings, **extras)


@pytest.mark.parametrize("lowest", [None, torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize("sink_logits", [None, draw(4, seed=31)], ids=["plain", "sinks"])
def test_rows_that_see_nothing_stay_finite_and_others_exact(lowest, sink_logits):
    # left padding: the first two queries see no key at all
    keys, values = mixed()
    q = draw(2, 4, 7, DIM, seed=7)
    mask = torch.ones(2, 1, 7, 40, dtype=torch.bool)
    mask[:, :, :2] = False
    given = mask if lowest is None else torch.where(mask, 0.0, lowest)
    out = attend(q, keys, values, scaling=0.3, mask=given, sink_logits=sink_logits)
    assert torch.isfinite(out).all()
    seen = attend(q[:, :, 2:], keys, values, scaling=0.3, mask=mask[:, :, 2:], sink_logits=sink_logits)
    assert torch.allclose(out[:, 2:], seen, atol=1e-6)
    if sink_logits is not None:
        assert out[:, :2].abs().max() < 1e-30


@pytest.mark.parametrize("skip", [1, 4, 7, 63, 100])
@pytest.mark.parametrize("kind", ["rows", "token groups", "turning groups"])
def test_hidden_tokens_take_no_part(kind, skip):
    tokens = 100 + -skip % 4
    k, v = draw(1, 2, tokens, DIM, seed=8), draw(1, 2, tokens, DIM, seed=9)
    keys, values = [coded(kind, k, skip)], [coded(kind, v, skip)]
    assert decoded(keys).shape[2] == tokens
    check(draw(1, 4, 2, DIM, seed=10), keys, values)


@pytest.mark.parametrize("chunk", [4, 8, 20])
@pytest.mark.parametrize("skip", [0, 3, 4, 11])
def test_chunks_meet_without_a_seam(monkeypatch, chunk, skip):
    tokens = 50 + -(50 + skip) % 4
    k, v = draw(1, 2, tokens, DIM, seed=11), draw(1, 2, tokens, DIM, seed=12)
    keys, values = [coded("token groups", k, skip)], [coded("rows", v, skip)]
    q = draw(1, 4, 3, DIM, seed=13)
    whole = check(q, keys, values)
    monkeypatch.setattr(definition, "_CHUNK", chunk)
    assert torch.allclose(check(q, keys, values), whole, atol=1e-6)


def test_a_history_longer_than_a_chunk():
    tokens = definition._CHUNK + 65
    k, v = draw(1, 1, tokens, DIM, seed=14), draw(1, 1, tokens, DIM, seed=15)
    check(draw(1, 2, 1, DIM, seed=16), [coded("rows", k)], [coded("normed rows", v)])


def test_blocks_of_smaller_than_a_block_chunks_are_whole_blocks(monkeypatch):
    monkeypatch.setattr(definition, "_CHUNK", 1)
    k, v = draw(1, 2, 12, DIM, seed=17), draw(1, 2, 12, DIM, seed=18)
    check(draw(1, 2, 2, DIM, seed=19), [coded("token groups", k)], [coded("token groups", v)])


@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
def test_long_prompts_go_a_few_queries_at_a_time(monkeypatch, settings):
    keys, values = mixed()
    q = draw(2, 4, 7, DIM, seed=6)
    whole = check(q, keys, values, **settings)
    monkeypatch.setattr(definition, "_SCORES", 2 * 4 * 40 * 2)
    assert torch.allclose(check(q, keys, values, **settings), whole, atol=1e-6)


def test_values_may_be_narrower_than_keys():
    k, v = draw(1, 2, 9, DIM, seed=25), draw(1, 2, 9, 5, seed=26)
    check(draw(1, 2, 2, DIM, seed=27), [coded("rows", k)], [Segment(9, dense=v)])


@pytest.mark.parametrize("chunk", [4, 8, 20])
def test_turning_keys_keep_their_index_in_every_chunk(monkeypatch, chunk):
    k, v = draw(1, 2, 49, DIM, seed=36), draw(1, 2, 49, DIM, seed=37)
    keys, values, q = [coded("turning groups", k, skip=3)], [Segment(49, dense=v)], draw(1, 4, 3, DIM)
    # 3 bits over groups of 4; an index that is off by one costs far more
    assert float((decoded(keys) - k).square().mean()) < 0.05
    exact = plain(q, keys, values, torch.float64, scaling=0.3)
    monkeypatch.setattr(definition, "_CHUNK", chunk)
    assert torch.allclose(attend(q, keys, values, scaling=0.3).double(), exact, atol=2e-6)


def test_strided_queries():
    keys, values = mixed()
    q = draw(2, 7, 4, DIM, seed=28).transpose(1, 2)
    assert not q.is_contiguous()
    assert torch.allclose(check(q, keys, values), check(q.contiguous(), keys, values), atol=1e-6)


def test_inputs_are_left_alone():
    keys, values = mixed()
    q = draw(2, 4, 7, DIM, seed=29)
    before = q.clone(), decoded(keys), decoded(values)
    attend(q, keys, values, scaling=0.3, softcap=1.0)
    assert all(map(torch.equal, (q, decoded(keys), decoded(values)), before))


def test_a_shift_of_all_keys_is_invisible():
    # the offset of a centred codec matters only next to segments that are not centred
    k, v = draw(1, 2, 30, DIM, seed=32), draw(1, 2, 30, DIM, seed=33)
    q = draw(1, 2, 1, DIM, seed=34)
    values = [Segment(30, dense=v)]
    base = check(q, [Segment(30, dense=k)], values)
    moved = check(q, [Segment(30, dense=k + draw(1, 2, 1, DIM, seed=35))], values)
    assert torch.allclose(base, moved, atol=1e-5)
    part = torch.cat((k[:, :, :15] + 1, k[:, :, 15:]), dim=2)
    assert not torch.allclose(base, check(q, [Segment(30, dense=part)], values), atol=1e-2)
