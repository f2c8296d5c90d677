"""Claims of cca.py: it finds what is in latent actions, nothing that is not, and what random weights get."""
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch

import cca
import pretrain
from conftest import write_dataset
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


def test_without_a_ridge_scikit_learn_finds_the_same_correlations():
    CCA = pytest.importorskip("sklearn.cross_decomposition", reason="scikit-learn is a test-only package").CCA
    X = RNG(0).normal(size=(300, 5))
    Y = X[:, :3] @ RNG(1).normal(size=(3, 4)) + RNG(2).normal(size=(300, 4))
    theirs = CCA(4, max_iter=100_000, tol=1e-14).fit(X, Y).transform(X, Y)
    theirs = [np.corrcoef(a, b)[0, 1] for a, b in zip(theirs[0].T, theirs[1].T)]
    assert np.allclose(cca.cca_correlations(X, Y, *cca.cca_fit(X, Y, 0)), theirs, atol=1e-6)


def test_the_ridge_is_strong_where_columns_are_noise_and_weak_where_directions_are_exact():
    episode = np.repeat(np.arange(20), 10)
    X = RNG(0).normal(size=(200, 60))
    noisy = X[:, :1] + RNG(1).normal(size=(200, 1)) * 2
    assert cca.choose_ridge(X, noisy, episode, 5) == max(cca.RIDGES)
    thin = X[:, :3] @ np.diag([1, 1, 1e-2]) @ np.linalg.qr(RNG(2).normal(size=(3, 3)))[0]
    assert cca.choose_ridge(thin, X[:, 2:3], episode, 5) == min(cca.RIDGES)


def test_a_column_that_varies_in_one_fold_alone_does_not_spoil_the_choice():
    X, episode = RNG(0).normal(size=(200, 3)), np.repeat(np.arange(20), 10)
    Y = np.c_[X[:, 0], np.where(episode == 5, X[:, 1], 0.0)]
    with np.errstate(all="raise"):
        assert cca.choose_ridge(X, Y, episode, 5) in cca.RIDGES
        assert np.isfinite(cca.analyse(X, Y, episode, X, Y, episode, 5, ones(20))["resampled"]).all()


def ones(episodes):
    return np.ones((1, episodes))


def test_constant_latents_are_dropped_and_a_collapsed_policy_is_an_error():
    X, episode = RNG(0).normal(size=(300, 3)), np.arange(300) // 30
    Y = X @ RNG(1).normal(size=(3, 3))
    dead = X.copy()
    dead[:, 1] = 0.4
    result = cca.analyse(dead, Y, episode, dead, Y, episode, 5, ones(10))
    assert result["constant"] == [1] and result["held_out"].shape == (3,)
    assert result["held_out"][1] > 0.9 and result["held_out"][2] == 0       # two columns have two components
    with pytest.raises(InputError, match="collapsed"):
        cca.analyse(dead[:, 1:2], Y, episode, dead[:, 1:2], Y, episode, 5, ones(10))
    with pytest.raises(InputError, match="too few"):
        cca.analyse(X[:6], Y[:6], np.arange(6), X, Y, episode, 5, ones(10))
    with pytest.raises(InputError, match="10 training episodes are fewer than the 11 folds"):
        cca.analyse(X, Y, episode, X, Y, episode, 11, ones(10))


def test_what_is_reported_comes_from_the_held_out_rows():
    X, Y, held_out_X, held_out_Y = split(RNG(0).normal(size=(600, 40)), RNG(1).normal(size=(600, 40)))
    episode = np.repeat(np.arange(10), 30)
    result = cca.analyse(X, Y, episode, held_out_X, held_out_Y, episode, 5, ones(10))
    assert result["in_sample"].mean() > 0.3
    assert abs(result["held_out"].mean()) < 0.1 and np.allclose(result["resampled"][0], result["held_out"])


