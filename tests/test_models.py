"""Claims of models.py: gradients, masks, categoricals, targets, chunks, probe, checkpoints, run folders."""
import argparse
import copy
import itertools
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import models as m
from conftest import small_size

B, N, A, Z = 5, 6, 7, 3
TEXTS = ["stack the cups", "move the can", "", "stack the blue cup", "move the box"]
NO_PAD = torch.zeros(B, N, dtype=torch.bool)
BOTH = ("front", "side")
every_policy = pytest.mark.parametrize("policy", m.POLICIES)


def config(head="latent", cameras=("front",), proprio_dim=None, latent_norm=True, policy="baku", **more):
    return {**dict(policy=policy, cameras=list(cameras), image_size=32, chunk=N, text_encoder="hash",
                   proprio_dim=proprio_dim, action_dim=A, latent_dim=Z, latent_norm=latent_norm, head=head,
                   proprio_dropout=0.0), **small_size(policy), **more}


def new(*args, **more):
    return m.make_policy(config(*args, **more))


def world(predict="posterior", **more):
    return m.WorldModel({**dict(size="tiny", image_size=32, action_dim=Z, predict=predict, target="pixels",
                                motion_weight=0.0, free_bits=0.0, dyn_scale=0.5, rep_scale=0.1, views=1,
                                decode_steps=0, context_frame=True, gate=False), **more})


def video(views=1, size=32):
    return torch.randint(0, 255, (B, N + 1, 3 * views, size, size), dtype=torch.uint8)


def observation(cameras=("front",), proprio=False, count=B):
    """Coarse patterns, which differ in the last feature map as well."""
    coarse = {c: torch.randint(0, 255, (count, 3, 4, 4), dtype=torch.uint8) for c in cameras}
    obs = {"images": {c: x.repeat_interleave(8, 2).repeat_interleave(8, 3) for c, x in coarse.items()},
           "instruction": [TEXTS[i % B] for i in range(count)]}
    return {**obs, "proprio": torch.randn(count, 7)} if proprio else obs


def demonstrations(count=B, cameras=("front",), proprio=False):
    return {"obs": observation(cameras, proprio, count), "actions": torch.rand(count, N, A) * 2 - 1,
            "is_pad": torch.zeros(count, N, dtype=torch.bool)}


def left_or_right(policy, count):
    """Demonstrations of one observation: half of them go left, half go right."""
    batch = demonstrations(count)
    batch["obs"] = {"images": {"front": batch["obs"]["images"]["front"][:1].expand(count, -1, -1, -1)},
                    "instruction": ["go"] * count}
    side = torch.where(torch.arange(count) % 2 == 0, -0.6, 0.6)
    batch["actions"] = side[:, None, None].expand(count, N, A).clone()
    return new("action", policy=policy), batch


def fit(policy, batch, steps, lr):
    optimizer = torch.optim.Adam(policy.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, logs = policy.loss(batch)
        loss.backward()
        optimizer.step(), schedule.step()
    return logs


def without_gradient(module):
    return [name for name, p in module.named_parameters()
            if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]


def same_noise(function, *inputs):
    """function(input) for every input, with the same random numbers each time."""
    return [(torch.manual_seed(1), function(x))[1] for x in inputs]


def raising(error):
    def function(*_):
        raise error
    return function


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the claim that the method depends on ----

@pytest.mark.parametrize("policy, latent_norm, predict", [
    *itertools.product(m.POLICIES, (True, False), ("both",)), ("baku", True, "posterior"),
    ("act", True, "prior")])
def test_world_model_loss_reaches_every_policy_parameter(policy, latent_norm, predict):
    policy = new(latent_norm=latent_norm, policy=policy)
    world(predict).loss(video(), policy.latent_actions(observation()), NO_PAD)[0].backward()
    assert not without_gradient(policy)


# ---- text, normaliser, observations ----

def test_hash_embedding_is_the_same_everywhere_and_distinguishes_tasks():
    encoder = m.TextEncoder("hash")
    a, b, c, empty = encoder(["Stack the blue cup!", "stack the blue cup", "stack the white cup", ""])
    assert a.shape == (512,) and a.dtype == np.float32
    assert np.array_equal(a, b) and a @ c < 0.9
    assert np.flatnonzero(encoder(["cup"])[0]).tolist() == [228], "CRC-32, not Python's salted hash"
    assert np.abs(empty).sum() == 1, "zeros would give the instruction layer no gradient"
    assert m.text_encoder("hash") is m.text_encoder("hash")
    assert not any("text" in name for name in new().state_dict()), "not part of the weights"


def test_normalizer_is_inverted_and_keeps_constant_dimensions():
    norm = m.Normalizer(3)
    norm.fit({"min": [-0.01, 5.0, 2.0], "max": [0.03, 9.0, 2.0], "std": [0.01, 1.0, 0.0]})
    x = torch.tensor([[-0.01, 9.0, 2.0], [0.01, 7.0, 2.0]])
    torch.testing.assert_close(norm.normalize(x), torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x)
    assert norm.unnormalize(torch.full((1, 3), 0.7))[0, 2] == 2.0, "whatever the policy predicts"


def test_shrink_squashes_or_crops_without_aliasing():
    stripes, frame = np.zeros((2, 60, 80, 3), np.uint8)
    stripes[:, ::2], frame[:, :10] = 255, 255                   # frame: white outside the centre square
    assert abs(m.shrink(stripes, 16, "squash").astype(int) - 127).max() < 20, "every pixel counts"
    assert m.shrink(frame, 30, "squash").any() and not m.shrink(frame, 30, "crop").any()
    assert np.array_equal(m.shrink(frame, 60, "crop"), frame[:, 10:70])


def test_batched_observations_are_what_the_policy_was_trained_on():
    policy = new("action", BOTH, 7).eval()
    frames = np.random.default_rng(0).integers(0, 255, (2, 2, 32, 32, 3), np.uint8)
    observations = [{"images": {"side": side, "front": front, "wrist": front}, "proprio": np.arange(7.0) + i}
                    for i, (front, side) in enumerate(frames)]
    obs = m.batch_observations(observations, TEXTS[:2], policy)
    assert set(obs) == {"images", "instruction", "proprio"} and list(obs["images"]) == ["front", "side"]
    assert np.array_equal(obs["images"]["side"][1].permute(1, 2, 0).numpy(), frames[1, 1])
    assert obs["proprio"].dtype == torch.float32 and policy.act(obs).shape == (2, N, A)
    observations[0]["noise"] = observations[1]["noise"] = np.ones((N, A), np.float32)
    assert m.batch_observations(observations, TEXTS[:2], policy)["noise"].shape == (2, N, A)


def test_augmentation_moves_all_frames_alike_and_changes_the_light_not_the_content():
    clip = torch.arange(32 * 32).view(1, 1, 1, 32, 32).expand(3, 4, 3, -1, -1).contiguous()
    moved = m.random_shift(clip, 5)
    assert (moved == moved[:, :1, :1]).all() and not torch.equal(moved, clip)
    dy, dx = divmod(int(moved[0, 0, 0, 16, 16]) - int(clip[0, 0, 0, 16, 16]) + 16 * 33, 32)
    assert abs(dy - 16) <= 5 and abs(dx - 16) <= 5, "shifted by at most 5 pixels"
    images = torch.randint(60, 196, (64, 3, 8, 8), dtype=torch.uint8)
    assert m.random_shift(clip, 0) is clip and m.colour_jitter(images, 0) is images
    changed = m.colour_jitter(images, 0.3)
    before, after = (x.float().flatten(1) for x in (images, changed))
    ratio = after.mean(1) / before.mean(1)
    assert changed.dtype == torch.uint8 and 0.69 < ratio.min() < 0.8 and 1.2 < ratio.max() < 1.31
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(before, after)) > 0.9


