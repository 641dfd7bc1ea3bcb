import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fine_tune.flow import (
    EditWeighting,
    flow_loss,
    interpolate,
    sample_timesteps,
    shift_timesteps,
    timestep_bin,
)

SIDE = 20


def edited_latents(changes: dict[int, float], background: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target [4, 20, 20] that differ by `background`, and by value in the first cells of every channel."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(4, SIDE, SIDE, generator=generator)
    difference = torch.full((SIDE * SIDE,), background)
    for cells, value in changes.items():
        difference[:cells] = value
    return source, source + difference.reshape(SIDE, SIDE)


class TestTimesteps:
    def test_logit_normal(self) -> None:
        t = sample_timesteps(20_000, torch.Generator().manual_seed(0), mean=0.5, std=0.8)
        assert t.dtype == torch.float32
        assert t.min() > 0 and t.max() < 1
        assert stats.kstest(torch.logit(t.double()).numpy(), stats.norm(0.5, 0.8).cdf).pvalue > 0.01

    def test_finer_than_bfloat16(self) -> None:
        t = sample_timesteps(1000, torch.Generator().manual_seed(0))
        assert len(t.unique()) > 990 > len(t.bfloat16().unique())

    def test_reproducible_from_the_generator_alone(self) -> None:
        draws = [sample_timesteps(8, torch.Generator().manual_seed(3)) for _ in range(2)]
        assert torch.equal(*draws)

    @pytest.mark.parametrize(("num_tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
    def test_shift_is_the_published_expression(self, num_tokens: int, mu: float) -> None:
        t = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
        k = torch.tensor(mu, dtype=torch.float64).exp()
        published = 1 - k / (k + (1 / (1 - t) - 1))
        torch.testing.assert_close(shift_timesteps(t, num_tokens), published, rtol=1e-6, atol=1e-6)

    def test_shift_of_a_mixed_batch(self) -> None:
        t = torch.full((2,), 0.5)
        small, large = shift_timesteps(t, torch.tensor([256, 4096]))
        assert large < small < 0.5
        torch.testing.assert_close(shift_timesteps(t, 256)[0], small)

    def test_bins(self) -> None:
        t = torch.tensor([0.0, 0.099, 0.1, 0.55, 1.0])
        assert timestep_bin(t).tolist() == [0, 0, 1, 5, 9]
        assert timestep_bin(t, bins=2).tolist() == [0, 0, 0, 1, 1]


class TestInterpolate:
    def test_ends_and_velocity(self) -> None:
        x, eps = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(interpolate(x, eps, torch.tensor(1.0))[0], x)
        noised, velocity = interpolate(x, eps, torch.tensor(0.0))
        assert torch.equal(noised, eps)
        torch.testing.assert_close(noised + velocity, x)

    @given(st.floats(0, 1))
    def test_following_the_velocity_from_anywhere_reaches_the_data(self, t: float) -> None:
        x, eps = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        noised, velocity = interpolate(x, eps, torch.tensor(t))
        torch.testing.assert_close(noised + (1 - t) * velocity, x)

    def test_float32_whatever_comes_in_and_a_timestep_per_sample(self) -> None:
        x, eps = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
        t = torch.tensor([0.0, 0.999, 1.0])
        noised, velocity = interpolate(x, eps, t)
        assert noised.dtype == velocity.dtype == torch.float32
        torch.testing.assert_close(noised[1], 0.999 * x[1].float() + 0.001 * eps[1].float())
        assert torch.equal(noised[2], x[2].float())


class TestAuthorsRule:
    """The rule of the comment in VectorSpaceLab/OmniGen train.py, `mode="latent"`."""

    # Toy pairs: a change of 1.08 over the given share, 0.0239 of autoencoder noise elsewhere.
    @pytest.mark.parametrize(("area", "expected"), [(0.01, 29), (0.05, 13), (0.25, 5), (0.60, 5)])
    def test_weight_by_edit_area(self, area: float, expected: int) -> None:
        cells = round(area * SIDE * SIDE)
        source, target = edited_latents({cells: 1.08}, background=0.0239)
        weight = EditWeighting().weights(target, [source], 0)
        assert weight is not None and weight.dtype == torch.float32
        assert [round(w) for w in sorted(weight.unique().tolist())] == [1, expected]
        assert (weight > 1).flatten(1).sum(1).tolist() == [cells] * 4

    def test_identical_pair_is_dropped(self) -> None:
        source, target = edited_latents({}, background=0.0009)
        assert EditWeighting().weights(target, [source], 0).count_nonzero() == 0

    def test_tiny_edit_is_capped(self) -> None:
        source, target = edited_latents({1: 2.0})
        assert EditWeighting().weights(target, [source], 0).unique().tolist() == [1.0, 64.0]

    def test_global_edit_is_not_weighted(self) -> None:
        source, target = edited_latents({SIDE * SIDE: 0.81})
        assert EditWeighting().weights(target, [source], 0).unique().tolist() == [1.0]

    def test_just_below_global_is(self) -> None:
        source, target = edited_latents({SIDE * SIDE: 0.79})
        assert EditWeighting().weights(target, [source], 0).unique().tolist() == [5.0]

    def test_elementwise_not_per_position(self) -> None:
        source = torch.zeros(4, 4, 4)
        target = source.clone()
        target[2, 1, 1] = 1.0
        weight = EditWeighting().weights(target, [source], 0)
        assert (weight > 1).nonzero().tolist() == [[2, 1, 1]]

    def test_four_equal_edits_all_count(self) -> None:
        # UniWorld's mask drops components below 30 % of the changed area, so four equal ones leave nothing.
        source, target = torch.zeros(4, 16, 16), torch.zeros(4, 16, 16)
        for y, x in [(1, 1), (1, 12), (12, 1), (12, 12)]:
            target[:, y : y + 2, x : x + 2] = 1.0
        changed = target > 0
        mask = changed[0].repeat_interleave(8, 0).repeat_interleave(8, 1)
        for mode in ("latent", "mask"):
            weight = EditWeighting(mode=mode).weights(target, [source], 0, mask)
            assert torch.equal(weight > 1, changed)

    def test_thresholds_are_settings(self) -> None:
        source, target = edited_latents({40: 0.2})
        assert EditWeighting().weights(target, [source], 0).max() == 1
        assert EditWeighting(changed=0.1, low=2, high=3).weights(target, [source], 0).max() == 3


class TestOtherModes:
    def test_mask_by_area(self) -> None:
        mask = torch.zeros(160, 160, dtype=torch.bool)
        mask[:32, :40] = True  # 4 x 5 of 20 x 20 cells: 5 %
        weight = EditWeighting(mode="mask").weights(torch.zeros(4, SIDE, SIDE), [torch.zeros(4, SIDE, SIDE)], 0, mask)
        assert weight[:, :4, :5].unique().tolist() == pytest.approx([20], rel=1e-3)
        assert weight.sum() == pytest.approx(4 * (20 * 20 + 380), rel=1e-3)

    def test_one_masked_pixel_marks_its_cell(self) -> None:
        mask = torch.zeros(160, 160, dtype=torch.bool)
        mask[15, 8] = True
        weight = EditWeighting(mode="mask").weights(torch.zeros(4, SIDE, SIDE), [torch.zeros(4, SIDE, SIDE)], 0, mask)
        assert (weight[0] == 64).nonzero().tolist() == [[1, 1]]

    @pytest.mark.parametrize(("filled", "expected"), [(False, 0.0), (True, 1.0)])
    def test_empty_and_full_mask(self, filled: bool, expected: float) -> None:
        latents = torch.zeros(4, SIDE, SIDE)
        mask = torch.full((160, 160), filled)
        weight = EditWeighting(mode="mask").weights(latents, [latents], 0, mask)
        assert weight.unique().tolist() == [expected]

    def test_paper_formula(self) -> None:
        source, target = torch.zeros(1, 2, 2), torch.tensor([[[0.0, 0.3], [0.0, 0.4]]])
        weight = EditWeighting(mode="paper").weights(target, [source], 0)
        torch.testing.assert_close(weight, torch.tensor([[[1.0, 4.0], [1.0, 4.0]]]))

    def test_paper_formula_on_an_identical_pair_is_finite(self) -> None:
        latents = torch.ones(4, 2, 2)
        assert EditWeighting(mode="paper").weights(latents, [latents], 0).unique().tolist() == [1.0]

    def test_no_weights_without_edit_source(self) -> None:
        source, target = edited_latents({4: 1.0})
        assert EditWeighting().weights(target, [source], -1) is None
        assert EditWeighting(mode="none").weights(target, [source], 0) is None

    def test_the_source_is_the_named_input(self) -> None:
        source, target = edited_latents({4: 1.0})
        by_index = EditWeighting().weights(target, [torch.zeros(4, 2, 2), source], 1)
        assert torch.equal(by_index, EditWeighting().weights(target, [source], 0))


class TestErrors:
    def test_shapes_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"\(4, 8, 8\).*\(4, 8, 10\)"):
            EditWeighting().weights(torch.zeros(4, 8, 10), [torch.zeros(4, 8, 8)], 0)

    def test_index_beyond_the_inputs(self) -> None:
        with pytest.raises(IndexError, match=r"edit_source_index 1 .* 1 input"):
            EditWeighting().weights(torch.zeros(4, 8, 8), [torch.zeros(4, 8, 8)], 1)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [(None, "needs an edit_mask"), (torch.ones(60, 64), r"\(60, 64\)"), (torch.ones(4, 4), r"\(4, 4\)")],
    )
    def test_mask_missing_or_off_the_grid(self, mask: torch.Tensor | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EditWeighting(mode="mask").weights(torch.zeros(4, 8, 8), [torch.zeros(4, 8, 8)], 0, mask)

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="'pixel' is not one of latent, mask, paper, none"):
            EditWeighting(mode="pixel")
        with pytest.raises(ValueError, match="low <= high"):
            EditWeighting(low=9, high=3)
        with pytest.raises(ValueError, match="reduction"):
            flow_loss([], [], [], reduction="mean")

    def test_loss_names_the_sample(self) -> None:
        with pytest.raises(ValueError, match=r"sample 1: prediction \(2,\), velocity \(3,\)"):
            flow_loss([torch.zeros(1), torch.zeros(2)], [torch.zeros(1), torch.zeros(3)], [None, None])


class TestFlowLoss:
    def test_every_token_weighs_the_same(self) -> None:
        predictions = [torch.zeros(4, 2, 2), torch.zeros(4, 8, 8)]
        velocities = [torch.full((4, 2, 2), 3.0), torch.full((4, 8, 8), 1.0)]
        result = flow_loss(predictions, velocities, [None, None])
        assert result.loss.item() == pytest.approx((16 * 9 + 256) / 272)
        assert flow_loss(predictions, velocities, [None, None], reduction="sample").loss.item() == pytest.approx(5)
        assert result.weighted.tolist() == result.unweighted.tolist() == [9, 1]

    @pytest.mark.parametrize("reduction", ["token", "sample"])
    def test_parts_of_a_batch_add_up_to_the_whole(self, reduction: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 2, 2), (4, 6, 4), (4, 3, 8), (4, 2, 6)]
        predictions, velocities, weights = (
            [torch.rand(shape, generator=generator) for shape in shapes] for _ in range(3)
        )
        whole = flow_loss(predictions, velocities, weights, reduction=reduction)
        total = sum(v.numel() for v in velocities) if reduction == "token" else len(velocities)
        parts = [
            flow_loss(predictions[i], velocities[i], weights[i], reduction=reduction, denominator=total).loss
            for i in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(parts), whole.loss)

    def test_weights_act_on_the_gradient_and_stay_out_of_the_report(self) -> None:
        prediction = torch.zeros(4, 2, 2, requires_grad=True)
        weight = torch.ones(4, 2, 2)
        weight[0] = 10
        result = flow_loss([prediction], [torch.ones(4, 2, 2)], [weight])
        result.loss.backward()
        torch.testing.assert_close(prediction.grad, -2 * weight / 16)
        assert result.weighted.item() == pytest.approx((10 + 3) / 4)
        assert result.unweighted.item() == 1
        assert not result.weighted.requires_grad and not result.unweighted.requires_grad

    def test_bfloat16_predictions_are_compared_in_float32(self) -> None:
        prediction = torch.full((4, 2, 2), 1.0, dtype=torch.bfloat16)
        result = flow_loss([prediction], [torch.full((4, 2, 2), 1.001)], [None])
        assert result.loss.dtype == torch.float32
        assert result.loss.item() == pytest.approx(1e-6, rel=1e-3)
