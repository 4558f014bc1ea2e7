"""Train a model by LISA: deepspeed launch/train.py --config recipe.yaml --any_flag value.

Starts under the `deepspeed` launcher, under `torchrun`, and as plain `python launch/train.py` on one device.
"""

from lisa_dist.cli import without_collection

with without_collection():
    from lisa_dist.commands.train import main

if __name__ == "__main__":
    main()