# ---- policies ----

@pytest.mark.parametrize("policy, head", [
    *((policy, "action") for policy in m.POLICIES), ("baku", "add"), ("act", "add")])
def test_the_action_loss_reaches_every_policy_parameter(policy, head):
    policy = new(head, BOTH, 7, policy=policy)
    policy.loss(demonstrations(cameras=BOTH, proprio=True))[0].backward()
    assert not without_gradient(policy)


@every_policy
def test_policy_loss_ignores_padded_steps(policy):
    """ACT's style encoder must not attend to them either."""
    policy, batch = new("action", policy=policy), demonstrations()
    if isinstance(policy, m.DiffusionPolicy):           # its U-Net sees the padded actions, its loss does not
        policy.velocity = lambda x, tau, condition: torch.zeros_like(x)
    batch["is_pad"][:, 2:] = True
    garbage = {**batch, "actions": batch["actions"].clone()}
    garbage["actions"][:, 2:] = 99.0
    assert len({loss.item() for loss, _ in same_noise(policy.loss, batch, garbage)}) == 1


def test_loss_is_the_negative_log_likelihood_of_eq_6():
    policy, batch = new("action").eval(), demonstrations()
    policy.action_norm.fit({"min": [-1.0] * A, "max": [1.0] * A, "std": [0.1 * i for i in range(1, A + 1)]})
    mean = policy.action_norm.normalize(policy.act(batch["obs"]))
    reference = -Normal(mean, policy.STD * policy.action_norm.std).log_prob(batch["actions"]).mean()
    torch.testing.assert_close(policy.loss(batch)[0].detach(), reference)


def test_act_counts_errors_in_standard_deviations_of_each_number():
    policy, batch = new("action", policy="act").eval(), demonstrations()
    policy.action_norm.fit({"min": [-1.0] * A, "max": [1.0] * A, "std": [0.5] * A})
    loss, logs = policy.loss(batch)
    torch.testing.assert_close(loss.detach() - policy.kl_weight * logs["style_kl"], logs["l1"] / 0.5)


@every_policy
def test_policy_reads_instruction_every_camera_and_proprio_and_changes_none_of_them(policy):
    policy, batch = new("action", BOTH, 7, policy=policy).eval(), demonstrations(cameras=BOTH, proprio=True)
    obs, before = batch["obs"], copy.deepcopy(batch)
    first = policy.act(obs)
    for change in (*BOTH, "instruction", "proprio"):
        other = {**obs, "images": dict(obs["images"])}
        part = other["images"] if change in other["images"] else other
        part[change] = part[change][::-1] if change == "instruction" else part[change].flip(0)
        assert not torch.allclose(policy.act(other), first), f"{change} is not used"
    policy.loss(batch)
    assert batch["obs"].pop("instruction") == before["obs"].pop("instruction")
    torch.testing.assert_close(batch, before, rtol=0, atol=0)


