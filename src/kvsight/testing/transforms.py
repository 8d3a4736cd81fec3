"""Laws of transforms."""

import math

import torch
from torch import Tensor

from kvsight.testing.laws import generator, hold
from kvsight.transforms import Transform, haar, identity


def check_transform(transform: Transform, *, heads: int = 3, seed: int = 0) -> None:
    """Dual, inverse, offset and head subsets, to the rounding of the transform's own numbers.

    A map that drops directions is held to give back what it kept; one whose inverse is a map of its own,
    to its dual alone. ``heads`` counts for transforms that all heads share.
    """
    tensors = [t for t in (transform.shift, transform.matrix) if t is not None]
    heads = max([heads if t.shape[0] == 1 else t.shape[0] for t in tensors], default=heads)
    draw = generator(seed)
    q, k = torch.randn(2, 2, heads, 7, transform.dim, generator=draw, dtype=torch.float64)
    _affine_laws(transform, q, k)
    _affine_laws(transform.stored(), q, k)
    before, behind = haar(transform.dim, seed), haar(transform.coordinates, seed)
    for first, after in ((transform, behind), (before, transform)):
        both = first.then(after)
        _affine_laws(both, q, k)
        gap = float((both.forward(k) - after.forward(first.forward(k))).abs().max())
        hold("composition", gap <= _rounding(both, q, k), f"then is {gap:.3g} off one after the other")
    unchanged = transform.then(identity(transform.coordinates))
    same = torch.equal(unchanged.forward(k), transform.forward(k))
    hold("identity", same, "then(identity) is another map")
    for index in ([0], [heads - 1, 0]):
        chosen = transform.heads(index)
        pairs = ((chosen.forward, transform.forward, k), (chosen.dual, transform.dual, q))
        same = all(torch.allclose(part(x[:, index]), whole(x)[:, index]) for part, whole, x in pairs)
        hold("head subset", same, f"heads {index} alone map otherwise than among all")


def _affine_laws(transform: Transform, q: Tensor, k: Tensor) -> None:
    tolerance = _rounding(transform, q, k)
    y = transform.forward(k)
    hold("shape", y.shape[-1] == transform.coordinates, f"{y.shape[-1]} coordinates")
    # what the map has of k: all of it, unless it drops directions or has an inverse of its own
    lossless = transform.coordinates == transform.dim and not transform.kept
    seen = k if lossless else transform.inverse(y)
    scores = transform.dual(q) @ y.mT + transform.offset(q)
    gap = float((scores - q @ seen.mT).abs().max())
    hold("dual", gap <= tolerance, f"<dual(q), forward(k)> + offset(q) is {gap:.3g} off <q, k>")
    if not transform.kept:
        gap = float((transform.inverse(transform.forward(seen)) - seen).abs().max())
        hold("inverse", gap <= tolerance, f"inverse(forward(k)) is {gap:.3g} off k")
    wanted = (*q.shape[:-1], 1)
    hold("offset", transform.offset(q).shape == wanted, "offset is not one number per query")


def _rounding(transform: Transform, q: Tensor, k: Tensor) -> float:
    """A bound on the rounding of the products: eps · d · condition · size."""
    tensors = [t for t in (transform.shift, transform.matrix, transform.inverse_matrix) if t is not None]
    eps: float = max([torch.finfo(t.dtype).eps for t in tensors], default=torch.finfo(torch.float64).eps)
    spread = 1.0
    if transform.matrix is not None and transform.inverse_matrix is not None:
        norms = [torch.linalg.matrix_norm(m.double()) for m in (transform.matrix, transform.inverse_matrix)]
        spread = float((norms[0] * norms[1]).max())
    shift = 0.0 if transform.shift is None else float(transform.shift.abs().max())
    size = float(q.norm(dim=-1).max()) * (float(k.norm(dim=-1).max()) + shift * math.sqrt(transform.dim))
    return 8 * eps * spread * size
