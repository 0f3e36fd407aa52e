"""One run at a time in a directory; the lock of a process that was killed is gone."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import UserError
from training.launch.lock import contents, occupy, require_free

HOLDER = """
import sys, time
from pathlib import Path
from training.launch.lock import occupy
occupy(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_directory_is_free_again_once_its_process_was_killed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    require_free(output)  # which does not exist
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for refused in (require_free, occupy):
            with pytest.raises(UserError, match=f"another run is working in {output}"):
                refused(output)
        require_free(tmp_path)
        holder.kill()
    require_free(output)
    occupy(output)
    occupy(output)  # its own lock is in nobody's way
    assert contents(output) == []
    assert [path.name for path in output.iterdir()] == [".lock"]
