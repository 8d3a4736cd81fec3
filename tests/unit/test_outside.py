"""What is kept out of compiled graphs runs as it is where nothing is compiled."""

import sys

import pytest
import torch

from kvsight.cache.outside import outside_graphs


@pytest.mark.skipif(
    not hasattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback"), reason="torch does not tell"
)
def test_only_compiled_code_pays_for_keeping_the_compiler_off():
    def caller() -> str:
        return sys._getframe(1).f_code.co_name

    outside = outside_graphs(caller)
    seen = []

    def step(x):
        y = x + 1
        seen.append(outside())
        return y * 2

    # torch.compile imports its compiler, which others may have done before
    compiled = torch.compile(step, backend="eager")
    assert outside() == "run"
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 4.0))
    assert outside() == "run"
    assert len(seen) == 1 and seen[0] != "run"
