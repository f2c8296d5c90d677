"""The models of LAWM (arXiv 2509.18428): policies, world model, and what every stage shares with the others.

    stage 1, pretrain.py  (video, no actions)             stage 2, finetune.py  (few demonstrations)

    o_t, instruction -> [ policy ] -> z_t ... z_t+n-1     o_t, instruction, -> [ policy ] -> a_t ... a_t+n-1
                                       |    (B, n, Z)     proprio            new last layer
    o_t ----------------------> [ world model ] -> o_t+1 ... o_t+n
                                gradients flow back through z into the policy

Policies do not know the world model and the world model does not know policies. Read in this order:

    1 errors            InputError, run
    2 text              TextEncoder
    3 normalisation     Normalizer
    4 observations      ResNet18FiLM, SpatialSoftmax, Transformer
    5 policies          Policy (contract), BAKU, POLICIES, make_policy
    6 world model       RSSM, WorldModel
    7 chunk execution   ActionChunker
    8 checkpoints       save_checkpoint, load_checkpoint, load_policy, init_from_pretrained
    9 runs              open_run, Log, provenance; what both training scripts mean by --resume

Letters: B batch, n chunk length, T frames (= n+1), C H W image, Z latent-action width, A action width, P
proprioception width, L instruction-embedding width, E token width, D deterministic state, S x K stochastic
state (S variables, K classes).

Two things are called z_t in the literature: DreamerV3's stochastic state and LAWM's latent action. Here the
state is `deter` / `stoch`, and the latent action is `latent_actions` (short: z), which inside the world model
is simply `actions`.

`python models.py` prints the parameter counts of every size.
"""
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- 1 errors ---------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used; one line: what was expected, what came, what to type."""


def run(main):
    """Call main(); what the user can mend is one line on stderr and exit status 2, all else a traceback."""
    try:
        main()
    except InputError as e:
        sys.exit(_fail(str(e)))
    except KeyboardInterrupt:
        sys.exit(_fail("stopped by the keyboard; finished work is kept, go on with --resume", status=130))
    except OSError as e:
        full = re.search(r"errno = (\d+)", str(e))          # h5py hides the number in its message
        code = e.errno or (int(full.group(1)) if full else None)
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
                        errno.EISDIR, errno.EEXIST, errno.EFBIG):
            raise
        where = f" ({e.filename})" if e.filename else ""
        sys.exit(_fail(f"cannot read or write: {os.strerror(code)}{where}; finished work is kept: "
                       "make room or choose another --out, then go on with --resume"))


def _fail(message, status=2):
    for bar in list(getattr(tqdm, "_instances", ())):      # the line stands alone, not behind a progress bar
        bar.close()
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


# ---- 2 text ----------------------------------------------------------------------------------------------


class TextEncoder:
    """Frozen instruction embedding: list of str -> (len, L) float32 array. Its name travels with the data.

    hash    word uni- and bigrams, hashed with signs into 512 floats: no weights, no download, no synonyms
    minilm  sentence-transformers/all-MiniLM-L6-v2, 384 floats (original BAKU's)
    clip    openai/clip-vit-base-patch32 text tower, 512 floats (UPSTREAM: the release's)
    The last two come through `transformers`, from its cache or the folder that TEXT_ENCODER_FOLDER names.
    """
    HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "clip": "openai/clip-vit-base-patch32"}
    DIM = {"hash": 512, "minilm": 384, "clip": 512}

    def __init__(self, name="hash"):
        if name not in self.DIM:
            raise InputError(f"text encoder is one of {', '.join(self.DIM)}; got {name!r}")
        self.name = name
        self.dim = self.DIM[self.name]
        if self.name == "hash":
            return
        source = os.environ.get("TEXT_ENCODER_FOLDER") or self.HUB[name]
        try:
            from transformers import AutoTokenizer
            if name == "clip":
                from transformers import CLIPTextModelWithProjection as model
            else:
                from transformers import AutoModel as model
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model = model.from_pretrained(source).eval()
        except (ImportError, RuntimeError) as e:        # a torchvision that does not fit torch ends here, too
            raise InputError(f"text encoder {name} needs a transformers that loads: pip install transformers "
                             f"({str(e).splitlines()[0][:80]})") from e
        except (OSError, ValueError) as e:
            raise InputError(f"cannot load {source}: download it to a folder and type "
                             f"TEXT_ENCODER_FOLDER=FOLDER before the command "
                             f"({str(e).splitlines()[0]})") from e

    def __call__(self, texts):
        if self.name == "hash":
            return np.stack([self._hash(t) for t in texts]).astype(np.float32)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = self.model(**tokens)
        if self.name == "clip":
            return out.text_embeds.float().numpy()
        mask = tokens["attention_mask"][..., None]                                    # (len, words, 1)
        return F.normalize((out.last_hidden_state * mask).sum(1) / mask.sum(1)).numpy()

    def _hash(self, text):
        words = re.findall(r"\w+", text.lower())
        vector = np.zeros(self.dim)
        # No words are a gram of their own: an instruction of zeros would leave the layer behind it untrained.
        for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:])] or [""]:
            code = zlib.crc32(gram.encode())
            vector[code % self.dim] += 1.0 if code >> 31 else -1.0
        return vector / max(np.linalg.norm(vector), 1e-6)


# ---- 3 normalisation -------------------------------------------------------------------------------------


class Normalizer(nn.Module):
    """Affine map of each dimension's [low, high] to [-1, 1], inside the weights so that it cannot get lost.

    A constant dimension maps to 0 and comes back as its constant. Statistics are the finetuning data's.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("low", -torch.ones(dim))
        self.register_buffer("high", torch.ones(dim))

    def fit(self, statistics):
        """statistics: {"min": (dim,), "max": (dim,)}, as stored in a dataset."""
        self.low.copy_(torch.as_tensor(statistics["min"]))
        self.high.copy_(torch.as_tensor(statistics["max"]))

    def _center_scale(self):
        half = (self.high - self.low) / 2
        return (self.high + self.low) / 2, torch.where(half > 1e-6, half, torch.ones_like(half))

    def normalize(self, x):
        center, scale = self._center_scale()
        return (x - center) / scale

    def unnormalize(self, x):
        center, scale = self._center_scale()
        return torch.where(self.high - self.low > 2e-6, x * scale + center, center.expand_as(x))


# ---- 4 observations --------------------------------------------------------------------------------------


def random_shift(images, pixels):
    """Augmentation: shift each sample by up to +-pixels, edges repeated. (B, ..., H, W) -> the same; all of a
    sample's frames move together."""
    if not pixels:
        return images
    b, (h, w) = len(images), images.shape[-2:]
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), device=images.device)
    ys = (torch.arange(h, device=images.device) + dy).clamp(0, h - 1)[:, None, :, None]         # (B, 1, H, 1)
    xs = (torch.arange(w, device=images.device) + dx).clamp(0, w - 1)[:, None, None, :]         # (B, 1, 1, W)
    flat = images.reshape(b, -1, h, w)
    rows = torch.arange(b, device=images.device)[:, None, None, None]
    channels = torch.arange(flat.shape[1], device=images.device)[None, :, None, None]
    return flat[rows, channels, ys, xs].view(images.shape)


