"""Claims of cca.py: it finds correlations that are there, none that are not, and what random weights get."""
import json

import numpy as np
import pytest
import torch

import cca
from models import BAKU, InputError, make_policy, save_checkpoint

RNG = np.random.default_rng


def split(X, Y):
    half = len(X) // 2
    return X[:half], Y[:half], X[half:], Y[half:]


# ---- the mathematics -------------------------------------------------------------------------------------


def test_a_linear_image_of_the_latents_correlates_perfectly_on_held_out_rows():
    X = RNG(0).normal(size=(400, 5))
    Y = X @ RNG(1).normal(size=(5, 5)) * [1e-3, 1, 1, 1, 1e3] + 7           # units and offsets do not matter
    X, Y, held_out_X, held_out_Y = split(X, Y)
    assert np.allclose(cca.cca_correlations(held_out_X, held_out_Y, *cca.cca_fit(X, Y, ridge=0)), 1,
                       atol=1e-6)
    assert (cca.cca_correlations(held_out_X, held_out_Y, *cca.cca_fit(X, Y)) > 0.95).all()


def test_independent_columns_look_correlated_in_sample_and_are_not_on_held_out_rows():
    X, Y, held_out_X, held_out_Y = split(RNG(0).normal(size=(600, 70)), RNG(1).normal(size=(600, 70)))
    fit = cca.cca_fit(X, Y)
    assert cca.cca_correlations(X, Y, *fit)[:10].min() > 0.6                # warning 1 of the docstring
    held_out = cca.cca_correlations(held_out_X, held_out_Y, *fit)
    assert abs(held_out.mean()) < 0.03 and np.abs(held_out).max() < 0.25


def test_known_correlations_are_recovered():
    rho, n = np.array([0.9, 0.6, 0.3, 0.0]), 40_000
    hidden = RNG(0).normal(size=(n, 4))
    partner = rho * hidden + np.sqrt(1 - rho ** 2) * RNG(1).normal(size=(n, 4))
    X, Y = (hidden @ RNG(2).normal(size=(4, 4)),
            np.c_[partner, RNG(3).normal(size=(n, 2))] @ RNG(4).normal(size=(6, 6)))
    X, Y, held_out_X, held_out_Y = split(X, Y)
    A, B, means = cca.cca_fit(X, Y)
    assert A.shape == (4, 4) and B.shape == (6, 4)
    assert np.allclose(cca.cca_correlations(held_out_X, held_out_Y, A, B, means), rho, atol=0.02)
    projections = (X - means[0]) @ A
    assert np.allclose(np.corrcoef(projections.T), np.eye(4), atol=0.02)    # later pairs are new directions


def test_the_unit_of_a_column_does_not_matter_even_with_a_ridge():
    X, noise = RNG(0).normal(size=(200, 3)), RNG(1).normal(size=(200, 3))
    Y = X + noise
    plain = cca.cca_correlations(X, Y, *cca.cca_fit(X, Y, 0.1))
    assert np.allclose(plain, cca.cca_correlations(X * 1e4, Y * 1e-5, *cca.cca_fit(X * 1e4, Y * 1e-5, 0.1)))


def test_the_interval_resamples_whole_episodes():
    """Rows repeated inside their episode are no new evidence: the interval stays as wide as without."""
    X = RNG(0).normal(size=(60, 2))
    Y = X + RNG(1).normal(size=(60, 2))
    weights = RNG(2).multinomial(20, np.full(20, 1 / 20), 400)
    fit, episode = cca.cca_fit(X, Y), np.repeat(np.arange(20), 3)
    once = cca.interval(cca.resampled_correlations(X, Y, *fit, episode, weights))
    many = (X.repeat(50, 0), Y.repeat(50, 0), *fit, episode.repeat(50))
    many = cca.interval(cca.resampled_correlations(*many, weights))
    assert np.allclose(once, many) and np.diff(once)[0] > 0.05
    drawn = np.repeat(np.arange(60), weights[0].repeat(3))                  # the first resample, row by row
    assert np.allclose(cca.resampled_correlations(X, Y, *fit, episode, weights)[0],
                       cca.cca_correlations(X[drawn], Y[drawn], *fit))


def test_constant_latents_are_dropped_and_a_collapsed_policy_is_an_error():
    X, weights = RNG(0).normal(size=(300, 3)), np.ones((5, 1))
    Y = X @ RNG(1).normal(size=(3, 3))
    dead = X.copy()
    dead[:, 1] = 0.4
    result = cca.analyse(dead, Y, dead, Y, np.zeros(300, int), 1e-3, weights)
    assert result["constant_latents"] == [1] and result["held_out"].shape == (3,)
    assert result["held_out"][1] > 0.9 and result["held_out"][2] == 0       # two columns have two components
    with pytest.raises(InputError, match="collapsed"):
        cca.analyse(dead[:, 1:2], Y, dead[:, 1:2], Y, np.zeros(300, int), 1e-3, weights)
    with pytest.raises(InputError, match="too few"):
        cca.analyse(X[:6], Y[:6], X, Y, np.zeros(300, int), 1e-3, weights)