def test_policy_overfits_five_demonstrations():
    policy, batch = new("action", proprio_dim=7), demonstrations(proprio=True)
    fit(policy, batch, 120, 3e-3)
    error = (policy.eval().act(batch["obs"]) - batch["actions"]).abs().mean()
    assert error < 0.1, f"mean error {error:.3f} of actions in [-1, 1]"


@every_policy
def test_latent_actions_are_bounded_repeatable_and_differ_between_observations(policy):
    policy, obs = new(policy=policy), observation()
    for _ in range(5):
        policy.latent_actions(observation())                    # statistics of latent_norm
    z, again = policy.eval().latent_actions(obs), policy.latent_actions(obs)
    assert z.shape == (B, N, Z) and z.abs().max() < 1 and torch.equal(z, again)
    assert z.std(0).mean() > 0.005


# ---- Diffusion Policy ----

def test_ddim_with_the_true_noise_returns_to_the_action_on_the_squared_cosine_schedule():
    policy, a = new("action", policy="diffusion").eval(), torch.rand(B, N, A) * 2 - 1
    t = np.arange(1, 100)                                       # alpha_bar(tau) after step tau + 1
    cosine = np.cos((t / 100 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(policy.alpha_bar[:99], cosine, rtol=1e-4)

    def true(x, tau, _):        # the velocity of the noise that is in x, if a is the clean chunk
        ab = policy.alpha_bar[tau][:, None, None]
        noise = (x - ab.sqrt() * a) / (1 - ab).sqrt()
        v = ab.sqrt() * noise - (1 - ab).sqrt() * a
        torch.testing.assert_close(policy.split(x, tau, v), (a, noise), rtol=1e-3, atol=1e-3)
        return v

    policy.velocity = true
    for policy.SAMPLER_STEPS in (1, 10, 100):
        torch.testing.assert_close(policy.to_actions(None, torch.randn(B, N, A)), a, rtol=1e-3, atol=1e-3)


def test_diffusion_recovers_a_bimodal_distribution():
    """A regression would go through the middle; samples go left or right, about equally often."""
    policy, batch = left_or_right("diffusion", 8)
    policy.action_norm.fit({"min": [-1.0] * A, "max": [1.0] * A, "std": [0.6] * A})
    policy.encode = lambda obs: torch.zeros(len(obs["instruction"]), 64)        # one observation, and quick
    fit(policy, batch, 250, 3e-3)
    noise = torch.randn(64, N, A)
    sampled = policy.eval().act({"instruction": ["go"] * 64, "noise": noise}).mean((1, 2))
    assert ((sampled.abs() - 0.6).abs() < 0.25).float().mean() > 0.85, sampled
    assert 0.25 < (sampled > 0).float().mean() < 0.75, sampled


def test_diffusion_uses_the_noise_it_is_given_and_no_other():
    policy, obs, noise = new("action", policy="diffusion").eval(), observation(), torch.randn(B, N, A)
    first = policy.act({**obs, "noise": noise})
    assert torch.equal(policy.act({**obs, "noise": noise}), first)
    assert not torch.allclose(policy.act({**obs, "noise": -noise}), first)
    assert torch.equal(policy.act(obs), policy.act(obs)), "repeatable without noise as well"
    row = policy.act({"images": {"front": obs["images"]["front"][2:3]}, "instruction": TEXTS[2:3],
                      "noise": noise[2:3]})
    torch.testing.assert_close(row, first[2:3], rtol=1e-4, atol=1e-4)


# ---- ACT ----

@pytest.mark.parametrize("weight, used", ((None, True), (10.0, False)))
def test_the_style_carries_what_the_observation_does_not(weight, used):
    """With the weight of the evidence bound the style says left or right; the original's 10 empties it."""
    policy, batch = left_or_right("act", 16)
    policy.kl_weight = weight or policy.kl_weight
    logs = fit(policy, batch, 150, 3e-3)
    assert (logs["l1"] < 0.2) == used and (logs["style_kl"] > 0.3) == used, logs


def test_an_act_whose_gripper_is_far_beyond_the_limit_still_learns_to_open_it():
    """L1 on a gripper that is mostly closed pushes the output far out; a tanh would have no gradient there
    (seen: 0 of 120 rollouts, the gripper never opened)."""
    policy, batch = left_or_right("act", 16)
    batch["actions"][:] = 1.0

    def gradient(bias):
        torch.nn.init.constant_(policy.action_out.bias, bias)
        policy.zero_grad()
        policy.loss(batch)[0].backward()
        return policy.action_out.bias.grad.clone()

    torch.testing.assert_close(gradient(-2.0), gradient(-8.0), rtol=0.05, atol=0)
    assert policy.eval().act(batch["obs"]).min() >= -1, "executed actions stay within the limits"


# ---- world model ----

@pytest.mark.parametrize("target, views, predict, size", [
    *((target, 2, "both", 32) for target in m.TARGETS), ("pixels", 1, "posterior", 16),
    ("pixels", 1, "prior", 64), ("features", 1, "both", 128)])
def test_every_latent_action_has_an_effect_the_first_one_included(target, views, predict, size):
    model, images = world(predict, target=target, views=views, image_size=size, gate=True), video(views, size)
    actions = torch.randn(B, N, Z, requires_grad=True)
    model.loss(images, actions, NO_PAD)[0].backward()
    assert (actions.grad.abs().sum((0, 2)) > 0).all(), actions.grad.abs().sum((0, 2))
    assert not without_gradient(model)
    still, future = m.targets(images, target)
    imagined = model.decode(model.imagine(model.context(model.embed(images)[:, 0]), actions), still)
    assert imagined.shape == future.shape
    picture = model.picture(imagined, torch.rand(B, 3, size, size))
    assert picture.shape == (B, N, 3, size, size) and 0 <= picture.min() and picture.max() <= 1


def test_kl_and_unimix_agree_with_torch_distributions():
    p, q = m.unimix(torch.randn(2, 4, 3, 8) * 3)
    reference = kl_divergence(Independent(Categorical(logits=p), 1), Independent(Categorical(logits=q), 1))
    torch.testing.assert_close(m.kl_categorical(p, q), reference)
    torch.testing.assert_close(m.kl_categorical(p, p), torch.zeros(4))
    certain = m.unimix(torch.tensor([[[1e4, 0.0]]]))
    assert m.kl_categorical(certain, certain.flip(-1)).isfinite().all()


def test_straight_through_sample_is_one_hot_and_has_the_gradient_of_the_probabilities():
    log_probs = m.unimix(torch.randn(1, 1, 4).expand(2000, -1, -1)).requires_grad_()
    sample, weight = m.sample_straight_through(log_probs), torch.randn(4)
    torch.testing.assert_close(sample.detach().sum(-1), torch.ones(2000, 1))
    assert (sample.detach().mean((0, 1)) - log_probs[0, 0].exp()).abs().max() < 0.04, "frequencies"
    (sample * weight).sum().backward()
    torch.testing.assert_close(log_probs.grad, weight * log_probs.exp().detach())


def plain_loss(model, images, actions, is_pad):
    """(Eq. 1) to (Eq. 5) as a textbook writes them: one frame, one step and one block at a time, each layer
    on its concatenated inputs, and a separate roll for the open loop."""
    F, rssm, frames = torch.nn.functional, model.rssm, images.float() / 255
    embed = [model.encoder[:-1](frames[:, k] - 0.5) for k in range(N + 1)]
    *action_layers, action_out = rssm.in_action
    action_weight = action_out.weight.unflatten(0, (rssm.blocks, -1))       # (blocks, D / blocks, hidden)

    def next_deter(h, s, a):
        shared = [rssm.in_deter(h), rssm.in_stoch(s.flatten(1)), torch.nn.Sequential(*action_layers)(a)]
        parts = [torch.cat([own, *shared], -1) @ torch.cat([w, w_a.T]) + bias for own, w, w_a, bias in
                 zip(h.chunk(rssm.blocks, -1), rssm.hidden.weight, action_weight, rssm.hidden.bias)]
        x = F.silu(rssm.hidden_norm(torch.cat(parts, -1))).chunk(rssm.blocks, -1)
        gates = [part @ w + bias for part, w, bias in zip(x, rssm.gates.weight, rssm.gates.bias)]
        r, c, u = (torch.cat(gate, -1) for gate in zip(*(g.chunk(3, -1) for g in gates)))
        u = torch.sigmoid(u - 1)
        return u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h

    def posterior(h, o):
        weight = torch.cat([rssm.posterior_deter.weight, model.encoder[-1].weight], 1)
        x = F.linear(torch.cat([h, o], -1), weight, rssm.posterior_deter.bias)
        return m.unimix(rssm.posterior_net(x).unflatten(-1, (rssm.stoch, -1)))

    def decode(h, s):
        return model.decode({"deter": h[:, None], "stoch": s[:, None]}, frames[:, :1])[:, 0]

    def kl(p, q):
        return kl_divergence(Independent(Categorical(logits=p), 1), Independent(Categorical(logits=q), 1))

    h = torch.zeros(B, model.decoder_in.in_features - rssm.stoch * rssm.classes)
    s = m.sample_straight_through(posterior(h, embed[0]))
    h_open, s_open, total = h, s, 0
    context = ((decode(h, s) - frames[:, 0]) ** 2).sum((1, 2, 3))
    for k in range(N):
        h, h_open = next_deter(h, s, actions[:, k]), next_deter(h_open, s_open, actions[:, k])
        post, prior = posterior(h, embed[k + 1]), rssm.prior(h)
        s, s_open = m.sample_straight_through(post), m.sample_straight_through(rssm.prior(h_open))
        weight = 1 + model.config["motion_weight"] * (frames[:, k + 1] - frames[:, 0]).abs().mean(1, True)
        errors = [(weight * (decode(*state) - frames[:, k + 1]) ** 2).sum((1, 2, 3))
                  for state in ((h, s), (h_open, s_open))]
        step = context + sum(errors) + (model.config["dyn_scale"] * kl(post.detach(), prior)
                                        + model.config["rep_scale"] * kl(post, prior.detach()))
        total = total + (step * ~is_pad[:, k]).sum()
    return total / (~is_pad).sum()


def test_the_loss_and_its_gradients_equal_those_of_the_plain_formulation(monkeypatch):
    """One loop for both rolls, layers outside the loop and one decoder call change the speed alone; bfloat16
    changes the gradient by its rounding."""
    monkeypatch.setattr(m, "sample_straight_through", lambda log_probs: log_probs.exp())      # no noise
    model, images, is_pad = world("both", motion_weight=10.0, gate=True), video(), NO_PAD.clone()
    is_pad[1, 3:] = True
    actions = torch.randn(B, N, Z).tanh().requires_grad_()

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [actions, *model.parameters()])])

    plain = plain_loss(model, images, actions, is_pad)
    loss = model.loss(images, actions, is_pad)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(images, actions, is_pad)[0]
    expected, exact, coarse = gradient(plain), gradient(loss), gradient(rounded)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    assert (exact - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(rounded, plain, rtol=2e-3, atol=0)
    assert torch.cosine_similarity(coarse, expected, 0) > 0.99


@pytest.mark.parametrize("head", ("latent", "action"))
def test_saturated_outputs_keep_their_gradient_in_bfloat16(head):
    policy, batch = new(head, latent_norm=False), demonstrations()
    layer = policy.latent_out if head == "latent" else policy.action_out
    torch.nn.init.constant_(layer.bias, 4.0)                                          # tanh(4) = 0.9993
    with torch.autocast("cpu", torch.bfloat16):
        loss = policy.latent_actions(batch["obs"]).sum() if head == "latent" else policy.loss(batch)[0]
    loss.backward()
    assert layer.bias.grad.all()


def test_the_kl_of_a_style_near_its_prior_is_not_lost_in_bfloat16():
    policy, batch = new("action", policy="act"), demonstrations()
    policy.style_out.weight.data *= 0.01
    policy.style_out.bias.data.zero_()
    exact = policy.loss(batch)[1]["style_kl"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.loss(batch)[1]["style_kl"]
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0)


def test_states_do_not_see_the_future_and_padded_steps_do_not_count():
    model, actions, images, is_pad = world("both"), torch.randn(B, N, Z), video(), NO_PAD.clone()
    changed, later = images.clone(), actions.clone()
    changed[:, 4:], later[:, 3:] = 255 - images[:, 4:], 0
    before, after = same_noise(lambda x: model.observe(*x)[1]["log_probs"], (images, actions),
                               (changed, later))
    assert torch.equal(before[:, :3], after[:, :3]), "o_4 and a_3 must not reach states 1 to 3"
    assert not torch.equal(before[:, 3], after[:, 3])
    with pytest.raises(AssertionError, match="7 frames need 6 actions, got 5"):
        model.observe(images, actions[:, 1:])
    is_pad[:, 3:] = True                                        # o_k+1 of a padded step
    losses = same_noise(lambda x: model.loss(x, actions, is_pad)[0].item(), images, changed)
    assert losses[0] == losses[1]
    x, pad = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[False, False, True]])
    assert m.masked_mean(x, pad) == 1.5, "the denominator counts valid steps only"


