"""What a side code along the queries' directions takes from the score error, against closed forms.

The base is a random rotation with a fixed codebook, whose error has no direction: of its score error a side
code of rank r sees c_r, the share of query energy in its span, and leaves D_q of that.
"""

from dataclasses import replace

import pytest
import torch

import kvsight
from kvsight.errors import KVSightError
from kvsight.formats import Joined
from kvsight.methods.base import Budget
from kvsight.ops.attend import Segment, attend
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.retention import Retention
from kvsight.rope import pairs
from kvsight.stats import Moments, SideStats

DIM, RANK = 32, 3
DRAW = torch.Generator().manual_seed(5)


def spectrum():
    """E[q qᵀ] of two heads, most of it in a few directions; traces are DIM."""
    axes = torch.linalg.qr(torch.randn(2, DIM, DIM, generator=DRAW, dtype=torch.float64)).Q
    falling = torch.logspace(0, -2, DIM, dtype=torch.float64)
    return (axes * falling * DIM / falling.sum()) @ axes.mT


METRIC = spectrum()


def stats(tokens=4096, **more):
    x = torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(6))
    return SideStats(Moments.zero(2, DIM).add(x), METRIC, x, **more)


def codec(side=None, **options):
    """The codec of two bits for keys, without its side code where no options are given."""
    name = "headq" if options else "turboquant"
    method = kvsight.method_info(name)
    options = {"base": "turboquant", "rank": RANK, **options} if options else {}
    budget = Budget(3.6 if options else 2.5, 1024, Retention(0, 0), torch.bfloat16)
    ours = method.with_defaults(options)
    (placement,) = method.build("k", stats() if side is None else side, budget, ours)
    return replace(placement.codec, transform=placement.codec.transform.stored())


def score_error(coder):
    """E (qᵀe)² per head, on keys that no fit has seen."""
    k = torch.randn(2, 4096, DIM, generator=torch.Generator().manual_seed(7))
    e = (coder.decode(coder.encode(k)) - k).double()
    return ((e @ METRIC) * e).sum(-1).mean(-1)


def captured(columns):
    """c_r: the share of query energy in the span of orthonormal columns [H, d, r]."""
    return (columns.mT @ METRIC @ columns).diagonal(dim1=-2, dim2=-1).sum(-1) / DIM


TOP = torch.linalg.eigh(METRIC).eigenvectors[..., -RANK:]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_side_code_leaves_what_its_span_and_its_bits_do_not_reach(bits):
    ratio = score_error(codec(side_bits=bits)) / score_error(codec())
    wanted = 1 - captured(TOP) * (1 - gaussian(bits).distortion)
    torch.testing.assert_close(ratio, wanted, rtol=0.05, atol=0)


def test_the_wrong_sign_doubles_the_error_in_the_span():
    ratio = score_error(codec(control="wrong-sign")) / score_error(codec())
    # e + U ẑ = 2 e - quantisation: 4 - 3 D_q of the energy, where 1 was
    wanted = 1 + 3 * captured(TOP) * (1 - gaussian(4).distortion)
    torch.testing.assert_close(ratio, wanted, rtol=0.05, atol=0)


def test_a_random_basis_takes_its_share_of_directions():
    coder = codec(control="random")
    columns = coder.transform.inverse_matrix[:, DIM:].double().mT
    drawn = columns / columns.norm(dim=-2, keepdim=True)
    ratio = score_error(coder) / score_error(codec())
    torch.testing.assert_close(ratio, 1 - captured(drawn), rtol=0.05, atol=0)
    # over draws c_r is r / d on average
    draws = torch.randn(2000, 1, DIM, RANK, generator=DRAW, dtype=torch.float64)
    mean = captured(torch.linalg.qr(draws).Q).mean()
    torch.testing.assert_close(mean, torch.tensor(RANK / DIM, dtype=torch.float64), rtol=0.05, atol=0)


