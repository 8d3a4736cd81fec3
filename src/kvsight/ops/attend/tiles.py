"""What the tile kernel wants of a layer's codecs: scales, levels and transforms folded into two matrices.

Decoding is affine in the codes, so one matrix turns a query into the factor of every coordinate's codes,
and another turns weighted sums of codes into the output. Levels must be evenly spaced and widths equal
within chunks. Maths: src/kvsight/ops/attend/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Row
from kvsight.ops.attend.ref import Coded
from kvsight.tiling import CHUNK, WIDTHS, Rows, Tiling

_EVEN = 1e-4
_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class FoldedTiles:
    """One side of a layer; the same for every token and step.

    Codes c [stored] of head h decode to c @ matrix[h] + shift[h]: [H, d, d], where rows behind the stored
    coordinates are zero, and [H, d].
    """

    tilings: tuple[Tiling, ...]
    matrix: Tensor
    shift: Tensor

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """``matrix`` and ``shift``, as operators take them."""
        return self.matrix, self.shift

    @property
    def middle(self) -> Tensor:
        """What codes in the middle of their ranges decode to: [H, d], fp32."""
        at = torch.stack([middles(tiling, self.matrix.shape[1]) for tiling in self.tilings])
        moved = at.to(self.matrix.device).unsqueeze(1) @ self.matrix.double()
        return (self.shift.double() + moved.squeeze(1)).float()

    @property
    def blocks(self) -> int:
        """The most blocks of any head, rounded up so that few kernels serve all layers."""
        return most_blocks(self.tilings)


def middles(tiling: Tiling, columns: int) -> Tensor:
    """The middle of every coordinate's codes [columns], fp64; zero for those without bits."""
    widths = [width for width in tiling.widths if width for _ in range(CHUNK)]
    found = [(2**width - 1) / 2 for width in widths]
    return torch.tensor(found + [0.0] * (columns - len(found)), dtype=torch.float64)


def tileable(coded: Coded) -> bool:
    """Whether these heads can be held in tiles: chunks of one width, even levels, no norms."""
    form, inverse = coded.packed.format, coded.folded.inverse
    if coded.rope is not None or not isinstance(form, Row):
        return False
    if inverse is not None and inverse.shape[-1] != form.dim:
        return False
    return tiled_widths(form) is not None and steps(coded) is not None


def tiled_widths(form: Row) -> tuple[int, ...] | None:
    """One width per chunk, or None where a chunk has several or a head_dim is no whole number of chunks."""
    if form.norm or form.dim % CHUNK:
        return None
    chunks = [form.widths[i : i + CHUNK] for i in range(0, form.dim, CHUNK)]
    if any(len(set(chunk)) > 1 or chunk[0] not in WIDTHS for chunk in chunks):
        return None
    return tuple(chunk[0] for chunk in chunks)


def most_blocks(tilings: Sequence[Tiling]) -> int:
    """The most blocks of any head, rounded up so that few kernels serve all layers."""
    most = max(1, *(len(tiling.blocks) for tiling in tilings))
    return -(-most // _BLOCKS) * _BLOCKS


def fold(coded: Sequence[Coded], rows: Rows) -> FoldedTiles:
    """Fold the codecs of all heads of one side; ``rows`` are "tokens" for keys.

    Raises ``KVSightError`` for heads that are not ``tileable``.
    """
    heads = {head: (part, i) for part in coded for i, head in enumerate(part.heads)}
    tilings = {id(part): tiling_of(part, rows) for part in coded}
    order = tuple(tilings[id(heads[head][0])] for head in sorted(heads))
    matrices, shifts = zip(*(_fold_head(*heads[head]) for head in sorted(heads)), strict=True)
    return FoldedTiles(order, torch.stack(matrices), torch.stack(shifts))


def tiling_of(coded: Coded, rows: Rows) -> Tiling:
    """How tiles of these heads lie; raises ``KVSightError`` for heads that are not ``tileable``."""
    form = coded.packed.format
    widths = tiled_widths(form) if isinstance(form, Row) else None
    if widths is None or steps(coded) is None:
        raise KVSightError(
            f"{form.name} cannot be held in tiles: they want evenly spaced levels and chunks of {CHUNK} "
            "coordinates of one width. Fit with the option layout=tiles."
        )
    return Tiling(widths, rows)


def steps(coded: Coded) -> tuple[Tensor, Tensor] | None:
    """Lowest level and step of every stored coordinate [H or 1, stored], fp64; None for uneven levels."""
    levels, starts = (t.double() for t in coded.tables)
    stored = [w for w in coded.packed.format.widths if w]  # type: ignore[attr-defined]
    # a head without bits has none
    widths = torch.tensor(stored, dtype=torch.long, device=levels.device)
    first = levels[starts.long()]
    span = 2**widths - 1
    step = (levels[starts.long() + span] - first) / span
    most = int(span.max()) if len(span) else 0
    # every code of every coordinate at once, [codes, 1, stored]
    codes = torch.arange(1, max(1, most), device=span.device).view(-1, 1, 1).minimum(span)
    apart = (levels[starts.long() + codes] - (first + step * codes)).abs()
    return None if bool((apart > _EVEN * step).any()) else (first, step)


def _fold_head(coded: Coded, head: int) -> tuple[Tensor, Tensor]:
    """(d x d, d) of one head, fp32."""
    found = steps(coded)
    assert found is not None
    first, step = (t[min(head, len(t) - 1)] for t in found)
    dim, stored = coded.packed.format.dim, len(step)
    inverse = torch.eye(dim, device=first.device, dtype=torch.float64)[:stored]
    if coded.folded.inverse is not None:
        inverse = coded.folded.inverse[min(head, len(coded.folded.inverse) - 1)].to(first)
    shift = first @ inverse
    if coded.folded.shift is not None:
        shift = shift + coded.folded.shift[min(head, len(coded.folded.shift) - 1)].to(first)
    matrix = first.new_zeros(dim, dim)
    matrix[:stored] = step.unsqueeze(-1) * inverse
    return matrix.float(), shift.float()
