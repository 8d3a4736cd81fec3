"""All of memory and speed for some plans, as records: ``memory``, ``speed``, ``break_even``."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsight.errors import KVSightError
from kvsight.eval import memory, speed
from kvsight.eval.arms import UNCOMPRESSED
from kvsight.eval.caches import Arm, layer_shapes
from kvsight.eval.speed import Runs
from kvsight.fingerprint import check_model
from kvsight.planfile import plan_hash
from kvsight.records import Records
from kvsight.trace import Progress


@dataclass(frozen=True)
class Settings:
    """Context lengths and batch to measure at, the memory budget [bytes] to fill, and how often to time."""

    contexts: tuple[int, ...] = (512, 1024, 2048)
    batch: int = 1
    budget: int = 256_000_000
    runs: Runs = field(default_factory=Runs)

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 16 or len(set(self.contexts)) < len(self.contexts):
            raise KVSightError(f"contexts are different lengths of 16 tokens or more; got {self.contexts}.")
        if self.batch < 1:
            raise KVSightError(f"the batch is 1 or more; got {self.batch}.")


@dataclass(frozen=True, eq=False)
class Bench:
    """What is measured: one uncompressed arm and one per plan of ``model``, on any text ``ids`` [N].

    Raises ``KVSightError`` for plans of another model, plans of one name, and contexts beyond the model.
    """

    model: PreTrainedModel
    plans: tuple[Arm, ...]
    ids: Tensor
    settings: Settings

    def __post_init__(self) -> None:
        for arm in self.plans:
            assert arm.plan is not None
            check_model(arm.plan, self.model)
        names = [arm.name for arm in self.plans]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise KVSightError(f"two plans are both {twice[0]}; give plans of different methods or bits.")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(self.settings.contexts)
        if limit is not None and longest > limit:
            raise KVSightError(f"the model reads {limit} tokens, got a context of {longest}; shorten it.")

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (Arm(UNCOMPRESSED), *self.plans)

    @property
    def place(self) -> memory.Place:
        plan = self.plans[0].plan
        assert plan is not None
        return memory.Place(self.model.config, layer_shapes(plan), self.model.device)

    def own_conditions(self) -> dict[str, str | int | float]:
        """``Conditions.own`` of the command ``bench``."""
        hashes = ((arm.name, plan_hash(arm.plan)) for arm in self.plans if arm.plan is not None)
        return {
            "plans": ", ".join(f"{name} {sha[:12]}" for name, sha in hashes),
            "contexts": ",".join(map(str, self.settings.contexts)),
            "batch": self.settings.batch,
            "budget_bytes": self.settings.budget,
            "threads": torch.get_num_threads(),
        }


def measure(bench: Bench, records: Records, progress: Progress | None = None) -> None:
    """Measure what ``records`` does not hold yet."""
    say = progress or (lambda stage, done, total: None)
    # memory first: what timing leaves behind in the process would blur the resident set
    _measure_memory(bench, records, say)
    for tokens in bench.settings.contexts:
        _measure_speed(bench, tokens, records, say)
    for arm in bench.plans:
        if records.get("break_even", (arm.name,)) is None:
            stock, packed = (_decode(records, name) for name in (UNCOMPRESSED, arm.name))
            row = {"arm": arm.name, "tokens": speed.break_even(stock, packed)}
            records.append("break_even", (arm.name,), row)


def _measure_memory(bench: Bench, records: Records, say: Progress) -> None:
    batch = bench.settings.batch
    pairs = [(arm, tokens) for arm in bench.arms for tokens in bench.settings.contexts]
    for done, (arm, tokens) in enumerate(pairs, start=1):
        if records.get("memory", (arm.name, tokens)) is None:
            took = memory.footprint(arm, bench.place, tokens, batch)
            row = {"arm": arm.name, "tokens": tokens, "batch": batch, **asdict(took)}
            records.append("memory", (arm.name, tokens), row)
        say("memory", done, len(pairs))
    for arm in bench.arms:
        if records.get("memory", (arm.name, "fit")) is None:
            records.append("memory", (arm.name, "fit"), _fit(arm, bench, say))


def _fit(arm: Arm, bench: Bench, say: Progress) -> dict[str, str | int | None]:
    length, budget = max(bench.settings.contexts), bench.settings.budget

    def filled(held: int) -> None:
        say(f"fill with {arm.name} [MiB]", held >> 20, budget >> 20)

    return {
        "arm": arm.name,
        "budget_bytes": budget,
        "longest_context": memory.longest_context(arm, bench.place, budget, filled),
        "largest_batch": memory.largest_batch(arm, bench.place, length, budget),
        "at_length": length,
    }


def _measure_speed(bench: Bench, tokens: int, records: Records, say: Progress) -> None:
    """Speed at one context. Arms are timed together, so all of them again where one is missing."""
    batch, runs = bench.settings.batch, bench.settings.runs
    missing = [arm for arm in bench.arms if records.get("speed", (arm.name, tokens, batch)) is None]
    if not missing:
        return

    def ran(done: int, total: int) -> None:
        say(f"speed at {tokens:,}", done, total)

    size = tokens + runs.steps
    text = bench.ids.repeat(-(-size // len(bench.ids)))[:size].expand(batch, -1).to(bench.model.device)
    found = speed.timings(bench.model, bench.arms, bench.place.shapes, text, runs, ran)
    for arm in missing:
        timing = found[arm.name]
        row = {
            "arm": arm.name,
            "tokens": tokens,
            "batch": batch,
            "prefill_ms": asdict(timing.prefill),
            "encode_ms": asdict(timing.encode),
            "decode_ms_per_token": asdict(timing.decode),
            "device": _device_name(bench.model.device),
            "threads": torch.get_num_threads(),
        }
        records.append("speed", (arm.name, tokens, batch), row)


def _decode(records: Records, name: str) -> dict[int, float]:
    rows = (row for row in records.of("speed") if row["arm"] == name)
    return {row["tokens"]: row["decode_ms_per_token"]["median"] for row in rows}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
