"""HeadQ (arXiv 2605.03562, reported withdrawn): a low-rank side code on the keys of another method.

U holds the directions in which a head's queries are largest. What the base codec k̂ leaves of a key is coded
along them, z = Uᵀ(k - k̂), and read back as k̂ + U ẑ; a logit correction qᵀU ẑ is the same number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsight.codec import Codec, Placement, joined
from kvsight.errors import KVSightError
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.packing import MAX_WIDTH, packed_width
from kvsight.quantizers.lloyd_max import RowQuantizer, fitted_stretches, gaussian, row_quantizer, sphere
from kvsight.stats import SideStats, before_rope, shrunk
from kvsight.transforms import linear

SCALES = ("static", "dynamic")
CONTROLS = ("none", "wrong-sign", "random")
# the sphere's codebook needs this many coordinates
_SPHERE = 4


@dataclass(frozen=True)
class SideCode:
    """``rank`` coordinates of ``bits`` bits, and with a ``norm`` one fp16 scale per token."""

    rank: int
    bits: int
    norm: bool

    @property
    def nbytes(self) -> int:
        return packed_width((self.bits,) * self.rank) + (2 if self.norm else 0)

    @property
    def quantizer(self) -> RowQuantizer:
        round_ = self.norm and self.rank >= _SPHERE
        book = (lambda bits: sphere(bits, self.rank)) if round_ else gaussian
        return row_quantizer((self.bits,) * self.rank, book, self.norm)


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest configuration of the base that leaves room for the side code; values have none."""
    code = _side_code(stats.dim, options)
    left = replace(budget, bits=budget.bits - (8 * code.nbytes / stats.dim if side == "k" else 0))
    while True:
        placed = _base(side, stats, left, budget, str(options["base"]))
        if side == "k":
            placed = tuple(_with_side_code(p, stats, code, options) for p in placed)
        spent = [budget.cost(p.codec.format, stats.dim, p.hold) for p in placed for _ in p.heads]
        if sum(spent) / len(spent) <= budget.bits + 1e-9:
            return placed
        # a block of tokens or a sliding window may store more than its rate
        left = replace(left, bits=left.bits - max(1e-3, sum(spent) / len(spent) - budget.bits))


def _side_code(dim: int, options: Mapping[str, Option]) -> SideCode:
    rank, bits, scales = int(options["rank"]), int(options["side_bits"]), str(options["scales"])
    if not 1 <= rank <= dim:
        raise KVSightError(f"headq option 'rank' is 1 to head_dim, here {dim}; got {rank}.")
    if not 1 <= bits <= MAX_WIDTH:
        raise KVSightError(f"headq option 'side_bits' is 1 to {MAX_WIDTH}; got {bits}.")
    for name, known in (("scales", SCALES), ("control", CONTROLS)):
        if options[name] not in known:
            raise KVSightError(
                f"headq option {name!r} is one of {', '.join(known)}; got {options[name]!r}."
            )
    return SideCode(rank, bits, scales == "dynamic")


def _base(side: Side, stats: SideStats, left: Budget, budget: Budget, text: str) -> tuple[Placement, ...]:
    """The base method, named as in ``int axis=channel``, within what the side code leaves."""
    from kvsight.methods import get

    name, *settings = text.split()
    if name == "headq" or not all("=" in setting for setting in settings):
        raise KVSightError(
            f"headq option 'base' is another method and its options ('int axis=channel'); got {text!r}."
        )
    method = get(name)
    own = method.with_defaults(dict(setting.split("=", 1) for setting in settings))
    try:
        placed = method.build(side, stats, left, own)
    except KVSightError as error:
        raise KVSightError(
            f"headq cannot meet {budget.named}: its side code leaves {left.bits:.4g} to its base. {error}"
        ) from None
    return tuple(replace(p, codec=replace(p.codec, name="headq")) for p in placed)


def _with_side_code(
    placement: Placement, stats: SideStats, code: SideCode, options: Mapping[str, Option]
) -> Placement:
    base, heads = placement.codec, list(placement.heads)
    if base.rope is not None:
        stats = before_rope(stats)
    still = replace(base, rope=None)
    axes = basis(stats, code.rank, bool(options["centred"]), options["control"] == "random")[heads]
    z = _residual(still, stats, heads) @ axes
    spread = z.square().mean(1).sqrt()
    # a head that never errs has no scale
    spread = torch.where(spread > 1e-20, spread, torch.ones_like(spread))
    if not code.norm:
        wanted = fitted_stretches(z / spread.unsqueeze(1), gaussian)
        spread = spread * wanted.of((code.bits,) * code.rank, range(len(heads)))
    sign = -1 if options["control"] == "wrong-sign" else 1
    side = linear(axes / spread.unsqueeze(1), sign * spread.unsqueeze(-1) * axes.mT, kept=True)
    sum_ = joined("headq", still, Codec("headq", side, code.quantizer))
    return replace(placement, codec=replace(sum_, rope=base.rope))


def basis(stats: SideStats, rank: int, centred: bool = False, random: bool = False) -> Tensor:
    """U [H, d, r]: the top eigenvectors of E[q qᵀ], or of the queries' covariance; or drawn at random."""
    if random:
        draw = torch.Generator().manual_seed(0)
        shape = (stats.heads, stats.dim, rank)
        drawn: Tensor = torch.linalg.qr(torch.randn(shape, generator=draw, dtype=torch.float64)).Q
        return drawn
    metric = shrunk(stats.metric, stats, 0.0)
    if centred:
        if stats.metric is not None and stats.query is None:
            raise KVSightError("headq option 'centred' needs the mean query, which was not observed.")
        if stats.query is not None:
            mean = stats.query.mean.double()
            metric = metric - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    axes: Tensor = torch.linalg.eigh(metric).eigenvectors
    return axes[..., -rank:].flip(-1)


def _residual(base: Codec, stats: SideStats, heads: list[int]) -> Tensor:
    """What the base leaves of sampled keys, [h, n, d] fp64: neighbours, where blocks are coded."""
    block = base.format.block
    x = (stats.sample if stats.passages is None or block == 1 else stats.passages)[heads]
    x = x.repeat(1, -(-block // x.shape[1]), 1)
    x = x[:, : x.shape[1] // block * block]
    return (x - base.decode(base.encode(x))).double()


METHOD = Method(
    "headq",
    "low-rank side code along the queries' directions, on the keys of another method",
    "HeadQ, arXiv 2605.03562 (reported withdrawn)",
    build,
    {
        "base": "kivi group=64",
        "rank": 4,
        "side_bits": 4,
        "scales": "static",
        "centred": False,
        "control": "none",
    },
    calibrated=True,
)
