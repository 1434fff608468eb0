"""Every architecture of transformers: right, or refused by name.

`make test-models` goes through all of them; a fixed sample of every kind runs with the other tests.
"""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", minversion="5.24")

import prism_cuda  # noqa: E402
from models.architectures import ARCHITECTURES  # noqa: E402
from models.checks import check  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

SPARSE, DENSE, REFUSED = "sparse", "dense", "refused"
SAMPLE = {
    "afmoe": SPARSE,  # full and windowed layers, some without rotation
    "bart": SPARSE,
    "bert": DENSE,  # sees everything
    "bloom": REFUSED,  # attends by itself
    "cohere2": SPARSE,
    "deepseek_v3": DENSE,  # v is narrower than q
    "deepseek_v32": DENSE,  # a trained sparse index
    "deepseek_v4": DENSE,  # terms added to masks
    "falcon": REFUSED,  # a table of its own
    "gemma2": SPARSE,  # soft caps
    "gemma3": SPARSE,
    "gemma4_text": SPARSE,  # shared keys
    "git": REFUSED,
    "gpt2": SPARSE,
    "gpt_oss": SPARSE,  # sinks
    "llama": SPARSE,
    "llama4_text": DENSE,  # chunked attention
    "llava": SPARSE,
    "mistral": SPARSE,  # windows only
    "mixtral": SPARSE,
    "nemotron_h": SPARSE,  # state-space layers
    "opt": SPARSE,
    "qwen2_5_vl": SPARSE,  # M-RoPE
    "t5": DENSE,  # position biases
    "xglm": REFUSED,
}
# What the rest of the suite goes through with other models.
QUICK = ("plain", "padded", "static cache", "from_pretrained")


def became(outcome: object) -> str:
    if outcome.refused:  # type: ignore[attr-defined]
        return REFUSED
    sparse = any(path == "prism" for path, _ in outcome.paths)  # type: ignore[attr-defined]
    return SPARSE if sparse else DENSE


@pytest.mark.parametrize("model_type", SAMPLE)
def test_sample(model_type: str) -> None:
    outcome = check(ARCHITECTURES[model_type], QUICK)
    assert outcome.unbuilt is None and not outcome.wrong
    assert became(outcome) == SAMPLE[model_type]


@pytest.mark.models
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all(model_type: str) -> None:
    outcome = check(ARCHITECTURES[model_type])
    if outcome.unbuilt is not None:
        pytest.skip(f"no tiny model: {outcome.unbuilt}")
    assert not outcome.wrong


@pytest.mark.parametrize("model_type", [name for name, how in SAMPLE.items() if how == REFUSED])
def test_refused_by_name_where_the_implementation_is_set(model_type: str) -> None:
    prism_cuda.register()
    architecture = ARCHITECTURES[model_type]
    with pytest.raises(NotImplementedError, match=f"prism: {architecture.class_name} "):
        architecture.model_class()._from_config(architecture.config(), attn_implementation="prism")