def test_luck_of_single_random_policies_is_inside_the_interval():
    def result(rho):
        return {"held_out": np.array([rho]), "in_sample": np.array([rho]), "ridge": 0.1,
                "resampled": np.full((500, 1), rho)}

    row = cca.plain(cca.pooled([result(0.2), result(0.6)]))
    assert row["held_out"] == [pytest.approx(0.4)] and np.allclose(row["held_out_interval"], [[0.2, 0.6]])


# ---- probes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [cca.linear_probe, cca.mlp_probe])
def test_a_probe_finds_what_is_there_and_claims_nothing_that_is_not(probe):
    X, episode = RNG(0).normal(size=(1200, 8)), np.repeat(np.arange(12), 50)
    Y = np.c_[X[:, :2] @ [1.0, -2.0], 1e3 * RNG(1).normal(size=1200)]       # units do not matter
    r2 = cca.r_squared(probe(X[:600], Y[:600], X[600:]), Y[600:], episode, ones(12))[0]
    assert r2[0] > 0.95 and -0.1 < r2[1] < 0.05
    few = probe(X[:12], Y[:12], X[600:])                                    # from hardly any labels
    assert cca.r_squared(few, Y[600:], episode, ones(12))[0, 1] > -1.5


def test_only_the_mlp_sees_what_is_not_linear():
    X = RNG(0).normal(size=(2000, 2))
    Y, episode = (X[:, :1] * X[:, 1:] > 0).astype(float), np.zeros(1000, int)
    linear, mlp = (cca.r_squared(probe(X[:1000], Y[:1000], X[1000:]), Y[1000:], episode, ones(1))[0, 0]
                   for probe in (cca.linear_probe, cca.mlp_probe))
    assert linear < 0.05 and mlp > 0.5


def test_r2_is_that_of_the_resampled_episodes():
    true = RNG(0).normal(size=(60, 2))
    guess, episode = true + RNG(1).normal(size=(60, 2)), np.repeat(np.arange(20), 3)
    weights = RNG(2).multinomial(20, np.full(20, 1 / 20), 3)
    drawn = np.arange(60).repeat(weights[1].repeat(3))
    by_hand = 1 - ((true - guess)[drawn] ** 2).sum(0) / ((true[drawn] - true[drawn].mean(0)) ** 2).sum(0)
    assert np.allclose(cca.r_squared(guess, true, episode, weights)[1], by_hand)


def test_collapse_tells_constant_one_directional_and_task_naming_latents_from_good_ones():
    task, free = np.arange(400) % 2, RNG(0).uniform(-0.9, 0.9, (400, 4, 3))
    good = cca.collapse(free, task)
    assert good["rank"] > 2.8 and good["rank_chunk"] > 11 and good["instruction"] < 0.02
    assert good["saturated"] == 0 and np.allclose(good["std"], 0.52, atol=0.03)
    named = cca.collapse(np.where(task[:, None, None], 0.99, -0.99) * np.ones((400, 4, 3)), task)
    assert named["instruction"] == pytest.approx(1) and named["saturated"] == 1
    assert named["rank"] == pytest.approx(1) and max(cca.collapse(0 * free, task)["std"]) == 0


class Looks(torch.nn.Module):
    """A policy whose latents are a function of the picture."""
    cameras = ["front"]

    def __init__(self, function):
        super().__init__()
        self.function = function

    def latent_actions(self, obs):
        return self.function(obs["images"]["front"].float() / 255)[:, None]           # (B, 1, Z)


def clips(count=80, steps=4, size=32, seed=0):
    """A batch of clips: a bright square goes right (x, y) by a constant motion, 4 clips per episode."""
    rng = RNG(seed)
    frames, motion = torch.full((count, steps + 1, 3, size, size), 60, dtype=torch.uint8), []
    for b in range(count):
        where, step = rng.uniform(10, size - 10, 2), rng.choice([-1.0, 1.0], 2) * [1.5, 0]
        motion.append(step * steps)
        for k in range(steps + 1):
            x, y = (where + k * step).round().astype(int)
            frames[b, k, :, max(y - 3, 0):y + 3, max(x - 3, 0):x + 3] = 220
    obs = {"images": {"front": frames[:, 0]}, "instruction": torch.zeros(count, 1)}
    return {"frames": frames, "obs": obs,
            "is_pad": torch.zeros(count, steps, dtype=torch.bool), "episode": torch.arange(count) // 4,
            "instruction_id": torch.zeros(count, dtype=torch.long)}, np.array(motion)


