"""What does a stream cost? Peak memory, rows a CPU second, and the wait for the first batch, by the size of the data.

python -m benchmarks.cost.streams --model .quickstart/model --dataset gsm8k/train.jsonl

Its rows are written again and again, numbered, as texts to four files, until those have so many megabytes. A process
reads, tokenizes and packs all of them once, as one loader worker of one rank does, and keeps nothing.
"""

import itertools
import json
import resource
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.tables.rows import show
from lisa_dist.data.dataset import DataArguments, load_data
from lisa_dist.data.stream import StreamLoader

LENGTH, BATCH, FILES = 1024, 8, 4


def write_texts(rows: list[dict], folder: Path, megabytes: int) -> int:
    """The number of rows that are written."""
    left, count = megabytes * 10**6, 0
    files = [(folder / f"{number}.jsonl").open("w", encoding="utf-8") for number in range(FILES)]
    for row in itertools.cycle(rows):
        line = json.dumps({"text": f"{count}. {row['question']}\n{row['answer']}"}) + "\n"
        left -= files[count % FILES].write(line)
        count += 1
        if left <= 0:
            break
    for file in files:
        file.close()
    return count


def read(model: str, folder: Path) -> dict:
    """In a process of its own: one pass over the stream."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    arguments = DataArguments(dataset_name=[str(folder)], streaming=True)
    data = load_data(arguments, AutoTokenizer.from_pretrained(model), max_length=LENGTH, seed=0, packing="bfd")
    loader = StreamLoader(data.train, 0, 1, BATCH, list, num_workers=0)
    first, tokens, examples = 0.0, 0, 0
    for batch in loader:
        if loader.passes:
            break
        first = first or time.process_time() - begun
        tokens += sum(len(example["input_ids"]) for example in batch)
        examples += sum(len(example["seq_lengths"]) for example in batch)
    seconds = time.process_time() - begun - first
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"first": first, "seconds": seconds, "tokens": tokens, "examples": examples, "above": (peak - before) * 1024}


def main() -> None:
    """Each size in a process of its own."""
    run_on_cpu()
    parser = parser_of(__doc__, "streams", with_data=True)
    parser.add_argument("--megabytes", nargs="+", type=positive, default=[10, 100, 1000])
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in Path(arguments.dataset).read_text(encoding="utf-8").splitlines()]
    figures: dict = {"sizes": {}}
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            count = write_texts(rows, Path(folder), megabytes)
            with RankGroup(1, Caller) as ranks:
                found = ranks.call("run", read, arguments.model, Path(folder))[0]
        figures["sizes"][str(megabytes)] = found | {"rows": count}
        print(megabytes, figures["sizes"][str(megabytes)], flush=True)
    write_results(arguments.results, figures)
    show("streams", figures)


if __name__ == "__main__":
    main()
