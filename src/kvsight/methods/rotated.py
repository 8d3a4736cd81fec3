"""What TurboQuant and its relatives are made of: codecs of some channels, and how they are put together.

Random rotations and sphere codebooks (TurboQuant, arXiv 2504.19874), signs of sketches (QJL, arXiv
2406.03482), and a share of channels that gets codes of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from kvsight.codec import Codec, Placement, joined
from kvsight.errors import KVSightError
from kvsight.formats import Format, Joined, Row, Sketch
from kvsight.methods.base import Budget, Option, all_heads
from kvsight.packing import MAX_WIDTH
from kvsight.quantizers.lloyd_max import row_quantizer, sphere
from kvsight.quantizers.sketch import SketchQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import Transform, centre, haar, hadamard, linear, sketch, subspace


@dataclass(frozen=True)
class Scheme:
    """How some channels are coded: their number and the bits of each to a format, and to a codec of it."""

    form: Callable[[int, int], Format]
    make: Callable[[int, int], Codec]


def mse_form(dim: int, bits: int) -> Format:
    """What ``mse`` stores."""
    return Row((bits,) * dim, norm=True)


def product_form(dim: int, bits: int) -> Format:
    """What ``product`` stores."""
    return Sketch(dim) if bits == 1 else Joined((mse_form(dim, bits - 1), Sketch(dim)))


def rotation(method: str, name: str, dim: int, seed: int) -> Transform:
    """The rotation of that name: haar, or hadamard behind random signs."""
    match name:
        case "haar":
            return haar(dim, seed)
        case "hadamard":
            return hadamard(dim, seed)
    raise KVSightError(f"{method} option 'rotation' is 'haar' or 'hadamard'; got {name!r}.")


def mse(dim: int, bits: int, turn: Transform, unshrink: bool = False) -> Codec:
    """TurboQuant, Alg. 1: norm, rotation, Lloyd-Max codebook of the sphere.

    Codes of D mean squared error point 1 - D along the vector: E⟨x, x̂⟩ = (1 - D)‖x‖². ``unshrink``
    divides by that, which makes scores unbiased.
    """
    book = sphere(bits, dim)
    if unshrink:
        eye = torch.eye(dim, dtype=torch.float64).unsqueeze(0)
        matrix, inverse = (eye if m is None else m for m in (turn.matrix, turn.inverse_matrix))
        turn = linear(matrix, inverse / (1 - book.distortion), kept=True)
    return Codec("", turn, row_quantizer((bits,) * dim, lambda width: sphere(width, dim), norm=True))


def signs(dim: int, count: int, kind: str, seed: int) -> Codec:
    """QJL: ``count`` signs of a sketch, and the norm."""
    projections = sketch(dim, count, kind, seed)
    assert projections.matrix is not None
    # as a plan will hold it
    return Codec("", projections, SketchQuantizer.of(projections.matrix.float()))


def product(dim: int, bits: int, turn: Transform, kind: str, seed: int) -> Codec:
    """TurboQuant, Alg. 2: codes of ``bits`` - 1 bits, then signs of what they left and its norm."""
    # the sketch must not repeat the rotation's draws
    residual = signs(dim, dim, kind, seed + 1)
    return residual if bits == 1 else joined("", mse(dim, bits - 1, turn), residual)


def on_channels(codec: Codec, index: torch.Tensor, dim: int) -> Codec:
    """A codec of k channels as one of some channels [H, k] of ``dim``; its quantizer sees what it saw."""
    assert codec.transform.matrix is not None
    columns = torch.nn.functional.one_hot(index, dim).mT.to(codec.transform.matrix)
    return replace(codec, transform=subspace(columns.contiguous()).then(codec.transform))


def loudest(stats: SideStats, count: int, centred: bool, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` channels of the largest mean square of each head, and the others, [H, ...] in order."""
    if not 0 < count < stats.dim:
        raise KVSightError(f"{method} option 'outliers' is less than head_dim {stats.dim}; got {count}.")
    spread = stats.moments.covariance if centred else stats.moments.second
    order = spread.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort().values, order[:, count:].sort().values


def place(
    name: str, stats: SideStats, budget: Budget, options: Mapping[str, Option], scheme: Scheme
) -> tuple[Placement, ...]:
    """The dearest affordable bits per coordinate, one more for each of the option's ``outliers``."""
    outliers, centred = int(options.get("outliers", 0)), bool(options.get("centre", False))
    dim = stats.dim
    if outliers:
        loud, quiet = loudest(stats, outliers, centred, name)
        rest = dim - outliers
        forms: dict[Format, int] = {
            Joined((scheme.form(outliers, bits + 1), scheme.form(rest, bits))): bits
            for bits in range(MAX_WIDTH - 1, 0, -1)
        }
        bits = forms[budget.best(list(forms), name, dim)]
        first = on_channels(scheme.make(outliers, bits + 1), loud, dim)
        codec = joined(name, first, on_channels(scheme.make(rest, bits), quiet, dim))
    else:
        forms = {scheme.form(dim, bits): bits for bits in range(MAX_WIDTH, 0, -1)}
        codec = scheme.make(dim, forms[budget.best(list(forms), name, dim)])
    return finished(name, stats, codec, centred)


def finished(name: str, stats: SideStats, codec: Codec, centred: bool) -> tuple[Placement, ...]:
    """The codec for every head of the layer, behind subtracting the mean where asked for."""
    transform = centre(stats.moments.mean).then(codec.transform) if centred else codec.transform
    return all_heads(name, stats, transform, codec.quantizer)
