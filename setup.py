"""Packaging of lisa_dist. `lisa_dist/kernels` and `lisa_dist/ds_configs` are links to the folders at the top."""

from setuptools import setup

ROOMS = ["checkpoint", "commands", "core", "data", "distributed", "eval", "memory", "optim", "report", "train", "zero"]
LAUNCHER = ["ninja>=1.11"]  # DeepSpeed compiles its C++ ops with it at first use
QUICKSTART = ["gguf>=0.10"]
# The line of the progress, the plots of the report, the tracker that a run logs to by default.
SHOWN = ["rich>=13.7", "matplotlib>=3.8", "tensorboard>=2.14"]
TRITON = ["triton>=3.2; sys_platform == 'linux'"]  # a CUDA torch brings its own; the tests run it in its interpreter
LIGER = ["liger-kernel>=0.8.2"]
EVAL = ["lm-eval>=0.4.13,<0.5"]
DEV = [*TRITON, "liger-kernel>=0.8.2; sys_platform == 'linux'", "pytest>=8", "pytest-xdist>=3.8", "ruff>=0.6,<1"]
DEV += [*EVAL, "transformers[serving]"]  # a judge of MT-Bench answers is `transformers serve`

setup(
    name="lisa_dist",
    version="0.1.0",
    description="Distributed LLM training by LISA, Layerwise Importance Sampled AdamW, on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["lisa_dist", *(f"lisa_dist.{room}" for room in ROOMS), "lisa_dist.kernels", "lisa_dist.ds_configs"],
    package_data={
        "lisa_dist": ["model_configs/*.json"],
        "lisa_dist.eval": ["eval_tasks/*.y*ml"],
        "lisa_dist.report": ["report.html"],
        "lisa_dist.ds_configs": ["*.json"],
        "lisa_dist.kernels": ["*"],
    },
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.18,<6",
        "accelerate>=1.10",
        "datasets>=3",
        "bitsandbytes>=0.46",
        "trl>=1.16,<2",
        "peft>=0.17",
        "psutil>=5.9",
        *LAUNCHER,
        *SHOWN,
    ],
    extras_require={
        "gpu": ["flash-attn>=2.6", *LIGER],
        "eval": EVAL,
        "quickstart": QUICKSTART,
        "dev": DEV + QUICKSTART,
    },
    entry_points={"console_scripts": ["lisa-dist=lisa_dist.cli:main"]},
)
