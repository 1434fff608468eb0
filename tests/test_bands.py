"""The band split against the attenuation criterion and the published settings."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from prism_cuda import bands

RANGES_64_96 = ([0, 32, 64, 96], [16, 64, 80, 128])


def llama3_frequencies() -> torch.Tensor:
    """Llama-3.1's inverse frequencies: base 5e5, slowed 8 times beyond 8192 / 1 tokens."""
    inv_freq = 5e5 ** -(torch.arange(0, 128, 2).double() / 128)
    wavelength = 2 * math.pi / inv_freq
    smooth = ((8192 / wavelength - 1) / 3).clamp(0, 1)
    return inv_freq * (smooth + (1 - smooth) / 8)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("freq", [1e6, 5e5, llama3_frequencies()], ids=["qwen3", "5e5", "llama3.1"])
def test_published_split(freq, block_size):
    split = bands.split(freq, 128, block_size)
    assert (split.high, split.low) == (64, 96)
    assert split.ranges == RANGES_64_96


@pytest.mark.parametrize("inv_freq", [1.0, 0.1, 0.01, 1e-4])
def test_attenuation_is_what_pooling_does(inv_freq):
    turned = torch.polar(torch.ones(128).double(), torch.arange(128).double() * inv_freq)
    assert bands.attenuation(inv_freq, 128) == pytest.approx(float(turned.mean().abs()), abs=1e-12)


def test_unrotated_pairs_are_not_attenuated():
    assert bands.attenuation(0.0, 128) == 1.0


@pytest.mark.parametrize("theta", [1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bands_meet_the_criterion(theta, head_dim):
    pairs = head_dim // 2
    split = bands.split(theta, head_dim)
    frequencies = [theta ** (-j / pairs) for j in range(pairs)]
    for j in range(pairs - split.low // 2, pairs):
        assert 128 * frequencies[j] < 2 * math.pi
    for j in range(split.high // 2, pairs):
        assert bands.attenuation(frequencies[j], 128) >= bands.RECOVERED
    assert split.high + split.low > head_dim
    assert split.high % (head_dim // 4) == split.low % (head_dim // 4) == 0


def test_interleaved_layout():
    split = bands.split(1e6, 128, layout="interleaved")
    assert split.ranges == ([0, 64], [32, 128])


@pytest.mark.parametrize(
    ("layout", "high", "low"),
    [("half", [0, 16, 32, 48], [8, 32, 40, 128]), ("interleaved", [0, 32], [16, 128])],
)
def test_partial_rotary(layout, high, low):
    """The un-rotated dimensions 64 to 128 belong to the low band."""
    inv_freq = 1e6 ** -(torch.arange(0, 64, 2).double() / 64)
    assert bands.split(inv_freq, 128, layout=layout).ranges == (high, low)


def test_no_rotation_is_one_low_band():
    split = bands.split([], 64)
    assert split.ranges == ([], [0, 64])


def test_everything_cancelled_still_leaves_a_low_band():
    split = bands.split([1.0] * 64, 128)
    assert (split.high, split.low) == (128, 32)


def test_from_dims():
    assert bands.from_dims(64, 96, 128).ranges == RANGES_64_96
    assert bands.from_dims(128, 128, 128).ranges == ([0, 128], [0, 128])
    assert bands.from_dims(0, 64, 128).ranges == ([], [32, 64, 96, 128])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bands.split(1.0, 128), "theta is 1.0"),
        (lambda: bands.split([0.1] * 65, 128), "65 frequencies"),
        (lambda: bands.split(1e6, 128, layout=cast(Any, "neox")), "neox"),
        (lambda: bands.from_dims(63, 96, 128), "high is 63"),
        (lambda: bands.from_dims(64, 130, 128), "low is 130"),
        (lambda: bands.from_dims(0, 0, 128), "both 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
