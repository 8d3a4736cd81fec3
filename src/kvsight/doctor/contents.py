"""Checks of what keys, values and attention are like on real text."""

import math

from kvsight.doctor.figures import BITS, LEADING, OUTLIER, Figures
from kvsight.doctor.findings import Finding, first_tokens, layers, mean, percent, unheard
from kvsight.doctor.window import FIRST

# tokens per dimension below which the smallest variances of a covariance are noise
TOKENS_PER_DIM = 16
# a quarter of the energy is 0.2 bits, about what a step of group size costs an integer code
MEAN_SHARE = 0.25
# half of a Laplace density's 3: a Gaussian codebook clips visibly
KURTOSIS = 1.5
# a Gaussian channel's own peak over thousands of tokens is 4 to 5
PEAK = 12.0
# measured: where the strongest position drew 8 %, keeping it exact cost more than it saved
SINK_MASS = 0.1
# ... and in a short window, attention that is spread evenly must not pass for a sink
SINK_OVER_EVEN = 5.0
# below it, what is gained is within what codebooks and scales differ by
GAIN = 0.15
# where plans state their bits unless asked otherwise
REFERENCE_LENGTH = 1024


def text(figures: Figures) -> Finding:
    name = "short text"
    dim = max(max(layer.key_dim, layer.value_dim) for layer in figures.layers)
    summary = f"{figures.tokens:,} tokens for covariances of {dim} x {dim}"
    if figures.tokens >= TOKENS_PER_DIM * dim:
        return Finding(name, "clear", summary)
    return Finding(
        name,
        "found",
        summary,
        meaning="The smallest variances are noise, so gains look larger than they are.",
        advice=f"Use --tokens {TOKENS_PER_DIM * dim} or more here, and more still for kvsight fit.",
    )


def key_mean(figures: Figures) -> Finding:
    name = "key mean"
    usual = mean(head.mean_share for head in figures.heads("k"))
    where, head = figures.largest("k", lambda head: head.mean_share)
    summary = f"{percent(usual)} of key energy is the mean, {percent(head.mean_share)} in {where}"
    if head.mean_share < MEAN_SHARE:
        return Finding(name, "clear", summary)
    lost = -0.5 * math.log2(max(1 - head.mean_share, 1e-9))
    return Finding(
        name,
        "found",
        summary,
        meaning="A constant moves all scores of a query alike, so softmax does not see it; a code scaled "
        f"by each token's norm or range pays for it, here up to {lost:.1f} bits per element.",
        advice="Centre keys. sight does, kivi does per block; turboquant needs --option centre=true, and "
        "int per token cannot.",
    )


def key_bias(figures: Figures) -> Finding:
    name = "key bias"
    if figures.key_bias is None:
        return Finding(name, "unknown", "no key projection of a known name")
    if not figures.key_bias:
        return Finding(name, "clear", "key projections add no constant")
    shares = [share for layer in figures.layers for share in layer.bias_share or ()]
    return Finding(
        name,
        "found",
        f"{', '.join(figures.key_bias)} adds a bias",
        f"it is {percent(mean(shares))} of key energy, up to {percent(max(shares))}"
        if shares
        else "its part in the keys was not measured: a fused projection, or a norm after it",
        "One vector is in every key. RoPE turns it with the position, so centring takes out the part in "
        "slow channels (see key mean), and the rest is variance in a few directions.",
        "Use a code that gives these directions bits (sight) or scales of their own (kivi). int per token "
        "spends its range on them.",
    )


def outliers(figures: Figures) -> Finding:
    name = "outlier channels"
    k, v = figures.heads("k"), figures.heads("v")
    count = [sum(len(head.outliers) for head in heads) for heads in (k, v)]
    places = [(side, *figures.largest(side, lambda head: head.channel_ratio)) for side in ("k", "v")]
    side, where, head = max(places, key=lambda place: place[2].channel_ratio)
    strongest = f"the strongest channel has {head.channel_ratio:.1f} times its head's median rms"
    if not any(count):
        return Finding(name, "clear", strongest)
    left = max(head.centred_ratio for head in (*k, *v))
    constant = left < OUTLIER
    return Finding(
        name,
        "found",
        f"{count[0]} in keys and {count[1]} in values, each above {OUTLIER:g} times its head's median rms",
        f"{strongest} ({side.upper()}, {where}); without the mean, at most {left:.1f} times",
        "They are constant for the most part: centring removes them."
        if constant
        else "They vary, so centring does not remove them: a scale shared with them wastes the bits of "
        "all other channels.",
        "Avoid one scale per token without centring (int)."
        if constant
        else "Give channels their own scales: sight, or kivi for keys. Avoid int per token.",
    )


