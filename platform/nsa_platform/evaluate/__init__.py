"""Quality of a trained model: bits per byte and needle in a haystack."""
