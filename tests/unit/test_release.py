"""What `make release` refuses before it builds anything, and the notes of a version."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "release.py"
CHANGES = "# Changelog\n\n## [Unreleased]\n\n- later\n\n"
CHANGES += "## [1.2.0] - 2026-01-01\n\n### Added\n\n- new\n\n## [1.1.0]\n\n- old\n"


def test_notes_are_those_of_the_version():
    notes_of = runpy.run_path(str(SCRIPT))["notes_of"]
    assert notes_of("1.2.0", CHANGES) == "### Added\n\n- new\n"
    assert notes_of("1.1.0", CHANGES) == "- old\n"


def test_what_is_refused_before_anything_is_built(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True)

    def refused() -> str:
        ran = subprocess.run([sys.executable, str(tmp_path / ".ci" / "release.py")], capture_output=True, text=True)
        assert ran.returncode == 1
        return ran.stderr

    for folder in (".ci", "lisa_dist"):
        (tmp_path / folder).mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    package, changelog = tmp_path / "lisa_dist" / "__init__.py", tmp_path / "CHANGELOG.md"
    package.write_text('__version__ = "1.3.0"\n')
    changelog.write_text(CHANGES)
    assert refused() == "CHANGELOG.md has no section [1.3.0]: give what is in [Unreleased] that name and a date.\n"
    package.write_text('__version__ = "1.2.0"\n')
    git("init", "--quiet")
    assert "commit these changes first, or take them back:\n?? .ci/" in refused()
    git("add", ".")
    git("commit", "--quiet", "--message", "1.2.0")
    assert refused() == "the release trains the quickstart's model: run make quickstart first.\n"
    git("tag", "v1.2.0")
    assert refused() == "v1.2.0 is released already: give lisa_dist/__init__.py the next version.\n"
