"""Claims of models.py: gradients, masks, categoricals, chunk execution, checkpoints."""
import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, kl_divergence

import models as m

TINY = dict(width=32, layers=2, heads=2, channels=8, dropout=0.0)
B, N = 6, 5


def config(head="latent", cameras=("front",), proprio_dim=None, latent_norm=True, **more):
    return {**dict(policy="baku", cameras=list(cameras), image_size=32, chunk=N, text_dim=16,
                   proprio_dim=proprio_dim, action_dim=7, latent_dim=7, latent_norm=latent_norm, head=head,
                   proprio_dropout=0.0), **TINY, **more}


def world(predict="posterior", **more):
    return m.WorldModel({**dict(size="tiny", image_size=32, action_dim=7, predict=predict, motion_weight=0.0,
                                free_bits=0.0, decode_steps=0), **more})


def observation(cameras=("front",), proprio=False):
    obs = {"images": {c: torch.randint(0, 255, (B, 3, 32, 32), dtype=torch.uint8) for c in cameras},
           "instruction": torch.randn(B, 16)}
    return {**obs, "proprio": torch.randn(B, 7)} if proprio else obs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the claim that the method stands on ----

@pytest.mark.parametrize("policy, latent_norm, predict", list(itertools.product(
    m.POLICIES, (True, False), ("posterior", "prior", "both"))))
def test_world_model_loss_reaches_every_policy_parameter(policy, latent_norm, predict):
    policy = m.make_policy(config(latent_norm=latent_norm) | {"policy": policy})
    images = torch.randint(0, 255, (B, N + 1, 3, 32, 32), dtype=torch.uint8)
    loss, _ = world(predict).loss(images, policy.latent_actions(observation()),
                                  torch.zeros(B, N, dtype=torch.bool))
    loss.backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f"no gradient reaches {name}"


@pytest.mark.parametrize("predict", ("posterior", "prior", "both"))
def test_every_latent_action_acts_the_first_included(predict):
    images = torch.randint(0, 255, (B, N + 1, 3, 32, 32), dtype=torch.uint8)
    actions = torch.randn(B, N, 7, requires_grad=True)
    loss, _ = world(predict).loss(images, actions, torch.zeros(B, N, dtype=torch.bool))
    loss.backward()
    assert (actions.grad.abs().sum((0, 2)) > 0).all(), actions.grad.abs().sum((0, 2))


# ---- world model ----

def test_kl_and_unimix_agree_with_torch_distributions():
    p, q = m.unimix(torch.randn(4, 3, 8) * 3), m.unimix(torch.randn(4, 3, 8) * 3)
    reference = kl_divergence(Independent(Categorical(logits=p), 1), Independent(Categorical(logits=q), 1))
    torch.testing.assert_close(m.kl_categorical(p, q), reference)
    torch.testing.assert_close(m.kl_categorical(p, p), torch.zeros(4))
    certain = m.unimix(torch.tensor([[[1e4, 0.0]]]))
    assert m.kl_categorical(certain, certain.flip(-1)).isfinite().all(), (
        "a saturated categorical must not give infinite KL")


def test_straight_through_sample_is_one_hot_and_has_the_gradient_of_the_probabilities():
    logits = torch.randn(2000, 1, 4)
    logits[:] = logits[0]
    log_probs = m.unimix(logits).requires_grad_()
    sample, weight = m.sample_straight_through(log_probs), torch.randn(4)
    torch.testing.assert_close(sample.detach().sum(-1), torch.ones(2000, 1))
    assert (sample.detach().mean((0, 1)) - log_probs[0, 0].exp()).abs().max() < 0.04, (
        "frequencies must be the probabilities")
    (sample * weight).sum().backward()
    torch.testing.assert_close(log_probs.grad, weight * log_probs.exp().detach())


def test_block_gru_with_one_block_is_a_plain_gru():
    size = {**m.WORLD_MODEL_SIZES["tiny"], "blocks": 1}
    rssm = m.RSSM(size, 8, 7)
    state, action = {"deter": torch.randn(B, 256).tanh(), "stoch": torch.randn(B, 32, 16)}, torch.rand(B, 7)
    h = state["deter"]
    x = torch.cat([h, rssm.in_deter(h), rssm.in_stoch(state["stoch"].flatten(1)), rssm.in_action(action)], -1)
    x = torch.nn.functional.silu(rssm.hidden_norm(x @ rssm.hidden.weight[0] + rssm.hidden.bias[0]))
    r, c, u = (x @ rssm.gates.weight[0] + rssm.gates.bias[0]).chunk(3, -1)
    u = torch.sigmoid(u - 1)
    torch.testing.assert_close(rssm.sequence(state, action),
                               u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h)