def colour_jitter(images, strength):
    """Augmentation: brightness, contrast and saturation of each image times 1 +- strength at most, each drawn
    for each image. (B, 3, H, W) uint8 -> the same. UPSTREAM: 0.3 and the hue, too, one draw per batch."""
    if not strength:
        return images
    brightness, contrast, saturation = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1,
                                                                      device=images.device) - 1)
    x = images.float() * brightness
    mean = x.mean((1, 2, 3), keepdim=True)                                            # (B, 1, 1, 1)
    x = mean + contrast * (x - mean)
    grey = x.mean(1, keepdim=True)                                                    # (B, 1, H, W)
    return (grey + saturation * (x - grey)).round().clamp(0, 255).to(torch.uint8)


class FiLMBlock(nn.Module):
    """GroupNorm ResNet block, modulated by the instruction: x <- (1 + gamma) x + beta (Perez et al. 2018)."""

    def __init__(self, c_in, c_out, stride, cond):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        # DEVIATION: GroupNorm, not BatchNorm, whose statistics of video do not hold for demonstrations.
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)
        self.skip = nn.Identity() if c_in == c_out and stride == 1 else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.GroupNorm(8, c_out))
        self.film = nn.Linear(cond, 2 * c_out)
        nn.init.zeros_(self.film.bias)
        nn.init.normal_(self.film.weight, std=0.02)

    def forward(self, x, cond):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        gamma, beta = self.film(cond)[:, :, None, None].chunk(2, 1)                   # (B', C, 1, 1) each
        return F.relu(self.skip(x) + (1 + gamma) * y + beta)


class SpatialSoftmax(nn.Module):
    """Feature maps -> expected coordinates, one (x, y) in [-1, 1] per channel: (B, C, H, W) -> (B, 2C)."""

    def forward(self, x):
        b, c, h, w = x.shape
        p = x.flatten(2).softmax(-1).view(b, c, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype)
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        return torch.cat([(p.sum(2) * xs).sum(-1), (p.sum(3) * ys).sum(-1)], 1)       # (B, 2C)


