"""One side of a layer against a list of tokens, driven through any sequence of operations.

The oracle codes each block alone and never touches it again, so equality of bytes says that appending
is independent of chunking and that committed bytes are never rewritten.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvsight.cache import side as sides
from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.formats import Dense, Grouped, Packed, concat
from kvsight.plan import side_retention
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.retention import Hold, Retention
from kvsight.rope import pairs
from kvsight.transforms import centre, haar, identity

DIM = 4
DENSE = torch.bfloat16


def codec(quantizer, transform=None):
    return Codec("test", identity(DIM) if transform is None else transform, quantizer)


ROTATED = centre(torch.full((1, DIM), 0.5)).then(haar(DIM, seed=1).stored())
BLOCKS = codec(GroupedQuantizer(Grouped(DIM, 3, 4, "token")))
PAIRS = codec(GroupedQuantizer(Grouped(DIM, 3, 2, "token")))
ROWS = codec(row_quantizer((4, 3, 1, 0), gaussian), ROTATED)
ROPE = pairs(torch.tensor([1.0, 0.1]), DIM)
PLANS = {
    "dense": (Placement((0, 1), codec(DenseQuantizer(Dense(DIM, DENSE)))),),
    "rows": (Placement((0, 1), ROWS),),
    "groups": (Placement((0, 1), BLOCKS),),
    # blocks of two wait until there are two of them, and the last token stays exact
    "held": (Placement((0, 1), PAIRS, hold=Hold(window=1, commit=4)),),
    # heads out of order, one format each, of which one takes blocks
    "mixed": (Placement((1,), BLOCKS), Placement((0,), ROWS)),
    "turning": (Placement((1,), replace(BLOCKS, rope=ROPE)), Placement((0,), replace(ROWS, rope=ROPE))),
}
RETENTIONS = st.sampled_from(
    [
        Retention(0, 0),
        Retention(2, 0),
        Retention(0, 3),
        Retention(2, 3),
        Retention(0, 2, 6),
        Retention(2, 0, 3),
    ]
)


class Oracle:
    """Tokens as lists: exact ones [B, H, 1, d] each, coded ones a list of whole blocks."""

    def __init__(self, placements, retention):
        self.placements, self.retention = placements, retention
        self.block = max(p.block for p in placements)
        self.sinks, self.blocks, self.pending, self.hidden, self.freed = [], [], [], 0, 0

    def append(self, x):
        exact = self.block > 1 or self.retention.exact_last > 0
        for token in (x[:, :, i : i + 1] for i in range(x.shape[2])):
            if len(self.sinks) < self.retention.exact_first:
                self.sinks.append(token.to(DENSE))
            else:
                self.pending.append(token.to(DENSE) if exact else token)
        while len(self.pending) - self.retention.exact_last >= self.block:
            whole = torch.cat(self.pending[: self.block], dim=2)
            del self.pending[: self.block]
            at = self.index(len(self.blocks))
            self.blocks.append([p.codec.encode(whole[:, list(p.heads)], at) for p in self.placements])

    def index(self, block):
        """The place in the sequence of the first token of a block."""
        return self.freed + len(self.sinks) + block * self.block

    def decoded(self, i):
        block = self.blocks[i]
        out = torch.empty(block[0].tensors[0].shape[0], 2, self.block, DIM)
        for placement, packed in zip(self.placements, block, strict=True):
            out[:, list(placement.heads)] = placement.codec.decode(packed, self.index(i)).float()
        return out

    def crop(self, remove):
        for _ in range(remove):
            if not self.pending and self.blocks:
                self.pending = [t.to(DENSE) for t in self.decoded(len(self.blocks) - 1).split(1, dim=2)]
                self.blocks.pop()
            tokens = self.pending or self.sinks
            if tokens:
                tokens.pop()

    def hide(self, visible):
        self.hidden += max(0, self.visible - visible)
        while self.hidden >= self.block and self.blocks:
            del self.blocks[0]
            self.hidden -= self.block
            self.freed += self.block

    def select(self, index):
        self.sinks = [t[index] for t in self.sinks]
        self.pending = [t[index] for t in self.pending]
        self.blocks = [[packed.select(index) for packed in block] for block in self.blocks]

    @property
    def held(self):
        return len(self.sinks) + len(self.blocks) * self.block + len(self.pending)

    @property
    def visible(self):
        return self.held - self.hidden

    @property
    def nbytes(self):
        exact = sum(t.numel() * DENSE.itemsize for t in (*self.sinks, *self.pending))
        return exact + sum(packed.nbytes for block in self.blocks for packed in block)

    def tokens(self):
        parts = [t.float() for t in self.sinks]
        parts += [self.decoded(i) for i in range(len(self.blocks))]
        parts += [t.float() for t in self.pending]
        whole = torch.cat(parts, dim=2) if parts else None
        return None if whole is None else whole[:, :, self.hidden :]


class SideMachine(RuleBasedStateMachine):
    placements: tuple[Placement, ...]

    def __init__(self):
        super().__init__()
        # a few tokens at a time, as long texts are coded
        self.encode_limit = sides._ENCODE
        sides._ENCODE = 5 * DIM

    def teardown(self):
        sides._ENCODE = self.encode_limit

    @initialize(retention=RETENTIONS, batch=st.integers(1, 3))
    def start(self, retention, batch):
        self.generator = torch.Generator().manual_seed(3)
        like = torch.zeros(batch, 2, 1, DIM)
        self.batch = batch
        self.retention = retention
        self.oracle = Oracle(self.placements, side_retention(retention, self.placements))
        self.state = sides.start(self.placements, retention, DENSE, like)

    @rule(tokens=st.integers(0, 9), recording=st.booleans())
    def append(self, tokens, recording):
        x = torch.randn(self.batch, 2, tokens, DIM, generator=self.generator)
        before = x.clone()
        self.state = sides.append(self.state, x)
        assert torch.equal(before, x)
        self.oracle.append(x)
        if not recording:
            self.leave_window()

    def leave_window(self):
        if self.retention.sliding is not None:
            self.state = sides.hide(self.state, self.retention.sliding - 1)
            self.oracle.hide(self.retention.sliding - 1)

    @rule(data=st.data())
    def crop(self, data):
        # what left a sliding window is gone: only tokens appended while recording can be taken back
        whole = self.retention.sliding is None
        most = self.oracle.visible + 2 if whole else self.oracle.visible - self.retention.sliding + 1
        remove = data.draw(st.integers(0, max(0, most)))
        self.state = sides.crop(self.state, remove)
        self.oracle.crop(remove)
        self.leave_window()

    @rule(data=st.data())
    def select(self, data):
        chosen = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        index = torch.tensor(chosen)
        self.state = sides.select(self.state, index)
        self.oracle.select(index)
        self.batch = len(chosen)

    @rule()
    def save_and_restore(self):
        stored = {name: t.clone() for name, t in sides.tensors(self.state).items()}
        like = torch.zeros(self.batch, 2, 1, DIM)
        fresh = sides.start(self.placements, self.retention, DENSE, like)
        self.state = sides.restore(fresh, stored, self.state.skip, self.oracle.freed + self.oracle.held)

    @rule()
    def move(self):
        self.state = sides.move(self.state, "cpu")

    @rule(data=st.data())
    def look_at_the_last_few(self, data):
        if self.oracle.visible:
            last = data.draw(st.integers(1, self.oracle.visible))
            shown = torch.cat([s.decode(torch.float32) for s in sides.segments(self.state, last)], dim=2)
            assert torch.allclose(shown, self.oracle.tokens()[:, :, -last:], atol=1e-6)

    @invariant()
    def bytes_are_the_oracles(self):
        if not hasattr(self, "state"):
            return
        assert self.state.nbytes == self.oracle.nbytes
        assert self.state.skip == self.oracle.hidden
        assert self.state.visible == self.oracle.visible
        for i, packed in enumerate(self.state.coded):
            blocks = [block[i] for block in self.oracle.blocks]
            assert packed.tokens == self.oracle.block * len(blocks)
            if blocks:
                assert all(map(torch.equal, packed.tensors, concat(blocks).tensors))

    @invariant()
    def tokens_are_the_oracles(self):
        if not hasattr(self, "state"):
            return
        segments = sides.segments(self.state)
        assert sum(s.tokens for s in segments) == self.oracle.visible
        wanted = self.oracle.tokens()
        if wanted is not None:
            shown = torch.cat([s.decode(torch.float32) for s in segments], dim=2)
            assert torch.allclose(shown, wanted, atol=1e-6)

    @invariant()
    def nothing_else_is_kept_alive(self):
        if not hasattr(self, "state"):
            return
        owned = [self.state.sinks, self.state.tail, *(t for p in self.state.coded for t in p.tensors)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in owned if t.numel()
        }
        assert sum(storages.values()) <= self.oracle.nbytes


def machine(name, examples=30):
    case = type(name, (SideMachine,), {"placements": PLANS[name]}).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestDense = machine("dense")
TestRows = machine("rows")
TestGroups = machine("groups")
TestMixed = machine("mixed")
TestHeld = machine("held")
TestTurning = machine("turning", examples=8)


def test_places_count_what_a_sliding_window_freed():
    case = type("Walk", (SideMachine,), {"placements": PLANS["turning"]})()
    case.start(Retention(0, 2, 6), 1)
    for tokens, recording in ((9, False), (3, False), (8, False), (17, True)):
        case.append(tokens, recording)
        case.bytes_are_the_oracles()
        case.tokens_are_the_oracles()
    assert case.state.first == case.oracle.index(0) > 8
    case.save_and_restore()
    # what is left of a cut block is decoded at its own place
    for _ in range(13):
        case.state = sides.crop(case.state, 1)
        case.oracle.crop(1)
        case.bytes_are_the_oracles()
        case.tokens_are_the_oracles()
    case.teardown()


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(KVSightError, match="expects 2 KV heads of dimension 4; the model gives 3 of 4"):
        sides.start(PLANS["rows"], Retention(0, 0), DENSE, torch.zeros(1, 3, 1, 4))


def test_another_batch_is_refused():
    state = sides.start(PLANS["rows"], Retention(0, 0), DENSE, torch.zeros(2, 2, 1, 4))
    with pytest.raises(KVSightError, match=r"holds a batch of 2; got 1\. Reset it"):
        sides.append(state, torch.zeros(1, 2, 1, 4))


def test_states_are_values():
    like = torch.randn(1, 2, 9, DIM, generator=torch.Generator().manual_seed(4))
    old = sides.append(sides.start(PLANS["groups"], Retention(1, 1), DENSE, like), like)
    kept = {name: t.clone() for name, t in sides.tensors(old).items()}
    new = sides.append(old, like)
    sides.crop(new, 5)
    sides.select(old, torch.tensor([0, 0]))
    like.zero_()
    assert all(torch.equal(t, kept[name]) for name, t in sides.tensors(old).items())
    assert isinstance(new.coded[0], Packed)
