"""Keep a plan and a half-read text on disk, and go on later without reading the text again."""

import tempfile
from pathlib import Path

import torch

import kvsight
from kvsight import assets
from kvsight.integrations.loading import load_model
from kvsight.text import windows

model, tokenizer = load_model()
folder = Path(tempfile.mkdtemp())

# once: fit and save
calibration = windows(tokenizer, assets.text("calibration"), length=256, count=8).split(4)
kvsight.fit(model, calibration, bits=4).save(folder / "plan")

# once for each long text: read it and save the cache
plan = kvsight.Plan.load(folder / "plan")
text = windows(tokenizer, assets.text("evaluation"), length=200, count=1)
cache = kvsight.PackedCache(plan)
with kvsight.enable(model), torch.no_grad():
    model(text, past_key_values=cache)
cache.save(folder / "text.safetensors")
print(f"{text.shape[1]} tokens are {(folder / 'text.safetensors').stat().st_size:,} bytes on disk")

# later, as often as you like: load it and ask
for question in ("In this way", "After the war"):
    cache = kvsight.PackedCache.load(folder / "text.safetensors", plan)
    ids = torch.cat([text, tokenizer(question, return_tensors="pt").input_ids], dim=1)
    with kvsight.enable(model), torch.no_grad():
        out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False, pad_token_id=0)
    print(tokenizer.decode(out[0, text.shape[1] :]))
