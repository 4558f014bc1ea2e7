"""results.json: the scores of one model, each task with the settings and versions that it was evaluated with."""

import json
import os
from datetime import datetime
from importlib import metadata

from lisa_dist.errors import UserError
from lisa_dist.eval.arguments import MT_BENCH, EvalArguments
from lisa_dist.eval.model import describe_weights
from lisa_dist.files import replacing


class Results:
    """The results of one model in `--output_dir`; tasks are added one by one, and replace what was there of them."""

    def __init__(self, arguments: EvalArguments):
        self._arguments = arguments
        self._path = arguments.folder / "results.json"
        try:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(arguments.folder, os.W_OK):
                raise PermissionError(13, "no permission to write")
            content = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        except OSError as error:
            raise UserError(f"--output_dir {arguments.folder}: {error.strerror}; give another folder.") from error
        except ValueError as error:
            raise UserError(f"{self._path}: is not JSON ({error}); move it away.") from error
        if content.get("model", arguments.model) != arguments.model:
            raise UserError(
                f"--output_dir {arguments.folder}: has results of {content['model']}; give another folder for those of "
                f"{arguments.model}."
            )
        self._tasks = content.get("tasks", {})

    def add(self, name: str, scores: dict) -> None:
        """Write the scores of a task, with settings, versions and time."""
        names = ["data_dir", "limit", "batch_size", "dtype", "seed"]
        names += ["max_new_tokens"] if name == MT_BENCH else ["num_fewshot", "apply_chat_template"]
        settings = {key: getattr(self._arguments, key) for key in names}
        settings["weights"] = describe_weights(self._arguments.model)
        packages = ["lisa_dist", "torch", "transformers", *([] if name == MT_BENCH else ["lm_eval"])]
        versions = {package: metadata.version(package) for package in packages}
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        self._tasks[name] = scores | {"settings": settings | {"ranks": ranks}, "versions": versions, "when": when}
        with replacing(self._path) as path:
            path.write_text(json.dumps({"model": self._arguments.model, "tasks": self._tasks}, indent=1) + "\n")

    @property
    def summary(self) -> str:
        """Where the results are."""
        return f"wrote {self._path}"
