"""The runner on a tiny random model: what it writes, resuming, and the numbers it derives."""

from __future__ import annotations

import json
from pathlib import Path

import frontier
import numpy as np
import pytest
import summary
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ARGUMENTS = ["--lengths", "640", "--methods", "prism", "prism_t", "oracle_p", "--main-only"]
ARGUMENTS += ["--windows", "2", "--instances", "2", "--tasks", "copy", "niah_single"]
ARGUMENTS += ["--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained model with a byte tokenizer, and a text to hold out."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(vocab)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(map(str, range(1500))))
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    frontier.main(arguments(model, out))
    return out


def arguments(model: Path, out: Path) -> list[str]:
    text = ["--text", str(model / "text.txt")]
    return [*ARGUMENTS, *text, "--model", str(model), "--out", str(out)]


def test_results_hold_every_piece(finished) -> None:
    data = json.loads((finished / "frontier.json").read_text())
    knobs = {"dense": 1.0, "prism": 0.95, "prism_t": 0.005, "oracle_p": 0.95}
    assert set(data["model"]) == {f"640/{name}/{knob}" for name, knob in knobs.items()}
    assert set(data["heads"]) == {f"640/{name}" for name in knobs}
    dense = data["model"]["640/dense/1.0"]
    assert dense["density"] == 1 and len(dense["nats"]) == 2
    assert dense["tasks"]["niah_single"]["answers"] == 2
    for row in data["heads"]["640/dense"]:
        assert row["recall"] == pytest.approx([1, 1], abs=1e-4)
        assert row["error"] == pytest.approx([0, 0], abs=1e-4)
    for row in data["heads"]["640/oracle_p"]:
        assert len(row["density"]) == 2 and 0.5 < min(row["recall"]) <= 1
    assert {path.name for path in finished.glob("*.png")} >= {"heads_640.png", "model_640.png"}


def test_a_second_run_continues(finished, model, monkeypatch) -> None:
    path = finished / "frontier.json"
    data = json.loads(path.read_text())
    kept = data["model"]["640/prism/0.95"]
    del data["model"]["640/prism_t/0.005"], data["heads"]["640/oracle_p"]
    path.write_text(json.dumps(data))
    measured = []
    real = frontier.measure
    monkeypatch.setattr(frontier, "measure", lambda *args: measured.append(args) or real(*args))
    frontier.main(arguments(model, finished))
    again = json.loads(path.read_text())
    assert len(measured) == 1
    assert again["model"]["640/prism/0.95"] == kept
    assert "640/prism_t/0.005" in again["model"] and "640/oracle_p" in again["heads"]


def test_other_settings_are_refused(finished) -> None:
    before = (finished / "frontier.json").read_bytes()
    with pytest.raises(SystemExit, match="of another run.*'another'"):
        frontier.Results(finished / "frontier.json", {"model": "another"})
    assert (finished / "frontier.json").read_bytes() == before


@pytest.mark.parametrize("wrong", [["--tasks", "nonesuch"], ["--passes", "modell"]])
def test_unknown_choices_are_refused_before_a_model_loads(wrong, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        frontier.main(["--model", "nowhere", "--out", str(tmp_path), *wrong])
    assert wrong[1] in capsys.readouterr().err


def test_windows_that_would_overlap_are_refused() -> None:
    from evaluate import Suite, Texts

    with pytest.raises(ValueError, match="3 windows of 640 tokens overlap in 2000"):
        Texts.build(Suite(640, 3, 0, 2, ()), np.arange(2000), None)


def test_unknown_methods_are_named() -> None:
    with pytest.raises(SystemExit, match="nonesuch"):
        frontier.chosen_methods(["prism", "nonesuch"])


def test_other_settings_of_p_leave_thresholds_alone() -> None:
    dense, prism, threshold = frontier.chosen_methods(["prism", "fine_t"], [0.97, 0.5])
    assert dense.knobs == (1.0,) and prism.knobs == (0.5, 0.97)
    assert threshold.knobs == frontier.METHODS["fine_t"].knobs


def test_dense_attention_of_the_runner_is_the_model_s_own(model) -> None:
    import capture
    from evaluate import hidden_states
    from methods import METHODS

    ours, _ = frontier.load(model, torch.device("cpu"))
    ids = np.arange(700) % 200
    with capture.handling(capture.Selecting(METHODS["prism"], 1.0)):
        full = hidden_states(ours, ids)
    ours.set_attn_implementation("sdpa")
    torch.testing.assert_close(full, hidden_states(ours, ids), rtol=1e-3, atol=1e-4)


def test_density_needed() -> None:
    curve = [(0.1, 0.4), (0.2, 0.1), (0.4, 0.001), (0.6, -0.001)]
    assert summary.density_needed(curve, 0.2) == pytest.approx(0.15)
    assert summary.density_needed(curve, 0.01) == pytest.approx(0.3)
    assert summary.density_needed(curve, 1.0) == 0.1
    assert summary.density_needed(curve[:3], 0.0005) is None
    assert summary.density_needed([], 0.1) is None
    # A dip before a worse setting does not count: from there on the loss must hold.
    assert summary.density_needed([(0.1, 0.0), (0.2, 1.0), (0.3, 0.01)], 0.1) == pytest.approx(0.25)


def test_targets_are_shares_of_official_prism(capsys) -> None:
    def entry(method: str, density: float, nats: float, copy: float, chain: float) -> dict:
        tasks = {"copy": {"token_accuracy": copy}, "variable_tracking": {"token_accuracy": chain}}
        return {
            **dict(method=method, length=64, density=density, nats=[nats], tasks=tasks),
            "estimate_ms": 1.0,
        }

    entries = [
        entry("dense", 1.0, 1.0, 1.0, 0.7),
        entry("prism", 0.8, 1.0, 1.0, 0.7),
        entry("fine", 0.4, 1.0, 1.0, 0.6),  # what it loses is no retrieval
    ]
    data = {"heads": {}, "model": {str(i): row for i, row in enumerate(entries)}}
    assert summary.model_curves(data, 64, "retrieval")["fine"] == [(0.4, 0.0)]
    assert summary.model_curves(data, 64, "accuracy")["fine"] == [(0.4, pytest.approx(0.05))]
    summary.print_tables(data)
    printed = capsys.readouterr().out.split("densities for the targets")[1]
    (fine,) = (line.split() for line in printed.splitlines() if "fine" in line)
    assert fine == ["fine", "0.400", "0.500", "-", "-", "0.400", "0.500"]
