"""Native code for the CPU, and the torch twins that it is held to."""
