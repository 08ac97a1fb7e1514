"""vllm-patches: five crash and corruption fixes carried as ordered patch series against pinned vLLM releases."""

__version__ = "0.1.0"
