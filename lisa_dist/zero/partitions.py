"""This rank's ZeRO partitions of one engine: what the rest of the package reads of them, and the switch to others."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed
import torch
from torch.utils.hooks import RemovableHandle

from lisa_dist.config_rules import FACTORED
from lisa_dist.errors import UserError
from lisa_dist.optim.adamw import MOMENTS, LisaAdamW
from lisa_dist.optim.factored import Matrix
from lisa_dist.optim.moments import form_of_moments, restore_state
from lisa_dist.optim.states import CopyStream, Fields, PartitionKey, PartitionState, Piece
from lisa_dist.zero import embedding_rows, parameters
from lisa_dist.zero.cpu_ops import count_host_adam, host_adam_history, replay_host_adam
from lisa_dist.zero.embedding_rows import embedding_of, exchanges_rows, reduces_plainly
from lisa_dist.zero.layout import GroupLayouts, matrices_of_group, partition_numel, pieces_of_group
from lisa_dist.zero.overrides import override_optimizer, override_stage_3
from lisa_dist.zero.rebuild import CARRIED_FIELDS, let_go_of_model, put_back, rebuild
from lisa_dist.zero.stages import check_deepspeed, check_pin_memory_backend, check_private_names, left_out, stage_of
from lisa_dist.zero.step import host_groups


def remove_forward_hooks(engine: deepspeed.DeepSpeedEngine) -> None:
    """Remove those of an engine from its model, but for stage 3's, which gather weights."""
    if engine.zero_optimization_stage() < 3:
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()


