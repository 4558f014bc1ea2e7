"""ms-swift's LISA on given batches, by the callback of its package: run by quality.py in an environment of its own.

Its layers are those that it is given, in the place of what it would draw. What is not the callback's is as in
quality.py: torch's AdamW, gradients clipped to 1, a rate for each step. The model that comes of it is saved.
"""

import json
import sys
from types import SimpleNamespace

import numpy
import torch
from swift.callbacks.lisa import LISACallback
from transformers import AutoModelForCausalLM


def main() -> None:
    """`swift_lisa.py WORK`: of the folder it reads work.pt, and writes model/ and found.json there."""
    folder = sys.argv[1]
    work = torch.load(f"{folder}/work.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    state = SimpleNamespace(global_step=0)
    numpy.random.choice = lambda *_, **__: work["layers"][state.global_step // work["interval"]]
    settings = {"lisa_activated_layers": len(work["layers"][0]), "lisa_step_interval": work["interval"]}
    callback = LISACallback(SimpleNamespace(tuner_type="full", **settings), None)
    callback.on_train_begin(None, state, None, model=model)
    losses = []
    for batch, rate in zip(work["batches"], work["rates"], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        callback.on_step_begin(None, state, None)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        losses.append(loss.item())
    model.save_pretrained(f"{folder}/model")
    with open(f"{folder}/found.json", "w", encoding="utf-8") as file:
        json.dump({"losses": losses}, file)


if __name__ == "__main__":
    main()
