"""lm-evaluation-harness on the packed cache. Importing this registers the model ``kvsight`` with it."""

from kvsight.integrations.lm_eval.model import KVSightLM

__all__ = ["KVSightLM"]
