"""The world model of LAWM (Sec. III-A): DreamerV3's RSSM, and what it can be asked to predict.

    o_t ----> posterior ---> h_t+1 = f(h_t, s_t, z_t) ---> h_t+2 ...             frames o_t ... o_t+n
              (Eq. 2)        (Eq. 1)      |                                      actions z_t ... z_t+n-1
                                          +-> prior p(s | h) (Eq. 3): open loop
                                          +-> posterior q(s | h, o_t+1) (Eq. 2): has seen the frame
                                          +-> decoder (Eq. 4): what o_t+1 looks like

It takes any tensor (B, n, Z) for actions and knows no policy. Letters as in models.py; inside, latent actions
are simply `actions`, and the state is `deter` (B, D) and `stoch` (B, S, K).

    1 sizes and layers    WORLD_MODEL_SIZES, BlockLinear, unimix, kl_categorical, sample_straight_through
    2 the state           RSSM
    3 what is predicted   TARGETS: pixels, difference, features, flow
    4 the model           WorldModel
    5 the other source    InverseDynamics: latent actions from the frames themselves, as LAPA has them
"""
import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import InputError, Normalizer, masked_mean

# ---- 1 sizes and layers ----------------------------------------------------------------------------------

# DreamerV3's own table (Hafner et al. 2023, App.): 32 categorical variables throughout. Names are those of
# whole agents; what the world model alone has is printed by `python models.py`.
WORLD_MODEL_SIZES = {
    "tiny": dict(deter=256, hidden=128, stoch=32, classes=16, depth=8, blocks=4),     # ours, for laptops
    "1m": dict(deter=512, hidden=64, stoch=32, classes=4, depth=4, blocks=8),
    "12m": dict(deter=2048, hidden=256, stoch=32, classes=16, depth=16, blocks=8),
    "25m": dict(deter=3072, hidden=384, stoch=32, classes=24, depth=24, blocks=8),
    "50m": dict(deter=4096, hidden=512, stoch=32, classes=32, depth=32, blocks=8),    # the paper's
    "100m": dict(deter=6144, hidden=768, stoch=32, classes=48, depth=48, blocks=8),
    "200m": dict(deter=8192, hidden=1024, stoch=32, classes=64, depth=64, blocks=8),
}


class BlockLinear(nn.Module):
    """Block-diagonal linear map: (B, blocks, c_in) -> (B, blocks, c_out). One block: a plain linear layer."""

    def __init__(self, blocks, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, c_in, c_out) / math.sqrt(c_in))
        self.bias = nn.Parameter(torch.zeros(blocks, c_out))

    def forward(self, x):
        return torch.einsum("bgi,gio->bgo", x, self.weight) + self.bias


def dense(c_in, c_out):
    """Linear, RMSNorm, SiLU: the layer of every MLP in DreamerV3."""
    return nn.Sequential(nn.Linear(c_in, c_out), nn.RMSNorm(c_out, eps=1e-4), nn.SiLU())


def unimix(logits, share=0.01):
    """Log-probs with 1 % of the uniform distribution in them: no probability is 0 and KL stays finite."""
    k = logits.shape[-1]
    return torch.log((1 - share) * logits.softmax(-1) + share / k)


def kl_categorical(p, q):
    """KL(p || q) of S independent categoricals given log-probs (..., S, K) -> (...,), in nats."""
    return (p.exp() * (p - q)).sum((-1, -2))


def sample_straight_through(log_probs):
    """One-hot sample forward, gradient of the probabilities backward: (..., S, K) -> (..., S, K)."""
    gumbel = -torch.log(-torch.log(torch.rand_like(log_probs).clamp(1e-9, 1 - 1e-7)))
    one_hot = F.one_hot((log_probs + gumbel).argmax(-1), log_probs.shape[-1]).to(log_probs.dtype)
    probs = log_probs.exp()
    return one_hot + probs - probs.detach()


# ---- 2 the state -----------------------------------------------------------------------------------------