def test_states_do_not_see_the_future():
    model, actions = world(), torch.randn(B, N, 7)
    images = torch.randint(0, 255, (B, N + 1, 3, 32, 32), dtype=torch.uint8)
    changed, later = images.clone(), actions.clone()
    changed[:, 4:], later[:, 3:] = 0, 0
    runs = []
    for i, a in ((images, actions), (changed, later)):
        torch.manual_seed(1)
        runs.append(model.observe(i, a)[1]["logits"])
    assert torch.equal(runs[0][:, :3], runs[1][:, :3]), (
        "frames from o_4 and actions from a_3 on must not reach states 1 to 3")
    assert not torch.equal(runs[0][:, 3], runs[1][:, 3])


def test_padded_steps_cost_nothing_and_count_nowhere():
    model, actions = world("both"), torch.randn(B, N, 7)
    images = torch.randint(0, 255, (B, N + 1, 3, 32, 32), dtype=torch.uint8)
    is_pad = torch.zeros(B, N, dtype=torch.bool)
    is_pad[:, 3:] = True
    garbage = images.clone()
    garbage[:, 4:] = 255 - garbage[:, 4:]
    losses = []
    for frames in (images, garbage):
        torch.manual_seed(1)
        losses.append(model.loss(frames, actions, is_pad)[0].item())
    assert losses[0] == losses[1], "o_k+1 of a padded step must not be scored"
    x, pad = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[False, False, True]])
    assert m.masked_mean(x, pad) == 1.5, "the denominator counts valid steps only"


def test_free_bits_stop_the_gradient_below_them():
    images = torch.randint(0, 255, (B, N + 1, 3, 32, 32), dtype=torch.uint8)
    model = world(free_bits=1e6)
    model.loss(images, torch.randn(B, N, 7), torch.zeros(B, N, dtype=torch.bool))[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.rssm.prior_net.parameters())


def test_drawing_few_frames_has_the_expectation_of_drawing_all():
    model, actions = world("prior"), torch.randn(B, N, 7)
    images = torch.randint(0, 255, (B, N + 1, 3, 32, 32), dtype=torch.uint8)
    few = torch.stack([model.losses(images, actions, decode_steps=2)["open_loop"].mean() for _ in range(300)])
    all_ = torch.stack([model.losses(images, actions)["open_loop"].mean() for _ in range(20)])
    assert abs(few.mean() - all_.mean()) < 4 * (few.std() / 300 ** 0.5 + all_.std() / 20 ** 0.5)


