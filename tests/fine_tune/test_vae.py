from pathlib import Path

import pytest
import skimage.data
import torch
from diffusers import AutoencoderKL
from PIL import Image

import fine_tune.vae
from fine_tune.tiny import VAE_DIR
from fine_tune.tokens import fit_image, to_tensor
from fine_tune.vae import FrozenVAE, Posterior


def save_vae(folder: Path, **config: float | bool) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        **config,
    )
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return to_tensor(fit_image(Image.fromarray(skimage.data.chelsea()), 256))


class TestPosterior:
    posterior = Posterior(torch.full((4, 64, 64), 2.0), torch.full((4, 64, 64), 2 * torch.tensor(0.5).log()))

    def test_sample(self) -> None:
        sample = self.posterior.sample(torch.Generator().manual_seed(0))
        assert sample.mean().item() == pytest.approx(2.0, abs=0.02)
        assert sample.std().item() == pytest.approx(0.5, abs=0.02)
        assert torch.equal(sample, self.posterior.sample(torch.Generator().manual_seed(0)))

    def test_moments_survive_a_float16_cache(self) -> None:
        cached = Posterior.from_moments(self.posterior.moments.half())
        assert cached.mean.dtype == torch.float32
        torch.testing.assert_close(cached.mean, self.posterior.mean)
        torch.testing.assert_close(cached.logvar, self.posterior.logvar, rtol=1e-3, atol=1e-3)


class TestFrozenVAE:
    @pytest.mark.parametrize("shift", [None, 0.4])
    def test_latents_are_shifted_and_scaled(self, tmp_path: Path, photo: torch.Tensor, shift: float | None) -> None:
        reference = save_vae(tmp_path / "vae", scaling_factor=0.13025, shift_factor=shift)
        vae = FrozenVAE.from_pretrained(tmp_path, subfolder="vae")
        posterior = vae.encode(photo)
        with torch.no_grad():
            raw = reference.encode(photo[None]).latent_dist
        torch.testing.assert_close(posterior.mean, (raw.mean[0] - (shift or 0)) * 0.13025)
        torch.testing.assert_close(torch.exp(0.5 * posterior.logvar), raw.std[0] * 0.13025)
        with torch.no_grad():
            decoded = reference.decode(raw.mean).sample[0].clamp(-1, 1)
        torch.testing.assert_close(vae.decode(posterior.mean), decoded, rtol=1e-4, atol=1e-5)

    def test_frozen(self, tmp_path: Path, photo: torch.Tensor) -> None:
        save_vae(tmp_path)
        vae = FrozenVAE.from_pretrained(tmp_path)
        assert not vae.module.training
        assert not any(parameter.requires_grad for parameter in vae.module.parameters())
        latents = vae.encode(photo).mean
        assert not latents.requires_grad
        (latents * torch.ones((), requires_grad=True)).sum().backward()  # usable in a graph

    @pytest.mark.parametrize("max_batch_pixels", [1, 1 << 20])
    def test_images_of_many_sizes_keep_their_order(
        self, tmp_path: Path, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch, max_batch_pixels: int
    ) -> None:
        monkeypatch.setattr(fine_tune.vae, "MAX_BATCH_PIXELS", max_batch_pixels)
        save_vae(tmp_path)
        vae = FrozenVAE.from_pretrained(tmp_path)
        images = [photo[:, :64, :64], photo[:, :32, :96], photo[:, 64:128, 64:128]]
        for image, posterior in zip(images, vae.encode(images), strict=True):
            torch.testing.assert_close(posterior.mean, vae.encode(image).mean, rtol=1e-4, atol=1e-5)

    def test_size_off_the_grid(self, tmp_path: Path) -> None:
        save_vae(tmp_path)
        with pytest.raises(ValueError, match=r"60x64 .* factor 8"):
            FrozenVAE.from_pretrained(tmp_path).encode(torch.zeros(3, 60, 64))

    def test_float16_only_where_it_does_not_overflow(self, tmp_path: Path) -> None:
        save_vae(tmp_path, force_upcast=True)
        with pytest.raises(ValueError, match="overflows in float16"):
            FrozenVAE.from_pretrained(tmp_path, dtype=torch.float16)
        vae = FrozenVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert vae.encode(torch.zeros(3, 32, 32)).mean.dtype == torch.float32


class TestTinyVAE:
    """The model in fine_tune/tiny, on a photograph that it was not trained on."""

    def test_photograph_survives(self, photo: torch.Tensor) -> None:
        vae = FrozenVAE.from_pretrained(VAE_DIR)
        latents = vae.encode(photo).sample(torch.Generator().manual_seed(0))
        assert latents.shape == (4, photo.shape[1] // 8, photo.shape[2] // 8)
        error = (vae.decode(latents) - photo).square().mean()
        assert -10 * torch.log10(error / 4) > 22

    def test_latents_have_unit_scale(self, photo: torch.Tensor) -> None:
        latents = FrozenVAE.from_pretrained(VAE_DIR).encode(photo).mean
        assert 0.5 < latents.std() < 2

    def test_small(self) -> None:
        shipped = sum(path.stat().st_size for path in VAE_DIR.parent.rglob("*") if path.suffix != ".pyc")
        assert shipped <= 3_000_000