class RSSM(nn.Module):
    """Recurrent state-space model of DreamerV3. State {"deter": (B, D), "stoch" and "logits": (B, S, K)}.

    sequence model  h_k+1 = f(h_k, s_k, a_k)         block GRU                 (Eq. 1)
    posterior       s_k ~ q(s_k | h_k, o_k)          sees the frame            (Eq. 2)
    prior           s_k ~ p(s_k | h_k)               must guess it             (Eq. 3)
    """

    def __init__(self, size, embed_dim, action_dim):
        super().__init__()
        deter, hidden, self.blocks = size["deter"], size["hidden"], size["blocks"]
        self.deter, self.stoch, self.classes = deter, size["stoch"], size["classes"]
        flat = self.stoch * self.classes
        self.in_deter, self.in_stoch, self.in_action = (
            dense(deter, hidden), dense(flat, hidden), dense(action_dim, hidden))
        self.hidden = BlockLinear(self.blocks, deter // self.blocks + 3 * hidden, deter // self.blocks)
        self.hidden_norm = nn.RMSNorm(deter, eps=1e-4)
        self.gates = BlockLinear(self.blocks, deter // self.blocks, 3 * deter // self.blocks)
        self.posterior_net = nn.Sequential(dense(deter + embed_dim, hidden), nn.Linear(hidden, flat))
        self.prior_net = nn.Sequential(dense(deter, hidden), dense(hidden, hidden), nn.Linear(hidden, flat))

    def initial(self, batch, device):
        """h = 0, s = 0, before any frame."""
        return {"deter": torch.zeros(batch, self.deter, device=device),
                "stoch": torch.zeros(batch, self.stoch, self.classes, device=device)}

    def sequence(self, state, action):
        """h_k+1 = f(h_k, s_k, a_k) (Eq. 1): state, (B, Z) -> (B, D)."""
        b, deter = len(action), state["deter"]
        # DreamerV3 shrinks actions beyond [-1, 1]; latents are inside by their tanh, raw actions may not be.
        action = action / action.abs().clamp(min=1).detach()
        x = torch.cat([self.in_deter(deter), self.in_stoch(state["stoch"].flatten(1)),
                       self.in_action(action)], -1)
        x = x[:, None].expand(b, self.blocks, -1)                           # every block sees all inputs
        x = torch.cat([deter.view(b, self.blocks, -1), x], -1)              # (B, blocks, D/blocks + 3 hidden)
        x = F.silu(self.hidden_norm(self.hidden(x).flatten(1))).view(b, self.blocks, -1)
        reset, candidate, update = [g.flatten(1) for g in self.gates(x).chunk(3, -1)]  # (B, D) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)                                            # starts by remembering
        return update * candidate + (1 - update) * deter

    def _state(self, deter, logits):
        logits = unimix(logits.view(-1, self.stoch, self.classes))
        return {"deter": deter, "stoch": sample_straight_through(logits), "logits": logits}

    def prior(self, deter):
        """p(s | h) (Eq. 3): (B, D) -> state."""
        return self._state(deter, self.prior_net(deter))

    def posterior(self, deter, embed):
        """q(s | h, o) (Eq. 2): (B, D), (B, embed) -> state."""
        return self._state(deter, self.posterior_net(torch.cat([deter, embed], -1)))


def stack_states(states):
    """List of T states of (B, ...) -> one state of (B, T, ...)."""
    return {k: torch.stack([s[k] for s in states], 1) for k in states[0]}


# ---- 3 what is predicted ---------------------------------------------------------------------------------

# name: (channels per view, how often height and width are halved). The paper: pixels; features and flow are
# its own future work (Sec. V). None needs a download.
TARGETS = {"pixels": (3, 0), "difference": (3, 0), "features": (9, 2), "flow": (2, 1)}


def targets(images, kind):
    """What o_t+1 ... o_t+n are to be predicted as -> still (B, 1, C, h, w), future (B, n, C, h, w).

    images      (B, n+1, 3V, H, W) uint8, V views; `still` is what a video that stands still would show
    pixels      the frames, in [0, 1]
    difference  o_k - o_t, in [-1, 1]: the scene need not be drawn
    features    histograms of oriented gradients (MaskFeat, Wei et al. 2022): edges, no colours, no light
    flow        optical flow o_k-1 -> o_k (Farneback 2003), in pixels of the half-size picture
    """
    frames = images.float() / 255
    if kind == "pixels":
        return frames[:, :1], frames[:, 1:]
    if kind == "difference":
        return torch.zeros_like(frames[:, :1]), frames[:, 1:] - frames[:, :1]
    grey = frames.unflatten(2, (-1, 3)).mean(3)                                       # (B, n+1, V, H, W)
    if kind == "features":
        cells = oriented_gradients(grey)
        return cells[:, :1], cells[:, 1:]
    flow = optical_flow(grey)
    return torch.zeros_like(flow[:, :1]), flow


def oriented_gradients(grey, cell=4):
    """Histogram over 9 orientations of the gradients in each cell, of length 1 unless the cell is flat:
    (B, T, V, H, W) in [0, 1] -> (B, T, 9V, H/4, W/4)."""
    x = F.pad(grey.flatten(0, 2)[:, None], (1, 1, 1, 1), mode="replicate")            # (B*T*V, 1, H+2, W+2)
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    # A quarter of a bin ahead: upright and level edges, which are many, lie on no border between bins.
    bins = ((torch.atan2(dy, dx) / math.pi * 9 + 0.25) % 9).long().clamp(max=8)       # (B*T*V, 1, H, W)
    strength = torch.hypot(dx, dy)
    votes = torch.zeros_like(strength).expand(-1, 9, -1, -1).clone().scatter_(1, bins, strength)
    cells = F.avg_pool2d(votes, cell)                                                 # (B*T*V, 9, H/4, W/4)
    cells = cells / (cells.norm(dim=1, keepdim=True) + 0.05)
    return cells.unflatten(0, grey.shape[:3]).flatten(2, 3)


def optical_flow(grey):
    """(B, n+1, V, H, W) in [0, 1] -> (B, n, 2V, H/2, W/2): x and y of each point of each view, on the CPU."""
    half = F.avg_pool2d(grey.flatten(0, 2)[:, None], 2)[:, 0].unflatten(0, grey.shape[:3])
    half = (255 * half).to("cpu", torch.uint8).numpy()                                # (B, n+1, V, H/2, W/2)
    flow = [[[cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 9, 3, 5, 1.1, 0)
              for before, after in zip(clip[k], clip[k + 1])] for k in range(len(clip) - 1)] for clip in half]
    return torch.from_numpy(np.array(flow)).to(grey.device).movedim(-1, 3).flatten(2, 3)


# ---- 4 the model -----------------------------------------------------------------------------------------


class ToImage(nn.Module):
    """(B, 16 C) -> (B, C, 4, 4), channels last in memory."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x.view(-1, 4, 4, self.channels).permute(0, 3, 1, 2)


def convolutions(c_in, channels):
    """Halves height and width at every layer: (B, c_in, H, W) -> (B, channels[-1] * h * w)."""
    layers = []
    for c in channels:
        # ASSUMPTION: normalised over channels and pixels together (DreamerV3: RMS per pixel): a fused kernel.
        layers += [nn.Conv2d(c_in, c, 4, 2, 1, bias=False), nn.GroupNorm(1, c), nn.SiLU()]
        c_in = c
    return nn.Sequential(*layers, nn.Flatten())


def image_channels(size, image_size):
    """Channels of the layers that bring an image down to 4 x 4."""
    stages = int(math.log2(image_size)) - 2
    if 4 * 2 ** stages != image_size or not 2 <= stages <= 5:
        raise InputError(f"the world model takes images of 16, 32, 64 or 128 pixels, got {image_size}")
    # DreamerV3's multipliers for 64 pixels; ASSUMPTION: a thin stage more for 128 (paper: not said).
    return [WORLD_MODEL_SIZES[size]["depth"] * m for m in (1, 2, 3, 4, 4)[-stages:]]


class WorldModel(nn.Module):
    """RSSM with convolutional encoder and decoder, trained to predict o_t+1 ... o_t+n from o_t and n actions.

    It takes any action tensor (B, n, Z): latent, true, shuffled or zero. o_t is context (its posterior starts
    the roll), then every action acts, the first one included.
    UPSTREAM: the release starts at o_t+1 and zeroes the first action, so z_t is never used; and it copies the
    actions with torch.tensor(), which detaches them: no gradient reaches the policy.

    config, plain data:
        size           name in WORLD_MODEL_SIZES
        image_size     16, 32, 64 or 128
        action_dim     Z
        predict        posterior  reconstruct from states that have seen the frame (the paper, DreamerV3)
                       prior      reconstruct open loop: from o_t and the actions alone
                       both       sum of the two
        target         what is reconstructed, see TARGETS (pixels = the paper)
        motion_weight  extra weight of what differs from standing still (0 = the paper)
        free_bits      nats of KL that cost nothing (1 = DreamerV3)
        decode_steps   frames per window that are decoded in a training step, drawn at random (0 = all n, the
                       paper): same expectation of the loss and its gradient, at less than half the cost
        context_frame  False: o_t is not seen, the roll starts at h = 0, s = 0
        mask           share of each frame's patches that the encoder does not see in training (0 = the paper)
        views          V, cameras side by side in the channels (1 = the paper)
        proprio_dim    P: proprioception is seen and predicted, too; None = the paper
    """
    DYN_SCALE, REP_SCALE = 0.5, 0.1      # KL balancing (UPSTREAM: the same)
    PROPRIO_SCALE = 100.0                # ASSUMPTION: P numbers in [-1, 1] beside thousands of pixels

    def __init__(self, config):
        super().__init__()
        self.config = config
        size, width = WORLD_MODEL_SIZES[config["size"]], 3 * config["views"]
        channels = image_channels(config["size"], config["image_size"])
        embed, feature = 16 * channels[-1], size["deter"] + size["stoch"] * size["classes"]
        self.encoder = convolutions(width, channels)
        self.rssm = RSSM(size, embed, config["action_dim"])
        c_out, halved = TARGETS[config["target"]]
        if halved > len(channels) - 1:
            raise InputError(f"target {config['target']} is too small to draw for images of "
                             f"{config['image_size']} pixels: take larger ones, or --target pixels")
        layers, c_in = [nn.Linear(feature, embed), ToImage(channels[-1])], channels[-1]
        for c in channels[-2::-1][:len(channels) - 1 - halved]:
            layers += [nn.ConvTranspose2d(c_in, c, 4, 2, 1, bias=False), nn.GroupNorm(1, c), nn.SiLU()]
            c_in = c
        layers.append(nn.ConvTranspose2d(c_in, c_out * config["views"], 4, 2, 1))
        self.decoder = nn.Sequential(*layers, nn.Sigmoid() if config["target"] == "pixels" else nn.Identity())
        if config["proprio_dim"]:
            self.proprio_norm = Normalizer(config["proprio_dim"])
            self.proprio_in = dense(config["proprio_dim"], embed)
            self.proprio_out = nn.Sequential(dense(feature, size["hidden"]),
                                             nn.Linear(size["hidden"], config["proprio_dim"]))
        self.to(memory_format=torch.channels_last)                                    # twice as fast on a CPU

    def embed(self, images, proprio=None):
        """(B, T, 3V, H, W) uint8, (B, T, P) -> (B, T, embed)."""
        b, t = images.shape[:2]
        x = images.flatten(0, 1).float() / 255 - 0.5                                  # (B*T, 3V, H, W)
        if self.training and self.config["mask"]:                                     # 8 x 8 patches
            seen = (torch.rand(b * t, 1, 8, 8, device=x.device) >= self.config["mask"]).to(x.dtype)
            x = x * F.interpolate(seen, x.shape[-2:])
        x = self.encoder(x.contiguous(memory_format=torch.channels_last)).view(b, t, -1)
        if self.config["proprio_dim"]:
            x = x + self.proprio_in(self.proprio_norm.normalize(proprio))
        return x

    def decode(self, state):
        """State of (..., D), (..., S, K) -> the target (..., C, h, w), for pixels in [0, 1]."""
        features = self.features(state)
        lead = features.shape[:-1]
        return self.decoder(features.flatten(0, -2)).unflatten(0, lead)

    def features(self, state):
        return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)            # (..., D + S*K)

    def context(self, embed):
        """Posterior of the first frame, (B, embed) -> state: where every roll starts."""
        start = self.rssm.initial(len(embed), embed.device)
        return self.rssm.posterior(start["deter"], embed) if self.config["context_frame"] else start

    def observe(self, images, actions, proprio=None):
        """Filter: (B, n+1, 3V, H, W) uint8, (B, n, Z), (B, n+1, P) -> start state (B, ...), posteriors and
        priors of k = 1 ... n (B, n, ...)."""
        assert images.shape[1] == actions.shape[1] + 1, (
            f"{images.shape[1]} frames need {images.shape[1] - 1} actions, got {actions.shape[1]}")
        embed = self.embed(images, proprio)
        start = state = self.context(embed[:, 0])
        posteriors, priors = [], []
        for k in range(actions.shape[1]):
            deter = self.rssm.sequence(state, actions[:, k])                          # a_k takes o_k to o_k+1
            prior, state = self.rssm.prior(deter), self.rssm.posterior(deter, embed[:, k + 1])
            priors.append(prior)
            posteriors.append(state)
        return start, stack_states(posteriors), stack_states(priors)

    def imagine(self, state, actions):
        """Open loop: start state (B, ...), (B, n, Z) -> priors (B, n, ...) of k = 1 ... n, no frame seen
        after the first."""
        states = []
        for k in range(actions.shape[1]):
            state = self.rssm.prior(self.rssm.sequence(state, actions[:, k]))
            states.append(state)
        return stack_states(states)

    def losses(self, images, actions, proprio=None, predict=None, decode_steps=None):
        """Every term before reduction: {name: (B, n)}; total() adds up those that the config asks for.

        predict and decode_steps are the config's, unless given.
        """
        predict = predict or self.config["predict"]
        n = actions.shape[1]
        decode_steps = min(n, (self.config["decode_steps"] if decode_steps is None else decode_steps) or n)
        start, posteriors, priors = self.observe(images, actions, proprio)
        drawn = torch.randperm(n, device=images.device)[:decode_steps]                # which frames are drawn
        still, future = targets(images, self.config["target"])                        # (B, 1|n, C, h, w)
        future = future[:, drawn]                                                     # (B, m, C, h, w)
        # DEVIATION: what differs from standing still weighs more: most of a picture is table.
        weight = (1 + self.config["motion_weight"]
                  * (future - still).abs().mean(2, keepdim=True))                     # (B, m, 1, h, w)

        def spread(error):                                     # (B, m, C, h, w) -> (B, n), the rest is 0
            error = error.sum((2, 3, 4)) * (n / decode_steps)
            return error.new_zeros(len(error), n).index_copy(1, drawn, error)

        terms = {"still": spread((still - future) ** 2)}       # of standing still, for report
        if self.config["context_frame"]:
            # ASSUMPTION: o_t itself is drawn as well (DreamerV3 draws every frame): the scene must come from
            # the context, so that the latents are left with what changes in it.
            error = (self.decode(start) - still[:, 0]) ** 2                           # (B, C, h, w)
            terms["context"] = error.sum((1, 2, 3))[:, None].expand(-1, n)            # (B, n), all the same

        def predicted(name, states):
            error = (self.decode({k: v[:, drawn] for k, v in states.items()}) - future) ** 2
            terms[name] = spread(weight * error)
            if name == "open_loop":
                terms["open_loop_plain"] = spread(error.detach())                     # for report
            if self.config["proprio_dim"]:
                error = (self.proprio_out(self.features(states))
                         - self.proprio_norm.normalize(proprio[:, 1:])) ** 2          # (B, n, P)
                terms[f"{name}_proprio"] = self.PROPRIO_SCALE * error.mean(-1)

        if predict in ("posterior", "both"):
            predicted("recon", posteriors)                     # (Eq. 4) decoder, (Eq. 5) first term
        if predict in ("prior", "both"):
            # DEVIATION: the open-loop term. From the posterior alone a frame can be drawn without its action:
            # the posterior has seen it; only the KL then asks for actions, below the free bits not even that.
            predicted("open_loop", self.imagine(start, actions))
        post, prior = posteriors["logits"], priors["logits"]                # (B, n, S, K)
        terms["kl_dyn"] = kl_categorical(post.detach(), prior)              # moves the prior to what was seen
        terms["kl_rep"] = kl_categorical(post, prior.detach())              # keeps the posterior predictable
        return terms

    def loss(self, images, actions, is_pad, proprio=None):
        """Negative evidence bound of the video given the actions (Eq. 5) -> scalar, {name: float}.

        images  (B, n+1, 3V, H, W) uint8  o_t ... o_t+n
        actions (B, n, Z)                 gradients flow into them: this is how pretraining teaches the policy
        is_pad  (B, n) bool               True where o_k+1 is a repeated last frame; those steps count nowhere
        proprio (B, n+1, P)               where the config asks for it
        L = |o_t - ^o_t|^2 + mean_k |o_k - ^o_k|^2
            + 0.5 max(1, KL[sg q || p]) + 0.1 max(1, KL[q || sg p])                                 (Eq. 5)
        """
        terms = self.losses(images, actions, proprio)
        logs = {name: masked_mean(term, is_pad).item() for name, term in terms.items() if name != "still"}
        return masked_mean(self.total(terms), is_pad), logs

    def total(self, terms):
        """The weighted sum of (Eq. 5), step by step: {name: (B, n)} -> (B, n)."""
        free = self.config["free_bits"]
        kl = (self.DYN_SCALE * terms["kl_dyn"].clamp(min=free)
              + self.REP_SCALE * terms["kl_rep"].clamp(min=free))
        wanted = {"posterior": ["recon"], "prior": ["open_loop"], "both": ["recon", "open_loop"]}
        wanted = wanted[self.config["predict"]]
        return kl + sum(terms[name] for name in ("context", *wanted, *(f"{w}_proprio" for w in wanted))
                        if name in terms)

    def picture(self, prediction, first):
        """A prediction as something to look at, main view: (..., C, h, w), o_t (B, 3, H, W) in [0, 1] ->
        (B, ..., 3, H, W) in [0, 1]. Features: strength of all edges; flow: x red, y green, grey stands."""
        kind, main = self.config["target"], TARGETS[self.config["target"]][0]
        x = prediction[..., :main, :, :]
        if kind == "difference":
            x = x + first[:, None]
        elif kind == "features":
            x = x.norm(dim=-3, keepdim=True).expand(*x.shape[:-3], 3, -1, -1)
        elif kind == "flow":
            x = torch.cat([x / 8 + 0.5, torch.full_like(x[..., :1, :, :], 0.5)], -3)
        lead = x.shape[:-3]
        return F.interpolate(x.flatten(0, -4), first.shape[-2:]).unflatten(0, lead).clamp(0, 1)


def shuffled_within(groups, generator):
    """A permutation giving every row another row of its group -> (index (B,), has a partner (B,) bool)."""
    index, paired = torch.arange(len(groups)), torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        index[rows], paired[rows] = rows.roll(1), len(rows) > 1
    return index, paired


# ---- 5 the other source of latent actions ----------------------------------------------------------------


class InverseDynamics(nn.Module):
    """z_k from the frames that it lies between, o_k and o_k+1, as in LAPA (Ye et al. 2024) or villa-X: the
    paper's comparison (Table III). It sees the future, so a policy must then learn to predict its latents.

    config: the world model's. Bounded as the policies' are: standardised over the batch (padded pairs too, a
    few at the ends of episodes), then tanh.
    """

    def __init__(self, config):
        super().__init__()
        channels = image_channels(config["size"], config["image_size"])
        self.encoder = convolutions(6 * config["views"], channels)
        self.out = nn.Linear(16 * channels[-1], config["action_dim"], bias=False)
        self.norm = nn.BatchNorm1d(config["action_dim"], affine=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """(B, n+1, 3V, H, W) uint8 -> (B, n, Z) in (-1, 1)."""
        b, n = images.shape[0], images.shape[1] - 1
        x = images.float() / 255 - 0.5
        pairs = torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)                     # (B*n, 6V, H, W)
        z = self.out(self.encoder(pairs.contiguous(memory_format=torch.channels_last)))
        return torch.tanh(self.norm(z)).view(b, n, -1)
