"""The operators of tiles: what graphs hold is what eager calls do."""

import copy

import pytest
import torch

from kvsight.cache.counter import Counter
from kvsight.cache.side import append, start
from kvsight.cache.tiles import Tiles
from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.ops.attend.cuda import MOST_ROWS, token_ranges
from kvsight.ops.attend.tiles_op import Shared, attend_tiles_op, count_tokens_op, widths
from kvsight.ops.attend.tiles_ref import attend_tiles_ref
from kvsight.ops.encode.op import encode_tiles_op
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.retention import Retention
from kvsight.transforms import haar

DIM, HEADS = 32, 2


def tokens(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, count, DIM, generator=draw) for _ in range(2)]


@pytest.fixture
def tiles():
    states = []
    for side, x in enumerate(tokens(80, 1)):
        placements = tuple(
            Placement(
                (head,),
                Codec(
                    "sight", haar(DIM, head).stored(), row_quantizer((4 - side,) * 16 + (2,) * 16, uniform)
                ),
            )
            for head in range(HEADS)
        )
        states.append(append(start(placements, Retention(2, 0), torch.float32, x[:, :, :0]), x))
    return Tiles(*states)


def test_a_whole_step_is_one_graph_and_does_what_eager_calls_do(tiles):
    eager = copy.deepcopy(tiles)

    def step(tiles, k, v, q):
        tiles.append(k, v)
        return tiles.attend(q, scaling=0.2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for turn in range(4):
        k, v = tokens(1, turn + 7)
        q = torch.randn(2, 4, 1, DIM, generator=torch.Generator().manual_seed(turn))
        torch.testing.assert_close(compiled(tiles, k, v, q), step(eager, k, v, q))
    assert tiles.tokens == eager.tokens == 82
    for side, other in zip(tiles.tiles, eager.tiles, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(side, other, strict=True))


def test_operators_keep_torchs_rules(tiles):
    k, v = tokens(3, 5)
    q = torch.randn(2, 4, 2, DIM)
    tiles.seen.add_(3)
    checks = ("test_schema", "test_faketensor")
    numbers = [widths(side.tilings) for side in tiles.folded]
    maps = [*tiles.encoders[0].maps, *tiles.encoders[1].maps]
    held = [list(side) for side in tiles.tiles]
    arguments = (k, v, *held, maps, *numbers, tiles.seen, tiles.first)
    torch.library.opcheck(encode_tiles_op, arguments, test_utils=checks)
    exact = [state.sinks for state in tiles.bare]
    maps = [*tiles.folded[0].maps, *tiles.folded[1].maps]
    arguments = (q, *held, maps, *numbers, tiles.seen, exact, 0.2, None, None)
    torch.library.opcheck(attend_tiles_op, arguments, test_utils=checks)
    torch.library.opcheck(count_tokens_op, (tiles.seen, 1, tiles.room), test_utils=checks)


def test_graphs_refuse_more_rows_than_a_launch_takes(tiles):
    def attend(q):
        return tiles.attend(q, scaling=0.2)

    q = torch.randn(2, 8, 16, DIM)
    with pytest.raises((KVSightError, torch._dynamo.exc.TorchDynamoException), match="query rows"):
        torch.compile(attend, fullgraph=True, backend="eager")(q)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_launch_gets_no_more_rows_than_it_takes(tiles, monkeypatch, queries):
    """Models with one KV head for dozens of query heads."""
    launched = []

    def counted(q, keys, values, ranges, **options):
        launched.append(q.shape[1] * q.shape[2] // HEADS)
        return attend_tiles_ref(q, keys, values, ranges, **options)

    q, sinks = torch.randn(2, 24 * HEADS, queries, DIM), torch.randn(24 * HEADS)
    monkeypatch.setattr("kvsight.cache.tiles.attend_tiles_ref", counted)
    out = tiles.attend(q, scaling=0.2, sink_logits=sinks)
    assert max(launched) <= MOST_ROWS and sum(launched) == 24 * queries
    ranges = token_ranges(2, queries, 2, 78, 0)
    exact = tiles._exact(q, None)
    wanted = attend_tiles_ref(q, *tiles._tokens(), ranges, scaling=0.2, exact=exact, sink_logits=sinks)
    torch.testing.assert_close(out, wanted)


def test_what_graphs_hold_lives_as_long_as_the_tiles():
    shared, made = Shared(), []

    def get(tiles):
        def make():
            made.append(torch.zeros(1))
            return made[-1]

        return shared.get(tiles, [], ("widths",), make)

    held = [[torch.zeros(4, 4) for _ in range(2)] for _ in range(300)]
    first = [get(tiles) for tiles in held]
    assert len(made) == 300
    # graphs pass other views of the same tiles
    again = [get([tile.view(4, 4) for tile in tiles]) for tiles in held]
    assert all(a is b for a, b in zip(first, again, strict=True))
    del held[1:]
    get([torch.zeros(5, 5)])
    assert len(shared) == 2 and get(held[0]) is first[0]


def test_other_tiles_in_the_same_place_are_others():
    shared, space = Shared(), torch.zeros(64)
    made = [shared.get([torch.from_numpy(space.numpy()).view(8, 8)], [], (), object) for _ in range(2)]
    assert made[0] is not made[1]


def test_a_capture_without_room_is_refused(tiles, monkeypatch):
    k, v = tokens(tiles.room, 3)
    monkeypatch.setattr(Counter, "recording", True)
    with pytest.raises(KVSightError, match="with more before"):
        tiles.append(k, v)
    monkeypatch.undo()
    tiles.append(k, v)
    assert tiles.tokens == 78 + k.shape[2]


def test_a_later_layer_may_be_captured_alone(tiles, monkeypatch):
    later = Tiles(*tiles.states(), tiles.counter, leads=False)
    for turn in range(3):
        k, v = tokens(1, turn)
        tiles.append(k, v)
        with monkeypatch.context() as patch:
            patch.setattr(Counter, "recording", turn == 0)
            if turn == 0:
                later.append(k, v)
            else:
                # a replay does what the device did
                encode_tiles_op(k, v, *later.tiles, *later.writing, later.seen, later.first)
        assert later.tokens == tiles.tokens == 79 + turn
    assert int(tiles.seen) == tiles.total
    k, v = tokens(1, 9)
    for layer in (tiles, later):
        layer.append(k, v)
    for mine, other in zip(tiles.tiles, later.tiles, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
