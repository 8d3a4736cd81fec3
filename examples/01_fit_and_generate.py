"""Fit a 3-bit plan to the embedded model and let it write from a packed cache."""

import torch

import kvsight
from kvsight import assets
from kvsight.integrations.loading import load_model
from kvsight.text import windows

model, tokenizer = load_model()  # or any transformers causal LM and its tokenizer

# calibration: token ids [B, T] of text like the text that you will run
batches = windows(tokenizer, assets.text("calibration"), length=256, count=8).split(4)
plan = kvsight.fit(model, batches, bits=3)
print(f"keys {plan.key_bits:.2f}, values {plan.value_bits:.2f} stored bits per number")

prompt = tokenizer("The history of the city", return_tensors="pt").input_ids
cache = kvsight.PackedCache(plan)
with kvsight.enable(model), torch.no_grad():  # attention reads the codes
    ids = model.generate(prompt, past_key_values=cache, max_new_tokens=32, do_sample=False, pad_token_id=0)
print(tokenizer.decode(ids[0]))
print(f"{cache.get_seq_length()} tokens in {cache.nbytes:,} bytes; 16-bit numbers would take", end=" ")
print(f"{2 * plan.elements(cache.get_seq_length()):,}")
