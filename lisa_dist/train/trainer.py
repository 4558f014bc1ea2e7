"""LISA in the Hugging Face Trainer: `LisaMixin` over any of its subclasses. TRL's are in sft_trainer.py.

A step of the loop, which is the Trainer's own::

    on_step_begin    lisa.on_step_begin(): switches when a period begins
    training_step    forward and backward, once for each micro-batch; DeepSpeed steps at the last
    lr_scheduler     runs on across switches: the optimizer object and its groups stay the same
    log              the loss, and lisa/... with it
"""

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.trainer import SCHEDULER_NAME

from lisa_dist.checkpoint.resume import check_pickles, load_checkpoint, start_from_weights
from lisa_dist.checkpoint.save import end_save, finish_save, save_checkpoint
from lisa_dist.checkpoint.weights import read_weights, save_without_weights, write_weights
from lisa_dist.config import LisaConfig
from lisa_dist.core.activation_checkpointing import AUTO, parse_budget, parse_checkpointed_layers, tile_mlps
from lisa_dist.core.controller import LisaController
from lisa_dist.core.engine_checks import check_eval_frozen_bits, check_no_adapters
from lisa_dist.distributed.collectives import together
from lisa_dist.distributed.devices import gpu_bytes_for_tensors
from lisa_dist.distributed.health import ComputeTime, describe_ranks
from lisa_dist.ds_config import shares_weights, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.files import write_json
from lisa_dist.loss.liger import check_liger
from lisa_dist.memory.run_memory import RunMemory
from lisa_dist.memory.workload import CHUNKED
from lisa_dist.optim.build import build_optimizer
from lisa_dist.run_folder import IDENTITY_NAME
from lisa_dist.train import resume
from lisa_dist.train.callbacks import LisaSteps
from lisa_dist.train.checks import check_numbers_of_examples, check_trainer
from lisa_dist.train.compiled_layers import CompiledLayers
from lisa_dist.train.deepspeed_arguments import begin_deepspeed
from lisa_dist.train.model_header import describe_training
from lisa_dist.train.monitoring import lisa_metrics
from lisa_dist.train.rollouts import Rollouts
from lisa_dist.train.run_mixin import RunMixin
from lisa_dist.train.step_memory import StepWorkload, bytes_of_any_gpu
from lisa_dist.zero.parameters import is_partitioned, local_tensors


