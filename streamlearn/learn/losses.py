"""The costs of a step, from logits. Tarvainen and Valpola (2017), section 2; consistency also as KL (their appendix).

Rows that are padding never come here: the learner cuts them off first.
"""

from __future__ import annotations

from torch import Tensor, nn

from streamlearn.records import UNLABELLED


def classification_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy summed over labelled rows, divided by B, all rows.

    Dividing by B and not by the labelled count keeps a batch without labels at exactly zero, where a plain mean would
    be 0/0.
    """
    summed = nn.functional.cross_entropy(logits_BC, labels_B, ignore_index=UNLABELLED, reduction="sum")
    return summed / len(labels_B)


def mse_consistency(student_logits_BC: Tensor, teacher_logits_BC: Tensor) -> Tensor:
    """J(theta) = E || f(x, theta', eta') - f(x, theta, eta) ||^2, over class probabilities.

    Mean over B and C. The teacher is a target: no gradient flows into it.
    """
    teacher_probs_BC = teacher_logits_BC.detach().softmax(dim=1)
    return nn.functional.mse_loss(student_logits_BC.softmax(dim=1), teacher_probs_BC)


def kl_consistency(student_logits_BC: Tensor, teacher_logits_BC: Tensor) -> Tensor:
    """KL(teacher || student) of class probabilities, summed over C, mean over B.

    The teacher is a target: no gradient flows into it.
    """
    student_log_probs_BC = student_logits_BC.log_softmax(dim=1)
    teacher_log_probs_BC = teacher_logits_BC.detach().log_softmax(dim=1)
    return nn.functional.kl_div(student_log_probs_BC, teacher_log_probs_BC, reduction="batchmean", log_target=True)
