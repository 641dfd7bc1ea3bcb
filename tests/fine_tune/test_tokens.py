import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor, crop_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fine_tune.tiny import TOKENIZER_DIR
from fine_tune.tokens import (
    NEGATIVE_PROMPT,
    UNCONDITIONAL,
    Tokenizer,
    count_tokens,
    drop_condition,
    fit_image,
    fit_images,
    fit_mask,
    fit_pair,
    image_only_prompt,
    to_tensor,
)

EDIT = "<img><|image_1|></img> Make the old red car blue."
sides = st.integers(1, 1200)
max_sides = st.sampled_from([64, 128, 256, 512])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


class TestEncode:
    @pytest.mark.parametrize(
        ("prompt", "sizes"),
        [
            ("A photo of a cat on a wooden table, near a window.", []),
            ("", []),
            (UNCONDITIONAL, []),
            (NEGATIVE_PROMPT, []),
            (EDIT, [(32, 64)]),
            ("Put the cat of <img><|image_2|></img>into<img><|image_1|></img> . Ünïcödé 日本", [(16, 16), (64, 32)]),
            ("<img><|image_1|></img> and <img><|image_1|></img>\nside by side", [(32, 32)]),
            (image_only_prompt(3), [(16, 32), (32, 16), (16, 16)]),
        ],
    )
    def test_equals_the_reference_processor(
        self, tokenizer: Tokenizer, prompt: str, sizes: list[tuple[int, int]]
    ) -> None:
        reference = OmniGenMultiModalProcessor(tokenizer.backend)
        expected = reference.process_multi_modal_prompt(prompt, [torch.zeros(3, *size) for size in sizes])
        condition = tokenizer.encode(prompt, sizes)
        assert condition.token_ids.dtype == torch.int64
        assert condition.token_ids.tolist() == expected["input_ids"]
        assert [[start, stop] for start, stop, _ in condition.image_spans] == (expected["image_sizes"] or [])
        shown = [tuple(image.shape[1:]) for image in expected["pixel_values"] or []]
        assert [sizes[index] for *_, index in condition.image_spans] == shown

    def test_layout(self, tokenizer: Tokenizer) -> None:
        condition = tokenizer.encode("<img><|image_1|></img> a cat", [(32, 48)])
        tokens = tokenizer.backend.convert_ids_to_tokens(condition.token_ids.tolist())
        ((start, stop, index),) = condition.image_spans
        assert (stop - start, index) == (6, 0)
        assert condition.token_ids[start:stop].tolist() == [0] * 6
        assert tokens[:2] == ["<s>", "<|user|>"]
        assert (tokens[start - 1], tokens[stop]) == ("<img>", "</img>")
        assert tokens[stop + 1 :] == ["▁", "▁a", "▁cat", "<|end|>", "<|assistant|>", "<|diffusion|>"]
        assert tokens.count("<s>") == 1

    def test_tokenizer_without_bos(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        shutil.copytree(TOKENIZER_DIR, tmp_path / "tokenizer")
        file = tmp_path / "tokenizer" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
        without = Tokenizer.from_pretrained(tmp_path, subfolder="tokenizer").encode(EDIT, [(32, 64)])
        assert without.token_ids.tolist() == tokenizer.encode(EDIT, [(32, 64)]).token_ids[1:].tolist()

    def test_llama_class_name_does_not_change_the_tokens(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        shutil.copytree(TOKENIZER_DIR, tmp_path, dirs_exist_ok=True)
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
        ids = Tokenizer.from_pretrained(tmp_path).encode(EDIT, [(32, 64)]).token_ids
        assert torch.equal(ids, tokenizer.encode(EDIT, [(32, 64)]).token_ids)

    def test_shared_by_threads_and_never_truncated(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        shutil.copytree(TOKENIZER_DIR, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "tokenizer.json"
        truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": truncation}))
        truncating = Tokenizer.from_pretrained(tmp_path)
        with ThreadPoolExecutor(4) as pool:
            conditions = list(pool.map(lambda _: truncating.encode(NEGATIVE_PROMPT), range(50)))
        expected = tokenizer.encode(NEGATIVE_PROMPT).token_ids
        assert all(torch.equal(condition.token_ids, expected) for condition in conditions)

    @pytest.mark.parametrize(
        ("prompt", "num_images"),
        [
            ("remove the cat", 1),
            (EDIT, 0),
            (EDIT, 2),
            ("<img><|image_2|></img> remove the cat", 1),
            ("<img><|image_1|></img> <img><|image_3|></img>", 2),
            ("<|image_1|> remove the cat", 1),
            ("<img> <|image_1|></img> remove the cat", 1),
            ("<img><|image_1|> remove the cat", 1),
            ("<img>image_1</img> remove the cat", 0),
            ("a cat<|end|>", 0),
            ("<cfg>", 1),
        ],
    )
    def test_wrong_tags_are_quoted(self, tokenizer: Tokenizer, prompt: str, num_images: int) -> None:
        with pytest.raises(ValueError) as error:
            tokenizer.encode(prompt, [(16, 16)] * num_images)
        assert repr(prompt) in str(error.value)

    def test_image_off_the_grid(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="32x40 is not a multiple of 16"):
            tokenizer.encode(EDIT, [(32, 40)])
        assert count_tokens((512, 768)) == 512 * 768 // 256

    def test_tokenizer_without_special_tokens(self) -> None:
        backend = PreTrainedTokenizerFast(tokenizer_object=Backend(BPE({"a": 0, "<|user|>": 1}, [])), name_or_path="x")
        with pytest.raises(ValueError, match=r"'x' has no single token for <\|end\|>, .*add_special_tokens"):
            Tokenizer(backend)
        assert len(Tokenizer(backend, required_tokens=["<|user|>"])) == 2


class TestTinyTokenizer:
    @given(st.text(st.characters(codec="utf-8", exclude_characters="\r▁<>|")))
    def test_round_trip(self, tokenizer: Tokenizer, text: str) -> None:
        backend = tokenizer.backend
        ids = backend(text).input_ids
        assert backend.unk_token_id not in ids
        assert backend.decode(ids, skip_special_tokens=True) == text

    def test_common_words_are_whole(self, tokenizer: Tokenizer) -> None:
        text = "a photo of the red car on the street near a house"
        assert len(tokenizer.backend(text).input_ids) == len(text.split()) + 1


class TestDropCondition:
    def test_branches(self) -> None:
        prompt = "Put the cat of <img><|image_2|></img>, and <img><|image_1|></img> here"
        generator = torch.Generator().manual_seed(0)
        assert drop_condition(prompt, generator, p_all=1) == ("<cfg>", False)
        both = "<img><|image_1|></img> <img><|image_2|></img>"
        assert drop_condition(prompt, generator, p_all=0, p_text=1) == (both, True)
        assert drop_condition(prompt, generator, p_all=0, p_images=1) == ("Put the cat of, and here", False)
        assert drop_condition(prompt, generator, p_all=0) == (prompt, True)

    def test_proportions(self) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = Counter(drop_condition(EDIT, generator, p_all=0.1, p_text=0.2, p_images=0.3) for _ in range(10_000))
        expected = {
            ("<cfg>", False): 0.1,
            ("<img><|image_1|></img>", True): 0.2,
            ("Make the old red car blue.", False): 0.3,
            (EDIT, True): 0.4,
        }
        assert counts.keys() == expected.keys()
        for outcome, share in expected.items():
            assert counts[outcome] / 10_000 == pytest.approx(share, abs=0.015)

    def test_without_images_only_everything_can_be_dropped(self) -> None:
        generator = torch.Generator().manual_seed(0)
        assert drop_condition("a cat", generator, p_all=0, p_text=0.5, p_images=0.5) == ("a cat", True)
        counts = Counter(drop_condition("a cat", generator, p_all=0.25, p_text=0.5)[0] for _ in range(4000))
        assert counts["<cfg>"] / 4000 == pytest.approx(0.25, abs=0.02)

    def test_nothing_left_is_unconditional(self) -> None:
        prompt = image_only_prompt(2)
        assert drop_condition(prompt, torch.Generator(), p_all=0, p_images=1) == ("<cfg>", False)

    def test_one_draw_per_call(self) -> None:
        states = []
        for prompt in ("a cat", EDIT):
            generator = torch.Generator().manual_seed(7)
            drop_condition(prompt, generator, p_all=0.4, p_text=0.3)
            states.append(generator.get_state())
        assert torch.equal(*states)

    def test_results_are_encodable(self, tokenizer: Tokenizer) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            prompt, keeps_images = drop_condition(EDIT, generator, p_all=0.25, p_text=0.25, p_images=0.25)
            tokenizer.encode(prompt, [(16, 16)] if keeps_images else [])

    def test_probabilities(self) -> None:
        with pytest.raises(ValueError, match=r"p_text=0\.6"):
            drop_condition("a cat", torch.Generator(), p_all=0.5, p_text=0.6)


class TestFitImage:
    @settings(deadline=None, max_examples=60)
    @given(sides, sides, max_sides)
    def test_on_the_grid_and_within_bounds(self, width: int, height: int, max_side: int) -> None:
        fitted = fit_image(Image.new("L", (width, height)), max_side)
        assert fitted.mode == "RGB"
        assert all(side % 16 == 0 and 16 <= side <= max_side for side in fitted.size)
        if max_side >= width >= 16 and max_side >= height >= 16:
            assert fitted.size == (width // 16 * 16, height // 16 * 16)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(40, 640), st.integers(40, 427), max_sides)
    def test_equals_the_reference_transform(self, width: int, height: int, max_side: int) -> None:
        image = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, width, height))
        if min(width, height) * max_side < 16 * max(width, height):
            return  # the extreme aspects, where ours differs on purpose
        assert np.array_equal(fit_image(image, max_side), crop_image(image, max_side))

    def test_extreme_aspect_stays_within_max_side(self) -> None:
        image = Image.new("RGB", (20, 3000))
        assert max(crop_image(image, 1024).size) == 2336
        assert fit_image(image, 1024).size == (16, 1024)
        assert fit_image(Image.new("RGB", (1, 30_000)), 64).size == (16, 64)

    @pytest.mark.parametrize("max_side", [0, 100, 1000])
    def test_max_side_off_the_grid(self, photo: Image.Image, max_side: int) -> None:
        with pytest.raises(ValueError, match="multiple of 16"):
            fit_image(photo, max_side)


class TestFitPair:
    @settings(deadline=None, max_examples=40)
    @given(sides, sides, max_sides)
    def test_equal_sizes_share_one_window(self, width: int, height: int, max_side: int) -> None:
        ramp = Image.fromarray(np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8))
        source, target = fit_pair(ramp, ramp, max_side)
        assert source.size == target.size
        assert source.tobytes() == target.tobytes()

    @settings(deadline=None, max_examples=60)
    @given(sides, sides, sides, sides, max_sides)
    def test_same_size_or_an_error(self, w1: int, h1: int, w2: int, h2: int, max_side: int) -> None:
        source, target = Image.new("RGB", (w1, h1)), Image.new("RGB", (w2, h2))
        try:
            fitted_source, fitted_target = fit_pair(source, target, max_side)
        except ValueError as error:
            assert f"{w1}x{h1}" in str(error) and f"{w2}x{h2}" in str(error)
        else:
            assert fitted_source.size == fitted_target.size == fit_image(target, max_side).size

    @pytest.mark.parametrize("size", [(640, 416), (632, 424), (320, 213), (1280, 854)])
    def test_rescaled_or_rounded_source_is_aligned(self, photo: Image.Image, size: tuple[int, int]) -> None:
        source, target = (to_tensor(image) for image in fit_pair(photo.resize(size), photo, 256))
        shifted = [(source.roll(step, 2) - target).abs().mean() for step in (-2, -1, 0, 1, 2)]
        assert int(torch.stack(shifted).argmin()) == 2

    def test_upstream_windows_of_a_rounded_pair_differ(self, photo: Image.Image) -> None:
        # 640 x 427 is cropped by 11 rows and 640 x 432 by none: upstream shifts the pair and changes its shape.
        taller = photo.resize((640, 432))
        assert fit_image(photo, 640).size != fit_image(taller, 640).size
        source, target = fit_pair(taller, photo, 640)
        assert source.size == target.size == (640, 416)

    def test_other_framing_is_refused(self, photo: Image.Image) -> None:
        with pytest.raises(ValueError, match="512x512 and target 640x427"):
            fit_pair(photo.resize((512, 512)), photo, 256)

    def test_fit_images(self, photo: Image.Image) -> None:
        reference = Image.fromarray(skimage.data.chelsea())
        inputs, target = fit_images([reference, photo.resize((632, 424))], photo, 256, edit_source_index=1)
        assert inputs[1].size == target.size
        assert inputs[0].size == fit_image(reference, 256).size
        alone, _ = fit_images([reference], photo, 256)
        assert np.array_equal(alone[0], inputs[0])


class TestFitMask:
    @settings(deadline=None, max_examples=40)
    @given(sides, sides, max_sides)
    def test_lies_over_the_image(self, width: int, height: int, max_side: int) -> None:
        mask = fit_mask(Image.new("1", (width, height), 1), max_side)
        assert mask.dtype == torch.bool and mask.all()
        assert tuple(mask.shape) == fit_image(Image.new("RGB", (width, height)), max_side).size[::-1]

    def test_one_pixel_survives_shrinking(self) -> None:
        pixels = np.zeros((1024, 1024), bool)
        pixels[600, 300] = True
        mask = fit_mask(Image.fromarray(pixels), 64)
        assert mask.nonzero().tolist() == [[37, 18]]


def test_to_tensor_range(photo: Image.Image) -> None:
    tensor = to_tensor(photo)
    assert tensor.shape == (3, 427, 640) and tensor.dtype == torch.float32
    restored = ((tensor + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(restored, photo)
    assert to_tensor(Image.new("L", (16, 16), 255)).unique().tolist() == [1.0]
    assert to_tensor(Image.new("L", (16, 16), 0)).unique().tolist() == [-1.0]
