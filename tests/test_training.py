"""Claims of pretrain.py and finetune.py: they run and learn, resume to the bit, and refuse what cannot be."""
import json
from pathlib import Path

import pytest
import torch

import finetune
import models
import pretrain
from conftest import metrics, stop_after, write_dataset
from models import InputError
from world_model import shuffled_within


def weights(run):
    return models.load_checkpoint(Path(run) / "last.pt")["policy"]


def pre(data, out, *flags):
    pretrain.main(["--smoke", "--data", data.video, "--probe-data", data.robot, "--out", str(out),
                   "--device", "cpu", *flags])


def fine(data, out, *flags):
    finetune.main(["--smoke", "--data", data.robot, "--out", str(out), "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    pre(data, out)
    return out / "last.pt"


# ---- exact resume ----

def test_pretraining_resumed_equals_uninterrupted_to_the_bit(data, pretrained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, pretrain, 4)
        with pytest.raises(KeyboardInterrupt):
            pre(data, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "loss": 0.0}\n{"step": 6, "lo')        # lines after the checkpoint, one torn
    pre(data, tmp_path / "run", "--resume")
    for part in ("policy", "world_model"):
        a, b = (models.load_checkpoint(p)[part] for p in (pretrained, tmp_path / "run" / "last.pt"))
        assert all(torch.equal(a[k], b[k]) for k in a), f"{part} differs after resume"
    drop = lambda run: [{k: v for k, v in line.items() if k != "waiting"}   # noqa: E731
                        for line in metrics(run)]
    assert drop(tmp_path / "run") == drop(pretrained.parent)


def test_finetuning_resumed_equals_uninterrupted_to_the_bit(data, pretrained, tmp_path, monkeypatch):
    fine(data, tmp_path / "whole", "--init", str(pretrained))
    with monkeypatch.context() as patch:
        stop_after(patch, finetune, 4)
        with pytest.raises(KeyboardInterrupt):
            fine(data, tmp_path / "run", "--init", str(pretrained))
    fine(data, tmp_path / "run", "--init", str(pretrained), "--resume")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_with_other_flags_or_other_data_is_refused(data, pretrained, tmp_path):
    with pytest.raises(InputError, match="--lr 0.0003, now it is 0.1"):
        pre(data, pretrained.parent, "--resume", "--lr", "0.1")
    with pytest.raises(InputError, match="nothing to resume"):
        pre(data, tmp_path / "none", "--resume")
    before = pretrained.read_bytes()
    with pytest.raises(InputError, match="--resume goes on with it, --overwrite"):
        pre(data, pretrained.parent)
    assert pretrained.read_bytes() == before, "a run that exists is never overwritten unasked"


def test_a_checkpoint_that_lies_in_the_run_folder_is_not_lost(data, pretrained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(pretrained.read_bytes())
    with pytest.raises(InputError, match="already holds a run"):
        pre(data, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == pretrained.read_bytes()


def test_finetuning_resumes_without_the_checkpoint_it_began_from(data, pretrained, tmp_path, monkeypatch):
    begin = tmp_path / "begin.pt"
    begin.write_bytes(pretrained.read_bytes())
    with monkeypatch.context() as patch:
        stop_after(patch, finetune, 4)
        with pytest.raises(KeyboardInterrupt):
            fine(data, tmp_path / "run", "--init", str(begin))
    begin.unlink()
    fine(data, tmp_path / "run", "--init", str(begin), "--resume")
    assert models.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 6


# ---- what pretraining watches ----

def test_detached_latents_are_noticed_at_the_first_step(data, tmp_path, monkeypatch):
    original = models.Policy.latent_actions
    monkeypatch.setattr(models.Policy, "latent_actions", lambda self, obs: original(self, obs).detach())
    with pytest.raises(InputError, match="no finite, non-zero gradient to .* policy tensors"):
        pre(data, tmp_path / "run")


def test_shuffling_stays_within_the_instruction_and_moves_every_row_that_has_a_partner():
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    index, paired = shuffled_within(groups, torch.Generator().manual_seed(0))
    assert torch.equal(groups[index], groups) and (index[paired] != torch.arange(6)[paired]).all()
    assert paired.tolist() == [True, True, True, False, True, True] and index[3] == 3


def test_shuffle_ratio_sees_whether_the_world_model_uses_the_latents():
    """A stand-in with error |a - truth| uses its actions: ratio above 1. One that ignores them: exactly 1."""
    class World:
        config = {"predict": "prior"}
        uses = True

        def losses(self, frames, actions, proprio, **_):
            error = (actions[..., 0] - frames[:, 1:, 0, 0, 0].float() / 255).abs() * self.uses + 0.1
            return {k: error for k in ("still", "recon", "open_loop", "open_loop_plain", "kl_dyn", "kl_rep")}

        def total(self, terms):
            return sum(terms.values())

    frames = torch.randint(0, 255, (8, 4, 3, 4, 4), dtype=torch.uint8)
    z = frames[:, 1:, 0, 0, :1].float() / 255
    batch = {"frames": frames, "is_pad": torch.zeros(8, 3, dtype=torch.bool),
             "instruction_id": torch.arange(8) % 2, "episode": torch.arange(8) // 4}
    world = World()
    used = pretrain.latent_action_report(z, world, batch, 0)
    world.uses = False
    ignored = pretrain.latent_action_report(z, world, batch, 0)
    assert (used["shuffle_ratio"] > 1.5 and ignored["shuffle_ratio"] == 1
            and ignored["zero_ratio/open_loop"] == 1)
    assert used["shuffle_ratio/episode"] > 1.5 and ignored["shuffle_ratio/episode"] == 1


def test_pretraining_reports_every_metric_and_draws_the_strip(pretrained):
    lines = metrics(pretrained.parent)
    assert {"z_std", "shuffle_ratio", "probe_r2", "copy_ratio"} <= set(lines[0]) and lines[0]["step"] == 0
    assert {"loss", "recon", "open_loop", "kl_dyn", "kl_rep", "grad_norm/policy", "waiting"} <= set(lines[1])
    picture = pretrain.cv2.imread(str(pretrained.parent / "open_loop.png"))
    assert picture.shape[:2] == (4 * 3 * 32 * 2, 11 * 32 * 2), (
        "4 clips x (truth, imagined, error), 11 frames, scale 2")


def test_pretraining_learns(data, tmp_path):
    """Next frames of the moving square follow from the picture: the loss falls and the latents are used."""
    pretrain.main(["--data", data.video, "--probe-data", "none", "--out", str(tmp_path), "--device", "cpu",
                   "--steps", "150", "--batch-size", "16", "--log-every", "25", "--eval-every", "1000",
                   "--save-every", "1000", "--eval-windows", "64"])
    lines = metrics(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0], losses
    assert lines[-1]["z_std"] > 0.2 or lines[-2]["z_std"] > 0.2


# ---- finetuning ----

def test_finetuning_beats_chance_and_reports_units(data, pretrained, tmp_path):
    finetune.main(["--data", data.robot, "--init", str(pretrained), "--out", str(tmp_path), "--device", "cpu",
                   "--steps", "150", "--batch-size", "16", "--eval-every", "150", "--shift", "0"])
    lines = metrics(tmp_path)
    stats = json.loads((Path(data.robot) / "dataset.json").read_text())["statistics"]["actions"]
    last = [line for line in lines if "val_l1/0" in line][-1]
    assert last["val_l1/6"] < 0.8 * 0.5, "side of the picture, 0 or 1: better than always saying one half"
    assert 0 < last["val_l1/0"] < 3 * stats["std"][0], "in the data's units"


def test_finetuning_says_what_is_new(data, pretrained, tmp_path, capsys):
    fine(data, tmp_path, "--init", str(pretrained))
    text = capsys.readouterr().out
    new = next(line for line in text.splitlines() if line.startswith("new"))
    assert ("action_out.weight" in new and "camera_embedding.1" in new
            and "proprio_encoder.0.weight" in new and "trunk" not in new)


def test_the_normaliser_knows_the_training_demonstrations_alone(data, tmp_path):
    fine(data, tmp_path, "--init", "scratch", "--demos-per-task", "1")
    few = pretrain.EpisodeDataset(data.robot, 10, split="train", demos_per_task=1)
    actions = torch.cat([few[i]["actions"][~few[i]["is_pad"]] for i in range(len(few))])
    low = models.load_checkpoint(tmp_path / "last.pt")["policy"]["action_norm.low"]
    torch.testing.assert_close(low, actions.min(0).values)
    assert (low > torch.tensor(few.stats["actions"]["min"]))[:2].any(), "not those of the whole dataset"


def test_demos_per_task_and_scratch(data, tmp_path, capsys):
    fine(data, tmp_path, "--init", "scratch", "--demos-per-task", "2", "--no-proprio")
    assert ": 4 episodes, " in capsys.readouterr().out, "two tasks, two demonstrations each"
    assert models.load_checkpoint(tmp_path / "last.pt")["config"]["proprio_dim"] is None


def test_add_head_trains(data, pretrained, tmp_path):
    fine(data, tmp_path, "--init", str(pretrained), "--head", "add")
    assert models.load_checkpoint(tmp_path / "last.pt")["config"]["head"] == "add"


def test_bad_input_is_one_line_and_writes_nothing(data, pretrained, tmp_path):
    out = tmp_path / "out"
    for call, words in [
        (lambda: fine(data, out, "--init", str(tmp_path / "absent.pt")), "no checkpoint at"),
        (lambda: fine(data, out, "--init", str(pretrained), "--policy", "baku"), "goes with --init scratch"),
        (lambda: fine(data, out, "--init", "scratch", "--chunk", "50"), "chunk of 50"),
        (lambda: fine(data, out, "--init", "scratch", "--head", "add"), "needs --init CHECKPOINT"),
        (lambda: fine(data, out, "--init", "scratch", "--demos-per-task", "500"),
         "500 demonstrations per task"),
        (lambda: finetune.main(["--smoke", "--data", data.video, "--init", "scratch", "--out", str(out)]),
         "video only"),
        (lambda: pre(data, out, "--chunk", "40"), "chunk of 40"),
        (lambda: pre(data, out, "--policy-size", "huge"), "tiny"),
        (lambda: pre(data, out, "--batch-size", "1"), "--batch-size takes 2 or more"),
        (lambda: pre(data, out, "--save-every", "0"), "--save-every takes 1 or more"),
        (lambda: pre(data, out, "--device", "abacus"), "no device"),
        (lambda: pre(data, out, "--probe-data", data.video), "must hold actions"),
        (lambda: pretrain.main(["--smoke", "--data", str(tmp_path / "nothing"), "--out", str(out)]),
         "nothing"),
        (lambda: pretrain.main(["--smoke", "--data", data.video, "--probe-data", "x", "--out", str(out)]),
         "--probe-data none"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value) and not out.exists(), (
            "nothing is written before the input is known to be good")


def test_data_of_another_text_encoder_is_refused_with_the_command_that_mends_it(data, pretrained, tmp_path,
                                                                                monkeypatch):
    monkeypatch.setitem(models.TextEncoder.DIM, "minilm", 512)
    monkeypatch.setattr(models.TextEncoder, "__init__",
                        lambda self, name: setattr(self, "name", "hash") or setattr(self, "dim", 512))
    folder = write_dataset(tmp_path / "minilm", cameras=("front", "side"), text_encoder="minilm")
    with pytest.raises(InputError, match="--text-encoder hash, .* was embedded with minilm: "
                                         "python prepare_data.py embed"):
        finetune.main(["--smoke", "--data", str(folder), "--init", str(pretrained),
                       "--out", str(tmp_path / "out")])
