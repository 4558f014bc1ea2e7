"""What do LISA's policies take of memory and time on a real model, and was it planned? Every byte of two ranks.

python benchmarks/memory.py --model .quickstart/model

On CPU host and device are one, so what a policy puts on the host is in the peak; the last column says how much it is.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

ROWS, LENGTH = 1, 256
FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
# Name, DeepSpeed config, settings of LISA; all layers active are full training.
ARMS = (
    ("full", "zero2", {"lisa_activated_layers": -1}),
    ("LISA as published", "zero2", {}),
    ("always-on states at 8 bit", "zero2", {"lisa_state_bits": "embed=8,head=8,rest=8"}),
    ("always-on states on host", "zero2", {"lisa_offload": "embed,head,rest"}),
    ("all states on host", "zero2_offload", {}),
    ("embed+head drawn, their period", "zero2", {"lisa_always_on": "rest", "lisa_block_probability": "embed=1"}),
    ("embed+head drawn, layers' period", "zero2", {"lisa_always_on": "rest", "lisa_block_probability": "embed=1e-9"}),
    ("embed+head frozen", "zero2", FROZEN),
    ("embed+head frozen, layers on host", "zero2", FROZEN | {"lisa_offload": "layers"}),
    ("LISA as published", "zero3", {}),
    ("embed+head frozen", "zero3", FROZEN),
    ("all states on host", "zero3_offload", {}),
)


def worker(arguments: argparse.Namespace) -> None:
    """Train each arm for some steps on this rank: seconds of three, parts of one."""
    import torch
    from torch import distributed as dist
    from transformers import AutoModelForCausalLM

    import lisa_dist
    from lisa_dist.ds_config import read_ds_config
    from lisa_dist.fake_run import FakeRun, Trained, Workload
    from lisa_dist.measuring import StepMeter
    from lisa_dist.memory import live_tensor_bytes
    from lisa_dist.planning import StageSettings, plan_memory

    dtype = getattr(torch, arguments.dtype)
    figures = []
    for name, ds_config, settings in ARMS:
        gc.collect()
        of_others = live_tensor_bytes()  # what the arms before have left
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        settings = dict(settings)
        if settings.get("lisa_activated_layers") == -1:
            settings["lisa_activated_layers"] = model.config.num_hidden_layers
        config = lisa_dist.LisaConfig(lisa_interval_steps=100, **settings)
        engine, lisa = lisa_dist.initialize(model, ds_config, config, optim="adamw_torch_fused")
        tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))

        def step(engine=engine, lisa=lisa, tokens=tokens) -> float:
            lisa.on_step_begin()
            started = time.perf_counter()
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            del loss
            engine.step()
            return time.perf_counter() - started

        step()
        seconds = statistics.median(step() for _ in range(3))
        with StepMeter(lisa) as meter:
            step()
        measured = meter.parts.to_dict()
        for part in ("buffers", "static", "peak", "peak_backward", "peak_step"):
            measured[part] -= of_others
        run = FakeRun(model.config, Workload(LENGTH, ROWS, dtype, fused_head=False))
        always_on = tuple(block for block in config.always_on if run.blocks.outer(block).parameters)
        trained = Trained(lisa.active_layers, always_on, lisa.active_blocks)
        groups = run.groups(trained, "adamw_torch_fused", config.state_bits, config.offloaded)
        stage = StageSettings.of(read_ds_config(ds_config), run.hidden_size)
        world_size = dist.get_world_size()
        planned, host = plan_memory(run, groups, run.trace(groups), stage, world_size, rank=0, on_cpu=True)
        figures.append(
            {
                "policy": name,
                "ds_config": ds_config,
                "layers": lisa.active_layers if len(lisa.active_layers) < 9 else "all",
                "seconds": seconds,
                "measured": measured,
                "planned": planned.to_dict(),
                "host": sum(host.values()),
            }
        )
        engine.destroy()
        del engine, lisa, model, groups, run, step, meter
    if dist.get_rank() == 0:
        Path(arguments.folder, "figures.json").write_text(json.dumps(figures))


def main() -> None:
    """Measure every arm in one run; print peaks, plans and seconds."""
    parser = worker_parser(__doc__.splitlines()[0], "memory.json")
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--folder", folder, "--model", arguments.model, "--dtype", arguments.dtype]
        launch(Path(__file__), flags, num_ranks=2)
        figures = json.loads(Path(folder, "figures.json").read_text())
    rows = []
    for arm in figures:
        measured, planned = arm["measured"], arm["planned"]
        off = planned["peak"] / measured["peak"] - 1
        mib = [f"{count / 2**20:.1f}" for count in (measured["peak"], planned["peak"])]
        static, host = f"{measured['static'] / 2**20:.1f}", f"{arm['host'] / 2**20:.1f}"
        rows.append([arm["policy"], arm["ds_config"], f"{arm['seconds']:.2f}", *mib, f"{off:+.2%}", static, host])
    print_table(["", "ds_config", "s/step", "peak MiB", "planned", "off", "between steps", "of it host"], rows)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
