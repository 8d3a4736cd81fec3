"""Compile the kernels for a GPU that is not there; the interpreter takes what the compiler may refuse.

Run as a program, without TRITON_INTERPRET: launches are caught and compiled with their arguments.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages")


class Compiled:
    """Stands for a kernel: a launch compiles it, prints its name and runs nothing."""

    def __init__(self, kernel, capability=90):
        self.kernel, self.target = kernel, GPUTarget("cuda", capability, 32)

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *args, **named):
        parameters = self.kernel.params
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        values = dict(zip((p.name for p in parameters), args, strict=False)) | named
        fixed = {p.name: values[p.name] for p in parameters if p.is_constexpr}
        signature = {name: "constexpr" if name in fixed else _type(values[name]) for name in values}
        signature = {p.name: signature[p.name] for p in parameters}
        triton.compile(ASTSource(self.kernel, signature, fixed), target=self.target, options=options)
        print(self.kernel.fn.__name__)  # noqa: T201


def _type(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


if __name__ == "__main__":
    import interpreter

    interpreter.DEVICE = "cpu"
    import test_attend_kernels as cases

    from kvsight.ops.attend import kernels as attending
    from kvsight.ops.attend import triton as attend
    from kvsight.ops.encode import kernels as encoding
    from kvsight.ops.encode import triton as encode

    attending.attend_splits = Compiled(attending.attend_splits)
    attending.merge_splits = Compiled(attending.merge_splits)
    encoding.encode_rows = Compiled(encoding.encode_rows)
    x = cases.draw(1, 1, 8, cases.DIM)
    half = cases.dense(x, torch.bfloat16)
    planes, norm, groups = (
        cases.coded([cases.CODECS[kind]], x) for kind in ("planes", "norm", "token groups")
    )
    q = x[:, :, :2].bfloat16()
    mask, sinks = torch.ones(1, 1, 2, 8, dtype=torch.bool), torch.zeros(1)
    attend.attend(q, [planes], [planes], scaling=0.3)
    attend.attend(q, [groups], [norm], scaling=0.3, mask=mask, softcap=2.0, sink_logits=sinks)
    attend.attend(q, [half], [half], scaling=0.3)
    # 7 bits have pieces of every size
    y = cases.draw(1, 1, 64, 32)
    codes = cases.coded([cases.of_one_width("columns", 7)], y)
    attend.attend(y[:, :, :2].bfloat16(), [codes], [codes], scaling=0.3)
    for kind in ("planes", "norm"):
        codec = cases.CODECS[kind]
        transform, rule = codec.transform, codec.quantizer.rounding
        encode.encode(x, transform.shift, transform.matrix, rule)
