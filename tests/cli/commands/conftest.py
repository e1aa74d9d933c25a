"""An adapter of the tiny Llama on disk."""

from tests.adapters.conftest import adapter_dir, model

__all__ = ["adapter_dir", "model"]
