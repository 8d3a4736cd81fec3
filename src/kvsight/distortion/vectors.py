"""What keys or values [H, T, d] lose as vectors, as they lie or through a metric of the queries.

Results are fp64, one number per KV head [H]. None of these sees softmax. Shapes that do not fit, NaN and
inf raise ``KVSightError``. HeadQ is Ruiz Williams, arXiv 2605.03562v2; SMAQ is Saini,
doi 10.5281/zenodo.19537052.
"""

import torch
from torch import Tensor

from kvsight.distortion import checks
from kvsight.errors import KVSightError


def storage_mse(x: Tensor, coded: Tensor) -> Tensor:
    """‖X̂ − X‖_F² / (T·d): key MSE or value MSE (HeadQ, §2)."""
    return _error(x, coded).square().mean(dim=(-2, -1))


def relative_error(x: Tensor, coded: Tensor) -> Tensor:
    """Geometric error E‖x̂ − x‖² / E‖x‖², expectations over tokens; 0 where nothing was lost of nothing.

    D'Alberto (arXiv 2605.08114) reports a geometric key error; the definition is ours.
    """
    lost = _error(x, coded).square().sum(dim=(-2, -1))
    return torch.where(lost == 0, lost, lost / x.double().square().sum(dim=(-2, -1)))


def angle_error(x: Tensor, coded: Tensor) -> Tensor:
    """Mean over tokens of 1 − cos(x, x̂) = ½‖x/‖x‖ − x̂/‖x̂‖‖²: 1 where one is zero, 0 where both are."""
    _error(x, coded)
    # the difference of unit vectors keeps small angles that 1 − cos rounds away
    half = (_unit(coded) - _unit(x)).square().sum(dim=-1) / 2
    alone = (x == 0).all(dim=-1) ^ (coded == 0).all(dim=-1)
    return half.masked_fill(alone, 1.0).mean(dim=-1)


def logit_mse(keys: Tensor, coded: Tensor, metric: Tensor) -> Tensor:
    """mean_j e_jᵀ M e_j, M [H, d, d]: with M = E[q qᵀ] the mean of (qᵀe_j)² over all pairs (i, j).

    In units of (q·k)²: scores have it times scaling². The metric is SMAQ's; the expectation over all pairs
    is free of the noise of ``paired_logit_mse``.
    """
    error = _error(keys, coded)
    metric = _metric(metric, keys.shape[0], keys.shape[2])
    return (error @ metric * error).sum(dim=-1).mean(dim=-1)


def paired_logit_mse(queries: Tensor, keys: Tensor, coded: Tensor) -> Tensor:
    """mean_i (q_iᵀ e_i)² over equal indices of queries [H, G, T, d] and keys, and over the group (SMAQ)."""
    error = _error(keys, coded)
    checks.rank("queries", queries, "H, G, T, d")
    wanted = (keys.shape[0], queries.shape[1], *keys.shape[1:])
    checks.shape("queries", queries, wanted, "the paired form needs one query for each key")
    return (checks.finite("queries", queries) * error.unsqueeze(1)).sum(dim=-1).square().mean(dim=(-2, -1))


def query_metric(queries: Tensor) -> Tensor:
    """E[q qᵀ] [H, d, d], uncentred, of queries [H, G, n, d] pooled over the group.

    ``stats.Moments.second`` is the same over a trace that does not fit into memory.
    """
    checks.rank("queries", queries, "H, G, n, d")
    pooled = checks.finite("queries", queries).flatten(1, 2)
    return pooled.mT @ pooled / pooled.shape[1]


def query_basis(metric: Tensor, rank: int) -> Tensor:
    """U [H, d, rank]: orthonormal eigenvectors of E[q qᵀ], eigenvalues falling (HeadQ, alg. 1)."""
    dim = metric.shape[-1]
    if not 1 <= rank <= dim:
        raise KVSightError(f"a query basis has 1 to {dim} directions; got rank {rank}.")
    vectors: Tensor = torch.linalg.eigh(_metric(metric, metric.shape[0], dim)).eigenvectors
    return vectors.flip(-1)[..., :rank]


def axis_capture(metric: Tensor, basis: Tensor) -> Tensor:
    """Σ‖Uᵀq‖² / Σ‖q‖² = tr(Uᵀ M U) / tr M for M = E[q qᵀ] and an orthonormal U [H, d, r].

    HeadQ reports it (table 3); the normalisation is ours. 1 where all queries are zero.
    """
    metric = _metric(metric, metric.shape[0], metric.shape[-1])
    basis = _basis(basis, metric.shape[0], metric.shape[-1])
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    worst = float((basis.mT @ basis - eye).abs().max())
    if worst > 1e-2:
        raise KVSightError(
            f"the columns of a basis must be orthonormal; UᵀU is off by {worst:.2g}. Use query_basis."
        )
    total = metric.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    caught = (metric @ basis * basis).sum(dim=(-2, -1))
    return torch.where(total == 0, torch.ones_like(total), caught / total)


def write_surrogate(keys: Tensor, coded: Tensor, basis: Tensor) -> Tensor:
    """D_U = ‖C (K̂ − K) U‖_F² with C = I − 11ᵀ/T and U [H, d, r] (HeadQ, eq. 7).

    A sum over tokens, not a mean. C removes what all keys share, which softmax does not see.
    """
    error = _error(keys, coded)
    basis = _basis(basis, keys.shape[0], keys.shape[2])
    return ((error - error.mean(dim=-2, keepdim=True)) @ basis).square().sum(dim=(-2, -1))


def _error(x: Tensor, coded: Tensor) -> Tensor:
    checks.rank("vectors", x, "H, T, d")
    checks.shape("coded vectors", coded, tuple(x.shape), "compare the same tokens of the same heads")
    return checks.finite("coded vectors", coded) - checks.finite("vectors", x)


def _unit(x: Tensor) -> Tensor:
    x = x.double()
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, x, x / norm)


def _metric(metric: Tensor, heads: int, dim: int) -> Tensor:
    checks.shape("metric", metric, (heads, dim, dim), "one square matrix of head_dim per KV head")
    return checks.finite("metric", metric)


def _basis(basis: Tensor, heads: int, dim: int) -> Tensor:
    checks.rank("basis", basis, "H, d, r")
    checks.shape("basis", basis, (heads, dim, basis.shape[-1]), "columns of head_dim for each KV head")
    return checks.finite("basis", basis)
