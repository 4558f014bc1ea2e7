"""Parameter groups in constant number and order, and the optimizer over them.

Schedulers keep one base learning rate for each group and DeepSpeed one flat buffer, so the groups must not change in
number or order when other layers wake up. Each outer block has its own groups, and each of the gamma active layers
fills one slot; a block has one group for what decays and one for what does not. A slot, or a drawn outer block, may be
empty in a period: its groups stay in the list without parameters.
"""

from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from deepspeed.accelerator import get_accelerator

from lisa_dist.config import LisaConfig, UserError
from lisa_dist.core.blocks import Block, parameter_ndim
from lisa_dist.optim.adamw import LisaAdamW, decode_moment, in_chunks
from lisa_dist.optim.ops import choose_kernels
from lisa_dist.optim.states import PartitionState, Piece

# Optimizers that work on any flat piece of a parameter, which is what a ZeRO partition is.
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
# Not its paged forms: their memory is never given back, so every switch would leak the states it drops.
BITSANDBYTES_ADAMW = ("adamw_bnb_8bit", "adamw_8bit")
LISA_ADAMW = "lisa_adamw"  # our own: one pass, fewer bytes
SUPPORTED_OPTIMIZERS = (*TORCH_ADAMW, *BITSANDBYTES_ADAMW, LISA_ADAMW)

# AdamW's moments, and the number that bitsandbytes knows each by: state1, and for 8 bits absmax1 and qmap1.
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
QUANTIZED_BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit optimizers
_CHUNK = 2**24  # elements that are decoded at a time; whole blocks


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return parameter_ndim(parameter) >= 2 and not name.endswith("bias")


