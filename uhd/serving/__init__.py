"""Models with eyes in servers: transformers' own, and vLLM."""
