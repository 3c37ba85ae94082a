"""The demo's model and records, and the tests' tiny Saiga."""