class ZeroPartitions:
    """This rank's ZeRO partitions of one engine: read them, and build them again over other parameters.

    Raises ValueError for an engine, or a DeepSpeed release, that LISA cannot re-partition.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        check_deepspeed()
        check_pin_memory_backend()
        self.engine = engine
        self._stage = stage_of(engine)
        named, called = engine.module.named_parameters(), parameters.naming_of(engine.module)
        self._names = {id(parameter): called(name) for name, parameter in named}
        self._placeholders: dict[int, torch.nn.Parameter] = {}
        self._forward_hooks: list[RemovableHandle] = []
        check_private_names(engine, self._stage, CARRIED_FIELDS)
        count_host_adam(self.optimizer)
        if isinstance(self.optimizer, LisaAdamW):
            self._check_lisa_adamw()
        if self._stage.is_stage_3:
            override_stage_3(engine.module)

    def _check_lisa_adamw(self) -> None:
        """Refuse settings under which DeepSpeed itself must read the gradients, which LisaAdamW takes directly."""
        if self._stage.offloads_optimizer(self._zero):
            raise UserError(
                "the engine offloads optimizer states (offload_optimizer) and steps LisaAdamW: on the host DeepSpeed's "
                "own AdamW takes its place; build it with build_optimizer(..., offload=True), or leave the offload to "
                "--lisa_offload."
            )
        if self._zero.torch_autocast_gradscaler is not None:
            raise UserError(
                'the DeepSpeed config has torch_autocast with "dtype": "float16", whose scaler does not see the '
                "gradients that lisa_adamw takes: use bfloat16 there, or --optim adamw_torch_fused."
            )

    # What is there

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that ZeRO has wrapped, the same object for the whole run."""
        optimizer: torch.optim.Optimizer = self._zero.optimizer
        return optimizer

    @property
    def keeps_no_masters(self) -> bool:
        """Whether bf16 weights are stepped themselves, without masters in fp32."""
        return any(master.dtype == torch.bfloat16 for master in self._masters)

    @property
    def weights_are_sharded(self) -> bool:
        """Whether ranks hold different pieces of the weights (stage 3) or each holds all of them."""
        return self._stage.is_stage_3

    def form_of_moments(self, of: PartitionKey | str) -> str | None:
        """The form of the moments, as `moments.form_of_moments` has it, of a partition or of a `lisa_group`."""
        return form_of_moments(self.optimizer, self.optimizer.param_groups[self._index_of(of)])

    def _index_of(self, of: PartitionKey | str) -> int:
        """The place of the parameter group that has a partition now, or a `lisa_group`."""
        if isinstance(of, tuple):
            return self.keys().index(of)
        return [group["lisa_group"] for group in self.optimizer.param_groups].index(of)

    def keys(self) -> list[PartitionKey]:
        """The partitions in order, each known by the names of its parameters; () for a group without any."""
        placeholders = {id(value) for value in self._placeholders.values()}
        return [
            tuple(self._names[id(value)] for value in group if id(value) not in placeholders)
            for group in self._stage.groups(self._zero)
        ]

    def states(self) -> dict[PartitionKey, PartitionState]:
        """This rank's masters and optimizer states as they are now; moments appear with a partition's first step."""
        inner_state = self.optimizer.state
        return {
            key: PartitionState(
                master, dict(inner_state.get(master, {})), self._stage.master_is_weights(self._zero, index)
            )
            for index, (key, master) in enumerate(zip(self.keys(), self._masters, strict=True))
            if key
        }

    def pieces(self) -> dict[PartitionKey, list[Piece]]:
        """Which elements of which parameters this rank's partitions hold; what is left of a partition is padding."""
        groups, pieces = self._stage.groups_as_laid_out(self._zero), {}
        for key, group, master in zip(self.keys(), groups, self._masters, strict=True):
            if key:
                pieces[key], numel = self.layout(group)
                assert numel == master.numel(), f"DeepSpeed lays out {key} otherwise"
        return pieces

    def layout(self, params: Iterable[torch.nn.Parameter]) -> tuple[list[Piece], int]:
        """Pieces and elements of the partition that this rank holds, or would hold, of a group of these parameters."""
        rank = torch.distributed.get_rank(self._zero.dp_process_group)
        sizes = [(self._names[id(parameter)], parameters.parameter_numel(parameter)) for parameter in params]
        stage, world_size, alignment = self._cuts
        numel = partition_numel([numel for _, numel in sizes], stage, world_size, alignment)
        return pieces_of_group(sizes, stage, rank, world_size, alignment), numel

    @property
    def _cuts(self) -> tuple[int, int, int]:
        """What decides on the cuts, as `layout.py` takes it: stage, number of ranks, alignment."""
        world_size = torch.distributed.get_world_size(self._zero.dp_process_group)
        return self._stage.number, world_size, self._stage.alignment(self._zero)

    def gathered_bytes(self) -> int:
        """Bytes that stage 3 has of parameters for this step alone: whole ones, and a host's parts of active ones."""
        sharded: list[Any] = list(self.engine.module.parameters()) if self._stage.is_stage_3 else []
        gathered = [parameter for parameter in sharded if not parameter.ds_persist]
        by_place = {parameter.data.untyped_storage().data_ptr(): parameter for parameter in gathered}
        parts = {parameter.ds_tensor.untyped_storage().data_ptr() for parameter in by_place.values()}
        of_hosts = [parameter.ds_secondary_tensor for parameter in sharded if parameter.requires_grad]
        whole: int = sum(
            parameter.data.nbytes
            for place, parameter in by_place.items()
            if parameter.data.numel() == parameter.ds_numel and place not in parts
        )
        of_active: int = sum(part.nbytes for part in of_hosts if part is not None)
        return whole + of_active

    def close(self) -> None:
        """Give the model back as any trainer finds one, without a hook or an attribute of ours or of DeepSpeed's.

        But on stage 3 the hooks that gather weights stay, for an evaluation and a save to come.
        """
        for hook in self._forward_hooks:
            hook.remove()
        embedding_rows.leave(self.engine.module)
        let_go_of_model(self._zero, self._stage)
        remove_forward_hooks(self.engine)

    # What a save and a resume do

    def counters(self) -> dict[str, Any]:
        """What a run needs besides the partitions to go on: the loss scale of fp16, and the host AdamW's history.

        The host's AdamW steps placeholders too, and how often it did decides on the last bits of the others.
        """
        scaler, history = vars(self._zero.loss_scaler), host_adam_history(self.optimizer)
        masters = () if history is None else zip(self.keys(), self._masters, strict=True)
        steps = [0 if key else int(self.optimizer.state.get(master, {}).get("step", 0)) for key, master in masters]
        counters = {
            "loss_scaler": {name: value for name, value in scaler.items() if isinstance(value, int | float)},
            "host_adam": history,
        }
        return counters | ({"placeholder_steps": steps} if any(steps) else {})

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Go on with the loss scale and the history of a saved run."""
        for name, value in counters["loss_scaler"].items():
            setattr(self._zero.loss_scaler, name, value)
        replay_host_adam(self.optimizer, counters["host_adam"])
        groups = zip(self.keys(), self._masters, self.optimizer.param_groups, strict=True)
        for (key, master, group), step in zip(groups, counters.get("placeholder_steps", ()), strict=False):
            if step and not key:
                moments = dict.fromkeys(MOMENTS, torch.zeros_like(master))
                restore_state(self.optimizer, group, master, [], moments | {"step": step})

    def load_state(self, key: PartitionKey, fields: Fields) -> None:
        """Fill one partition with its saved master ("master") and, once it has stepped, moments."""
        index = self._index_of(key)
        master = self._masters[index]
        master.data.copy_(fields["master"])
        if "step" in fields:
            restore_state(self.optimizer, self.optimizer.param_groups[index], master, self.pieces()[key], fields)

    def state_of(self, lisa_group: str, pieces: list[Piece], fields: Fields) -> PartitionState:
        """The state of an inactive partition, from its saved fields, in the form that `lisa_group`'s would have."""
        inner, index = self.optimizer, self._index_of(lisa_group)
        like = self._masters[index]
        master = fields["master"].to(like.device, like.dtype)
        if "step" in fields:
            restore_state(inner, inner.param_groups[index], master, pieces, fields)
        return PartitionState(master, inner.state.pop(master, {}))

    # What a switch does

    def before_forward(self, call: Callable[..., Any]) -> None:
        """Have `call`, which is given the model and its inputs, called before each forward pass, until `close`."""
        self._forward_hooks.append(self.engine.module.register_forward_pre_hook(call))

    def apply_overrides(self, copies: CopyStream) -> None:
        """Install our overrides on the optimizer that DeepSpeed built at the start, as after each rebuild."""
        self._finish({}, copies)

    def repartition(
        self,
        params_of_groups: list[list[torch.nn.Parameter]],
        carried: Mapping[PartitionKey, PartitionState],
        copies: CopyStream,
    ) -> None:
        """Rebuild the partitions over `params_of_groups`, one list for each parameter group, as many as before.

        A group without parameters gets a placeholder of one element, which never has a gradient: DeepSpeed takes no
        empty group, and schedulers count groups.

        `carried` maps partition keys to the states that are carried over; every other partition starts with a master
        cloned from the weights and without moments; those that come from the host are copied on `copies`. Gradients
        must have been used up, and the device be done: call it between two optimizer steps.
        """
        assert len(params_of_groups) == len(self.optimizer.param_groups)
        filled = [params or [self._placeholder(index)] for index, params in enumerate(params_of_groups)]
        position = {key: number for number, key in enumerate(self._names)}
        rebuild(self.engine, self._stage, filled, position)
        self._finish(carried, copies)

    def _finish(self, carried: Mapping[PartitionKey, PartitionState], copies: CopyStream) -> None:
        """After DeepSpeed's construction: our overrides, and the states that are carried over."""
        keys = self.keys()
        pieces = self.pieces() if isinstance(self.optimizer, LisaAdamW) else {}
        of_rows = self._of_rows(keys)
        layout = GroupLayouts([pieces.get(key, []) for key in keys], self._matrices(keys), of_rows)
        override_optimizer(self.engine, self._stage, layout, copies)
        put_back(self._zero, self._stage, keys, carried, copies)

    def _of_rows(self, keys: list[PartitionKey]) -> tuple[int, list[Piece | None]] | None:
        """The group of an embedding whose gradient is of rows, and each rank's piece; None where a rank has nothing."""
        by_rows = isinstance(self.optimizer, LisaAdamW) and "get_flat_partition" not in left_out
        stage, world_size, alignment = self._cuts
        if not (by_rows and exchanges_rows(world_size) and reduces_plainly(self._zero, self._stage)):
            return None
        for index, (key, params) in enumerate(zip(keys, self._stage.groups(self._zero), strict=True)):
            if len(key) != 1 or index in host_groups(self._zero) or sum(map(bool, keys)) == 1:
                continue  # another parameter's gradient is what begins the end of a backward pass
            if embedding_of(self.engine.module, params[0]) is not None:
                size, ranks = [(key[0], params[0].numel())], range(world_size)
                of_ranks = [pieces_of_group(size, stage, rank, world_size, alignment) for rank in ranks]
                return index, [next(iter(pieces), None) for pieces in of_ranks]
        return None

    def _matrices(self, keys: list[PartitionKey]) -> list[list[Matrix]]:
        """The matrices of each group whose moments are factored."""
        laid_out, found = self._stage.groups_as_laid_out(self._zero), []
        for key, params, group in zip(keys, laid_out, self.optimizer.param_groups, strict=True):
            is_factored = key and group.get("lisa_state_bits") == FACTORED
            shapes = [(self._names[id(one)], parameters.parameter_shape(one)) for one in params] if is_factored else []
            found.append(matrices_of_group(shapes, *self._cuts))
        return found

    def _placeholder(self, index: int) -> torch.nn.Parameter:
        if index not in self._placeholders:
            like = next(iter(self.engine.module.parameters()))
            parameter = torch.nn.Parameter(torch.zeros(1, dtype=like.dtype, device=self.engine.device))
            if self._stage.is_stage_3:
                like.convert_to_zero_parameters(param_list=[parameter])
            self.engine.param_names[parameter] = f"lisa_placeholder.{index}"
            self._placeholders[index] = parameter
        return self._placeholders[index]

    @property
    def _zero(self) -> Any:
        return self.engine.optimizer

    @property
    def _masters(self) -> list[torch.Tensor]:
        return self._stage.masters(self._zero)