def split_by_decay(block: Block) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of a block as {"decay": [...], "no_decay": [...]}, without an empty entry."""
    kinds: dict[str, list[torch.nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in block.parameters.items():
        kinds["decay" if decays(name, parameter) else "no_decay"].append(parameter)
    return {kind: parameters for kind, parameters in kinds.items() if parameters}


def build_param_groups(
    outer: Iterable[Block],
    active_layers: Iterable[Block],
    weight_decay: float,
    state_bits: Mapping[str, int] | None = None,
    offloaded: Container[str] = (),
) -> list[dict]:
    """Parameter groups: the outer blocks first, then one slot for each active layer.

    Every group carries a `lisa_group` name, such as "embed/decay" or "slot1/no_decay". Where `state_bits` has its block
    (embed, head, rest or layers), the bits of its moments are its `lisa_state_bits`; 8 are for matrices alone.
    `lisa_host` says that its states are on the host, since `offloaded` has its block.
    """
    named = [(block.name, block.name, block) for block in outer]
    named += [(f"slot{slot}", "layers", layer) for slot, layer in enumerate(active_layers)]
    bits = state_bits or {}
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
            "lisa_group": f"{name}/{kind}",
            **({"lisa_state_bits": int(bits[policy])} if policy in bits and takes_bits(bits[policy], kind) else {}),
            **({"lisa_host": True} if policy in offloaded else {}),
        }
        for name, policy, block in named
        for kind, parameters in split_by_decay(block).items()
    ]


def takes_bits(bits: int, kind: str) -> bool:
    """Whether a group of this kind has the bits that its block is given: norms and biases are not worth 8."""
    return bits == 32 or kind == "decay"


def check_same_kinds(layers: list[Block]) -> None:
    """Raise ValueError when layers differ in which kinds of group they need, so that slots could not stay constant."""
    kinds = [tuple(split_by_decay(layer)) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{layer.name} has parameters of the kinds {kind}, but {layers[0].name} has {kinds[0]}: decoder layers "
                "must all have matrices, and all or none have norms or biases. Choose other layers with "
                "--lisa_layers_attribute."
            )


def default_state_bits(optim: str) -> int:
    """Bits of the moments, of a block that --lisa_state_bits does not name."""
    return 8 if optim in BITSANDBYTES_ADAMW else 32


def check_optim(optim: str, offload: bool, config: LisaConfig | None = None, half_precision: str = "bf16") -> None:
    """Refuse an optimizer, or bits and masters that it cannot have, before anything is built.

    `offload`: DeepSpeed's; `half_precision`: "bf16", "fp16" or "fp32", of the weights.
    """
    config = config or LisaConfig()
    state_bits, offloaded = config.state_bits, config.offloaded
    optim = getattr(optim, "value", optim)  # the Trainer's arguments hold an enum
    if optim not in SUPPORTED_OPTIMIZERS:
        raise UserError(
            f"--optim {optim}: LISA runs AdamW over ZeRO partitions; choose one of {', '.join(SUPPORTED_OPTIMIZERS)}."
        )
    if config.lisa_master != "fp32":
        flag = f"--lisa_master {config.lisa_master}"
        if optim != LISA_ADAMW:
            raise UserError(f"{flag} with --optim {optim}: only --optim lisa_adamw does without a master.")
        if half_precision != "bf16":
            raise UserError(f"{flag} with weights in {half_precision}: it rounds to bf16; give --bf16 true.")
        if offload:
            raise UserError(f"{flag} with offload_optimizer: what steps on the host is an fp32 master; leave one out.")
    if optim == LISA_ADAMW and not offload:
        _check_kernels(on_host=bool(offloaded))
    for block in offloaded:
        if state_bits.get(block, default_state_bits(optim)) == 8:
            raise UserError(
                f"--optim {optim} with --lisa_offload {config.lisa_offload}: states on the host have 32 bits; give "
                f"--lisa_state_bits {block}=32, or use --optim adamw_torch_fused."
            )
    eight = [block for block, bits in state_bits.items() if bits == 8]
    if offload and eight:
        raise UserError(
            f"--lisa_state_bits {eight[0]}=8 with offload_optimizer: DeepSpeed steps offloaded states on the host with "
            "its own AdamW at 32 bits; leave the flag out, or use a DeepSpeed config without offload_optimizer."
        )
    if offload and optim in BITSANDBYTES_ADAMW:
        raise UserError(
            f"--optim {optim} with offload_optimizer: DeepSpeed steps offloaded states on the host with its own AdamW; "
            "use --optim adamw_torch, or a DeepSpeed config without offload_optimizer."
        )


def _check_kernels(on_host: bool) -> None:
    """Raise ValueError at the start, and not in the first step, for kernels that were forced where they cannot run."""
    for device in {get_accelerator().device_name()} | ({"cpu"} if on_host else set()):
        choose_kernels(device)


def build_optimizer(
    param_groups: list[dict],
    optim: str = "adamw_torch",
    *,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    offload: bool = False,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed will wrap: AdamW as named by `--optim`, DeepSpeedCPUAdam under offload.

    `lr` is the peak learning rate; weight decay, and bits of the moments where `optim` has others, are in the groups;
    `seed` is that of lisa_adamw's stochastic rounding. Raises ValueError for an optimizer that cannot work.
    """
    check_optim(optim, offload)
    optim = getattr(optim, "value", optim)
    bits = [group.get("lisa_state_bits") for group in param_groups]
    if offload and 8 in bits:
        raise UserError("moments of 8 bits with offload: DeepSpeed's AdamW on the host keeps them in 32.")
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(param_groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
        optimizer.ds_opt_adam = _CountedAdam(optimizer.ds_opt_adam)
        return optimizer
    if optim == LISA_ADAMW:
        _check_kernels(on_host=any(group.get("lisa_host") for group in param_groups))
        return LisaAdamW(param_groups, lr=lr, betas=betas, eps=eps, seed=seed)
    if optim in TORCH_ADAMW and 8 not in bits:
        return torch.optim.AdamW(param_groups, lr=lr, betas=betas, eps=eps, fused=optim == "adamw_torch_fused")
    return _bitsandbytes_adamw()(param_groups, lr=lr, betas=betas, eps=eps, optim_bits=default_state_bits(optim))


def _bitsandbytes_adamw() -> type:
    """bitsandbytes' AdamW, which asks a group for the bits of its moments; imported where it is wanted."""
    import bitsandbytes

    class BlockwiseAdamW(bitsandbytes.optim.AdamW):
        def get_config(self, gindex: int, pindex: int, group: dict) -> dict:
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("lisa_state_bits", config["optim_bits"])}

    return BlockwiseAdamW


class _CountedAdam:
    """DeepSpeed's op for AdamW on the host, counting how it comes by the powers of the betas.

    From one step to the next it multiplies them, and where the count jumps it takes pow(beta, step): the bits differ.
    So a resumed run must go the way that the saved one went: pow at `start`, then products up to `step`.
    """

    def __init__(self, op):
        self._op = op
        self.start = self.step = 0

    def __getattr__(self, name: str):
        return getattr(self._op, name)

    def adam_update(self, opt_id: int, step: int, *args) -> None:
        if step not in (self.step, self.step + 1):
            self.start = step
        self.step = step
        self._op.adam_update(opt_id, step, *args)


def host_adam_history(optimizer: torch.optim.Optimizer) -> list[int] | None:
    """Where the host's AdamW took a power of the betas and where it has come to since; None for other optimizers."""
    op = getattr(optimizer, "ds_opt_adam", None)
    return [op.start, op.step] if isinstance(op, _CountedAdam) else None


def replay_host_adam(optimizer: torch.optim.Optimizer, history: list[int] | None) -> None:
    """Bring the host's AdamW, if it is one, to the powers of the betas that a saved run had; moves no weight."""
    op = getattr(optimizer, "ds_opt_adam", None)
    if history is None or not isinstance(op, _CountedAdam):
        return
    start, step = history
    betas = optimizer.param_groups[0]["betas"]
    other = tuple(beta / 2 for beta in betas)  # betas that change make it take the power anew
    for count, used in [(start, other), *((count, betas) for count in range(start, step + 1))]:
        nothing = [torch.zeros(1) for _ in range(4)]
        op.adam_update(optimizer.opt_id, count, 0.0, *used, 1.0, 0.0, False, *nothing)
    op.start = start


