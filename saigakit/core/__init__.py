"""Machine, directories, files, finished stages, child processes and the Hub."""
