"""Models that look like a component and are none, or are one and do not look it."""