def test_latents_that_tell_light_or_camera_are_found_out_and_blind_ones_are_not():
    batch, _ = clips(160)
    policies = {"light": Looks(lambda x: x.mean((1, 2, 3))[:, None]),
                "camera": Looks(lambda x: x.mean(1)[:, 10:22, :].mean(1)),
                "blind": Looks(lambda x: torch.linspace(-1, 1, len(x))[:, None])}
    rows = cca.nuisances(policies, batch, 0)
    assert rows["light"]["light"] > 0.8 and rows["light"]["moved"] > 1
    assert rows["light"]["camera_x"] < 0.2
    assert rows["blind"]["moved"] == 0 and max(rows["blind"][k] for k in ("camera_x", "light")) < 0.1
    batch["episode"][:] = 7                                                 # a single held-out episode
    assert cca.nuisances(policies, batch, 0)["light"]["light"] > 0.8


# ---- the world model and pairs -----------------------------------------------------------------------------


def test_motion_in_the_picture_is_found_where_it_is_and_whither_it_goes():
    batch, motion = clips(12)
    frames = batch["frames"].float() / 255
    measured, where = cca.image_motion(frames)
    assert (np.sign(measured[:, 0]) == np.sign(motion[:, 0])).all(), "x to the right, as in the picture"
    assert np.abs(measured[:, 0]).mean() > 3 and np.abs(measured[:, 1]).mean() < 1
    square = (frames[:, 2].mean(1) > 0.5).nonzero().double()                          # (clip, y, x)
    middle = np.array([square[square[:, 0] == b, 1:].mean(0).flip(0).numpy() for b in range(12)])
    assert np.abs(where - middle).max() < 6


class Painter:
    """A world model that is not one: it draws the square of o_t, moved as the latents say, or not at all."""
    config = {"target": "pixels"}

    def __init__(self, obeys=True):
        self.obeys = obeys

    def embed(self, frames, proprio=None):
        return frames

    def context(self, first):
        return first

    def imagine(self, first, z):
        shift = (12 * z[..., 0]).cumsum(1).round().int() * self.obeys                 # pixels, (B, n)
        return torch.stack([torch.stack([first[b].roll(int(s), -1) for s in shift[b]])
                            for b in range(len(z))]).float() / 255

    def decode(self, frames):
        return frames

    def picture(self, frames, first):
        return frames

    def losses(self, frames, z, proprio, predict, decode_steps):
        error = self.imagine(frames[:, 0], z) - frames[:, 1:].float() / 255
        return {"open_loop": (error ** 2).sum((2, 3, 4)) + 1}


ARGS = Namespace(seed=0, bootstrap=100)


def right_latents(batch, motion):
    z = torch.zeros(len(motion), 4, 2)
    z[..., 0] = torch.from_numpy(motion[:, 0] / 4 / 12).float()[:, None]
    return z


def test_a_world_model_that_obeys_latents_is_told_from_one_that_does_not():
    batch, motion = clips()
    z = right_latents(batch, motion)
    obeys, ignores = (cca.Imagination(Painter(o), batch, 0) for o in (True, False))
    ratio = cca.use_per_step(z, obeys, ARGS)
    assert set(ratio) == {"instruction", "episode"}
    assert all(min(r["ratio"]) > 2 and np.min(r["interval"]) > 1 for r in ratio.values())
    assert np.allclose(cca.use_per_step(z, ignores, ARGS)["episode"]["ratio"], 1)

    swapped, picture = cca.swap(z, obeys, ARGS)
    assert swapped["pairs"] > 10 and picture.startswith(b"\x89PNG")
    assert swapped["own"]["cosine"] > 0.8
    assert swapped["follows_latents"]["cosine"] > 0.8 > -0.5 > swapped["follows_scene"]["cosine"]
    assert abs(cca.swap(z, ignores, ARGS)[0]["follows_latents"]["cosine"]) < 0.2

    effect, _ = cca.sweep(z, obeys)
    assert effect[0] > 1 and effect[1] == 0, "the second dimension does nothing"


