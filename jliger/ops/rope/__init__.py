"""Rotary position embeddings: `apply_rope`."""
