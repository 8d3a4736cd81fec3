"""What the tile encoder wants of a layer's codecs, and its launch on NVIDIA GPUs.

Centring, the map to coordinates, the lowest level and the step of evenly spaced codebooks make one affine
map: a code is the nearest integer to it, halfway down, within its width. Tensor cores multiply fp16 numbers
("halves") and sum in fp32. The map is rounded to one half where tokens have 16 bits, and to two else. What
rounding does to the codec's centre is taken off again, so with one half a number is within
2^-11 Σ_i |(x_i - centre_i) map_ij| of the codec's own: an eighth of what rounding a token to bf16 may have
done to it. Sums are within 2^-16 Σ_i |x_i map_ij|. Where the number lies closer to the middle between two
levels, the code can differ by one from the reference's, which computes in fp64. A token gets the same code
in every launch, with few tokens or many.

bf16 and fp32 numbers are brought into fp16's range by a power of two for each head: numbers of up to 2^23
steps are kept, and none moves a code by more than 2^-17 because it was small. Steps are those of the finest
coordinate; coordinates much finer than the others, which hold next to nothing, do not count, and lose
precision instead.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvsight.ops.attend.ref import Coded
from kvsight.ops.attend.tiles import steps, tiling_of
from kvsight.ops.builds import Source
from kvsight.ops.nvrtc import (
    HALVES_SOURCE,
    NUMBERS,
    NUMBERS_SOURCE,
    RESERVED_BYTES,
    SHARED_BYTES,
    Kernel,
    compiled,
    multiprocessors,
)
from kvsight.tiling import CHUNK, TOKENS, Rows, Tiling, lane_bytes

SOURCES = (NUMBERS_SOURCE, HALVES_SOURCE, Path(__file__).with_name("tiles.cu"))
_LANES = 32
# coordinates that a lane group reads of a token at once
_STEP = 32
# halves that hold a map nearly as well as fp32 does
_PARTS = 2
# words of the kernel's ``Store``, and of its ``Coordinates`` besides their shifts
_STORE_WORDS, _CHUNK_WORDS = 12, 8
# halves end at 2^16: a map's columns stay below 2^15, a number of one step is at most 2^-7
_HALF_BITS = 15
_STEP_BITS = 8
# how much finer than usual a coordinate may be and still count
_FINER = 2.0**8
# tiles that get a block of threads each; more are filled by warps
_FEW_TILES = 512


@dataclass(frozen=True, eq=False)
class Encoder:
    """The forward map of some heads: ``coded`` says how codes lie, y = (x - shift) @ matrix what they code.

    ``matrix`` [H or 1, d, d] or None, ``shift`` [H or 1, d] or None.
    """

    coded: Coded
    matrix: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True, eq=False)
class FoldedEncoder:
    """One side of a layer: codes are x @ map[h] + shift[h], rounded.

    The map is the first of two ``halves`` [H, 2, d, d], fp16, or the sum of both, times ``scale`` [H, d],
    fp32, powers of two that 16 coordinates have in common. ``shift`` [H, 2, d], fp32: with one, and both.
    """

    tilings: tuple[Tiling, ...]
    halves: Tensor
    scale: Tensor
    shift: Tensor

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """``halves``, ``scale`` and ``shift``, as operators take them."""
        return self.halves, self.scale, self.shift

    def map(self, parts: int) -> Tensor:
        """[H, d, d], fp32."""
        return self.halves[:, :parts].float().sum(1) * self.scale.unsqueeze(1)

    @cached_property
    def range(self) -> Tensor:
        """[H], fp32: the power of two that brings a token's numbers into the range of halves."""
        sums = self.map(1).abs().sum(1)
        usual = sums.where(sums > 0, torch.nan).nanmedian(-1).values.nan_to_num()
        # one that is nearly dead must not push all others out of range
        exponent = torch.frexp(sums.amax(-1).minimum(_FINER * usual)).exponent
        return _power_of_two(exponent - _STEP_BITS)

    def operands(self, parts: int) -> Tensor:
        """The first ``halves`` as operands of tensor cores.

        [H, chunks, products, parts, 32, 8]: 16 coordinates, 16 rows of the map, part, lane, what it holds.
        """
        heads, _, dim, columns = self.halves.shape
        rows = torch.nn.functional.pad(self.halves[:, :parts], (0, 0, 0, -dim % _STEP))
        # a lane has numbers 8t to 8t + 7 of 32: four for each of two products, in two halves
        split = rows.view(heads, parts, -1, 4, 2, 2, 2, columns)
        if self.tilings[0].rows == "tokens":
            # coordinate 4t + 2n + j is column 2t + j of product n: a lane gets four that lie together
            split = split.view(*split.shape[:-1], -1, 4, 2, 2).permute(0, 7, 2, 4, 1, 8, 10, 3, 9, 5, 6)
        else:
            # coordinate 8r + g
            split = split.view(*split.shape[:-1], -1, 2, 8).permute(0, 7, 2, 4, 1, 9, 3, 5, 8, 6)
        return split.reshape(heads, columns // CHUNK, -1, parts, _LANES, 8)


def parts_of(dtype: torch.dtype) -> int:
    """How many halves a number of the map is for tokens of ``dtype``."""
    return 1 if dtype.itemsize == 2 else _PARTS


@dataclass(frozen=True)
class Shape:
    """How threads share the work: a team of warps does a tile, ``groups`` x 16 tokens at once.

    ``resident`` keeps a head's map in shared memory; ``per_sm`` blocks should fit a multiprocessor, which
    gets ``waves`` times as many one after another, as heads take different times.
    """

    warps: int
    team: int
    groups: int
    resident: bool
    per_sm: int
    waves: int = 4

    def macros(self) -> tuple[tuple[str, int], ...]:
        return (
            ("WARPS", self.warps),
            ("TEAM", self.team),
            ("GROUPS", self.groups),
            ("RESIDENT", int(self.resident)),
            ("PER_SM", self.per_sm),
        )

    def shared_bytes(self, dim: int, parts: int, image: int) -> int:
        """Shared memory of a block, with maps of ``parts`` and tiles of ``image`` bytes."""
        return self.resident * _resident_bytes(dim, parts) + self.warps // self.team * image

    def blocks(self, tiles: int, multiprocessors: int) -> int:
        """Blocks of threads for so many tiles."""
        return min(-(-tiles * self.team // self.warps), self.waves * self.per_sm * multiprocessors)

    def fits(self, dim: int, parts: int, image: int) -> bool:
        """Whether a multiprocessor has shared memory for ``per_sm`` blocks."""
        return self.per_sm * (self.shared_bytes(dim, parts, image) + RESERVED_BYTES) <= SHARED_BYTES


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "heads", "map")),
        *((name, ctypes.c_longlong) for name in ("batch", "head", "token")),
    )


