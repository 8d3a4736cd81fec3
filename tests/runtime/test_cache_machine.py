"""A packed cache under random operations against plain lists of tokens."""

import copy
import functools
import tempfile
from pathlib import Path

import plans
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvsight
from kvsight.cache import side as sides
from kvsight.errors import KVSightError
from kvsight.plan import SIDES

CASES = [
    ("identity", {"bits": 16.0}),
    ("sight", {"bits": 4.0}),
    ("sight", {"bits": 12.0, "sinks": 2, "window": 5}),
    ("turboquant", {"bits": 12.0, "window": 3}),
    ("int", {"bits": 5.0}),
    ("int", {"bits": 16.0, "axis": "channel", "group": 4, "sinks": 3}),
    ("kivi", {"bits": 16.0, "group": 8}),
    ("kivi", {"bits": 16.0, "group": 8, "window": 3}),
    ("kivi", {"bits": 16.0, "group": 4, "window": 10, "sinks": 1}),
]


@functools.cache
def plan_of(case, sliding):
    method, arguments = CASES[case]
    return plans.plan(method, sliding=sliding, **arguments)


class Block:
    """Tokens that are coded together: one code per placement, and what they decode to."""

    def __init__(self, placements, parts):
        self.placements, self.parts = placements, parts

    @functools.cached_property
    def tokens(self):
        tokens = max(placement.codec.format.block for placement in self.placements)
        out = torch.empty(len(self.parts[0].tensors[0]), plans.HEADS, tokens, plans.DIM)
        for placement, packed in zip(self.placements, self.parts, strict=True):
            out[:, list(placement.heads)] = placement.codec.decode(packed).float()
        return list(out.unbind(2))

    def select(self, index):
        return Block(self.placements, [packed.select(index) for packed in self.parts])