class LisaMixin(RunMixin):
    """Put before a Trainer class: `class MyTrainer(LisaMixin, DPOTrainer): ...`; takes `lisa_config=LisaConfig(...)`.

    `deepspeed` is a short name (zero1, zero2, zero3, zero2_offload, ...), a path or a dict; zero2, unless the training
    arguments have a config. Without a launcher the process is the only rank. `trainer.lisa` is the controller once
    training has begun; `trainer.stopped_by` names the signal that ended it early, if one did. A run ends when a rank
    takes longer than `hang_timeout` seconds for a step (0: never). `checkpointed_layers` is "none", "all", a number of
    decoder layers, or "auto" for the fewest that `gpu_memory`, such as "24GiB", is enough for (by default what the GPU
    has free but 1.5 GiB, or 6%); left out, `gradient_checkpointing` of the arguments decides. `layers_are_planned`: how
    many layers train was planned too, and a measured step that needs more lowers it. `optim` takes the place
    of the arguments' own, which know no "lisa_adamw". `torch_compile` of the arguments compiles each layer by itself.
    `eval_frozen_bits` 16 evaluates, and predicts, with the originals of frozen layers in 8 or 4 bits.
    With `save_async` training waits for the copies of a checkpoint alone, and `on_save` comes before it is there.
    Raises ValueError at construction for arguments that LISA cannot train with.
    """

    _steps_callback = LisaSteps
    optimizer: torch.optim.Optimizer | None  # the Trainer's, as is the next
    model_wrapped: Any
    _loss = CHUNKED  # of TRL's SFTTrainer

    def __init__(
        self,
        *args: Any,
        lisa_config: LisaConfig | None = None,
        deepspeed: str | dict | None = None,
        checkpointed_layers: str | int | None = None,
        gpu_memory: str | None = None,
        layers_are_planned: bool = False,
        optim: str | None = None,
        save_async: bool = False,
        eval_frozen_bits: int | None = None,
        **kwargs: Any,
    ):
        self.lisa: LisaController | None = None
        self.lisa_config = lisa_config or LisaConfig()
        self._checkpointed_layers = parse_checkpointed_layers(checkpointed_layers)
        self._gpu_memory = parse_budget(gpu_memory, self._checkpointed_layers == AUTO or layers_are_planned)
        self._layers_are_planned = layers_are_planned
        self._max_steps: int | None = None  # of the whole run, once training begins
        self.memory: RunMemory | None = None
        self._ranks: list[tuple[str, str]] = []
        self._compute_time: ComputeTime | None = None
        self._begins = resume.Beginning()
        self._save_async = save_async
        check_eval_frozen_bits(eval_frozen_bits, self.lisa_config)
        self._evaluates_originals = eval_frozen_bits == 16
        begin_deepspeed([*args, *kwargs.values()], deepspeed, resume.task_trainer_of(type(self)))
        super().__init__(*args, **kwargs)
        self._optim = optim or self.args.optim.value
        optimizers = self.optimizer, self.optimizer_cls_and_kwargs
        ds_config = self._ds_config if self.is_deepspeed_enabled else None
        check_trainer(self.args, ds_config, self.lisa_config, self._optim, *optimizers)
        check_no_adapters(self.model, self.lisa_config.lisa_adapters)
        if self.lisa_config.lisa_nonfinite == "stop" and not self.args.fp16:
            self.args.logging_nan_inf_filter = False  # it asks each loss twice; a loss that is none ends the run
        if self.args.use_liger_kernel:
            self._print(check_liger(self.args, self.model.config, self.lisa_config))
        # Accelerate would replace the optimizer by a DeepSpeedCPUAdam of its own, with L2 decay and default betas.
        self._ds_config["zero_force_ds_cpu_optimizer"] = False
        self._workload = StepWorkload(self.args, type(self).compute_loss, self._loss, self._rows_shared_by)
        self.rollouts = Rollouts(self) if hasattr(self, "vllm_generation") else None  # of GRPO, where vLLM answers
        if self.args.torch_compile:
            self.add_callback(CompiledLayers(self, self.lisa_config.lisa_layers_attribute))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the active blocks of period 0; the Trainer calls it once, before DeepSpeed is set up."""
        if self.optimizer is None:
            self.lisa = LisaController(model or self.model, self.lisa_config, self.get_decay_parameter_names)
            self.lisa.sequence = self._sequence
            self.lisa.change_logs += [] if self.rollouts is None else [self.rollouts.changes]
            if not self.args.torch_compile:  # a layer's own function in its MLP would be a graph for each layer
                self.lisa.tiles = tile_mlps(model or self.model, self.lisa.blocks)
            self.lisa.gather_by_layers(model or self.model, self._ds_config)
            self.optimizer = build_optimizer(
                self.lisa.param_groups(self.args.weight_decay),
                self._optim,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                offload=uses_optimizer_offload(self._ds_config),
                seed=self.lisa_config.lisa_seed,
            )
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint: a path, or True for the newest whole one in `output_dir`.

        "auto" is True where there is a checkpoint, and the beginning where there is none.
        From any number of ranks and ZeRO stage the run goes on as it was; a folder that holds a model and nothing of a
        LISA run begins a new one. SIGTERM and SIGUSR1 end it with a checkpoint after the step, and `stopped_by` is set.
        """
        if self.lisa is not None:
            raise UserError("this trainer has trained once: build a new one.")
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.memory is not None:
                self.memory.abandon()
            if self.lisa is not None and self.lisa.is_attached:
                self.lisa.release()

    def _find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        self._begins = resume.find_beginning(wanted, self.args.output_dir, self.accelerator.print)
        resume.check_beginning(self, self._begins)
        check_numbers_of_examples(self.train_dataset, self.eval_dataset)
        return self._begins.checkpoint

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, Any]:
        """Where the Trainer has DeepSpeed load a checkpoint: ours is loaded instead, over the engine's partitions."""
        if self.model_wrapped is not self.model:  # an evaluation under ZeRO-3 has an engine without an optimizer
            self.accelerator.free_memory()
            self.model_wrapped, self.deepspeed = self.model, None
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._controller.attach(model, self.args.output_dir)
        for prepare in (partial(self._load, max_steps), self._plan_memory, self._meet_ranks):
            self._watchdog.beat()  # each may take as long as a step
            prepare()
        self._watchdog.beat()
        self._max_steps = max_steps
        if self.is_world_process_zero():
            print(self.describe(), flush=True)
        return model, train_dataloader

    def _load(self, max_steps: int) -> None:
        """Go on from a checkpoint, or begin from the weights of a model, where there is one to load."""
        folder, state, weights_from = self._begins
        if weights_from is not None:
            start_from_weights(self._controller, weights_from)
        if folder is None or state is None:
            return
        resume.check_goes_on(self.args, folder, state, self._controller.rows_per_step)
        changed, factor = resume.compare_on_rank_0(folder, lambda: self._identity, self.args.ignore_data_skip)
        changed += self._controller.check_state_dict(state["lisa"])
        check_pickles(folder, state["files"])
        for rates in state["learning_rates"].values():
            rates |= {name: rate * factor for name, rate in rates.items()}
        load_checkpoint(self._controller, folder, state)
        schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
        resume.load_schedule(self.lr_scheduler, self._engine.optimizer.param_groups, schedule, factor)
        self._print(f"resumed from {folder}, after step {self._engine.global_steps} of {max_steps}")
        self._print(f"not as its run had it: {', '.join(changed)}" if changed else None)

    def _meet_ranks(self) -> None:
        """Learn which ranks there are and how fast they talk, for the header; time each of them from here on."""
        self._ranks = describe_ranks(self.args.device)
        if self.args.world_size > 1:
            partitions: Any = self._controller.partitions
            waits = partitions.weights_are_sharded
            self._compute_time = ComputeTime(self._engine.module, self.args.device, waits)
            self._controller.at_close = self._compute_time.close

    def _plan_memory(self) -> None:
        """Set how many layers are checkpointed."""
        device, lisa, config = self.args.device, self._controller, self.model.config
        reference = getattr(self, "ref_model", None)
        others = [] if reference is None else reference.parameters()
        beside = [tensor for parameter in others for tensor in local_tensors(parameter)]
        can_plan = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not lisa.blocks.frozen_numel
        budget, measure_budget = self._gpu_memory, None
        if budget is None and device.type == "cuda":
            budget, measure_budget = bytes_of_any_gpu(device), partial(gpu_bytes_for_tensors, device)
        self.memory = RunMemory(
            lisa,
            self._ds_config,
            optim=self._optim,
            config=config if can_plan else None,
            longest=self._workload.longest(self.model),
            checkpointed=self._checkpointed_layers,
            budget=budget,
            measure_budget=measure_budget,
            beside=sum(tensor.nbytes for tensor in beside if tensor.device.type == device.type),
            layers_are_planned=self._layers_are_planned,
        )
        self._print(self.memory.set_checkpointing())

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        name = resume.task_trainer_of(type(self))
        return resume.describe_identity(self.args, getattr(self.model, "config", None), self.train_dataset, name)

    def _load_best_model(self) -> None:
        read_weights(self._engine, self._controller.blocks, Path(str(self.state.best_model_checkpoint)))
        self._controller.forget_changes()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, for an evaluation and a prediction, with what frozen layers are to be evaluated as."""
        is_whole = not any(is_partitioned(parameter) for parameter in self.model.parameters())
        if self.deepspeed is None and is_whole and shares_weights(self._ds_config):
            raise UserError(
                "evaluate() before train() with zero_hpz_partition_size: DeepSpeed forms the groups of ranks as it "
                "loads a model, and this one was loaded before the training arguments. Give the model by its name, "
                "load it after them, or train first."
            )
        frozen = self.lisa.frozen_layers if self.lisa is not None and self._evaluates_originals else None
        with frozen.exact() if frozen else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's, with a note of whether this rank's loss was finite, and of the measured step's micro-batch."""
        memory = self.memory
        assert memory is not None
        memory.restore_checkpointing()  # trainers that look at the model in two modes turn all of it on again
        if memory.wants_micro_batch and "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            rows, tokens = inputs["input_ids"].shape
            memory.note_micro_batch(self._workload.of(self.model, rows, tokens, padded, inputs.get("labels")))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._controller.note_loss(loss)
        return loss

    # Saving

    def _write_checkpoint(self, folder: Path, then: Callable[[], None]) -> None:
        """Any number of ranks can load its optimizer states."""
        save_checkpoint(
            self._controller,
            folder,
            writes=self.args.should_save,
            write_more=self._write_training_state,
            in_background=self._save_async,
            then=then,
        )

    def _finish_save(self) -> None:
        finish_save(self._controller)

    def _end_save(self) -> None:
        if self.lisa is not None and self.lisa.is_attached:
            end_save(self.lisa)

    def _write_training_state(self, folder: Path) -> None:
        """What the Trainer keeps next to model and optimizer: random states, schedule, its own state, the tokenizer."""
        self._save_rng_state(str(folder))
        if not self.args.should_save:
            return
        save_without_weights(lambda path: self._save(path, state_dict={}), folder)
        write_json(folder / IDENTITY_NAME, self._identity)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self._write_trainer_state(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for `from_pretrained`: weights in shards, configs, tokenizer, chat template.

        Under ZeRO-3 one block is gathered at a time, and one rank holds one shard next to its share of the model.
        """
        if self.lisa is None or not self.lisa.is_attached:  # not trained: the model is as it was loaded
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        self._warn_if_stopped(folder)
        with together(folder):
            if self.args.should_save:
                save_without_weights(lambda path: self._save(path, state_dict={}), folder)
        write_weights(self.lisa.engine, self.lisa.blocks, folder, self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add lisa/... to every training log, so that each tracker has them; all ranks log a loss, or none."""
        if "loss" in logs and self.lisa is not None and self.lisa.records:
            logs = logs | lisa_metrics(self.lisa)
            logs |= {} if self.rollouts is None else {"lisa/sent_to_vllm_mb": self.rollouts.sent_bytes / 1e6}
            if self._compute_time is not None:
                metrics, warning = self._compute_time.metrics()
                logs |= metrics
                self._print(warning)
        super().log(logs, *args, **kwargs)

    def active_now(self) -> str:
        """Return the layers and the sampled outer blocks of this period, or how many modules; "" without sampling."""
        if self.lisa is None or not self.lisa_config.samples:
            return ""
        if self.lisa_config.by_module:
            return f"modules: {len(self.lisa.active_layers)}"
        return self.lisa.selection.describe(self.lisa.active)

    def describe(self) -> str:
        """What will be trained, for the header of a run: blocks, parameters, ranks, states."""
        steps = self._max_steps
        return describe_training(self._controller, self.model, self._ds_config, self._optim, self._ranks, steps)

    @property
    def _ds_config(self) -> dict[str, Any]:
        """DeepSpeed's config, which may be changed until the engine is built."""
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config

    @property
    def _controller(self) -> LisaController:
        """`lisa`, once training has begun."""
        assert self.lisa is not None
        return self.lisa

    @property
    def _engine(self) -> Any:
        return self._controller.engine