_Sides = _Side * 2


class Arguments(ctypes.Structure):
    """The kernel's one argument."""

    _fields_ = (
        ("sides", _Sides),
        ("seen", ctypes.c_void_p),
        *(
            (name, ctypes.c_int)
            for name in ("count", "first", "heads", "batch", "tiles", "blocks", "image")
        ),
    )


def fold_encoder(parts: Sequence[Encoder], rows: Rows) -> FoldedEncoder:
    """Fold the codecs of all heads of one side. Raises ``KVSightError`` for heads that have no tiles."""
    heads = {head: (part, i) for part in parts for i, head in enumerate(part.coded.heads)}
    tilings = {id(part): tiling_of(part.coded, rows) for part in parts}
    halves, scales, shifts = zip(*(_fold_head(*heads[head]) for head in sorted(heads)), strict=True)
    order = tuple(tilings[id(heads[head][0])] for head in sorted(heads))
    return FoldedEncoder(order, torch.stack(halves), torch.stack(scales), torch.stack(shifts))


def _fold_head(part: Encoder, head: int) -> tuple[Tensor, Tensor, Tensor]:
    found = steps(part.coded)
    assert found is not None
    first, step = (t[min(head, len(t) - 1)] for t in found)
    dim = part.coded.packed.format.dim
    matrix = torch.eye(dim, dtype=torch.float64, device=first.device)
    if part.matrix is not None:
        matrix = part.matrix[min(head, len(part.matrix) - 1)].to(first)
    centre = matrix.new_zeros(dim) if part.shift is None else part.shift[min(head, len(part.shift) - 1)]
    stored = len(step)
    folded, level = matrix.new_zeros(dim, dim), matrix.new_zeros(dim)
    folded[:, :stored] = matrix[:, :stored] / step
    level[:stored] = -first / step
    halves, scale = _in_halves(folded)
    # by the map as it is rounded, so that the centre gets the codes that it should
    shift = level - centre.to(first) @ (halves.to(first).cumsum(0) * scale)
    return halves, scale.float(), shift.float()


