"""Does the predicted damage order plans as their final KL does? Random plans, on text of its own.

Every layer's keys and values get a random size (a common rate times a log-normal factor), all heads of a
side alike. Reported: Spearman's rank correlation between the sum of the curves and the measured KL.
"""

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from common import calibration_ids, parser, write
from scipy.stats import spearmanr

from kvsight import assets
from kvsight.fit import GRADIENT_TOKENS, make_request, plan_from_stats, prepare_from_stats
from kvsight.integrations.loading import load_model
from kvsight.plan import Plan
from kvsight.probe import Probe
from kvsight.spend import Prepared, layer_plans
from kvsight.stats import Stats
from kvsight.text import read_text, windows
from kvsight.trace import observe, summarise


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, device=options.device)
    ids = calibration_ids(tokenizer, options.calibration or [], options.tokens)
    stats = summarise(observe(model, ids.split(1), gradient_tokens=GRADIENT_TOKENS))
    text = assets.text("evaluation") if options.text is None else read_text(options.text)
    probe = Probe(model, windows(tokenizer, text, 1024, options.windows).split(1))
    request = make_request("sight", 3.0, options={"codebook": "gaussian"})
    prepared = prepare_from_stats(model, stats, request)
    base = plan_from_stats(model, stats, request, {}, prepared=prepared)
    draw = random.Random(0)
    predicted: list[float] = []
    measured: list[float] = []
    for n in range(options.plans):
        plan, damage = _random_plan(base, stats, prepared, draw)
        predicted.append(damage)
        measured.append(probe.kl(plan))
        print(
            f"{n + 1}: {plan.true_bits:.2f} bits, predicted {damage:.4f}, KL {measured[-1]:.4f}", flush=True
        )
    rank = float(spearmanr(predicted, measured).statistic)
    print(f"rank correlation over {options.plans} plans: {rank:.4f}")
    model_name = options.model or "pico-8m"
    write(
        {
            "model": Path(model_name).name,
            "windows": options.windows,
            "rank_correlation": rank,
            "predicted": predicted,
            "kl": measured,
        },
        options.json,
    )


def _random_plan(base: Plan, stats: Stats, prepared: Prepared, draw: random.Random) -> tuple[Plan, float]:
    """A plan of random row sizes, and the damage that the curves predict for it."""
    rate = draw.uniform(1.5, 4.5)
    placed, damage = {}, 0.0
    for key, found in prepared.items():
        wanted = rate * math.exp(draw.gauss(0, 0.35))
        choice = int(abs(found.curves[0].bits - wanted).argmin())
        placed[key] = found.place([choice] * len(found.curves))
        damage += sum(float(curve.damage[choice]) for curve in found.curves)
    return replace(base, layers=layer_plans(placed, stats), sinks=0), damage


def _options() -> argparse.Namespace:
    out = parser(__doc__.splitlines()[0])
    out.add_argument("--calibration", type=Path, nargs="*", help="text files; default: embedded")
    out.add_argument("--text", type=Path, default=None, help="validation text; default: embedded")
    out.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    out.add_argument("--windows", type=int, default=2)
    out.add_argument("--plans", type=int, default=48)
    out.add_argument("--device", default="cpu")
    return out.parse_args()


if __name__ == "__main__":
    main()
