"""Claims about several processes: they train as one, they resume, and no process waits for a dead one."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from conftest import metrics  # first: it makes the scripts importable
import finetune
import models
import pretrain
from models import InputError
from prepare_data import Mixture

SCRIPTS = {"pretrain": pretrain, "finetune": finetune}
FLAGS = "--smoke --device cpu --threads 1 --steps 4 --every 2 --batch-size 8".split()
NOISY = [*FLAGS, "--eval-windows", "8", "--probe-data", "none"]


def without_noise(patch):
    """What is drawn at random, and so differs between processes: samples become means, dropout is off."""
    patch.setattr(models, "sample_straight_through", torch.exp)
    patch.setitem(models.BAKU.SIZES["tiny"], "dropout", 0.0)
    return {"pretrain": [*NOISY, "--shift", "0", "--decode-steps", "0"],
            "finetune": [*FLAGS, "--init", "scratch", "--shift", "0", "--proprio-dropout", "0"]}


class Optimizer(torch.optim.AdamW):
    """AdamW. With $DIE, the second process and torchrun are killed in step 3, as if their machine failed."""
    latest = None

    def step(self, *args):
        Optimizer.latest, self.steps, self.seed = self, getattr(self, "steps", 0) + 1, torch.initial_seed()
        if self.steps == 3 and "DIE" in os.environ and os.environ["RANK"] == "1":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        super().step(*args)


def torchrun(*runs, **environment):
    """Two processes run these [script, noise, flags] one after the other -> all that they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
    return subprocess.run([*command, json.dumps(runs)], env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600).stdout


def process(runs):
    """What each process of torchrun() does. It prints its rank, a hash of its weights, and its last seed."""
    torch.optim.AdamW, join = Optimizer, torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda **k: torch.distributed.is_initialized() or join(**k)
    for script, noise, flags in runs:
        with pytest.MonkeyPatch.context() as patch:
            SCRIPTS[script].main([*(NOISY if noise else without_noise(patch)[script]), *flags])
        weights = b"".join(p.detach().numpy().tobytes() for group in Optimizer.latest.param_groups
                           for p in group["params"])
        digest = hashlib.sha256(weights).hexdigest()    # one write, which no other process can split
        sys.stderr.write(f"STATE {os.environ['RANK']} {digest} {Optimizer.latest.seed} END\n")


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Folder of runs by two processes: pretrain, finetune, and whole with noise; what they printed."""
    out = tmp_path_factory.mktemp("two")
    return out, torchrun(["pretrain", False, ["--data", data.video, "--out", str(out / "pretrain")]],
                         ["finetune", False, ["--data", data.robot, "--out", str(out / "finetune")]],
                         ["pretrain", True, ["--data", data.video, "--out", str(out / "whole")]])


def equal(a, b):
    return all(torch.equal(a[name][k], b[name][k]) for name in ("policy", "world_model") for k in a[name])


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_as_one_does_with_the_same_batches(data, two, tmp_path, monkeypatch, script):
    """The windows of the processes hold different numbers of padded steps; latent actions are standardised
    over the windows of both, which the reports show, too: z_std comes from the running statistics."""
    path = data.video if script == "pretrain" else data.robot
    windows = Mixture([path], 10, split="train")
    rows = windows.draw(np.random.default_rng([0, 3]), 8)
    valid = [sum((~windows[row]["is_pad"]).sum() for row in rows[rank::2]) for rank in (0, 1)]
    assert valid[0] != valid[1], "else this test shows little"
    SCRIPTS[script].main([*without_noise(monkeypatch)[script], "--data", path, "--out", str(tmp_path)])
    one, both = metrics(tmp_path), metrics(two[0] / script)
    assert [line.keys() for line in one] == [line.keys() for line in both]
    for line, other in zip(one, both):
        for name in line.keys() - {"waiting"}:          # Adam turns the rounding of tiny gradients into steps
            if line["step"] == 1 or "grad_norm" not in name:
                assert other[name] == pytest.approx(line[name], rel=1e-5), (name, line)


def test_both_processes_hold_the_same_weights_draw_other_noise_and_the_first_alone_prints(two):
    states = re.findall(r"STATE (\d) (\w+) (\d+) END", two[1])
    first, second = ([state[1:] for state in states if state[0] == rank] for rank in "01")
    assert len(first) == len(second) == 3
    for (weights, seed), (weights_too, other_seed) in zip(first, second):
        assert weights == weights_too and seed != other_seed
    assert two[1].count("wrote  ") == 3 and "Warning" not in two[1]


def test_when_a_machine_dies_the_others_end_with_one_line_and_the_run_can_be_resumed(data, two, tmp_path):
    """To the bit by as many processes, and by another number of them."""
    run = ["pretrain", True, ["--data", data.video, "--out", str(tmp_path / "run")]]
    printed = torchrun(run, DIE="yes")
    assert "Traceback" not in printed
    errors = [line for line in printed.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == 1 and "another process of this run has ended" in errors[0], errors
    assert models.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    run[2].append("--resume")
    torchrun(run)
    whole, resumed = (models.load_checkpoint(p / "last.pt") for p in (two[0] / "whole", tmp_path / "run"))
    assert resumed["step"] == 4 and equal(whole, resumed)
    pretrain.main([*NOISY, "--data", data.video, "--out", str(tmp_path / "alone"), "--resume"])
    alone = models.load_checkpoint(tmp_path / "alone" / "last.pt")
    assert alone["step"] == 4 and not equal(whole, alone), "one process draws other noise"


def test_what_cannot_be_split_or_compiled_is_one_line(data, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    for script in (pretrain, finetune):
        with pytest.raises(InputError, match="--compile is for GPUs"):
            script.main([*FLAGS, *out, "--compile"])
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for script, world, flags in ((pretrain, 3, []), (finetune, 16, []),
                                 (pretrain, 8, ["--latents", "shuffled"])):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        with pytest.raises(InputError, match=f"--batch-size 8 cannot be split over {world} processes"):
            script.main([*FLAGS, *out, *flags])
    assert not (tmp_path / "out").exists()


def test_processes_that_began_differently_do_not_train_together(monkeypatch):
    monkeypatch.setattr(models.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(models.dist, "get_world_size", lambda: 2)
    for theirs, words in (({"step": 4}, "differ in step: "), ({"--lr": 1, "data": "b"}, "in --lr, data: ")):
        monkeypatch.setattr(models.dist, "all_gather_object",
                            lambda everyone, mine: everyone.__setitem__(1, {**mine, **theirs}))
        with pytest.raises(InputError, match=words):
            models.check_agreed(Namespace(lr=0.1, workers=3), {"workers"}, data="a", step=0)


if __name__ == "__main__":
    models.run(lambda: process(json.loads(sys.argv[1])))