def test_the_kl_is_balanced_by_the_config_and_has_no_gradient_below_the_free_bits():
    terms = {"kl_dyn": torch.full((1, 1), 3.0), "kl_rep": torch.full((1, 1), 3.0), "recon": torch.ones(1, 1)}
    assert world(dyn_scale=0.5, rep_scale=0.1, free_bits=1.0).total(terms).item() == pytest.approx(2.8)
    model = world(free_bits=1e6)
    model.loss(video(), torch.randn(B, N, Z), NO_PAD)[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.rssm.prior_net.parameters())


def test_decoding_few_frames_has_the_expectation_of_decoding_all():
    model, actions, images = world("prior", image_size=16), torch.randn(B, N, Z), video(size=16)
    few, every = (torch.stack([model.losses(images, actions, "prior", k)["open_loop"].mean()
                               for _ in range(25)]).detach() for k in (2, 99))
    assert abs(few.mean() - every.mean()) < 4 * (few.std() + every.std()) / 25 ** 0.5
    assert every.std() < few.std() / 2, "more than the chunk has is all of them"


def test_motion_in_one_view_does_not_weigh_the_pixels_of_another(monkeypatch):
    """View 0 moves and is drawn exactly; view 1 stands still and is drawn black."""
    model, images = world("prior", views=2, motion_weight=10.0), video(views=2)
    images[:, 2:] = images[:, 1:2]
    images[:, 1:, 3:] = images[:, :1, 3:]
    drawn = images[:, 1:2].float() / 255
    drawn[:, :, 3:] = 0
    monkeypatch.setattr(model, "decode", lambda rows, _: drawn.expand(-1, rows["deter"].shape[1], -1, -1, -1))
    terms = model.losses(images, torch.randn(B, N, Z), "prior", 0)
    torch.testing.assert_close(terms["open_loop"], terms["open_loop_plain"])
    assert (terms["open_loop"] > 100).all()