class Column:
    """Keys or values of one layer as lists: exact sinks, coded blocks, exact tail; nothing is freed."""

    def __init__(self, plan, layer, side):
        self.placements = layer.side(side)
        self.retention = plan.retention(layer)
        self.block = max(p.codec.format.block for p in self.placements)
        self.dtype = plan.dense_dtype
        self.sinks, self.blocks, self.tail = [], [], []
        self.hidden = self.freed = 0

    def __len__(self):
        return len(self.sinks) + self.block * len(self.blocks) + len(self.tail)

    def append(self, x):
        for token in x.unbind(2):
            if len(self.sinks) < self.retention.exact_first:
                self.sinks.append(token.to(self.dtype))
                continue
            rounded = self.block > 1 or self.retention.exact_last > 0
            self.tail.append(token.to(self.dtype) if rounded else token)
            while len(self.tail) - self.retention.exact_last >= self.block:
                block = torch.stack(self.tail[: self.block], dim=2)
                parts = [p.codec.encode(block[:, list(p.heads)]) for p in self.placements]
                self.blocks.append(Block(self.placements, parts))
                del self.tail[: self.block]

    def read(self):
        coded = [token for block in self.blocks for token in block.tokens]
        return [t.float() for t in (*self.sinks, *coded, *self.tail)][self.hidden :]

    def hide(self):
        if self.retention.sliding is not None:
            self.hidden = max(self.hidden, len(self) - self.retention.sliding + 1)
            self.freed = max(self.freed, min(self.hidden // self.block, len(self.blocks)))

    def can_crop(self, remove):
        left = len(self) - remove
        return self.retention.sliding is None or self.hidden <= max(0, left - self.retention.sliding + 1)

    def crop(self, remove):
        keep = len(self) - remove
        if keep <= len(self.sinks):
            self.sinks, self.blocks, self.tail = self.sinks[:keep], [], []
            return
        keep -= len(self.sinks)
        if keep >= self.block * len(self.blocks):
            self.tail = self.tail[: keep - self.block * len(self.blocks)]
            return
        whole, rest = divmod(keep, self.block)
        cut = self.blocks[whole].tokens[:rest]
        self.blocks, self.tail = self.blocks[:whole], [token.to(self.dtype) for token in cut]

    def select(self, index):
        self.sinks = [token[index] for token in self.sinks]
        self.tail = [token[index] for token in self.tail]
        self.blocks = [block.select(index) for block in self.blocks]

    def check(self, state):
        seen = torch.cat([s.decode(torch.float32) for s in sides.segments(state)], dim=2)
        wanted = self.read()
        assert seen.shape[2] == state.visible == len(wanted)
        if wanted:
            torch.testing.assert_close(seen, torch.stack(wanted, dim=2), atol=1e-5, rtol=1e-5)
        held = self.blocks[self.freed :]
        for i, packed in enumerate(state.coded):
            assert packed.tokens == self.block * len(held)
            for j, stored in enumerate(packed.tensors if held else ()):
                assert torch.equal(stored, torch.cat([block.parts[i].tensors[j] for block in held], dim=-2))


class Oracle:
    def __init__(self, plan):
        self.plan = plan
        self.reset()

    def reset(self):
        self.columns = [Column(self.plan, layer, side) for layer in self.plan.layers for side in SIDES]
        self.tokens, self.batch, self.recording, self.exact = 0, None, False, True


class Machine(RuleBasedStateMachine):
    @initialize(case=st.integers(0, len(CASES) - 1), sliding=st.booleans(), raw=st.booleans())
    def start(self, case, sliding, raw):
        self.plan = plan_of(case, sliding)
        self.config = plans.config(sliding)
        cache = kvsight.PackedCache(self.plan, self.config, prefill="raw" if raw else "packed")
        self.pairs = [(cache, Oracle(self.plan))]
        self.seed = 0

    def pick(self, which):
        return self.pairs[which % len(self.pairs)]

    @rule(which=st.integers(0, 2), tokens=st.integers(1, 24))
    def append(self, which, tokens):
        cache, oracle = self.pick(which)
        oracle.batch = oracle.batch or 1 + self.seed % 2
        for i in range(plans.LAYERS):
            self.seed += 1
            kv = [plans.vectors(oracle.batch, tokens, 2 * self.seed + side) for side in range(2)]
            length, offset = cache.get_mask_sizes(tokens, i)
            out = cache.update(*kv, i)
            assert [x.shape[2] for x in out] == [length, length]
            assert offset + length == oracle.tokens + tokens
            for side, x in enumerate(kv):
                oracle.columns[2 * i + side].append(x)
        oracle.tokens += tokens
        if not oracle.recording:
            for column in oracle.columns:
                column.hide()

    @rule(which=st.integers(0, 2), remove=st.integers(0, 30), absolute=st.booleans())
    def crop(self, which, remove, absolute):
        cache, oracle = self.pick(which)
        remove = min(remove, oracle.tokens)
        keep = oracle.tokens - remove
        full = any(len(c) >= (c.retention.sliding or 10**9) for c in oracle.columns)
        if full and not oracle.recording:
            if remove:
                with pytest.raises(KVSightError, match=r"call cache.activate_past_recording\(\) first"):
                    copy.deepcopy(cache).layers[-1].crop(-remove)
            return
        if not all(c.can_crop(remove) for c in oracle.columns):
            return
        cache.crop(keep if absolute and remove and keep and not full else -remove)
        for column in oracle.columns:
            was_full = len(column) >= (column.retention.sliding or 10**9)
            oracle.exact &= column.retention.exact_last == 0 or remove == 0
            column.crop(remove)
            if was_full:
                column.hide()
        oracle.tokens = keep

    @rule(which=st.integers(0, 2))
    def record(self, which):
        cache, oracle = self.pick(which)
        cache.activate_past_recording()
        oracle.recording = True

    @precondition(lambda self: any(oracle.batch for _, oracle in self.pairs))
    @rule(which=st.integers(0, 2), kind=st.sampled_from(["reorder", "repeat", "select", "mask"]))
    def choose(self, which, kind):
        cache, oracle = self.pick(which)
        if not oracle.batch or (kind == "repeat" and oracle.batch > 2):
            return
        every = torch.arange(oracle.batch)
        match kind:
            case "reorder":
                index = every.flip(0).clamp_max(1)
                cache.reorder_cache(index)
            case "repeat":
                index = every.repeat_interleave(2)
                cache.batch_repeat_interleave(2)
            case "select":
                index = every[-1:]
                cache.batch_select_indices(index)
            case "mask":
                index = every[:1]
                cache.batch_select_indices(every == 0)
        for column in oracle.columns:
            column.select(index)
        oracle.batch = len(index)

    @rule(which=st.integers(0, 2))
    def reset(self, which):
        cache, oracle = self.pick(which)
        recording = oracle.recording
        cache.reset()
        oracle.reset()
        oracle.recording = recording

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(which=st.integers(0, 2))
    def fork(self, which):
        self.pairs.append(copy.deepcopy(self.pick(which)))

    @rule(which=st.integers(0, 2))
    def save_and_load(self, which):
        cache, oracle = self.pick(which)
        if oracle.recording:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            cache.save(path)
            loaded = kvsight.PackedCache.load(path, self.plan, self.config)
        assert loaded.prefill == cache.prefill
        self.pairs[which % len(self.pairs)] = (loaded, oracle)

    @invariant()
    def equals_the_oracle(self):
        for cache, oracle in getattr(self, "pairs", ()):
            assert cache.get_seq_length() == oracle.tokens
            if oracle.exact and not oracle.recording:
                assert cache.nbytes == self.plan.nbytes(oracle.tokens, oracle.batch or 1)
            for i, layer in enumerate(cache.layers):
                states = (layer.key_state, layer.value_state)
                for state, column in zip(states, oracle.columns[2 * i : 2 * i + 2], strict=True):
                    if state is not None:
                        column.check(state)
                        held = sides.tensors(state).values()
                        assert state.nbytes == sum(t.untyped_storage().nbytes() for t in held)


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=12)
TestMachine = Machine.TestCase
