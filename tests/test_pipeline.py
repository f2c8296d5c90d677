"""Claims that span the stages: every policy goes through all of them, a new policy is added in one place,
every ablation is a flag, and controls leave the policy untrained."""
import re
import shutil
from pathlib import Path

import h5py
import pytest
import torch

import cca
import evaluate
import models
from test_training import equal, fine, pre

SHORT = ["--steps", "1", "--chunk", "4"]
README = (Path(models.__file__).parent / "README.md").read_text()
ALL_REACHED = r"gradient     of the world-model loss reaches (\d+) of \1 policy tensors\n"


def roll_out(checkpoint, out):
    """Two short episodes on the twin -> the hashes of their actions."""
    evaluate.main(["--checkpoint", str(checkpoint), "--tasks", "stack_cups", "--episodes", "2", "--max-steps",
                   "18", "--no-controls", "--workers", "1", "--out", str(out)])
    return re.findall(r'"actions": "(\w+)"', (out / "episodes.jsonl").read_text())


@pytest.mark.parametrize("policy", [*models.POLICIES, "linear"])
def test_every_policy_goes_through_all_stages(data, tmp_path, capsys, monkeypatch, policy):
    """Also the README's example of a new policy, `linear`: the stages need no other change for it."""
    if policy == "linear":
        blocks, names = re.findall(r"```python\n(.*?)```", README, re.S), {**vars(models)}
        exec(next(b for b in blocks if "class Linear(Policy)" in b).split("POLICIES =")[0], names)
        monkeypatch.setitem(models.POLICIES, "linear", names["Linear"])
    pretrained, finetuned = (str(tmp_path / stage / "last.pt") for stage in ("pre", "fine"))
    pre(data, tmp_path / "pre", "--policy", policy, "--steps", "1")
    fine(data, tmp_path / "fine", "--init", pretrained, "--steps", "1")
    text = capsys.readouterr().out
    assert re.search(ALL_REACHED, text)
    new = next(line for line in text.splitlines() if line.startswith("new"))
    assert "action_out.weight" in new and "image_encoder" not in new, "what finetuning adds is named"
    cca.main(["--smoke", "--checkpoint", pretrained, "--data", data.robot, "--device", "cpu", "--video",
              "none", "--max-windows", "120"])
    hashes = roll_out(finetuned, tmp_path / "eval")
    assert len(hashes) == 2
    if policy == "diffusion":           # it draws noise
        assert roll_out(finetuned, tmp_path / "again") == hashes, "which follows from the episode alone"


@pytest.mark.parametrize("flags", [
    "--no-context-frame --predict prior --target difference --latent-dim 3",
    "--predict posterior --motion-weight 0 --latent-norm none --free-bits 0 --decode-steps 0 "
    "--no-gate",
    "--views all --target features --world-model 1m",
    "--latent-source inverse --target flow",
    "--latents shuffled --shift 0"])
def test_every_ablation_is_a_flag_and_reaches_the_policy(data, tmp_path, capsys, flags):
    checkpoint = pre(data, tmp_path / "pre", *SHORT, *flags.split(), video=data.robot)
    assert re.search(ALL_REACHED, capsys.readouterr().out)
    assert all(v.isfinite().all() for v in checkpoint["policy"].values())
    fine(data, tmp_path / "fine", "--init", str(tmp_path / "pre" / "last.pt"), "--steps", "1")


def test_controls_leave_the_policy_untrained_and_say_what_to_compare(data, tmp_path, capsys):
    runs = {kind: pre(data, tmp_path / kind, *SHORT, "--latents", kind, video=data.robot)["policy"]
            for kind in ("zero", "detached", "true", "learned")}
    text = capsys.readouterr().out
    assert len(re.findall(r"reaches 0 of \d+ policy tensors: the policy is not trained", text)) == 3
    for words in ("and is fed zeros, so z_std is 0 and all ratios are 1: compare copy_ratio",
                  "and is fed true actions", "and is fed latent actions without their gradient", "z_std 0 |"):
        assert words in text
    trained = {name for name, value in runs["learned"].items() if not torch.equal(value, runs["zero"][name])}
    assert trained - {"latent_norm.running_mean", "latent_norm.running_var"}
    assert equal(runs["zero"], runs["detached"]) and equal(runs["zero"], runs["true"]), "all as initialised"


def test_pretraining_uses_no_actions(data, tmp_path):
    """The same videos with actions of NaN give the same policy."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(data.robot, spoilt)
    for shard in spoilt.glob("*.h5"):
        with h5py.File(shard, "r+") as f:
            f["actions"][...] = float("nan")
    runs = [pre(data, tmp_path / name, *SHORT, video=video)["policy"]
            for name, video in (("a", data.robot), ("b", str(spoilt)))]
    assert equal(*runs)
