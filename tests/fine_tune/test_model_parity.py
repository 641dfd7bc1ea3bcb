"""Our packed model against diffusers' OmniGenTransformer2DModel, sample by sample, and against itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import OmniGenTransformer2DModel
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from fine_tune.attention import Backend
from fine_tune.model import Checkpointing, OmniGen, OmniGenConfig
from fine_tune.packing import Pack, Sequence, pack

SHORT_ROPE_LENGTH = 64

CONFIG = OmniGenConfig(
    hidden_size=96,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=128,
    num_layers=3,
    vocab_size=80,
    pad_token_id=0,
    max_position_embeddings=2048,
    original_max_position_embeddings=SHORT_ROPE_LENGTH,
    rope_scaling={
        "short_factor": [1.0 + 0.05 * i for i in range(12)],
        "long_factor": [1.1 + 0.9 * i for i in range(12)],
        "type": "su",
    },
    pos_embed_max_size=72,
    time_step_dim=32,
)


@dataclasses.dataclass
class Sample:
    """A sequence with the tensors that the model takes beside it."""

    sequence: Sequence
    inputs: list[Tensor]
    noisy: Tensor
    timestep: float


def make_sample(seed: int, text: int, inputs: list[tuple[int, int]], target: tuple[int, int]) -> Sample:
    """A prompt of ``text`` words with images (sizes in patches) spread through it."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    words = rng.integers(1, CONFIG.vocab_size, text)
    pieces, spans = [words[:2]], []
    for h, w in inputs:
        start = sum(map(len, pieces))
        spans.append((start, start + h * w))
        pieces += [np.zeros(h * w, np.int64), rng.integers(1, CONFIG.vocab_size, 2)]
    pieces.append(words[2:])

    def latents(size: tuple[int, int]) -> Tensor:
        return torch.randn(4, 2 * size[0], 2 * size[1], generator=generator)

    return Sample(
        Sequence(np.concatenate(pieces), spans, inputs, target),
        [latents(size) for size in inputs],
        latents(target),
        float(rng.uniform()),
    )


SAMPLES = {
    "text": make_sample(1, 9, [], (4, 6)),
    "text, long": make_sample(2, 40, [], (6, 5)),
    "1 image": make_sample(3, 6, [(3, 5)], (4, 4)),
    "2 images, long": make_sample(4, 7, [(4, 4), (5, 2)], (5, 6)),
    "3 images, long": make_sample(5, 5, [(2, 3), (6, 6), (1, 4)], (3, 7)),
    "one token over": make_sample(6, 28, [], (6, 6)),  # 28 + 1 + 36 = 65
    "exactly at the limit": make_sample(7, 27, [], (6, 6)),
}


@pytest.fixture(scope="module")
def reference() -> OmniGenTransformer2DModel:
    torch.manual_seed(0)
    config = {key: value for key, value in CONFIG.to_dict().items() if not key.startswith("_")}
    model = OmniGenTransformer2DModel(**config).eval()
    for parameter in model.parameters():  # norms and biases too, so that none of them can be forgotten
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def model(reference: OmniGenTransformer2DModel) -> OmniGen:
    ours = OmniGen(CONFIG)
    ours.load_state_dict(reference.state_dict())
    return ours


def make_pack(samples: list[Sample], pad_to: int | None = None) -> Pack:
    return pack([s.sequence for s in samples], pad_to, CONFIG.original_max_position_embeddings)


def run(model: OmniGen, samples: list[Sample], pad_to: int | None = None) -> list[Tensor]:
    timestep = torch.tensor([s.timestep for s in samples])
    inputs = [latents for s in samples for latents in s.inputs]
    return model(make_pack(samples, pad_to), inputs, [s.noisy for s in samples], timestep)


@torch.no_grad()
def run_reference(reference: OmniGenTransformer2DModel, sample: Sample) -> Tensor:
    """diffusers' own forward at batch size 1, with the dense mask written down as in the paper."""
    sequence = sample.sequence
    length = len(sequence)
    allowed = torch.ones(length, length).tril()
    for start, stop in [*sequence.image_spans, (len(sequence.token_ids) + 1, length)]:
        allowed[start:stop, start:stop] = 1
    return reference(
        hidden_states=sample.noisy[None],
        timestep=torch.tensor([sample.timestep]),
        input_ids=torch.from_numpy(sequence.token_ids)[None],
        input_img_latents=[latents[None] for latents in sample.inputs],
        input_image_sizes={0: [list(span) for span in sequence.image_spans]} if sample.inputs else {},
        attention_mask=allowed[None],
        position_ids=torch.arange(length)[None],
    ).sample[0]