def _in_halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[d, d] as halves [2, d, d] and powers of two [d] of its columns."""
    largest = matrix.abs().amax(0).view(-1, CHUNK).amax(-1).repeat_interleave(CHUNK)
    scale = _power_of_two(torch.frexp(largest).exponent - _HALF_BITS).to(matrix)
    rest, halves = matrix / scale, []
    for _ in range(_PARTS):
        halves.append(rest.half())
        rest = rest - halves[-1]
    return torch.stack(halves), scale


def _power_of_two(exponent: Tensor) -> Tensor:
    """fp32, exactly, on every device."""
    # as far as normal numbers go
    return (exponent.int().clamp(-126, 127) + 127 << 23).view(torch.float32)


@dataclass(frozen=True, eq=False)
class TileWriter:
    """A launch that codes new tokens of one layer into its tiles, ready to be queued again and again."""

    sides: tuple[FoldedEncoder, FoldedEncoder]
    heads: tuple[Tensor, Tensor]
    operands: tuple[Tensor, Tensor]
    image: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        keys: FoldedEncoder,
        values: FoldedEncoder,
        key_tiles: Sequence[Tensor],
        value_tiles: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> "TileWriter":
        """Into tiles [B, n, nbytes] of each head; tokens of ``dtype``."""
        image = image_bytes(*keys.tilings, *values.tilings)
        heads = _heads(keys, key_tiles, dtype), _heads(values, value_tiles, dtype)
        parts = parts_of(dtype)
        return cls((keys, values), heads, (keys.operands(parts), values.operands(parts)), image, dtype)

    @cached_property
    def pointers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where a side's heads and operands are."""
        both = zip(self.heads, self.operands, strict=True)
        key, value = ((heads.data_ptr(), operands.data_ptr()) for heads, operands in both)
        return key, value

    def arguments(self, k: Tensor, v: Tensor, seen: Tensor, first: int, blocks: int) -> Arguments:
        """For new tokens [B, H, n, d], ``aligned``; ``seen`` int32 [1] counts them already."""
        batch, heads, new, _ = k.shape
        key, value = self.pointers
        sides = (
            _Side(k.data_ptr(), *key, *k.stride()[:3]),
            _Side(v.data_ptr(), *value, *v.stride()[:3]),
        )
        counts = (new, first, heads, batch, most_tiles(new), blocks, self.image)
        return Arguments(_Sides(*sides), seen.data_ptr(), *counts)

    def write(self, k: Tensor, v: Tensor, seen: Tensor, first: int, shape: Shape | None = None) -> None:
        """Queue it on the current stream, for any number of new tokens [B, H, n, d], contiguous in d.

        ``seen`` int32 [1] on the device counts them already, and ``first`` tokens that have no codes.
        """
        batch, heads, new, dim = k.shape
        assert k.dtype is self.dtype
        if new == 0:
            return
        k, v = aligned(k), aligned(v)
        tiles = 2 * heads * batch * most_tiles(new)
        if shape is None:
            shape = suited(tiles, dim, k.dtype, self.image)
        blocks = shape.blocks(tiles, multiprocessors(k.device))
        kernel = _kernel(shape, dim, k.dtype, self.image, k.device)
        kernel.launch((blocks, 1, 1), _LANES * shape.warps, self.arguments(k, v, seen, first, blocks))


def most_tiles(new: int) -> int:
    """The most tiles of a sequence that new tokens can touch, wherever they begin."""
    return (new + 2 * TOKENS - 2) // TOKENS


@cache
def _kernel(shape: Shape, dim: int, dtype: torch.dtype, image: int, device: torch.device) -> Kernel:
    shared = shape.shared_bytes(dim, parts_of(dtype), image)
    return compiled(encode_source(shape, dim, dtype), shared, device)


def encode_source(shape: Shape, dim: int, dtype: torch.dtype) -> Source:
    """The kernel for tokens of so many numbers."""
    macros = ("HEAD_DIM", dim), ("NUMBER", NUMBERS[dtype]), ("PARTS", parts_of(dtype)), *shape.macros()
    return Source(SOURCES, "encode_tiles", macros)


