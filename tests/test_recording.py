"""record(): which calls a block gets, and what it tells."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable

import pytest
import torch

import prism_cuda
from prism_cuda import PrismConfig, recording

pytestmark = pytest.mark.usefixtures("needs_library")

SPARSE = PrismConfig(block_size=64, top_p=0.5, dense_below=0)


def prefill(length: int) -> None:
    prism_cuda.prefill(*torch.randn(3, 1, 2, length, 64), config=SPARSE)


def two_threads(own_thread: bool) -> dict[str, list[int]]:
    """A opens its block first and closes it first; B's overlaps with it."""
    turns = threading.Barrier(2)
    lengths: dict[str, list[int]] = {}

    def a() -> None:
        with prism_cuda.record(own_thread=own_thread) as calls:
            turns.wait()  # A is open
            turns.wait()  # B is open
            prefill(70)
            turns.wait()  # A has called
        turns.wait()  # A is closed
        lengths["a"] = [call.q_len for call in calls.calls]

    def b() -> None:
        turns.wait()
        with prism_cuda.record(own_thread=own_thread) as calls:
            turns.wait()
            turns.wait()
            turns.wait()
            prefill(90)
        lengths["b"] = [call.q_len for call in calls.calls]

    threads = [threading.Thread(target=run) for run in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return lengths


def test_blocks_of_threads_overlap() -> None:
    assert two_threads(own_thread=False) == {"a": [70], "b": [70, 90]}
    assert two_threads(own_thread=True) == {"a": [70], "b": [90]}
    assert not recording.active


def test_a_block_that_closes_during_a_call_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list = []

    class Closing:
        """Closes, as in another thread, when the call asks for its thread."""

        @property
        def thread(self) -> None:
            active.remove(self)

    still_open = recording.Recording()
    active += [Closing(), still_open]
    monkeypatch.setattr(recording, "active", active)
    assert still_open in recording.listening()


def test_every_open_block_gets_a_call_with_what_it_asked_for() -> None:
    with prism_cuda.record(masks=True) as outer:
        prefill(70)
        with prism_cuda.record(times=True) as inner:
            prefill(200)
        prefill(90)
    assert [call.q_len for call in outer.calls] == [70, 200, 90]
    assert [call.q_len for call in inner.calls] == [200]
    assert all(call.mask is not None and not call.times for call in outer.calls)
    assert inner.calls[0].mask is None and inner.calls[0].times


def test_a_block_that_fails_is_closed() -> None:
    with pytest.raises(KeyError), prism_cuda.record():
        raise KeyError
    assert not recording.active


def test_summary_has_a_row_for_every_layer_and_way() -> None:
    with prism_cuda.record(times=True) as calls:
        prefill(200)
        prefill(300)
        prefill(1)
    header, sparse, dense = calls.summary().splitlines()
    assert header.split()[:4] == ["layer", "path", "by", "calls"]
    assert header.split()[4:] == ["queries", "keys", "density", "ms", "reason"]
    assert sparse.split()[:6] == ["prism", "grid", "2", "200", "to", "300"]
    assert sparse.endswith("block-sparse") and dense.endswith("decode: one query token")
    calls.calls[0].layer_idx = 3
    assert calls.summary().splitlines()[1].split()[0] == "3"


def _of_everything(monkeypatch: pytest.MonkeyPatch) -> Callable[[], torch.Tensor]:
    """A call that computes all blocks of what counts as a long input."""
    monkeypatch.setattr(recording, "_warned", False)
    monkeypatch.setattr(recording, "LONG_INPUT", 500)
    everything = PrismConfig(block_size=64, dense_below=0, top_p=1.0)
    qkv = torch.randn(3, 1, 2, 512, 64)
    return lambda: prism_cuda.prefill(*qkv, config=everything)


@pytest.mark.parametrize("block", [contextlib.nullcontext, prism_cuda.record])
def test_a_selection_of_nearly_everything_warns_once(
    monkeypatch: pytest.MonkeyPatch, block: Callable
) -> None:
    call = _of_everything(monkeypatch)
    with block(), pytest.warns(UserWarning, match="computed 100% of its blocks.*diagnose"):
        call()
    with block(), warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_summary_says_where_nothing_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    call = _of_everything(monkeypatch)
    with warnings.catch_warnings(), prism_cuda.record() as calls:
        warnings.simplefilter("ignore")
        call()
    assert calls.summary().splitlines()[-1].startswith("1 of 1 calls computed more than 90%")


def test_compiled_calls_do_not_look_at_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    call = torch.compile(_of_everything(monkeypatch), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call()
