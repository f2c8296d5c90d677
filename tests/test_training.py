"""Claims of pretrain.py and finetune.py: they learn, resume to the bit, and refuse what cannot work."""
import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import models
import pretrain
from conftest import metrics
from models import InputError
from prepare_data import EpisodeDataset

FLAGS = "--smoke --device cpu --threads 1 --steps 4 --every 2 --batch-size 4".split()
FEW = ["--eval-windows", "8", "--probe-data", "none"]


def pre(data, out, *flags, video=None):
    pretrain.main([*FLAGS, *FEW, "--data", video or data.video, "--out", str(out), *flags])
    return models.load_checkpoint(Path(out) / "last.pt")


def fine(data, out, *flags):
    finetune.main([*FLAGS, "--data", data.robot, "--out", str(out), *flags])
    return models.load_checkpoint(Path(out) / "last.pt")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """last.pt of four steps on one camera, with the probe."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    pre(data, out, "--probe-data", data.robot)
    return out / "last.pt"


def test_the_four_lines_stand_together_without_a_branch_and_main_fits_two_screens():
    main = ast.parse(inspect.getsource(pretrain.main)).body[0]
    loop = next(node for node in main.body if isinstance(node, ast.For))
    code = [ast.unparse(statement) for statement in loop.body]
    four = [next(i for i, line in enumerate(code) if line.startswith(words)) for words in (
        "z = latent_actions", "loss, logs = world_model_loss", "loss.backward", "optimizer.step")]
    between = loop.body[four[0]:four[-1] + 1]
    assert four == sorted(four) and between[-1].lineno - between[0].lineno < 10
    assert all(isinstance(statement, (ast.Assign, ast.Expr)) for statement in between), "no branch, no loop"
    assert not any(isinstance(node, ast.IfExp) for statement in between for node in ast.walk(statement))
    for script in (pretrain, finetune):
        assert len(inspect.getsource(script.main).splitlines()) < 110


def test_models_makes_its_settings_before_torch_starts():
    for script in (pretrain, finetune):
        imports = re.findall(r"^(?:from|import) (\w+)", inspect.getsource(script), re.M)
        assert imports.index("models") < min(imports.index(name) for name in ("torch", "numpy", "tqdm"))
    assert "GOMP_SPINCOUNT" in inspect.getsource(models).split("import torch")[0]


@pytest.mark.parametrize("train", ("pre", "fine"))
def test_bfloat16_changes_a_run_by_its_rounding_and_no_weight(data, tmp_path, train):
    run, flags = {"pre": (pre, []), "fine": (fine, ["--init", "scratch"])}[train]
    for kind in ("--bf16", "--no-bf16"):
        weights = run(data, tmp_path / kind, kind, "--every", "1", *flags)["policy"]
        assert all(weight.dtype != torch.bfloat16 for weight in weights.values())
    coarse, exact = ([line["loss"] for line in metrics(tmp_path / kind) if "loss" in line]
                     for kind in ("--bf16", "--no-bf16"))
    assert coarse != exact and coarse == pytest.approx(exact, rel=0.01)


# ---- exact resume ----

def test_pretraining_killed_and_resumed_equals_an_uninterrupted_run_to_the_bit(data, pretrained, tmp_path):
    flags = [*FLAGS, *FEW, "--data", data.video, "--probe-data", data.robot, "--out", str(tmp_path / "run")]
    killed = subprocess.run([sys.executable, "-c", (
        "import os, signal, conftest, pretrain; save = pretrain.save_checkpoint\n"
        "pretrain.save_checkpoint = lambda *a: save(*a) or os.kill(os.getpid(), signal.SIGKILL)\n"
        f"pretrain.main({flags!r})")], cwd=Path(__file__).parent, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "loss": 0.0}\n{"step": 4, "lo')        # lines after the checkpoint, one torn
    pretrain.main([*flags, "--resume", "--workers", "1"])             # and with a loader process
    whole, resumed = (models.load_checkpoint(p) for p in (pretrained, tmp_path / "run" / "last.pt"))
    assert equal(whole["policy"], resumed["policy"]) and equal(whole["world_model"], resumed["world_model"])
    logged = [[{k: v for k, v in line.items() if k != "waiting"} for line in metrics(run)]
              for run in (pretrained.parent, tmp_path / "run")]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("flags", [["--init", "begin.pt"],
                                   ["--init", "scratch", "--policy", "diffusion"]], ids=" ".join)
def test_finetuning_resumes_to_the_bit_without_the_checkpoint_it_began_from(data, pretrained, tmp_path,
                                                                            monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    Path("begin.pt").write_bytes(pretrained.read_bytes())
    whole = fine(data, "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_checkpoint", lambda *a: models.save_checkpoint(*a) or sys.exit())
        with pytest.raises(SystemExit):
            fine(data, "run", *flags)
    Path("begin.pt").unlink()
    resumed = fine(data, "run", *flags, "--resume")
    assert equal(whole["policy"], resumed["policy"])
    if "diffusion" in flags:
        assert not equal(whole["policy"], whole["last_weights"]), "the averaged weights are evaluated"
        assert equal(whole["last_weights"], resumed["last_weights"])


def test_a_run_is_never_overwritten_unasked_and_never_resumed_with_other_flags_or_data(data, pretrained):
    before = pretrained.read_bytes()
    for flags, words in ((["--resume", "--lr", "0.1"], "--lr 0.0003, now it is 0.1"),
                         (["--resume", "--data", data.robot], "data .* now it is"), ([], "--overwrite")):
        with pytest.raises(InputError, match=words):
            pre(data, pretrained.parent, "--probe-data", data.robot, *flags)
    assert pretrained.read_bytes() == before


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_run_that_diverges_ends_and_never_saves_it(data, tmp_path, monkeypatch, kind):
    """Steps are looked at when they are logged and before a checkpoint. Here the second of four fails; a
    gradient can be NaN although the loss is finite."""
    def loss(self, batch, calls=[]):
        calls.append(self)
        value, logs = original(self, batch)
        if len(calls) % 4 == 2:
            value = value * torch.nan if kind == "loss" else value + (0 * value).sqrt()
        return value, logs
    original = models.Policy.loss
    monkeypatch.setattr(models.Policy, "loss", loss)
    name = {"loss": "loss is nan", "gradient": "grad_norm/policy is nan"}[kind]
    with pytest.raises(InputError, match=f"{name} at step 2 .* lower --lr"):
        fine(data, tmp_path / "a", "--init", "scratch")
    with pytest.raises(InputError, match="is nan at step 4 or since some steps before"):
        fine(data, tmp_path / "b", "--init", "scratch", "--steps", "400", "--every", "40")
    assert not any((tmp_path / run / "last.pt").exists() for run in "ab")


@pytest.mark.parametrize("failure, line", [("damaged", "s.h5 is damaged: copy it again"),
                                           ("killed", "a loader process was killed")])
def test_what_fails_in_a_loader_process_is_one_line(data, tmp_path, monkeypatch, capsys, failure, line):
    def read_frames(*_):
        if failure == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("s.h5 is damaged: copy it again")
    monkeypatch.setattr(EpisodeDataset, "read_frames", read_frames)
    with pytest.raises(SystemExit):
        models.run(lambda: fine(data, tmp_path, "--init", "scratch", "--workers", "1"))
    errors = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert f"error: {line}" in errors[-1] and "Traceback" not in "".join(errors)


# ---- what pretraining watches ----

def test_detached_latent_actions_are_an_error_before_the_first_step(data, tmp_path, monkeypatch):
    original = models.Policy.latent_actions
    monkeypatch.setattr(models.Policy, "latent_actions", lambda self, obs: original(self, obs).detach())
    with pytest.raises(InputError, match=r"reaches 0 of (\d+) policy tensors, but not .*detaches"):
        pre(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gradient_of_zero_is_a_warning_and_training_goes_on(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models.TextEncoder, "__call__",
                        lambda self, texts: np.zeros((len(texts), 512), np.float32))
    assert pre(data, tmp_path, "--steps", "1")["step"] == 1
    assert "it is zero for tokens.instruction_encoder.0.weight: these tensors do" in capsys.readouterr().out


def test_a_short_chunk_is_a_warning_with_the_flag_that_makes_it_longer(data, capsys):
    flags = ["--data", data.video, "--probe-data", "none", "--chunk", "4"]
    pretrain.open_data(pretrain.arguments(flags))
    assert "a chunk spans 0.20 s, in which little moves: try --strides 3\n" in capsys.readouterr().out
    pretrain.open_data(pretrain.arguments([*flags, "--strides", "3"]))
    assert not capsys.readouterr().out


def test_shuffle_ratio_sees_whether_the_world_model_uses_the_latent_actions():
    """A stand-in with error |a - truth| uses its actions: ratio above 1. One that ignores them: exactly 1."""
    def world(uses):
        def losses(frames, actions, **_):
            error = (actions[..., 0] - frames[:, 1:, 0, 0, 0].float() / 255).abs() * uses + 0.1
            return dict.fromkeys(("still", "recon", "open_loop", "open_loop_plain", "kl_dyn"), error)
        return Namespace(losses=losses, total=lambda terms: terms["recon"])

    frames = torch.randint(0, 255, (8, 4, 3, 4, 4), dtype=torch.uint8)
    z = frames[:, 1:, 0, 0, :1].float() / 255
    batch = {"frames": frames, "is_pad": torch.zeros(8, 3, dtype=torch.bool),
             "instruction_id": torch.arange(8) % 2, "episode": torch.arange(8) // 4}
    used, ignored = (pretrain.latent_action_report(z, world(uses), batch, 0) for uses in (True, False))
    assert all(used[name] > 1.5 and ignored[name] == 1
               for name in ("shuffle_ratio", "shuffle_ratio/episode", "zero_ratio/open_loop"))


def test_what_the_world_model_is_fed_with_each_flag():
    z, batch = torch.randn(4, 3, 7, requires_grad=True), {
        "frames": torch.randint(0, 255, (4, 4, 3, 16, 16), dtype=torch.uint8),
        "actions": torch.rand(4, 3, 7) * 2 + 3, "is_pad": torch.zeros(4, 3, dtype=torch.bool)}
    train = Namespace(action_dim=7, limits=lambda key: {"min": [3.0] * 7, "max": [5.0] * 7, "std": [1.0] * 7})
    for kind, wanted in (("learned", z), ("shuffled", z[[2, 3, 0, 1]]), ("zero", z * 0), ("detached", z),
                         ("true", batch["actions"] - 4)):                             # [3, 5] -> [-1, 1]
        actions, extra = pretrain.make_feed(Namespace(latents=kind, device="cpu"), train, {})(z, batch)
        torch.testing.assert_close(actions, wanted)
        assert extra == 0 and actions.requires_grad == (kind in ("learned", "shuffled")), kind
    inverse = models.InverseDynamics(dict(size="tiny", image_size=16, action_dim=7, views=1))
    args = Namespace(compile=False, bf16=False)
    actions, distilled = pretrain.make_feed(args, train, {"inverse": inverse})(z, batch)
    torch.testing.assert_close(distilled, ((z - actions) ** 2).mean())
    distilled.backward()
    assert z.grad.any() and all(p.grad is None for p in inverse.parameters()), "the policy follows, alone"


def test_pretraining_learns_and_draws_four_clips_as_truth_imagined_and_error(data, tmp_path):
    """The next frames of the moving square follow from its picture: the loss falls, the latents are used."""
    pre(data, tmp_path, *"--steps 60 --every 60 --batch-size 8 --chunk 4 --warmup 5".split())
    lines = metrics(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0], losses
    assert lines[-1]["z_std"] > 0.2
    picture = pretrain.cv2.imread(str(tmp_path / "open_loop.png"))
    assert picture.shape == (4 * 3 * 32, (4 + 1) * 32, 3) and picture.std() > 10       # one column per frame


# ---- finetuning ----

def test_finetuning_beats_chance_and_reports_units(data, pretrained, tmp_path):
    fine(data, tmp_path, "--init", str(pretrained),
         *"--steps 150 --every 150 --batch-size 8 --shift 0 --warmup 5 --lr 2e-3".split())
    last = metrics(tmp_path)[-1]
    std = pretrain.EpisodeDataset(data.robot, 1).values("actions")[:, 0].std()
    assert last["val_l1/6"] < 0.8 * 0.5, "side of the picture, 0 or 1: better than always saying one half"
    assert 0 < last["val_l1/0"] < 3 * std, "in the data's units"


def test_finetuning_adds_cameras_and_proprioception_and_names_what_is_new(data, pretrained, tmp_path, capsys):
    """With --trunk-lr 0 only what is new learns: everything else stays as it was pretrained."""
    before = models.load_checkpoint(pretrained)["policy"]
    after = fine(data, tmp_path, "--init", str(pretrained), "--trunk-lr", "0")
    new = re.search("^new .*: (.+)$", capsys.readouterr().out, re.M)[1].split(", ")
    assert {"action_out.weight", "tokens.camera_embedding.1", "tokens.proprio_encoder.0.weight"} <= set(new)
    assert not any("trunk" in name for name in new) and set(new) == set(after["new"])
    assert all(name in new or torch.equal(after["policy"][name], before[name]) for name in after["policy"])
    assert after["config"]["cameras"] == ["front", "side"] and after["config"]["proprio_dim"] == 7
    slow, fast = (fine(data, tmp_path / rate, "--init", str(pretrained), "--trunk-lr", rate)["policy"]
                  for rate in ("1e-5", "1e-3"))
    moved = [(x["trunk.0.qkv.weight"] - before["trunk.0.qkv.weight"]).norm() for x in (slow, fast)]
    assert 0 < 10 * moved[0] < moved[1], "at its own rate"


def test_finetuning_from_an_unfinished_pretraining_warns(pretrained, tmp_path, capsys):
    models.save_checkpoint(tmp_path / "last.pt", {**models.load_checkpoint(pretrained), "step": 3})
    for path, warned in ((pretrained, False), (tmp_path / "last.pt", True)):
        finetune.starting_point(finetune.arguments(["--init", str(path)]))
        assert ("is of an unfinished run, at step 3 of 4" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("policy", models.POLICIES)
def test_the_supervised_baseline_finetunes_a_finetuned_policy_with_a_new_last_layer(data, tmp_path, policy):
    first = fine(data, tmp_path / "all", "--init", "scratch", "--policy", policy, "--steps", "1")["policy"]
    frozen = fine(data, tmp_path / "few", "--init", str(tmp_path / "all" / "last.pt"), "--steps", "1",
                  "--demos-per-task", "1", "--ema", "0", "--trunk-lr", "0")
    new = frozen["new"]
    assert all(torch.equal(frozen["policy"][name], first[name]) for name in first
               if name not in new and "proprio_norm" not in name), "all else is taken over"
    assert new and all(any(part.startswith(("action_", "style_action_in")) for part in name.split("."))
                       for name in new), "the last layer and the normaliser of the actions, nothing else"
    assert not torch.equal(frozen["policy"]["action_out.weight"], first["action_out.weight"])


def test_the_normaliser_knows_the_training_demonstrations_alone(data, tmp_path, capsys):
    checkpoint = fine(data, tmp_path, "--init", "scratch", "--steps", "1", "--demos-per-task", "1",
                      "--no-proprio")
    assert ": 2 episodes, " in capsys.readouterr().out, "two tasks, one demonstration each"
    assert checkpoint["config"]["proprio_dim"] is None
    few = pretrain.EpisodeDataset(data.robot, 10, split="train", demos_per_task=1)
    actions = torch.cat([few[i]["actions"][~few[i]["is_pad"]] for i in range(len(few))])
    low = checkpoint["policy"]["action_norm.low"]
    torch.testing.assert_close(low, actions.min(0).values)
    everyone = torch.tensor(pretrain.EpisodeDataset(data.robot, 10).limits("actions")["min"])
    assert (low > everyone)[:2].any(), "not those of the whole dataset"


def test_input_that_cannot_work_is_one_line_and_writes_nothing(data, pretrained, tmp_path):
    out = tmp_path / "out"
    fine(data, tmp_path / "finetuned", "--init", "scratch", "--steps", "1")
    again, scratch = ["--init", str(tmp_path / "finetuned" / "last.pt")], ["--init", "scratch"]
    for script, flags, words in [
            (fine, ["--init", str(tmp_path / "absent.pt")], "no checkpoint at"),
            (fine, ["--init", str(pretrained), "--policy", "baku"], "goes with --init scratch"),
            (fine, [*again, "--head", "add"], "last layer makes latent actions; .* has none"),
            (fine, [*again, "--no-proprio"], "expects .* 2 cameras and proprioception, .* no proprioception"),
            (fine, [*again, "--data", data.video], "video only"),
            (fine, [*scratch, "--head", "add"], "give --init CHECKPOINT"),
            (fine, [*scratch, "--ema", "1"], "below 1"),
            (pre, ["--chunk", "0"], "--chunk must be 1 or more"),
            (pre, ["--policy-size", "huge"], "tiny"),
            (pre, ["--batch-size", "1"], "--batch-size must be 2 or more"),
            (pre, ["--latents", "true"], "needs actions"),
            (pre, ["--latents", "zero", "--latent-source", "inverse"], "leave out"),
            (pre, ["--probe-data", data.video], "must be a dataset with actions"),
            (pre, ["--probe-data", "x"], "--probe-data none"),
            (pre, ["--data", str(tmp_path / "nothing")], "nothing")]:
        with pytest.raises(InputError, match=words) as error:
            script(data, out, *flags)
        assert "\n" not in str(error.value) and not out.exists(), words
