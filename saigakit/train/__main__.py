"""Start a child process of 02_train: `python -m saigakit.train JOB_FILE`."""

import sys
from pathlib import Path

from saigakit.core import launch
from saigakit.core.files import explaining
from saigakit.weights import load

if __name__ == "__main__":
    with launch.child(), explaining(Path(sys.argv[1]).parent):
        load.silence_libraries()  # before those libraries are imported
        from saigakit.train import worker

        worker.main(Path(sys.argv[1]))
