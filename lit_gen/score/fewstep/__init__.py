"""Models that sample in one or a few steps: their losses, one paper a file, and what these share."""
