"""Let `python -m saigakit.cli` work like `saigakit`."""

from saigakit.cli import main

main(prog_name="saigakit")
