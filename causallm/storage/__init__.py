"""Where weights live: all in memory, or brought in from the disk under a budget of bytes."""
