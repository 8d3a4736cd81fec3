"""Checks of how a model is built, as its cache and its attention show it."""

from kvsight.doctor.figures import Figures
from kvsight.doctor.findings import Finding, either, layers, mean, percent, ranges, unheard

# one fp16 norm per token costs more than a quarter of a bit
SMALL_HEAD = 64


def unpacked(figures: Figures) -> Finding:
    name = "unpacked layers"
    if not figures.unpacked:
        return Finding(name, "clear", "every layer keeps keys and values")
    kinds = ", ".join(sorted(set(figures.unpacked.values())))
    return Finding(
        name,
        "found",
        f"{layers(figures.unpacked)} of the kind {kinds}",
        meaning="They keep another state and stay as transformers made them. True bits count the other "
        "layers only.",
        advice="Count the memory of their state apart when you compare sizes.",
    )


def queries(figures: Figures) -> Finding:
    name = "hidden queries"
    if figures.heard:
        return Finding(name, "clear", "attention goes through transformers' interface")
    return Finding(
        name,
        "found",
        "the model does not use transformers' attention interface",
        meaning="Queries are not seen, so keys use storage error, and attention decodes the cache on read.",
        advice="Expect a smaller cache, but no attention on codes.",
    )


def latents(figures: Figures) -> Finding:
    name = "MLA"
    if not figures.heard:
        return unheard(name)
    latent = [layer for layer in figures.layers if layer.latent]
    if not latent:
        return Finding(name, "clear", "attention reads the keys that are cached")
    one = latent[0]
    return Finding(
        name,
        "found",
        f"{layers(layer.index for layer in latent)}: latents are cached and expanded before attention",
        f"{one.kv_heads} x ({one.key_dim} + {one.value_dim}) numbers per token for {one.query_heads} heads",
        "No query meets what is stored: keys and values use storage error, and attention decodes the "
        "cache on read.",
        "Judge the plan with kvsight eval; what queries add to a plan is missing here.",
    )


def sink_logits(figures: Figures) -> Finding:
    name = "sink logits"
    if not figures.heard:
        return unheard(name)
    masses = [layer.logit_mass for layer in figures.layers if layer.logit_mass is not None]
    if not masses:
        return Finding(name, "clear", "all attention goes to tokens")
    return Finding(
        name,
        "found",
        f"an extra logit per head draws {percent(mean(masses))} of the attention",
        meaning="Heads can look at nothing, so first tokens need not serve as sinks. A constant in all "
        "scores does count here: kvsight adds the mean's part back, so centring stays exact.",
    )


def softcap(figures: Figures) -> Finding:
    name = "softcap"
    if not figures.heard:
        return unheard(name)
    caps = sorted({layer.softcap for layer in figures.layers if layer.softcap is not None})
    if not caps:
        return Finding(name, "clear", "scores are not capped")
    return Finding(
        name,
        "found",
        f"scores are capped at {', '.join(f'{cap:g}' for cap in caps)}",
        meaning="The cap flattens large scores: errors in them cost less than the query metric says. "
        "kvsight adds the mean's part back before the cap, so centring stays exact.",
    )


def qk_norm(figures: Figures) -> Finding:
    name = "QK-norm"
    if not figures.qk_norm:
        return Finding(name, "clear", "no norms of queries and keys by their usual names")
    variation = mean(head.norm_variation for head in figures.heads("k"))
    dim = figures.layers[0].key_dim
    return Finding(
        name,
        "found",
        f"queries and keys are normalised ({', '.join(figures.qk_norm)})",
        f"key norms vary by {percent(variation)} within a head",
        "A norm stored per token says little. The norm's weights decide which channels are strong.",
        f"Prefer formats without one: sight stores none, turboquant's costs {16 / dim:.2f} bits.",
    )


def gqa(figures: Figures) -> Finding:
    name = "GQA"
    if not figures.heard:
        return unheard(name)
    ratios = sorted(
        {
            layer.query_heads // layer.kv_heads
            for layer in figures.layers
            if layer.query_heads is not None and not layer.latent
        }
    )
    if ratios in ([], [1]):
        return Finding(name, "clear", "no query heads share cached keys of their own")
    return Finding(
        name,
        "found",
        f"{either(ratios)} query heads share each KV head",
        meaning="All of them feel every stored error: the metrics pool their queries and sum their output "
        "projections.",
    )


def sliding(figures: Figures) -> Finding:
    name = "sliding layers"
    windows = {layer.index: layer.window for layer in figures.layers if layer.window is not None}
    if not windows:
        return Finding(name, "clear", "every cached layer sees all tokens")
    full = len(figures.layers) - len(windows)
    return Finding(
        name,
        "found",
        f"{layers(windows)}: the last {either(sorted(set(windows.values())))} tokens only; full attention "
        f"in {full} of {len(figures.layers)} layers",
        meaning="A sliding layer stops growing at its window: long contexts are paid for by the others. "
        "It keeps no sinks.",
    )


def shared(figures: Figures) -> Finding:
    name = "shared layers"
    if not figures.heard:
        return unheard(name)
    pairs = [
        f"{layer.index} by {ranges(others)}"
        for layer in figures.layers
        if (others := set(layer.readers) - {layer.index})
    ]
    if not pairs:
        return Finding(name, "clear", "every attention layer reads its own cache")
    return Finding(
        name,
        "found",
        f"cached layers are read by later ones too: {'; '.join(pairs)}",
        meaning="Every reader feels an error: the key metric pools the queries of all, the value metric is "
        "that of the layer itself.",
    )


def head_dim(figures: Figures) -> Finding:
    name = "head_dim"
    shapes = sorted({(layer.key_dim, layer.value_dim) for layer in figures.layers})
    dims = sorted({dim for shape in shapes for dim in shape})
    said = " or ".join(f"{k}" if k == v else f"{k} for K and {v} for V" for k, v in shapes)
    powers = all(dim & (dim - 1) == 0 for dim in dims)
    if len(dims) == 1 and powers and dims[0] >= SMALL_HEAD:
        return Finding(name, "clear", said)
    step = max(8 / (layer.kv_heads * min(layer.key_dim, layer.value_dim)) for layer in figures.layers)
    parts = [f"Rows are whole bytes: a layer's bits move in steps of up to {step:.2g}."]
    if dims[0] < SMALL_HEAD:
        parts.append(f"A norm per token (turboquant) costs {16 / dims[0]:.2f} bits.")
    if not powers:
        parts.append("No plain Hadamard matrix fits; rotation=hadamard mixes with a Hartley factor.")
    return Finding(name, "found", said, meaning=" ".join(parts))
