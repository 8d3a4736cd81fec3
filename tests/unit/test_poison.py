"""The poison of conftest.py reaches kvsight's own allocations and nobody else's."""

import pytest
import torch

CALLS = {
    "empty": "torch.empty(3, dtype=dtype)",
    "empty_like": "torch.empty_like(torch.ones(3, dtype=dtype))",
    "new_empty": "torch.ones(3, dtype=dtype).new_empty(3)",
}


def allocated(call, module, dtype):
    return eval(call, {"__name__": module, "torch": torch, "dtype": dtype})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unwritten_memory_of_kvsight_is_poisoned(call):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert allocated(call, "kvsight.somewhere", dtype).isnan().all()
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert (allocated(call, "kvsight.somewhere", dtype).view(torch.uint8) == 0xA5).all()


def test_other_modules_keep_their_memory():
    ones = torch.ones(3)
    same = eval("torch.empty(3, out=ones)", {"__name__": "elsewhere", "torch": torch, "ones": ones})
    assert same.eq(1).all()
