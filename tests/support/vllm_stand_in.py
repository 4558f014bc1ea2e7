"""A server that speaks to TRL's client as vLLM does, and what TRL needs of the package where it is not installed.

It is one of TRL's protocol: announced tensors over a stream of their own, in the order in which they were announced.
Like vLLM it fuses matrices: of a layer that is sent in part the rest has no values.
"""

import contextlib
import hashlib
import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from ranks import free_port
from transformers import AutoModelForCausalLM
from trl.generation import vllm_client, vllm_generation
from urllib3.util.retry import Retry

FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def answers(model: Any, prompt: list[int], count: int, length: int) -> list[list[int]]:
    """So many answers of so many tokens: each begins with another token, the likeliest first, and goes on greedily."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        first = model(input_ids=ids).logits[0, -1].topk(count).indices
        begun = torch.cat([ids.expand(count, -1), first[:, None]], dim=1)
        for _ in range(length - 1):
            begun = torch.cat([begun, model(input_ids=begun).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return begun[:, len(prompt) :].tolist()


def digest(model: Any) -> str:
    """Of all weights, in the order of their names."""
    found = hashlib.sha256()
    for _, value in sorted(model.named_parameters()):
        found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _choice(prompt: list[int], tokens: list[int]) -> dict:
    certain = {"token_logprobs": [0.0] * len(tokens), "top_logprobs": [None] * len(tokens)}
    logprobs = {"tokens": [f"token_id:{token}" for token in tokens], **certain}
    return {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs}


class Server:
    """A server of the model in a folder, until it is closed; `updates` are the names of each synchronisation."""

    def __init__(self, folder: Path, port: int | None = None, served: str | None = None):
        self.folder, self.served = folder, served or str(folder)
        self.updates: list[list[str]] = []
        self.nbytes: list[int] = []
        self.seen: list[str] = []  # of the weights, at every question
        self.dies_at: int | None = None  # at which question
        self.dies_after: int | None = None  # how many answers
        self.unprepared = 0  # updates that it could not take
        self.when_dead: Callable[[], object] = lambda: None
        self.version = "default"
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self._stream: socket.socket | None = None
        self._http = ThreadingHTTPServer(("127.0.0.1", port or free_port()), self._handler())
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        if self._stream is not None:
            self._stream.close()

    def die(self) -> None:
        self.close()
        self.when_dead()

    def answer(self, path: str, body: dict) -> dict | None:
        """What one of its addresses answers; None where there is no such address, or it fails."""
        if path == "/v1/models":
            return {"data": [{"id": self.served}]}
        if path.startswith("/server_info"):
            about = {"model_config": {"model": self.served, "logprobs_mode": "processed_logprobs"}}
            return {"vllm_config": about | {"weight_transfer_config": {"backend": "nccl"}}}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            self._stream = socket.create_connection((info["master_address"], info["master_port"]), timeout=60)
        if path == "/update_weights":
            if self._stream is None:  # vLLM would leave the trainer waiting in NCCL
                self.unprepared += 1
                return None
            self._receive(**body["update_info"])
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/v1/completions":
            if len(self.seen) == self.dies_at:
                threading.Thread(target=self.die).start()
                raise ConnectionAbortedError
            self.seen.append(digest(self.model))
            found = [answers(self.model, prompt, body["n"], body["max_tokens"]) for prompt in body["prompt"]]
            pairs = [(prompt, one) for prompt, some in zip(body["prompt"], found, strict=True) for one in some]
            return {"choices": [_choice(*pair) for pair in pairs]}
        return {}

    def _receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        parameters, nbytes = dict(self.model.named_parameters()), 0
        for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
            value = torch.empty(shape, dtype=getattr(torch, dtype))
            view, at = memoryview(value.view(torch.uint8).numpy()).cast("B"), 0
            while at < len(view):
                at += (got := self._stream.recv_into(view[at:])) or math.inf
                assert got, "the trainer has gone"
            parameters[name].data.copy_(value)
            nbytes += len(view)
        for fused in FUSED:
            for name in names:
                found = re.fullmatch(rf"(.*)\.(?:{'|'.join(fused)})\.weight", name)
                for other in [f"{found[1]}.{end}.weight" for end in fused] if found else ():
                    if other not in names:
                        parameters[other].data.fill_(math.nan)
        self.updates.append(names)
        self.nbytes.append(nbytes)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self, body: dict) -> None:
                try:
                    found = server.answer(self.path, body)
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
                if self.path == "/weight_info" and len(server.seen) == server.dies_after:  # all of it was asked for
                    self.close_connection = True
                    server.dies_after = None
                    server.die()
                text = json.dumps(found).encode()
                self.send_response(200 if found is not None else 501)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

            def log_message(self, *args) -> None:
                pass

        return Handler


class _Stream:
    """The trainer's end: the server is the one that connects."""

    def __init__(self, port: int):
        self._listening = socket.create_server(("127.0.0.1", port))
        self._found: socket.socket | None = None

    def send(self, value: torch.Tensor) -> None:
        if self._found is None:
            self._found, _ = self._listening.accept()
        self._found.sendall(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def close(self) -> None:
        self._listening.close()
        if self._found is not None:
            self._found.close()


def _init_communicator(client, device) -> None:
    """The client's, which would want a GPU."""
    assert client.get_server_info()["weight_transfer_config"] is not None
    client.communicator = _Stream(client.group_port)
    info = {"master_address": "127.0.0.1", "master_port": client.group_port}
    client._post(f"{client.base_url}/init_weight_transfer_engine", json={"init_info": info})


def _close_communicator(client) -> None:
    if client.communicator is not None:
        client.communicator.close()
        client.communicator = None


def _send(iterator, group, src, post_iter_func) -> None:
    for item in iterator:
        group.send(post_iter_func(item))


class Engine:
    """vLLM's LLM, as TRL uses it in a process of the run's."""

    made: "Engine"

    def __init__(self, model: str, **kwargs: Any):
        with mock.patch("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None):  # not in parts
            self.model = AutoModelForCausalLM.from_pretrained(model)
        self.seen: list[tuple[str, int]] = []  # at every question: the weights, and how many had come for it
        self.names: list[str] = []
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)
        Engine.made = self

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            self.names.append(name)
            self.model.get_parameter(name).data.copy_(value)

    def generate(self, prompts: list[dict], sampling_params: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
        self.seen.append((digest(self.model), len(self.names)))
        self.names = []
        found = []
        for place, asked in enumerate(prompts):
            tokens = answers(self.model, asked["prompt_token_ids"], 2, sampling_params.max_tokens)[place % 2]
            logprobs = [{token: SimpleNamespace(rank=1, logprob=0.0)} for token in tokens]
            one = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            found.append(SimpleNamespace(prompt_token_ids=asked["prompt_token_ids"], outputs=[one]))
        return found

    def sleep(self, level: int) -> None:
        for value in self.model.parameters():
            value.data.fill_(math.nan)

    def wake_up(self, tags: list[str]) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        pass


@contextlib.contextmanager
def in_the_place_of_vllm(retries: int = 5) -> Iterator[None]:
    """TRL as where vLLM is installed; `retries` of a request."""
    there = {"is_vllm_available": lambda *args, **kwargs: True}
    transfer = {"_HAS_STATEFUL_TRAINER_ENGINE": True, "packed_nccl_broadcast_producer": _send}
    retry = {"Retry": lambda **given: Retry(total=retries, backoff_factor=0.2, allowed_methods=["GET", "POST"])}
    own = {"init_communicator": _init_communicator, "close_communicator": _close_communicator}
    with (
        mock.patch.multiple(vllm_client, create=True, **there, **transfer, **retry),
        mock.patch.multiple(vllm_generation, create=True, **there, LLM=Engine, SamplingParams=SimpleNamespace),
        mock.patch.multiple(vllm_client.VLLMClient, **own),
    ):
        yield
