"""Memory and time of a stage on paper: what is held when, and what a device offers. No weights are loaded."""
