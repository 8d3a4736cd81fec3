"""Refuse tensors that would make a measure meaningless."""

import torch
from torch import Tensor

from kvsight.errors import KVSightError


def finite(name: str, x: Tensor) -> Tensor:
    """x in fp64."""
    if not bool(torch.isfinite(x).all()):
        raise KVSightError(
            f"NaN or inf in {name} of shape {tuple(x.shape)}; measures need finite numbers. "
            "Check the model or the codec that they come from."
        )
    return x.double()


def scorelike(name: str, x: Tensor) -> Tensor:
    """x in fp64: finite, but for the -inf of keys that the query does not see."""
    if bool((torch.isnan(x) | torch.isposinf(x)).any()):
        raise KVSightError(
            f"NaN or +inf in {name} of shape {tuple(x.shape)}; only the -inf of hidden keys is allowed. "
            "Check the model or the codec that they come from."
        )
    return x.double()


def shape(name: str, x: Tensor, wanted: tuple[int, ...], why: str) -> None:
    """``why`` says what the wanted shape follows from."""
    if tuple(x.shape) != wanted:
        raise KVSightError(f"wrong shape of {name}: got {tuple(x.shape)}; wanted {wanted}: {why}.")


def rank(name: str, x: Tensor, axes: str) -> None:
    """``axes`` names the dimensions, as in "H, T, d"; none may be empty."""
    if x.dim() != len(axes.split(",")) or x.numel() == 0:
        raise KVSightError(
            f"wrong shape of {name}: got {tuple(x.shape)}; wanted [{axes}], none of them 0. "
            "Reshape them, one layer and one sequence at a time."
        )
