"""LISA in the Hugging Face Trainer: `LisaMixin` over any of its subclasses, `LisaTrainer` over TRL's `SFTTrainer`.

A step of the loop, which is the Trainer's own::

    on_step_begin    lisa.on_step_begin(): switches when a period begins
    training_step    forward and backward, once for each micro-batch; DeepSpeed steps at the last
    lr_scheduler     runs on across switches: the optimizer object and its groups stay the same
    log              the loss, and lisa/... beside it
"""

import random
from pathlib import Path

import deepspeed
import numpy
import torch
from torch import distributed as dist
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from lisa_dist.checkpoint.folders import rotate_checkpoints
from lisa_dist.checkpoint.resume import (
    find_checkpoint,
    has_only_weights,
    load_checkpoint,
    rate_ratio,
    read_state,
    start_from_weights,
)
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.checkpoint.weights import save_without_weights, write_weights
from lisa_dist.config import LisaConfig
from lisa_dist.core.checkpointing import parse_budget, parse_checkpointed_layers
from lisa_dist.core.controller import LisaController
from lisa_dist.distributed.collectives import gather, together
from lisa_dist.distributed.health import SLOW, ComputeTime, describe_ranks
from lisa_dist.distributed.signals import StopSignals
from lisa_dist.distributed.watchdog import HANG_TIMEOUT, Watchdog
from lisa_dist.ds_config import check_ds_config, keep_no_master, offload_by_block, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.memory.run_memory import RunMemory
from lisa_dist.memory.trace import Workload
from lisa_dist.optim.build import build_optimizer, check_optim
from lisa_dist.text import format_active
from lisa_dist.train.attention import PackingCheck, packs_documents
from lisa_dist.train.header import describe_training
from lisa_dist.train.liger import check_liger
from lisa_dist.train.monitoring import MonitoredMixin, lisa_metrics
from lisa_dist.zero.stage3 import forget_module_order

_SLOW_LOGS = 3  # in so many logs one after another a rank must be slow to be named
RESERVED = 2**30  # bytes of a GPU, for the CUDA context, NCCL and fragments


