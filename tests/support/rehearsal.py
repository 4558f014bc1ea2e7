"""LISA on simulated GPUs: `rehearse(...)` from a test, or from a shell for one rank

    python tests/support/rehearsal.py '{"kind": "loop", "ds_config": "zero2"}'

What a rank finds: `problems`, texts; of a loop `losses`, what a step and a switch made the host wait for. The kinds:
"loop", a DeepSpeed loop of one's own; "train", `lisa-dist train` with flags; "fault", a function of a module of tests.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from ranks import PATIENCE, free_port, rank_context

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"DS_ACCELERATOR": "cuda", "LISA_DIST_KERNELS": "torch", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"MASTER_ADDR": "127.0.0.1"}


def rehearse(world_size: int = 1, *, may_raise: bool = False, **settings: Any) -> list[dict]:
    """Run a rehearsal on ranks of its own; what each found, with `error` where it has raised and `may_raise`.

    Raises AssertionError with the output of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port, processes = free_port(), []
        outputs = [Path(folder) / f"rank{rank}" for rank in range(world_size)]
        for rank, output in enumerate(outputs):
            process = rank_context().Process(
                target=_be_rank, args=(settings, rank, world_size, port, folder, str(output)), daemon=True
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join(PATIENCE)
            process.kill()
        found = []
        for output in outputs:
            text = output.read_text(encoding="utf-8")
            last = text.rstrip().rpartition("\n")[2]
            assert last.startswith("{"), text[-6000:]
            found.append(json.loads(last))
            assert may_raise or "error" not in found[-1], text[-6000:]
        return found


def _be_rank(settings: dict, rank: int, world_size: int, port: int, folder: str, output: str) -> None:
    os.environ["REHEARSAL_FOLDER"] = folder  # which all ranks share
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(settings, rank, world_size, port)


def begin(nvml_free: int | None = None) -> None:
    """Simulate a GPU in this process. What looks for one at its import is imported before.

    `nvml_free`: pynvml is installed and says that so many bytes are free, of GPUs that are named by their UUIDs.
    """
    import bitsandbytes
    import peft
    import torch
    import trl.kernels.chunked_logprob as chunked
    import trl.trainer.utils  # it leaves out what has no label where there is a GPU, as it was before the next lines
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    import lisa_dist.loss.label_logits as label_logits

    assert all((bitsandbytes, peft, trl.trainer.utils))
    sys.modules["liger_kernel"] = None  # type: ignore[assignment]  # its kernels need a real GPU
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from simulated_gpu import cuda

    cuda.install()
    if nvml_free is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "GPU-5a2e,GPU-77c1"
        sys.modules["pynvml"] = cuda.nvml(nvml_free)
    set_accelerator(CUDA_Accelerator())
    chunked._use_triton = lambda device: False  # Triton needs a real GPU
    trl.trainer.utils.is_triton_available = label_logits.is_triton_available = lambda: False
    chunked._MM_OUT_DTYPE = False


def loop(
    ds_config: str = "zero2",
    optim: str = "adamw_torch",
    dtype: str = "bf16",
    steps: int = 5,
    accumulation: int = 1,
    zero: dict[str, Any] | None = None,
    checkpointed: int | None = None,
    saves: bool = False,
    **settings: Any,
) -> dict:
    """Steps of `initialize`'s engine; `zero` are fields of the config's zero_optimization, `settings` LisaConfig's."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from models import tiny_llama, token_batches
    from simulated_gpu.clocks import CLOCKS
    from simulated_gpu.memory import MEMORY

    import lisa_dist
    from lisa_dist.core.activation_checkpointing import checkpoint_layers, let_backward_end
    from lisa_dist.ds_config import read_ds_config

    config = read_ds_config(ds_config)
    config["zero_optimization"] |= zero or {}
    model = tiny_llama().to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    config_of_lisa = lisa_dist.LisaConfig(**{"lisa_interval_steps": 2} | settings)
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {"lr": 1e-3, "weight_decay": 0.1, "optim": optim, "gradient_accumulation_steps": accumulation}
    engine, lisa = lisa_dist.initialize(model, config, config_of_lisa, micro_batch_size=2, **options)
    if checkpointed is not None:
        checkpoint_layers(engine.module, lisa.blocks, checkpointed)
        let_backward_end(engine.module)
    data, losses = token_batches(steps, 2 * world, accumulation), []
    counts: dict[str, Counter] = {"switch": Counter(), "step": Counter()}

    def step(number: int) -> None:
        before = CLOCKS.waits + MEMORY.counts
        switched = lisa.on_step_begin()
        after = CLOCKS.waits + MEMORY.counts
        if switched:
            counts["switch"] = after - before
        for micro in range(accumulation):
            rows = data[number, micro, 2 * rank : 2 * rank + 2].to(engine.device)
            loss = engine(input_ids=rows, labels=rows, use_cache=False).loss
            engine.backward(loss)
            engine.step()
        counts["step"] = CLOCKS.waits + MEMORY.counts - after
        losses.append(loss.item())

    for number in range(steps):
        step(number)
    if lisa.frozen_layers is not None:  # an evaluation with the originals, which are copied in one by one
        with lisa.frozen_layers.exact(), torch.no_grad():
            losses.append(engine(input_ids=(rows := data[0, 0, :2].to(engine.device)), labels=rows).loss.item())
    if saves:
        from lisa_dist.checkpoint.resume import load_checkpoint
        from lisa_dist.checkpoint.save import save_checkpoint

        folder = Path(os.environ.get("REHEARSAL_FOLDER") or tempfile.mkdtemp()) / "checkpoint-1"
        lisa.on_step_begin()  # of a new period, where one begins: what is kept is on its way to the host
        save_checkpoint(lisa, folder)
        load_checkpoint(lisa, folder)
        step(0)
    lisa.close()
    return {"losses": losses, "counts": {when: dict(found) for when, found in counts.items()}}


def train(flags: list[str]) -> dict:
    """`lisa-dist train`."""
    import lisa_dist.commands.train as command

    command.end_process = lambda: None
    command.main(flags)
    return {}


def fault(module: str, name: str, **arguments: Any) -> dict:
    """A function of a module of tests."""
    return getattr(importlib.import_module(module), name)(**arguments) or {}


KINDS = {"loop": loop, "train": train, "fault": fault}


def main(settings: dict[str, Any], rank: int = 0, world_size: int = 1, port: int = 0) -> None:
    """Rehearse, print what was found, and end the process at once: there is no device to take down."""
    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    of_rank |= {"MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(max(2, world_size))))}
    os.environ.update(ENVIRONMENT | {name: str(value) for name, value in of_rank.items()})
    settings = dict(settings)
    found: dict[str, Any] = {}
    try:
        begin(settings.pop("nvml_free", None))
        found = KINDS[settings.pop("kind", "loop")](**settings)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test must see it
        if not isinstance(error, SystemExit) or error.code:
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"
    from simulated_gpu.problems import PROBLEMS

    print(json.dumps(found | {"problems": [str(problem) for problem in PROBLEMS.values()]}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    main(json.loads(sys.argv[1]))
