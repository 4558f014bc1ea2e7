"""The `lisa-dist` command. Each verb hands over to its module."""

import sys

USAGE = """usage: lisa-dist train [--gpus N] --config recipe.yaml [--any_flag value]
       lisa-dist init --model llama3.1-8b --gpus 1 --gpu_memory 24GiB --recipe recipe.yaml
       lisa-dist plan --model llama3.1-8b --gpus 4 --gpu_memory 80GiB [--any_flag value]
       lisa-dist export CHECKPOINT OUT
       lisa-dist report OUTPUT_DIR
       lisa-dist info
       srun --ntasks-per-node=1 lisa-dist check --config recipe.yaml --output_dir DIR --gpus_per_node 8

  train   train a model by LISA, on one device or on several of this host; on more: launch/README.md
  init    write a commented recipe for a model and a budget of memory
  plan    what a run will need of memory, part by part, and the command that fits; needs no GPU and no weights
  export  turn a checkpoint of any run into a folder that from_pretrained loads, without a GPU
  report  write report.html of a run, also while it goes on or where it was cut
  check   on every host before a run: GPUs, address, output folder, versions, time to save
  info    what is installed here, and which kernels and attention a run would use, and why
"""


def main() -> None:
    """Run one verb of the command line."""
    verb = sys.argv[1] if len(sys.argv) > 1 else None
    if verb == "train":
        from lisa_dist.train import main as train

        train(sys.argv[2:])
        return
    if verb == "init":
        from lisa_dist.init import main as init

        init(sys.argv[2:])
        return
    if verb == "plan":
        from lisa_dist.plan import main as plan

        plan(sys.argv[2:])
        return
    if verb == "export" and len(sys.argv) == 4:
        from lisa_dist.checkpoint import export_main as export

        export(*sys.argv[2:])
        return
    if verb == "report" and len(sys.argv) == 3:
        from lisa_dist.report import main as report

        report(sys.argv[2])
        return
    if verb == "check":
        from lisa_dist.preflight import main as check

        check(sys.argv[2:])
        return
    if verb == "info" and len(sys.argv) == 2:
        from lisa_dist.info import main as info

        info()
        return
    print(USAGE, end="")
    raise SystemExit(0 if verb in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
