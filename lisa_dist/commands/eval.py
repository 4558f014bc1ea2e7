"""`lisa-dist eval`: a model's scores on lm-evaluation-harness' tasks and on MT-Bench, on one device or several."""

from collections.abc import Sequence

from lisa_dist.commands import exit_on_error
from lisa_dist.distributed.launching import launch_if_asked
from lisa_dist.eval.arguments import EvalArguments
from lisa_dist.eval.evaluation import run
from lisa_dist.flags import FlagParser, first_argument_as

USAGE = "lisa-dist eval MODEL --tasks mmlu,gsm8k [--data_dir DIR] [--gpus N] [--flag value ...]"
HELP = {
    "What is evaluated": ("tasks", "data_dir", "limit", "num_fewshot", "apply_chat_template"),
    "How it is run": ("gpus", "batch_size", "dtype", "seed", "output_dir"),
    "Answers to MT-Bench": ("max_new_tokens",),
    "Its judge": ("judge_url", "judge_model", "judge_parallel", "judge_timeout", "judge_rating", "judge_max_tokens"),
}
ARGUMENTS = (EvalArguments,)


def parse(argv: Sequence[str]) -> EvalArguments:
    """The arguments, of which the first word may be the model."""
    return FlagParser(ARGUMENTS, USAGE, HELP).parse(first_argument_as("--model", argv))[0]


def main(argv: Sequence[str]) -> None:
    """Evaluate, or start `--gpus` ranks that do; an error of the user's is one line and exit status 2."""
    with exit_on_error("lisa-dist eval"):
        run(parse(launch_if_asked(argv, "eval", check=parse)))
