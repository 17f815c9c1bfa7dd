"""Generation with a paged sparse cache."""
