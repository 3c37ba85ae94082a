"""Run `python -m saigakit.cli` as `saigakit`."""

from saigakit.cli import main

main(prog_name="saigakit")
