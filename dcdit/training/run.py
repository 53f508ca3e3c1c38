"""`train`: the trainer that a configuration asks for, run to its end or saved at an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import check_kind
from ..interrupts import raised
from .config import TrainConfig
from .gated import GatedMainTrainer
from .run_output import describe_run
from .systems import TRAINERS
from .trainer import Trainer
from .upcycling import Upcycler


def train(config: TrainConfig, allow: Sequence[str] = ()) -> Path:
    """Train, or resume what `config.output` holds, and return the directory of the EMA model.

    Writes OUTPUT/last.safetensors (to resume from), OUTPUT/model (the EMA, for `dcdit sample`) and
    OUTPUT/metrics.jsonl. `allow` names keys that may differ from the resumed run's. Raises DCDiTError for unusable
    input.
    """
    check_kind(config, TrainConfig, "config", "load_config reads a YAML file")
    kind: type[Trainer] = Upcycler if config.upcycle.source else Trainer
    if config.kind != "dcdit":
        kind = GatedMainTrainer if config.kind == "dydit" and config.init else TRAINERS[config.kind]
    with raised():
        trainer = kind(config, allow)
        try:
            trainer.accelerator.print(describe_run(trainer), flush=True)
            return trainer.run()
        except (KeyboardInterrupt, RuntimeError) as error:
            # A signal to the whole group of processes ends the loading ones first.
            if isinstance(error, KeyboardInterrupt) or "DataLoader worker" in str(error):
                trainer.save_interrupted()
            raise
        finally:
            trainer.close()
