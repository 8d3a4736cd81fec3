"""Records of one model are not mixed with those of another."""

import pytest
import torch

from kvsight.errors import KVSightError
from kvsight.eval.conditions import shared_conditions
from kvsight.records import Conditions, Records


def test_conditions_say_what_was_measured_with(model):
    said = shared_conditions(model("llama"), "tiny")
    assert set(said) == {"model", "fingerprint", "kvsight", "torch", "transformers", "device", "dtype"}
    assert (said["model"], said["device"], said["dtype"]) == ("tiny", "cpu", "float32")
    assert torch.__version__.startswith(said["torch"].partition("+")[0])


def test_another_model_is_another_file(model, tmp_path):
    Records.open(tmp_path, Conditions("compare", shared_conditions(model("llama"), "tiny"), {}))
    Records.open(tmp_path, Conditions("tasks", shared_conditions(model("llama"), "tiny"), {}))
    other = shared_conditions(model("gpt2"), "tiny")
    with pytest.raises(KVSightError, match="measured with fingerprint"):
        Records.open(tmp_path, Conditions("tasks", other, {}))