def dequantize(codes: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """An 8-bit moment in fp32, from what bitsandbytes keeps of it: state, absmax and qmap."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=code, blocksize=QUANTIZED_BLOCK)


def mean_squared_norm(state: PartitionState, pieces: list[Piece], beta2: float) -> float | torch.Tensor:
    """The squared L2 norm of a partition's gradient, averaged over the steps since its moments began; 0 before them.

    AdamW keeps it: its second moment is an exponential average of each element's square, so the sum over the elements,
    corrected for its beginning at zero, is that of the squared norm (Kingma and Ba, ICLR 2015, section 3).
    """
    fields = state.optimizer_state
    steps = int(fields["step"]) if fields else 0
    if steps == 0:
        return 0.0
    squares = sum(part.sum(dtype=torch.float64) for part in _second_moment(fields, pieces))
    return squares / (1 - beta2**steps)


def _second_moment(fields: dict, pieces: list[Piece]) -> Iterator[torch.Tensor]:
    """The second moment of a partition in fp32; where it is in codes, a chunk at a time."""
    of_bitsandbytes = f"state{MOMENTS['exp_avg_sq']}"
    moment = fields.get("exp_avg_sq", fields.get(of_bitsandbytes))
    if moment.dtype != torch.uint8:
        yield moment
    elif "exp_avg_sq_scales" in fields:
        for element, cut, blocks in in_chunks(pieces):
            yield decode_moment("exp_avg_sq", moment[cut], fields["exp_avg_sq_scales"][blocks], element)
    else:
        for begins in range(0, moment.numel(), _CHUNK):
            scales = fields["absmax2"][begins // QUANTIZED_BLOCK : (begins + _CHUNK) // QUANTIZED_BLOCK]
            yield dequantize(moment[begins : begins + _CHUNK], scales, fields["qmap2"])


def coding_of_states(optimizer: torch.optim.Optimizer) -> str | None:
    """Whose codes 8-bit moments have in this optimizer; None where it keeps no codes."""
    if isinstance(optimizer, LisaAdamW):
        return "lisa"
    return "bitsandbytes" if hasattr(optimizer, "name2qmap") else None


def restore_state(
    optimizer: torch.optim.Optimizer, group: dict, master: torch.Tensor, pieces: list[Piece], fields: dict
) -> None:
    """Give the optimizer saved moments of one partition, in the form that it keeps them in itself.

    `fields` has "step", and "exp_avg" and "exp_avg_sq" in fp32 or the codes and scales of 8-bit moments.
    """
    if isinstance(optimizer, LisaAdamW):
        optimizer.restore(group, master, pieces, fields)
        return
    if coding_of_states(optimizer) == "bitsandbytes":
        _restore_bitsandbytes(optimizer, group, master, fields)
        return
    state = {moment: torch.empty_like(master).copy_(fields[moment]) for moment in MOMENTS}
    step = fields["step"]
    if isinstance(optimizer, torch.optim.AdamW):
        device = master.device if group.get("fused") else "cpu"
        step = torch.tensor(float(step), dtype=torch.float32, device=device)
    optimizer.state[master] = {"step": step, **state}


def _restore_bitsandbytes(optimizer, group: dict, master: torch.Tensor, fields: dict) -> None:
    from bitsandbytes.functional import quantize_blockwise

    index = next(index for index, one in enumerate(optimizer.param_groups) if one is group)
    held, group["params"] = group["params"], [master]  # ZeRO fills groups only while they step
    optimizer.init_state(group, master, index, 0)
    group["params"] = held
    state = optimizer.state[master]
    for moment, number in MOMENTS.items():
        quantized = state[f"state{number}"].dtype == torch.uint8
        if f"state{number}" in fields and not quantized:  # it was written with fewer bits than it has now
            parts = (fields[f"{part}{number}"] for part in ("state", "absmax", "qmap"))
            state[f"state{number}"].copy_(dequantize(*parts))
        elif f"state{number}" in fields:  # the very same partition was written
            for field in (f"state{number}", f"absmax{number}", f"qmap{number}"):
                state[field].copy_(fields[field])
        elif quantized:
            codes, quantized = quantize_blockwise(
                fields[moment].to(master.device), code=state[f"qmap{number}"], blocksize=QUANTIZED_BLOCK
            )
            state[f"state{number}"].copy_(codes)
            state[f"absmax{number}"].copy_(quantized.absmax)
        else:
            state[f"state{number}"].copy_(fields[moment])
    state["step"] = fields["step"]