def test_the_gate_of_each_view_chooses_between_what_is_drawn_and_the_still_video():
    model, still = world(views=2, gate=True), torch.rand(B, 1, 6, 32, 32)
    state = {"deter": torch.randn(B, 3, 256), "stoch": torch.randn(B, 3, 32, 16)}
    model.decoder[-1].weight.data.zero_()
    for shut in (0, 1):
        bias = torch.zeros(2, 4)                                # per view: red, green, blue, gate
        bias[:, 3] = 1e4
        bias[shut, 3] = -1e4
        model.decoder[-1].bias.data.copy_(bias.flatten())
        decoded = model.decode(state, still).unflatten(2, (2, 3))                     # (B, 3, V, 3, H, W)
        copied = still.unflatten(2, (2, 3))[:, :, shut].expand(B, 3, 3, 32, 32)
        torch.testing.assert_close(decoded[:, :, shut], copied)
        torch.testing.assert_close(decoded[:, :, 1 - shut], torch.full_like(copied, 0.5))


@pytest.mark.parametrize("seen", (True, False))
def test_without_the_context_frame_o_t_does_not_matter(seen):
    model, images, actions = world("both", context_frame=seen, gate=True), video(), torch.randn(B, N, Z)
    other = torch.cat([255 - images[:, :1], images[:, 1:]], 1)
    losses = same_noise(lambda x: model.loss(x, actions, NO_PAD)[0].item(), images, other)
    assert (losses[0] != losses[1]) == seen


