"""Texts, windows and loading: what goes in comes out exactly, or one clear line says why not."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from kvsight import assets
from kvsight.errors import KVSightError
from kvsight.integrations.loading import load_model
from kvsight.text import read_text, windows


@pytest.fixture(scope="module")
def embedded():
    return load_model()


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return embedded[1]


def reference_ids(text):
    tokenizer = tokenizers.Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "least"), [("calibration", 64), ("validation", 20), ("evaluation", 20)])
def test_embedded_texts_fill_the_defaults(tokenizer, name, least):
    assert len(windows(tokenizer, assets.text(name))) >= least


def test_embedded_texts_are_free_of_special_tokens_and_of_each_other():
    texts = [assets.text(name) for name in ("calibration", "validation", "evaluation")]
    assert not any("<|" in text or "\ufeff" in text or "\r" in text for text in texts)
    lines = [{line for line in text.splitlines() if len(line) > 80} for text in texts]
    assert lines[0].isdisjoint(lines[1] | lines[2])
    assert lines[1].isdisjoint(lines[2])


def test_every_embedded_text_has_a_licence():
    folder = assets.model_path().parent / "text"
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for path in folder.glob("*.txt"):
        assert f"`{path.name}`" in licences


def test_windows_are_the_text_from_its_start(tokenizer):
    text = assets.text("validation")[:20_000]
    got = windows(tokenizer, text, length=100)
    expected = reference_ids(text)
    assert got.dtype == torch.int64
    assert got.shape == (len(expected) // 100, 100)
    assert got.flatten().tolist() == expected[: got.numel()]


def test_windows_returns_at_most_count(tokenizer):
    text = assets.text("validation")[:20_000]
    every = windows(tokenizer, text, length=100)
    assert torch.equal(windows(tokenizer, text, length=100, count=3), every[:3])
    assert torch.equal(windows(tokenizer, text, length=100, count=10_000), every)


def test_windows_add_no_special_tokens():
    backend = tokenizers.Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert wrapped("An early spring")["input_ids"][0] == 0
    assert 0 not in windows(wrapped, "An early spring", length=2)


def test_windows_of_a_text_longer_than_the_model_are_silent(tokenizer, caplog):
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=16
    )
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        windows(wrapped, assets.text("validation")[:2_000], length=64)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_text_is_refused(tokenizer, text):
    with pytest.raises(KVSightError) as caught:
        windows(tokenizer, text, length=16)
    assert "text is empty" in one_line(caught)


def test_a_text_shorter_than_one_window_is_refused(tokenizer):
    text = assets.text("validation")[:20_000]
    tokens = len(reference_ids(text))
    assert windows(tokenizer, text, length=tokens).shape == (1, tokens)
    with pytest.raises(KVSightError) as caught:
        windows(tokenizer, text, length=tokens + 1)
    message = one_line(caught)
    assert f"{tokens} tokens" in message
    assert f"takes {tokens + 1}" in message
    assert "longer text" in message


@pytest.mark.parametrize(("length", "count"), [(1, None), (0, None), (-5, None), (16, 0)])
def test_windows_refuses_meaningless_sizes(tokenizer, length, count):
    with pytest.raises(KVSightError, match=r"or more; got"):
        windows(tokenizer, "some text", length=length, count=count)


def test_read_text_is_exact(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Größe\r\n and more\n".encode())
    assert read_text(path) == "Größe\r\n and more\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n", "is empty"), (b"a\xff", "not UTF-8")],
)
def test_read_text_names_what_is_wrong(tmp_path, content, words):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KVSightError) as caught:
        read_text(path)
    assert words in one_line(caught)
    assert str(path) in str(caught.value)


def test_read_text_refuses_a_directory(tmp_path):
    with pytest.raises(KVSightError, match="cannot be read"):
        read_text(tmp_path)


def tiny_model(directory, family="llama"):
    """A random model of the family in `directory`, beside the embedded tokenizer.json alone."""
    sizes = {
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    }[family]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=8192, bos_token_id=0, eos_token_id=0, **sizes
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    shutil.copy(assets.model_path() / "tokenizer.json", directory)
    return directory


def test_the_embedded_model_is_ready_for_measuring(embedded):
    model, _ = embedded
    assert not model.training
    assert model.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())


def test_the_embedded_model_is_trained(embedded, tokenizer):
    model, _ = embedded
    ids = windows(tokenizer, assets.text("evaluation"), length=512, count=1)
    loss = model(ids, labels=ids, use_cache=False).loss
    assert loss < 5.0  # ln 8192 = 9.0 for a model that knows nothing


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bare_tokenizer_file_is_reproduced_exactly(tmp_path, family):
    _, tokenizer = load_model(tiny_model(tmp_path, family), dtype=torch.bfloat16)
    text = assets.text("evaluation")[:30_000] + "\n  naïve 日本 \u200b <|endoftext|> 12,345.6\t!"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference_ids(text)


def test_load_model_takes_a_dtype_and_a_string(tmp_path):
    model, _ = load_model(str(tiny_model(tmp_path)), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_loading_is_silent_and_leaves_progress_bars_alone(tmp_path, capfd):
    tiny_model(tmp_path)
    capfd.readouterr()
    transformers.utils.logging.enable_progress_bar()
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "~/no-such-model", "a/b/c"])
def test_a_missing_model_is_one_line(path):
    with pytest.raises(KVSightError) as caught:
        load_model(path)
    assert f"Model directory {path} does not exist" in one_line(caught)


def test_a_file_is_no_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(KVSightError, match="is a file"):
        load_model(path)
    with pytest.raises(KVSightError, match=r"holds no config\.json"):
        load_model(assets.model_path().parent)


def damage_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_config(directory):
    (directory / "config.json").write_text("{")


def add_a_layer(directory):
    path = directory / "config.json"
    text = path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    path.write_text(text)


def remove_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_weights, damage_config, add_a_layer, remove_tokenizer],
    ids=lambda f: f.__name__,
)
def test_a_damaged_model_is_one_line(tmp_path, damage):
    damage(tiny_model(tmp_path))
    with pytest.raises(KVSightError) as caught:
        load_model(tmp_path)
    assert f"Model {tmp_path} cannot be loaded" in one_line(caught)


def test_missing_weights_are_never_filled_with_random_numbers(tmp_path):
    add_a_layer(tiny_model(tmp_path))
    with pytest.raises(KVSightError, match=r"lack \d+ weights, model\.layers\.2\."):
        load_model(tmp_path)


def test_text_and_assets_load_no_transformers():
    code = (
        "import sys, kvsight.text, kvsight.assets, kvsight.integrations.loading;"
        "sys.exit('transformers' in sys.modules)"
    )
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, check=False)
    assert done.returncode == 0
