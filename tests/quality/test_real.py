"""The evaluation of real models, on a tiny random one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "quality" / "real"))
import attend_kept as attention  # noqa: E402
import run  # noqa: E402
import scoring  # noqa: E402
import selection  # noqa: E402
import texts  # noqa: E402
import tune  # noqa: E402

from prism_cuda import reference  # noqa: E402
from prism_cuda.tune import bounds  # noqa: E402
from prism_cuda.tune.tasks import Encoder, make  # noqa: E402

LENGTH = 640


def _inputs(heads: int = 4, kv_heads: int = 2, length: int = LENGTH, dim: int = 64):
    torch.manual_seed(0)
    return (torch.randn(n, length, dim) for n in (heads, kv_heads, kv_heads))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and texts of every role."""
    folder = tmp_path_factory.mktemp("real")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in (name for names in texts.PROSE.values() for name in names):
        (folder / f"{name}.txt").write_text(f"{name} " + " ".join(map(str, range(40000))))
    return folder


def test_attention_keeps_exactly_the_mask() -> None:
    q, k, v = _inputs()
    visible = selection.visible_blocks(LENGTH, q.device)
    forced = selection.forced_blocks(LENGTH, q.device)
    mask = ((torch.rand(4, *visible.shape) < 0.4) | forced) & visible
    tokens = mask.repeat_interleave(128, 1).repeat_interleave(64, 2)
    tokens &= torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], tokens[None], enable_gqa=True
    )[0]
    torch.testing.assert_close(attention.attend(q, k, v, mask, 64**-0.5), expected)


@pytest.mark.parametrize("window", [None, 100])
def test_decoding_is_the_last_row_of_dense_attention(window) -> None:
    q, k, v = _inputs()
    lengths = torch.tensor([500, 77])
    own = tuple(x[:, 600:603].expand(2, -1, -1, -1) for x in (k, v))
    out = attention.decode(q[:, :2].transpose(0, 1), (k, v), own, lengths, 64**-0.5, window)
    for i, length in enumerate(lengths):
        keys, values = (torch.cat([x[:, :length], x[:, 600:603]], 1) for x in (k, v))
        if window:
            keys, values = keys[:, -window:], values[:, -window:]
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, i : i + 1], keys[None], values[None], enable_gqa=True
        )[0, :, 0]
        torch.testing.assert_close(out[i], expected)


def test_the_grid_is_the_package_s() -> None:
    q, k, _ = _inputs()
    (masses,) = selection.METHODS["grid"].score(q * 3, k)
    vectors = reference.cell_statistics(k[None])
    expected = reference.grid_masses(q[None] * 3, vectors, LENGTH, 64**-0.5, True, 128, 64)
    torch.testing.assert_close(masses[None], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in selection.METHODS if name != "dense"])
def test_masks_are_causal_and_keep_sink_and_diagonal(name) -> None:
    q, k, _ = _inputs()
    method = selection.METHODS[name]
    visible = selection.visible_blocks(LENGTH, q.device)
    knobs = (0.3, 0.05) if method.rule is selection.above else (0.3, 0.9)
    sparse, fuller = (method.mask(q * 4, k, knob) for knob in knobs)
    assert not (sparse & ~visible).any() and not (sparse & ~fuller).any()
    assert sparse[:, selection.forced_blocks(LENGTH, q.device)].all()
    assert selection.density(fuller).max() <= 1
    per_head = torch.tensor([knobs[0], knobs[1], knobs[0], knobs[1]])[:, None, None]
    mixed = method.mask(q * 4, k, per_head)
    assert torch.equal(mixed[0], sparse[0]) and torch.equal(mixed[1], fuller[1])


def test_windows_do_not_overlap() -> None:
    tokens = {"a": np.arange(1000), "b": np.arange(10_000, 10_500)}
    found = list(texts.windows(tokens, 100, 15, np.random.default_rng(0)))
    seen = np.concatenate([window for _, window in found])
    assert len(seen) == len(set(seen)) == 1500
    with pytest.raises(ValueError, match="16 windows of 100"):
        list(texts.windows(tokens, 100, 16, np.random.default_rng(0)))


def test_roles_share_no_text(folder) -> None:
    words = [set(texts.code(role).split("\n# ")[0].split("\n")[:1]) for role in texts.PROSE]
    assert len(set.union(*words)) == 3
    names = [name for names in texts.PROSE.values() for name in names]
    assert len(names) == len(set(names))
    assert texts.read(folder, "test")["cfi"][:10] not in ("cfi 0 1 2 ", "")


def test_bounds_enclose_the_loss() -> None:
    rng = np.random.default_rng(0)
    dense = {"t": np.stack([rng.integers(20, 32, 40), np.full(40, 32)], 1)}
    ours = {"t": np.stack([dense["t"][:, 0] - rng.integers(0, 5, 40), np.full(40, 32)], 1)}
    found = bounds.accuracy_loss(ours, dense)
    assert found["low"] < found["loss"] < found["high"] < found["low"] + 6
    same = bounds.accuracy_loss(dense, dense)
    assert same["loss"] == same["low"] == same["high"] == 0
    rise = bounds.perplexity_rise(np.full(8, 2.01), np.full(8, 2.0))
    assert rise["rise"] == pytest.approx(1.005, abs=0.01)


def test_greedy_answers_of_dense_attention_are_those_of_the_model(folder) -> None:
    model, tokenizer = scoring.load(folder, torch.device("cpu"))
    runner = scoring.Runner(model)
    filler = np.arange(LENGTH) % 100
    sample = make("niah_single", np.random.default_rng(0), Encoder(tokenizer), filler, 2)
    done = runner.prefill(sample.ids, selection.METHODS["dense"], 1, keep_cache=True)
    hits = runner.greedy(sample, done)
    model.set_attn_implementation("sdpa")
    for answer, found in zip(sample.answers, hits, strict=True):
        prompt = torch.tensor(sample.ids[None, : answer.start])
        size = answer.stop - answer.start
        said = model.generate(prompt, max_new_tokens=size, min_new_tokens=size, do_sample=False)
        expected = said[0, answer.start :].numpy() == sample.ids[answer]
        assert found.tolist() == expected.tolist()


def test_a_run_resumes_and_refuses_another(folder, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    arguments = ["--model", str(folder), "--texts", str(folder), "--out", str(out)]
    arguments += ["--lengths", str(LENGTH), "--settings", "prism:0.2", "true_raw:0.1"]
    arguments += ["--windows", "2", "--samples", "1", "--instances", "2", "--device", "cpu"]
    arguments += ["--tasks", "niah_single", "copy"]
    run.main(arguments)
    data = json.loads(out.read_text())
    assert len(data["rows"]) == 3 * 4
    assert "prism:0.2" in capsys.readouterr().out
    entry = run.summarize(data, LENGTH)[0]
    assert 0 < entry["density"] < 1 and entry["perplexity"]["windows"] == 2
    run.main(arguments)
    assert json.loads(out.read_text()) == data
    with pytest.raises(SystemExit, match="'seed'.*(0, 5)"):
        run.main([*arguments, "--seed", "5"])
    with pytest.raises(SystemExit, match="1024"):
        run.main([*arguments, "--lengths", "1280"])


def test_knobs_are_chosen_for_the_least_error() -> None:
    density = np.array([[0.1, 0.5], [0.1, 0.5], [0.1, 0.5], [0.1, 0.5]])
    error = np.array([[9.0, 0.0], [1.0, 0.0], [8.0, 0.0], [0.0, 0.0]])
    assert tune.choose(density, error, 0.3).tolist() == [1, 0, 1, 0]
