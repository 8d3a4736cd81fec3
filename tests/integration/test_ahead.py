"""The kernels that a cache asks for ahead are those that it launches."""

import pytest
import torch

import kvsight
from kvsight.ops.attend import cuda, prefill, unpack
from kvsight.ops.encode import tiles as encoding

LAYOUT = (("layout", "tiles"),)
# two row tiles of queries
QUERY_HEADS, HEADS, DIM = 12, 2, 16


class Silent:
    """A kernel that does nothing."""

    def launch(self, grid, threads, arguments):
        pass


@pytest.fixture
def asked(monkeypatch):
    """A machine that takes its CPU for a GPU: (kernels asked for ahead, kernels launched)."""
    ahead, launched = [], []

    def compiled(source, shared_bytes, device):
        launched.append(source)
        return Silent()

    def piece(call, q, k, v, *rest):
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)

    for module in (cuda, unpack, encoding):
        monkeypatch.setattr(module, "compiled", compiled)
    for module in (cuda, encoding):
        module._kernel.cache_clear()
    monkeypatch.setattr("kvsight.cache.ahead.build_ahead", lambda sources, device: ahead.append(sources))
    monkeypatch.setattr("kvsight.integrations.layers.reads_tiles", lambda device, dtype: True)
    for module in (cuda, encoding):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # what torch's own kernels would do
    monkeypatch.setattr(prefill, "_piece", piece)
    monkeypatch.setattr(prefill._Map, "product", lambda self, x: x.float() @ self.matrix)
    yield ahead, launched
    for module in (cuda, encoding):
        module._kernel.cache_clear()


def step(cache, batch, new, dtype, softcap=None, query_heads=QUERY_HEADS):
    """All layers get new tokens, and are attended to."""
    for i in range(len(cache.layers)):
        k, v = (torch.randn(batch, HEADS, new, DIM).to(dtype) for _ in range(2))
        handle, _ = cache.update(k, v, i)
        held = handle.held
        if held.tiles is not None:
            q = torch.randn(batch, query_heads, new, DIM).to(dtype)
            held.tiles.attend(q, scaling=0.25, softcap=softcap, fresh=held.fresh)


@pytest.mark.parametrize(
    ("sizes", "batch", "prefill_of", "dtype", "softcap"),
    [
        ((80,), 2, "packed", torch.bfloat16, None),
        ((80,), 2, "packed", torch.float32, None),
        ((80,), 2, "packed", torch.bfloat16, 5.0),
        ((80,), 2, "raw", torch.float16, None),
        ((40, 40), 2, "raw", torch.bfloat16, None),
        # so many sequences that a prefill is coded by another kernel than a token
        ((80,), 100, "packed", torch.bfloat16, None),
        # but not if its exact tokens are left out
        ((67,), 50, "packed", torch.bfloat16, None),
        # the 64th token comes alone, and behind exact ones
        ((66, 1), 1, "packed", torch.bfloat16, None),
    ],
)
def test_what_is_asked_for_is_what_is_launched(asked, plan, sizes, batch, prefill_of, dtype, softcap):
    ahead, launched = asked
    # two layers with widths of their own
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    config = kvsight.integrations.hf.config_of(fitted)
    config.num_attention_heads, config.attn_logit_softcapping = QUERY_HEADS, softcap
    cache = kvsight.PackedCache(fitted, config, prefill=prefill_of, monitor=False)
    for new in sizes:
        step(cache, batch, new, dtype, softcap)
    assert all(layer.tiles is not None for layer in cache.layers)
    if sizes[-1] > 1:
        step(cache, batch, 1, dtype, softcap)
    (sources,) = ahead
    assert len(set(sources)) == len(sources)
    assert set(sources) == set(launched)
    # every layer's attention is another kernel
    assert [source.name for source in sources].count("attend_tiles") == len(cache.layers)
    # as they are wanted
    assert sources[0] == launched[0]


@pytest.mark.parametrize("group", [16, 17, 24, 40])
def test_more_query_heads_than_a_launch_takes_are_foreseen(asked, plan, group):
    ahead, launched = asked
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    config = kvsight.integrations.hf.config_of(fitted)
    config.num_attention_heads = group * HEADS
    cache = kvsight.PackedCache(fitted, config, monitor=False)
    for new in (80, 1):
        step(cache, 1, new, torch.bfloat16, query_heads=group * HEADS)
    (sources,) = ahead
    assert set(sources) == set(launched)


# one launch, several with a rest, tiles that begin with a few tokens
@pytest.mark.parametrize("sizes", [(80, 3), (80, 13), (66, 5)])
def test_steps_of_a_few_tokens_are_asked_for_when_the_first_comes(asked, plan, sizes):
    ahead, launched = asked
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    config = kvsight.integrations.hf.config_of(fitted)
    config.num_attention_heads = 4
    cache = kvsight.PackedCache(fitted, config, monitor=False)
    for new in sizes:
        step(cache, 2, new, torch.bfloat16, query_heads=4)
    known, few = set(ahead[0]), set(ahead[1])
    # two rows a token: of four and of eight rows
    assert {source for source in few - known if source.name == "attend_tiles"}
    assert set(launched) <= known | few and few <= known | set(launched)
    step(cache, 2, sizes[-1], torch.bfloat16, query_heads=4)
    assert len(ahead) == 2


def test_nothing_is_asked_for_where_there_is_no_gpu(monkeypatch, plan):
    monkeypatch.setattr("kvsight.ops.nvrtc._builds", None)
    cache = kvsight.PackedCache(plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3), tiles=True)
    for new in (80, 1):
        step(cache, 1, new, torch.float32)
    assert all(layer.tiles is not None for layer in cache.layers)
