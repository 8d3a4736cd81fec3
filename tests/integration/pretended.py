"""A CUDA device that is not there, so that what only runs on GPUs runs everywhere.

Its tensors say ``cuda:0`` and lie on the CPU, kernels run in the emulator, and to capture is to note
what runs. Operations on tensors of two devices raise, as does whatever waits for the device or copies to it
while a graph is captured. Not pretended: other streams, torch's allocator, and time.
"""

import copy
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kvsight.ops.attend import cuda, tiles_op, unpack
from kvsight.ops.encode import op as encode_op
from kvsight.ops.encode import tiles as encoding

DEVICE = torch.device("cuda:0")
HARNESS = {name: f"{name}.cpp" for name in ("attend_tiles", "encode_tiles", "unpack_tiles")}
# operations that may take an index or a source from the CPU
MIXING = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    """torch's fused attention of halves, with the masses that it tells."""
    assert q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and k.shape == v.shape
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        # from the first token on
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    none = torch.zeros(0)
    out = (scores.softmax(-1) @ values).to(q.dtype)
    return out, scores.logsumexp(-1), none, none, 0, 0, none, none, none


# what torch has for GPUs only
INSTEAD = {
    "aten::_scaled_dot_product_flash_attention.": flash,
    "aten::bmm.dtype": lambda a, b, dtype: torch.bmm(a.float(), b.float()).to(dtype),
}


class There(torch.Tensor):
    """A tensor on the device, whose numbers are those of ``here``."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, here):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, here.size(), device="meta", **layout)
        out.here = here
        return out

    def __init__(self, here):
        pass

    def data_ptr(self):
        return self.here.data_ptr()

    def untyped_storage(self):
        return self.here.untyped_storage()

    def __deepcopy__(self, memo):
        out = memo[id(self)] = There(self.here.clone())
        return out

    def __repr__(self, **_):
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the device's mode")


class Device(TorchDispatchMode):
    """The device, and the mode in which its tensors can be used."""

    def __init__(self, build):
        super().__init__()
        self.build = build
        self.events = Counter()
        self.launches = Counter()
        self.recorded = None

    def note(self, event):
        self.events[event] += 1
        if self.recorded is not None:
            raise RuntimeError(f"{event} while a graph is captured")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        if func.namespace == "kvsight":
            operators = (tiles_op.attend_tiles_op, tiles_op.count_tokens_op, encode_op.encode_tiles_op)
            (own,) = (o for o in operators if o._opoverload is func)
            with self:
                return own._init_fn(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(type(x) not in (There, torch.Tensor, torch.nn.Parameter) for x in tensors):
            return NotImplemented
        there = [x for x in tensors if isinstance(x, There)]
        away = [x for x in tensors if not isinstance(x, There) and x.dim()]
        asked = kwargs.get("device")
        asked = None if asked is None else {"meta": "cuda"}.get(torch.device(asked).type, str(asked)[:4])
        if not there and asked != "cuda":
            return func(*args, **kwargs)
        if there and away and name not in MIXING:
            raise RuntimeError(f"{name} of tensors on two devices: {[tuple(x.shape) for x in tensors]}")
        if name in WAITING:
            self.note("wait")
        if self._copies(name, asked, bool(there), bool(away)) and not kwargs.get("non_blocking"):
            self.note("copy")
        if asked is not None:
            kwargs["device"] = "cpu"
        here_args, here_kwargs = tree_map(_here, (args, kwargs))
        func = INSTEAD.get(name + "." + func._schema.overload_name, func)
        out = func(*here_args, **here_kwargs)
        if self.recorded is not None:
            self.recorded.append(lambda: _again(func, here_args, here_kwargs, out))
        same = {id(x.here): x for x in there}
        stays = asked == "cuda" or (asked is None and bool(there))

        def wrapped(x):
            if not isinstance(x, torch.Tensor):
                return x
            return same[id(x)] if id(x) in same else There(x) if stays else x

        return tree_map(wrapped, out)

    @staticmethod
    def _copies(name, asked, there, away):
        """Whether numbers go from one device to the other."""
        if name == "aten::_to_copy":
            return asked is not None and (asked == "cuda") != there
        return name == "aten::copy_" and there and away

    def move(self, x):
        """A copy of a tensor, or of a model, on the device."""
        if isinstance(x, torch.Tensor):
            return There(x.detach().clone())
        out, moved = copy.deepcopy(x), {}
        for module in out.modules():
            for held in (module._parameters, module._buffers):
                for name, own in list(held.items()):
                    if own is not None:
                        held[name] = moved.setdefault(id(own), self._moved(own))
        return out

    def _moved(self, own):
        with self:
            there = There(own.data)
            return torch.nn.Parameter(there, False) if isinstance(own, torch.nn.Parameter) else there

    def capture(self, step, written):
        """replay() of ``step``, whose output it returns; ``written()`` tensors are as before."""
        saved = [x.here.clone() for x in written()]
        self.recorded = []
        try:
            out = step()
            recorded = self.recorded
        finally:
            self.recorded = None
        for x, before in zip(written(), saved, strict=True):
            x.here.copy_(before)

        def replay():
            for again in recorded:
                again()
            return out

        return replay

    def compiled(self, source, shared_bytes, device):
        """Instead of ``nvrtc.compiled``."""
        if source.name == "unpack_tiles":
            shared_bytes = unpack.shared_bytes(dict(source.macros)["COLUMNS"])
        run = self.build(HARNESS[source.name], source.files, source.macros)

        def launch(grid, threads, arguments):
            self.launches[source.name] += 1
            kept = type(arguments).from_buffer_copy(arguments)
            run(grid, kept, shared_bytes)
            if self.recorded is not None:
                self.recorded.append(lambda: run(grid, kept, shared_bytes))

        return SimpleNamespace(launch=launch)


def _here(x):
    return x.here if isinstance(x, There) else x


def _again(func, args, kwargs, out):
    """Run once more, into the same outputs."""
    found = func(*args, **kwargs)
    if getattr(func, "_schema", None) is not None and func._schema.is_mutable:
        return
    sources = {
        x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
    }
    for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
        if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in sources:
            old.copy_(new)


@contextmanager
def pretended(patch, build):
    """The device, where ``patch`` is a ``pytest.MonkeyPatch``."""
    there, make = Device(build), torch.tensor

    def tensor(data, *args, device=None, **more):
        out = make(data, *args, **more)
        if device is None or torch.device(device).type == "cpu":
            return out
        there.note("copy")
        return There(out)

    shared = {"shared_memory_per_multiprocessor": 228 * 1024, "multi_processor_count": 4}
    patch.setattr(torch, "tensor", tensor)
    patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    patch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(**shared),
        "is_current_stream_capturing": lambda: there.recorded is not None,
    }.items():
        patch.setattr(torch.cuda, name, value)
    for module in (cuda, unpack, encoding):
        patch.setattr(module, "compiled", there.compiled)
    kernels = (cuda._kernel, encoding._kernel, cuda.reads_tiles)
    for module in (cuda, encoding):
        patch.setattr(module, "multiprocessors", lambda device: 4)
    patch.setattr("kvsight.cache.ahead.build_ahead", lambda sources, device: None)
    for kept in kernels:
        kept.cache_clear()
    try:
        yield there
    finally:
        for kept in kernels:
            kept.cache_clear()
