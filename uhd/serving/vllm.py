"""The plug-in of vLLM, which calls :func:`register` in each of its processes where this package is installed."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the saved models: their types, and the class that runs them there. vLLM is only imported here."""
    from vllm import ModelRegistry

    import uhd.hf  # noqa: F401  registers the types with transformers

    ModelRegistry.register_model("UHDForConditionalGeneration", "uhd.serving.vllm_model:UHDForVLLM")
