"""Claims that span the stages: every policy goes through all of them, every ablation is one flag, a policy is
added in one place."""
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import cca
import evaluate
import finetune
import models
import prepare_data
import pretrain
from conftest import metrics, stop_after, write_dataset
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
    assert re.search(r"gradient     of the world-model loss reaches (\d+) of \1 policy tensors, all", text)
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
    said = re.search(r"gradient     of the (.+) loss reaches (\d+) of (\d+) policy tensors(.*)",
                     capsys.readouterr().out)
    labelled = "--labels-frac" in flags and "none" not in flags
    assert (int(said[2]) < int(said[3])) == labelled
    for name in said[4].removeprefix("; left to the labels: ").split(", ") if labelled else ():
        assert name.startswith(("action_", "style_")), "what is left untouched is named"
    assert all(torch.isfinite(v).all() for v in checkpoint["policy"].values())
    fine(data, tmp_path / "fine", "--init", str(tmp_path / "pre" / "last.pt"))


@pytest.mark.parametrize("kind", ("zero", "detached", "true"))
def test_control_arms_leave_the_policy_untrained_and_say_so(data, tmp_path, capsys, kind):
    before = pre(data, tmp_path / "one", "--latents", kind, "--steps", "1", video=data.robot)["policy"]
    after = pre(data, tmp_path / "two", "--latents", kind, video=data.robot)["policy"]
    assert re.search(rf"reaches none of \d+ policy tensors: --latents {kind} is a control",
                     capsys.readouterr().out)
    moved = [k for k in before if not torch.equal(before[k], after[k]) and not k.startswith("latent_norm")]
    assert not moved, moved


def test_a_detached_world_model_is_noticed_though_labels_teach_the_policy(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.Feed, "__call__", lambda self, z, batch: (z.detach(), 0.0))
    with pytest.raises(InputError, match="world-model loss gives no finite, non-zero gradient"):
        pre(data, tmp_path / "run", "--labels-frac", "0.5", video=data.robot)


def test_labels_frac_reads_the_actions_of_that_share_alone(data, tmp_path, capsys, monkeypatch):
    read, original = set(), prepare_data.EpisodeDataset._rows

    def rows(self, shard, key, first, count):
        if key == "actions":
            read.add(int(self._place[:, 2].searchsorted(first, side="right")))        # number of the episode
        return original(self, shard, key, first, count)

    monkeypatch.setattr(prepare_data.EpisodeDataset, "_rows", rows)
    pre(data, tmp_path / "run", "--labels-frac", "0.1", video=data.robot)
    assert "labels       of 2 episodes" in capsys.readouterr().out and len(read) == 2, read
    read.clear()
    pre(data, tmp_path / "none", video=data.robot)
    assert not read, "without the flag no action is read"


def test_labels_may_come_from_other_data_with_other_camera_names(data, tmp_path, capsys):
    other = str(write_dataset(tmp_path / "other", cameras=("agentview",)))
    pre(data, tmp_path / "run", "--labels-frac", "0.5", "--label-data", other)
    assert "labels       of 9 episodes of " in capsys.readouterr().out
    with pytest.raises(InputError, match="--label-data .* has 1 cameras, --views all of .* are 2"):
        pre(data, tmp_path / "x", "--labels-frac", "0.5", "--label-data", other, "--views", "all",
            video=data.robot)


def test_the_running_statistics_of_the_latents_are_those_of_the_video(data, tmp_path):
    """Labels may be of another domain: their pass must not move what the latents are standardised by."""
    runs = [pre(data, tmp_path / share, "--labels-frac", share, "--labels-weight", "1e-30", "--steps", "1",
                video=data.robot)["policy"]["latent_norm.running_mean"] for share in ("0.1", "1")]
    torch.testing.assert_close(*runs)


def feed(**flags):
    """The Feed of these flags, and a batch of four clips."""
    torch.manual_seed(0)
    args = Namespace(**({"latents": "learned", "latent_source": "policy"} | flags))
    config = dict(size="tiny", image_size=16, action_dim=7, views=1)
    batch = {"frames": torch.randint(0, 255, (4, 4, 3, 16, 16), dtype=torch.uint8),
             "actions": torch.rand(4, 3, 7) * 2 + 3, "is_pad": torch.zeros(4, 3, dtype=torch.bool)}
    limits = {"min": [3.0] * 7, "max": [5.0] * 7}
    return pretrain.Feed(args, config, limits, "cpu"), batch