def test_what_is_reported_comes_from_the_held_out_rows():
    X, Y, held_out_X, held_out_Y = split(RNG(0).normal(size=(600, 40)), RNG(1).normal(size=(600, 40)))
    result = cca.analyse(X, Y, held_out_X, held_out_Y, np.repeat(np.arange(10), 30), 1e-3, np.ones((1, 10)))
    assert result["in_sample"].mean() > 0.3 and result["probe_r2"] < 0
    assert abs(result["held_out"].mean()) < 0.1 and np.allclose(result["resampled"][0], result["held_out"])


def test_luck_of_single_random_policies_is_inside_the_interval_of_the_gain():
    def result(rho):
        return {"held_out": np.array([rho]), "in_sample": np.array([rho]),
                "resampled": np.full((500, 1), rho), "probe_r2": rho, "constant_latents": []}

    report = cca.summarise(result(0.5), [result(0.2), result(0.6)], result(0.0), result(0.1))
    assert report["gain_over_random"]["mean"] == pytest.approx(0.1)
    assert np.allclose(report["gain_over_random"]["mean_interval"], [-0.1, 0.3])
    assert (report["random"]["low"], report["random"]["high"]) == ([0.2], [0.6])


# ---- the script ------------------------------------------------------------------------------------------


class FakeData:
    """A square wanders over the picture; the action is its displacement from the centre, as an expert's is.

    14 episodes of 30 frames for training, 6 for validation, one constant action dimension, camera "wrist".
    """
    CAMERAS, action_dim, fingerprint, text_dim = ["wrist", "side"], 3, "fake", 512
    attrs = {"action": {"names": ["dx", "dy", "still"]}}
    EPISODES = {"all": range(20), "train": range(14), "val": range(14, 20)}

    def __init__(self, path, chunk, cameras=None, split="all", text_encoder=None):
        if text_encoder != "hash":
            raise InputError(f"{path} was embedded with hash, not {text_encoder}")
        self.chunk, self.cameras, self.episodes = chunk, self.CAMERAS[:cameras], list(self.EPISODES[split])
        self.num_episodes = len(self.episodes)

    def __len__(self):
        return 29 * self.num_episodes

    def spaced(self, most):
        return np.linspace(0, len(self) - 1, min(most, len(self))).astype(int).tolist()

    def __getitem__(self, i):
        episode, t = self.episodes[i // 29], i % 29
        where = np.clip(np.cumsum(RNG(episode).normal(size=(30, 2)), 0)
                        + RNG(episode + 100).uniform(3, 11, 2), 1, 13)
        picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
        y, x = where[t].astype(int)
        picture[:, y - 1:y + 2, x - 1:x + 2] = 255
        actions = np.c_[(8 - where) / 100, np.zeros(30)].astype(np.float32)
        rows = np.minimum(t + np.arange(self.chunk), 28)
        return {"obs": {"images": {c: picture for c in self.cameras}, "instruction": torch.ones(512)},
                "actions": torch.from_numpy(actions[rows]), "is_pad": t + torch.arange(self.chunk) >= 29,
                "episode": episode, "t": t, "instruction_id": 0}


CONFIG = dict(policy="baku", cameras=["front"], image_size=16, chunk=4, text_dim=512, proprio_dim=None,
              action_dim=7, latent_dim=3, latent_norm=True, head="latent", proprio_dropout=0.0,
              **(BAKU.SIZES["tiny"] | dict(width=32, layers=1, heads=2, channels=16)))


def write_checkpoint(path, steps=0, **changes):
    """A policy that for `steps` optimiser steps was told where the square is, as by a good world model."""
    torch.manual_seed(9)
    policy, data = make_policy(CONFIG), FakeData("", 4, split="train", text_encoder="hash")
    if steps:
        optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
        items = torch.utils.data.default_collate([data[i] for i in range(0, len(data), 2)])
        items["obs"]["images"] = {"front": items["obs"]["images"]["wrist"]}
        target = items["actions"][..., :2] * 10
        for _ in range(steps):
            loss = ((policy.latent_actions(items["obs"])[..., :2] - target) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    checkpoint = dict(stage="pretrain", step=steps, config=CONFIG, policy=policy.state_dict(),
                      text_encoder="hash")
    save_checkpoint(path, checkpoint | changes)
    return str(path)


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    monkeypatch.setattr(cca, "EpisodeDataset", FakeData)


def analysis(tmp_path, checkpoint, *flags):
    cca.main(["--checkpoint", checkpoint, "--out", str(tmp_path), "--overwrite", "--max-windows", "400",
              *flags])
    return json.loads((tmp_path / "cca.json").read_text())


def test_latents_that_know_where_the_square_is_gain_over_random_weights_and_untrained_ones_do_not(tmp_path,
                                                                                                  capsys):
    good = analysis(tmp_path, write_checkpoint(tmp_path / "good.pt", steps=60))
    low, high = good["gain_over_random"]["mean_interval"]
    assert good["pretrained"]["mean"] > 0.8 and low > 0
    assert good["gain_over_random"]["probe_r2"] > 0 and good["pretrained"]["probe_r2"] > 0.6
    assert abs(good["shuffled"]["mean"]) < 0.3 and good["shuffled"]["probe_r2"] < 0.05
    assert good["constant_actions"] == ["still"] and good["held_out"] == {"episodes": 6, "windows": 174}
    assert len(good["pretrained"]["held_out"]) == 2 and (tmp_path / "cca.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "constant and left out: still" in out and "6 held-out episodes (174)" in out

    fresh = analysis(tmp_path, write_checkpoint(tmp_path / "fresh.pt"))
    low, high = fresh["gain_over_random"]["mean_interval"]
    assert low < 0 < high                           # warning 2: random weights correlate, and gain nothing
    assert fresh["random"]["mean"] > 0.2


def test_whole_chunks_leave_out_padded_windows(tmp_path):
    result = analysis(tmp_path, write_checkpoint(tmp_path / "last.pt"), "--steps", "chunk",
                      "--random-policies", "1")
    assert result["held_out"] == {"episodes": 6, "windows": 6 * (29 - 3)}
    assert len(result["pretrained"]["held_out"]) == 4 * 2
    assert result["constant_actions"] == [f"still of k={k}" for k in range(4)]


def test_the_same_seed_gives_the_same_numbers_and_a_result_is_not_overwritten_unasked(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "last.pt")
    a, b = (analysis(tmp_path, checkpoint, "--smoke") for _ in range(2))
    assert ({k: v for k, v in a.items() if k != "provenance"}
            == {k: v for k, v in b.items() if k != "provenance"})
    assert a["args"]["random_policies"] == 1 and a["args"]["max_windows"] == 400    # the preset, and the flag
    with pytest.raises(InputError, match="--overwrite"):
        cca.main(["--checkpoint", checkpoint, "--out", str(tmp_path)])


def test_statistics_of_random_policies_are_measured_before_they_are_compared():
    policy = make_policy({**CONFIG, "cameras": ["wrist"]}).eval()
    data = FakeData("", 4, split="train", text_encoder="hash")

    def spread():
        (latents,), *_ = cca.collect([policy], data, range(len(data)), "cpu", "first", "")
        return latents.std(0)

    assert spread().max() < 0.2                            # as initialised, all latents are nearly the same
    cca.estimate_latent_statistics([policy], data, range(len(data)), "cpu")
    assert not policy.training and not any(m.training for m in policy.modules())
    assert spread().min() > 0.4                            # now as wide as those of a trained policy


def test_what_cannot_be_analysed_is_refused_with_a_way_out(tmp_path, monkeypatch):
    good = write_checkpoint(tmp_path / "good.pt")
    broken = torch.load(good, weights_only=True)
    broken["policy"]["query"][3] = torch.inf
    save_checkpoint(tmp_path / "broken.pt", broken)

    def refused(message, *flags, checkpoint=good):
        with pytest.raises(InputError, match=message):
            cca.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *flags])

    refused("NaN or infinity in 1 tensors .first: query", checkpoint=tmp_path / "broken.pt")
    refused("finetuned on actions", checkpoint=write_checkpoint(tmp_path / "fine.pt", stage="finetune"))
    refused("embedded with hash, not minilm",
            checkpoint=write_checkpoint(tmp_path / "text.pt", text_encoder="minilm"))
    refused("too few for 3 . 2 dimensions", "--max-windows", "5")
    refused("--bootstrap takes 1 or more", "--bootstrap", "0")
    monkeypatch.setitem(FakeData.EPISODES, "val", [14])
    refused("1 held-out")
    monkeypatch.setattr(FakeData, "CAMERAS", [])
    refused("looks through 1 cameras")
    monkeypatch.setattr(FakeData, "action_dim", None)
    refused("no actions to compare with")
    assert not (tmp_path / "out").exists()
