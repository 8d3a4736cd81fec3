"""Write with decoding steps that torch compiled once: the cache counts its tokens on the device."""

import torch

import kvsight
from kvsight import assets
from kvsight.integrations.loading import load_model
from kvsight.text import windows

model, tokenizer = load_model()
gpu = torch.cuda.is_available()
model.to("cuda" if gpu else "cpu")

# compiled steps read tiles, and tiles want a plan of their layout; static scales are quick to fit
options = {"layout": "tiles", "scales": "static"}
batches = windows(tokenizer, assets.text("calibration"), length=256, count=8).split(4)
plan = kvsight.fit(model, batches, bits=4, options=options, allocate="uniform")
cache = kvsight.PackedCache(plan, tiles=True)
text = windows(tokenizer, assets.text("evaluation"), length=100, count=1).to(model.device)


def step():
    logits = model(token, position_ids=at, past_key_values=cache, use_cache=True).logits
    token.copy_(logits[:, -1:].argmax(-1))
    at.add_(1)


with kvsight.enable(model), torch.no_grad():
    logits = model(text, past_key_values=cache, use_cache=True).logits
    token = logits[:, -1:].argmax(-1)
    at = torch.full_like(token, text.shape[1])
    # a compiled step cannot make room, so it is made now
    cache.reserve(text.shape[1] + 24)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="inductor" if gpu else "eager")
    written = [token.clone()]
    for _ in range(24):
        compiled()
        written.append(token.clone())
print(tokenizer.decode(torch.cat(written, dim=1)[0]))
print(f"{cache.get_seq_length()} tokens, {len(written) - 1} of them by one graph")
