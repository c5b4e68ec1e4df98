"""Norms of rows: `rms_norm` and `layer_norm`, with float32 arithmetic."""
