"""A plan on disk: a directory of ``plan.json`` and ``tensors.safetensors`` (docs/formats.md)."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvsight.codec import Codec, Placement
from kvsight.drift import Assumed
from kvsight.errors import KVSightError
from kvsight.formats import (
    Affine,
    Dense,
    Format,
    Indexed,
    Joined,
    Patched,
    Polar,
    Row,
    Scaled,
    Sketch,
    Sparse,
    Tiered,
    dtype_from_name,
    dtype_name,
    format_from_spec,
)
from kvsight.plan import SIDES, LayerPlan, Plan, digest
from kvsight.quantizers.base import Quantizer
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.joined import JoinedQuantizer
from kvsight.quantizers.lloyd_max import RowQuantizer
from kvsight.quantizers.patched import PatchedQuantizer
from kvsight.quantizers.polar import PolarQuantizer
from kvsight.quantizers.scaled import ScaledQuantizer
from kvsight.quantizers.sketch import SketchQuantizer
from kvsight.quantizers.sparse import SparseQuantizer
from kvsight.quantizers.tiered import TieredQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.quantizers.vector import VectorQuantizer
from kvsight.retention import Hold
from kvsight.rope import Rope
from kvsight.transforms import Transform, linear

VERSION = 1
_JSON, _TENSORS = "plan.json", "tensors.safetensors"


def save_plan(plan: Plan, path: Path) -> None:
    """Write beside ``path`` first, then rename: an interrupted save leaves the old plan or none."""
    if path.exists() and not (path / _JSON).exists():
        raise KVSightError(f"{path} exists and is not a plan; choose another output path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        tensors = _tensors(plan)
        save_file(tensors, scratch / _TENSORS)
        (scratch / _TENSORS).chmod(0o644)
        body = _body(plan)
        body["tensors_sha256"] = _sha256(scratch / _TENSORS)
        body["plan_sha256"] = digest(body)
        (scratch / _JSON).write_text(json.dumps(body, indent=1) + "\n")
        scratch.chmod(0o755)
        _swap(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, path: Path) -> None:
    old = scratch.with_name(scratch.name + ".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(scratch, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_plan(path: Path) -> Plan:
    """Read and verify; every defect is one clear ``KVSightError``."""
    body = _read_json(path)
    version = body.get("version")
    if version != VERSION:
        raise KVSightError(
            f"{path} is a plan of format version {version}; this kvsight reads version {VERSION}. "
            "Upgrade kvsight, or fit the plan again."
        )
    claimed = body.pop("plan_sha256", None)
    if claimed != digest(body):
        raise KVSightError(f"{path / _JSON} was changed or truncated; fit the plan again.")
    tensors = _read_tensors(path / _TENSORS, str(body.get("tensors_sha256")))
    try:
        return _plan(body, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, KVSightError):
            raise
        raise KVSightError(f"{path} is not a valid plan ({error!r}); fit it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads((path / _JSON).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise KVSightError(
            f"no plan at {path}: {_JSON} is missing. Make one with: kvsight fit -o {path}."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise KVSightError(f"{path / _JSON} is corrupt or truncated; fit the plan again.") from None
    if not isinstance(body, dict):
        raise KVSightError(f"{path / _JSON} is not a plan; fit it again.")
    return body


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.exists():
        raise KVSightError(f"{path} is missing; fit the plan again.")
    if _sha256(path) != sha256:
        raise KVSightError(f"{path} is corrupt or truncated; fit the plan again.")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise KVSightError(f"{path} cannot be read ({error}); fit the plan again.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _body(plan: Plan) -> dict[str, Any]:
    return {
        "version": VERSION,
        "method": plan.method,
        "options": dict(plan.options),
        "true_bits": plan.true_bits,
        "sinks": plan.sinks,
        "window": plan.window,
        "dense_dtype": dtype_name(plan.dense_dtype),
        "reference_length": plan.reference_length,
        "fingerprint": plan.fingerprint,
        "config": dict(plan.config),
        "provenance": dict(plan.provenance),
        "layers": [_layer_body(layer) for layer in plan.layers],
    }


def _layer_body(layer: LayerPlan) -> dict[str, Any]:
    sides: dict[str, Any] = {
        side: [
            {
                "heads": list(p.heads),
                "codec": p.codec.name,
                "format": p.codec.format.spec(),
                **_held(p.hold),
            }
            for p in layer.side(side)
        ]
        for side in SIDES
    }
    return {"index": layer.index, "window": layer.window, "heads": layer.heads, **sides}


def _held(hold: Hold) -> dict[str, Any]:
    """Only what is held: other plans are as they were."""
    return {} if hold == Hold() else {"hold": asdict(hold)}


def _tensors(plan: Plan) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for layer in plan.layers:
        for side in SIDES:
            for i, placement in enumerate(layer.side(side)):
                named = placement.codec.tensors
                if placement.assumed is not None:
                    named |= {"mean": placement.assumed.mean, "variance": placement.assumed.variance}
                prefix = f"{layer.index}.{side}.{i}"
                # copies of their own: a file takes no views and no two names for one tensor
                out |= {
                    f"{prefix}.{name}": tensor.clone(memory_format=torch.contiguous_format)
                    for name, tensor in named.items()
                }
    return out


def _plan(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    return Plan(
        tuple(_layer(layer, tensors) for layer in body["layers"]),
        body["method"],
        body["options"],
        body["sinks"],
        body["window"],
        dtype_from_name(body["dense_dtype"]),
        body["reference_length"],
        body["fingerprint"],
        body["config"],
        body["provenance"],
    )


def _layer(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerPlan:
    key, value = (
        tuple(
            _placement(entry, f"{body['index']}.{side}.{i}", tensors) for i, entry in enumerate(body[side])
        )
        for side in SIDES
    )
    return LayerPlan(body["index"], body["window"], body["heads"], key, value)


def _placement(entry: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Placement:
    form = format_from_spec(entry["format"])
    parts = (tensors.get(f"{prefix}.{name}") for name in ("shift", "matrix", "inverse"))
    transform = _transform(form.dim, *parts)
    quantizer = _quantizer(form, prefix, tensors, transform)
    codec = Codec(entry["codec"], transform, quantizer, _rope(prefix, tensors))
    # plans of 0.1 did not say what they assumed
    mean, variance = tensors.get(f"{prefix}.mean"), tensors.get(f"{prefix}.variance")
    assumed = None if mean is None or variance is None else Assumed(mean, variance)
    return Placement(tuple(entry["heads"]), codec, assumed, Hold(**entry.get("hold", {})))


def _rope(prefix: str, tensors: Mapping[str, Tensor]) -> Rope | None:
    frequencies = tensors.get(f"{prefix}.frequencies")
    return None if frequencies is None else Rope(frequencies, tensors[f"{prefix}.partners"])


def _transform(dim: int, shift: Tensor | None, matrix: Tensor | None, inverse: Tensor | None) -> Transform:
    if matrix is None:
        return Transform(dim, shift)
    return replace(linear(matrix, inverse, kept=inverse is not None), shift=shift)


def _quantizer(form: Format, prefix: str, tensors: Mapping[str, Tensor], transform: Transform) -> Quantizer:
    match form:
        case Row():
            return RowQuantizer(form, tensors[f"{prefix}.levels"], tensors[f"{prefix}.starts"])
        case Affine():
            return GroupedQuantizer(form, tensors.get(f"{prefix}.clip"))
        case Tiered():
            guides = (tensors[f"{prefix}.{name}"] for name in ("linear", "factor", "power"))
            return TieredQuantizer(form, *guides)
        case Patched():
            return PatchedQuantizer(form)
        case Indexed():
            return VectorQuantizer(form, tensors[f"{prefix}.centroids"], tensors.get(f"{prefix}.metric"))
        case Polar():
            return PolarQuantizer(form, tensors[f"{prefix}.angles"])
        case Dense():
            return DenseQuantizer(form)
        case Scaled():
            return ScaledQuantizer(form, tensors[f"{prefix}.levels"])
        case Sparse():
            return SparseQuantizer(form)
        case Sketch() if transform.matrix is not None:
            return SketchQuantizer.of(transform.matrix)
        case Joined() if transform.matrix is not None and transform.inverse_matrix is not None:
            sizes = [part.dim for part in form.parts]
            maps = transform.matrix, transform.inverse_matrix
            own = zip(form.parts, maps[0].split(sizes, -1), maps[1].split(sizes, -2), strict=True)
            parts = [
                _quantizer(part, f"{prefix}.{i}", tensors, linear(matrix, inverse, kept=True))
                for i, (part, matrix, inverse) in enumerate(own)
            ]
            return JoinedQuantizer.of(parts, *maps)
    raise KVSightError(f"no quantizer reads {form.name}; upgrade kvsight.")


def plan_hash(plan: Plan) -> str:
    """sha256 of everything in the plan, tensors included: the parent hash of what is made with it."""
    sha = hashlib.sha256(digest(_body(plan)).encode())
    for name, tensor in sorted(_tensors(plan).items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
