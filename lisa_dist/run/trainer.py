"""The trainer of a run, TRL's of its task, with the model loaded."""

import copy
from functools import partial
from typing import Any

from peft import PeftConfig
from transformers.utils.quantization_config import Mxfp4Config
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, get_peft_config
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import create_model_from_path

from lisa_dist.data.dataset import Data
from lisa_dist.data.stream import Stream
from lisa_dist.errors import UserError
from lisa_dist.report.hub import write_card
from lisa_dist.run.arguments import DEQUANTIZED, RunConfig, model_config_of, stored_quantization
from lisa_dist.run.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32
from lisa_dist.run.inputs import Processing
from lisa_dist.run.quiet import without_bars_of_datasets
from lisa_dist.run.reward_functions import load_rewards
from lisa_dist.run.sample_answer import SampleCallback
from lisa_dist.run.settle import Settled
from lisa_dist.run.task_configs import refused_upstream
from lisa_dist.tasks import GRPO, KTO, REWARD, SFT
from lisa_dist.text import in_one_line
from lisa_dist.train.baseline import BaselineMixin
from lisa_dist.train.callbacks import BestMetric, FinalSave
from lisa_dist.train.compiled_layers import CompiledLayers
from lisa_dist.train.layer_norms import LayerNorms
from lisa_dist.train.sft_trainer import BaselineTrainer, LisaTrainer
from lisa_dist.train.trainer import LisaMixin


def _with_mixins(trainer: Any) -> tuple[Any, Any]:
    name = trainer.__name__
    return type(f"Lisa{name}", (LisaMixin, trainer), {}), type(f"Baseline{name}", (BaselineMixin, trainer), {})


# By task: trained by LISA, and the one of --method full and lora, which logs what a LISA run logs.
TRAINERS = {
    SFT: (LisaTrainer, BaselineTrainer),
    "dpo": _with_mixins(DPOTrainer),
    KTO: _with_mixins(KTOTrainer),
    "orpo": _with_mixins(ORPOTrainer),
    REWARD: _with_mixins(RewardTrainer),
    GRPO: _with_mixins(GRPOTrainer),
}


def load_trainer(settled: Settled, processing: Processing, data: Data) -> Any:
    """The trainer, which loads the model. Raises UserError for what TRL and transformers refuse."""
    try:
        return build_trainer(settled, processing, data)
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # of a package that a flag needs
        raise refused_upstream(error, settled.config.training) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"--model_init_kwargs: {in_one_line(error)}.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # what from_pretrained says of weights of other sizes
            raise
        name = settled.config.model.model_name_or_path
        raise UserError(f"--model_name_or_path {name}: its weights are not of its config.json's sizes.") from error


def load_model(config: RunConfig) -> Any:
    """What the trainer is given: the model's name, which it loads, or a model where it would load another.

    Weights that are stored in fewer bits are loaded in 16. Ranks but the first have no use for a copy of the model each
    where frozen layers have originals that a host's ranks share: theirs is on the meta device.
    """
    name, training = str(config.model.model_name_or_path), config.training
    is_empty = config.run.method == "lisa" and bool(config.lisa.frozen_flags) and training.process_index > 0
    is_packed = config.run.method != "lora" and stored_quantization(model_config_of(config)) == DEQUANTIZED
    if config.run.task != SFT or not (is_empty or is_packed):
        return name
    given: Any = training.model_init_kwargs
    loads_by: Any = given | {"device_map": "meta" if is_empty else None}
    if is_packed:
        loads_by["quantization_config"] = Mxfp4Config(dequantize=True)
    return create_model_from_path(name, **loads_by)


def build_trainer(settled: Settled, processing: Processing, data: Data) -> Any:
    """The trainer of the task and the method, with the model loaded."""
    config = settled.config
    arguments: dict[str, Any] = {
        "model": load_model(config),
        "args": config.training,
        "train_dataset": data.train.as_dataset() if isinstance(data.train, Stream) else data.train,
        "eval_dataset": data.held_out,
        "processing_class": processing,
        "hang_timeout": config.run.hang_timeout,
    }
    if config.run.task == SFT:
        arguments["loss"] = settled.loss
        arguments["stream"] = data.train if isinstance(data.train, Stream) else None
    if config.run.reward_funcs:
        arguments["reward_funcs"] = load_rewards(config.run.reward_funcs)
    if config.run.method == "lisa":
        arguments |= {
            "lisa_config": config.lisa,
            "checkpointed_layers": config.run.checkpointed_layers,
            "gpu_memory": config.run.gpu_memory,
            "layers_are_planned": bool(settled.layers_line),
            "save_async": config.run.save_async,
            "eval_frozen_bits": config.run.eval_frozen_bits,
        }
    else:
        arguments["peft_config"] = _adapters(config) if config.run.method == "lora" else None
    with without_bars_of_datasets():
        trainer = TRAINERS[config.run.task][config.run.method != "lisa"](**arguments)
    if config.run.task != SFT and (left := len(trainer.train_dataset)) < (total := len(data.train)):
        if not left:  # TRL leaves out what is too long, of some tasks
            raise UserError(f"--max_length {config.training.max_length}: every one of {total} rows is longer.")
        trainer.accelerator.print(f"{total - left} of {total} rows are too long, and left out")
    trainer.write_card = partial(write_card, str(config.training.output_dir))
    if config.run.method != "lisa" and config.training.torch_compile:
        trainer.add_callback(CompiledLayers(trainer, config.lisa.lisa_layers_attribute))
    if config.model.load_in_4bit:
        _keep_codes_for_training(trainer.model)
    if config.training.bf16 and config.training.use_cpu and not cpu_multiplies_bf16():
        multiply_in_fp32(trainer.model)
    trainer.final_save = FinalSave(trainer)
    trainer.add_callback(trainer.final_save)  # before those that write samples and norms
    if config.run.sample_prompt:
        trainer.add_callback(SampleCallback(trainer, config.run.sample_prompt))
    trainer.add_callback(BestMetric())
    if config.run.layer_norms:
        trainer.add_callback(LayerNorms(config.run.layer_norms, config.lisa.lisa_layers_attribute))
    return trainer


def _keep_codes_for_training(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit codes for inference when it evaluates on CPUs with AVX-512 BF16.

    Packed weights give no gradients to the layers below, and widths that are no multiple of 64 cannot be packed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _adapters(config: RunConfig) -> PeftConfig | None:
    """The adapters of `--lora_*`."""
    model_args = copy.copy(config.model)
    model_args.use_peft = True  # TRL's flag for them
    if config.run.task == REWARD:
        model_args.lora_task_type = "SEQ_CLS"  # by which peft trains the score, and saves it
    return get_peft_config(model_args)