def tails(figures: Figures) -> Finding:
    name = "heavy tails"
    heads = (*figures.heads("k"), *figures.heads("v"))
    tail, peak = max(head.kurtosis for head in heads), max(head.peak_ratio for head in heads)
    summary = f"excess kurtosis up to {tail:.1f}, peaks up to {peak:.1f} times a channel's rms"
    if tail < KURTOSIS and peak < PEAK:
        return Finding(name, "clear", summary)
    return Finding(
        name,
        "found",
        summary,
        meaning="A few tokens lie far outside. Static scales clip them, scales per token or block widen.",
        advice="Keep scales=fitted (sight's default). If the first positions stand out, keep them exact.",
    )


def sinks(figures: Figures) -> Finding:
    name = "sinks"
    if not figures.heard:
        return unheard(name)
    seen = [(layer.first_mass, layer) for layer in figures.layers if layer.first_mass is not None]
    if not seen:
        short = figures.length < 2 * FIRST
        why = f"windows of {figures.length} tokens are too short" if short else "no layer sees all tokens"
        return Finding(name, "unknown", why)
    masses, layer = max(seen, key=lambda pair: max(pair[0]))
    position = masses.index(max(masses))
    summary = f"position {position} draws {percent(max(masses))} of the attention in layer {layer.index}"
    count = sink_count(figures)
    if not count:
        return Finding(name, "clear", summary)
    strong = [layer.index for masses, layer in seen if max(masses) > sink_bar(figures.length)]
    assert layer.key_length is not None and layer.value_length is not None
    key, value = layer.key_length[position], layer.value_length[position]
    bits = count * (16 - BITS) / REFERENCE_LENGTH
    return Finding(
        name,
        "found",
        f"{summary}, where evenly spread attention gives it {percent(even_mass(figures.length))}",
        f"above {percent(sink_bar(figures.length))} in {layers(strong)}; its key is {key:.2g} and its "
        f"value {value:.2g} times as long as usual",
        "Nearly every query reads these keys, and scales fitted to other tokens may clip them.",
        f"--sinks {count} keeps {first_tokens(count)} exact for {bits:.2f} bits per element at "
        f"{REFERENCE_LENGTH:,} tokens, out of the same budget.",
    )


def sink_count(figures: Figures) -> int:
    """How many first positions to keep exact: up to the last one that is a sink in any layer."""
    bar = sink_bar(figures.length)
    masses = [layer.first_mass or () for layer in figures.layers]
    return max((i + 1 for mass in masses for i, share in enumerate(mass) if share > bar), default=0)


def sink_bar(length: int) -> float:
    """Attention above which a position is a sink, in windows of ``length`` tokens."""
    return max(SINK_MASS, SINK_OVER_EVEN * even_mass(length))


def even_mass(length: int) -> float:
    """What a first position draws when the queries of a window's second half look at all keys alike."""
    return mean(1 / seen for seen in range(length // 2 + 1, length + 1))


def directions(figures: Figures) -> Finding:
    name = "unequal directions"
    k, v = mean_gains(figures)
    summary = f"unequal bits save up to {k:.2f} bits per key element and {v:.2f} per value element"
    if max(k, v) < GAIN:
        return Finding(name, "clear", summary)
    known = [
        (head.metric_gain, head.leading_share)
        for head in figures.heads("k")
        if head.metric_gain is not None and head.leading_share is not None
    ]
    part, leading = mean(gain for gain, _ in known), mean(share for _, share in known)
    return Finding(
        name,
        "found",
        f"{summary}, at {BITS:g} bits",
        f"{part:.2f} of a key's come from the queries: {percent(leading)} of their energy lies in "
        f"{LEADING} of {figures.layers[0].key_dim} directions"
        if known
        else "from unequal variances of keys and values: queries were not seen",
        "Codes of one width, rotated or not (int, kivi, turboquant), give this away. The figures are for "
        "ideal Gaussian coders; real ones get a part.",
        "Use sight.",
    )


def mean_gains(figures: Figures) -> tuple[float, float]:
    """Gain in bits per element of keys and of values, over all heads."""
    return mean(h.gain for h in figures.heads("k")), mean(h.gain for h in figures.heads("v"))