def test_state_dict_is_diffusers(reference: OmniGenTransformer2DModel) -> None:
    ours, theirs = OmniGen(CONFIG).state_dict(), reference.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert torch.equal(ours["patch_embedding.pos_embed"], theirs["patch_embedding.pos_embed"])


def test_default_config_is_omnigen_v1() -> None:
    with torch.device("meta"):
        model = OmniGen(OmniGenConfig())
    assert sum(p.numel() for p in model.parameters()) == 3_762_072_592
    assert model.patch_embedding.pos_embed.shape == (1, 192 * 192, 3072)


def test_config_round_trip_and_errors() -> None:
    assert OmniGenConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="describes a FluxTransformer2DModel"):
        OmniGenConfig.from_dict({"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(ValueError, match=r"unknown fields.*depth"):
        OmniGenConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="short_factor has 48 entries, but head_dim 32 needs 16"):
        OmniGenConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match="flip_sin_to_cos"):
        dataclasses.replace(CONFIG, flip_sin_to_cos=False)


@pytest.mark.parametrize("name", SAMPLES)
def test_equals_diffusers(name: str, model: OmniGen, reference: OmniGenTransformer2DModel) -> None:
    ours, theirs = run(model, [SAMPLES[name]])[0], run_reference(reference, SAMPLES[name])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "long"), [(4096, False), (4097, True)])
def test_equals_diffusers_at_4096_tokens(length: int, long: bool) -> None:
    """The regimes of the released model: up to 4,096 tokens the short RoPE table, from 4,097 on the long one."""
    config = dataclasses.replace(
        CONFIG, num_layers=2, original_max_position_embeddings=4096, max_position_embeddings=131072
    )
    torch.manual_seed(1)
    values = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    reference, ours = OmniGenTransformer2DModel(**values).eval(), OmniGen(config)
    ours.load_state_dict(reference.state_dict())
    sample = make_sample(8, length - 1 - 63 * 64, [], (63, 64))
    layout = pack([sample.sequence])
    assert layout.num_tokens == length
    assert layout.use_long_rope.tolist() == [long] * length
    with torch.no_grad():
        velocity = ours(layout, [], [sample.noisy], torch.tensor([sample.timestep]))[0]
    torch.testing.assert_close(velocity, run_reference(reference, sample), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "long"), [(4096, False), (4097, True)])
def test_rope_tables_equal_transformers(length: int, long: bool) -> None:
    config = OmniGenConfig()
    with torch.device("meta"):
        model = OmniGen(config)
    rope = config.rope_scaling | {"rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    theirs = Phi3RotaryEmbedding(Phi3Config(max_position_embeddings=131072, rope_parameters=rope))
    positions = torch.arange(length)
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours_cos, ours_sin = model.rope(positions, torch.full((length,), long))
    torch.testing.assert_close(ours_cos[:, 0], cos[0, :, :48], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours_sin[:, 0], sin[0, :, :48], atol=1e-6, rtol=0)
    assert ours_cos[0, 0, 0].item() == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def gradients(model: OmniGen, velocities: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum((v * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum() for v in velocities).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_packed_equals_each_sample_alone(model: OmniGen, checkpointing: Checkpointing) -> None:
    """Outputs and gradients; the pack mixes sizes, image counts and both RoPE regimes."""
    samples = list(SAMPLES.values())
    alone: list[Tensor] = []
    expected: dict[str, Tensor] = {}
    for sample in samples:
        alone += run(model, [sample])
        for name, gradient in gradients(model, run(model, [sample])).items():
            expected[name] = expected.get(name, 0) + gradient
    model.set_checkpointing(checkpointing)
    packed = run(model, samples, pad_to=448)
    actual = gradients(model, packed)
    model.set_checkpointing("none")
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert actual.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in actual.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * max(scale, 1), rtol=1e-4, msg=name)


def test_order_and_padding_do_not_matter(model: OmniGen) -> None:
    samples = list(SAMPLES.values())
    forwards, backwards = run(model, samples), run(model, samples[::-1], pad_to=512)
    torch.testing.assert_close(forwards, backwards[::-1], atol=1e-5, rtol=1e-5)


def test_long_neighbour_does_not_flip_the_rope_regime(model: OmniGen) -> None:
    """Upstream chooses the table by the padded batch length, so that a short sample computes something else."""
    short, long = SAMPLES["text"], SAMPLES["text, long"]
    beside = run(model, [short, long], pad_to=256)[0]
    torch.testing.assert_close(beside, run(model, [short])[0], atol=1e-5, rtol=1e-5)
    wrong_table = dataclasses.replace(
        make_pack([short]), use_long_rope=torch.ones(len(short.sequence), dtype=torch.bool)
    )
    flipped = model(wrong_table, [], [short.noisy], torch.tensor([short.timestep]))[0]
    assert (flipped - beside).abs().max() > 1e-2  # the test can tell the two apart


def test_every_row_has_its_own_positions(model: OmniGen, reference: OmniGenTransformer2DModel) -> None:
    """diffusers rotates all rows of a batch by the positions of row 0, which is wrong if row 0 is padded."""
    short, longer = SAMPLES["text"], SAMPLES["1 image"]
    for sample, velocity in zip([short, longer], run(model, [short, longer]), strict=True):
        torch.testing.assert_close(velocity, run_reference(reference, sample), atol=1e-5, rtol=1e-5)


def test_no_input_images_still_gives_every_parameter_a_gradient(model: OmniGen) -> None:
    actual = gradients(model, run(model, [SAMPLES["text"]]))
    assert actual.keys() == dict(model.named_parameters()).keys()


@torch.no_grad()
@pytest.mark.parametrize("pad_to", [None, 448])
def test_cached_condition_is_exact_at_every_step(model: OmniGen, pad_to: int | None) -> None:
    """Upstream's cache lets target tokens see the condition only in the first step (OmniGen issue 196)."""
    samples = list(SAMPLES.values())
    layout = make_pack(samples, pad_to)
    inputs = [latents for s in samples for latents in s.inputs]
    cache = model.encode_condition(layout, inputs)
    z = [s.noisy for s in samples]
    for step in range(3):
        t = torch.full((len(samples),), step / 3)
        exact, cached = model(layout, inputs, z, t), model.forward_cached(layout, cache, z, t)
        torch.testing.assert_close(cached, exact, atol=1e-5, rtol=1e-5)
        z = [x + v / 3 for x, v in zip(z, exact, strict=True)]


def block_dtypes(model: OmniGen, samples: list[Sample]) -> set[torch.dtype]:
    seen: set[torch.dtype] = set()
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype)) for block in model.layers]
    run(model, samples, pad_to=448)
    for hook in hooks:
        hook.remove()
    return seen


