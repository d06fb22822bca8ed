"""Costs of a step: their scale, their targets, and rows without labels."""

from __future__ import annotations

import pytest
import torch

from streamlearn.learn.losses import classification_loss, kl_consistency, mse_consistency

LOGITS_BC = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [-1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
OTHER_BC = LOGITS_BC.flip(0)


class TestClassification:
    def test_is_the_sum_over_labelled_rows_divided_by_all_rows(self):
        """Two labelled rows of four: the sum of two cross-entropies over four."""
        loss = classification_loss(LOGITS_BC[2:], torch.eye(3)[[1, 2]], 4)

        log_probs_BC = LOGITS_BC.log_softmax(dim=1)
        assert loss.item() == pytest.approx(-(log_probs_BC[2, 1] + log_probs_BC[3, 2]).item() / 4)

    def test_without_labels_is_exactly_zero(self):
        """No label, no cost and no gradient; a plain mean would be NaN."""
        logits_BC = LOGITS_BC.clone().requires_grad_()

        loss = classification_loss(logits_BC[4:], torch.zeros((0, 3)), 4)
        loss.backward()

        assert loss.item() == 0.0
        assert logits_BC.grad is not None
        assert torch.count_nonzero(logits_BC.grad) == 0


class TestConsistency:
    @pytest.mark.parametrize("distance", [mse_consistency, kl_consistency])
    def test_is_zero_where_both_networks_agree(self, distance):
        """Equal answers cost nothing."""
        assert distance(LOGITS_BC, LOGITS_BC.softmax(1)).item() == pytest.approx(0.0, abs=1e-7)

    @pytest.mark.parametrize("distance", [mse_consistency, kl_consistency])
    def test_weighs_its_rows_and_still_divides_by_all(self, distance):
        """Weight 0 counts as agreement, weight 2 counts twice."""
        each = torch.stack([distance(LOGITS_BC[[n]], OTHER_BC[[n]].softmax(1)) for n in range(4)])

        loss = distance(LOGITS_BC, OTHER_BC.softmax(1), torch.tensor([0.0, 2.0, 1.0, 0.0]))

        assert loss.item() == pytest.approx((2 * each[1] + each[2]).item() / 4, rel=1e-5)

    @pytest.mark.parametrize("distance", [mse_consistency, kl_consistency])
    def test_without_rows_is_zero(self, distance):
        """A mean of nothing would be NaN."""
        assert distance(LOGITS_BC[:0], LOGITS_BC[:0]).item() == 0.0

    def test_mse_is_a_mean_over_rows_and_classes(self):
        """The mean of all B x C squared differences of probabilities."""
        difference_BC = LOGITS_BC.softmax(dim=1) - OTHER_BC.softmax(dim=1)

        loss = mse_consistency(LOGITS_BC, OTHER_BC.softmax(1))

        assert loss.item() == pytest.approx((difference_BC**2).sum().item() / 12)

    def test_kl_is_from_teacher_to_student_and_a_mean_over_rows(self):
        """Sum over classes of q log(q / p), q the teacher's; then the mean of the rows."""
        p_BC, q_BC = LOGITS_BC.softmax(dim=1), OTHER_BC.softmax(dim=1)

        loss = kl_consistency(LOGITS_BC, OTHER_BC.softmax(1))

        assert loss.item() == pytest.approx((q_BC * (q_BC / p_BC).log()).sum().item() / 4, rel=1e-5)
