"""Ways in which models are used that other attention packages have been reported to get wrong.

Every block kept, prism gives what eager attention gives, and its own kernel ran.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from helpers.models import TINY  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

NAMES = ("prism-uses", "prism-uses-bands")
LENGTH, PADDING = 200, 41
Model = Any  # one of transformers
Use = Callable[[Model], torch.Tensor]


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


X = ids(2, LENGTH)
MASK = torch.ones_like(X)
MASK[0, :PADDING] = 0
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def llama(**changes: int) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(8)
    return model.float().eval()


def real(model: Model, mask: torch.Tensor) -> torch.Tensor:
    """Logits of what counts."""
    return model(X, attention_mask=mask).logits[mask[:, :LENGTH].bool()]


def new_cache(model: Model) -> Any:
    return transformers.DynamicCache(config=model.config)


def beams(model: Model) -> torch.Tensor:
    return model.generate(X, attention_mask=MASK, num_beams=3, num_return_sequences=2, **GENERATE)


def embeddings(model: Model) -> torch.Tensor:
    embedded = model.get_input_embeddings()(X)
    return model.generate(inputs_embeds=embedded, attention_mask=MASK, num_beams=2, **GENERATE)


def shared_prefix(model: Model) -> torch.Tensor:
    cache = new_cache(model)
    model(X[:1, :100], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    return model(ids(3, 90, seed=5), past_key_values=cache).logits


def rolled_back(model: Model) -> torch.Tensor:
    cache = new_cache(model)
    model(X, past_key_values=cache)
    cache.crop(-80)
    return model(ids(2, 80, seed=4), past_key_values=cache).logits


def drafted(model: Model) -> torch.Tensor:
    drafter = llama(num_hidden_layers=1)
    return model.generate(X[:1], assistant_model=drafter, **GENERATE | {"max_new_tokens": 12})


def looked_up(model: Model) -> torch.Tensor:
    repeated = torch.cat([X[:1], X[:1, :100]], 1)
    return model.generate(repeated, prompt_lookup_num_tokens=5, **GENERATE | {"max_new_tokens": 12})


def padded_chunk(model: Model) -> torch.Tensor:
    """The first chunk of a row is padding alone."""
    mask = torch.ones_like(X)
    mask[0, :120] = 0
    cache = new_cache(model)
    model(X[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
    logits = model(X[:, 100:], attention_mask=mask, past_key_values=cache).logits
    return logits[mask[:, 100:].bool()]


def row_of_padding(model: Model) -> torch.Tensor:
    mask = MASK.clone()
    mask[1] = 0
    return real(model, mask)


def two_turns(model: Model) -> torch.Tensor:
    """Padding between turns, and positions that do not count it."""
    mask = MASK.clone()
    mask[1, 80:110] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(X, attention_mask=mask, position_ids=positions).logits[mask.bool()]


def long_mask(model: Model) -> torch.Tensor:
    """A mask that goes on behind the keys."""
    return real(model, torch.nn.functional.pad(MASK, (0, 60), value=1))


def static_chunks(model: Model) -> torch.Tensor:
    cache = transformers.StaticCache(config=model.config, max_cache_len=512)
    model(X[:, :100], attention_mask=MASK[:, :100], past_key_values=cache)
    return model(X[:, 100:], attention_mask=MASK, past_key_values=cache).logits


def checkpointed(model: Model) -> torch.Tensor:
    model.gradient_checkpointing_enable()
    return model.train()(X, use_cache=False).logits


class Adapted(torch.nn.Module):
    """A projection with a low-rank term, as adapters wrap them."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapters(model: Model) -> torch.Tensor:
    torch.manual_seed(3)
    for layer in model.model.layers:
        if not isinstance(layer.self_attn.q_proj, Adapted):
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
            layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    return real(model, MASK)


USES: tuple[Use, ...] = (
    beams,
    embeddings,
    shared_prefix,
    rolled_back,
    drafted,
    looked_up,
    padded_chunk,
    row_of_padding,
    two_turns,
    long_mask,
    static_chunks,
    checkpointed,
    adapters,
)


@torch.no_grad()
def run(model: Model, name: str, use: Use) -> tuple[torch.Tensor, set[str]]:
    """What the use gives, and the paths that its calls took."""
    model.set_attn_implementation(name)
    with prism_cuda.record() as recording:
        out = use(model)
    return out, {call.path for call in recording.calls}


def equals_eager(use: Use) -> None:
    for name, estimator in zip(NAMES, ("grid", "bands"), strict=True):
        config = PrismConfig(top_p=1.0, dense_below=0, block_size=64, estimator=estimator)
        prism_cuda.register(config, name)
    model = llama()
    expected, _ = run(model, "eager", use)
    for name in NAMES:
        actual, paths = run(model, name, use)
        assert "prism" in paths
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_equals_eager(use: Use) -> None:
    equals_eager(use)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool, torch.uint8], ids=str)
def test_masks_of_every_dtype(dtype: torch.dtype) -> None:
    equals_eager(lambda model: real(model, MASK.to(dtype)))


def under(mask: torch.Tensor, model: Model) -> torch.Tensor:
    return model(X, attention_mask=mask).logits


def test_a_bool_mask_of_queries_and_keys_says_what_an_additive_one_says() -> None:
    """Eager attention adds True as 1, so it is no measure of bool masks."""
    prism_cuda.register(PrismConfig(top_p=1.0, dense_below=0, block_size=64), NAMES[0])
    model = llama()
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, :, 150:, 20:40] = False
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, lowest)
    expected, _ = run(model, "eager", functools.partial(under, added))
    for mask in (seen, added):
        actual, _ = run(model, NAMES[0], functools.partial(under, mask))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_mask_of_one_row_is_read_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first layer; the layers then run without gathering their tensors."""
    from prism_cuda.integrations import masks

    prism_cuda.register(PrismConfig(top_p=1.0, dense_below=0, block_size=64), NAMES[0])
    model = llama()
    model.set_attn_implementation(NAMES[0])
    reads = []
    readable = masks._readable

    def counted(x: torch.Tensor) -> bool:
        reads.append(x.shape)
        return readable(x)

    monkeypatch.setattr(masks, "_readable", counted)
    with torch.no_grad(), prism_cuda.record() as recording:
        model(X[:1], attention_mask=torch.ones_like(X[:1]))
    assert len(reads) == 1 and len(recording.calls) == model.config.num_hidden_layers
