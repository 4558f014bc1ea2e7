"""Packaging of lisa_dist, in which some folders are links to those at the top."""

from setuptools import find_packages, setup

LINKS = ("kernels", "ds_configs", "recipes", "examples")
LAUNCHER = ["ninja>=1.11,<2"]  # DeepSpeed compiles its C++ ops with it at first use
QUICKSTART = ["gguf>=0.10,<1"]
# The line of the progress, the plots of the report, the tracker that a run logs to by default.
SHOWN = ["rich>=13.7,<16", "matplotlib>=3.8,<4", "tensorboard>=2.14,<3"]
TRITON = ["triton>=3.4,<4; sys_platform == 'linux'"]  # a CUDA torch brings its own; the tests run it in its interpreter
LIGER = ["liger-kernel>=0.8.2,<1"]
EVAL = ["lm-eval>=0.4.13,<0.5"]
# pytest 9.2 has renamed what pytest-xdist 3.8 marks groups by: their tests would be spread over the workers.
DEV = [*TRITON, "liger-kernel>=0.8.2,<1; sys_platform == 'linux'", "pytest>=8,<9.2", "pytest-xdist>=3.8,<4"]
DEV += ["ruff>=0.6,<1", "mypy>=1.18,<2", "types-PyYAML", "types-psutil", "types-tqdm"]
DOCS = ["mkdocs>=1.6,<2", "mkdocstrings[python]>=0.29,<2"]
DEV += [*DOCS, *EVAL, "transformers[serving]"]  # a judge of MT-Bench answers is `transformers serve`

setup(
    name="lisa_dist",
    version="0.1.0",
    description="Distributed LLM training by LISA, Layerwise Importance Sampled AdamW, on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",  # as TRL
    packages=[*find_packages(include=["lisa_dist*"]), *(f"lisa_dist.{link}" for link in LINKS)],
    package_data={
        "lisa_dist": ["py.typed", "flag_tables.jsonl", "model_configs/*.json"],
        "lisa_dist.eval": ["eval_tasks/*.y*ml"],
        "lisa_dist.report": ["report.html"],
        **{f"lisa_dist.{link}": ["*.*", "*/*.yaml", "*/*.md"] for link in LINKS},
    },
    install_requires=[
        "torch>=2.9,<3",
        "deepspeed>=0.19.8,<0.20",  # the first whose ZeRO-3 waits for all gathers on CPU ranks
        "transformers>=5.10.1,<6",
        "accelerate>=1.10.1,<2",
        "datasets>=4.7,<6",
        "bitsandbytes>=0.50,<1",  # the first whose 8-bit AdamW is for CPUs too
        "trl>=0.29,<2",  # of 1.16 for a run from the command line; in other trainers theirs will do
        "peft>=0.18,<1",
        "safetensors>=0.8,<1",
        "huggingface-hub>=1.17,<3",
        "numpy>=2.0,<3",
        "pyarrow>=21,<27",
        "packaging>=23",  # its versions are years
        "jinja2>=3.1,<4",
        "pillow>=10.1,<14",  # looks at the images of rows
        "pyyaml>=6,<7",
        "tqdm>=4.66,<5",
        "psutil>=5.9,<8",
        *LAUNCHER,
        *SHOWN,
    ],
    extras_require={
        "gpu": LIGER,
        "flash": ["flash-attn>=2.6,<3"],  # by itself, after the rest: its build and its metadata import torch
        "eval": EVAL,
        "quickstart": QUICKSTART,
        "docs": DOCS,
        "dev": DEV + QUICKSTART,
    },
    entry_points={"console_scripts": ["lisa-dist=lisa_dist.cli:main"]},
)