def test_residual_stream_is_not_promoted(model: OmniGen) -> None:
    """fp32 time embeddings, positions, RoPE tables and latents must not turn a bf16 model into an fp32 one."""
    samples = list(SAMPLES.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert block_dtypes(model, samples) == {torch.bfloat16}
    half = OmniGen(CONFIG)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    assert block_dtypes(half, samples) == {torch.bfloat16}
    for actual, expected in zip(run(half, samples), run(model, samples), strict=True):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < 0.1
    half.patch_embedding.pos_embed = half.patch_embedding.pos_embed.float()
    assert block_dtypes(half, samples) == {torch.bfloat16}


def test_bfloat16_keeps_rope_tables_exact() -> None:
    exact, cast = OmniGen(CONFIG), OmniGen(CONFIG).to(torch.bfloat16)
    layout = make_pack([SAMPLES["text, long"]])
    for a, b in zip(
        exact.rope(layout.position_ids, layout.use_long_rope),
        cast.rope(layout.position_ids, layout.use_long_rope),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32


def test_wrong_latents_are_refused(model: OmniGen) -> None:
    sample = SAMPLES["1 image"]
    t = torch.tensor([0.5])
    with pytest.raises(ValueError, match="do not belong to a pack with images of"):
        model(make_pack([sample]), sample.inputs, [sample.noisy[:, :-2]], t)
    with pytest.raises(ValueError, match="do not belong"):
        model(make_pack([sample]), [], [sample.noisy], t)
    for wrong in (torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match=r"timestep is torch\..* not float32 \[1\]"):
            model(make_pack([sample]), sample.inputs, [sample.noisy], wrong)
    too_large = make_sample(9, 4, [], (2, 73))
    with pytest.raises(ValueError, match="2 x 73 patches is larger than the position grid of 72 x 72"):
        model(make_pack([too_large]), [], [too_large.noisy], t)


def test_forward_never_reads_a_tensor_on_the_host() -> None:
    """Fake tensors have no values: a branch or size that depended on one would raise."""
    samples = list(SAMPLES.values())
    layout = make_pack(samples, 448)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_layout = layout._map(mode.from_tensor)
        latents = [mode.from_tensor(latents) for s in samples for latents in s.inputs]
        noisy = [mode.from_tensor(s.noisy) for s in samples]
        fake_model = OmniGen(CONFIG, attention_backend="sdpa")
        velocities = fake_model(fake_layout, latents, noisy, torch.rand(len(samples)))
        sum(v.sum() for v in velocities).backward()
        cache = fake_model.encode_condition(fake_layout, latents)
        with torch.no_grad():
            cached = fake_model.forward_cached(fake_layout, cache, noisy, torch.rand(len(samples)))
    assert [v.shape for v in velocities] == [v.shape for v in cached] == [s.noisy.shape for s in samples]


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_blocks_compile_once_for_all_layers_and_masks(model: OmniGen, checkpointing: Checkpointing) -> None:
    """Without a graph break, recomputation included; packs of many lengths take one more compilation, not one each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = OmniGen(CONFIG, attention_backend="sdpa")
    compiled.load_state_dict(model.state_dict())
    compiled.set_checkpointing(checkpointing)
    for block in compiled.layers:
        block.compile(backend=counter, fullgraph=True)
    samples = list(SAMPLES.values())
    expected = gradients(model, run(model, samples))
    for chosen in (samples, samples[::-1]):
        actual = gradients(compiled, run(compiled, chosen, pad_to=448))
        for name, gradient in actual.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-4 or checkpointing == "none", name
    assert counter.frame_count == 1
    for chosen in (samples[2:5], samples[1:4], samples[:5]):
        torch.testing.assert_close(run(compiled, chosen), run(model, chosen), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


def draws_of(sample: Sample, draws: int) -> list[Sample]:
    """The sample with as many different targets and times."""
    generator = torch.Generator().manual_seed(11)
    noised = [torch.randn(sample.noisy.shape, generator=generator) for _ in range(draws)]
    return [dataclasses.replace(sample, noisy=z, timestep=(i + 1) / (draws + 1)) for i, z in enumerate(noised)]


@pytest.mark.parametrize("backend", ["sdpa", "sequential"])
def test_a_shared_condition_equals_separate_sequences(model: OmniGen, backend: Backend) -> None:
    """Outputs and gradients of three draws behind one condition, between other samples, in both RoPE regimes."""
    before, after = SAMPLES["text"], SAMPLES["exactly at the limit"]
    for name in ("1 image", "2 images, long", "one token over"):
        draws = draws_of(SAMPLES[name], 3)
        separate = run(model, [before, *draws, after])
        expected = gradients(model, separate)
        shared = dataclasses.replace(draws[0].sequence, draws=3)
        layout = pack([before.sequence, shared, after.sequence], 448, SHORT_ROPE_LENGTH)
        assert layout.num_tokens == sum(len(s.sequence) for s in (before, *draws, after)) - 2 * len(shared.token_ids)
        model.attention_backend = backend
        together = model(
            layout,
            [latents for s in (before, draws[0], after) for latents in s.inputs],
            [s.noisy for s in (before, *draws, after)],
            torch.tensor([s.timestep for s in (before, *draws, after)]),
        )
        torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-5)
        for key, gradient in gradients(model, together).items():
            scale = expected[key].abs().max().item()
            torch.testing.assert_close(gradient, expected[key], atol=1e-5 * max(scale, 1), rtol=1e-4, msg=key)
    model.attention_backend = "auto"


@torch.no_grad()
def test_a_cached_condition_serves_several_draws(model: OmniGen) -> None:
    draws = draws_of(SAMPLES["2 images, long"], 2)
    layout = pack([dataclasses.replace(draws[0].sequence, draws=2)], 200, SHORT_ROPE_LENGTH)
    z, t = [s.noisy for s in draws], torch.tensor([s.timestep for s in draws])
    cache = model.encode_condition(layout, draws[0].inputs)
    cached, exact = model.forward_cached(layout, cache, z, t), model(layout, draws[0].inputs, z, t)
    torch.testing.assert_close(cached, exact, atol=1e-5, rtol=1e-5)


def test_lora_of_peft_fits() -> None:
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(OmniGen(CONFIG), LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    sample = SAMPLES["1 image"]
    velocity = lora(make_pack([sample]), sample.inputs, [sample.noisy], torch.tensor([0.3]))[0]
    velocity.sum().backward()
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 4 * 2
    assert all("lora_" in name for name in trained)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_backends_agree_on_cuda(model: OmniGen, backend: str) -> None:
    samples = list(SAMPLES.values())
    on_gpu = OmniGen(CONFIG, attention_backend=backend)
    on_gpu.load_state_dict(model.state_dict())
    on_gpu.cuda()
    velocities = on_gpu(
        make_pack(samples, 384).to("cuda"),
        [latents.cuda() for s in samples for latents in s.inputs],
        [s.noisy.cuda() for s in samples],
        torch.tensor([s.timestep for s in samples], device="cuda"),
    )
    expected = gradients(model, run(model, samples))
    for actual, reference in zip(velocities, run(model, samples), strict=True):
        torch.testing.assert_close(actual.cpu(), reference, atol=2e-3, rtol=2e-3)
    on_gpu.zero_grad()
    weights = [torch.linspace(-1, 1, v.numel(), device="cuda").view(v.shape) for v in velocities]
    sum((v * w).sum() for v, w in zip(velocities, weights, strict=True)).backward()
    for name, parameter in on_gpu.named_parameters():
        error = (parameter.grad.cpu() - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-2, name
