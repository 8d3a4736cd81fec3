"""Affine maps of head_dim with a dual, closed under composition.

Law: ``<dual(q), y> + offset(q) == <q, inverse(y)>``, and for maps that lose nothing
``inverse(forward(x)) == x``, so ``<dual(q), forward(k)> + offset(q) == <q, k>``. The offset is one number
per query, which softmax does not see. Every named transform (identity, centre, Hadamard, Haar, fold,
subspace, sketch) is such a map, so caches and kernels know one class only.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvsight.errors import KVSightError


@dataclass(frozen=True)
class Transform:
    """y = (x - shift) @ matrix, per head. ``None`` stands for zero or for the identity.

    Shapes: ``shift`` [H or 1, d]; ``matrix`` [H or 1, d, m] and ``inverse_matrix`` [H or 1, m, d], where
    m < d drops directions and m > d is redundant. An inverse follows from its matrix, as its inverse
    where m = d and else as its transpose, unless it is ``kept``: a map of its own, stored beside it.
    """

    dim: int
    shift: Tensor | None = None
    matrix: Tensor | None = None
    inverse_matrix: Tensor | None = None
    kept: bool = False

    @property
    def coordinates(self) -> int:
        """How many numbers ``forward`` gives for a vector: m."""
        return self.dim if self.matrix is None else self.matrix.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, n, d] to transform coordinates [..., H, n, m]."""
        if self.shift is not None:
            x = x - self.shift.unsqueeze(-2).to(x)
        return x if self.matrix is None else x @ self.matrix.to(x)

    def inverse(self, y: Tensor) -> Tensor:
        """[..., H, n, m] back to [..., H, n, d]."""
        if self.inverse_matrix is not None:
            y = y @ self.inverse_matrix.to(y)
        return y if self.shift is None else y + self.shift.unsqueeze(-2).to(y)

    def dual(self, q: Tensor) -> Tensor:
        """Queries [..., H, n, d] in the m coordinates that score against ``forward(k)``."""
        return q if self.inverse_matrix is None else q @ self.inverse_matrix.mT.to(q)

    def offset(self, q: Tensor) -> Tensor:
        """[..., H, n, 1]: what centring took from the score of each query; softmax-null."""
        if self.shift is None:
            return q.new_zeros(*q.shape[:-1], 1)
        return q @ self.shift.unsqueeze(-1).to(q)

    def then(self, after: "Transform") -> "Transform":
        """This map, then ``after``."""
        if after.dim != self.coordinates:
            raise KVSightError(
                f"cannot put a transform of head_dim {after.dim} behind one that gives {self.coordinates} "
                "coordinates."
            )
        shift = self.shift
        if after.shift is not None:
            if self.kept:
                raise KVSightError(
                    "cannot centre behind a transform that has no exact inverse; centre first."
                )
            back = after.shift if self.inverse_matrix is None else _row(after.shift, self)
            shift = back if shift is None else shift + back
        matrix = _product(self.matrix, after.matrix)
        inverse = _product(after.inverse_matrix, self.inverse_matrix)
        kept = self.kept or after.kept or not _derivable(matrix, inverse)
        return Transform(self.dim, shift, matrix, inverse, kept)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, dtype)

        moved = move(self.shift), move(self.matrix), move(self.inverse_matrix)
        return type(self)(self.dim, *moved, self.kept)

    def stored(self) -> Self:
        """fp32, with the inverse derived from the rounded matrix or kept: what a plan file gives back."""
        shift = None if self.shift is None else self.shift.float()
        if self.matrix is None:
            return type(self)(self.dim, shift)
        matrix, inverse = self.matrix.float(), self.inverse_matrix
        inverse = inverse.float() if self.kept and inverse is not None else derived_inverse(matrix)
        return type(self)(self.dim, shift, matrix, inverse, self.kept)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a plan file holds of it, by name; a derived inverse is no part of that."""
        inverse = self.inverse_matrix if self.kept else None
        named = {"shift": self.shift, "matrix": self.matrix, "inverse": inverse}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def heads(self, index: list[int]) -> Self:
        """The transform of a subset of heads; shared tensors stay shared."""

        def pick(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[0] == 1 else t[index]

        picked = pick(self.shift), pick(self.matrix), pick(self.inverse_matrix)
        return type(self)(self.dim, *picked, self.kept)


def _derivable(matrix: Tensor | None, inverse: Tensor | None) -> bool:
    """Whether ``derived_inverse`` gives this inverse: of a square matrix always."""
    if matrix is None or inverse is None or matrix.shape[-2] == matrix.shape[-1]:
        return True
    return torch.allclose(inverse, matrix.mT, rtol=0, atol=1e-6 * float(matrix.abs().max()))


def _row(shift: Tensor, before: Transform) -> Tensor:
    assert before.inverse_matrix is not None
    return (shift.unsqueeze(-2) @ before.inverse_matrix).squeeze(-2)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a @ b


def identity(dim: int) -> Transform:
    """Coordinates as they are."""
    return Transform(dim)


def centre(mean: Tensor) -> Transform:
    """Subtract a mean [H, d]; a shift shared by all keys of a head is softmax-null (HeadQ, Prop. 1)."""
    return Transform(mean.shape[-1], shift=mean)


def linear(matrix: Tensor, inverse_matrix: Tensor | None = None, *, kept: bool = False) -> Transform:
    """y = x @ matrix, [H or 1, d, m]; the inverse is derived (in fp64) when it is not given.

    ``kept`` says that the inverse given is a map of its own; see ``Transform``.
    """
    inverse = derived_inverse(matrix) if inverse_matrix is None else inverse_matrix
    return Transform(matrix.shape[-2], matrix=matrix, inverse_matrix=inverse, kept=kept)


def subspace(columns: Tensor) -> Transform:
    """Coordinates along orthonormal columns [H or 1, d, r]; what is orthogonal to them is dropped."""
    return linear(columns, columns.mT.contiguous())


def scale(factors: Tensor) -> Transform:
    """Divide coordinate i by factors[..., i] > 0, [H or 1, d]."""
    return linear(torch.diag_embed(1 / factors), torch.diag_embed(factors))


def derived_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a square matrix, through fp64; of another, with orthonormal columns, the transpose."""
    if matrix.shape[-2] != matrix.shape[-1]:
        return matrix.mT.contiguous()
    inverse: Tensor = torch.linalg.inv(matrix.double())
    return inverse.to(matrix.dtype)


