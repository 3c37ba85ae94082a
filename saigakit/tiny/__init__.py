"""A Saiga of a few hundred kB, made by a script in seconds: what the tests train, merge and run."""
