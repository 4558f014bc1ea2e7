"""Build a release, check it as its users will install it, and tag it: `make release`.

Afterwards dist/ has the wheel, the source distribution and NOTES.md, the version's section of CHANGELOG.md. What it
needs of tools is in .release/tools, and the environment without a checkout in .release/installed; nothing leaves this
machine. It needs a commit without changes beside it, whose changelog has the version of lisa_dist/__init__.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST, FOLDER = ROOT / "dist", ROOT / ".release"
TOOLS = ["build>=1.2,<2", "twine>=6,<8", "check-wheel-contents>=0.6,<0.7"]
NOTEBOOK = ["nbclient>=0.10,<1", "ipykernel>=6,<8"]  # to run it cell by cell
QUICKSTART = ROOT / ".quickstart"
STEPS = "6"


def version() -> str:
    """That of the package, which is not imported: it would ask for all that it needs."""
    text = (ROOT / "lisa_dist" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found


def notes_of(number: str, changelog: str) -> str:
    """The section of a version, without its heading."""
    found = re.search(rf"^## \[{re.escape(number)}\][^\n]*\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        sys.exit(f"CHANGELOG.md has no section [{number}]: give what is in [Unreleased] that name and a date.")
    return found[1].strip() + "\n"


def run(*words: object, **options: object) -> None:
    """A command, which is shown; its failure ends the release."""
    print("+", *words, flush=True)
    if status := subprocess.run([str(word) for word in words], **options).returncode:
        sys.exit(f"the release ends here: {words[0]} has exit status {status}.")


def said_by_git(*words: str) -> str:
    """What git says of this checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def environment(name: str, *packages: object) -> Path:
    """The folder of an environment's programs, made anew with some packages."""
    folder = FOLDER / name
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin"


def use(wheel: Path, programs: Path) -> None:
    """The notebook, which installs the wheel, and the quickstart's recipe of the wheel, where no checkout is."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"PATH": f"{programs}:{clean['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    clean["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".quickstart").mkdir()
        for given in ("model", "pairs.jsonl"):
            (folder / ".quickstart" / given).symlink_to(QUICKSTART / given)
        notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        cells[0]["source"] = [f'MODEL = "{QUICKSTART / "model"}"']
        (folder / "notebook.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        shutil.copy(wheel, folder)
        run(programs / "jupyter-execute", "--inplace", "notebook.ipynb", cwd=folder, env=clean)
        ran = json.loads((folder / "notebook.ipynb").read_text(encoding="utf-8"))
        for output in (one for cell in ran["cells"] for one in cell.get("outputs", ())):
            print(*output.get("text", [f"({', '.join(output.get('data', ()))})"]), sep="")
        run(programs / "lisa-dist", "recipes", "copy", "quickstart", "quickstart.yaml", cwd=folder, env=clean)
        flags = ["--config", "quickstart.yaml", "--gpus", "2", "--max_steps", STEPS]
        run(programs / "lisa-dist", "train", *flags, cwd=folder, env=clean)
        assert (folder / ".quickstart" / "trained" / "model.safetensors").exists()


def main() -> None:
    """All of it, in an order in which what fails fast is first."""
    number = version()
    notes = notes_of(number, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if changes := said_by_git("status", "--porcelain"):
        sys.exit(f"commit these changes first, or take them back:\n{changes}")
    if said_by_git("tag", "--list", f"v{number}"):
        sys.exit(f"v{number} is released already: give lisa_dist/__init__.py the next version.")
    if not (QUICKSTART / "model").is_dir():
        sys.exit("the release trains the quickstart's model: run make quickstart first.")
    commit = said_by_git("rev-parse", "HEAD")
    tools = environment("tools", *TOOLS)
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # what is committed, without what git ignores
        run("git", "archive", "--output", f"{folder}/source.tar", commit, cwd=ROOT)
        run("tar", "--extract", "--directory", folder, "--file", f"{folder}/source.tar")
        Path(folder, "source.tar").unlink()
        run(tools / "python", "-m", "build", "--outdir", DIST, folder)
    (wheel,), (source,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(tools / "twine", "check", "--strict", wheel, source)
    run(tools / "check-wheel-contents", wheel)
    use(wheel, environment("installed", *NOTEBOOK))
    (DIST / "NOTES.md").write_text(notes, encoding="utf-8")
    tag = ["tag", "--annotate", f"v{number}", commit, "--cleanup", "verbatim"]  # with the headings of the notes
    run("git", *tag, "--file", DIST / "NOTES.md", cwd=ROOT)
    print(f"v{number} is tagged. To publish: git push origin v{number}; {tools}/twine upload {DIST}/lisa_dist-*")


if __name__ == "__main__":
    main()