def test_an_oracle_axis_leaves_the_side_quantisers_error_alone():
    # the query itself as the axis, which no cache can know: c_1 is one
    q = torch.randn(2, DIM, generator=DRAW, dtype=torch.float64)
    rank_one = replace(stats(), metric=q.unsqueeze(-1) * q.unsqueeze(-2))
    k = torch.randn(2, 4096, DIM, generator=torch.Generator().manual_seed(7))

    def error(coder):
        return ((coder.decode(coder.encode(k)) - k).double() @ q.unsqueeze(-1)).square().mean((-1, -2))

    ratio = error(codec(rank_one, rank=1)) / error(codec())
    # a static scale is stretched for larger tokens than the calibration's, which costs up to a bit
    assert bool((ratio > gaussian(4).distortion).all() and (ratio < 2 * gaussian(4).distortion).all())


def test_a_key_correction_is_a_score_correction():
    coder = codec(side_bits=4)
    k, v = torch.randn(2, 1, 2, 50, DIM, generator=DRAW)
    q = torch.randn(1, 4, 3, DIM, generator=DRAW)
    packed = coder.encode(k)
    assert isinstance(packed.format, Joined)
    read = packed.read(coder.quantizer.tables)
    base, z = read.split([DIM, RANK], dim=-1)
    inverse = coder.transform.inverse_matrix
    # the paper: scores of the base, and (qᵀU) ẑ on top of them
    grouped = q.unflatten(1, (2, 2)).flatten(2, 3)
    scores = grouped @ (base @ inverse[:, :DIM]).mT + (grouped @ inverse[:, DIM:].mT) @ z.mT
    scores = scores.unflatten(2, (2, 3)).flatten(1, 2) * 0.3
    wanted = scores.softmax(-1) @ v.repeat_interleave(2, dim=1)
    keys = [Segment(50, coded=(coder.coded((0, 1), packed),))]
    out = attend(q, keys, [Segment(50, dense=v)], scaling=0.3, causal=False)
    torch.testing.assert_close(out.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


def test_one_scale_per_token_costs_sixteen_bits_and_follows_the_token():
    static, dynamic = codec(side_bits=4), codec(side_bits=4, scales="dynamic")
    assert dynamic.format.nbytes(64) - static.format.nbytes(64) == 2 * 64
    k = torch.randn(1, 2, 64, DIM, generator=DRAW)
    loud = k * torch.logspace(0, 2, 64).unsqueeze(-1)

    def left(coder):
        e = (coder.decode(coder.encode(loud)) - loud).double() / loud.norm(dim=-1, keepdim=True)
        return float((e @ TOP).square().sum())

    assert left(dynamic) < 0.5 * left(static)


def test_a_centred_basis_drops_the_mean_query():
    mean = 3 * TOP[..., -1]
    queries = Moments.zero(2, DIM).add(mean.unsqueeze(1))
    read = replace(stats(), metric=METRIC + mean.unsqueeze(-1) * mean.unsqueeze(-2), query=queries)
    plain, centred = (codec(read, centred=c, rank=1).transform.matrix[:, :, DIM:] for c in (False, True))
    axis = mean.float().unsqueeze(-1) / mean.float().norm(dim=-1)[:, None, None]
    along = [(m / m.norm(dim=-2, keepdim=True) * axis).sum((-2, -1)).abs() for m in (plain, centred)]
    assert bool((along[0] > 0.95).all())
    wanted = (TOP[..., -1:].float() * axis).sum((-2, -1)).abs()
    torch.testing.assert_close(along[1], wanted, atol=1e-3, rtol=0)


def test_a_base_that_turns_keys_back_keeps_its_rotation():
    rope = pairs(torch.logspace(0, -3, DIM // 2), DIM)
    places = torch.arange(4096) % 512
    side = replace(stats(), rope=rope, places=places)
    coder = codec(side, base="kvquant outliers=0", scales="static")
    assert coder.rope is rope
    k = torch.randn(1, 2, 40, DIM, generator=DRAW)
    there = rope.forth(k.double(), 100).float()
    near = coder.decode(coder.encode(there, 100), 100) - there
    far = coder.decode(coder.encode(there, 100), 101) - there
    assert float(near.norm()) < 0.6 * float(far.norm())


def test_a_centred_basis_without_queries_says_so():
    with pytest.raises(KVSightError, match="'centred' needs the mean query, which was not observed"):
        codec(centred=True)
