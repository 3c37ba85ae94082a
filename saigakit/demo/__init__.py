"""Make the demo's model and records from packages, and the tiny Saiga of the tests."""