def test_nearest_pairs_are_of_other_episodes_and_agree_only_if_the_latents_know_the_motion():
    rng, n = RNG(0), 200
    direction = rng.normal(size=(n, 3))

    def sample(episodes):
        return {"displacement": 0.05 * direction, "motion": 10 * direction[:, :2],
                "where": np.full((n, 2), 16), "picture": torch.zeros(n, 3, 32, 32),
                "episode": np.arange(n) // 10 % episodes,
                "instruction_id": np.arange(n) % 2,
                "latents": {"knows": direction + 0.05 * rng.normal(size=(n, 3)),
                            "episode only": 10.0 * (np.arange(n) // 10)[:, None] + rng.normal(size=(n, 3))}}

    table, pictures = cca.pairs(sample(20), sample(20), ["knows", "episode only"], ARGS)
    assert set(table) == {"same task, other episode", "other task", "robot and video"}
    for kind, rows in table.items():
        assert rows["knows"]["interval"][0] > rows["knows"]["chance"] + 0.3, kind
    blind = table["same task, other episode"]["episode only"]
    assert blind["interval"][0] < blind["chance"] + 0.05 and 0.15 < blind["chance"] < 0.4
    assert len(pictures) == 18 and pictures[0][1].shape == (96, 96, 3)
    robot = sample(20)
    allowed = robot["episode"][:, None] != robot["episode"]
    index, usable = cca.nearest_pairs(robot["latents"]["episode only"], robot["latents"]["episode only"],
                                      allowed)
    assert usable.all() and (robot["episode"][index] != robot["episode"]).all()


def test_task_groups_go_by_the_first_known_verb():
    names = {"Put the pot on the stove": "Put", "please pick up the cup and place it": "Take",
             "push the drawer": "Move", "remove the lid": "Remove", "look around": "other"}
    assert {text: cca.group_of(text) for text in names} == names


# ---- the script ------------------------------------------------------------------------------------------


class FakeData:
    """A square wanders over the picture; the action is its displacement from the centre, as an expert's is.

    14 episodes of 30 frames for training, 6 for validation, one constant action dimension, camera "wrist".
    """
    CAMERAS, action_dim, fingerprint, text_dim, fps = ["wrist", "side"], 3, "fake", 512, 20
    attrs = {"action": {"names": ["dx", "dy", "still"], "delta": [True, True, True]}}
    instructions = ["push the square", "do it"]
    EPISODES = {"all": range(20), "train": range(14), "val": range(14, 20)}

    def __init__(self, path, chunk, cameras=None, split="all", text_encoder=None, stride=1, future=0):
        if text_encoder != "hash":
            raise InputError(f"{path} was embedded with hash, not {text_encoder}")
        self.chunk, self.cameras, self.episodes = chunk, self.CAMERAS[:cameras], list(self.EPISODES[split])
        self.num_episodes = len(self.episodes)
        FakeData.asked_for_stride = stride

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
                "episode": episode, "t": t, "instruction_id": 0 if episode % 10 < 8 else 1}


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
                      text_encoder="hash", world_config=None, args={"latents": "learned"},
                      data={"mixture": [{"path": "nowhere", "fps": 10, "stride": 1}]})
    save_checkpoint(path, checkpoint | changes)
    return str(path)


@pytest.fixture
def fake_data(monkeypatch):
    monkeypatch.setattr(cca, "EpisodeDataset", FakeData)


def analysis(tmp_path, checkpoint, *flags):
    cca.main(["--checkpoint", checkpoint, "--out", str(tmp_path), "--overwrite", "--max-windows", "400",
              "--draws", "1", *flags])
    return json.loads((tmp_path / "cca.json").read_text())


def test_latents_that_know_where_the_square_is_gain_over_random_weights_and_untrained_ones_do_not(
        tmp_path, capsys, fake_data):
    good = analysis(tmp_path, write_checkpoint(tmp_path / "good.pt", steps=60))
    single = good["cca"]["all"]["single"]
    (gain,), rows = single["gain"].values(), single["rows"]
    name = next(iter(single["gain"]))
    assert rows[name]["mean"] > 0.8 and gain["random weights"]["mean_interval"][0] > 0
    assert rows["true actions"]["mean"] > 0.999 and abs(rows["shuffled"]["mean"]) < 0.3
    assert good["probes"]["actions"]["rows"][f"{name}, linear"]["mean"] > 0.6
    assert good["constant_actions"] == ["still"] and good["held_out"] == {"episodes": 6, "windows": 174}
    assert len(rows[name]["held_out"]) == 2 and len(single["random_policies"]) == 5
    assert len(good["cca"]["all"]["chunk"]["rows"][name]["held_out"]) == 8
    assert good["cca"]["all"]["chunk"]["windows"] == 6 * (29 - 3), "padded windows are left out"
    assert good["cca"]["Move"]["single"]["windows"] < 174 and good["cca"]["other"] == {}
    assert any("other, single: left out, 2 training episodes" in note for note in good["notes"])
    out = capsys.readouterr().out
    assert "constant and left out: still" in out and "6 held-out episodes (174)" in out
    assert "2 frames per latent action" in out and FakeData.asked_for_stride == 2, "10 fps video, 20 Hz robot"
    assert "pretrained without one" in out

    fresh = analysis(tmp_path, write_checkpoint(tmp_path / "fresh.pt"))["cca"]["all"]["single"]
    low, high = fresh["gain"][name]["random weights"]["mean_interval"]
    assert low < 0 < high                           # warning 2: random weights correlate, and gain nothing
    assert fresh["rows"]["random weights"]["mean"] > 0.2


def test_the_same_seed_gives_the_same_numbers_and_a_result_is_not_overwritten_unasked(tmp_path, fake_data):
    checkpoint = write_checkpoint(tmp_path / "last.pt")
    a, b = (analysis(tmp_path, checkpoint, "--smoke", "--max-windows", "150") for _ in range(2))
    assert ({k: v for k, v in a.items() if k != "provenance"}
            == {k: v for k, v in b.items() if k != "provenance"})
    assert a["args"]["random_policies"] == 1 and a["args"]["max_windows"] == 150    # the preset, and the flag
    with pytest.raises(InputError, match="--overwrite"):
        cca.main(["--checkpoint", checkpoint, "--out", str(tmp_path)])


def test_statistics_of_random_policies_are_measured_before_they_are_compared(fake_data):
    policy = make_policy({**CONFIG, "cameras": ["wrist"]}).eval()
    data = FakeData("", 4, split="train", text_encoder="hash")

    def spread():
        windows = cca.collect({"random": policy}, {}, data, range(len(data)), "cpu", "")
        return windows["latents"]["random"][:, 0].std(0)

    assert spread().max() < 0.2                            # as initialised, all latents are nearly the same
    cca.estimate_latent_statistics([policy], data, range(len(data)), "cpu")
    assert not policy.training and not any(m.training for m in policy.modules())
    assert spread().min() > 0.4                            # now as wide as those of a trained policy


def test_the_report_shows_everything_in_one_file(data, tmp_path, capsys):
    """Two checkpoints, one of them with an inverse-dynamics model that sees the future, on real windows."""
    for name, flags in (("plain", []), ("inverse", ["--latent-source", "inverse"])):
        pretrain.main(["--smoke", "--steps", "2", "--eval-every", "2", "--data", data.video, "--probe-data",
                       "none", "--out", str(tmp_path / name), "--device", "cpu", "--chunk", "4", *flags])
    cca.main(["--smoke", "--checkpoint", str(tmp_path / "plain" / "last.pt"),
              str(tmp_path / "inverse" / "last.pt"), "--data", data.robot, "--out", str(tmp_path / "cca"),
              "--folds", "2", "--device", "cpu"])
    result = json.loads((tmp_path / "cca" / "cca.json").read_text())
    assert list(result["cca"]["all"]["single"]["rows"]) == [
        "plain", "inverse", "inverse, inverse dynamics (sees the future)", "random weights", "frame", "time",
        "shuffled", "true actions"]
    assert len(result["use_per_step"]["instruction"]["ratio"]) == 4 and len(result["effect"]) == 7
    assert set(result["pairs"]) == {"same task, other episode", "other task", "robot and video"}
    assert result["probes"]["motion"]["columns"] == ["x over chunk", "y over chunk"], "z never varies"
    report = (tmp_path / "cca" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 6 and not re.search('src="(?!data:)|href=', report)
    for picture in "correlations probes use swap sweep pairs".split():
        assert (tmp_path / "cca" / f"{picture}.png").stat().st_size > 5000
    assert "open-loop error" in capsys.readouterr().out


def test_what_cannot_be_analysed_is_refused_with_a_way_out(tmp_path, monkeypatch, fake_data):
    good = write_checkpoint(tmp_path / "good.pt")
    broken = torch.load(good, weights_only=True)
    broken["policy"]["query"][3] = torch.inf
    save_checkpoint(tmp_path / "broken.pt", broken)

    def refused(message, *flags, checkpoint=good):
        with pytest.raises(InputError, match=message):
            cca.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *flags])

    refused("NaN or infinity in 1 tensors .first: query", checkpoint=tmp_path / "broken.pt")
    broken = torch.load(good, weights_only=True)
    save_checkpoint(tmp_path / "world.pt", {**broken, "world_model": {"w": torch.tensor([torch.nan])}})
    refused("NaN or infinity in 1 tensors .first: world_model.w", checkpoint=tmp_path / "world.pt")
    refused("finetuned on actions", checkpoint=write_checkpoint(tmp_path / "fine.pt", stage="finetune"))
    refused("embedded with hash, not minilm",
            checkpoint=write_checkpoint(tmp_path / "text.pt", text_encoder="minilm"))
    refused("too few for 3 . 2 dimensions", "--max-windows", "5", "--folds", "2")
    refused("14 training and 6 held-out episodes: 15", "--folds", "15")
    refused("--bootstrap takes 1 or more", "--bootstrap", "0")
    refused("--folds takes 2 or more", "--folds", "1")
    with monkeypatch.context() as patched:
        patched.setitem(FakeData.EPISODES, "val", [14])
        refused("1 held-out")
    with monkeypatch.context() as patched:
        patched.setattr(FakeData, "CAMERAS", [])
        refused("looks through 1 cameras")
    with monkeypatch.context() as patched:
        patched.setattr(FakeData, "action_dim", None)
        refused("no actions to compare with")
    still = FakeData.__getitem__
    monkeypatch.setattr(FakeData, "__getitem__", lambda self, i: {
        **still(self, i), "actions": torch.zeros(4, 3)})
    refused("no action of .* varies")
    assert not (tmp_path / "out").exists()


def test_a_task_group_without_held_out_episodes_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch,
                                                                                 fake_data):
    monkeypatch.setitem(FakeData.EPISODES, "val", [14, 15, 16])
    result = analysis(tmp_path, write_checkpoint(tmp_path / "last.pt"), "--smoke", "--folds", "2")
    assert result["cca"]["other"] == {} and result["cca"]["all"]["single"]["episodes"] == 3
    assert any("fewer than two held-out episodes" in note for note in result["notes"])