class LisaMixin(MonitoredMixin):
    """Put before a Trainer class: `class MyTrainer(LisaMixin, DPOTrainer): ...`; takes `lisa_config=LisaConfig(...)`.

    Needs a DeepSpeed config with ZeRO stage 1, 2 or 3 in the training arguments. `trainer.lisa` is the controller once
    training has begun; `trainer.stopped_by` names the signal that ended it early, if one did. A run ends when a rank
    takes longer than `hang_timeout` seconds for a step (0: never). `checkpointed_layers` is "none", "all", a number of
    decoder layers, or "auto" for the fewest that `gpu_memory`, such as "24GiB", is enough for (by default all of the
    GPU but 1 GiB); left out, `gradient_checkpointing` of the arguments decides. `optim` takes the place of the
    arguments' own, which know no "lisa_adamw". Raises ValueError at construction for arguments that LISA cannot train
    with.
    """

    lisa: LisaController | None = None
    stopped_by: str | None = None

    def __init__(
        self,
        *args,
        lisa_config: LisaConfig | None = None,
        hang_timeout: float = HANG_TIMEOUT,
        checkpointed_layers: str | int | None = None,
        gpu_memory: str | None = None,
        optim: str | None = None,
        **kwargs,
    ):
        self.lisa_config = lisa_config or LisaConfig()
        self._checkpointed_layers = parse_checkpointed_layers(checkpointed_layers)
        self._gpu_memory = parse_budget(gpu_memory, self._checkpointed_layers)
        self._memory: RunMemory | None = None
        self._ranks: list[tuple[str, str]] = []
        self._compute_time: ComputeTime | None = None
        self._slow = (-1, 0)  # the rank that was slow in the last logs, and in how many one after another
        self._hang_timeout = hang_timeout
        self._resume_state: dict | None = None
        self._weights_from: Path | None = None
        self._saved_step: int | None = None
        if dist.is_initialized() and not deepspeed.comm.is_initialized():
            # Accelerate has started gloo for CPU ranks, but DeepSpeed must know of it before it loads a model in parts.
            deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        super().__init__(*args, **kwargs)
        self._optim = optim or self.args.optim.value
        self._check_arguments()
        self.add_callback(_SwitchCallback(self))

    def create_optimizer(self, model=None):
        """The optimizer over the active blocks of period 0; the Trainer calls it once, before DeepSpeed is set up."""
        if self.optimizer is None:
            self.lisa = LisaController(self.model if model is None else model, self.lisa_config)
            self.optimizer = build_optimizer(
                self.lisa.param_groups(self.args.weight_decay),
                self._optim,
                lr=self.args.learning_rate * self.lisa_config.rate_factor(len(self.lisa.blocks.layers)),
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                offload=uses_optimizer_offload(self._ds_config),
                seed=self.lisa_config.lisa_seed,
            )
        return self.optimizer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train, from the beginning or from a checkpoint: a path, or True for the newest whole one in `output_dir`.

        "auto" is True where there is a checkpoint, and the beginning where there is none.
        From any number of ranks and ZeRO stage the run goes on as it was; a folder that holds a model and nothing of a
        LISA run begins a new one. SIGTERM and SIGUSR1 end it with a checkpoint after the step, and `stopped_by` is set.
        """
        if self.lisa is not None:
            raise UserError("this trainer has trained once: build a new one.")
        folder = self._find_resume(resume_from_checkpoint)
        try:
            with StopSignals() as self._stop, Watchdog(self._hang_timeout) as self._watchdog:
                return super().train(folder, *args, **kwargs)
        finally:
            if self._memory is not None:
                self._memory.abandon()

    def _find_resume(self, wanted: str | bool | None) -> str | None:
        if wanted in (None, False):
            return None
        output_dir = self.args.output_dir
        if wanted in (True, "auto"):
            found = find_checkpoint(output_dir)
            if found is not None:
                folder, self._resume_state = found
                return str(folder)
            if wanted is True:
                raise UserError(
                    f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}."
                )
            self.accelerator.print(f"no checkpoint in {output_dir} yet: the run begins at step 0.")
            return None
        folder = Path(wanted)
        # Rank 0's view counts: a rank that saw no folder and raised alone would leave the others waiting.
        is_folder, only_weights = gather((folder.is_dir(), has_only_weights(folder)))[0]
        if not is_folder:
            raise UserError(f"--resume_from_checkpoint {folder}: no such folder.")
        if only_weights:
            self.accelerator.print(f"{folder} is no checkpoint of a LISA run: a new run begins from its weights.")
            self._weights_from = folder
            return None
        self._resume_state = read_state(folder)
        missing = [name for name in (TRAINER_STATE_NAME, SCHEDULER_NAME) if name not in self._resume_state["files"]]
        if missing:
            raise UserError(
                f"--resume_from_checkpoint {folder}: there is no {missing[0]} in it: it was saved in a loop of one's "
                "own, and goes on there with load_checkpoint()."
            )
        return str(folder)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Where the Trainer has DeepSpeed load a checkpoint: ours is loaded instead, over the engine's partitions."""
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.lisa.attach(model, self.args.output_dir)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self._watchdog.beat()
            self._check_rows_per_step(folder)
            load_checkpoint(self.lisa, folder, self._resume_state)
            ratio = rate_ratio(self.lisa, self._resume_state["lisa"])
            self._load_schedule(torch.load(folder / SCHEDULER_NAME, weights_only=True), ratio)
            self._say(f"resumed from {folder}, after step {self.lisa.engine.global_steps} of {max_steps}")
        elif self._weights_from is not None:
            self._watchdog.beat()
            start_from_weights(self.lisa, self._weights_from)
        self._watchdog.beat()
        self._ranks = describe_ranks(self.args.device)
        if self.args.world_size > 1:
            waits = self.lisa.partitions.weights_are_sharded
            self._compute_time = ComputeTime(self.lisa.engine.module, self.args.device, waits)
        self._watchdog.beat()
        self._memory = self._plan_memory()
        self._say(self._memory.set_dial())
        self._watchdog.beat()
        return model, train_dataloader

    def _check_rows_per_step(self, folder: Path) -> None:
        """Another number of rows in a step is another schedule, another place in the rows, another end."""
        now = self.lisa.engine.train_batch_size()
        then = self._resume_state.get("rows_per_step", now)  # which checkpoints of older releases do not tell
        if then != now and not self.args.ignore_data_skip:
            raise UserError(
                f"--resume_from_checkpoint {folder}: its run had {then} rows in a step, and here they are {now}, so it "
                f"would not go on as it was: give --global_batch_size {then}, or --ignore_data_skip true to begin the "
                "rows anew."
            )

    # Memory

    def _plan_memory(self) -> RunMemory:
        config, budget = self.model.config, self._gpu_memory
        if budget is None and self.args.device.type == "cuda":
            budget = torch.cuda.get_device_properties(self.args.device).total_memory - RESERVED
        longest = getattr(self.args, "max_length", None)
        rows = self.args.per_device_train_batch_size
        return RunMemory(
            self.lisa,
            self._ds_config,
            optim=self._optim,
            config=config if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None,
            longest=self._workload(rows, longest, padded=rows > 1) if longest else None,
            checkpointed=self._checkpointed_layers,
            budget=budget,
        )

    def _workload(self, rows: int, tokens: int, padded: bool) -> Workload | None:
        """A micro-batch as `FakeRun` takes it; None where the loss is one that it does not know."""
        compute_loss, args = type(self).compute_loss, self.args
        if compute_loss not in (Trainer.compute_loss, SFTTrainer.compute_loss) or args.label_smoothing_factor:
            return None
        return Workload(
            seq_length=tokens,
            micro_batch_size=rows,
            dtype=next(self.model.parameters()).dtype,
            attention="eager" if self.model.config._attn_implementation == "eager" else "sdpa",
            fused_head=compute_loss is SFTTrainer.compute_loss,
            padded=padded,
        )

    def _say(self, text: str | None) -> None:
        if text is not None and self.args.should_log:
            print(text, flush=True)

    def _load_schedule(self, state: dict, ratio: float) -> None:
        """Go on with a saved schedule, times `ratio`; where there are other groups, each has the schedule's rate."""
        for name in ("base_lrs", "_last_lr"):
            if name in state:
                state[name] = [rate * ratio for rate in state[name]]
        fresh, groups = self.lr_scheduler.state_dict(), self.lisa.engine.optimizer.param_groups
        if len(state.get("base_lrs", groups)) != len(groups):
            state |= {name: value for name, value in fresh.items() if isinstance(value, list)}
            state["_last_lr"] = [group["lr"] for group in groups]
        self.lr_scheduler.load_state_dict(state)

    def _run_epoch(self, *args, **kwargs):
        """The Trainer's, which would train one step more when it resumes a run that has taken all of its steps."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        """The Trainer's, which would delete all checkpoints but the best, the newest and a signal's among them."""
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        output = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        return output

    def evaluate(self, *args, **kwargs):
        """The Trainer's, without a trace in the random states.

        A resumed run does not evaluate again what was evaluated before it was saved, and must draw the same numbers.
        """
        cuda = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
        python_state, numpy_state = random.getstate(), numpy.random.get_state()
        with torch.random.fork_rng(devices=cuda):
            metrics = super().evaluate(*args, **kwargs)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        return metrics

    def training_step(self, model, inputs, *args, **kwargs):
        """The Trainer's, with a note of whether this rank's loss was finite, and of the measured step's rows."""
        self._memory.hold_dial()  # trainers that look at the model in two modes turn all of it on again
        if self._memory.wants_micro_batch and "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            self._memory.note_micro_batch(self._workload(*inputs["input_ids"].shape, padded))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.lisa.note_loss(loss)
        return loss

    # Saving

    def _save_checkpoint(self, model, trial):
        """The Trainer's `checkpoint-N`, written whole or not at all, with states that any number of ranks can load."""
        step = self.state.global_step
        if self._saved_step == step:  # a signal in a step that is saved anyway
            return
        self.store_flos()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        save_checkpoint(self.lisa, folder, writes=self.args.should_save, write_more=self._write_training_state)
        self._saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(folder, self.args.save_total_limit, best and Path(best))

    def _write_training_state(self, folder: Path) -> None:
        """What the Trainer keeps beside model and optimizer: random states, schedule, its own state, the tokenizer."""
        self._save_rng_state(str(folder))
        if not self.args.should_save:
            return
        save_without_weights(lambda path: self._save(path, state_dict={}), folder)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        states: dict[str, list] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: each[0] if len(each) == 1 else each for name, each in states.items()}
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for `from_pretrained`: weights in shards, configs, tokenizer, chat template.

        Under ZeRO-3 one block is gathered at a time, and one rank holds one shard beside its share of the model.
        """
        if self.lisa is None or not self.lisa.is_attached:  # not trained: the model is as it was loaded
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        with together(folder):
            if self.args.should_save:
                save_without_weights(lambda path: self._save(path, state_dict={}), folder)
        write_weights(self.lisa.engine, self.lisa.blocks, folder, self.args.should_save, original_names=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add lisa/... to every training log, so that each tracker has them; all ranks log a loss, or none."""
        if "loss" in logs and self.lisa is not None and self.lisa.records:
            logs = logs | lisa_metrics(self.lisa)
            if self._compute_time is not None:
                rank, times, host = self._compute_time.slowest()
                logs |= {"lisa/slowest_rank": rank, "lisa/slowest_rank_times_median": times}
                self._slow = (rank, self._slow[1] + 1 if rank == self._slow[0] else 1) if times > SLOW else (-1, 0)
                if self._slow[1] >= _SLOW_LOGS:
                    self._say(f"rank {rank} on host {host} computes {times:.2f} times as long as the median rank")
        super().log(logs, *args, **kwargs)

    def active_now(self) -> str:
        """The layers, and the outer blocks that are drawn, of this period."""
        return "" if self.lisa is None else format_active(self.lisa.active_layers, self.lisa.active_blocks)

    def describe(self) -> str:
        """What will be trained, for the header of a run: blocks, parameters, ranks, states."""
        return describe_training(self.lisa, self.model, self._ds_config, self._optim, self._ranks)

    @property
    def _ds_config(self) -> dict:
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config

    def _check_arguments(self) -> None:
        if not self.is_deepspeed_enabled:
            raise UserError(
                "LISA runs on DeepSpeed's ZeRO, on one GPU too: give a config, such as ds_configs/zero2.json, by "
                "--deepspeed."
            )
        check_ds_config(self._ds_config)
        offload_by_block(self._ds_config, self.lisa_config.offloaded)
        config = self.lisa_config
        precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"
        check_optim(self._optim, uses_optimizer_offload(self._ds_config), config, precision)
        if config.lisa_master != "fp32":
            keep_no_master(self._ds_config)
        if self.optimizer is not None:
            raise UserError("LISA builds the optimizer from its own blocks: pass no optimizers=(...) to the Trainer.")
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError(
                "--gradient_checkpointing_kwargs use_reentrant=True: reentrant checkpointing gives no gradients where "
                "the layers before it sleep; use the default, use_reentrant=False."
            )
        for flag, what in (
            ("load_best_model_at_end", "the best checkpoint may be of other layers than those active at the end"),
            ("auto_find_batch_size", "a smaller batch would need a new run"),
            ("enable_jit_checkpoint", "SIGTERM and SIGUSR1 save a checkpoint anyway"),
            ("save_only_model", "a LISA checkpoint holds what a resume needs, which is little"),
            ("save_on_each_node", "all ranks write one checkpoint together, in a folder that every node sees"),
        ):
            if getattr(self.args, flag):
                raise UserError(f"--{flag} True: {what}; leave it out.")
        if self.args.optim_args or self.optimizer_cls_and_kwargs is not None:
            raise UserError(
                f"--optim_args {self.args.optim_args} and optimizer_cls_and_kwargs have no effect under LISA: use "
                "--optim, --learning_rate, --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon."
            )
        if self.args.use_liger_kernel:
            self._say(check_liger(self.args, self.model.config, config))
        # Accelerate would replace the optimizer by a DeepSpeedCPUAdam of its own, with L2 decay and default betas.
        self._ds_config["zero_force_ds_cpu_optimizer"] = False


