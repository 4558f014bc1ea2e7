"""Do forms of lisa_adamw learn alike, and are kept states worth their memory? Losses on real data, bytes, seconds.

python -m benchmarks.quality.states --model stories260k-hf --dataset gsm8k/train.jsonl
python -m benchmarks.quality.states --model stories260k-hf --dataset gsm8k/train.jsonl --compare policies \
    --results benchmarks/results/keep.json

Two ranks. Every arm samples the same layers and begins from the same weights. Bytes of the forms are those of live
storages, each counted once, of weights, gradients and states of the active parameters, on both ranks together. Under
ZeRO-2 every rank holds all weights, and the whole of each gradient that its partition cuts; under ZeRO-3 everything is
there once. Policies have the bytes of their kept states on the host, and seconds of their switches.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_with_data, positive, write_results
from benchmarks.quality.training import held_out_losses, of_rank, padded, read_tokens, train
from benchmarks.tables.show import show
from lisa_dist.run.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32
from lisa_dist.zero.parameters import parameter_numel

ROWS, LENGTH, HELD_OUT, LR = 16, 128, 64, 5e-4


@dataclass(frozen=True)
class Form:
    """How the optimizer holds its weights and states; and LISA's settings."""

    dtype: torch.dtype = torch.float32
    optim: str = "adamw_torch_fused"
    settings: dict = field(default_factory=dict)

    def load(self, model_path: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=self.dtype)
        if self.dtype == torch.bfloat16 and not cpu_multiplies_bf16():
            multiply_in_fp32(model)
        return model


BF16, ALL_8, NO_MASTER = torch.bfloat16, {"lisa_state_bits": "embed=8,head=8,layers=8"}, {"lisa_master": "bf16_sr"}
FORMS = {
    "fp32, torch AdamW": Form(),
    "bf16, torch AdamW": Form(BF16),
    "bf16, bitsandbytes 8 bits": Form(BF16, "adamw_8bit"),
    "fp32": Form(optim="lisa_adamw"),
    "bf16, fp32 master": Form(BF16, "lisa_adamw"),
    "bf16, fp32 master, 8 bits": Form(BF16, "lisa_adamw", ALL_8),
    "bf16_sr": Form(BF16, "lisa_adamw", NO_MASTER),
    "bf16_sr, 8 bits": Form(BF16, "lisa_adamw", ALL_8 | NO_MASTER),
}
POLICIES = {
    name: Form(settings={"lisa_state": name, "lisa_sampler": "reshuffle"}) for name in ("reset", "reset_all", "keep")
}


def run(model_path: str, dataset: str, form: Form, steps: int, interval: int, seed: int | None) -> dict:
    """On a rank: train; losses, and what each switch took. `seed`: of the order of rows, or None for the file's own."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokens = read_tokens(tokenizer, dataset, ROWS * steps + HELD_OUT, LENGTH)
    ids = padded(tokens, LENGTH, tokenizer.eos_token_id or 0)
    held_out, rest = ids[:HELD_OUT], ids[HELD_OUT:]
    if seed is not None:
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    batches = rest.split(ROWS)
    config = lisa_dist.LisaConfig(lisa_interval_steps=interval, lisa_seed=seed or 0, **form.settings)
    common = {"lr": LR, "weight_decay": 0.01, "optim": form.optim}
    engine, lisa = lisa_dist.initialize(form.load(model_path), "zero2", config, **common)
    losses = train(engine, lisa, [of_rank(batches[step % len(batches)]) for step in range(steps)])
    lisa.close()
    (after,) = held_out_losses(engine, [of_rank(held_out)])
    engine.destroy()
    records = lisa.records
    switches = {"host_bytes": [one.host_bytes for one in records], "seconds": [one.seconds for one in records[1:]]}
    return {"losses": losses, "held_out": after} | switches


def bytes_of(model_path: str, stage: str, form: Form) -> dict[str, float]:
    """On a rank, for each active parameter: bytes of weights, of gradients that wait for a step, of states."""

    def storages(tensors) -> dict[int, int]:
        found = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    config = lisa_dist.LisaConfig(**form.settings)
    engine, lisa = lisa_dist.initialize(form.load(model_path), stage, config, optim=form.optim)
    active = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    tokens = torch.arange(LENGTH)[None]
    for _ in range(2):
        lisa.on_step_begin()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        gradients = storages(lisa.partitions.held_gradients())
        engine.step()
    weights = storages(lisa.partitions.local_weights(parameter) for parameter in active)
    parts = [
        part for state in lisa.partition_states().values() for part in (state.master, *state.optimizer_state.values())
    ]
    states = {place: size for place, size in storages(parts).items() if place not in weights}
    numel = sum(map(parameter_numel, active))
    engine.destroy()
    held = {"weights": weights, "gradients": gradients, "states": states}
    return {name: sum(sizes.values()) / numel for name, sizes in held.items()}


def main() -> None:
    """Train every form or policy on two ranks; print and write what came of it."""
    run_on_cpu()
    parser = parser_with_data(__doc__, "forms")
    parser.add_argument("--compare", choices=("forms", "policies"), default="forms")
    parser.add_argument("--steps", type=positive, help="150 of forms, 200 of policies")
    parser.add_argument("--seeds", type=positive, default=3, help="of forms")
    arguments = parser.parse_args()
    data, figures = (arguments.model, arguments.dataset), {}
    with RankGroup(2, Caller) as ranks:
        if arguments.compare == "policies":
            for name, form in POLICIES.items():
                figures[name] = ranks.call("run", run, *data, form, arguments.steps or 200, 5, None)[0]
        else:
            for name, form in FORMS.items():
                runs = [
                    ranks.call("run", run, *data, form, arguments.steps or 150, 10, seed)[0]
                    for seed in range(arguments.seeds)
                ]
                figures[name] = {"dtype": str(form.dtype), "optim": form.optim, "runs": runs, "bytes": {}}
                for stage in ("zero2", "zero3"):
                    first, second = ranks.call("run", bytes_of, arguments.model, stage, form)
                    figures[name]["bytes"][stage] = {part: size + second[part] for part, size in first.items()}
                print(f"{name}: measured", flush=True)
    write_results(arguments.results, figures)
    show("states", figures, "keep" if arguments.compare == "policies" else "forms")


if __name__ == "__main__":
    main()