class ResNet18FiLM(nn.Module):
    """The first half of ResNet-18 (stem, stages 1 and 2) with FiLM, then spatial softmax -> one token.

    UPSTREAM: the release keeps these two stages; the whole network alone has 11M parameters, not BAKU's 7M.
    DEVIATION: no ImageNet weights: nothing here needs a download. Below 128 pixels the stem's max-pooling is
    left out, so that the last feature map has 16 x 16 cells or more: localisation decides grasping.
    """

    def __init__(self, image_size, channels, width):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.stem_norm = nn.GroupNorm(8, channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if image_size >= 128 else nn.Identity()
        self.blocks = nn.ModuleList([
            FiLMBlock(channels, channels, 1, width), FiLMBlock(channels, channels, 1, width),
            FiLMBlock(channels, 2 * channels, 2, width), FiLMBlock(2 * channels, 2 * channels, 1, width)])
        self.keypoints = SpatialSoftmax()
        self.out = nn.Linear(4 * channels, width)
        self.to(memory_format=torch.channels_last)

    def forward(self, images, cond):
        """images (B, 3, H, W) uint8, cond (B, E) -> (B, E)."""
        mean = images.new_tensor([0.485, 0.456, 0.406], dtype=torch.float32)[:, None, None]
        std = images.new_tensor([0.229, 0.224, 0.225], dtype=torch.float32)[:, None, None]
        x = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        x = self.pool(F.relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x, cond)
        return self.out(self.keypoints(x))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP. No bias on queries and keys: a key's bias has no gradient at all."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
                                 nn.Dropout(dropout))

    def forward(self, x):
        b, t, e = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, e // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(b, t, e)), self.dropout, self.training)
        return x + self.mlp(self.norm2(x))


