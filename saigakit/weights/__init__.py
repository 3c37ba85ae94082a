"""Find, read, merge and load a base model and its adapter."""