def test_flow_target_is_the_motion_and_difference_what_is_added_to_the_first_frame():
    big = torch.nn.functional.interpolate(torch.rand(1, 1, 24, 24) * 255, (96, 96), mode="bilinear")
    frames = [big[..., 16:80, 26 - 2 * k:90 - 2 * k] for k in range(N + 1)]     # 2 pixels to the right
    still, future = m.targets(torch.stack(frames, 1).to(torch.uint8).expand(-1, -1, 3, -1, -1), "flow")
    assert future.shape == (1, N, 2, 32, 32) and not still.any()
    inside = future[..., 6:-6, 6:-6].mean((0, 1, 3, 4))
    torch.testing.assert_close(inside, torch.tensor([1.0, 0.0]), rtol=0, atol=0.1)      # of the half image
    images = video()
    images[:, :, :, :16] = images[:, :1, :, :16]                # the upper half does not move
    still, future = m.targets(images, "difference")
    assert not still.any() and not future[..., :16, :].any()
    torch.testing.assert_close(future + images[:, :1] / 255, images[:, 1:] / 255)


def test_feature_target_shows_edges_but_not_light_or_noise():
    images = torch.full((1, 2, 3, 16, 16), 100, dtype=torch.uint8)
    images[..., 8:] = 200                                       # an upright edge: its gradient points right
    still, future = m.targets(images, "features")
    assert future.shape == (1, 1, 9, 4, 4) and future[0, 0, :, 0, 2].argmax() == 0
    assert not future[0, 0, :, :, 0].any(), "no edge, no feature"
    torch.testing.assert_close(m.targets(images + 50, "features")[1], future)
    level = m.targets(images.transpose(-1, -2), "features")[1]  # 90 degrees: the fifth of nine bins
    torch.testing.assert_close(level[0, 0, 4, 2, 0], future[0, 0, 0, 0, 2])
    noisy = m.targets((images + torch.randint(-1, 2, images.shape)).to(torch.uint8), "features")[1]
    strong = future.norm(dim=2, keepdim=True) > 0.5
    assert ((noisy - future).abs() * strong).max() < 0.1, "noise must not move an edge to another bin"


def test_inverse_latents_depend_on_the_two_frames_around_them_alone():
    model, images = m.InverseDynamics(world().config).eval(), video()
    z, changed = model(images), images.clone()
    assert z.shape == (B, N, Z) and z.abs().max() < 1
    changed[:, 3] = 0
    assert (model(changed) != z).any(0).any(-1).tolist() == [k in (2, 3) for k in range(N)]


def test_shuffling_gives_every_row_another_row_of_its_group():
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    for seed in range(20):
        index, paired = m.shuffled_within(groups, torch.Generator().manual_seed(seed))
        assert torch.equal(groups[index], groups) and sorted(index.tolist()) == list(range(6))
        assert paired.tolist() == [True, True, True, False, True, True]
        assert (index != torch.arange(6)).tolist() == paired.tolist()


# ---- chunk execution ----

def test_executing_h_of_n_asks_every_h_steps_and_plays_in_order():
    chunks, asked = [np.arange(5.0)[:, None] + 10 * i for i in range(4)], []
    chunker = m.ActionChunker(5, execute=3)
    played = [float(chunker.step(lambda: asked.append(t) or chunks[len(asked) - 1])[0]) for t in range(9)]
    assert played == [0, 1, 2, 10, 11, 12, 20, 21, 22] and asked == [0, 3, 6]


@pytest.mark.parametrize("decay", (0.0, 0.3))
def test_temporal_ensembling_online_equals_offline(decay):
    n, steps = 4, 12
    chunks = np.random.default_rng(0).normal(size=(steps, n, 7))
    chunks[3] = 0                                               # an action of zeros is an action
    chunker = m.ActionChunker(n, decay=decay)
    online = [chunker.step(lambda: chunks[t]) for t in range(steps)]
    for t in range(steps):
        votes = [chunks[s][t - s] for s in range(max(0, t - n + 1), t + 1)]             # oldest first
        weights = np.exp(-decay * np.arange(len(votes)))
        np.testing.assert_allclose(online[t], np.average(votes, axis=0, weights=weights))
    chunker.reset()
    np.testing.assert_allclose(chunker.step(lambda: chunks[0]), chunks[0][0], err_msg="reset must forget")


# ---- linear probe ----

def test_linear_probe_finds_a_linear_map_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x, w, episode = rng.normal(size=(4000, 10)), rng.normal(size=(10, 2)), np.arange(4000) // 40
    x[:3000, 9] = 1.0                                           # constant in training only: says nothing
    y = np.column_stack([x[:, :9] @ w[:9], np.ones(4000), rng.normal(size=4000)])
    r2 = m.r_squared(m.ridge_probe(x[:3000], y[:3000], x[3000:], episode[:3000]), y[3000:])
    assert r2[0] > 0.999 and r2[1] > 0.999 and np.isnan(r2[2]) and abs(r2[3]) < 0.05
    one = m.ridge_probe(x[:3000], y[:3000], x[3000:], np.zeros(3000))
    assert 0.7 < m.r_squared(one, y[3000:])[0] < 0.8, "of one episode: the ridge is 1 and halves the weights"


