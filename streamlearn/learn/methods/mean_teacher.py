"""Mean Teacher (Tarvainen and Valpola, 2017): the student agrees with the average of itself under other noise.

    J(theta) = E || f(x, theta', eta') - f(x, theta, eta) ||^2        theta' = the average of theta

eta and eta' are independent noise of the input. For the mode in which the teacher answers see `learn/targets.py`.

With a logit distance the student has two heads (their section 3.2): g, which is served and learns from labels, and h,
which is compared with the teacher's g. A cost of distance * ||g - h||^2 / C ties them loosely, so that consistency does
not pull at the classification itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from streamlearn.learn.embedding import Embedding
from streamlearn.learn.losses import classification_loss
from streamlearn.learn.methods.settings import MeanTeacherOptions
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import StepCosts, answer
from streamlearn.learn.targets import TeacherMethod
from streamlearn.models.build import Classifier, ModelSpec


class MeanTeacher(TeacherMethod):
    """Labels where there are any; agreement on every row that the student sees unmixed."""

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """Both networks see the same rows, the student under eta, the teacher under eta'."""
        view = rows.student_view()
        logits_BC = answer(student, view.x_B)
        return self._compare(teacher, rows, logits_BC, logits_BC[: view.compared], view.targets_LC)

    def _compare(
        self, teacher: Classifier, rows: Rows, logits_BC: Tensor, compared_BC: Tensor, targets_LC: Tensor
    ) -> StepCosts:
        targets_BC, weights_B = self._ask(teacher, rows, len(compared_BC))
        return StepCosts(
            classification=classification_loss(logits_BC[rows.fresh_count :], targets_LC, len(logits_BC)),
            consistency=self._distance(compared_BC, targets_BC, weights_B),
        )


class DualHeadMeanTeacher(MeanTeacher):
    """The same with a second head for consistency, which is not served."""

    def __init__(self, options: MeanTeacherOptions, spec: ModelSpec, student: Classifier) -> None:
        super().__init__(options, spec, student)
        assert options.logit_distance is not None
        self._logit_distance = options.logit_distance
        self._embedding = Embedding(student, spec, method="mean_teacher")
        self._head = self._embedding.another_head()

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """As with one head, plus the cost that ties the two; both get gradient from it."""
        view = rows.student_view()
        logits_BC, embedded_BD = self._embedding.read(student.net, lambda: answer(student, view.x_B))
        second_BC: Tensor = self._head(embedded_BD)
        costs = self._compare(teacher, rows, logits_BC, second_BC[: view.compared], view.targets_LC)
        # The mean over named classes: the spare ones have logits far from any head's.
        apart = ((logits_BC - second_BC).square() * rows.uniform_C).sum(dim=1).mean()
        return StepCosts(costs.classification, costs.consistency, self._logit_distance * apart)

    def follow_student(self) -> None:
        """The second head becomes a copy of the student's own."""
        self._embedding.copy_head_to(self._head)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The second head's."""
        return dict(self._head.named_parameters(prefix="head"))


def make_mean_teacher(options: MeanTeacherOptions, spec: ModelSpec, student: Classifier) -> MeanTeacher:
    """With one head, or with two if they have a distance."""
    kind = MeanTeacher if options.logit_distance is None else DualHeadMeanTeacher
    return kind(options, spec, student)
