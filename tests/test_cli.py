"""The command line, with a tiny random model in place of the shipped one."""

from __future__ import annotations

import re

import pytest
import torch

import prism_cuda
from prism_cuda import cli, demo, ops

pytestmark = pytest.mark.usefixtures("needs_library")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet)
    bytes_only.train_from_iterator([], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for expected in (prism_cuda.__version__, torch.__version__, "archs", "decode", "block-sparse"):
        assert expected in out


def test_info_without_the_library(capsys, monkeypatch):
    monkeypatch.setattr(ops, "_library", None)
    assert cli.main(["info"]) == 0
    assert "make build" in capsys.readouterr().out


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "_library", None)
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "_C.abi3.so")
    with pytest.raises(ImportError, match="make build"):
        ops.load()


@pytest.mark.parametrize("estimator", ["bands", "grid"])
def test_demo(tiny_model, tmp_path, capsys, estimator):
    pytest.importorskip("matplotlib")
    image = tmp_path / "block_masks.png"
    arguments = ["--model", str(tiny_model), "--tokens", "4500", "--output", str(image)]
    assert cli.main(["demo", *arguments, "--layer", "1", "--estimator", estimator]) == 0
    out = capsys.readouterr().out
    assert image.stat().st_size > 1000
    perplexities = re.findall(r"^  (?:dense|prism)\b\D*([\d.]+)", out, re.MULTILINE)
    assert len(perplexities) == 2 and all(float(number) > 1 for number in perplexities)
    assert len(re.findall(r"^  [01] +prism", out, re.MULTILINE)) == 2
    assert "How to read" in out


@pytest.mark.parametrize(
    ("extra", "message"), [(["--layer", "7"], "expected 0 to 1"), (["--tokens", "100"], "no block")]
)
def test_demo_errors(tiny_model, tmp_path, capsys, extra, message):
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "x.png"), *extra]
    assert cli.main(["demo", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_demo_without_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "a" / "b.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="--model"):
        demo.default_model()
