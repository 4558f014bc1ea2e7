"""LISA in the Hugging Face Trainer: `LisaMixin` over any of its subclasses, `LisaTrainer` over TRL's `SFTTrainer`.

A step of the loop, which is the Trainer's own::

    on_step_begin    lisa.on_step_begin(): switches when a period begins
    training_step    forward and backward, once for each micro-batch; DeepSpeed steps at the last
    lr_scheduler     runs on across switches: the optimizer object and its groups stay the same
    log              the loss, and lisa/... beside it
"""

from transformers import ProgressCallback, TrainerCallback
from trl import SFTTrainer

from lisa_dist.config import LisaConfig, UserError
from lisa_dist.controller import LisaController
from lisa_dist.ds_config import check_ds_config, uses_optimizer_offload
from lisa_dist.metrics import format_bytes, format_count, format_table, lisa_metrics
from lisa_dist.optimizer import build_optimizer, check_optim


class LisaMixin:
    """Put before a Trainer class: `class MyTrainer(LisaMixin, DPOTrainer): ...`; takes `lisa_config=LisaConfig(...)`.

    Needs a DeepSpeed config with ZeRO stage 1, 2 or 3 in the training arguments. `trainer.lisa` is the controller once
    training has begun. Raises ValueError at construction for arguments that LISA cannot train with.
    """

    lisa: LisaController | None = None

    def __init__(self, *args, lisa_config: LisaConfig | None = None, **kwargs):
        self.lisa_config = lisa_config or LisaConfig()
        super().__init__(*args, **kwargs)
        self._check_arguments()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_LisaProgressCallback())
        self.add_callback(_SwitchCallback(self))

    def create_optimizer(self, model=None):
        """The optimizer over the active blocks of period 0; the Trainer calls it once, before DeepSpeed is set up."""
        if self.optimizer is None:
            self.lisa = LisaController(self.model if model is None else model, self.lisa_config)
            self.optimizer = build_optimizer(
                self.lisa.param_groups(self.args.weight_decay),
                self.args.optim,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                offload=uses_optimizer_offload(self._ds_config),
            )
        return self.optimizer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train; resuming is refused, since a checkpoint's partitions may be those of other layers than period 0's."""
        if resume_from_checkpoint:
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: LISA runs cannot be resumed in this release; "
                "start a new run from the checkpoint's weights with --model_name_or_path."
            )
        if self.lisa is not None:
            raise UserError("this trainer has trained once: build a new one, whose LISA run begins at period 0.")
        return super().train(None, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add lisa/... to every training log, so that each tracker has them."""
        if "loss" in logs and self.lisa is not None and self.lisa.records:
            logs = logs | lisa_metrics(self.lisa.records[-1], self.lisa.visit_counts)
        super().log(logs, *args, **kwargs)

    def describe(self) -> str:
        """What will be trained, for the header of a run: blocks, parameters, states, precision."""
        lisa, config = self.lisa, self.lisa_config
        numel = {block.name: block.numel for block in lisa.blocks if block.parameters}
        layers = [block.numel for block in lisa.blocks.layers]
        total = sum(numel.values())
        always_on = [name for name in config.always_on if name in numel]
        never = [name for name in (*config.frozen, "outside") if name in numel]
        active = sum(numel[name] for name in always_on) + sum(layers[layer] for layer in lisa.active_layers)
        masters = sum(state.numel for state in lisa.partition_states().values())

        def named(names: list[str]) -> str:
            return ", ".join(f"{name} {format_count(numel[name])}" for name in names) or "nothing"

        rows = [
            ("model", f"{type(self.model).__name__}, {format_count(total)} parameters"),
            ("decoder layers", f"{len(layers)} of {format_count(max(layers))} at {lisa.blocks.layers_path}"),
            ("always on", named(always_on) + (" (embed and head are one tied matrix)" if lisa.blocks.tied else "")),
            ("never trained", named(never)),
            ("active at a time", f"{format_count(active)} ({100 * active / total:.1f}%)"),
            ("asleep", format_count(total - active)),
            (
                "period",
                f"{config.lisa_interval_steps} steps with {config.lisa_activated_layers} layers, {config.lisa_sampler}",
            ),
            ("ZeRO", f"stage {self._ds_config['zero_optimization']['stage']} on {self.args.world_size} rank(s)"),
            ("states per rank", f"{format_count(masters)} elements each of master weights and two moments"),
            ("memory now", f"{format_bytes(lisa.live_bytes())} of tensors per rank, before the moments"),
        ]
        return "LISA\n" + format_table(rows)

    @property
    def _ds_config(self) -> dict:
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config

    def _check_arguments(self) -> None:
        if not self.is_deepspeed_enabled:
            raise UserError(
                "LISA runs on DeepSpeed's ZeRO: give a config, such as --deepspeed zero2 (it works on one GPU too)."
            )
        check_ds_config(self._ds_config)
        check_optim(self.args.optim, uses_optimizer_offload(self._ds_config))
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
        ):
            if getattr(self.args, flag):
                raise UserError(f"--{flag} True: {what}; leave it out.")
        if self.args.optim_args or self.optimizer_cls_and_kwargs is not None:
            raise UserError(
                f"--optim_args {self.args.optim_args} and optimizer_cls_and_kwargs have no effect under LISA: use "
                "--optim, --learning_rate, --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon."
            )
        # Accelerate would replace the optimizer by a DeepSpeedCPUAdam of its own, with L2 decay and default betas.
        self._ds_config["zero_force_ds_cpu_optimizer"] = False


class LisaTrainer(LisaMixin, SFTTrainer):
    """TRL's SFTTrainer, trained by LISA: its formats, chat templates, packing and losses."""


class _LisaProgressCallback(ProgressCallback):
    """The Trainer's progress bar; lisa/... goes to the trackers and the log file, not to the terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith("lisa/")}
        super().on_log(args, state, control, logs=shown, **kwargs)


class _SwitchCallback(TrainerCallback):
    """Binds the controller to the Trainer's events."""

    def __init__(self, trainer: LisaMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.lisa.attach(self._trainer.model_wrapped, args.output_dir)
        if state.is_world_process_zero:
            print(self._trainer.describe(), flush=True)
            self._say_active(state)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._trainer.lisa.on_step_begin() and state.is_world_process_zero:
            self._say_active(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.lisa.close()

    def _say_active(self, state) -> None:
        from tqdm import tqdm

        lisa = self._trainer.lisa
        layers = ", ".join(map(str, lisa.active_layers))
        tqdm.write(f"step {state.global_step:>5}  period {lisa.period:>4}  active layers: {layers}")
