"""A plan in one line, for people and as JSON."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsight.plan import Plan


def named(method: Any) -> str:
    """The method of both sides, or of each."""
    return method if isinstance(method, str) else ", ".join(f"{s}: {m}" for s, m in method.items())


def headline(plan: "Plan") -> str:
    sides = f"K {plan.key_bits:.3f}, V {plan.value_bits:.3f}"
    return f"{named(plan.method)}, {plan.true_bits:.3f} bits per cached element ({sides})"


def summary(plan: "Plan") -> dict[str, Any]:
    return {
        "method": plan.method,
        "true_bits": plan.true_bits,
        "key_bits": plan.key_bits,
        "value_bits": plan.value_bits,
        "reference_length": plan.reference_length,
        "cache_bytes": plan.nbytes(plan.reference_length),
        "static_bytes": plan.ledger().static_bytes,
    }
