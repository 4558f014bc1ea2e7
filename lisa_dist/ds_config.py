"""DeepSpeed configs: finding them by short name, and filling in what "auto" leaves to the run.

Under the Hugging Face Trainer the "auto" values are filled in from its arguments. DeepSpeed itself does not know the
word, so a loop of one's own takes the config from `load_ds_config`.
"""

import contextlib
import copy
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_dist.errors import UserError
from lisa_dist.files import read_text

if TYPE_CHECKING:
    import torch  # the verbs look for configs without it

# Values that a config may give itself, but not differently from the arguments of the run.
MUST_MATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")

_NO_NVME = (
    'switches move partitions between host and device only; use "cpu" (--deepspeed zero3_offload), or --method full '
    "with NVMe."
)
_QUANTIZED = "a switch does not move what it quantizes; remove it."
_SPLIT = "ranks share the model by ZeRO alone, each with rows of its own; remove it."
# Values that LISA cannot run under: the key, which values it may have besides, and why not others.
_REFUSED = (
    ("zero_optimization.offload_optimizer.device", ("none", "cpu"), _NO_NVME),
    ("zero_optimization.offload_param.device", ("none", "cpu"), _NO_NVME),
    ("zero_optimization.offload_optimizer.ratio", (1.0,), "LISA moves whole blocks; use 1.0."),
    (
        "bf16.bf16_master_weights_and_grads",
        (False,),
        "remove it; --lisa_master bf16_sr with --optim lisa_adamw does without masters in fp32.",
    ),
    (
        "zero_optimization.zero_quantized_nontrainable_weights",
        (False,),
        "a switch lets weights train that DeepSpeed has quantized for good; remove it.",
    ),
    ("zero_optimization.zero_quantized_weights", (False,), _QUANTIZED),
    ("zero_optimization.zero_quantized_gradients", (False,), _QUANTIZED),
    # By these, ranks have other parts of a layer, other experts or other tokens of a row.
    ("tensor_parallel.autotp_size", (0, 1), _SPLIT),
    ("expert_parallel.enabled", (False,), _SPLIT),
    ("sequence_parallel_size", (0, 1), _SPLIT),
)
_HPZ = "zero_hpz_partition_size"  # ranks that have a copy of all weights between them
_LIVE, _PREFETCH, _MOST_LIVE = "stage3_max_live_parameters", "stage3_prefetch_bucket_size", 2_000_000_000
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")


def shipped_ds_configs() -> list[str]:
    """Short names of the configs that come with the package, such as zero2."""
    folder = resources.files("lisa_dist") / "ds_configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".json"))


def find_ds_config(name_or_path: str) -> str:
    """The file behind `--deepspeed`: a shipped short name or a path. Raises ValueError when it is neither."""
    if name_or_path in shipped_ds_configs():
        return str(resources.files("lisa_dist") / "ds_configs" / f"{name_or_path}.json")
    with contextlib.suppress(OSError):  # of a name that is too long
        if Path(name_or_path).is_file():
            return name_or_path
    shipped = ", ".join(shipped_ds_configs())
    raise UserError(f"--deepspeed {name_or_path}: neither a file nor a shipped config; shipped are {shipped}.")