def test_the_ridge_is_chosen_over_episodes_never_over_rows():
    """x identifies the episode, y belongs to it: folds of rows would find y predictable, choose the smallest
    ridge, and predict other episodes badly."""
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(40), 10)
    x = rng.normal(size=(40, 30))[episode] + 0.01 * rng.normal(size=(400, 30))
    y = rng.normal(size=(40, 1))[episode]
    train = episode < 30
    by_episode, by_row = (m.r_squared(m.ridge_probe(x[train], y[train], x[~train], group), y[~train])[0]
                          for group in (episode[train], np.arange(300)))
    assert by_row < -0.5 < by_episode, (by_row, by_episode)


# ---- errors, files, help ----

def test_a_mistake_of_the_user_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)      # not installed
    policy, right = new("action", BOTH, 7).eval(), observation(BOTH, True)
    small = {c: x[..., :16, :16] for c, x in right["images"].items()}
    for call, words in (
            (lambda: policy.act({**right, "images": {"front": small["front"]}}), "needs the cameras"),
            (lambda: policy.act({**right, "images": small}), "32 pixels .*'side': 16"),
            (lambda: policy.act(observation(BOTH)), "proprioception"),
            (lambda: policy.act({**right, "instruction": "stack the cups"}), "list of 5 instructions"),
            (lambda: world(image_size=100), "16, 32, 64 or 128"),
            (lambda: new("action", policy="diffusion", chunk=5), "multiple of 2.*got 5"),
            (lambda: m.ActionChunker(5, execute=6), "0 to 5"),
            (lambda: m.TextEncoder("clip"), "pip install transformers, and download openai/clip"),
            (lambda: m.pick_device("cuda:77"), "no device"), (lambda: m.pick_device("abacus"), "no device"),
            *((lambda other=other: m.init_from_pretrained(new("action", **other), new().state_dict(), "x.pt"),
               "another architecture.*in the file.*here")
              for other in (dict(width=64), dict(layers=3), dict(layers=1))),
            (lambda: m.init_from_pretrained(new("add"), new("action").state_dict(), "x"), "latent_.*absent")):
        with pytest.raises(m.InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_errors_of_the_user_are_one_line_and_bugs_keep_their_traceback(capsys):
    for error, status, words in ((m.InputError("give\n --data"), 2, "error: give --data"),
                                 (KeyboardInterrupt(), 130, "--resume"),
                                 (OSError(28, "No space left on device"), 2, "a file: No space left"),
                                 (PermissionError(13, "Permission denied", "x.pt"), 2, "x.pt: Permission")):
        with pytest.raises(SystemExit) as stopped:
            m.run(raising(error))
        assert stopped.value.code == status and words in capsys.readouterr().err
    for bug in (KeyError("x"), OSError(9, "Bad file descriptor")):
        with pytest.raises(type(bug)):
            m.run(raising(bug))


def test_help_prints_every_default_once():
    parser = argparse.ArgumentParser("x", description="two\n  lines", formatter_class=m.HelpFormatter)
    parser.add_argument("--share", default=0, help="in %%")
    parser.add_argument("--data", nargs="+", default=["a", "50%"], help="folders")
    parser.add_argument("--chunk", default=3, help="n (default: 16 for diffusion)")
    parser.add_argument("--on", action=argparse.BooleanOptionalAction, default=True, help="yes")
    parser.add_argument("--off", action="store_true", help="no")
    parser.add_argument("--none", help="nothing")
    text = parser.format_help()
    assert "two\n  lines" in text and "in % (default: 0)" in text
    assert "folders (default: ['a', '50%'])" in text and text.count("default") == 4
    assert "n (default: 16 for diffusion)" in text


def test_a_torn_last_line_is_removed_and_a_bad_one_is_an_error(tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert m.read_lines(path) == []
    for i in range(3):
        m.append_line(path, {"i": i, "text": "ä"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"i": 3, "te')
    assert [line["i"] for line in m.read_lines(path)] == [0, 1, 2] and path.read_bytes() == whole
    path.write_bytes(b"oops\n" + whole)
    for read, words in ((m.read_lines, "a line that is not JSON"), (m.read_json, "not a JSON file")):
        with pytest.raises(m.InputError, match=words):
            read(path)
    m.write_json(tmp_path / "a.json", {"b": 1, "a": 2}), m.write_json(tmp_path / "b.json", {"a": 2, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert m.read_json(tmp_path / "a.json") == {"a": 2, "b": 1}


# ---- checkpoints ----

@pytest.mark.parametrize("policy, more", (
    ("baku", set()),
    ("act", {"style_action_in", "style_token", "style_places", "style_encoder", "style_out", "style_in"}),
    ("diffusion", {"action_in", "noise_step", "noise_unet", "camera_mix", "proprio_mix"})))
def test_finetuning_keeps_the_trunk_and_renews_the_last_layer(policy, more):
    source, target = new(policy=policy), new("action", BOTH, 7, policy=policy)
    names = m.init_from_pretrained(target, source.state_dict(), "x.pt")
    kept = {k: v for k, v in target.state_dict().items() if k in names["loaded"]}
    assert kept and all(torch.equal(v, source.state_dict()[k]) for k, v in kept.items())
    fresh = {k.removeprefix("tokens.").split(".")[0] for k in names["new"]}
    assert fresh == {"action_out", "action_norm", "proprio_norm", "proprio_encoder",
                     "camera_embedding"} | more
    assert {k.split("_")[0] for k in names["unused"]} == {"latent"}


@pytest.mark.parametrize("policy", ("baku", "act"))
def test_head_add_keeps_the_layers_that_make_latent_actions(policy):
    source, target, obs = new(policy=policy).eval(), new("add", policy=policy).eval(), observation()
    names = m.init_from_pretrained(target, source.state_dict(), "x.pt")
    assert "latent_out.weight" in names["loaded"] and not names["unused"]
    torch.testing.assert_close(target.latent_actions(obs), source.latent_actions(obs))
    assert target.act(obs).shape == (B, N, A)


def test_checkpoint_round_trip_and_interrupted_write(tmp_path, monkeypatch):
    policy, path, obs = new("action").eval(), tmp_path / "last.pt", observation()
    checkpoint = dict(stage="finetune", step=3, config=policy.config, policy=policy.state_dict(), args={})
    m.save_checkpoint(path, checkpoint)
    assert torch.equal(m.load_policy(path, stage="finetune")[0].act(obs), policy.act(obs))
    with pytest.raises(m.InputError, match="written by finetune.py: give a checkpoint of pretrain.py"):
        m.load_policy(path, stage="pretrain")
    before = path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(m.os, "fsync", raising(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            m.save_checkpoint(path, {**checkpoint, "step": 4})
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    broken = {**checkpoint["policy"], "query": torch.full((32,), torch.nan)}
    for change, words in ((dict(stage="pretrain"), "written by pretrain.py: give a checkpoint of finetune"),
                          (dict(config={}), "this version"),
                          (dict(config={**policy.config, "policy": "mine"}), "no policy 'mine'.*baku"),
                          (dict(policy=broken), "NaN.*first: query"),
                          (dict(policy={}), "does not fit its own config.*Missing")):
        m.save_checkpoint(path, {**checkpoint, **change})
        with pytest.raises(m.InputError, match=words):
            m.load_policy(path, stage="finetune")


def test_foreign_files_are_refused_and_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    torch.save({"stage": "pretrain", "config": {}, "x": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, words in (("evil.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                        ("absent.pt", "no checkpoint at")):
        with pytest.raises(m.InputError, match=words):
            m.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    for script in m.Path(m.__file__).parent.glob("*.py"):
        if script.name != "models.py":                          # which alone saves and loads
            for call in re.findall(r"torch\.(?:save|load)\(.*", script.read_text()):
                assert "pruned_init" in call, script             # LIBERO's initial states


# ---- run folders ----

def test_overwrite_deletes_the_old_run_and_resume_keeps_its_metrics_up_to_the_checkpoint(tmp_path):
    log = m.Log(tmp_path, 0)
    for step in (1, 2, 3):
        log(step, {"loss": step / 2})
    m.Log(tmp_path, 2)(3, {"loss": 9.0})                        # lines after the checkpoint are written again
    assert [line["loss"] for line in m.read_lines(tmp_path / "metrics.jsonl")] == [0.5, 1.0, 9.0]
    (tmp_path / "last.pt").touch()
    args = SimpleNamespace(out=str(tmp_path), resume=False, overwrite=True)
    assert m.open_run(args, ()) is None and (tmp_path / "last.pt").exists(), "nothing is deleted yet"
    m.Log(tmp_path, 0)
    assert not (tmp_path / "last.pt").exists() and not m.read_lines(tmp_path / "metrics.jsonl")
    with pytest.raises(m.InputError, match="nothing to resume"):
        m.open_run(SimpleNamespace(out=str(tmp_path / "none"), resume=True), ())


def test_a_result_names_its_command_and_commit(monkeypatch):
    assert {"command", "commit", "python", "torch", "numpy", "machine"} == m.provenance().keys()
    monkeypatch.setattr(m.shutil, "which", lambda name: None)
    assert m.provenance()["commit"] == "unknown", "no git"


def test_sizes_are_as_stated():
    def count(model):
        return int(m.describe_size(model).split()[0].replace(",", ""))

    more, source = dict(cameras=list(BOTH), proprio_dim=7, image_size=128), m.Path(m.__file__).read_text()
    papers = re.findall(r'"paper": dict\(.*?# ([\d.]+)', source, re.DOTALL)              # in millions
    with torch.device("meta"):
        for policy, millions in zip(("baku", "act", "diffusion"), papers, strict=True):
            cls = m.POLICIES[policy]
            model = new("action", policy=policy, chunk=cls.CHUNK, **more, **cls.SIZES["paper"])
            assert count(model) / 1e6 == pytest.approx(float(millions), rel=0.01), policy
        stated = re.findall(r'"(\w+)": dict\(deter=.*# ([\d.]+)', source)
        for size, millions in stated:
            model = world(size=size, image_size=64 if size in ("tiny", "1m") else 128)
            assert f"{count(model) / 1e6:.2g}" == f"{float(millions):.2g}", size
    assert dict(stated).keys() == m.WORLD_MODEL_SIZES.keys()
