"""``python -m prism_cuda tune`` on a tiny random model, and who reads the file that it writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prism_cuda
from prism_cuda import cli
from prism_cuda.integrations.vllm.settings import DENSE_BELOW, settings_of
from prism_cuda.tune.choice import choose

pytestmark = pytest.mark.usefixtures("needs_library")
LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    of_bytes = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[])
    )
    of_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes).save_pretrained(path)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def tune(folder: Path, out: Path, *more: str) -> int:
    return cli.main(
        ["tune", str(folder), "--out", str(out), "--lengths", "1024", "--windows", "1"]
        + ["--passes", "2", "--top-p", "0.2", "--device", "cpu", *more]
    )


@pytest.mark.parametrize("by", ["head", "layer"])
def test_tune(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, by: str) -> None:
    out = tmp_path / "prism.json"
    assert tune(folder, out, "--by", by) == 0
    printed = capsys.readouterr().out
    assert "tuned" in printed and "top_p 0.2" in printed and "dense" in printed
    config = prism_cuda.PrismConfig.load(out)
    assert config.own_layers() == [*range(LAYERS)]
    own = config.for_layer(1).top_p
    assert isinstance(own, tuple) and len(own) == HEADS if by == "head" else isinstance(own, float)
    report = json.loads((tmp_path / "prism.report.json").read_text())["rows"]
    rows = {row["setting"]: row for row in report}
    assert [*rows] == ["dense", "top_p 0.2", "tuned"]
    assert rows["dense"]["density"] == 1 > rows["top_p 0.2"]["density"]
    assert rows["dense"]["rise"]["rise"] == 0 == rows["dense"]["retrieval"]["loss"]
    assert {*rows["tuned"]["retrieval"]["tasks"]} == {"niah_multikey", "kv"}

    # The same command again has nothing left to do.
    from prism_cuda.tune.model import Model

    def refuse(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Model, "hidden", refuse)
    assert tune(folder, out, "--by", by) == 0
    monkeypatch.undo()
    # One more top_p is added, other windows are another run.
    assert tune(folder, out, "--by", by, "--top-p", "0.2", "0.5") == 0
    report = json.loads((tmp_path / "prism.report.json").read_text())["rows"]
    assert len(report) == 4
    assert tune(folder, out, "--by", by, "--windows", "2") == 1
    assert "windows 1 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "4096"], "--lengths: 4096; expected at most the model's 2048"),
        (["--lengths", "100"], "--lengths: 100; expected at least 256"),
        (["--like", "0.123"], "--like is 0.123; expected one of"),
        (["--windows", "0"], "--windows is 0; expected at least 1"),
        (["--top-p", "1.5"], "--top-p: 1.5; expected 0 to 1"),
        (["--text", __file__, "--passes", "20"], "test_tune.py has"),
    ],
)
def test_refuses(folder: Path, tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    assert tune(folder, tmp_path / "prism.json", *more) == 1
    assert message in capsys.readouterr().err


def test_choice_is_the_best_one() -> None:
    rng = np.random.default_rng(0)
    cost = np.sort(rng.random((3, 5)), 1)
    loss = np.sort(rng.random((3, 5)), 1)[:, ::-1]
    heads = np.arange(3)
    for limit in (0.3, 0.5, 0.7):
        chosen = choose(cost, loss, limit)
        assert cost[heads, chosen].mean() <= limit
        # No choice that costs no more loses less.
        for other in itertools.product(range(5), repeat=3):
            if cost[heads, other].sum() <= cost[heads, chosen].sum():
                assert loss[heads, other].sum() >= loss[heads, chosen].sum() - 1e-12


def test_the_file_is_read_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    from transformers import AttentionInterface

    path = tmp_path / "prism.json"
    path.write_text(json.dumps({"top_p": 0.9, "layers": {"1": {"top_p": [0.5, 0.99]}}}))
    config = prism_cuda.PrismConfig.load(path)
    for given in (path, str(path)):
        prism_cuda.register(given, "from_file")
        attention: Any = AttentionInterface._global_mapping["from_file"]
        assert attention.config == config
    found = settings_of({"prism": {"config": str(path), "keep_sink": 2}}).config
    assert (found.layers, found.top_p, found.keep_sink) == (config.layers, 0.9, 2)
    assert found.dense_below == DENSE_BELOW
    for wrong, message in ((3, "is 3; expected the path"), (str(tmp_path / "no"), "No such file")):
        with pytest.raises(ValueError, match=message):
            settings_of({"prism": {"config": wrong}})


def test_what_keeps_everything_spoils_nothing(folder: Path) -> None:
    from prism_cuda.tune.fit import Fit
    from prism_cuda.tune.model import Model
    from prism_cuda.tune.tasks import Sample

    prism_cuda.register(prism_cuda.PrismConfig())
    fit = Fit(Model(str(folder), torch.device("cpu")), prism_cuda.PrismConfig(), (0.2, 0.4, 1.0))
    fit.run(Sample(np.arange(1024) * 7 % 256))
    fit.close()
    assert [*fit.density] == [*fit.error] == [*range(LAYERS)]
    for density, error in zip(fit.density.values(), fit.error.values(), strict=True):
        assert density.shape == error.shape == (HEADS, 3)
        assert (density[:, 2] == 1).all() and (density[:, 0] < 1).all()
        assert (np.diff(density) >= 0).all()
        assert (error[:, 2] < 1e-12).all() and (error[:, 0] > 1e-9).all()
