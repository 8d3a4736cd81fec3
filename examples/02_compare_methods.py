"""What two methods cost at the same budget, on text that calibration never saw."""

import kvsight
from kvsight import assets
from kvsight.integrations.loading import load_model
from kvsight.text import windows

model, tokenizer = load_model()
calibration = windows(tokenizer, assets.text("calibration"), length=256, count=8).split(4)
evaluation = windows(tokenizer, assets.text("evaluation"), length=256, count=4).split(2)

results = {}
for method in ("sight", "kivi"):
    plan = kvsight.fit(model, calibration, bits=4, method=method)
    results[method] = result = kvsight.evaluate(model, plan, evaluation)
    kl, top = result.kl, result.same_top
    print(
        f"{method:6} {result.true_bits:.2f} bits, KL {kl.mean:.4f} [{kl.low:.4f}, {kl.high:.4f}],", end=" "
    )
    print(f"same top token {top.mean:.1%}, perplexity {result.perplexity.mean:.2f}", end=" ")
    print(f"(uncompressed {result.baseline_perplexity.mean:.2f})")

# windows are kept, so methods can be compared window by window
pairs = zip(results["sight"].windows, results["kivi"].windows, strict=True)
ahead = sum(ours.kl < theirs.kl for ours, theirs in pairs)
print(f"sight is closer to the uncompressed model on {ahead} of {results['sight'].kl.n} windows")
