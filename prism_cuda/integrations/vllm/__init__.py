"""Prism as an attention backend of vLLM: ``vllm serve MODEL --attention-backend CUSTOM``.

FlashAttention's backend with another prefill: long causal prefills attend block-sparsely, decodes
and all else go on as they did. vLLM finds :func:`register` by its entry point; nothing here imports
vLLM before it is called. See docs/vllm.md.
"""

from __future__ import annotations

import logging

from prism_cuda.integrations.vllm.counts import counts, reset_counts

BACKEND = "prism_cuda.integrations.vllm.backend.PrismBackend"


def register() -> None:
    """Put the backend behind vLLM's name CUSTOM, unless another plug-in has taken it.

    vLLM calls this in every one of its processes, whichever backend is asked for. So it must not
    raise: a vLLM that the backend does not know is refused where the backend is first looked up.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        logging.getLogger("vllm.prism_cuda").warning(
            "prism: attention backend CUSTOM is taken by %s; it stays so. Set VLLM_PLUGINS=prism "
            "to load this plug-in alone.",
            custom.get_path(),
        )
        return
    register_backend(custom, BACKEND)


__all__ = ["BACKEND", "counts", "register", "reset_counts"]