def image_bytes(*tilings: Tiling) -> int:
    """Room for a tile of any head; rounded up so that few kernels serve all layers."""
    return max(1, -(-max(tiling.nbytes for tiling in tilings) // 1024)) * 1024


@lru_cache(maxsize=64)
def suited(tiles: int, dim: int, dtype: torch.dtype, image: int) -> Shape:
    """For so many tiles of both sides, of at most ``image`` bytes."""
    return few_tokens(dim) if tiles <= _FEW_TILES else many_tokens(dim, dtype, image)


def few_tokens(dim: int) -> Shape:
    """A tile for a block of threads, 16 coordinates for a warp."""
    warps = min(8, dim // CHUNK)
    return Shape(warps, warps, groups=1, resident=False, per_sm=1, waves=16)


def many_tokens(dim: int, dtype: torch.dtype, image: int) -> Shape:
    """A tile of at most ``image`` bytes for a warp."""
    # registers hold all numbers of as many tokens
    groups = 2 if dtype is not torch.float32 and dim <= 128 else 1
    per_sm = 2 if dtype is not torch.float32 and dim <= 128 else 1
    wanted = Shape(8, 1, groups, resident=True, per_sm=per_sm)
    shapes = wanted, replace(wanted, warps=8 * per_sm, per_sm=1), replace(wanted, per_sm=1)
    for shape in shapes:
        if shape.fits(dim, parts_of(dtype), image):
            return shape
    return replace(wanted, resident=False, per_sm=1)


def aligned(x: Tensor) -> Tensor:
    """Tokens as the kernel reads them, 16 bytes at a time: a copy where they do not lie so."""
    # heads have whole chunks of 16 numbers
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    steps = [n for n, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    addresses = [x.data_ptr(), *(n * x.element_size() for n in steps)]
    if x.stride(3) == 1 and not any(address % 16 for address in addresses):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _resident_bytes(dim: int, parts: int) -> int:
    """The map of a head, and its ``Head``."""
    head = 4 * (_STORE_WORDS + dim // CHUNK * (CHUNK + _CHUNK_WORDS))
    return -(-head // 128) * 128 + -(-dim // _STEP) * _STEP * dim * parts * 2


def _heads(side: FoldedEncoder, tiles: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The kernel's ``Head`` of every KV head, int32 words."""
    # the range of fp16 tokens is a half itself
    powers = side.range.clamp(2.0**-14, 2.0**15) if dtype is torch.float16 else side.range
    widths = torch.tensor([tiling.widths for tiling in side.tilings], device=side.scale.device)
    unit = _power_of_two(widths)
    # a code and a half, rounded down
    shifts = (side.shift[:, parts_of(dtype) - 1] + 0.5).unflatten(-1, (-1, CHUNK)) / unit.unsqueeze(-1)
    scales = side.scale[:, ::CHUNK] / (unit * powers.unsqueeze(-1))
    # a whole number of steps and no more is rounded down, too
    limits = torch.nextafter(unit, torch.zeros_like(unit))
    numbers = torch.cat([shifts, scales.unsqueeze(-1), limits.unsqueeze(-1)], dim=-1)
    coordinates = numbers.cpu().view(torch.int32).tolist()
    ranges = powers.cpu().view(torch.int32).tolist()
    rows: list[list[int]] = []
    for tiling, own, entries, number in zip(side.tilings, tiles, coordinates, ranges, strict=True):
        pieces: list[list[int]] = [[] for _ in tiling.widths]
        offset = whole = pairs = 0
        for group in tiling.groups:
            words = lane_bytes(group) * _LANES // 4
            for block in group:
                up = block.size * (block.slot or 0)
                mask = ((1 << block.size) - 1 << up) * 0x11111111
                place = offset | block.size << 16 | (block.low - up) % 32 << 20 | (block.slot is None) << 28
                pieces[block.chunk] += [mask, place]
            offset += words
            whole += words * (group[0].slot is not None)
            pairs += words * (group[0].slot is None and group[0].size == 2)
        start = torch.tensor([own.data_ptr(), own.stride(0)]).view(torch.int32).tolist()
        store = [*start, tiling.nbytes, tiling.stored // CHUNK, whole, pairs, number]
        rows.append([*store, *[0] * (_STORE_WORDS - len(store))])
        for entry, own_pieces in zip(entries, pieces, strict=True):
            rows[-1] += [*entry, *own_pieces, *[0] * (_CHUNK_WORDS - 2 - len(own_pieces))]
    heads = torch.tensor(rows).to(torch.int32)
    return heads.to(tiles[0].device)


def write_tiles_ref(
    sides: tuple[FoldedEncoder, FoldedEncoder],
    tiles: tuple[Sequence[Tensor], Sequence[Tensor]],
    k: Tensor,
    v: Tensor,
    at: int,
) -> None:
    """``TileWriter.write`` in plain torch: tokens [B, H, n, d] become coded tokens ``at`` and behind."""
    from_tile, to_tile = at // TOKENS, -(-(at + k.shape[2]) // TOKENS)
    parts = parts_of(k.dtype)
    for side, own, x in zip(sides, tiles, (k, v), strict=True):
        maps, shifts = side.map(parts), side.shift[:, parts - 1]
        for head, (tiling, held) in enumerate(zip(side.tilings, own, strict=True)):
            real = x[:, head].to(maps) @ maps[head] + shifts[head]
            limits = [2**width - 1 for width in tiling.widths if width for _ in range(CHUNK)]
            most = torch.tensor(limits, device=x.device, dtype=real.dtype)
            new = (real[..., : tiling.stored] - 0.5).ceil().clamp_min(0).minimum(most).to(torch.uint8)
            codes = tiling.unpack(held[:, from_tile:to_tile])
            start = at - from_tile * TOKENS
            codes[:, start : start + new.shape[1]] = new
            held[:, from_tile:to_tile] = tiling.pack(codes)
