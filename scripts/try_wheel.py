"""What users run, from an environment that holds the wheel: `moe-lens --help`, a small report, every example.

Run by `make test-wheel`. Everything happens in an empty folder, so that nothing comes from the clone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
INSTALLED = "import moe_lens; assert 'site-packages' in moe_lens.__file__, moe_lens.__file__"


def main() -> int:
    """The number of commands that failed; each is printed with its exit status."""
    python = str(BIN / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as examples run in CI
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        examples = [shutil.copy(path, folder) for path in sorted((ROOT / "examples").glob("*.py"))]
        for command in (
            [python, "-c", INSTALLED],
            [str(BIN / "moe-lens"), "--help"],
            [str(BIN / "moe-lens"), "report", "--tokens", "1024", "--out", "report"],
            *([python, Path(example).name] for example in examples),
        ):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            print(f"{done.returncode}  {' '.join(command[1:])[:100]}", flush=True)
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
            failed += done.returncode != 0
        if not (Path(folder) / "report" / "report.html").is_file():
            print("report/report.html was not written")
            failed += 1
    print("nothing broke" if not failed else f"{failed} broken")
    return failed


if __name__ == "__main__":
    sys.exit(main())