def test_asking_for_more_frames_than_the_chunk_has_draws_them_all():
    images = torch.randint(0, 255, (B, 3, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    model, actions, losses = world(), torch.randn(B, 2, 7), []
    for steps in (0, 4):
        torch.manual_seed(1)
        losses.append(model.losses(images, actions, decode_steps=steps)["recon"])
    assert torch.equal(*losses)


def test_world_model_takes_only_sizes_it_can_halve():
    with pytest.raises(m.InputError, match="16, 32, 64 or 128"):
        world(image_size=100)


# ---- policies ----

def test_policy_loss_ignores_padded_steps():
    policy = m.make_policy(config("action"))
    batch = {"obs": observation(), "actions": torch.rand(B, N, 7),
             "is_pad": torch.zeros(B, N, dtype=torch.bool)}
    batch["is_pad"][:, 2:] = True
    first = policy.loss(batch)[0]
    batch["actions"][:, 2:] = 99.0
    assert policy.loss(batch)[0] == first


def test_loss_is_the_negative_log_likelihood_of_eq_6():
    policy = m.make_policy(config("action")).eval()
    batch = {"obs": observation(), "actions": torch.rand(B, N, 7),
             "is_pad": torch.zeros(B, N, dtype=torch.bool)}
    mean = policy.action_norm.normalize(policy.act(batch["obs"]))
    reference = -torch.distributions.Normal(mean, policy.STD).log_prob(batch["actions"]).mean()
    torch.testing.assert_close(policy.loss(batch)[0].detach(), reference)


def test_forward_does_not_change_the_batch():
    policy = m.make_policy(config("action", ("front", "side"), 7)).eval()
    batch = {"obs": observation(("front", "side"), True), "actions": torch.rand(B, N, 7),
             "is_pad": torch.zeros(B, N, dtype=torch.bool)}
    before = {"front": batch["obs"]["images"]["front"].clone(), "proprio": batch["obs"]["proprio"].clone(),
              "actions": batch["actions"].clone()}
    policy.loss(batch), policy.act(batch["obs"])
    assert (torch.equal(batch["obs"]["images"]["front"], before["front"])
            and torch.equal(batch["obs"]["proprio"], before["proprio"]))
    assert (torch.equal(batch["actions"], before["actions"])
            and set(batch["obs"]["images"]) == {"front", "side"})


def test_policy_reads_instruction_every_camera_and_proprio():
    policy = m.make_policy(config("action", ("front", "side"), 7)).eval()
    obs = observation(("front", "side"), True)
    first = policy.act(obs)
    for change in ("front", "side", "instruction", "proprio"):
        other = {**obs, "images": dict(obs["images"])}
        part = other["images"] if change in other["images"] else other
        part[change] = part[change].flip(0)
        assert not torch.allclose(policy.act(other), first), f"{change} is not used"


def test_policy_overfits_eight_demonstrations():
    policy = m.make_policy(config("action", ("front",), 7, dropout=0.0))
    obs = {"images": {"front": torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)},
           "instruction": torch.randn(8, 16), "proprio": torch.randn(8, 7)}
    batch = {"obs": obs, "actions": torch.rand(8, N, 7) * 2 - 1,
             "is_pad": torch.zeros(8, N, dtype=torch.bool)}
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss, logs = policy.loss(batch)
        loss.backward()
        optimizer.step()
    assert logs["l1"] < 0.05, logs


def test_normalizer_comes_back_and_keeps_constant_dimensions():
    norm = m.Normalizer(3)
    norm.fit({"min": [-0.01, 5.0, 2.0], "max": [0.03, 9.0, 2.0]})
    x = torch.tensor([[-0.01, 9.0, 2.0], [0.01, 7.0, 2.0]])
    torch.testing.assert_close(norm.normalize(x), torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x)
    assert norm.unnormalize(torch.full((1, 3), 0.7))[0, 2] == 2.0, (
        "a constant dimension stays constant whatever the policy says")


def test_wrong_observations_are_one_clear_line():
    policy = m.make_policy(config("action", ("front", "side"), 7)).eval()
    for obs, words in ((observation(("front",), True), "cameras"),
                       (observation(("front", "side")), "proprioception"),
                       ({**observation(("front", "side"), True), "instruction": torch.randn(B, 9)},
                        "width 16, got 9")):
        with pytest.raises(m.InputError, match=words):
            policy.act(obs)
    with pytest.raises(m.InputError, match="no latent actions"):
        policy.latent_actions(observation(("front", "side"), True))


def test_random_shift_moves_all_frames_of_a_sample_alike():
    video = torch.arange(32 * 32).view(1, 1, 1, 32, 32).expand(3, 4, 3, -1, -1).contiguous()
    moved = m.random_shift(video, 5)
    assert (moved == moved[:, :1, :1]).all() and not torch.equal(moved, video)
    dy, dx = divmod(int(moved[0, 0, 0, 16, 16]) - int(video[0, 0, 0, 16, 16]) + 16 * 33, 32)
    assert abs(dy - 16) <= 5 and abs(dx - 16) <= 5, "shifted by at most 5 pixels"
    assert m.random_shift(video, 0) is video


def test_colour_jitter_keeps_the_picture_and_changes_its_light():
    torch.manual_seed(0)
    images = torch.randint(60, 196, (64, 3, 8, 8), dtype=torch.uint8)
    changed = m.colour_jitter(images, 0.3)
    assert changed.dtype == torch.uint8 and m.colour_jitter(images, 0) is images
    before, after = (x.float().flatten(1) for x in (images, changed))
    ratio = after.mean(1) / before.mean(1)   # each image its own light
    assert 0.69 < ratio.min() < 0.8 and 1.2 < ratio.max() < 1.31
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(before, after)) > 0.9


# ---- text ----

def test_hash_embedding_is_the_same_everywhere_and_tells_tasks_apart():
    encoder = m.TextEncoder("hash")
    a, b, c = encoder(["Stack the blue cup!", "stack the blue cup", "stack the white cup"])
    assert a.shape == (512,) and a.dtype == np.float32
    assert np.array_equal(a, b) and a @ c < 0.9
    assert np.flatnonzero(encoder(["cup"])[0]).tolist() == [228], (
        "CRC-32 of the word, not Python's salted hash")
    with pytest.raises(m.InputError, match="hash, minilm, clip"):
        m.TextEncoder("bert")


def test_the_empty_instruction_has_an_embedding_too():
    """Videos without captions have the instruction "": zeros would give the instruction layer no gradient."""
    assert np.abs(m.TextEncoder("hash")([""])).sum() == 1


# ---- chunk execution ----

def test_executing_h_of_n_asks_every_h_steps_and_plays_in_order():
    chunks = [np.arange(5.0)[:, None] + 10 * i for i in range(4)]
    asked = []
    chunker = m.ActionChunker(5, execute=3)
    played = [float(chunker.step(lambda: asked.append(t) or chunks[len(asked) - 1])[0]) for t in range(9)]
    assert played == [0, 1, 2, 10, 11, 12, 20, 21, 22] and asked == [0, 3, 6]


