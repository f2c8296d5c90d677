"""Claims that span the stages: every policy goes through all of them, every ablation is one flag, a policy is
added in one place."""
import re
from pathlib import Path

import pytest
import torch

import cca
import evaluate
import finetune
import models
import pretrain
from conftest import metrics
from models import InputError

README = (Path(models.__file__).parent / "README.md").read_text()


def pre(data, out, *flags, video=None):
    pretrain.main(["--smoke", "--steps", "2", "--data", video or data.video, "--probe-data", "none", "--out",
                   str(out), "--device", "cpu", "--eval-every", "2", *flags])
    return models.load_checkpoint(Path(out) / "last.pt")


def fine(data, out, *flags):
    finetune.main(["--smoke", "--steps", "2", "--data", data.robot, "--out", str(out), "--device", "cpu",
                   *flags])
    return models.load_checkpoint(Path(out) / "last.pt")


def all_stages(data, out, policy):
    """pretrain -> finetune -> rollout on the twin -> CCA, as the README has them."""
    pre(data, out / "pre", "--policy", policy)
    fine(data, out / "fine", "--init", str(out / "pre" / "last.pt"))
    cca.main(["--smoke", "--checkpoint", str(out / "pre" / "last.pt"), "--data", data.robot, "--device",
              "cpu"])
    return roll_out(out / "fine" / "last.pt", out / "eval")


def roll_out(checkpoint, out):
    evaluate.main(["--checkpoint", str(checkpoint), "--tasks", "stack_cups", "--episodes", "2", "--max-steps",
                   "18", "--no-controls", "--workers", "0", "--out", str(out)])
    return (out / "episodes.jsonl").read_text()


@pytest.mark.parametrize("policy", models.POLICIES)
def test_every_policy_goes_through_all_stages(data, tmp_path, capsys, policy):
    episodes = all_stages(data, tmp_path, policy)
    assert len(episodes.splitlines()) == 2
    text = capsys.readouterr().out
    assert re.search(r"gradient     reaches all \d+ policy tensors", text)
    new = next(line for line in text.splitlines() if line.startswith("new"))
    assert "action_out.weight" in new and "image_encoder" not in new, "what pretraining leaves is named"
    hashes = [re.findall(r'"actions": "(\w+)"', text)
              for text in (episodes, roll_out(tmp_path / "fine" / "last.pt", tmp_path / "again"))]
    assert hashes[0] == hashes[1], "what a policy draws at random follows from the episode, too"


def test_the_readme_s_linear_policy_goes_through_all_stages(data, tmp_path, monkeypatch):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class Linear(Policy)" in b)
    names = {**vars(models)}
    exec(block.split("POLICIES =")[0], names)
    monkeypatch.setitem(models.POLICIES, "linear", names["Linear"])
    assert all_stages(data, tmp_path, "linear")


ABLATIONS = [["--no-context-frame"], ["--predict", "prior"], ["--predict", "posterior"],
             ["--target", "difference"], ["--target", "features"], ["--target", "flow"], ["--mask", "0.5"],
             ["--latents", "shuffled"], ["--latent-source", "inverse"], ["--latent-dim", "3"],
             ["--free-bits", "0"], ["--world-model", "1m"], ["--latent-norm", "none"],
             ["--policy", "diffusion", "--latent-calls", "3"]]
LABELLED = [["--views", "all"], ["--proprio"], ["--views", "all", "--proprio", "--target", "features"],
            ["--labels-frac", "0.1"], ["--labels-frac", "0.1", "--policy", "diffusion"],
            ["--labels-frac", "0.1", "--policy", "act"], ["--world-model", "none", "--labels-frac", "1"],
            ["--world-model", "none", "--labels-frac", "0.5", "--policy", "diffusion"],
            ["--world-model", "none", "--labels-frac", "1", "--policy", "act"]]


@pytest.mark.parametrize("flags", [*ABLATIONS, *LABELLED], ids=" ".join)
def test_every_ablation_is_one_flag_and_reaches_the_policy(data, tmp_path, capsys, flags):
    checkpoint = pre(data, tmp_path / "pre", *flags, video=data.robot if flags in LABELLED else data.video)
    assert re.search(r"gradient     reaches all \d+ policy tensors", capsys.readouterr().out)
    assert all(torch.isfinite(v).all() for v in checkpoint["policy"].values())
    fine(data, tmp_path / "fine", "--init", str(tmp_path / "pre" / "last.pt"))


@pytest.mark.parametrize("kind", ("zero", "detached", "true"))
def test_control_arms_leave_the_policy_untrained_and_say_so(data, tmp_path, capsys, kind):
    before = pre(data, tmp_path / "one", "--latents", kind, "--steps", "1", video=data.robot)["policy"]
    after = pre(data, tmp_path / "two", "--latents", kind, video=data.robot)["policy"]
    assert re.search(rf"gradient     reaches none of the \d+ policy tensors: --latents {kind} is a control",
                     capsys.readouterr().out)
    moved = [k for k in before if not torch.equal(before[k], after[k]) and not k.startswith("latent_norm")]
    assert not moved, moved


