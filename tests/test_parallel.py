"""Claims about several processes: they train as one, and what happens when one of them dies."""
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
import models
import pretrain
from conftest import metrics
from models import InputError

PRE = ("--smoke --device cpu --threads 1 --steps 6 --every 2 --batch-size 8 --eval-windows 8 --probe-data none "
       "--shift 0 --decode-steps 0").split()
FINE = ("--smoke --device cpu --threads 1 --steps 6 --every 2 --batch-size 8 --init scratch --shift 0 "
        "--proprio-dropout 0").split()


def without_noise():
    """Switch off what is drawn per process: samples become their means, and nothing is dropped out."""
    models.sample_straight_through = torch.exp
    models.BAKU.SIZES["tiny"]["dropout"] = 0.0


def train(script, argv):
    """Run a script in this process of torchrun, then print a hash of its weights."""
    modules = []
    make = script.make_policy
    script.make_policy = lambda config: modules.append(make(config)) or modules[-1]
    script.main(argv)
    weights = b"".join(v.numpy().tobytes() for v in modules[0].state_dict().values())
    print("weights", hashlib.sha256(weights).hexdigest(), file=sys.stderr)


if __name__ == "__main__":
    without_noise()
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda **k: torch.distributed.is_initialized() or join(**k)
    for name, argv in eval(sys.argv[1]):
        train({"pretrain": pretrain, "finetune": finetune}[name], argv)