@pytest.mark.parametrize("decay", (0.0, 0.3))
def test_temporal_ensembling_online_equals_offline(decay):
    n, steps = 4, 12
    chunks = np.random.default_rng(0).normal(size=(steps, n, 7))       # all-zero actions must count, too
    chunks[3] = 0
    chunker = m.ActionChunker(n, decay=decay)
    online = [chunker.step(lambda: chunks[t]) for t in range(steps)]
    for t in range(steps):
        votes = [chunks[s][t - s] for s in range(max(0, t - n + 1), t + 1)]             # oldest first
        weights = np.exp(-decay * np.arange(len(votes)))
        np.testing.assert_allclose(online[t], np.average(votes, axis=0, weights=weights))
    chunker.reset()
    np.testing.assert_allclose(chunker.step(lambda: chunks[0]), chunks[0][0],
                               err_msg="reset must forget the last episode")


# ---- checkpoints ----

def pretrained():
    policy = m.make_policy(config("latent"))
    torch.nn.init.normal_(policy.latent_out.weight)
    return policy


def test_finetuning_keeps_the_trunk_and_renews_the_last_layer():
    source, target = pretrained(), m.make_policy(config("action", ("front", "side"), 7))
    names = m.init_from_pretrained(target, source.state_dict(), "x.pt")
    assert torch.equal(target.trunk[0].qkv.weight, source.trunk[0].qkv.weight)
    assert {k.split(".")[0] for k in names["new"]} == {
        "action_out", "action_norm", "proprio_norm", "proprio_encoder", "camera_embedding"}
    assert {k.split(".")[0] for k in names["unused"]} == {"latent_out", "latent_norm"}
    again = m.make_policy(config("action", ("front", "side"), 7))
    names = m.init_from_pretrained(again, target.state_dict(), "y.pt")
    assert "action_out.weight" in names["new"], "same shape or not: the last layer is re-initialised"


def test_head_add_keeps_the_latent_actions():
    source, target = pretrained().eval(), m.make_policy(config("add")).eval()
    m.init_from_pretrained(target, source.state_dict(), "x.pt")
    obs = observation()
    torch.testing.assert_close(target.latent_actions(obs), source.latent_actions(obs))
    assert target.act(obs).shape == (B, N, 7)


def test_another_architecture_is_an_error_that_names_the_tensors():
    for other in (config("action", width=64), config("action", layers=3), config("action", layers=1)):
        with pytest.raises(m.InputError, match=r"another architecture.*(in the file|here)"):
            m.init_from_pretrained(m.make_policy(other), pretrained().state_dict(), "x.pt")


def test_checkpoint_round_trip_and_interrupted_write(tmp_path, monkeypatch):
    policy = m.make_policy(config("action")).eval()
    checkpoint = dict(stage="finetune", step=3, config=policy.config, policy=policy.state_dict(),
                      args={"lr": 0.1})
    m.save_checkpoint(tmp_path / "last.pt", checkpoint)
    loaded, _ = m.load_policy(tmp_path / "last.pt")
    obs = observation()
    assert torch.equal(loaded.act(obs), policy.act(obs))
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(m.os, "fsync",
                        lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        m.save_checkpoint(tmp_path / "last.pt", {**checkpoint, "step": 4})
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_foreign_files_are_refused_and_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    torch.save({"stage": "pretrain", "x": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, words in (("evil.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                        ("absent.pt", "no checkpoint at")):
        with pytest.raises(m.InputError, match=words):
            m.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setattr(m.shutil, "which", lambda name: None)
    assert m.provenance()["commit"] == "unknown"


def test_a_device_that_is_not_there_is_one_clear_line():
    for name in ("cuda:77", "abacus"):
        with pytest.raises(m.InputError, match="no device"):
            m.pick_device(name)


def test_only_models_py_saves_and_loads_checkpoints():
    for script in m.Path(m.__file__).parent.glob("*.py"):
        if script.name != "models.py":
            for call in m.re.findall(r"torch\.(?:save|load)\(.*", script.read_text()):
                assert "pruned_init" in call and "weights_only=True" in call, script   # LIBERO's states


# ---- sizes ----

def test_sizes_are_the_papers():
    paper = (config("action", ("front", "side"), 5, image_size=128, text_dim=512, chunk=10)
             | m.BAKU.SIZES["paper"])
    assert 6.5e6 < m.count(m.make_policy(paper)) < 8e6, "BAKU has about 7M parameters"


def test_linear_probe_finds_a_linear_map_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4000, 10)), rng.normal(size=(10, 3))
    y = np.column_stack([x @ w[:, :2], np.ones(4000), rng.normal(size=4000)])
    r2 = m.probe_r2(x[:3000], y[:3000], x[3000:], y[3000:], ridge=1e-6)
    assert r2[0] > 0.999 and r2[1] > 0.999 and np.isnan(r2[2]) and abs(r2[3]) < 0.05