def test_control_arms_with_labels_train_by_the_labels_alone(data, tmp_path, capsys):
    pre(data, tmp_path / "run", "--latents", "zero", "--labels-frac", "0.5", video=data.robot)
    assert "gradient     reaches all" in capsys.readouterr().out


def test_labels_frac_reads_the_actions_of_that_share_alone(data, tmp_path, capsys, monkeypatch):
    seen, original = set(), models.BAKU.loss

    def loss(self, batch):
        seen.update(batch["episode"].tolist() if self.training else [])
        return original(self, batch)

    monkeypatch.setattr(models.BAKU, "loss", loss)
    pre(data, tmp_path / "run", "--labels-frac", "0.1", "--steps", "12", video=data.robot)
    assert "labels       of 2 episodes" in capsys.readouterr().out and len(seen) == 2


def test_supervised_pretraining_resumes_to_the_bit(data, tmp_path, monkeypatch):
    flags = ["--world-model", "none", "--labels-frac", "1", "--policy", "act", "--save-every", "1"]
    whole = pre(data, tmp_path / "whole", *flags, video=data.robot)
    save = pretrain.save_checkpoint

    def save_then_die(path, checkpoint):
        save(path, checkpoint)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            pre(data, tmp_path / "run", *flags, video=data.robot)
    resumed = pre(data, tmp_path / "run", *flags, "--resume", video=data.robot)
    assert all(torch.equal(whole["policy"][k], resumed["policy"][k]) for k in whole["policy"])


def test_averaged_weights_are_what_is_evaluated_and_resume_to_the_bit(data, tmp_path, monkeypatch):
    flags = ["--init", "scratch", "--policy", "diffusion", "--save-every", "1", "--steps", "3"]
    whole = fine(data, tmp_path / "whole", *flags)
    differ = [k for k, v in whole["policy"].items() if not torch.equal(v, whole["last_weights"][k])]
    assert "unet.out.0.weight" in differ, "policy: averaged, last_weights: to go on from"
    save = finetune.save_checkpoint

    def save_then_die(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["step"] == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            fine(data, tmp_path / "run", *flags)
    resumed = fine(data, tmp_path / "run", *flags, "--resume")
    for part in ("policy", "last_weights"):
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part]), part


def test_frozen_trunk_waits_and_then_learns(data, tmp_path):
    start = pre(data, tmp_path / "pre")["policy"]
    flags = ["--init", str(tmp_path / "pre" / "last.pt"), "--freeze-steps", "2"]
    for steps, moves in (("2", False), ("3", True)):
        after = fine(data, tmp_path / steps, *flags, "--steps", steps)["policy"]
        assert torch.equal(after["trunk.0.qkv.weight"], start["trunk.0.qkv.weight"]) != moves
        assert after["action_out.weight"].any()


def test_what_does_not_go_together_is_one_line(data, tmp_path):
    supervised = tmp_path / "supervised"
    pre(data, supervised, "--world-model", "none", "--labels-frac", "1", video=data.robot)
    for call, words in [
        (lambda: pre(data, tmp_path / "x", "--world-model", "none"), "give --labels-frac"),
        (lambda: pre(data, tmp_path / "x", "--labels-frac", "0.5"), "video only"),
        (lambda: pre(data, tmp_path / "x", "--labels-frac", "2"), "share from 0 to 1"),
        (lambda: pre(data, tmp_path / "x", "--latents", "true"), "needs data that have it"),
        (lambda: pre(data, tmp_path / "x", "--proprio"), "needs data that have it"),
        (lambda: pre(data, tmp_path / "x", "--latent-source", "inverse", "--latents", "zero"), "leave out"),
        (lambda: pre(data, tmp_path / "x", "--latent-calls", "3"), "of --policy diffusion"),
        (lambda: pre(data, tmp_path / "x", "--policy", "diffusion", "--chunk", "10"), "multiples of 4"),
        (lambda: fine(data, tmp_path / "x", "--init", "scratch", "--freeze-steps", "1"), "needs --init"),
        (lambda: fine(data, tmp_path / "x", "--init", "scratch", "--ema", "1"), "below 1"),
        (lambda: fine(data, tmp_path / "x", "--init", str(supervised / "last.pt"), "--head", "add"),
         "has none"),
        (lambda: cca.main(["--checkpoint", str(supervised / "last.pt"), "--data", data.robot, "--smoke"]),
         "no latent actions"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_the_report_of_a_control_shows_that_nothing_is_used(data, tmp_path):
    pre(data, tmp_path / "run", "--latents", "zero")
    last = [line for line in metrics(tmp_path / "run") if "z_std" in line][-1]
    assert last["z_std"] == 0 and last["shuffle_ratio"] == 1
