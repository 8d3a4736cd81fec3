"""What methods choose under a budget, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

import kvsight
from kvsight.errors import KVSightError
from kvsight.formats import (
    Dense,
    Grouped,
    Indexed,
    Joined,
    Patched,
    Polar,
    Row,
    Sketch,
    Symmetric,
    Ternary,
    Tiered,
)
from kvsight.methods.base import Budget
from kvsight.retention import Hold, Retention
from kvsight.stats import Moments, SideStats, expected_mass
from kvsight.testing import random_stats

pytestmark = pytest.mark.usefixtures("stretched_once")
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


def test_kivi_with_a_residual_holds_what_the_paper_holds():
    (keys,) = place("kivi", "k", limit(16), group=32, residual=128)
    (values,) = place("kivi", "v", limit(16), group=32, residual=128)
    assert (keys.codec.format, keys.hold) == (Grouped(64, 8, 32, "token"), Hold(commit=128))
    assert (values.codec.format, values.hold) == (Grouped(64, 8, 32, "channel"), Hold(window=128))
    # 32 exact values of 1,024: 0.5 bits, and 31/32 of 3 bits
    rich = limit(3.41)
    (values,) = place("kivi", "v", rich, residual=32)
    assert values.codec.format == Grouped(64, 2, 32, "channel")
    assert rich.cost(values.codec.format, hold=values.hold) == 16 / 32 + 3 * 31 / 32
    # keys have none at 1,024 tokens, and 24 at 1,000
    (keys,) = place("kivi", "k", rich, residual=32)
    assert rich.cost(keys.codec.format, hold=keys.hold) == 3
    waiting = limit(4, seen=1000).cost(Grouped(64, 2, 32, "token"), hold=Hold(commit=128))
    assert waiting == pytest.approx((896 * 3 + 104 * 16) / 1000)


@pytest.mark.parametrize(
    ("name", "side", "bits", "options", "wanted"),
    [
        ("k4v2", "k", 5.0, {}, Grouped(64, 4, 32, "channel")),
        ("k4v2", "v", 2.9, {}, Grouped(64, 2, 64, "channel")),
        ("k4v2", "k", 4.3, {"axis": "mixed"}, Grouped(64, 4, 128, "token")),
        ("k4v2", "v", 3.0, {"axis": "mixed"}, Grouped(64, 2, 32, "channel")),
        ("k3v8", "v", 16, {"axis": "channel", "group": 64}, Grouped(64, 8, 64, "token")),
        ("k8v1.58", "v", 2.7, {}, Ternary(64, 32, "channel")),
        ("k1.58v1.58", "k", 2.0, {"axis": "channel"}, Ternary(64, 128, "token")),
        ("qwc", "k", 2.4, {}, Ternary(64, 64, "channel")),
        ("qwc", "v", 6.4, {}, Grouped(64, 4, 64, "channel")),
        ("quarot", "k", 4.5, {}, Grouped(64, 4, 64, "channel")),
        ("quarot", "k", 4.25, {"symmetric": True}, Symmetric(64, 4, 64, "channel")),
        ("gear", "k", 5.0, {"rank": 4}, Patched(Grouped(64, 2, 128, "token"), 128, 2, 4)),
        ("gear", "v", 16, {"sparse": 0.05, "span": 32}, Patched(Grouped(64, 8, 64, "channel"), 32, 4, 2)),
        ("zipcache", "k", 16, {"salient": 0.6, "tiers": "4,2"}, Tiered(64, 128, (4, 2), 410, "token")),
        ("zipcache", "v", 2.0, {"span": 64}, Tiered(64, 64, (2, 1), 72, "channel", scaled=True)),
        ("a2", "v", 3.6, {}, Tiered(64, 64, (5, 3, 2), 192, "channel")),
        ("a2", "k", 3.3, {}, Grouped(64, 3, 128, "token")),
    ],
)
def test_integer_methods_take_the_dearest_that_fits(name, side, bits, options, wanted):
    assert only_format(name, side, bits, **options) == wanted


def test_a_pair_keeps_one_budget_on_average():
    """K4V2 of groups of 64 stores 4.5 and 2.5: 3.5 together, as many as one budget of 3.5 allows."""
    shared = replace(limit(3.5), total=3.5)
    (keys,), (values,) = (place("k4v2", side, shared) for side in ("k", "v"))
    assert (keys.codec.format.group, values.codec.format.group) == (64, 64)
    with pytest.raises(
        KVSightError, match=r"k4v2 cannot meet 3.4 bits; its cheapest .* stores 3.5 over keys"
    ):
        place("k4v2", "v", replace(limit(3.4), total=3.4))
    with pytest.raises(KVSightError, match=r"k4v2 cannot meet 3.5 bits; its cheapest .* stores 4.5"):
        place("k4v2", "k", limit(3.5))


def test_a_residual_of_a_pair_is_coded_when_it_is_full():
    (keys,) = place("k4v2", "k", limit(16), residual=64)
    assert (keys.block, keys.hold) == (64, Hold(commit=64))
    with pytest.raises(KVSightError, match=r"'residual' is 0 or a multiple of the group \(128\) .* got 64"):
        place("k4v2", "k", limit(16), residual=64, axis="channel", group=128)


def test_any_pair_has_a_name():
    for name in ("k1v8", "k3v2", "k1.58v4"):
        assert kvsight.method_info(name).name == name
    for name in ("k9v2", "k0v2", "k4v2.5", "k4", "4v2", "k4v22"):
        with pytest.raises(KVSightError, match="unknown method"):
            kvsight.method_info(name)


def test_tokens_weigh_what_calibration_saw():
    stats = STATS[64]
    size = stats.sample.double().square().mean(-1).log()

    def log_weights(side, saliency, stats=stats):
        method = kvsight.method_info("zipcache")
        options = method.with_defaults({"saliency": saliency})
        (placed,) = method.build(side, stats, limit(4), options)
        return placed.codec.quantizer.log_weights(stats.sample)

    # the squared attention that Gaussian queries would pay; for values a guess at it, times their square
    drawn, mass = log_weights("k", "attention"), expected_mass(stats.sample, stats.query)
    assert torch.allclose(drawn, 2 * mass, rtol=1e-3, atol=1e-3 * float(mass.abs().max()))
    guess = log_weights("v", "attention") - size
    # squared gradients, as far as they are linear in the vector
    slope = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    salience = (stats.sample.double() @ slope).squeeze(-1)
    seen = replace(stats, salience=salience.exp())
    felt = log_weights("k", "gradient", seen)
    for head in range(2):
        assert float(torch.corrcoef(torch.stack([guess[head], mass[head]]))[0, 1]) > 0.7
        assert float(torch.corrcoef(torch.stack([felt[head], salience[head]]))[0, 1]) > 0.95
        assert float(felt[head].std() / salience[head].std()) == pytest.approx(2, rel=0.15)
    assert torch.allclose(log_weights("v", "norm"), size, atol=1e-4)
    # what was not seen gives way to the next
    assert torch.equal(log_weights("k", "gradient"), drawn)
    blind = replace(stats, query=None, mass=None)
    assert torch.equal(log_weights("k", "gradient", blind), log_weights("k", "norm"))


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


@pytest.mark.parametrize(("bits", "width"), [(2.49, 1), (2.75, 2), (3.75, 3), (16, 7)])
def test_outlier_channels_get_a_bit_more_and_a_norm_of_their_own(bits, width):
    # (16 · (b + 1) + 48 · b + 2 · 16) / 64 = b + 0.75
    quarter = only_format("turboquant", "k", bits, outliers=16)
    assert quarter == Joined((Row((width + 1,) * 16, True), Row((width,) * 48, True)))
    (placement,) = place("turboquant", "k", limit(bits), outliers=16)
    loud = placement.codec.transform.matrix[..., :16].abs().sum(-1) > 0
    variance = random_stats(2, 64, seed=1).moments.second.diagonal(dim1=-2, dim2=-1)
    least = variance.masked_fill(~loud, torch.inf).amin(-1)
    assert (loud.sum(-1) == 16).all()
    assert (least >= variance.masked_fill(loud, 0).amax(-1)).all()


def test_the_product_form_spends_its_last_bit_on_signs():
    assert only_format("turboquant-prod", "v", 3.5) == Joined((Row((2,) * 64, True), Sketch(64)))
    assert only_format("turboquant-prod", "v", 1.25) == Sketch(64)
    parts = only_format("turboquant-prod", "k", 4.25, outliers=16).parts
    assert parts == (
        Joined((Row((3,) * 16, True), Sketch(16))),
        Joined((Row((2,) * 48, True), Sketch(48))),
    )


def test_schemes_sketch_the_sides_of_their_names():
    sketched = Joined((Row((2,) * 64, True), Sketch(64)))
    plain = Row((3,) * 64, True)
    for name, key, value in (("kv", plain, plain), ("kqv", plain, sketched), ("qkqv", sketched, sketched)):
        assert (only_format(name, "k", 3.5), only_format(name, "v", 3.5)) == (key, value)
    assert place("kv", "k", limit(3.5))[0].codec.transform.matrix is None
    assert place("kv", "k", limit(3.5), rotation="hadamard")[0].codec.transform.matrix is not None


def test_qjl_sketches_keys_and_rounds_values_per_token():
    assert only_format("qjl", "v", 3.0) == Grouped(64, 2, 32, "channel")
    assert only_format("qjl", "k", 3.25, outliers=0) == Sketch(192)
    # half as many signs for 8 loud channels as for 56 others, and two norms
    assert only_format("qjl", "k", 3.25) == Joined((Sketch(56), Sketch(120)))
    assert only_format("qjl", "k", 4.0, dim=128) == Joined((Sketch(152), Sketch(312)))


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
            "turboquant-prod",
            1.2,
            "turboquant-prod cannot meet 1.2 bits; its cheapest configuration here st",
        ),
        ("qjl", 1.7, "qjl cannot meet 1.7 bits; its cheapest configuration here stores 1.75"),
        ("quarot", 1.4, "quarot cannot meet 1.4 bits; its cheapest configuration here stores 1.5"),
        ("gear", 2.3, "gear cannot meet 2.3 bits; its cheapest configuration here stores 2.35"),
        ("zipcache", 1.6, "zipcache cannot meet 1.6 bits; its cheapest configuration here stores 1.6"),
        ("qwc", 1.4, "qwc cannot meet 1.4 bits; its cheapest configuration here stores 1.5"),
        (
            "smaq-hybrid",
            3.2,
            "smaq-hybrid cannot meet 3.2 bits; its cheapest configuration here stores 3.25",
        ),
        ("polarquant", 2.9, "polarquant cannot meet 2.9 bits; its cheapest configuration here stores 3"),
        ("sight", 0.12, "sight cannot meet 0.12 bits; its smallest row stores 0.125"),
        (
            "headq",
            1.3,
            "headq cannot meet 1.3 bits: its side code leaves 1.05 to its base. kivi cannot meet",
        ),
        ("kvquant", 1.3, "kvquant cannot meet 1.3 bits; its cheapest configuration here stores 1.375"),
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
        ("turboquant", {"outliers": 64}, "'outliers' is less than head_dim 64; got 64"),
        ("turboquant", {"outliers": 2}, "sphere codebook needs a head_dim of at least 4; got 2"),
        ("turboquant-prod", {"sketch": "sparse"}, "a sketch is 'orthogonal' or 'gaussian'; got 'sparse'"),
        ("kqv", {"rotation": "x"}, "kqv option 'rotation' is 'haar' or 'hadamard'; got 'x'"),
        ("sight", {"codebook": "ternary"}, "'codebook' is one of gaussian, uniform, fitted; got 'ternary'"),
        ("sight", {"metric": "maybe"}, "'metric' is one of output, attention, storage; got 'maybe'"),
        ("sight", {"metric": False}, "'metric' is one of output, attention, storage; got 'False'"),
        ("sight", {"scales": "loose"}, "'scales' is one of fitted, static; got 'loose'"),
        ("turboquant", {"centre": "maybe"}, r"'centre' takes bool \(default False\); got 'maybe'"),
        ("sight", {"shrink": "nan"}, "'shrink' is a share from 0 to 1; got nan"),
        ("sight", {"shrink": -0.1}, "'shrink' is a share from 0 to 1; got -0.1"),
        ("headq", {"base": "headq"}, "'base' is another method and its options .* got 'headq'"),
        ("headq", {"base": "kivi 64"}, "'base' is another method and its options .* got 'kivi 64'"),
        ("headq", {"base": "kiwi"}, "unknown method 'kiwi'. Did you mean kivi?"),
        ("headq", {"base": "int axes=x"}, "int has no option 'axes'"),
        ("headq", {"rank": 65}, "'rank' is 1 to head_dim, here 64; got 65"),
        ("headq", {"side_bits": 9}, "'side_bits' is 1 to 8; got 9"),
        ("headq", {"scales": "loose"}, "'scales' is one of static, dynamic; got 'loose'"),
        ("headq", {"control": "placebo"}, "'control' is one of none, wrong-sign, random; got 'placebo'"),
        ("kivi", {"group": "wide"}, r"'group' takes int \(default 0\); got 'wide'"),
        ("kivi", {"grup": 32}, "kivi has no option 'grup'; its options: group=0"),
        ("kivi", {"residual": 48}, "'residual' is 0, or a multiple of the group .* got 48 with group 0"),
        ("kivi", {"residual": -32}, "'residual' is 0, or a multiple of the group .* got -32 with group 0"),
        ("k4v2", {"axis": "row"}, "qwc option 'axis' is 'token', 'channel' or 'mixed'; got 'row'"),
        ("quarot", {"clip": 1.1}, "'clip' is a share of the range, above 0 and up to 1; got 1.1"),
        ("gear", {"sparse": 0.6}, "'sparse' from 0 to 0.5 and 'rank' from 0 to head_dim 64; got 0.6 and 2"),
        ("gear", {"span": 200}, "blocks of 200 tokens do not hold whole groups of 128"),
        ("gear", {"span": 0}, "group 0 does not fit"),
        ("zipcache", {"tiers": "4"}, "'tiers' is any, or two widths as in 4,2; got '4'"),
        ("zipcache", {"salient": 1.0}, "'salient' from 0 to 1; got 128 and 1"),
        (
            "zipcache",
            {"saliency": "age"},
            "'saliency' is one of gradient, attention, norm, random; got 'age'",
        ),
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
