"""Gated products, and the feed-forward block that they are part of."""
