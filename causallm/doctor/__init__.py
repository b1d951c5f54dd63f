"""What a machine is, what a model needs of it, and what that means: the findings of the `doctor` verb."""