def read_ds_config(name_or_path: str) -> dict:
    """The config as it stands in the file, "auto" included."""
    path = find_ds_config(name_or_path)
    text = read_text("--deepspeed", path)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {name_or_path}: {path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {name_or_path}: {path} must hold a JSON object.")
    return config


def given_ds_config(given: dict | str | None) -> dict:
    """The config that `--deepspeed` gives, as an object, JSON, a short name or a path; an empty one where none is."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            return json.loads(given)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--deepspeed {given}: is not JSON ({error}).") from error
    return copy.deepcopy(given) if isinstance(given, dict) else read_ds_config(given) if given else {}


def check_sections(config: dict) -> None:
    """Refuse values that are not of their kind, which DeepSpeed and transformers trip over."""
    has = "the DeepSpeed config has"
    for name in _SECTIONS:
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise UserError(f'{has} {name} = {json.dumps(config[name])}: give an object {{"...": ...}}.')
    zero = config.get("zero_optimization") or {}
    if zero.get("stage", 0) not in range(4) or isinstance(zero.get("stage"), bool):
        raise UserError(f"{has} zero_optimization.stage = {json.dumps(zero['stage'])}: give 1, 2 or 3.")
    for name, value in zero.items():
        is_size = name.endswith(("_size", "_threshold", "_live_parameters", "_reuse_distance"))
        if is_size and value != "auto" and not (isinstance(value, int | float) and value >= 0):
            rule = 'give a number of elements, or "auto"'
            raise UserError(f"{has} zero_optimization.{name} = {json.dumps(value)}: {rule}.")


def check_ds_config(config: dict) -> None:
    """Refuse what LISA cannot run under, before a model is loaded: ValueError with the key and the way out."""
    zero = config.get("zero_optimization") or {}
    if zero.get("stage", 0) == 0:
        raise UserError(
            "the DeepSpeed config has zero_optimization.stage = 0 (or none): LISA re-partitions ZeRO states; use stage "
            "1, which costs nothing more on one GPU (--deepspeed zero1)."
        )
    if "optimizer" in config:
        raise UserError(
            'the DeepSpeed config has an "optimizer" section, but LISA builds the optimizer from its own blocks: '
            "remove the section and use --optim, --learning_rate, --weight_decay."
        )
    if zero.get("zenflow"):
        raise UserError('the DeepSpeed config has a "zenflow" section: it picks parameters itself; remove it.')
    if zero.get(_HPZ) not in (None, 0, 1, "auto") and (zero["stage"] != 3 or offloads_parameters(config)):
        raise UserError(
            f"the DeepSpeed config has {_HPZ} = {json.dumps(zero[_HPZ])}: weights are gathered on stage 3 alone, from "
            "GPUs of the same host and not from its memory; remove it, or use stage 3 without offload_param."
        )
    for name, allowed, why in _REFUSED:
        found: Any = config
        for key in name.split("."):
            found = (found or {}).get(key)
        if found not in (None, *allowed):
            shown = name.removeprefix("zero_optimization.")
            raise UserError(f"the DeepSpeed config has {shown} = {json.dumps(found)}: {why}")


def check_mismatches(mismatches: Sequence[str]) -> None:
    """Raise UserError for values in which transformers found the DeepSpeed config and the arguments to differ."""
    if mismatches:
        listed = "; ".join(each.removeprefix("- ") for each in mismatches)
        raise UserError(f'the DeepSpeed config and the arguments differ: {listed}; make them equal, or write "auto".')


def fill_secondary_partitions(config: dict, ranks_of_hosts: Sequence[int], has_reference: bool = False) -> None:
    """Put a number in the place of zero_hpz_partition_size "auto": a host's ranks where there are several, else 1.

    Frozen layers are then gathered from the ranks of a host alone. `ranks_of_hosts`: one after the other, as ranks are
    numbered. `has_reference`: a second model is loaded, for which DeepSpeed would make the groups of ranks again, and
    fails. Raises UserError for another number, and for hosts with different numbers of ranks.
    """
    zero = config.get("zero_optimization") or {}
    here, size = set(ranks_of_hosts), zero.get(_HPZ) or 1
    if size == "auto":
        shares = zero.get("stage") == 3 and len(ranks_of_hosts) > 1 and len(here) == 1
        zero[_HPZ] = size = max(here) if shares and not (has_reference or offloads_parameters(config)) else 1
    if size == 1:
        return
    if has_reference:
        raise UserError(f"the DeepSpeed config has {_HPZ} = {size}: not with a reference model; make it 1.")
    if here != {size} or len(ranks_of_hosts) == 1:
        listed = ", ".join(map(str, ranks_of_hosts))
        raise UserError(
            f"the DeepSpeed config has {_HPZ} = {json.dumps(size)}: the ranks of a host share a copy of the weights, "
            f'and the hosts have {listed} ranks; make it the number of each of several hosts\' ranks, or "auto".'
        )


def shares_weights(config: dict) -> bool:
    """Whether the ranks of a host have a copy of all weights between them."""
    return ((config.get("zero_optimization") or {}).get(_HPZ) or 1) != 1


def fill_layer_gathers(config: dict, largest_layer: int | None, hidden_size: int) -> bool:
    """Whether ZeRO-3 is to gather a decoder layer at once, and if so have it prefetch one, and no more, ahead.

    So it is where two layers, of `largest_layer` elements, are no more than the parameters that the config lets be
    whole, or 2e9; not where it is None. A ring of many ranks takes as long to begin for a matrix as for a layer.
    """
    zero = config.get("zero_optimization") or {}
    live = zero.get(_LIVE, "auto")
    if largest_layer is None or zero.get("stage") != 3 or 2 * largest_layer > (_MOST_LIVE if live == "auto" else live):
        return False
    if live == "auto":
        zero[_LIVE] = 2 * largest_layer
    if zero.get(_PREFETCH, "auto") in ("auto", int(0.9 * hidden_size**2)):  # which the Trainer makes of "auto"
        zero[_PREFETCH] = largest_layer
    return True


def cuts_weights(config: dict) -> bool:
    """Whether ZeRO cuts the weights between the ranks, as on stage 3."""
    return (config.get("zero_optimization") or {}).get("stage") == 3


def offloads_parameters(config: dict) -> bool:
    """Whether ZeRO-3 keeps the weights on the host."""
    offload = (config.get("zero_optimization") or {}).get("offload_param") or {}
    return offload.get("device", "none") != "none"


def uses_optimizer_offload(config: dict) -> bool:
    """Whether ZeRO keeps the optimizer states on the host."""
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def offload_by_block(config: dict, offloaded: Sequence[str]) -> None:
    """Where --lisa_offload names blocks, it says alone whose states are on the host: take DeepSpeed's word away."""
    zero = config.get("zero_optimization") or {}
    if not offloaded:
        return
    if offloads_parameters(config):
        raise UserError(
            f"--lisa_offload {','.join(offloaded)} with offload_param in the DeepSpeed config: DeepSpeed offloads "
            "parameters only together with all optimizer states; leave one of them out."
        )
    zero.pop("offload_optimizer", None)


def precision_of(config: dict) -> str:
    """ "bf16", "fp16" or "fp32": what DeepSpeed makes of the weights by a config without "auto"."""
    enabled = [name for name in ("bf16", "fp16") if (config.get(name) or {}).get("enabled")]
    return enabled[0] if enabled else "fp32"


def keep_no_master(config: dict) -> None:
    """Have DeepSpeed step the bf16 weights themselves; moments are the optimizer's matter, whatever it thinks."""
    config["bf16"] = (config.get("bf16") or {}) | {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def load_ds_config(
    name_or_path: str | dict,
    *,
    model: "torch.nn.Module",
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    ranks_of_hosts: Sequence[int] = (1,),
) -> dict:
    """The config with every "auto" filled in, ready for `deepspeed.initialize`.

    Batch sizes in examples: `micro_batch_size` a GPU and step. They, the clipping and the precision, which is that of
    the model's parameters, are filled in where they are missing too; bucket sizes, in elements, follow the model's
    hidden size as the Hugging Face integration has them; `ranks_of_hosts` decide on zero_hpz_partition_size. Raises
    ValueError for a config that contradicts the arguments.
    """
    config = read_ds_config(name_or_path) if isinstance(name_or_path, str) else json.loads(json.dumps(name_or_path))
    precision = str(next(model.parameters()).dtype)
    model_config: Any = getattr(model, "config", None)
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    hidden_size = 1024 if model_config is None else model_config.hidden_size
    filling = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "bf16.enabled": precision == "torch.bfloat16",
        "fp16.enabled": precision == "torch.float16",
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for dotted, value in filling.items():
        *parents, key = dotted.split(".")
        section = config
        for parent in parents:
            section = section.get(parent, {})
        given = section.get(key)
        if given == "auto" or (given is None and dotted in MUST_MATCH):
            section[key] = value
        elif given is not None and dotted in MUST_MATCH and given != value:
            raise UserError(
                f"the DeepSpeed config has {dotted} = {given}, but the arguments say {value}: make them equal."
            )
    if "bf16" not in config and "fp16" not in config and precision in ("torch.bfloat16", "torch.float16"):
        config["bf16" if precision == "torch.bfloat16" else "fp16"] = {"enabled": True}
    if config.get("train_batch_size") == "auto":
        del config["train_batch_size"]  # DeepSpeed derives it from the other two and the world size
    fill_secondary_partitions(config, ranks_of_hosts)
    return config
