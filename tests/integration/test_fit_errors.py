"""What ``fit`` refuses, and that it says so in one line that helps."""

import pytest
from zoo import batches

import kvsight
from kvsight.errors import KVSightError

KNOWN = f"Available: {', '.join(kvsight.methods())}."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits must be above 0 and at most 16; got 0."),
        ({"bits": -1.5}, "bits must be above 0 and at most 16; got -1.5."),
        ({"bits": 16.1}, "bits must be above 0 and at most 16; got 16.1."),
        ({"bits": float("nan")}, "bits must be above 0 and at most 16; got nan."),
        ({"bits": float("inf")}, "bits must be above 0 and at most 16; got inf."),
        ({"bits": 3, "key_bits": 20}, "bits must be above 0 and at most 16; got 20."),
        ({}, "no budget: give bits= (--bits), or key_bits= and value_bits= (--key-bits"),
        ({"key_bits": 3}, "no budget: give bits= (--bits), or key_bits= and value_bits= (--key-bits"),
        ({"bits": 3, "method": "sigth"}, f"unknown method 'sigth'. Did you mean sight? {KNOWN}"),
        ({"bits": 3, "method": "KIVI2"}, f"unknown method 'KIVI2'. {KNOWN}"),
        ({"bits": 3, "method": ""}, f"unknown method ''. {KNOWN}"),
        ({"bits": 3, "method": {"k": "sight", "v": "kvi"}}, f"'kvi'. Did you mean kivi? {KNOWN}"),
        (
            {"bits": 3, "method": {"k": "sight"}},
            "method is a name or {'k': name, 'v': name}; got keys ['k'].",
        ),
        (
            {"bits": 3, "options": {"shrnk": 1}},
            "sight has no option 'shrnk'; its options: codebook=fitted",
        ),
        (
            {"bits": 5, "method": "kivi", "options": {"axis": "x"}},
            "kivi has no option 'axis'; its options: gr",
        ),
        (
            {"bits": 3, "options": {"shrink": "much"}},
            "sight option 'shrink' takes float (default 0.001); got",
        ),
        ({"bits": 3, "options": {"codebook": "best"}}, "sight option 'codebook' is one of gaussian"),
        (
            {"bits": 6, "method": "int", "options": {"axis": "head"}},
            "int option 'axis' is 'token' or 'channel'",
        ),
        (
            {"bits": 6, "method": "turboquant", "options": {"rotation": "x"}},
            "is 'haar' or 'hadamard'; got 'x'",
        ),
        (
            {"bits": 6, "method": "kivi", "options": {"group": "a"}},
            "kivi option 'group' takes int (default 0)",
        ),
        ({"bits": 6, "method": "kivi", "options": {"group": -3}}, "group -3 does not fit 16 channels."),
        ({"bits": 3, "sinks": -1}, "sinks counts tokens and cannot be negative; got -1."),
        ({"bits": 3, "window": -7}, "window counts tokens and cannot be negative; got -7."),
        ({"bits": 3, "reference_length": 0}, "reference_length must be positive; got 0."),
        # below the smallest possible, for each method and for what exact tokens leave
        (
            {"bits": 0.3},
            "cannot be met: the cheapest feasible plan stores 0.5 (8,192 bytes). Raise the budget",
        ),
        (
            {"bits": 1.9, "method": "turboquant"},
            "turboquant cannot meet 1.9 bits; its cheapest configuration",
        ),
        (
            {"bits": 2.9, "method": "int"},
            "int cannot meet 2.9 bits; its cheapest configuration here stores 3.",
        ),
        (
            {"bits": 1.2, "method": "kivi"},
            "kivi cannot meet 1.2 bits; its cheapest configuration here stores",
        ),
        (
            {"bits": 8, "method": "identity"},
            "identity cannot meet 8 bits: it copies the model's own 32-bit numbers.",
        ),
        (
            {"bits": 4, "window": 512},
            "a budget of 4 bits per element (65,536 bytes at 1,024 tokens) cannot be met: the",
        ),
        (
            {"bits": 4, "method": "int", "window": 512},
            "int cannot meet 4 bits; its cheapest configuration here",
        ),
    ],
    ids=str,
)
def test_a_bad_request_is_one_clear_line(settings, message, model):
    with pytest.raises(KVSightError) as caught:
        kvsight.fit(model("llama"), batches(1), **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_request_costs_no_observation(model):
    """Names and numbers are checked before the model runs."""

    def never():
        raise AssertionError("the model was run")
        yield

    for settings in ({"bits": 0}, {"bits": 3, "method": "kvi"}, {"bits": 3, "sinks": -1}, {}):
        with pytest.raises(KVSightError):
            kvsight.fit(model("llama"), never(), **settings)


def test_numbers_may_come_as_text(model):
    made = kvsight.fit(model("llama"), batches(1), bits=4, options={"shrink": "0.01"})
    same = kvsight.fit(model("llama"), batches(1), bits=4, options={"shrink": 0.01})
    assert [row.true_bits for row in made.ledger()] == [row.true_bits for row in same.ledger()]
