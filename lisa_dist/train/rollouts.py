"""GRPO's answers by vLLM: an engine is sent what has changed since it last had the weights, and no more.

TRL sends every parameter before it generates. Here that is the first synchronisation of a run, of one that is resumed,
and what follows when the server has come back. A whole decoder layer goes where a part of it has trained: vLLM fuses
matrices of a layer (q, k and v), and a server that is sent one of them has nothing in the place of the others.
"""

import contextlib
import functools
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, PretrainedConfig

from lisa_dist.checkpoint.weights import rename
from lisa_dist.config_rules import ADAPTERS
from lisa_dist.core.adapters import adapter_config, beside, merge, weight_of
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.controller import LisaController
from lisa_dist.core.run_state import BlockChanges
from lisa_dist.distributed.collectives import gather, raise_shared
from lisa_dist.patches import patch
from lisa_dist.zero.parameters import parameter_shape, whole_weights
from lisa_dist.zero.stage3 import drop_prefetched


class _SentBlocks(BlockChanges):
    """The blocks that have trained since an engine was sent weights, and whether it has all others."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.has_all, self._trainer = False, trainer

    def forget(self) -> None:
        """All weights have changed: they are to be sent before the next answer, also in a step that has been."""
        self.has_all = False
        patch(self._trainer, "_last_loaded_step", -1, of="rollouts")


class Rollouts:
    """What the `VLLMGeneration` of a trainer of TRL's is sent of a model that LISA trains.

    It takes the place of three of its methods. `sent_bytes` are those of the last synchronisation, `changes` is for the
    controller. Raises UserError on all ranks for a server of another model, and where one does not come back within
    `--vllm_server_timeout`.
    """

    def __init__(self, trainer: Any):
        generation = trainer.vllm_generation
        self.sent_bytes, self.changes = 0, _SentBlocks(trainer)
        self._trainer, self._generation = trainer, generation
        self._of_trl = generation.sync_weights, generation.generate, generation._iter_named_params
        self._client = getattr(generation, "vllm_client", None)  # of a server, on the first rank
        self._is_server = generation.mode == "server"
        self._is_asked_here = False
        self._walk: Iterator[tuple[str, torch.Tensor]] | None = None  # over what is sent
        self._token = ""  # of the weights that the server has
        self._problem: str | None = None  # of the last request
        for name in ("sync_weights", "generate", "_iter_named_params"):
            patch(generation, name, getattr(self, name.removeprefix("_")), of="rollouts")
        if self._client is not None:
            patch(self._client, "generate", functools.partial(self._ask, self._client.generate), of="rollouts")
        if self._is_server:
            raise_shared(self._why_not_served())

    def sync_weights(self) -> None:
        """Send what the engine lacks; all ranks call it."""
        lisa: LisaController | None = self._trainer.lisa
        if lisa is None or not lisa.is_attached:  # evaluated before it is trained
            patch(self._generation, "_weight_metadata", None, of="rollouts")
            self._of_trl[0]()
            return
        lisa.note_changes()
        names = self.changes.take(lisa.engine.global_steps)
        if self._is_server and self.changes.has_all and not all(gather(self._has_token())):  # it has begun anew
            self._send_again(lisa)
            return
        asleep = not self._is_server and self._generation.enable_sleep_mode  # without its weights
        is_whole = asleep or not self.changes.has_all
        units = [*units_of(lisa.blocks).values()] if is_whole else changed_units(lisa.blocks, names)
        if units and not self._send(lisa, units):
            self._send_again(lisa)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; once more where the server was gone, after it has all weights again. All ranks call it."""
        lisa = self._trainer.lisa
        answers = self._generate(*args, **kwargs)
        if self._is_server and any(gather(self._problem is not None)):
            if lisa is None or not lisa.is_attached:
                self._raise(self._problem)
            self._send_again(lisa)
            answers = self._generate(*args, **kwargs)
            self._raise(self._problem)
        return answers

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._problem, self._is_asked_here = None, True
        try:
            return self._of_trl[1](*args, **kwargs)
        finally:
            self._is_asked_here = False

    def iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights by the names that vLLM loads them by, those of the model's files; a collective of ZeRO-3."""
        return self._of_trl[2]() if self._walk is None else self._walk

    def _send(self, lisa: LisaController, units: list[dict[str, torch.Tensor]]) -> bool:
        """Whether the engine has taken these weights. All ranks call it."""
        model, self._problem = lisa.engine.module, None
        described = [
            (name, str(value.dtype).removeprefix("torch."), [*value.shape])
            for unit in units
            for name, value in rename(model, {key: _on_meta(value) for key, value in unit.items()}).items()
        ]
        self.sent_bytes = sum(value.dtype.itemsize * _numel(value) for unit in units for value in unit.values())
        patch(self._generation, "_weight_metadata", described, of="rollouts")
        drop_prefetched(lisa.engine)
        get_accelerator().synchronize()  # vLLM's side copies on a stream of its own
        self._walk = walk = self._gathered(units)
        with self._noting():
            self._of_trl[0]()
            self._mark()
        for _ in walk if self._problem else ():  # the other ranks gather all of them
            pass
        self._walk = None
        self.changes.has_all = not any(gather(self._problem is not None))
        return self.changes.has_all

    def _send_again(self, lisa: LisaController) -> None:
        """Meet the server again, and send it everything. All ranks call it."""
        self._problem, self.changes.has_all, other = None, False, None
        if self._client is not None:
            with self._noting():
                self._client.check_server(self._generation.server_timeout)
                other = self._why_not_served()
                self._client.close_communicator()
                self._client.init_communicator(self._generation.accelerator.device)
        raise_shared(other)
        self._raise(self._problem)
        self._send(lisa, [*units_of(lisa.blocks).values()])
        self._raise(self._problem)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep what a server has refused, or the way to it; TRL raises a plain Exception for an answer of an error."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and type(error) not in (Exception, RuntimeError):
                raise
            self._problem = str(error)

    def _raise(self, problem: str | None) -> None:
        way_out = "start it as before, and go on by --resume_from_checkpoint auto"
        raise_shared(problem and f"--use_vllm: the server is gone, or does not take weights ({problem}); {way_out}.")

    def _why_not_served(self) -> str | None:
        if self._client is None:
            return None
        served = self._client.get_server_info()["model_config"]["model"]
        return why_not_served(served, self._generation.model.config)

    def _gathered(self, units: list[dict[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        lisa, device = self._trainer.lisa, self._generation.accelerator.device
        model, is_sent = lisa.engine.module, not self._is_server or self._client is not None
        for unit in units:
            unit = unit | beside(unit, lisa.blocks)
            with deepspeed.zero.GatheredParameters([*unit.values()]):
                if is_sent:
                    whole = {name: whole_weights(value).to(device) for name, value in unit.items()}
                    yield from rename(model, merge(whole, adapter_config(model))).items()

    def _ask(self, generate: Callable[..., dict[str, Any]], prompts: list, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The client's answers; none where there is no server, or one that has begun anew: `generate` asks again."""
        if not self._is_asked_here:  # by a function of the user's
            return generate(prompts, *args, **kwargs)
        with self._noting():
            answers = generate(prompts, *args, **kwargs)
            if self._has_token():
                return answers
            self._problem = "it has begun anew"
        none: list[list[int]] = [[]] * (len(prompts) * kwargs["n"])
        return {"prompt_ids": [[]] * len(prompts), "completion_ids": none, "logprobs": None}

    def _mark(self) -> None:
        """Give the weights that the server now has a name; releases that know none are asked for none."""
        self._token = secrets.token_hex(8)
        if self._client is not None:
            url = f"{self._client.base_url}/update_weight_version"
            is_known = self._client.session.post(url, json={"new_version": self._token}).ok
            self._token = self._token if is_known else ""

    def _has_token(self) -> bool:
        """Whether the server still has what it was sent, where it can tell; of ranks without a client, yes."""
        if not self._token or self._client is None:
            return True
        try:
            answer = self._client.session.get(f"{self._client.base_url}/weight_info")
        except OSError:
            return False
        return bool(answer.ok and answer.json()["weight_version"] == self._token)


def units_of(blocks: Blocks) -> dict[str, dict[str, torch.Tensor]]:
    """All weights, in parts that a server can take by themselves: decoder layers, and each module beside them.

    What LISA never trains is one part: names that a file has for several weights at once are made of all of them.
    """
    of_layer = re.compile(rf"{re.escape(blocks.layers_path)}\.\d+\.")
    units: dict[str, dict[str, torch.Tensor]] = {}
    for block in blocks:
        for name, parameter in block.parameters.items() if block.name != ADAPTERS else ():
            found = of_layer.match(name)
            beside_layers = block.name if block is blocks.outside else name.rpartition(".")[0]
            units.setdefault(found.group() if found else beside_layers, {})[name] = parameter
    return units


def changed_units(blocks: Blocks, names: set[str]) -> list[dict[str, torch.Tensor]]:
    """Those with a weight of the blocks that `names` has, or beside an adapter of them."""
    changed = {name for block in blocks if block.name in names for name in block.parameters}
    changed |= {weight_of(name) for name in changed & blocks.adapters.parameters.keys()}
    return [unit for unit in units_of(blocks).values() if not changed.isdisjoint(unit)]


def why_not_served(served: str, config: PretrainedConfig) -> str | None:
    """In what a server's model differs from that of the run, by its config, where this machine has that."""
    try:
        theirs = AutoConfig.from_pretrained(served).get_text_config()
    except (OSError, ValueError):
        return None
    ours, sizes = config.get_text_config(), ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    for name in sizes:
        if getattr(theirs, name, None) != getattr(ours, name, None):
            both = f"its {name} is {getattr(theirs, name, None)}, the run's {getattr(ours, name, None)}"
            return f"--use_vllm: the server has another model, {served} ({both}); start it with that of the run."
    return None


def _on_meta(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty(parameter_shape(parameter), dtype=whole_weights(parameter).dtype, device="meta")


def _numel(parameter: torch.Tensor) -> int:
    return torch.Size(parameter_shape(parameter)).numel()