class LisaTrainer(LisaMixin, SFTTrainer):
    """TRL's SFTTrainer, trained by LISA: its formats, chat templates, packing and losses.

    Raises ValueError, at construction or before the first step, where packed documents would see each other.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if packs_documents(self.args):
            self.add_callback(PackingCheck(self, after=forget_module_order))


class _SwitchCallback(TrainerCallback):
    """Binds the controller to the Trainer's events."""

    def __init__(self, trainer: LisaMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._watchdog.beat()
        if state.is_world_process_zero:
            print(self._trainer.describe(), flush=True)
            self._say_active(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self._trainer._watchdog.beat()
        if self._trainer.lisa.on_step_begin() and state.is_world_process_zero:
            self._say_active(state)
        self._trainer._memory.begin_step(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._trainer._watchdog.beat()

    def on_substep_end(self, args, state, control, **kwargs):
        self._trainer._watchdog.beat()

    def on_prediction_step(self, args, state, control, **kwargs):
        self._trainer._watchdog.beat()

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._say(self._trainer._memory.end_step(state.global_step - 1))
        self._trainer._watchdog.beat()
        self._trainer.lisa.check_finite()
        self._trainer.stopped_by = self._trainer._stop.agreed()
        if self._trainer.stopped_by is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time that is left is for the save

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._trainer.stopped_by is not None:
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.lisa.close()
        self._trainer._watchdog.end_steps()
        if self._trainer.stopped_by is None and state.is_world_process_zero:
            self._trainer._memory.write_report(args.output_dir)

    def _say_active(self, state) -> None:
        lisa = self._trainer.lisa
        active = self._trainer.active_now()
        print(f"step {state.global_step:>5}  period {lisa.period:>4}  active layers: {active}", flush=True)
