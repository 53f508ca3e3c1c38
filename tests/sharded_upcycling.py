"""Processes of `accelerate launch` upcycle a transformer, split by FSDP2 or copied; see test_sharded_upcycling.py.

Usage: sharded_upcycling.py CONFIG SOURCE OUTPUT CASE…. A case is a name and overrides after colons. A run that is split
is interrupted behind step 4, of which 3 are saved, and goes on.
"""

import sys

from accelerate import Accelerator

from dcdit.training.config import load_config
from dcdit.training.transformers import TransformerConfig, TransformerUpcycler, train_transformer


def interrupted(config):
    """The run, which ends as at a signal."""
    step = TransformerUpcycler._train_step

    def interrupting(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return step(self)

    TransformerUpcycler._train_step = interrupting
    try:
        train_transformer(config)
    except KeyboardInterrupt:
        pass
    finally:
        TransformerUpcycler._train_step = step


if __name__ == "__main__":
    Accelerator.end_training = lambda self: None  # it takes down what the next case needs
    file, source, output, *cases = sys.argv[1:]
    for case in cases:
        name, *overrides = case.split(":")
        given = [f"source={source}", f"output={output}/{name}", *overrides]
        config = load_config(file, given, TransformerConfig)
        if config.fsdp:
            interrupted(config)
        train_transformer(config)
