"""Train a model by LISA: deepspeed launch/train.py --config recipe.yaml --any_flag value.

Starts under the `deepspeed` launcher, under `torchrun`, and as plain `python launch/train.py` on one device.
"""

import sys

from lisa_dist.cli import run_verb

if __name__ == "__main__":
    run_verb("train", sys.argv[1:])
