"""Distortion measures: exact against loops over plain numbers, whatever the chunks and windows."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsight import distortion as d
from kvsight.errors import KVSightError
from kvsight.ops.attend.ref import Segment, attend
from kvsight.stats import Moments

MEANS = ("score", "fisher", "kl", "l1", "output", "projected", "value", "flips", "clear", "clear_flips")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trace(heads=2, group=3, count=4, tokens=6, dim=5, width=3, seed=0, **options):
    """A random layer, and coded keys and values near its own."""
    weight = draw(7, heads * group * width, seed=seed + 1)
    reference = d.Reference(
        draw(heads, group, count, dim, seed=seed + 2),
        draw(heads, tokens, dim, seed=seed + 3),
        draw(heads, tokens, width, seed=seed + 4),
        d.output_metric(weight, heads, group),
        **options,
    )
    keys = reference.keys + 0.7 * draw(heads, tokens, dim, seed=seed + 5)
    values = reference.values + 0.5 * draw(heads, tokens, width, seed=seed + 6)
    return reference, keys, values, weight


def close(found, wanted):
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert found.dtype == torch.float64 and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def same(found, wanted, atol=1e-13):
    assert found.rows == wanted.rows
    for name in MEANS:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=atol)


# ---- the definitions once more, on lists of floats


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def softmax(s):
    total = math.fsum(math.exp(x) for x in s)
    return [math.exp(x) / total for x in s]


def mixture(p, values):
    return [dot(p, column) for column in zip(*values, strict=True)]


def first_of_the_best(s):
    return max(range(len(s)), key=lambda j: s[j])


def quadratic_form(p, ds):
    """δsᵀ(diag p − p pᵀ)δs, entry by entry."""
    matrix = [[(a if i == j else 0.0) - a * b for j, b in enumerate(p)] for i, a in enumerate(p)]
    return math.fsum(x * dot(row, ds) for x, row in zip(ds, matrix, strict=True))


def row_by_row(reference, coded_keys, coded_values, weight, gap):
    """All of ``AttentionDamage`` by loops over heads, queries and visible keys."""
    heads, group, count, dim = reference.queries.shape
    tokens, width = reference.values.shape[1:]
    positions = (
        range(tokens - count, tokens) if reference.positions is None else reference.positions.tolist()
    )
    scaling = dim**-0.5 if reference.scaling is None else reference.scaling
    cap = reference.softcap
    sums = {name: [0.0] * heads for name in MEANS}
    for h, g, i in itertools.product(range(heads), range(group), range(count)):
        first = 0 if reference.window is None else max(0, positions[i] - reference.window + 1)
        seen = range(first, positions[i] + 1)
        q = reference.queries[h, g, i].tolist()
        k, coded_k = ([x[h, j].tolist() for j in seen] for x in (reference.keys, coded_keys))
        v, coded_v = ([x[h, j].tolist() for j in seen] for x in (reference.values, coded_values))
        s, coded_s = ([dot(q, key) * scaling for key in side] for side in (k, coded_k))
        if cap is not None:
            s, coded_s = ([cap * math.tanh(x / cap) for x in side] for side in (s, coded_s))
        ds = minus(coded_s, s)
        p, coded_p = softmax(s), softmax(coded_s)
        lost = minus(mixture(coded_p, coded_v), mixture(p, v))
        start = (h * group + g) * width
        seen_lost = [dot(w[start : start + width], lost) for w in weight.tolist()]
        best = sorted(s)
        clear = len(s) == 1 or best[-1] - best[-2] > gap
        flip = first_of_the_best(s) != first_of_the_best(coded_s)
        changes = [minus(a, b) for a, b in zip(coded_v, v, strict=True)]
        row = {
            "score": dot(ds, ds) / len(ds),
            "fisher": quadratic_form(p, ds),
            "kl": math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, coded_p, strict=True)),
            "l1": math.fsum(abs(a - b) for a, b in zip(p, coded_p, strict=True)),
            "output": dot(lost, lost) / width,
            "projected": group * dot(seen_lost, seen_lost),
            "value": math.fsum(a**2 * dot(e, e) for a, e in zip(p, changes, strict=True)) / width,
            "flips": flip,
            "clear": clear,
            "clear_flips": clear and flip,
        }
        for name in MEANS:
            sums[name][h] += row[name]
    return {name: [total / (group * count) for total in sums[name]] for name in MEANS}


CASES = {
    "causal": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5, "scaling": 0.9},
    "positions": {"positions": torch.tensor([5, 0, 3, 3])},
    "positions and window": {"positions": torch.tensor([4, 0, 1, 5]), "window": 2},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_damage_is_what_loops_find(options):
    reference, keys, values, weight = trace(**options)
    found = d.attention_damage(reference, keys, values, gap=0.3)
    assert found.rows == 12 and found.gap == 0.3
    wanted = row_by_row(reference, keys, values, weight, 0.3)
    for name in MEANS:
        close(getattr(found, name), wanted[name])
    close(found.fisher_rmse, [math.sqrt(x) for x in wanted["fisher"]])
    rates = zip(wanted["clear_flips"], wanted["clear"], strict=True)
    close(found.clear_flip_rate, [flips / clear for flips, clear in rates])


def test_the_cases_have_flips_in_and_out_of_the_gap():
    found = d.attention_damage(*trace(count=40, tokens=60)[:3], gap=0.3)
    assert (found.clear_flips > 0).all() and (found.clear_flips < found.flips).all()
    assert (found.clear > 0).all() and (found.clear < 1).all()


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 6)),
    more=st.integers(0, 5),
    window=st.none() | st.integers(1, 7),
    chunk=st.none() | st.integers(1, 5),
)
def test_damage_of_any_shape_is_what_loops_find(shape, more, window, chunk):
    heads, group, count, width, dim = shape
    reference, keys, values, weight = trace(heads, group, count, count + more, dim, width, window=window)
    found = d.attention_damage(reference, keys, values, chunk=chunk)
    wanted = row_by_row(reference, keys, values, weight, 0.05)
    for name in MEANS:
        close(getattr(found, name), wanted[name])


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_chunks_do_not_change_the_result(options):
    reference, keys, values, _ = trace(**options)
    whole = d.attention_damage(reference, keys, values)
    for chunk in (1, 2, 3, 4, 100):
        same(d.attention_damage(reference, keys, values, chunk=chunk), whole)


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    reference, keys, values, _ = trace(heads=1, group=2, count=64, tokens=64)
    sizes = []
    scores = d.rows.scores

    def watched(*arguments):
        found = scores(*arguments)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(d.rows, "scores", watched)
    d.attention_damage(reference, keys, values, chunk=8)
    assert max(sizes) == 2 * 8 * 64 and len(sizes) == 2 * 8
    sizes.clear()
    monkeypatch.setattr(d.damage, "_SCORES", 640)
    d.attention_damage(reference, keys, values)
    assert max(sizes) <= 640


@pytest.mark.parametrize("with_metric", [True, False])
def test_merged_windows_are_one_long_pass(with_metric):
    reference, keys, values, _ = trace(count=9, tokens=9)
    if not with_metric:
        reference = replace(reference, metric=None)
    parts = []
    for rows in (slice(0, 2), slice(2, 8), slice(8, 9)):
        part = replace(reference, queries=reference.queries[:, :, rows], positions=torch.arange(9)[rows])
        parts.append(d.attention_damage(part, keys, values))
    whole = d.attention_damage(reference, keys, values)
    assert (whole.projected is None) != with_metric
    for a, b, c in itertools.permutations(parts):
        merged = a.merge(b).merge(c)
        if with_metric:
            same(merged, whole)
        else:
            assert merged.projected is None
            close(merged.kl, whole.kl)


def test_the_same_input_gives_exact_zeros():
    reference, *_ = trace(softcap=2.0)
    for found in (
        d.attention_damage(reference),
        d.attention_damage(reference, reference.keys.clone(), reference.values.clone()),
    ):
        for name in set(MEANS) - {"clear"}:
            assert torch.equal(getattr(found, name), torch.zeros(2, dtype=torch.float64))
    keys, basis = reference.keys, d.query_basis(d.query_metric(reference.queries), 2)
    exact = (
        d.storage_mse(keys, keys.clone()),
        d.relative_error(keys, keys.clone()),
        d.angle_error(keys, keys.clone()),
        d.logit_mse(keys, keys.clone(), d.query_metric(reference.queries)),
        d.paired_logit_mse(draw(2, 3, 6, 5), keys, keys.clone()),
        d.write_surrogate(keys, keys.clone(), basis),
    )
    for zero in exact:
        assert torch.equal(zero, torch.zeros(2, dtype=torch.float64))


def test_one_side_coded_leaves_the_other_exact():
    reference, keys, values, _ = trace()
    both = d.attention_damage(reference, keys, values)
    key_only, value_only = d.attention_damage(reference, keys), d.attention_damage(reference, values=values)
    for name in ("score", "fisher", "kl", "l1", "flips"):
        assert torch.equal(getattr(key_only, name), getattr(both, name))
        assert not getattr(value_only, name).any()
    assert torch.equal(value_only.value, both.value) and not key_only.value.any()
    close(key_only.output, d.attention_damage(reference, keys, reference.values).output)
    assert not torch.allclose(key_only.output, both.output)


@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_a_shift_shared_by_all_keys_is_invisible(options):
    reference, keys, values, _ = trace(**options)
    shift = 3 * draw(2, 1, 5, seed=9)
    moved = d.attention_damage(reference, keys + shift, values)
    still = d.attention_damage(reference, keys, values)
    for name in set(MEANS) - {"score"}:
        torch.testing.assert_close(getattr(moved, name), getattr(still, name), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(moved.score, still.score)
    only = d.attention_damage(reference, reference.keys + shift)
    for name in set(MEANS) - {"score", "clear"}:
        assert getattr(only, name).abs().max() < 1e-12
    # the write-time surrogate agrees, storage error does not
    basis = d.query_basis(d.query_metric(reference.queries), 5)
    torch.testing.assert_close(
        d.write_surrogate(reference.keys, keys + shift, basis),
        d.write_surrogate(reference.keys, keys, basis),
        rtol=1e-12,
        atol=0,
    )
    assert (d.storage_mse(reference.keys, reference.keys + shift) > 1).all()


def test_kl_is_half_the_visible_damage_up_to_third_order():
    s, ds = 2 * draw(50, 20, seed=1), draw(50, 20, seed=2)
    log_p = s.log_softmax(-1)
    rests = []
    for t in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125):
        kl = d.attention_kl(log_p, (s + t * ds).log_softmax(-1))
        rest = (kl - d.fisher(log_p.exp(), t * ds) / 2).abs() / t**3
        assert (rest <= ds.abs().amax(-1) ** 3).all()
        rests.append(rest)
    # the third-order coefficient is a sixth of the third central moment of δs under p
    mean = (log_p.exp() * ds).sum(-1, keepdim=True)
    third = (log_p.exp() * (ds - mean) ** 3).sum(-1).abs() / 6
    torch.testing.assert_close(rests[-1], third, rtol=0.1, atol=0.02)
    assert (rests[-1] - third).abs().max() < (rests[-2] - third).abs().max()


def test_query_heads_share_their_kv_head():
    # as many KV heads as query heads, with keys repeated, is the same attention
    reference, keys, values, _ = trace(heads=2, group=3)
    assert reference.metric is not None

    def spread(x):
        return x.repeat_interleave(3, dim=0)

    alone = d.Reference(
        reference.queries.reshape(6, 1, 4, 5),
        spread(reference.keys),
        spread(reference.values),
        reference.metric.reshape(6, 1, 3, 3),
    )
    shared = d.attention_damage(reference, keys, values)
    single = d.attention_damage(alone, spread(keys), spread(values))
    assert (shared.rows, single.rows) == (12, 4)
    for name in MEANS:
        heads = getattr(single, name).view(2, 3)
        close(getattr(shared, name), heads.sum(1) if name == "projected" else heads.mean(1))


def test_later_keys_are_not_seen():
    reference, keys, values, _ = trace(positions=torch.tensor([0, 1, 2, 3]))
    before = d.attention_damage(reference, keys, values)
    keys[:, 4:] += 100
    values[:, 4:] += 100
    same(d.attention_damage(reference, keys, values), before)
    # the first key alone: attention cannot change
    first = replace(reference, queries=reference.queries[:, :, :1], positions=torch.tensor([0]))
    found = d.attention_damage(first, keys)
    assert not found.kl.any() and not found.flips.any() and (found.clear == 1).all()
    assert (found.score > 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scaling": 0.9}])
def test_outputs_differ_as_those_of_the_attention_that_runs(options):
    reference, keys, values, _ = trace(**options)

    def outputs(k, v):
        q = reference.queries.reshape(1, 6, 4, 5)
        sides = [[Segment(6, dense=side.unsqueeze(0))] for side in (k, v)]
        out = attend(q, *sides, scaling=options.get("scaling", 5**-0.5), softcap=options.get("softcap"))
        return out.transpose(1, 2).reshape(2, 3, 4, 3)

    exact, coded = outputs(reference.keys, reference.values), outputs(keys, values)
    found = d.attention_damage(reference, keys, values)
    close(found.output, d.output_mse(exact, coded).mean(dim=(1, 2)))
    close(found.projected, d.projected_error(exact, coded, reference.metric).mean(dim=1))


def test_half_precision_is_measured_in_fp64():
    reference, keys, values, _ = trace()
    small = {name: getattr(reference, name).bfloat16() for name in ("queries", "keys", "values")}
    exact = {name: x.double() for name, x in small.items()}
    found = d.attention_damage(replace(reference, **small), keys.half(), values.float())
    same(
        found,
        d.attention_damage(replace(reference, **exact), keys.half().double(), values.float().double()),
    )


# ---- measures of vectors


@pytest.fixture
def vectors():
    """Keys, coded keys and queries of 2 heads, 7 tokens, dimension 4, 3 query heads each."""
    keys = draw(2, 7, 4, seed=1)
    return keys, keys + 0.3 * draw(2, 7, 4, seed=2), draw(2, 3, 7, 4, seed=3)


def per_head(keys, coded):
    return zip(keys.tolist(), coded.tolist(), strict=True)


def test_storage_and_geometric_errors_are_what_loops_find(vectors):
    keys, coded, _ = vectors
    for measure, of_head in (
        (d.storage_mse, lambda k, c: math.fsum((y - x) ** 2 for y, x in flat(c, k)) / 28),
        (d.relative_error, lambda k, c: math.fsum((y - x) ** 2 for y, x in flat(c, k)) / squares(k)),
        (d.angle_error, lambda k, c: math.fsum(1 - cosine(y, x) for y, x in zip(c, k, strict=True)) / 7),
    ):
        close(measure(keys, coded), [of_head(k, c) for k, c in per_head(keys, coded)])


def flat(a, b):
    return zip(itertools.chain(*a), itertools.chain(*b), strict=True)


def squares(rows):
    return math.fsum(x * x for row in rows for x in row)


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def test_logit_mse_is_the_mean_over_all_pairs(vectors):
    keys, coded, queries = vectors
    found = d.logit_mse(keys, coded, d.query_metric(queries))
    paired = d.paired_logit_mse(queries, keys, coded)
    for head, (k, c) in enumerate(per_head(keys, coded)):
        errors = [minus(y, x) for y, x in zip(c, k, strict=True)]
        groups = queries[head].tolist()
        every = [dot(q, e) ** 2 for group in groups for q in group for e in errors]
        close(found[head], math.fsum(every) / len(every))
        pairs = [dot(q, e) ** 2 for group in groups for q, e in zip(group, errors, strict=True)]
        close(paired[head], math.fsum(pairs) / len(pairs))
    assert not torch.allclose(found, paired)


def test_the_paired_form_tends_to_the_exact_one_when_queries_ignore_keys():
    # 20,000 pairs: a standard error of about 1.5 % on the ratio, allowed six of them
    keys, queries = draw(1, 20_000, 4, seed=1), draw(1, 1, 20_000, 4, seed=2) @ draw(4, 4, seed=3)
    coded = keys + draw(1, 20_000, 4, seed=4)
    ratio = d.paired_logit_mse(queries, keys, coded) / d.logit_mse(keys, coded, d.query_metric(queries))
    assert ratio.item() == pytest.approx(1, abs=0.09)


def test_logit_mse_is_the_score_error_without_scaling(vectors):
    keys, coded, queries = vectors
    ds = d.score_error(d.scores(queries, keys.unsqueeze(1)), d.scores(queries, coded.unsqueeze(1)))
    scaled = d.logit_mse(keys, coded, d.query_metric(queries)) / 4
    close(d.score_mse(ds).mean(dim=(1, 2)), scaled)


def test_query_metric_is_the_second_moment_that_stats_keep(vectors):
    queries = vectors[2] + 1
    loops = [
        [[math.fsum(q[i] * q[j] for q in head) / 21 for j in range(4)] for i in range(4)]
        for head in queries.flatten(1, 2).tolist()
    ]
    close(d.query_metric(queries), loops)
    close(d.query_metric(queries), Moments.zero(2, 4).add(queries.flatten(1, 2)).second)


def test_the_query_basis_captures_most_and_all_of_it_at_full_rank(vectors):
    queries = vectors[2] * torch.tensor([1.0, 5.0, 0.2, 2.0])
    metric = d.query_metric(queries)
    full = d.query_basis(metric, 4)
    caught = []
    for rank in range(1, 5):
        basis = d.query_basis(metric, rank)
        assert torch.equal(basis, full[..., :rank])
        close(basis.mT @ basis, torch.eye(rank).expand(2, -1, -1))
        projected = torch.einsum("hdr,hgnd->hgnr", basis, queries)
        wanted = [
            squares(p.flatten(0, 1).tolist()) / squares(q.flatten(0, 1).tolist())
            for p, q in zip(projected, queries, strict=True)
        ]
        caught.append(d.axis_capture(metric, basis))
        close(caught[-1], wanted)
        # Ky Fan: no other directions catch more
        for seed in range(20):
            other = torch.linalg.qr(draw(2, 4, rank, seed=seed)).Q
            assert (d.axis_capture(metric, other) <= caught[-1] + 1e-12).all()
    close(caught[-1], [1.0, 1.0])
    assert all((a < b).all() for a, b in itertools.pairwise(caught))
    eigenvalues = torch.linalg.eigvalsh(metric)
    close(caught[0], eigenvalues[:, -1] / eigenvalues.sum(-1))


def test_the_write_surrogate_is_what_loops_find(vectors):
    keys, coded, queries = vectors
    basis = d.query_basis(d.query_metric(queries), 2)
    wanted = []
    for (k, c), u in zip(per_head(keys, coded), basis.mT.tolist(), strict=True):
        axes = [[dot(minus(y, x), axis) for y, x in zip(c, k, strict=True)] for axis in u]
        # ‖C a‖² = aᵀ(I − 11ᵀ/T)a, as C is a projection
        wanted.append(math.fsum(dot(a, a) - math.fsum(a) ** 2 / len(a) for a in axes))
    close(d.write_surrogate(keys, coded, basis), wanted)


def test_zero_vectors_have_an_angle_and_a_relative_error():
    zero, one = torch.zeros(1, 2, 3), torch.eye(3)[:2].unsqueeze(0)
    assert d.angle_error(zero, zero).item() == d.relative_error(zero, zero).item() == 0
    assert d.angle_error(one, zero).item() == d.angle_error(zero, one).item() == 1
    assert d.angle_error(one, -one).item() == 2
    assert d.relative_error(zero, one).item() == math.inf
    assert d.axis_capture(torch.zeros(1, 3, 3), torch.eye(3)[None, :, :1]).item() == 1


def test_small_angles_are_not_rounded_away():
    # 1 − cos of an angle of 1e-9 is 5e-19, far below the rounding of 1 − 1
    found = d.angle_error(torch.tensor([[[1.0, 0.0]]]).double(), torch.tensor([[[1.0, 1e-9]]]).double())
    assert found.item() == pytest.approx(5e-19, rel=1e-6)


# ---- measures of rows


def test_score_errors_are_those_of_the_key_errors_and_zero_at_hidden_keys(vectors):
    keys, coded, queries = vectors
    for scaling in (None, 0.7):
        s, coded_s = (d.scores(queries[0, 0], k[0], scaling) for k in (keys, coded))
        close(d.score_error(s, coded_s), queries[0, 0] @ (coded - keys)[0].T * (scaling or 0.5))
    hidden = torch.ones(7, 7).triu(1).bool()
    found = d.score_error(*(x.masked_fill(hidden, -torch.inf) for x in (s, coded_s)))
    close(found, (coded_s - s).tril())


def test_the_best_keys_gap():
    s = torch.tensor([[3.0, 1.0, 2.5], [3.0, -torch.inf, -torch.inf], [1.0, 1.0, 0.0]])
    assert d.score_gap(s).tolist() == [0.5, torch.inf, 0]
    assert d.score_gap(s[..., :1]).tolist() == [torch.inf] * 3


def test_a_tie_with_the_old_winner_is_no_flip():
    s = torch.tensor([1.0, 3.0, 2.0])
    for coded, flipped in (([1, 2, 2], False), ([3, 3, 1], False), ([1, 2, 3], True), ([0, 5, -1], False)):
        assert d.route_flips(s, torch.tensor(coded)).item() is flipped
    # two winners before: either may stay
    assert not d.route_flips(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])).item()


def test_only_rows_above_the_threshold_are_clear():
    # scores 0 and 0.5: clear below 0.5, not at it; the coded keys swap them
    reference = d.Reference(torch.ones(1, 1, 1, 1), torch.tensor([[[0.0], [0.5]]]), torch.ones(1, 2, 1))
    coded = reference.keys.flip(1)
    for gap, clear in ((0.0, 1.0), (0.49, 1.0), (0.5, 0.0), (0.51, 0.0)):
        found = d.attention_damage(reference, coded, gap=gap)
        assert (found.flips.item(), found.clear.item(), found.clear_flips.item()) == (1.0, clear, clear)
    assert found.clear_flip_rate.isnan().all()
    assert d.attention_damage(reference, coded).gap == 0.05


def test_certain_attention_has_finite_kl_and_no_damage_where_it_does_not_look():
    # p underflows to 0 at the second key
    s, coded = torch.tensor([0.0, -2000.0]), torch.tensor([0.0, -1000.0])
    kl = d.attention_kl(s.double().log_softmax(-1), coded.double().log_softmax(-1))
    assert kl.item() == 0
    assert d.fisher(s.softmax(-1), coded - s).item() == 0
    # and the other way round it is as large as the scores say
    s, coded = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, -2000.0]).double()
    p = s.softmax(-1)
    kl = d.attention_kl(s.log_softmax(-1), coded.log_softmax(-1))
    assert kl.item() == pytest.approx(float((p * p.log()).sum() + 2000 * p[1]))


def test_l1_drift_of_attention_that_moves_wholly_is_two():
    assert d.l1_drift(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == 2


def test_value_distortion_is_the_output_error_of_independent_errors():
    # random signs: cross terms vanish in the mean; 4,000 draws, 2 % is over four standard errors
    p, values = draw(9, seed=1).softmax(-1), draw(4_000, 9, 6, seed=2)
    signs = draw(4_000, 9, 1, seed=3).sign()
    coded = values + signs * draw(9, 6, seed=4)
    outputs = d.output_mse(p @ values, p @ coded)
    surrogate = d.value_distortion(p.expand(4_000, 1, 9), values, coded).squeeze(-1)
    assert outputs.mean().item() == pytest.approx(surrogate.mean().item(), rel=0.02)
    # equal errors do not average out: the surrogate is too small by the number of tokens
    flat = torch.full((9,), 1 / 9).double()
    shifted = values[0] + 1
    assert d.output_mse(flat @ values[0], flat @ shifted).item() == pytest.approx(1)
    assert d.value_distortion(flat, values[0], shifted).item() == pytest.approx(1 / 9)


def test_the_output_metric_sees_the_projection_of_each_head():
    weight, o, coded = draw(7, 2 * 3 * 4, seed=1), draw(2, 3, 5, 4, seed=2), draw(2, 3, 5, 4, seed=3)
    metric = d.output_metric(weight, 2, 3)
    assert metric.shape == (2, 3, 4, 4)
    found = d.projected_error(o, coded, metric)
    wanted = torch.zeros(2, 5, dtype=torch.float64)
    for h, g, i in itertools.product(range(2), range(3), range(5)):
        # the whole projection, fed this head's error and zeros for the others
        apart = torch.zeros(2, 3, 4, dtype=torch.float64)
        apart[h, g] = (coded - o)[h, g, i]
        wanted[h, i] += torch.nn.functional.linear(apart.flatten(), weight).square().sum()
    close(found, wanted)
    eye = torch.eye(4).expand(3, 4, 4)
    close(d.projected_error(o, coded, eye), 4 * d.output_mse(o, coded).sum(1))


# ---- what is refused


def broken(**change):
    reference = trace()[0]
    return lambda: replace(reference, **change)


NAN = torch.full((2, 6, 5), torch.nan)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (broken(queries=draw(2, 3, 5)), r"wrong shape of queries: got \(2, 3, 5\); wanted \[H, G, n, d\]"),
        (broken(queries=draw(2, 3, 0, 5)), r"none of them 0"),
        (broken(queries=draw(2, 3, 4, 4)), r"wrong shape of keys: got \(2, 6, 5\); wanted \(2, 6, 4\)"),
        (broken(keys=draw(2, 7, 5)), r"wrong shape of keys: got \(2, 7, 5\); wanted \(2, 6, 5\)"),
        (broken(values=draw(3, 6, 3)), r"wrong shape of values: got \(3, 6, 3\); wanted \(2, 6, 3\)"),
        (broken(keys=NAN), r"NaN or inf in keys of shape \(2, 6, 5\)"),
        (broken(values=torch.full((2, 6, 3), torch.inf)), "NaN or .?inf in values of"),
        (broken(queries=torch.full((2, 3, 4, 5), torch.nan)), "NaN or .?inf in queries of"),
        (broken(metric=draw(2, 3, 3)), r"output metric: .* wanted \(2, 3, 3, 3\): one matrix for each"),
        (broken(metric=torch.full((2, 3, 3, 3), torch.nan)), "NaN or .?inf in output metric of"),
        (broken(queries=draw(2, 3, 7, 5)), "7 queries cannot be the last of 6 tokens; pass positions"),
        (broken(positions=torch.arange(3)), r"wrong shape of positions: got \(3,\); wanted \(4,\)"),
        (broken(positions=torch.arange(4.0)), "positions must be integers; got torch.float32"),
        (broken(positions=torch.arange(4) + 3), r"positions must be in 0\.\.5; got 3\.\.6"),
        (broken(positions=torch.arange(4) - 1), r"positions must be in 0\.\.5; got -1\.\.2"),
        (broken(window=0), "a window holds at least 1 token; got 0"),
        (broken(scaling=0.0), "scaling must be above 0 and finite; got 0.0"),
        (broken(softcap=math.inf), "softcap must be above 0 and finite; got inf"),
    ],
)
def test_references_that_do_not_fit(build, message):
    with pytest.raises(KVSightError, match=message):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": draw(2, 5, 5)}, r"wrong shape of coded keys: got \(2, 5, 5\); wanted \(2, 6, 5\)"),
        ({"values": draw(2, 6, 4)}, r"wrong shape of coded values: got \(2, 6, 4\); wanted \(2, 6, 3\)"),
        ({"keys": NAN}, "NaN or .?inf in coded keys of"),
        ({"chunk": 0}, "a chunk holds at least 1 query; got 0"),
        ({"gap": -0.1}, "gap is a score difference of at least 0; got -0.1"),
        ({"gap": math.nan}, "gap is a score difference of at least 0; got nan"),
    ],
)
def test_coded_sides_that_do_not_fit(change, message):
    with pytest.raises(KVSightError, match=message):
        d.attention_damage(trace()[0], **change)


def test_damage_of_other_layers_does_not_merge():
    reference, *_ = trace()
    damage = d.attention_damage(reference)
    with pytest.raises(KVSightError, match=r"2 heads at gap 0\.05 with that of 1 heads at gap 0\.05"):
        damage.merge(d.attention_damage(trace(heads=1)[0]))
    with pytest.raises(KVSightError, match=r"at gap 0\.05 with that of 2 heads at gap 0\.1;"):
        damage.merge(d.attention_damage(reference, gap=0.1))
    with pytest.raises(KVSightError, match="with and without an output metric"):
        damage.merge(d.attention_damage(replace(reference, metric=None)))


x, y = draw(2, 6, 5), draw(2, 7, 5)
p = torch.full((3, 4), 0.25)
eye = torch.eye(5).expand(2, 5, 5)


@pytest.mark.parametrize(
    ("measure", "arguments", "message"),
    [
        (d.storage_mse, (x, y), r"wrong shape of coded vectors: got \(2, 7, 5\); wanted \(2, 6, 5\)"),
        (d.storage_mse, (x[0], x[0]), r"wrong shape of vectors: got \(6, 5\); wanted \[H, T, d\]"),
        (d.storage_mse, (x, NAN), "NaN or .?inf in coded vectors of"),
        (d.relative_error, (NAN, x), r"NaN or inf in vectors of shape \(2, 6, 5\)"),
        (d.angle_error, (x, NAN), "NaN or inf in"),
        (d.logit_mse, (x, x, eye[:1]), r"wrong shape of metric: got \(1, 5, 5\); wanted \(2, 5, 5\)"),
        (d.logit_mse, (x, x, eye * torch.nan), "NaN or .?inf in metric of"),
        (d.paired_logit_mse, (draw(2, 3, 5, 5), x, x), r"wanted \(2, 3, 6, 5\): .* one query for each key"),
        (d.paired_logit_mse, (x, x, x), r"wanted \[H, G, T, d\]"),
        (d.query_metric, (x,), r"wanted \[H, G, n, d\]"),
        (d.query_basis, (eye, 6), "a query basis has 1 to 5 directions; got rank 6"),
        (d.query_basis, (eye, 0), "a query basis has 1 to 5 directions; got rank 0"),
        (d.axis_capture, (eye, 2 * eye), "columns of a basis must be orthonormal; UᵀU is off by 3"),
        (d.axis_capture, (eye, eye[:, :4]), r"wrong shape of basis: got \(2, 4, 5\); wanted \(2, 5, 5\)"),
        (d.axis_capture, (eye, eye[0]), r"wanted \[H, d, r\]"),
        (d.axis_capture, (eye[..., :4], eye), r"wrong shape of metric: got"),
        (d.write_surrogate, (x, x, eye[:1]), r"wrong shape of basis: got \(1, 5, 5\); wanted \(2, 5, 5\)"),
        (d.scores, (x, draw(2, 6, 4)), r"wrong shape of keys: got \(2, 6, 4\); wanted \(2, -1, 5\)"),
        (d.scores, (draw(2, 2, 4, 5), x), r"wanted \(2, 2, -1, 5\), .* Add the group axis with unsqueeze"),
        (d.scores, (x, draw(3, 6, 5)), r"wanted \(2, -1, 5\)"),
        (d.scores, (x, x[0, 0]), r"wrong shape of keys: got \(5,\)"),
        (d.scores, (x, NAN), "NaN or .?inf in keys of"),
        (d.score_error, (p, p[:2]), r"wrong shape of coded scores: got \(2, 4\); wanted \(3, 4\)"),
        (d.score_error, (p, p * torch.nan), "NaN or .?inf in coded scores of"),
        (d.score_error, (p * torch.inf, p), r"NaN or \+inf in scores of shape \(3, 4\)"),
        (d.score_error, (-p * torch.inf, p), "hide different keys"),
        (d.score_mse, (p * torch.inf,), "NaN or .?inf in score errors of"),
        (d.score_mse, (p, p[0] > 0), r"wrong shape of visible: got \(4,\); wanted \(3, 4\)"),
        (d.fisher, (p, p[..., :3]), r"wrong shape of score errors: got \(3, 3\); wanted \(3, 4\)"),
        (d.fisher, (p, p * torch.nan), "NaN or .?inf in score errors of"),
        (d.fisher, (p[..., :0], p[..., :0]), "the last axis must not be 0"),
        (d.attention_kl, (p, p[0]), "wrong shape of coded log probabilities: got"),
        (d.attention_kl, (p * torch.nan, p), "NaN or .?inf in log probabilities of"),
        (d.l1_drift, (p, p[0]), "wrong shape of coded probabilities: got"),
        (d.l1_drift, (p, p * torch.nan), "NaN or .?inf in coded probabilities of"),
        (d.score_gap, (p * torch.nan,), "NaN or .?inf in scores of"),
        (d.route_flips, (p, p[0]), "wrong shape of coded scores: got"),
        (d.route_flips, (p, p * torch.nan), "NaN or .?inf in coded scores of"),
        (d.output_mse, (p, p[0]), "wrong shape of coded outputs: got"),
        (d.output_mse, (p, p * torch.nan), "NaN or .?inf in coded outputs of"),
        (
            d.projected_error,
            (x, x, eye[:1]),
            r"wrong shape of output metric: got \(1, 5, 5\); wanted \(2, 5, 5\)",
        ),
        (
            d.projected_error,
            (x[0], x[0], eye),
            r"wrong shape of outputs: got \(6, 5\); wanted \[..., G, n, d\]",
        ),
        (d.projected_error, (x, x, eye * torch.nan), "NaN or .?inf in output metric of"),
        (d.output_metric, (draw(4, 10), 2, 3), r"\(4, 10\) has no equal columns for 2 KV heads of 3"),
        (d.output_metric, (draw(4, 10), 0, 3), "has no equal columns for 0 KV heads"),
        (d.output_metric, (draw(4), 2, 3), r"wrong shape of output projection: got \(4,\)"),
        (d.value_distortion, (p, x[0], x[0]), r"wrong shape of values: got \(6, 5\); wanted \(4, -1\)"),
        (d.value_distortion, (p, x[0, :4], x[0]), r"wrong shape of coded values: got \(6, 5\)"),
        (d.value_distortion, (p, x[0, :4], NAN[0, :4]), "NaN or .?inf in coded values of"),
        (d.value_distortion, (p * torch.nan, x[0, :4], x[0, :4]), "NaN or .?inf in probabilities of"),
    ],
)
def test_measures_refuse_what_does_not_fit(measure, arguments, message):
    with pytest.raises(KVSightError, match=message):
        measure(*arguments)


def test_every_measure_is_public():
    modules = (d.vectors, d.rows, d.damage, d.jensen)
    defined = {
        name
        for module in modules
        for name, item in vars(module).items()
        if getattr(item, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    assert defined == set(d.__all__)
