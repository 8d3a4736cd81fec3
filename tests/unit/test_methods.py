"""What methods choose under a budget, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

import kvsight
from kvsight.errors import KVSightError
from kvsight.formats import Dense, Grouped, Indexed, Polar, Row
from kvsight.methods.base import Budget
from kvsight.retention import Retention
from kvsight.stats import Moments, SideStats
from kvsight.testing import random_stats

STATS = {dim: random_stats(2, dim, seed=1) for dim in (64, 128)}


def limit(bits, sinks=0, window=0, sliding=None, seen=1024):
    return Budget(bits, seen, Retention(sinks, window, sliding), torch.bfloat16)


def place(name, side, budget, dim=64, **options):
    method = kvsight.method_info(name)
    return method.build(side, STATS[dim], budget, method.with_defaults(options))


def only_format(name, side, bits, dim=64, **options):
    (placement,) = place(name, side, limit(bits), dim, **options)
    assert placement.heads == (0, 1)
    return placement.codec.format


def test_the_registry_is_alphabetical_and_complete():
    assert list(kvsight.methods()) == sorted(kvsight.methods())
    assert {"identity", "int", "kivi", "sight", "turboquant"} <= set(kvsight.methods())


@pytest.mark.parametrize(
    ("asked", "start"),
    [("kiwi", "unknown method 'kiwi'. Did you mean kivi?"), ("xyz", "unknown method 'xyz'. Available: ")],
)
def test_unknown_methods_get_the_nearest_and_the_list(asked, start):
    with pytest.raises(KVSightError) as caught:
        kvsight.method_info(asked)
    assert str(caught.value).startswith(start)
    assert all(name in str(caught.value) for name in kvsight.methods())


@pytest.mark.parametrize(
    ("side", "bits", "dim", "wanted"),
    [
        ("k", 3.0, 64, Grouped(64, 2, 32, "token")),
        ("k", 2.9, 64, Grouped(64, 2, 64, "token")),
        ("k", 3.3, 64, Grouped(64, 3, 128, "token")),
        ("k", 4.0, 128, Grouped(128, 3, 32, "token")),
        ("k", 16.0, 64, Grouped(64, 8, 32, "token")),
        ("v", 3.0, 64, Grouped(64, 2, 32, "channel")),
        ("v", 2.4, 128, Grouped(128, 2, 128, "channel")),
        ("v", 2.5, 64, Grouped(64, 2, 64, "channel")),
    ],
)
def test_kivi_takes_the_dearest_pair_that_fits(side, bits, dim, wanted):
    assert only_format("kivi", side, bits, dim) == wanted


def test_kivi_keeps_to_the_group_asked_for():
    assert only_format("kivi", "k", 3.3, group=16) == Grouped(64, 1, 16, "token")
    assert only_format("kivi", "v", 4.0, group=128) == Grouped(64, 3, 64, "channel")


@pytest.mark.parametrize(
    ("bits", "options", "wanted"),
    [
        (4.5, {}, Grouped(64, 4, 64, "channel")),
        (4.49, {}, Grouped(64, 3, 64, "channel")),
        (5.0, {"group": 32}, Grouped(64, 4, 32, "channel")),
        (4.5, {"axis": "channel"}, Grouped(64, 4, 64, "token")),
        (4.5, {"axis": "channel", "group": "128"}, Grouped(64, 4, 128, "token")),
    ],
)
def test_int_rounds_down_to_whole_bits(bits, options, wanted):
    for side in ("k", "v"):
        assert only_format("int", side, bits, **options) == wanted


def test_turboquant_pays_for_its_norm():
    assert only_format("turboquant", "k", 3.25) == Row((3,) * 64, norm=True)
    assert only_format("turboquant", "k", 3.2) == Row((2,) * 64, norm=True)
    assert only_format("turboquant", "v", 3.125, dim=128) == Row((3,) * 128, norm=True)


def test_turboquant_centres_with_the_mean_of_each_head():
    plain, centred = (place("turboquant", "k", limit(3.25), centre=c)[0].codec for c in (False, "true"))
    assert plain.transform.shift is None
    assert torch.equal(centred.transform.shift, STATS[64].moments.mean)
    assert torch.equal(centred.transform.matrix, plain.transform.matrix)
    assert plain.heads is None
    assert centred.heads == 2


def test_turboquant_rotates_as_asked():
    one, other, hadamard = (
        place("turboquant", "k", limit(3.25), **options)[0].codec.transform.matrix
        for options in ({}, {"seed": 1}, {"rotation": "hadamard"})
    )
    assert not torch.equal(one, other)
    assert torch.allclose(hadamard.abs(), torch.full_like(hadamard, 1 / 8))


@pytest.mark.parametrize(
    ("bits", "options", "wanted"),
    [
        # 256 sampled tokens place 64 centroids
        (4.0, {}, Indexed(64, 1, 4)),
        (3.0, {}, Indexed(64, 2, 6)),
        (1.6, {}, Indexed(64, 4, 6)),
        (0.75, {}, Indexed(64, 8, 6)),
        (1.5, {"centroids": 16}, Indexed(64, 2, 3)),
        (2.0, {"block": 8, "stages": 3, "strided": True}, Indexed(64, 8, 5, 3, strided=True)),
    ],
)
def test_smaq_vq_takes_the_largest_block_of_the_dearest(bits, options, wanted):
    assert only_format("smaq-vq", "k", bits, **options) == wanted


def test_smaq_vq_has_256_centroids_where_text_can_place_them():
    stats = random_stats(2, 64, tokens=1024, seed=1)
    stats = replace(stats, sample=stats.sample.repeat(1, 4, 1))
    method = kvsight.method_info("smaq-vq")
    for bits, form in ((1.0, Indexed(64, 8, 8)), (2.0, Indexed(64, 4, 8))):
        (placement,) = method.build("v", stats, limit(bits), method.with_defaults({}))
        assert placement.codec.format == form


def test_smaq_vq_sees_the_metric_of_each_block():
    codec = place("smaq-vq", "k", limit(0.75), centroids=4, block=8)[0].codec
    metric = STATS[64].metric[1, 8:16, 8:16]
    assert torch.allclose(codec.quantizer.metric[1, 1], (8 * metric / metric.trace()).float(), atol=0.01)
    assert place("smaq-vq", "k", limit(0.75), shape="identity")[0].codec.quantizer.metric is None


def test_smaq_vq_weighs_values_by_gradients_where_asked():
    method = kvsight.method_info("smaq-vq")
    salience = torch.ones(2, 256)
    salience[:, :128] = 0
    stats = replace(STATS[64], salience=salience)
    options = method.with_defaults({"values": "a2", "block": 8, "centroids": 2})
    heard, all_alike = (
        method.build("v", each, limit(1), options)[0].codec.quantizer.centroids
        for each in (stats, replace(STATS[64], salience=torch.ones(2, 256)))
    )
    later = STATS[64].sample[:, 128:, :8].mean(1)
    # two centroids have the mean of what counts between them
    off = heard[:, 0, 0] - later.unsqueeze(1)
    assert bool((off[:, 0] * off[:, 1]).sum(-1).lt(0).all())
    assert not torch.equal(heard, all_alike)
    with pytest.raises(KVSightError, match=r"gradients, which were not read\. Fit with allocate"):
        place("smaq-vq", "v", limit(1), values="a2")


def test_smaq_fold_codes_values_as_turboquant_does():
    (fold,) = place("smaq-fold", "v", limit(3.25), rotation="haar", seed=0)
    (plain,) = place("turboquant", "v", limit(3.25))
    assert fold.codec.format == plain.codec.format == Row((3,) * 64, norm=True)
    assert torch.equal(fold.codec.transform.matrix, plain.codec.transform.matrix)
    assert fold.codec.transform.shift is None


def test_the_papers_fold_widens_levels_and_folds_nothing():
    (paper,) = place("smaq-fold", "k", limit(2.25), shape="paper")
    quantizer, turn = paper.codec.quantizer, paper.codec.transform.matrix
    assert turn.shape[0] == 1
    widest = quantizer.levels.view(2, 64, 4)[..., -1]
    # one codebook per coordinate, whose widths average to the plain codebook's in the square
    assert widest.square().mean(-1).tolist() == pytest.approx([1.5104**2] * 2, rel=1e-3)
    assert float(widest.std()) > 0.01
    assert torch.equal(quantizer.starts, torch.arange(0, 512, 4, dtype=torch.int32).view(2, 64))


def test_smaq_hybrid_is_three_bits_and_two_unless_told_otherwise():
    assert only_format("smaq-hybrid", "k", 8) == Row((3,) * 64, norm=True)
    assert only_format("smaq-hybrid", "v", 8) == Grouped(64, 2, 32, "channel")
    assert only_format("smaq-hybrid", "k", 5.3, key_bits=0) == Row((5,) * 64, norm=True)
    assert only_format("smaq-hybrid", "v", 5.3, value_bits=0) == Grouped(64, 4, 32, "channel")


def test_residual_vq_spends_the_budget_on_stages():
    # 1,024 channel groups place 64 centroids: 12 bits per stage for 64 channels, and a norm
    assert only_format("residual-vq", "k", 2.0) == Indexed(64, 32, 6, 9, strided=True, norm=True)
    assert only_format("residual-vq", "v", 1.0) == Indexed(64, 32, 6, 4, norm=True)
    assert only_format("residual-vq", "v", 8.0, stages=2) == Indexed(64, 32, 6, 2, norm=True)
    assert only_format("residual-vq", "v", 1.0, dim=128, block=50).span == 32
    (placement,) = place("residual-vq", "k", limit(1.0))
    assert placement.codec.quantizer.centroids.shape[:2] == (1, 1)


def test_residual_vq_learns_from_all_heads_and_groups():
    # more vectors than it learns from, and a head and a group unlike the others
    sample = torch.randn(2, 512, 8, generator=torch.Generator().manual_seed(3))
    sample[1, :, 4:] += 3
    stats = SideStats(Moments.zero(2, 8).add(sample), None, sample)
    method = kvsight.method_info("residual-vq")
    options = method.with_defaults({"block": 2, "centroids": 16, "strided": False})
    codec = method.build("k", stats, limit(8), options)[0].codec
    error = (codec.decode(codec.encode(sample)) - sample).square().mean(1).view(2, 4, 2).mean(-1)
    assert float(error.max() / error.min()) < 3


@pytest.mark.parametrize(
    ("bits", "wanted"), [(4.0, (4, 2, 2, 2)), (3.0, (3, 1, 1, 1)), (16.0, (8, 6, 6, 6))]
)
def test_polarquant_gives_the_first_level_two_bits_more(bits, wanted):
    assert only_format("polarquant", "k", bits) == Polar(64, wanted)


def test_polarquant_takes_the_largest_block_that_tiles_the_head():
    method = kvsight.method_info("polarquant")
    for dim, levels in ((80, 4), (24, 3), (6, 1)):
        (placed,) = method.build("v", random_stats(1, dim), limit(16), method.with_defaults({}))
        assert len(placed.codec.format.widths) == levels
    with pytest.raises(
        KVSightError, match="polarquant pairs coordinates and needs an even head_dim; got 5"
    ):
        method.build("v", random_stats(1, 5), limit(16), method.with_defaults({}))


@pytest.mark.parametrize("bits", [0.2, 1.0, 2.37, 3.0, 7.9, 8.0, 12.0])
def test_sight_spends_whole_bytes_and_no_more(bits):
    placements = place("sight", "k", limit(bits))
    total = sum(len(p.heads) * p.codec.format.row_bytes for p in placements)
    assert total == min(int(bits * 2 * 64 / 8), 2 * 64)
    for placement in placements:
        # rows are filled to the last bit
        assert sum(placement.codec.format.widths) == 8 * placement.codec.format.row_bytes
        assert placement.codec.format.fields == (placement.codec.format.fields[0],)


def test_sight_without_a_metric_sees_storage_error():
    seen, blind = (place("sight", "k", limit(3.0), metric=m)[0].codec for m in ("attention", "storage"))
    basis = blind.transform.inverse_matrix[0]
    basis = basis / basis.norm(dim=-1, keepdim=True)
    assert torch.allclose(basis @ basis.T, torch.eye(64, dtype=torch.float64), atol=1e-6)
    other = seen.transform.inverse_matrix[0]
    other = other / other.norm(dim=-1, keepdim=True)
    assert not torch.allclose(other @ other.T, torch.eye(64, dtype=torch.float64), atol=1e-2)


def test_exact_tokens_are_paid_from_the_budget():
    # 4 + 28 of 1,024 tokens at 16 bits leave (3·1024 - 32·16) / 992 = 2.58 bits for the others
    rich = limit(3.0, sinks=4, window=28)
    assert rich.coded_bits() == (3 * 1024 - 32 * 16) / 992
    placements = place("sight", "k", rich)
    total = sum(len(p.heads) * p.codec.format.row_bytes for p in placements)
    assert total == int(rich.coded_bits() * 2 * 64 / 8)
    spent = sum(len(p.heads) * rich.cost(p.codec.format) for p in placements) / 2
    assert 2.9 < spent <= 3.0


def test_waiting_tokens_count_at_the_reference_length():
    # 1,000 tokens in blocks of 128: 896 are coded, 104 wait at 16 bits
    form = Grouped(64, 2, 128, "token")
    assert limit(16, seen=1000).cost(form) == pytest.approx((896 * 2.25 + 104 * 16) / 1000)
    assert limit(16, seen=100).cost(form) == 16
    assert limit(16).cost(form) == 2.25


def test_sliding_layers_count_per_visible_token():
    # the next query sees 255 tokens; blocks of 32 hold up to 31 more
    form = Grouped(64, 2, 32, "token")
    kept = Retention(0, 0, 256).stored(1024, 32)
    assert (kept.coded, kept.tail, kept.visible) == (256, 0, 255)
    assert limit(16, sliding=256).cost(form) == pytest.approx(3.0 * 256 / 255)


def test_a_window_of_everything_leaves_nothing_to_code():
    assert limit(16, window=2000).cost(Row((1,) * 64)) == 16
    assert limit(16, window=2000).coded_bits() == 16


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("identity", 15.9, "identity cannot meet 15.9 bits: it copies the model's own 16-bit numbers"),
        ("int", 1.4, "int cannot meet 1.4 bits; its cheapest configuration here stores 1.5"),
        ("kivi", 1.2, "kivi cannot meet 1.2 bits; its cheapest configuration here stores 1.25"),
        ("turboquant", 1.2, "turboquant cannot meet 1.2 bits; its cheapest configuration here stores 1.25"),
        (
            "smaq-hybrid",
            3.2,
            "smaq-hybrid cannot meet 3.2 bits; its cheapest configuration here stores 3.25",
        ),
        ("polarquant", 2.9, "polarquant cannot meet 2.9 bits; its cheapest configuration here stores 3"),
        ("sight", 0.12, "sight cannot meet 0.12 bits; its smallest row stores 0.125"),
    ],
)
def test_budgets_below_the_cheapest_say_what_it_is(name, bits, message):
    with pytest.raises(KVSightError) as caught:
        place(name, "k", limit(bits))
    assert str(caught.value).startswith(message)


def test_a_budget_that_exact_tokens_use_up_says_so():
    with pytest.raises(KVSightError, match="keep fewer tokens exact"):
        place("sight", "k", limit(3.0, window=200))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int", {"axis": "row"}, "int option 'axis' is 'token' or 'channel'; got 'row'"),
        (
            "smaq-vq",
            {"shape": "cubic"},
            "'shape' is one of identity, raw, power, log1p, geometric; got 'cubic'",
        ),
        ("smaq-fold", {"shape": "cubic"}, "power, log1p, geometric, paper; got 'cubic'"),
        ("smaq-vq", {"strength": -1}, "'strength' is above 0, or 0 for the default; got -1"),
        ("smaq-vq", {"values": "a3"}, "'values' is one of identity, output, a2; got 'a3'"),
        ("smaq-vq", {"centroids": 100}, "'centroids' is a power of two from 2 to 65536; got 100"),
        ("smaq-vq", {"block": 7}, "a block that divides head_dim 64 .* got block=7, stages=1"),
        ("smaq-hybrid", {"key_bits": 9}, "'key_bits' is 1 to 8, or 0 for the budget's; got 9"),
        ("residual-vq", {"stages": 17}, "1 to 16 stages .* got block=32, stages=17"),
        ("polarquant", {"block": 12}, "'block' is a power of two from 2; got 12"),
        ("turboquant", {"rotation": "none"}, "'rotation' is 'haar' or 'hadamard'; got 'none'"),
        ("sight", {"codebook": "ternary"}, "'codebook' is one of gaussian, uniform, fitted; got 'ternary'"),
        ("sight", {"metric": "maybe"}, "'metric' is one of output, attention, storage; got 'maybe'"),
        ("sight", {"metric": False}, "'metric' is one of output, attention, storage; got 'False'"),
        ("sight", {"scales": "loose"}, "'scales' is one of fitted, static; got 'loose'"),
        ("turboquant", {"centre": "maybe"}, r"'centre' takes bool \(default False\); got 'maybe'"),
        ("sight", {"shrink": "nan"}, "'shrink' is a share from 0 to 1; got nan"),
        ("sight", {"shrink": -0.1}, "'shrink' is a share from 0 to 1; got -0.1"),
        ("kivi", {"group": "wide"}, r"'group' takes int \(default 0\); got 'wide'"),
        ("kivi", {"grup": 32}, "kivi has no option 'grup'; its options: group=0"),
        ("identity", {"group": 32}, "identity has no option 'group'; its options: none"),
    ],
)
def test_misfitting_options_are_refused(name, options, message):
    with pytest.raises(KVSightError, match=message):
        place(name, "k", limit(16), **options)


def test_identity_at_the_highest_budget_still_copies():
    budget = Budget(16, 1024, Retention(0, 0), torch.float32)
    (placement,) = place("identity", "k", budget)
    assert placement.codec.format == Dense(placement.codec.format.dim, torch.float32)
    assert budget.cost(placement.codec.format) == 32


def test_identity_keeps_the_type_of_exact_tokens():
    (placement,) = place("identity", "v", Budget(32, 1024, Retention(0, 0), torch.float32))
    assert placement.codec.format == Dense(64, torch.float32)