def test_what_the_world_model_is_fed_in_each_arm():
    z = torch.randn(4, 3, 7, requires_grad=True)
    for kind, wanted in (("learned", z), ("shuffled", z[[2, 3, 0, 1]]), ("zero", z * 0), ("detached", z)):
        arm, batch = feed(latents=kind)
        fed, extra = arm(z, batch)
        assert torch.equal(fed, wanted) and extra == 0 and fed.requires_grad == arm.teaches, kind
    arm, batch = feed(latents="true")
    torch.testing.assert_close(arm(z, batch)[0], batch["actions"] - 4)                # [3, 5] -> [-1, 1]
    arm, batch = feed(latent_source="inverse")
    fed, distilled = arm(z, batch)
    torch.testing.assert_close(distilled, ((z - fed) ** 2).mean())
    distilled.backward()
    assert z.grad.any() and all(p.grad is None for p in arm.inverse.parameters()), "the policy follows, alone"


def test_supervised_pretraining_resumes_to_the_bit(data, tmp_path, monkeypatch):
    flags = ["--world-model", "none", "--labels-frac", "1", "--policy", "act", "--save-every", "1"]
    whole = pre(data, tmp_path / "whole", *flags, video=data.robot)
    with monkeypatch.context() as patch:
        stop_after(patch, pretrain, 1)
        with pytest.raises(KeyboardInterrupt):
            pre(data, tmp_path / "run", *flags, video=data.robot)
    resumed = pre(data, tmp_path / "run", *flags, "--resume", video=data.robot)
    assert all(torch.equal(whole["policy"][k], resumed["policy"][k]) for k in whole["policy"])


def test_averaged_weights_are_what_is_evaluated_and_resume_to_the_bit(data, tmp_path, monkeypatch):
    flags = ["--init", "scratch", "--policy", "diffusion", "--save-every", "1", "--steps", "3"]
    whole = fine(data, tmp_path / "whole", *flags)
    differ = [k for k, v in whole["policy"].items() if not torch.equal(v, whole["last_weights"][k])]
    assert "unet.out.0.weight" in differ, "policy: averaged, last_weights: to go on from"
    with monkeypatch.context() as patch:
        stop_after(patch, finetune, 2)
        with pytest.raises(KeyboardInterrupt):
            fine(data, tmp_path / "run", *flags)
    resumed = fine(data, tmp_path / "run", *flags, "--resume")
    for part in ("policy", "last_weights"):
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part]), part


def test_frozen_trunk_waits_and_then_learns(data, tmp_path):
    start = pre(data, tmp_path / "pre")["policy"]
    flags = ["--init", str(tmp_path / "pre" / "last.pt"), "--freeze-steps", "2"]
    after = [fine(data, tmp_path / steps, *flags, "--steps", steps)["policy"] for steps in "123"]
    moved = [not torch.equal(one["trunk.0.qkv.weight"], start["trunk.0.qkv.weight"]) for one in after]
    assert moved == [False, False, True]
    assert not torch.equal(after[0]["action_out.weight"], after[1]["action_out.weight"]), "what is new learns"


def test_what_does_not_go_together_is_one_line(data, tmp_path):
    supervised = tmp_path / "supervised"
    pre(data, supervised, "--world-model", "none", "--labels-frac", "1", video=data.robot)
    for call, words in [
        (lambda: pre(data, tmp_path / "x", "--world-model", "none"), "give --labels-frac"),
        (lambda: pre(data, tmp_path / "x", "--labels-frac", "0.5"), "video only"),
        (lambda: pre(data, tmp_path / "x", "--labels-frac", "2"), "share from 0 to 1"),
        (lambda: pre(data, tmp_path / "x", "--label-data", data.robot), "does nothing without --labels-frac"),
        (lambda: pre(data, tmp_path / "x", "--world-model", "none", "--labels-frac", "1", "--mask", "0.5"),
         "--mask does nothing with --world-model none"),
        (lambda: pre(data, tmp_path / "x", "--labels-frac", "1", "--label-data", data.robot, "--strides",
                     "1"), "--strides has 1 numbers for 2 datasets"),
        (lambda: evaluate.main(["--checkpoint", str(supervised / "last.pt")]), "finetune it first"),
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


def test_a_flag_does_not_outlive_its_run(data, tmp_path):
    pre(data, tmp_path / "run", "--policy", "diffusion", "--latent-calls", "2", "--steps", "1")
    assert models.DiffusionPolicy.SIZES["tiny"]["latent_calls"] == 1


def test_the_report_of_a_control_shows_that_nothing_is_used(data, tmp_path):
    pre(data, tmp_path / "run", "--latents", "zero")
    last = [line for line in metrics(tmp_path / "run") if "z_std" in line][-1]
    assert last["z_std"] == 0 and last["shuffle_ratio"] == 1