def hadamard(dim: int, seed: int = 0) -> Transform:
    """Random signs, then an orthogonal map with entries of nearly equal size (fp64, [1, d, d]).

    For d = 2^k·m the map is Hadamard(2^k) ⊗ Hartley(m): the discrete Hartley matrix of odd order is
    orthogonal, symmetric and has no zero entry, so head_dims such as 80 or 96 mix fully.
    """
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    base = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range(int(math.log2(dim // odd))):
        matrix = torch.kron(matrix, base)
    matrix = torch.kron(matrix, _hartley(odd))
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    return _orthogonal(signs.unsqueeze(-1) * matrix)


def _hartley(order: int) -> Tensor:
    n = torch.arange(order, dtype=torch.float64)
    angle = 2 * math.pi * (n[:, None] * n[None, :]) / order
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def haar(dim: int, seed: int = 0) -> Transform:
    """A rotation drawn uniformly from the orthogonal group (fp64, [1, d, d])."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return _orthogonal(q * r.diagonal().sign())


def sketch(dim: int, signs: int, kind: str = "orthogonal", seed: int = 0) -> Transform:
    """Random projections whose signs and norm estimate a vector without bias (QJL, arXiv 2406.03482).

    ``kind`` "gaussian" draws S [signs, d] with independent N(0, 1) entries; "orthogonal" stacks rotations
    of size √d, cut to ``signs`` rows. Coordinates are S x; E[inverse(‖x‖ sign(S x))] = x.
    """
    match kind:
        case "gaussian":
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(signs, dim, generator=generator, dtype=torch.float64)
            mean = math.sqrt(2 / math.pi)
        case "orthogonal":
            turns = [haar(dim, seed + i).matrix for i in range(-(-signs // dim))]
            rows = math.sqrt(dim) * torch.cat([turn[0] for turn in turns if turn is not None])[:signs]
            # √d·E|u_1| of a uniform unit vector u: a little more than √(2/π)
            log = math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)
            mean = math.sqrt(dim / math.pi) * math.exp(log)
        case _:
            raise KVSightError(f"a sketch is 'orthogonal' or 'gaussian'; got {kind!r}.")
    matrix = rows.T.contiguous().unsqueeze(0)
    return linear(matrix, rows.unsqueeze(0) / (mean * signs), kept=True)


def _orthogonal(matrix: Tensor) -> Transform:
    return linear(matrix.unsqueeze(0), matrix.T.contiguous().unsqueeze(0))


def sqrtm(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """(A^½, A^-½) of positive definite matrices [..., d, d], fp64."""
    values, vectors = torch.linalg.eigh(symmetric.double())
    if float(values.min()) <= 0:
        raise KVSightError(
            f"the metric must be positive definite; its smallest eigenvalue is {values.min():.3g}. "
            "Shrink it towards the identity."
        )
    root = vectors * values.sqrt().unsqueeze(-2) @ vectors.mT
    inverse_root = vectors / values.sqrt().unsqueeze(-2) @ vectors.mT
    return root, inverse_root


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """a # b = a^½ (a^-½ b a^-½)^½ a^½ of positive definite matrices [..., d, d], fp64.

    The A between a⁻¹ and b with A a A = b, for ``geometric_mean(a⁻¹, b)`` (Pusz and Woronowicz, 1975).
    """
    root, inverse_root = sqrtm(a)
    middle, _ = sqrtm(inverse_root @ b.double() @ inverse_root)
    return root @ middle @ root


def karhunen_loeve(metric: Tensor, covariance: Tensor) -> tuple[Transform, Tensor]:
    """The transform of ``sight`` and its eigenvalues [H, d], falling.

    With W = metric^½ and W·covariance·W = U Λ Uᵀ, coordinates are y = Λ^-½ Uᵀ W x: uncorrelated, of unit
    variance, and an error e_i in coordinate i costs λ_i e_i² of metric-weighted error
    (docs/design.md, section 2). Directions without variance keep scale one.
    """
    root, inverse_root = sqrtm(metric)
    values, vectors = torch.linalg.eigh(root @ covariance.double() @ root)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    floor = values[..., :1] * 1e-12
    scale = torch.where(values > floor, values, torch.ones_like(values)).sqrt()
    forward = root @ vectors / scale.unsqueeze(-2)
    backward = scale.unsqueeze(-1) * vectors.mT @ inverse_root
    return linear(forward, backward), values
