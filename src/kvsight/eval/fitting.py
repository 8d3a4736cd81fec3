"""Plans of many methods from one observation of the model, each as ``fit`` would make it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial

from torch import Tensor
from transformers import PreTrainedModel

from kvsight.eval.arms import OURS, Contender
from kvsight.fit import (
    choose_sinks,
    digest_ids,
    gather_stats,
    make_request,
    plan_from_stats,
    prepare_from_stats,
    settled,
    trial_probe,
)
from kvsight.plan import Plan
from kvsight.probe import Probe
from kvsight.spend import Prepared
from kvsight.stats import Stats
from kvsight.trace import Progress


class Lab:
    """Calibration: observed once, when the first plan needs it."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        provenance: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        self.model, self.progress = model, progress
        self.batches = list(ids.split(1))
        self.notes = {
            "calibration_sha256": digest_ids(self.batches),
            "calibration_tokens": str(ids.numel()),
            **provenance,
        }

    @cached_property
    def stats(self) -> Stats:
        return gather_stats(self.model, self.batches, make_request(OURS, 3.0), "gradient", self.progress)

    @cached_property
    def probe(self) -> Probe:
        return trial_probe(self.model, self.batches)


class Fitter:
    """Plans of one method, as ``fit`` would make them, from shared statistics."""

    def __init__(self, lab: Lab, contender: Contender) -> None:
        self.lab, self.contender = lab, contender
        # before any budget: what fails here is no refusal
        self.stats = lab.stats
        self._prepared: Prepared | None = None

    def plan(self, bits: float) -> Plan:
        lab = self.lab
        request = make_request(self.contender.method, bits, options=self.contender.options)
        request = settled(replace(request, sinks=None), self.stats)
        if self._prepared is None:
            self._prepared = prepare_from_stats(lab.model, self.stats, request, lab.progress)
        make = partial(plan_from_stats, lab.model, self.stats, prepared=self._prepared)
        request = choose_sinks(make, lab.probe, self.stats, request, None, None)
        return make(request, lab.notes)
