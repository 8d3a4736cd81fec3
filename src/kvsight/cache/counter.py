"""How many tokens a sequence has: one number on the device for all layers, and what the host knows."""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from kvsight.cache.outside import outside_graphs
from kvsight.ops.attend.tiles_op import count_tokens_op


class Counter:
    """``seen`` int32 [1]: tokens of a sequence, as launches of every layer read it.

    Graphs (of ``torch.compile``, or of CUDA) count when they are replayed, and tell nobody. So the host
    keeps what it ``counted`` itself apart from what graphs ``replayed``, and asks the device once there
    are graphs.
    """

    def __init__(self, device: torch.device) -> None:
        """Of no tokens yet."""
        # caches outlive inference mode
        with torch.inference_mode(False):
            self.seen = torch.zeros(1, dtype=torch.int32, device=device)
        self.counted = self.replayed = 0
        self.in_graphs = False
        # eager steps of the first layer, and the new tokens of the last
        self.steps = self.new = 0
        # all layers but the first
        self.others: WeakSet[Any] = WeakSet()

    def __deepcopy__(self, memo: dict[int, object]) -> "Counter":
        out = memo[id(self)] = Counter(self.seen.device)
        with torch.inference_mode(False):
            out.seen.copy_(self.seen)
        out.counted, out.replayed, out.in_graphs = self.counted, self.replayed, self.in_graphs
        out.steps, out.new = self.steps, self.new
        return out

    def __getstate__(self) -> dict[str, Any]:
        # layers join again
        return {**self.__dict__, "others": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, others=WeakSet())

    @property
    def recording(self) -> bool:
        """Whether what is queued now goes into a graph."""
        return torch.compiler.is_compiling() or (
            self.seen.is_cuda and torch.cuda.is_current_stream_capturing()
        )

    @property
    def before(self) -> Tensor:
        """``seen`` as a scalar of its own, int64, for positions of the tokens that come."""
        return self.seen[0].long()

    @outside_graphs
    def settle(self) -> int:
        """How many tokens graphs have counted beside the host; waits for the device if there are graphs."""
        if self.in_graphs and not self.recording:
            now = int(self.seen)
            self.replayed += now - self.counted
            self.counted = now
        return self.replayed

    def advance(self, total: int, room: int) -> None:
        """Count to ``total``. Layers follow one another, so the first to come does it for all."""
        if total == self.counted:
            return
        if self.recording:
            self.in_graphs = True
            count_tokens_op(self.seen, total - self.counted, room)
        else:
            self.seen.add_(total - self.counted)
        self.counted = total

    def advance_in_graph(self, new: int, room: int) -> None:
        """As ``advance``, by ``new`` tokens whenever the graph is replayed: numbers of the host stay."""
        count_tokens_op(self.seen, new, room)
        self.join()

    def join(self) -> None:
        """Say that a layer appends in a graph."""
        self.in_graphs = True
