"""The Dockerfile's steps without a daemon, in a new root of Debian that debootstrap makes; as root, with a network.

    python tests/container.py FOLDER [--pip-config pip.conf]

Instructions are read as they stand: ARG, ENV, COPY of the last commit, RUN and WORKDIR are done in the root; then the
entry point is asked what is installed, and for a run of one step on a tiny model.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = "python3,python3-dev,python3-pip,python3-venv,python-is-python3,ca-certificates"
TRIAL = """
import json, sys
sys.path.insert(0, "/support")
from models import save_tiny_llama
from pathlib import Path
save_tiny_llama(Path("model"))
rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(16)]
Path("rows.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile and what follows it, lines that go on as one."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def main() -> None:
    """Make the root, run the steps, try what they made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the new root")
    parser.add_argument("--pip-config", type=Path, help="pip's configuration there")
    parser.add_argument("--mount", type=Path, action="append", default=[], help="a folder to have there too")
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    if not root.exists():
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "stable", str(root)], check=True)
    path = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {"PATH": path, "HOME": "/root", "PIP_BREAK_SYSTEM_PACKAGES": "1"}  # Debian's Python refuses pip
    if arguments.pip_config:
        shutil.copy(arguments.pip_config, root / "etc" / "pip.conf")
    mounts = [Path("/proc"), Path("/dev"), *arguments.mount]
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    folder = "/"

    def run(command: str) -> None:
        print(f"+ {command}", flush=True)
        inside = [str(shutil.which("chroot")), str(root), "/bin/sh", "-ec", f"cd {folder}; {command}"]
        subprocess.run(inside, env=environment, check=True)

    try:
        for place in mounts:
            target = root / place.relative_to("/")
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--rbind", str(place), str(target)], check=True)
            subprocess.run(["mount", "--make-rslave", str(target)], check=True)  # what is unmounted here stays there
        for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
            if word in ("ARG", "ENV"):
                name, _, value = rest.partition("=")
                environment[name] = value
            elif word == "COPY":
                (target,) = rest.split()[1:]
                files = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
                shutil.rmtree(root / target[1:], ignore_errors=True)
                (root / target[1:]).mkdir(parents=True)
                subprocess.run(["tar", "x", "-C", str(root / target[1:])], input=files, check=True)
            elif word == "WORKDIR":
                folder = rest
                (root / rest[1:]).mkdir(parents=True, exist_ok=True)
            elif word == "RUN":
                run(rest)
        shutil.copytree(ROOT / "tests" / "support", root / "support", dirs_exist_ok=True)
        (root / folder[1:] / "trial.py").write_text(TRIAL, encoding="utf-8")
        run("lisa-dist --version && lisa-dist info")
        run("python trial.py")
        words = "--model_name_or_path model --dataset_name rows.jsonl --output_dir out --max_steps 1 --report_to none"
        run(f"lisa-dist train {words} --gpus 2")
    finally:
        for place in reversed(mounts):
            subprocess.run(["umount", "--lazy", "--recursive", str(root / place.relative_to("/"))], check=False)


if __name__ == "__main__":
    sys.exit(main())
