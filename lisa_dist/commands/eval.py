"""`lisa-dist eval`: a model's scores on lm-evaluation-harness' tasks and on MT-Bench, on one device or several."""

from collections.abc import Sequence

from lisa_dist.commands import exit_on_error
from lisa_dist.distributed.launching import launch_if_asked
from lisa_dist.eval.arguments import EvalArguments
from lisa_dist.eval.evaluation import run
from lisa_dist.flag_words import first_word_as
from lisa_dist.flags import FlagParser

USAGE = "lisa-dist eval MODEL --tasks mmlu,gsm8k [--data_dir DIR] [--gpus N] [--flag value ...]"
HELP = {
    "What is evaluated": {
        "tasks": "mmlu, agieval, winogrande, gsm8k, pubmedqa, ..., mt_bench",
        "data_dir": "files of the tasks; left out, the hub",
        "limit": "items of each task, or below 1 a part of them",
        "num_fewshot": "examples before each item; left out, the task's own",
        "apply_chat_template": "prompts as turns; mt_bench always has them so",
    },
    "How it is run": {
        "gpus": "ranks on this host, each with a share of the items",
        "batch_size": "prompts at a time on each rank, or auto",
        "dtype": "of the weights; auto: as they were saved",
        "seed": "of sampled examples and answers",
        "output_dir": "folder of the results, by default eval/ and the model's name",
    },
    "MT-Bench": {
        "max_new_tokens": "of an answer",
        "judge_url": "OpenAI-compatible; its key is taken from JUDGE_API_KEY",
        "judge_model": "the judge's name there",
        "judge_parallel": "questions to the judge at a time",
        "judge_timeout": "seconds for a verdict",
        "judge_rating": "of a judgment the last or the first counts",
        "judge_max_tokens": "of a verdict",
    },
}


def parser() -> FlagParser:
    """Of the flags of an evaluation."""
    return FlagParser([EvalArguments], USAGE, HELP)


def parse(words: Sequence[str]) -> EvalArguments:
    """The arguments, of which the first word may be the model."""
    words, flags = first_word_as("--model", words), parser()
    flags.check_words(words)
    return flags.parse_args_into_dataclasses(words)[0]


def main(words: Sequence[str]) -> None:
    """Evaluate, or start `--gpus` ranks that do; an error of the user's is one line and exit status 2."""
    with exit_on_error("lisa-dist eval"):
        run(parse(launch_if_asked(words, "eval", check=parse)))
