"""One training step of a model on fake tensors, which have shapes and no data: what it allocates, and when.

Activations are not estimated by a formula for each architecture: the model itself is run, with the blocks trained that
LISA would train, and every allocation is counted. `estimate.py` adds what DeepSpeed allocates.
"""

import contextlib
import copy
import itertools
import logging
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from lisa_dist.config_rules import StateBits
from lisa_dist.core.activation_checkpointing import checkpoint_layers, tile_mlps
from lisa_dist.core.adapters import add_adapters
from lisa_dist.core.blocks import find_blocks, split_into_modules, without_zero3_init
from lisa_dist.core.live_bytes import AllocationTracker
from lisa_dist.core.matrices import Matrix, quantizable_matrices
from lisa_dist.core.selection import split_by_decay, takes_bits
from lisa_dist.core.sequence_parallel import UlyssesAttention
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import add_label_logits
from lisa_dist.memory.repeated_layers import (
    END_OF_FORWARD,
    Event,
    LayersDifferError,
    Place,
    Segments,
    events_of_all,
    find_stand_ins,
    kinds_of,
    only_layers,
    segments_of,
    trained_kinds,
)
from lisa_dist.memory.stand_ins import TritonScores, offloaded_activations, stand_ins, without_liger
from lisa_dist.memory.trace_files import read_or_make
from lisa_dist.memory.workload import LOGITS, OF_TRL, RATIO, SCORE, Group, Lora, Trained, Workload
from lisa_dist.optim.build import default_state_bits
from lisa_dist.zero.embedding_rows import embedding_of
from lisa_dist.zero.stage3 import largest_layer

_EMBEDDING = "the backward pass comes to the embedding"


class PlanError(UserError):
    """The model cannot be run on fake tensors: the message contains its error."""


@contextlib.contextmanager
def _report_model_errors(config: PretrainedConfig) -> Iterator[None]:
    """Turn the errors of a model's own code, which alone runs in here, into PlanError.

    The code may come from the hub, and meets tensors without data: which errors it then raises cannot be known. A run
    that has trained must not end by one, and `lisa-dist plan` reports which model cannot be planned, and why.
    """
    words = logging.getLogger("torch._subclasses.fake_tensor")  # a traceback of each error, though it is caught
    were_disabled, words.disabled = words.disabled, True
    try:
        with without_liger(), without_zero3_init():
            yield
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise PlanError(
            f"{type(config).__name__}: this model cannot be planned ({type(error).__name__}: {lines[0]})."
        ) from error
    finally:
        words.disabled = were_disabled


@dataclass(frozen=True, eq=False)  # equal is the same one: tensors have no truth value
class Arrival:
    """A gradient that arrives in a traced backward pass. Bytes of all allocations but the gradients before it."""

    parameter: torch.nn.Parameter
    peak_before: int  # the most since the gradient before it
    now: int  # when it arrives, itself included

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient."""
        return self.parameter.numel() * self.parameter.element_size()


@dataclass(frozen=True)
class StepTrace:
    """Bytes that a forward and backward pass allocates on top of weights and states."""

    activations: int  # at the end of the forward pass
    logits: int  # at the end of the forward pass: what has the vocabulary as its last dimension
    arrivals: tuple[Arrival, ...]
    peak_after: int  # the most after the last gradient
    now: int  # at the end of the backward pass, without gradients

    @classmethod
    def of(cls, events: Iterable[Event], rows: Mapping[int, int]) -> "StepTrace":
        """That of the events of a step, the last of which is its end.

        `rows`: bytes of rows by the id of an embedding whose gradient they are, which itself never arrives.
        """
        arrivals, peak, logits, activations, now = [], 0, 0, 0, 0
        for event in events:
            if id(event.what) in rows:
                peak = max(peak, now + rows[id(event.what)])
                continue
            peak, now = max(peak, event.peak), event.now
            if isinstance(event.what, torch.nn.Parameter):
                arrivals.append(Arrival(event.what, peak, now))
                peak = 0
            elif event.what == END_OF_FORWARD:
                activations, logits = now - event.logits, event.logits
        return cls(activations, logits, tuple(arrivals), peak, now)

    def to_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Plain values, for JSON; `names` of parameters by id."""
        arrivals = [(names[id(arrival.parameter)], arrival.peak_before, arrival.now) for arrival in self.arrivals]
        return vars(self) | {"arrivals": arrivals}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any], parameters: Mapping[str, torch.nn.Parameter]) -> "StepTrace":
        """What `to_dict` gave, of the same model; `parameters` by name."""
        arrivals = [Arrival(parameters[name], peak_before, now) for name, peak_before, now in values["arrivals"]]
        return cls(**{**values, "arrivals": tuple(arrivals)})


