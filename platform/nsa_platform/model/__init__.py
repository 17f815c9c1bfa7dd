"""The transformer: layers, attention, feed-forward, weights, cost."""
