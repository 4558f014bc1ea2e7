"""docs/extending.md: its blocks are one file, whose tests are run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import PATIENCE

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.mark.full
def test_each_extension_works(tmp_path, cpu_ops):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "test_mine.py").write_text("\n\n".join(blocks), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "4 passed" in done.stdout
