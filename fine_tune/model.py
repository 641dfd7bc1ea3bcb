"""OmniGen (arXiv:2409.11340): one transformer, initialised from Phi-3, over text, input images and the noisy target.

The model runs on packs (`fine_tune.packing`): rows of many samples end to end, no batch dimension. Parameters, buffers
and configuration carry the names of diffusers' ``OmniGenTransformer2DModel``, so a state dict *is* a diffusers
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fine_tune.attention import Attend, Backend, IntervalMask, prepare
from fine_tune.embeddings import Rope, RotaryEmbedding, rotate, sincos_pos_embed, timestep_sinusoid
from fine_tune.packing import Pack, Size

CLASS_NAME = "OmniGenTransformer2DModel"

Checkpointing = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing, all of a block but its products, or all of it."""

# What selective checkpointing keeps beside matrix products.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
)
_LOW_RANK = 64  # products with an adapter of at most this rank take no time to speak of, and as much room as others

# LongRoPE factors of OmniGen-v1, one per rotary frequency (Phi-3-mini-128k; config.json of the published checkpoint).
# fmt: off
SHORT_FACTOR = (
    1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.2500000000000002, 1.2500000000000002, 1.4000000000000004, 1.4500000000000004,
    1.5500000000000005, 1.8500000000000008, 1.9000000000000008, *[2.000000000000001] * 19, 2.1000000000000005,
    2.1000000000000005, 2.2, 2.3499999999999996, 2.3499999999999996, 2.3499999999999996, 2.3499999999999996,
    2.3999999999999995, 2.3999999999999995, 2.6499999999999986, 2.6999999999999984, 2.8999999999999977,
    2.9499999999999975, 3.049999999999997, 3.049999999999997, 3.049999999999997,
)
LONG_FACTOR = (
    1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968,
    1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525,
    1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164, 5.489999771118164,
    9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355, 15.789999961853027,
    18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203, 32.35000228881836,
    32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156, 56.20000457763672,
    57.95000457763672, 59.29000473022461, 59.77000427246094, 59.920005798339844, 61.190006256103516,
    61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086, 63.48000717163086, 63.66000747680664,
    63.850006103515625, 64.08000946044922, 64.760009765625, 64.80001068115234, 64.81001281738281, 64.81001281738281,
)
# fmt: on


Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the keys and values [R, H_kv, K] of the computed rows, gives those to attend to."""


def _omnigen_rope_scaling() -> dict[str, Any]:
    return {"long_factor": list(LONG_FACTOR), "short_factor": list(SHORT_FACTOR), "type": "su"}


@dataclass(frozen=True)
class OmniGenConfig:
    """The fields of diffusers' ``OmniGenTransformer2DModel`` config; defaults are OmniGen-v1 (3.76 B parameters).

    Raises:
        ValueError: sizes that do not fit together, or a variant of the time embedding that OmniGen does not use.
    """

    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 3072
    rms_norm_eps: float = 1e-5
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    intermediate_size: int = 8192
    num_layers: int = 32
    pad_token_id: int = 32000
    vocab_size: int = 32064
    max_position_embeddings: int = 131072
    original_max_position_embeddings: int = 4096
    rope_base: int = 10000
    rope_scaling: dict[str, Any] = field(default_factory=_omnigen_rope_scaling)
    pos_embed_max_size: int = 192
    time_step_dim: int = 256
    flip_sin_to_cos: bool = True
    downscale_freq_shift: int = 0
    timestep_activation_fn: str = "silu"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads} and "
                f"num_key_value_heads {self.num_key_value_heads} must divide one another"
            )
        for name in ("short_factor", "long_factor"):
            if len(self.rope_scaling[name]) != self.head_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {len(self.rope_scaling[name])} entries, but head_dim {self.head_dim} "
                    f"needs {self.head_dim // 2}"
                )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside of the vocabulary of {self.vocab_size}")
        if (self.flip_sin_to_cos, self.downscale_freq_shift, self.timestep_activation_fn) != (True, 0, "silu"):
            raise ValueError("only flip_sin_to_cos=True, downscale_freq_shift=0, timestep_activation_fn='silu' exist")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniGenConfig:
        """From the contents of a diffusers ``config.json``; ValueError on another class or an unknown field."""
        if values.get("_class_name", CLASS_NAME) != CLASS_NAME:
            raise ValueError(f"config.json describes a {values['_class_name']}, not a {CLASS_NAME}")
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in the {CLASS_NAME} config: {', '.join(unknown)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": CLASS_NAME, **asdict(self)}


class RMSNorm(nn.Module):
    """Root-mean-square norm in the dtype of its input (statistics in fp32). CUDA's autocast would make it all fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class TimestepEmbedding(nn.Module):
    """Two-layer MLP over the sinusoidal embedding of t."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        """float32 [S] in [0, 1] -> [S, D]. Not autocast: t and its sinusoid are never rounded below the weights."""
        with torch.autocast(timestep.device.type, enabled=False):
            embedded = timestep_sinusoid(timestep, self.linear_1.in_features).to(self.linear_1.weight.dtype)
            return self.linear_2(F.silu(self.linear_1(embedded)))


class PatchEmbedding(nn.Module):
    """2 x 2 latents -> one token, with separate projections for input images and the noisy target.

    All images of a sample share one centred grid of position embeddings; RoPE tells them apart.
    """

    pos_embed: Tensor

    def __init__(self, config: OmniGenConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.patch_size, self.max_size = p, config.pos_embed_max_size
        self.output_image_proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)
        self.input_image_proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)
        self.register_buffer("pos_embed", sincos_pos_embed(config.hidden_size, self.max_size)[None])

    def forward(self, latents: list[Tensor], sizes: list[Size], projection: nn.Conv2d) -> Tensor:
        """[C, h, w] latents of the given sizes in patches -> [sum of patches, D]."""
        if [latent.shape[1:] for latent in latents] != [(h * self.patch_size, w * self.patch_size) for h, w in sizes]:
            raise ValueError(
                f"latents of shapes {[tuple(latent.shape) for latent in latents]} do not belong to a pack with images "
                f"of {sizes} patches"
            )
        # A strided convolution is a matrix product per patch: one for all images instead of one call per image. It
        # also runs on no image at all, so that every parameter has a gradient in every step (DDP counts on it).
        weight = projection.weight.flatten(1)
        per_image = [F.pixel_unshuffle(latent, self.patch_size).flatten(1).T for latent in latents]
        patches = torch.cat([weight.new_zeros(0, weight.shape[1]), *per_image]).to(weight.dtype)
        positions = torch.cat([self.pos_embed[0, :0], *(self._position(size) for size in sizes)])
        return F.linear(patches, weight, projection.bias) + positions

    def _position(self, size: Size) -> Tensor:
        h, w = size
        if max(h, w) > self.max_size:
            limit = self.max_size * self.patch_size * 8
            raise ValueError(
                f"image of {h} x {w} patches is larger than the position grid of {self.max_size} x {self.max_size} "
                f"({limit} x {limit} pixels); resize it"
            )
        top, left = (self.max_size - h) // 2, (self.max_size - w) // 2
        grid = self.pos_embed.view(self.max_size, self.max_size, -1)
        return grid[top : top + h, left : left + w].flatten(0, 1)


class Attention(nn.Module):
    def __init__(self, config: OmniGenConfig) -> None:
        super().__init__()
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.to_q = nn.Linear(size, size, bias=False)
        self.to_k = nn.Linear(size, kv_size, bias=False)
        self.to_v = nn.Linear(size, kv_size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(size, size, bias=False)])

    def forward(self, x: Tensor, rope: Rope, attend: Attend, exchange: Exchange | None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(q, rope), rotate(k, rope)
        if exchange is not None:
            k, v = exchange(k, v)
        return self.to_out[0](attend(q, k, v).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: OmniGenConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing: keep outputs of matrix products and attention, nearly all of the time of a block."""
    if operation is torch.ops.aten.mm.default:
        is_kept = min(args[0].shape[1], args[1].shape[1]) > _LOW_RANK
    else:
        is_kept = operation in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """One transformer layer. Recomputation is inside of it, so that it is compiled and sharded with the block."""

    def __init__(self, config: OmniGenConfig) -> None:
        super().__init__()
        self.checkpointing: Checkpointing = "none"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, attend: Attend, exchange: Exchange | None = None) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._compute(x, rope, attend, exchange)
        keep: dict[str, Any] = {}
        if self.checkpointing == "selective":
            keep["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(self._compute, x, rope, attend, exchange, use_reentrant=False, **keep)

    def _compute(self, x: Tensor, rope: Rope, attend: Attend, exchange: Exchange | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, exchange)
        return x + self.mlp(self.post_attention_layernorm(x))


class AdaLayerNorm(nn.Module):
    """LayerNorm without weights, shifted and scaled in float32 by the time embedding of each row's draw."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2 * size)

    def forward(self, x: Tensor, time: Tensor, draw: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(time)).float().chunk(2, dim=1)
        return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale[draw]) + shift[draw]).to(x.dtype)


class OmniGen(nn.Module):
    """Predicts the velocity x - ε of every noisy target in a pack.

    The residual stream keeps one dtype from the embedding to the last block: that of the parameters, or autocast's.
    Time and RoPE tables stay float32; under FSDP2, `MixedPrecisionPolicy` needs ``cast_forward_inputs=False``.

    Attributes:
        attention_backend: see `fine_tune.attention.prepare`.
    """

    def __init__(self, config: OmniGenConfig, attention_backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        size = config.hidden_size
        self.patch_embedding = PatchEmbedding(config)
        self.time_token = TimestepEmbedding(config.time_step_dim, size)
        self.t_embedder = TimestepEmbedding(config.time_step_dim, size)
        self.embed_tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.rope = RotaryEmbedding(
            head_dim=config.head_dim,
            base=config.rope_base,
            short_factor=config.rope_scaling["short_factor"],
            long_factor=config.rope_scaling["long_factor"],
            max_positions=config.max_position_embeddings,
            original_max_positions=config.original_max_position_embeddings,
        )
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.norm_out = AdaLayerNorm(size)
        self.proj_out = nn.Linear(size, config.patch_size**2 * config.in_channels)

    def forward(
        self, pack: Pack, input_latents: list[Tensor], noisy_latents: list[Tensor], timestep: Tensor
    ) -> list[Tensor]:
        """Velocities of all targets.

        Args:
            pack: the layout, on the device of the model.
            input_latents: [C, h, w] per entry of ``pack.input_sizes``.
            noisy_latents: [C, h, w] per draw, at time t.
            timestep: float32 [S] in [0, 1]; 0 is noise, 1 is data.

        Returns:
            [C, h, w] per draw, in the dtype of the residual stream.

        Raises:
            ValueError: latents that do not belong to the pack or are larger than the position grid, or a timestep
                that is not float32 [S].
        """
        condition, condition_rows = self._embed_condition(pack, input_latents)
        generated, generated_rows = self._embed_generated(pack, noisy_latents, timestep)
        hidden, _ = _in_row_order([condition, generated], [condition_rows, generated_rows])
        rope = self.rope(pack.position_ids, pack.use_long_rope)
        hidden = self._run_blocks(hidden, rope, self._prepare(pack.mask))
        return self._velocities(pack, hidden[pack.target_rows], timestep)

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        """What the backward pass computes again of every block."""
        for block in self.layers:
            block.checkpointing = checkpointing  # type: ignore[assignment]

    def encode_condition(self, pack: Pack, input_latents: list[Tensor]) -> ConditionCache:
        """Keys and values of all condition rows, which see neither the time nor the noisy target.

        Returns:
            What `forward_cached` needs to compute exactly what `forward` does, at every step.
        """
        hidden, rows = self._embed_condition(pack, input_latents)
        cache = ConditionCache(rows, len(pack.token_ids))
        rope = self.rope(pack.position_ids[rows], pack.use_long_rope[rows])
        attend = self._prepare(pack.mask.compact(rows))
        self._run_blocks(hidden, rope, attend, [cache.record] * len(self.layers))
        return cache

    def forward_cached(
        self, pack: Pack, cache: ConditionCache, noisy_latents: list[Tensor], timestep: Tensor
    ) -> list[Tensor]:
        """`forward` of which only the time and target rows are computed; for sampling, without gradients."""
        hidden, rows = self._embed_generated(pack, noisy_latents, timestep)
        rope = self.rope(pack.position_ids[rows], pack.use_long_rope[rows])
        attend = self._prepare(pack.mask.rows(rows))
        exchanges = [cache.joined(layer, rows) for layer in range(len(self.layers))]
        hidden = self._run_blocks(hidden, rope, attend, exchanges)
        return self._velocities(pack, hidden[torch.searchsorted(rows, pack.target_rows)], timestep)

    def _embed_condition(self, pack: Pack, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
        text = self.embed_tokens(pack.token_ids[pack.text_rows])
        images = self.patch_embedding(latents, pack.input_sizes, self.patch_embedding.input_image_proj)
        dtype = self._stream_dtype()
        return _in_row_order([text.to(dtype), images.to(dtype)], [pack.text_rows, pack.input_rows])

    def _embed_generated(self, pack: Pack, latents: list[Tensor], timestep: Tensor) -> tuple[Tensor, Tensor]:
        if timestep.dtype != torch.float32 or timestep.shape != pack.time_rows.shape:
            raise ValueError(
                f"timestep is {timestep.dtype} {list(timestep.shape)}, not float32 {list(pack.time_rows.shape)}"
            )
        time = self.time_token(timestep)
        patches = self.patch_embedding(latents, pack.target_sizes, self.patch_embedding.output_image_proj)
        dtype = self._stream_dtype()
        return _in_row_order([time.to(dtype), patches.to(dtype)], [pack.time_rows, pack.target_rows])

    def _prepare(self, mask: IntervalMask) -> Attend:
        return prepare(mask, self.attention_backend)

    def _stream_dtype(self) -> torch.dtype:
        weight = self.embed_tokens.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def _run_blocks(
        self, hidden: Tensor, rope: Rope, attend: Attend, exchanges: list[Exchange] | None = None
    ) -> Tensor:
        for index, block in enumerate(self.layers):
            hidden = block(hidden, rope, attend, exchanges[index] if exchanges else None)
        return hidden

    def _velocities(self, pack: Pack, hidden: Tensor, timestep: Tensor) -> list[Tensor]:
        hidden = self.norm_out(self.norm(hidden), self.t_embedder(timestep), pack.target_draw)
        patches = self.proj_out(hidden).split([h * w for h, w in pack.target_sizes])
        return [self._unpatchify(x, size) for x, size in zip(patches, pack.target_sizes, strict=True)]

    def _unpatchify(self, patches: Tensor, size: Size) -> Tensor:
        p = self.config.patch_size
        grid = patches.unflatten(0, size).unflatten(-1, (p, p, -1))  # [h, w, p, p, C]
        return grid.permute(4, 0, 2, 1, 3).reshape(-1, p * size[0], p * size[1])  # no view: FSDP2 warns of them


class ConditionCache:
    """Keys and values of the condition rows of one pack, for all layers; made by `OmniGen.encode_condition`."""

    def __init__(self, rows: Tensor, total_rows: int) -> None:
        self.rows = rows
        self.total_rows = total_rows
        self.layers: list[tuple[Tensor, Tensor]] = []

    def record(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((k, v))
        return k, v

    def joined(self, layer: int, rows: Tensor) -> Exchange:
        """An exchange that puts computed ``rows`` and the cached ones of ``layer`` at their places in the pack."""

        def join(cached: Tensor, computed: Tensor) -> Tensor:
            whole = computed.new_empty(self.total_rows, *computed.shape[1:])
            return whole.index_copy_(0, self.rows, cached).index_copy_(0, rows, computed)

        return lambda k, v: (join(self.layers[layer][0], k), join(self.layers[layer][1], v))


def _in_row_order(parts: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate token groups and sort them by row: ([R, D], rows int64 [R] ascending)."""
    all_rows, order = torch.cat(rows).sort()
    return torch.cat(parts)[order], all_rows
