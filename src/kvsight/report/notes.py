"""What the page says the same way about all records: captions, and the meaning of its words."""

BUDGETS = (
    "Bits it lacks: how many more bits the best of the other methods needs for our KL; > where none "
    "reaches it with the bits that were tried. Every word is explained at the end of the page."
)
FRONTIER = (
    "Lower left is better. Bars are 95 % intervals over windows, diamonds the Pareto frontier, dashed "
    "lines methods of other libraries."
)
SPECTRA = (
    "The heads with the most and the fewest bits. Cost of an error: eigenvalues of Σ_q, what an error in "
    "each direction costs at the output. Variance: eigenvalues of Σ_k (of Σ_v for values). λ is both "
    "together, by coordinate: a coordinate with four times the λ gets one more bit, and those below the "
    "water line get none."
)
TASKS = (
    "Every arm is paired with the uncompressed model, sample by sample; in bold rows the 95 % interval of "
    "the difference leaves out 0, as one in twenty does by chance."
)
TIMES = "Median, and the 10th to 90th percentile; arms took turns."
FILLED = "Found by filling caches; the uncompressed one holds BF16."

NOTES = (
    (
        "Stored bits",
        "8 × bytes that the cache really holds ÷ numbers that it stands for, keys and values together. "
        "Scales, zero points, norms, padding and tokens kept exact are counted; an uncompressed cache "
        "has 16.",
    ),
    (
        "KL",
        "Kullback-Leibler divergence of the next-token distribution from the uncompressed model's, in "
        "nats per token, at every token of the text. 0 is no change. The 99th percentile is over tokens: "
        "the bad ones.",
    ),
    (
        "Intervals",
        "95 %, Student's t over windows of text or over samples of a task. Comparisons of two arms are "
        "paired: differences are taken window by window before the interval. One window has no interval.",
    ),
    (
        "Bits saved",
        "How many more bits the other methods together need for our KL, read off their Pareto frontier, "
        "log-linear between its points.",
    ),
    (
        "Same top token",
        "Share of positions where the most likely next token is the uncompressed model's.",
    ),
    (
        "Tokens until divergence",
        "Greedy continuations of a few prompts: tokens that agree with the uncompressed model's before "
        "the first that does not, at most as many as were generated.",
    ),
    (
        "Times smaller",
        "Against a 16-bit cache of the same tokens. What the plan itself stores is paid once per process "
        "and not in it.",
    ),
    (
        "Memory",
        "Caches filled with random numbers, without the model: bytes of their tensors, growth of the "
        "process, and the allocator's peak where the device counts it.",
    ),
)