class FakeRun:
    """A model without data whose blocks can be trained on fake tensors. Raises ValueError for one that cannot."""

    def __init__(
        self,
        config: PretrainedConfig,
        workload: Workload,
        lora: Lora | None = None,
        layers_attribute: str | None = None,
        *,
        on_disk: bool = False,
    ) -> None:
        """`on_disk`: traces are read from files and written to them, as for plans, which ask for the same again."""
        self.workload, self.lora = workload, lora
        self.vocab_size = config.get_text_config().vocab_size
        self.hidden_size = config.get_text_config().hidden_size
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with _report_model_errors(config), torch.device("meta"):
            self.model = _build_model(config, workload)
            if workload.adapters is not None:
                add_adapters(self.model, find_blocks(self.model, layers_attribute), workload.adapters)
            self._has_loss: list[bool] = []  # True once the model computes the loss of its workload
            if lora is not None:  # TRL's head is for a model without adapters
                self._set_loss()
            self._run = self.model if lora is None else _with_adapters(self.model, lora, workload.loss)
            tied = _tied_names(self._run)
        with _report_model_errors(config), self._mode:
            self._run.to_empty(device="cpu")  # on the meta device attention would run another kernel
            _tie(self._run, tied)
        self.blocks = find_blocks(self.model, layers_attribute)
        self._layers = list(self.model.get_submodule(self.blocks.layers_path).children())
        self._tiles = tile_mlps(self.model, self.blocks)
        of_layers = quantizable_matrices(self.model, [layer.parameters for layer in self.blocks.layers])
        self.matrices = [list(matrices.values()) for matrices in of_layers]
        if lora is not None and lora.in_4_bits:
            self.matrices = [[one for one in matrices if one.is_linear] for matrices in self.matrices]
            for matrix in itertools.chain(*self.matrices):  # peft clones what Linear4bit returns
                matrix.module.register_forward_hook(lambda module, args, output: output.clone())
        if workload.by_module:
            self.blocks = split_into_modules(self.model, self.blocks)
        self._parameters = dict(self._run.named_parameters())
        self._trainable = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        # The code of a model that is of no release of transformers may change, and nothing shows it.
        is_released = type(self.model).__module__.startswith("transformers.") and "dev" not in transformers.__version__
        self._on_disk = on_disk and is_released
        allowed = torch.backends.cuda  # kernels of its attention
        kernels = [allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.math_sdp_enabled()]
        self._described = f"{type(self.model)} {vars(self.model.config)} {lora} {layers_attribute} {kernels}"
        # What `with_workload` shares, as it does `_has_loss`.
        self._traces: dict[tuple[Workload, frozenset[int], frozenset[int]], StepTrace] = {}
        self._segments: dict[Any, Segments] = {}  # by the kinds of layers that ran, and what else trains
        self._kinds = kinds_of(self._layers, self.model.config.get_text_config())

    def _set_loss(self) -> None:
        """Have the model compute its loss as the run does; before a trace alone, since TRL takes seconds to import."""
        workload = self.workload
        if workload.loss in OF_TRL:
            from trl.trainer.utils import add_fused_lm_head

            from lisa_dist.loss.chunked import use_chunks

            use_chunks()
            add_fused_lm_head(self.model, outputs=("log_probs", "entropy", "is_top1"))
        if workload.loss == LOGITS:
            score = TritonScores.apply if workload.triton else None
            add_label_logits(self.model, select=self._with_label, score=score)
        self._has_loss.append(True)

    @property
    def largest_layer(self) -> int | None:
        """Elements of the largest decoder layer, as `zero/stage3.py` has it."""
        return largest_layer(self._layers)

    def with_workload(self, workload: Workload) -> "FakeRun":
        """The same model; of the workload what a model is not built by may be another."""
        assert model_workload(workload) == model_workload(self.workload)
        other = copy.copy(self)
        other.workload = workload
        return other

    def _with_label(self, mask: torch.Tensor) -> torch.Tensor:
        """Numbers of the positions with a label, of which the last of a row that no ranks share never is one."""
        rows, tokens = mask.shape
        labels = self.workload.labels
        most = rows * (tokens - (self.workload.sequence_parallel == 1))
        return torch.empty(most if labels is None else labels, dtype=torch.long)

    def groups(
        self,
        trained: Trained | None,
        optim: str = "adamw_torch_fused",
        state_bits: Mapping[str, StateBits] | None = None,
        offloaded: Container[str] = (),
        reduces_rows: bool = False,
    ) -> list[Group]:
        """The parameter groups of a period; for None of all that is trainable, adapters or the whole model.

        `reduces_rows`: the run's ZeRO optimizer takes gradients of embeddings by rows.
        """
        if trained is None:
            kinds: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}  # matrices and the rest
            for parameter in self._trainable:
                kinds[parameter.ndim > 1].append(parameter)
            return [Group(tuple(params), default_state_bits(optim)) for params in kinds.values() if params]
        names = [(name, self.blocks.outer(name), True) for name in trained.always_on]
        names += [(name, self.blocks.outer(name), False) for name in trained.sampled]
        names += [("layers", self.blocks.layers[layer], False) for layer in trained.layers]
        groups = [
            Group(tuple(params), self.bits(name, kind, optim, state_bits or {}), always_on, name in offloaded)
            for name, block, always_on in names
            for kind, params in split_by_decay(block).items()
        ]
        if not reduces_rows or len(groups) == 1:
            return groups
        return [replace(group, by_rows=self._has_rows(group)) for group in groups]

    def _has_rows(self, group: Group) -> bool:
        alone = len(group.params) == 1 and not group.on_host
        return alone and embedding_of(self._run, group.params[0]) is not None

    def bits(self, name: str, kind: str, optim: str, state_bits: Mapping[str, StateBits]) -> StateBits:
        """Bits of the moments of a block's parameters of one kind (`core/selection.py`)."""
        default = default_state_bits(optim)
        bits = state_bits.get(name, default)
        return bits if takes_bits(bits, kind) else default

    def quantized_matrices(self, trained: Iterable[torch.nn.Parameter]) -> list[Matrix]:
        """The matrices of decoder layers that are in fewer bits, or on the host, where `trained` parameters train."""
        if self.workload.frozen_bits == 16 and not self.workload.streams:
            return []
        ours = {id(parameter) for parameter in trained}
        return [one for matrices in self.matrices for one in matrices if id(one.parameter) not in ours]

    def trace(self, groups: Sequence[Group]) -> StepTrace:
        """Run one forward and backward pass and count its allocations; gradients are dropped as they arrive.

        Once for each set of parameters that train: the form of their states changes nothing of it. Raises ValueError
        for a model that cannot be run on fake tensors.
        """
        trained = [parameter for group in groups for parameter in group.params]
        by_rows = [group.params[0] for group in groups if group.by_rows]
        key = self.workload, frozenset(map(id, trained)), frozenset(map(id, by_rows))
        if key not in self._traces:
            names = {id(parameter): name for name, parameter in self._parameters.items()}
            # Of each token of a micro-batch; of a word that is in it again none.
            rows = {id(one): min(self.workload.tokens, len(one)) * one[0].nbytes for one in by_rows}

            def make() -> dict[str, Any]:
                return StepTrace.of(self._events(trained), rows).to_dict(names)

            parameters = [sorted(names[one] for one in ids) for ids in key[1:]]
            described = f"{self._described} {self.workload} {parameters}"
            trace = read_or_make(described, make) if self._on_disk else make()
            self._traces[key] = StepTrace.of_dict(trace, self._parameters)
        return self._traces[key]

    def _events(self, trained: Sequence[torch.nn.Parameter]) -> Iterable[Event]:
        """The events of a step of all layers, of which few run where they repeat."""
        if not self._has_loss:
            with _report_model_errors(self.model.config), torch.device("meta"):
                self._set_loss()
        checkpoint_layers(self.model, self.blocks, self.workload.checkpointed_layers)
        layers, ids = self._layers, {id(parameter) for parameter in trained}
        kinds = trained_kinds(self._kinds, layers, ids)
        others, pairs = find_stand_ins(kinds)
        numbers = list(dict.fromkeys(others))
        if len(numbers) == len(layers):
            return self._run_step(trained)
        outside = ids - {id(parameter) for layer in layers for parameter in layer.parameters()}
        key = (
            tuple(kinds[number] for number in numbers),
            frozenset(outside),
            self.workload.frozen_bits,
            self.workload.streams,
        )
        try:
            if key not in self._segments:
                events = self._run_step(trained, numbers)
                self._segments[key] = segments_of(events, [layers[number] for number in numbers])
            return list(events_of_all(self._segments[key], others, pairs, layers))
        except (LayersDifferError, PlanError, LookupError):
            # A model that finds nothing where a layer that is left out leaves something may raise what it likes.
            self._kinds[:] = range(len(layers))
            return self._run_step(trained)

    def _run_step(self, trained: Sequence[torch.nn.Parameter], numbers: Sequence[int] | None = None) -> list[Event]:
        """Run forward and backward; of the layers only those with these `numbers`, with a Place where each is left."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._run.train()
        events: list[Event] = []
        in_forward = True
        tracker = AllocationTracker(lambda tensor: part_of(tensor, self.vocab_size))

        def mark(what: Any) -> None:
            nonlocal in_forward
            if isinstance(what, Place) and not what.backward and not in_forward:
                return  # a layer is computed again
            in_forward = in_forward and what != END_OF_FORWARD
            events.append(Event(what, tracker.peak - model_bytes, tracker.now - model_bytes, tracker.bytes["logits"]))
            tracker.begin_phase()

        def drop(parameter: torch.nn.Parameter) -> None:
            mark(parameter)
            parameter.grad = None
            tracker.begin_phase()  # without it

        def look_up(module: torch.nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda _: mark(_EMBEDDING))

        inputs, config = self._inputs(), self.model.config
        with contextlib.ExitStack() as stack:
            for parameter in trained:
                stack.callback(parameter.register_post_accumulate_grad_hook(drop).remove)
            stack.callback(self.model.get_input_embeddings().register_forward_hook(look_up).remove)
            stack.enter_context(_report_model_errors(config))
            stack.enter_context(stand_ins(self.workload, self.quantized_matrices(trained)))
            if self.workload.sequence_parallel > 1:
                shared = UlyssesAttention(self.workload.sequence_parallel)
                shared.attend(self.model)
                stack.callback(shared.close)
            if numbers is not None:
                path = self.blocks.layers_path
                stack.enter_context(only_layers(self.model, path, numbers, config.get_text_config(), mark))
            stack.enter_context(self._mode)
            tracker.add([*self._run.parameters(), *self._run.buffers()], "model")
            model_bytes = tracker.now
            stack.enter_context(tracker)
            with contextlib.ExitStack() as forward:
                if self.workload.activation_offloading:
                    forward.enter_context(offloaded_activations(self.workload, self.hidden_size))
                outputs = self._run(**inputs)
                loss = outputs.logits.sum() if self.workload.loss == SCORE else outputs.loss
            if self.workload.loss != RATIO:
                del outputs
            mark(END_OF_FORWARD)
            loss.backward()
            mark(None)
        return events

    def _inputs(self) -> dict[str, Any]:
        workload = self.workload
        with self._mode:
            tokens = torch.ones(workload.micro_batch_size, workload.seq_length, dtype=torch.long)
            mask = torch.ones_like(tokens) if workload.padded else None
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        if workload.loss != SCORE:
            inputs["labels"] = tokens
        if workload.sequence_parallel > 1:  # as `shard` has them
            inputs |= {"position_ids": tokens, "shift_labels": tokens}
        if workload.loss in OF_TRL:
            inputs["fused_lm_head"] = True
        return inputs


class FakeRuns:
    """Fake runs of one model, one for each workload, which plans of several settings share, and with them the traces.

    They take a second each, and a trace of 32 layers takes another.
    """

    def __init__(self, config: PretrainedConfig, on_disk: bool = True) -> None:
        self.config, self._on_disk = config, on_disk
        self._runs: dict[tuple[Workload, Lora | None, str | None], FakeRun] = {}

    def of(self, workload: Workload, lora: Lora | None = None, layers_attribute: str | None = None) -> FakeRun:
        """That of a workload. Raises ValueError for a model that cannot be run."""
        key = model_workload(workload), lora, layers_attribute
        if key not in self._runs:
            self._runs[key] = FakeRun(self.config, workload, lora, layers_attribute, on_disk=self._on_disk)
        return self._runs[key].with_workload(workload)


def model_workload(workload: Workload) -> Workload:
    """The workload as far as a model is built by it: the others that are equal in this share one."""
    return replace(workload, checkpointed_layers=0, frozen_bits=16, streams=False)


def part_of(tensor: torch.Tensor, vocab_size: int) -> str:
    """The part that a tensor made in a step belongs to."""
    return "logits" if tensor.ndim > 1 and tensor.shape[-1] == vocab_size else "activations"


def _build_model(config: PretrainedConfig, workload: Workload) -> PreTrainedModel:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    attention = workload.attention if getattr(model_class, "_supports_sdpa", True) else "eager"
    loads: Any = AutoModelForCausalLM
    config = copy.deepcopy(config)  # transformers writes the dtype into it
    if workload.loss == SCORE:
        loads = AutoModelForSequenceClassification
        config.num_labels, config.pad_token_id = 1, 0
    model: PreTrainedModel = loads.from_config(config, dtype=workload.dtype, attn_implementation=attention)
    return model


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Return the names under which a parameter occurs again, each with its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in names if first[id(parameter)] != name}


def _tie(model: torch.nn.Module, tied: Mapping[str, str]) -> None:
    """Tie parameters again that `Module.to_empty` has separated; peft's wrappers hide them from `tie_weights`."""
    for name, first in tied.items():
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module).register_parameter(attribute, model.get_parameter(first))


def _with_adapters(model: PreTrainedModel, lora: Lora, loss: str) -> torch.nn.Module:
    """Return the LoRA baseline: adapters on every linear layer except the head, without dropout."""
    from peft import LoraConfig, get_peft_model

    task_type = "SEQ_CLS" if loss == SCORE else "CAUSAL_LM"
    adapters = LoraConfig(
        r=lora.rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type=task_type,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # the header of a run says it
        warnings.simplefilter("ignore", FutureWarning)  # peft asks by a name that transformers has another of now
        with_adapters = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    for parameter in with_adapters.parameters():  # on the meta device peft leaves adapters in fp32
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    return with_adapters