# ---- 5 policies ------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Contract of every policy.

    obs = {"images": {camera: (B, 3, H, W) uint8}, "instruction": (B, L), "proprio": (B, P)}
    What a dataset lacks is absent from obs: never zeros, never a second copy of the same camera.
    A subclass writes __init__(config) and features(obs) -> (B, E); heads, losses and units are here.

    config is plain data and makes the policy again (make_policy): policy, cameras, image_size, chunk,
    text_dim, proprio_dim (or None), action_dim, latent_dim, latent_norm, head, and the subclass's own sizes.
    head says what the last layer is:
        latent  (B, n, Z) latent actions for the world model (stage 1)
        action  (B, n, A) actions (stage 2, the paper's choice "reinit": a new last layer)
        add     a new layer from the latent actions to actions (stage 2, the paper's other strategy)
    """

    STD = 0.1   # of the action likelihood, in normalised units (UPSTREAM and BAKU: fixed, not learnt)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.chunk, self.cameras = config["chunk"], list(config["cameras"])
        width = config["width"]
        # The paper's "last layer" is latent_out / action_out; all before it is kept from stage 1 to stage 2.
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(),
                                  nn.Linear(width, width), nn.ReLU())
        if config["head"] in ("latent", "add"):
            latents = config["chunk"] * config["latent_dim"]
            # DEVIATION: latents are standardised over the batch before the tanh (latent_norm). Plain tanh
            # ones collapse to a constant or saturate at small scale. BatchNorm removes a bias: none here.
            self.latent_out = nn.Linear(width, latents, bias=not config["latent_norm"])
            self.latent_norm = (nn.BatchNorm1d(latents, affine=False) if config["latent_norm"]
                                else nn.Identity())
        if config["head"] in ("action", "add"):
            actions = config["chunk"] * config["action_dim"]
            self.action_out = nn.Linear(width if config["head"] == "action" else latents, actions)
            self.action_norm = Normalizer(config["action_dim"])
        if config["proprio_dim"]:
            self.proprio_norm = Normalizer(config["proprio_dim"])

    def features(self, obs):
        """The only path from raw observations to the head: obs -> (B, E)."""
        raise NotImplementedError

    def encode(self, obs):
        """Check what came against what the policy was made for, then features(obs) -> (B, E)."""
        missing = [c for c in self.cameras if c not in obs["images"]]
        if missing:
            raise InputError(f"policy looks through cameras {self.cameras}, observation has "
                             f"{sorted(obs['images'])}")
        size = obs["images"][self.cameras[0]].shape[-1]
        if size != self.config["image_size"]:
            raise InputError(f"policy was made for {self.config['image_size']}-pixel images, got {size}: "
                             f"prepare the data with --image-size {self.config['image_size']}")
        if obs["instruction"].shape[-1] != self.config["text_dim"]:
            raise InputError(f"policy expects instruction embeddings of width {self.config['text_dim']}, got "
                             f"{obs['instruction'].shape[-1]}: same --text-encoder for all stages")
        if self.config["proprio_dim"] and "proprio" not in obs:
            raise InputError("policy was finetuned with proprioception, observation has none")
        return self.features(obs)

    def latent_actions(self, obs):
        """z_t ... z_t+n-1 from o_t and the instruction alone: obs -> (B, n, Z) in (-1, 1), differentiable
        (Sec. III-A)."""
        if self.config["head"] == "action":
            raise InputError("this policy has no latent actions left (its last layer was re-initialised for "
                             "actions): give the pretrained checkpoint")
        z = self.latent_norm(self.latent_out(self.head(self.encode(obs))))            # (B, n*Z)
        return torch.tanh(z).view(-1, self.chunk, self.config["latent_dim"])

    def _mean_action(self, obs):
        """Normalised actions (B, n, A) in (-1, 1)."""
        if self.config["head"] == "action":
            x = self.head(self.encode(obs))
        else:
            x = self.latent_actions(obs).flatten(1)
        return torch.tanh(self.action_out(x)).view(-1, self.chunk, self.config["action_dim"])

    def loss(self, batch):
        """Negative log-likelihood of the demonstrated actions: batch -> scalar, {name: float}.

        L = - E log N(a_t:t+n | mu(o_t, instruction), std^2)                                        (Eq. 6)
        batch {"obs", "actions" (B, n, A) in the data's units, "is_pad" (B, n)}; padded steps count nowhere.
        """
        target = self.action_norm.normalize(batch["actions"])
        mu = self._mean_action(batch["obs"])
        nll = 0.5 * ((target - mu) / self.STD) ** 2 + math.log(self.STD * math.sqrt(2 * math.pi))  # (B, n, A)
        loss = masked_mean(nll.mean(-1), batch["is_pad"])
        with torch.no_grad():
            l1 = masked_mean((target - mu).abs().mean(-1), batch["is_pad"])
        return loss, {"nll": loss.item(), "l1": l1.item()}

    @torch.no_grad()
    def act(self, obs):
        """Chunk of actions in the environment's units: obs -> (B, n, A). The policy must be in eval mode."""
        assert not self.training, "act() is for rollouts: call policy.eval() first"
        return self.action_norm.unnormalize(self._mean_action(obs))


class BAKU(Policy):
    """BAKU (Haldar et al. 2024) as LAWM uses it: tokens -> transformer -> action token -> chunk of n actions.

    tokens  [instruction, one image token per camera, proprio if any, action token]; one shared ResNet sees
            the images, told apart by a camera embedding; the instruction modulates it (FiLM), is a token too.
    UPSTREAM: causal attention; without history and with the action token last it changes nothing we read.
    """
    SIZES = {"paper": dict(width=256, layers=8, heads=4, channels=64, dropout=0.1),     # about 7M parameters
             "tiny": dict(width=128, layers=3, heads=4, channels=32, dropout=0.1)}      # for two CPU cores

    def __init__(self, config):
        super().__init__(config)
        width = config["width"]
        self.instruction_encoder = nn.Linear(config["text_dim"], width)
        self.image_encoder = ResNet18FiLM(config["image_size"], config["channels"], width)
        # By position, not by name: camera 0 is the main view in every dataset, whatever it is called there.
        self.camera_embedding = nn.ParameterList([nn.Parameter(0.02 * torch.randn(width))
                                                  for _ in self.cameras])
        if config["proprio_dim"]:
            self.proprio_encoder = nn.Sequential(nn.Linear(config["proprio_dim"], width), nn.ReLU(),
                                                 nn.Linear(width, width))
        self.action_token = nn.Parameter(0.02 * torch.randn(width))
        self.trunk = nn.Sequential(*[TransformerBlock(width, config["heads"], config["dropout"])
                                     for _ in range(config["layers"])])

    def features(self, obs):
        instruction = self.instruction_encoder(obs["instruction"])                    # (B, E)
        b = len(instruction)
        images = torch.cat([obs["images"][c] for c in self.cameras])                  # (cameras*B, 3, H, W)
        seen = self.image_encoder(images, instruction.repeat(len(self.cameras), 1))   # (cameras*B, E)
        tokens = [instruction] + [x + e for x, e in zip(seen.split(b), self.camera_embedding)]
        if self.config["proprio_dim"]:
            proprio = self.proprio_encoder(self.proprio_norm.normalize(obs["proprio"]))
            if self.training and self.config["proprio_dropout"]:
                # Whole token, per sample: else the policy dead-reckons from its own pose and stops looking.
                keep = torch.rand(b, 1, device=proprio.device) >= self.config["proprio_dropout"]
                proprio = proprio * keep
            tokens.append(proprio)
        tokens.append(self.action_token.expand(b, -1))
        return self.trunk(torch.stack(tokens, 1))[:, -1]                              # (B, tokens, E)->(B, E)


POLICIES = {"baku": BAKU}


def make_policy(config):
    """A fresh policy from its plain-data config."""
    return POLICIES[config["policy"]](config)


def masked_mean(x, is_pad):
    """Mean of x (B, n) over the steps that are not padding: the denominator counts valid steps only."""
    assert x.shape == is_pad.shape, (f"values {tuple(x.shape)} and padding {tuple(is_pad.shape)} "
                                     "differ in shape")
    valid = (~is_pad).to(x.dtype)
    return (x * valid).sum() / valid.sum().clamp(min=1)


# ---- 6 world model ---------------------------------------------------------------------------------------

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


class ToImage(nn.Module):
    """(B, 16 C) -> (B, C, 4, 4), channels last in memory."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x.view(-1, 4, 4, self.channels).permute(0, 3, 1, 2)


class WorldModel(nn.Module):
    """RSSM with convolutional encoder and decoder, trained to predict o_t+1 ... o_t+n from o_t and n actions.

    It takes any action tensor (B, n, Z): latent, true, shuffled or zero. o_t is context (its posterior starts
    the roll), then every action acts, the first one included.
    UPSTREAM: the release starts at o_t+1 and zeroes the first action, so z_t is never used; and it copies the
    actions with torch.tensor(), which detaches them: no gradient reaches the policy.

    config {"size": name in WORLD_MODEL_SIZES, "image_size": 2^k, "action_dim": Z, "predict", "motion_weight",
    "free_bits", "decode_steps"}:
        predict        posterior  reconstruct from states that have seen the frame (the paper, DreamerV3)
                       prior      reconstruct open loop: from o_t and the actions alone
                       both       sum of the two
        motion_weight  extra weight of pixels that differ from o_t (0 = the paper)
        free_bits      nats of KL that cost nothing (1 = DreamerV3)
        decode_steps   frames per window that are decoded in a training step, drawn at random (0 = all n, the
                       paper): same expectation of the loss and its gradient, at less than half the cost
    """
    DYN_SCALE, REP_SCALE = 0.5, 0.1      # KL balancing (UPSTREAM: the same)

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = WORLD_MODEL_SIZES[config["size"]]
        stages = int(math.log2(config["image_size"])) - 2                             # down to 4 x 4
        if 4 * 2 ** stages != config["image_size"] or not 2 <= stages <= 5:
            raise InputError("the world model takes images of 16, 32, 64 or 128 pixels, "
                             f"got {config['image_size']}")
        # ASSUMPTION: normalised over channels and pixels together (DreamerV3: RMS per pixel): a fused kernel.
        # DreamerV3's multipliers for 64 pixels; ASSUMPTION: a thin stage more for 128 (paper: not said).
        channels = [size["depth"] * m for m in (1, 2, 3, 4, 4)[-stages:]]
        layers, c_in = [], 3
        for c in channels:
            layers += [nn.Conv2d(c_in, c, 4, 2, 1, bias=False), nn.GroupNorm(1, c), nn.SiLU()]
            c_in = c
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        self.rssm = RSSM(size, 16 * c_in, config["action_dim"])
        layers = [nn.Linear(size["deter"] + size["stoch"] * size["classes"], 16 * c_in), ToImage(c_in)]
        for c in channels[-2::-1]:
            layers += [nn.ConvTranspose2d(c_in, c, 4, 2, 1, bias=False), nn.GroupNorm(1, c), nn.SiLU()]
            c_in = c
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(c_in, 3, 4, 2, 1), nn.Sigmoid())
        self.to(memory_format=torch.channels_last)                                    # twice as fast on a CPU

    def embed(self, images):
        """(B, T, 3, H, W) uint8 -> (B, T, embed)."""
        b, t = images.shape[:2]
        x = (images.flatten(0, 1).float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)
        return self.encoder(x).view(b, t, -1)

    def decode(self, state):
        """State of (..., D), (..., S, K) -> frames (..., 3, H, W) in [0, 1]."""
        features = torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)
        lead = features.shape[:-1]
        return self.decoder(features.flatten(0, -2)).unflatten(0, lead)

    def context(self, embed):
        """Posterior of the first frame, (B, embed) -> state: where every roll starts."""
        start = self.rssm.initial(len(embed), embed.device)
        return self.rssm.posterior(start["deter"], embed)

    def observe(self, images, actions):
        """Filter: (B, n+1, 3, H, W) uint8, (B, n, Z) -> start state (B, ...), posteriors and priors of
        k = 1 ... n (B, n, ...)."""
        assert images.shape[1] == actions.shape[1] + 1, (
            f"{images.shape[1]} frames need {images.shape[1] - 1} actions, got {actions.shape[1]}")
        embed = self.embed(images)
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

    def losses(self, images, actions, predict=None, decode_steps=None):
        """Every term before reduction: {name: (B, n)}; total() adds them up. Defaults are the config's."""
        predict = predict or self.config["predict"]
        n = actions.shape[1]
        decode_steps = min(n, (self.config["decode_steps"] if decode_steps is None else decode_steps) or n)
        start, posteriors, priors = self.observe(images, actions)
        drawn = torch.randperm(n, device=images.device)[:decode_steps]                # which frames are drawn
        context, future = images[:, :1].float() / 255, images[:, 1 + drawn].float() / 255  # (B, 1|m, 3, H, W)
        # DEVIATION: pixels that differ from o_t weigh more: most of a picture is table.
        weight = (1 + self.config["motion_weight"]
                  * (future - context).abs().mean(2, keepdim=True))                   # (B, m, 1, H, W)

        def spread(error):                                                  # (B, m) -> (B, n), the rest is 0
            return error.new_zeros(len(error), n).index_copy(1, drawn, error * (n / decode_steps))

        # ASSUMPTION: o_t itself is drawn as well (DreamerV3 draws every frame): the scene must come from the
        # context, so that the latents are left with what changes in it.
        error = (self.decode(start) - context[:, 0]) ** 2                             # (B, 3, H, W)
        terms = {"context": error.sum((1, 2, 3))[:, None].expand(-1, n)}              # (B, n), all the same
        if predict in ("posterior", "both"):
            error = (self.decode({k: v[:, drawn] for k, v in posteriors.items()})
                     - future) ** 2                                                   # (B, m, 3, H, W)
            terms["recon"] = spread((weight * error).sum((2, 3, 4)))    # (Eq. 4) decoder, (Eq. 5) first term
        if predict in ("prior", "both"):
            # DEVIATION: the open-loop term. From the posterior alone a frame can be drawn without its action:
            # the posterior has seen it; only the KL then asks for actions, below the free bits not even that.
            imagined = self.imagine(start, actions)
            error = (self.decode({k: v[:, drawn] for k, v in imagined.items()})
                     - future) ** 2                                                   # (B, m, 3, H, W)
            terms["open_loop"] = spread((weight * error).sum((2, 3, 4)))
            terms["open_loop_plain"] = spread(error.detach().sum((2, 3, 4)))          # unweighted, for report
        post, prior = posteriors["logits"], priors["logits"]                # (B, n, S, K)
        terms["kl_dyn"] = kl_categorical(post.detach(), prior)              # moves the prior to what was seen
        terms["kl_rep"] = kl_categorical(post, prior.detach())              # keeps the posterior predictable
        return terms

    def loss(self, images, actions, is_pad):
        """Negative evidence bound of the video given the actions (Eq. 5) -> scalar, {name: float}.

        images  (B, n+1, 3, H, W) uint8   o_t ... o_t+n
        actions (B, n, Z)                 gradients flow into them: this is how pretraining teaches the policy
        is_pad  (B, n) bool               True where o_k+1 is a repeated last frame; those steps count nowhere
        L = |o_t - ^o_t|^2 + mean_k |o_k - ^o_k|^2
            + 0.5 max(1, KL[sg q || p]) + 0.1 max(1, KL[q || sg p])                                 (Eq. 5)
        """
        terms = self.losses(images, actions)
        logs = {name: masked_mean(term, is_pad).item() for name, term in terms.items()}
        return masked_mean(self.total(terms), is_pad), logs

    def total(self, terms):
        """The weighted sum of (Eq. 5), step by step: {name: (B, n)} -> (B, n)."""
        free = self.config["free_bits"]
        kl = (self.DYN_SCALE * terms["kl_dyn"].clamp(min=free)
              + self.REP_SCALE * terms["kl_rep"].clamp(min=free))
        return kl + sum(terms[name] for name in ("context", "recon", "open_loop") if name in terms)


# ---- 7 chunk execution -----------------------------------------------------------------------------------


class ActionChunker:
    """Chunks of n actions -> one action per step. No state lives in the policy: reset() before every episode.

    execute = h     ask the policy every h steps and execute the first h of n, open loop
    execute = None  ask at every step and average what all live chunks say about now (temporal ensembling, ACT
                    / BAKU): weight exp(-decay * i), i = 0 for the oldest. UPSTREAM: decay 0, a plain mean.
    """

    def __init__(self, chunk, execute=None, decay=0.01):
        if execute is not None and not 1 <= execute <= chunk:
            raise InputError(f"--execute takes 1 to {chunk} (the policy's chunk length), got {execute}")
        self.chunk, self.execute, self.decay = chunk, execute, decay
        self.reset()

    def reset(self):
        self.live = []          # [chunk (n, A), age], oldest first

    def step(self, ask):
        """ask() -> (n, A) is called only when a new chunk is needed. -> action (A,)."""
        if self.asks:
            self.live.append([np.asarray(ask()), 0])
        now = np.stack([c[age] for c, age in self.live])                              # (live chunks, A)
        weights = np.exp(-self.decay * np.arange(len(now)))
        self.live = [[c, age + 1] for c, age in self.live if age + 1 < (self.execute or self.chunk)]
        return (weights[:, None] * now).sum(0) / weights.sum()

    @property
    def asks(self):
        """Whether the next step() will ask for a chunk: an observation is needed for that alone."""
        return self.execute is None or not self.live


# ---- 8 checkpoints ---------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Bytes to path.tmp, then moved: a reader sees the old file or the new one. OSError (disk full)."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise


def save_checkpoint(path, checkpoint):
    """Write a dict of plain data and tensors, atomically; it loads with weights_only."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)           # to memory: torch's own writer hides that the disk is full
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """-> dict. InputError names the file when it is absent or not one of ours; nothing in it is executed."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}: run the stage before this one, or name it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage = checkpoint["stage"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError,
            AttributeError) as e:
        raise InputError(f"{path} is not a checkpoint of this project: expected the last.pt of pretrain.py "
                         f"or finetune.py ({type(e).__name__} while loading)") from e
    assert stage in ("pretrain", "finetune"), stage
    return checkpoint


def load_policy(path, device="cpu"):
    """-> policy in eval mode, checkpoint. The architecture is the file's; weights must fit it."""
    checkpoint = load_checkpoint(path)
    broken = [k for k, v in checkpoint["policy"].items() if not v.isfinite().all()]
    if broken:
        raise InputError(f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): "
                         "its training diverged, train again")
    policy = make_policy(checkpoint["config"])
    fit = policy.load_state_dict(checkpoint["policy"], strict=False)
    if fit.missing_keys or fit.unexpected_keys:
        raise InputError(f"{path} does not fit its own config: missing {fit.missing_keys[:3]}, "
                         f"unexpected {fit.unexpected_keys[:3]}")
    return policy.to(device).eval(), checkpoint


def init_from_pretrained(policy, weights, path):
    """Copy pretrained weights into a policy for finetuning -> {"loaded" | "new" | "unused": [names]}.

    Only what finetuning must add may be new (last layer, further cameras, proprioception, normalisation),
    only the latent layer may be left over; all else means another architecture: InputError with the names.
    UPSTREAM: the release copies the last layer, too, when the widths agree; it skips what does not fit with a
    warning, and on errors it silently starts from scratch.
    """
    own = policy.state_dict()
    may_be_new = ("action_out.", "action_norm.", "proprio_norm.", "proprio_encoder.", "camera_embedding.")
    may_be_unused = ("latent_out.", "latent_norm.", "action_out.", "action_norm.")
    reinit = [k for k in own if k.startswith(("action_out.", "action_norm."))]        # never taken over
    loaded = [k for k in own if k in weights and k not in reinit and own[k].shape == weights[k].shape]
    new = [k for k in own if k not in loaded]
    unused = [k for k in weights if k not in loaded]
    wrong = [k for k in new if not k.startswith(may_be_new) or (k in weights and k not in reinit)]
    wrong += [k for k in unused if not k.startswith(may_be_unused) and k not in wrong]
    if wrong:
        k = wrong[0]
        shapes = [tuple(w[k].shape) if k in w else "absent" for w in (weights, own)]
        raise InputError(f"{path} is of another architecture: {len(wrong)} tensors do not fit, first {k}: "
                         f"{shapes[0]} in the file, {shapes[1]} here")
    policy.load_state_dict({**own, **{k: weights[k] for k in loaded}})
    return {"loaded": loaded, "new": new, "unused": unused}


# ---- 9 runs ----------------------------------------------------------------------------------------------


def open_run(args, free):
    """May the run folder args.out be used? -> checkpoint to go on from, or None (fresh run). Writes nothing.

    A run that exists is never overwritten unless --overwrite says so. --resume takes the same flags as the
    run it goes on with, but for the names in `free`, which change no result. The device and the number of
    threads do: sums are added up in another order. On a CPU the result is the same to the bit; some CUDA
    kernels are not deterministic.
    """
    out, last = Path(args.out), Path(args.out) / "last.pt"
    if args.resume and last.exists():
        checkpoint = load_checkpoint(last)
        for name, value in vars(args).items():
            if name not in free and value != checkpoint["args"].get(name):
                raise InputError(f"{last} was made with --{name.replace('_', '-')} "
                                 f"{checkpoint['args'].get(name)}, now it is {value}: give --resume the same "
                                 "flags, or another --out")
        return checkpoint
    if args.resume and not out.exists():
        raise InputError(f"nothing to resume in {out}: leave --resume out, or name the run with --out")
    held = any((out / name).exists() for name in ("last.pt", "metrics.jsonl"))
    if held and not (args.overwrite or args.resume):
        raise InputError(f"{out} already holds a run: --resume goes on with it, --overwrite throws it away, "
                         "--out puts this one elsewhere")
    return None


class Log:
    """One line per call: on the screen, in metrics.jsonl and to TensorBoard.

    Opening it begins the run: at step 0 the files of an earlier run go, later only the lines after `start`.
    """

    def __init__(self, out, start):
        self.path = Path(out) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not start:
            (Path(out) / "last.pt").unlink(missing_ok=True)
            shutil.rmtree(Path(out) / "tensorboard", ignore_errors=True)
        lines = self.path.read_text().splitlines() if start else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self.board = SummaryWriter(Path(out) / "tensorboard", purge_step=start + 1 if start else None)

    def __call__(self, step, metrics):
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        tqdm.write(f"step {step:6,} | " + " | ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def to_device(tree, device):
    """Nested dict of tensors -> the same on the device."""
    return {k: to_device(v, device) if isinstance(v, dict) else v.to(device, non_blocking=True)
            for k, v in tree.items()}


def by_position(obs, cameras):
    """The same observation with its cameras under the policy's names. They go by position: camera 0 is the
    main view in every dataset, whatever it is called there."""
    return {**obs, "images": dict(zip(cameras, obs["images"].values()))}


def at_least(args, low, *names):
    """InputError for the first of these flags that is smaller than low."""
    for name in names:
        if getattr(args, name) is not None and not low <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} takes {low} or more, got {getattr(args, name)}")


def pick_device(name):
    """Name of a device -> torch.device. InputError when this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"no device {name!r} here ({str(e).splitlines()[0][:80]}): --device cpu") from e
    return device


def policy_numbers(policy, size):
    """Widths and depths of a named size of a policy, from its SIZES. InputError names those there are."""
    sizes = POLICIES[policy].SIZES
    if size not in sizes:
        raise InputError(f"--policy-size of {policy} is one of {', '.join(sizes)}; got {size}")
    return sizes[size]


def probe_r2(x_train, y_train, x_test, y_test, ridge=1e-2):
    """Linear probe: ridge regression x (N, dx) -> y (N, dy), R2 per column of y on the test rows -> (dy,).

    Columns are standardised on the training rows; columns of y that are constant there come back as nan.
    """
    mx, sx, my, sy = x_train.mean(0), x_train.std(0) + 1e-8, y_train.mean(0), y_train.std(0)
    x, y = (x_train - mx) / sx, (y_train - my) / np.where(sy > 1e-8, sy, 1)
    w = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    residual = (y_test - my) / np.where(sy > 1e-8, sy, 1) - ((x_test - mx) / sx) @ w
    total = ((y_test - y_test.mean(0)) / np.where(sy > 1e-8, sy, 1)) ** 2
    varies = (sy > 1e-8) & (total.sum(0) > 1e-8)
    return np.where(varies, 1 - (residual ** 2).sum(0) / np.where(varies, total.sum(0), 1), np.nan)


def file_hash(path):
    """First 12 hex digits of the file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def provenance():
    """Where a number comes from: command, commit (with "+" if the tree has changes), versions, machine."""
    def git(*args):
        if not shutil.which("git"):
            return ""
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args],
                              capture_output=True, text=True).stdout.strip()
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": ((git("rev-parse", "--short", "HEAD") or "unknown")
                       + ("+" if git("status", "--porcelain", "-uno") else "")),
            "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                       f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"}


def count(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters())


def main():
    for name, cls in POLICIES.items():
        for size, numbers in cls.SIZES.items():
            image_size = 64 if size == "tiny" else 128
            config = dict(policy=name, cameras=["front", "side"], image_size=image_size, chunk=10,
                          text_dim=512, proprio_dim=7, action_dim=7, latent_dim=7, latent_norm=True,
                          head="action", proprio_dropout=0.0, **numbers)
            print(f"{name:12s} {size:6s} {image_size:4d} px {count(make_policy(config)):12,d} parameters")
    for size in WORLD_MODEL_SIZES:
        image_size = 64 if size in ("tiny", "1m") else 128
        with torch.device("meta"):
            model = WorldModel(dict(size=size, image_size=image_size, action_dim=7, predict="posterior",
                                    motion_weight=0, free_bits=1, decode_steps=0))
        print(f"world model  {size:6s} {image_size:4d} px {count(model):12,d} parameters: "
              f"encoder {count(model.encoder):,}, rssm {count(model.rssm):,}, "
              f"decoder {count(model.decoder):,}")


if __name__ == "__main__":
    run(main)
