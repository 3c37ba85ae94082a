"""A kernel talks over sockets that only this user can open."""

import json
import os
from pathlib import Path

import pytest
import small_notebooks

from saigakit.cli import execution

PROBE = """\
import json, os
from ipykernel.connect import get_connection_file
place = os.path.dirname(get_connection_file())
found = {"transport": json.load(open(get_connection_file()))["transport"], "place": place}
found |= {"modes": {name: os.stat(os.path.join(place, name)).st_mode for name in ["", *os.listdir(place)]}}
with open(os.path.join(run_dir, "found.json"), "w") as file:
    json.dump(found, file)"""


@pytest.mark.parametrize("umask", [0o022, 0o000], indirect=True, ids=oct)
def test_a_kernel_talks_over_sockets_in_a_directory_of_its_user(tmp_path, umask):
    run_dir = tmp_path / ("long" * 30) / "run"  # a socket in here would have too long a path
    (run_dir / ".runner").mkdir(parents=True)
    notebook = small_notebooks.write(tmp_path / "notebooks") / "01_format.ipynb"
    small_notebooks.insert(notebook, PROBE)
    with Path(os.devnull).open() as lock:
        execution.execute(notebook, {}, run_dir, execution.Screen(), lock.fileno())
    found = json.loads((run_dir / "found.json").read_text())
    modes = {name: mode & 0o777 for name, mode in found["modes"].items()}
    assert found["transport"] == "ipc"
    assert modes.pop("") == 0o700
    assert modes.pop("kernel.json") == 0o600
    assert len(modes) == 5
    assert not Path(found["place"]).exists()
