"""Describe the machine, its directories, finished stages and child processes."""
