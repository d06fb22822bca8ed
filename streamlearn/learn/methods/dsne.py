"""d-SNE with its Mean-Teacher extension (Xu et al., 2019): a labelled source domain, the stream as target domain.

For each labelled target row a, against the source rows of the step, with squared distances d of embeddings:

    L(a) = max(0, max over source rows of a's class of d - min over source rows of other classes of d + margin)

so the farthest row of its own class must be nearer than the nearest of any other. The costs of a step:

    (1 - w) (cross-entropy of source rows + cross-entropy of labelled target rows) + w E L(a)  +  consistency

where consistency is Mean Teacher's, on the target rows. An anchor without a source row of its class, or of another,
costs nothing. Source and target are two batches with their own batch statistics; only the target's enter the running
statistics (French et al., 2018). The reference takes one optimizer step per domain and evaluates the student; here it
is one step, and the teacher is served.
"""

from __future__ import annotations

import zipfile

import numpy as np
import torch
from torch import Tensor, nn

from streamlearn.errors import ConfigError
from streamlearn.learn.embedding import Embedding
from streamlearn.learn.methods.mean_teacher import MeanTeacher
from streamlearn.learn.methods.settings import DSneOptions
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import StepCosts, answer, answer_apart
from streamlearn.models.build import Classifier, ModelSpec


def read_source(path: str, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """The labelled source domain, an .npz: raw x (N, *shape) in its dtype, and y (N,) as int64.

    Raises:
        ConfigError: it cannot be read, or does not fit this model.
    """
    key = "learn.options.source_path"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{key}: {path}: expected an .npz with x and y: {error}") from error
    if x.shape[1:] != spec.shape or len(x) != len(y) or not len(y) or x.dtype.kind not in "fiu":
        raise ConfigError(
            f"{key}: {path}: expected numbers x (N, {', '.join(map(str, spec.shape))}) and y (N,), "
            f"got {x.dtype} {x.shape} and {y.shape}"
        )
    if y.dtype.kind not in "iu" or not 0 <= y.min() <= y.max() < spec.classes:
        raise ConfigError(f"{key}: {path}: expected integers y from 0 to {spec.classes - 1}")
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))


class DSne(MeanTeacher):
    """Mean Teacher on the target domain; its embeddings are pulled to those of the source, class by class."""

    def __init__(self, options: DSneOptions, spec: ModelSpec, student: Classifier) -> None:
        super().__init__(options, spec, student)
        self._embedding = Embedding(student, spec, needed_by="learn.method: dsne")
        self._source = [of_all.to(student.device) for of_all in read_source(options.source_path, spec)]
        self._rows = options.source_rows
        self._weight, self._margin = options.source_weight, options.source_margin

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """One forward of the source, one of the target."""
        x_N, labels_N = self._source
        drawn_S = torch.randint(len(x_N), (self._rows,), generator=rows.generator, device=x_N.device)
        raw_S, labels_S = x_N[drawn_S], labels_N[drawn_S]
        with torch.no_grad():
            view_S = rows.augment.weak(student.prepare(raw_S), rows.generator)
        source_SC, embedded_SD = self._embedding.read(student.net, lambda: answer_apart(student, view_S))
        view = rows.student_view()
        logits_BC, embedded_BD = self._embedding.read(student.net, lambda: answer(student, view.x_B))
        fresh = rows.fresh_count
        asked = self._ask(teacher, rows, view.compared)
        costs = self._compare(logits_BC[fresh:], view.targets_LC, logits_BC[: view.compared], asked, rows)

        apart_L = dsne_loss(embedded_BD[fresh:], rows.labels_B[fresh:], embedded_SD, labels_S, margin=self._margin)
        apart = apart_L.sum() / len(rows.x_B)
        labelled = nn.functional.cross_entropy(source_SC, labels_S) + costs.classification
        return StepCosts((1.0 - self._weight) * labelled, costs.consistency, self._weight * apart)


def dsne_loss(anchors_LD: Tensor, labels_L: Tensor, others_SD: Tensor, labels_S: Tensor, *, margin: float) -> Tensor:
    """L(a) of the formula above, for each anchor: (L,)."""
    squared_LS = torch.cdist(anchors_LD, others_SD).square() if len(anchors_LD) else anchors_LD.new_zeros((0, 1))
    same_LS = labels_L[:, None] == labels_S[None, :] if len(anchors_LD) else squared_LS.bool()
    farthest_L = torch.where(same_LS, squared_LS, -torch.inf).amax(dim=1)
    nearest_L = torch.where(same_LS, torch.inf, squared_LS).amin(dim=1)
    whole_L = same_LS.any(dim=1) & ~same_LS.all(dim=1)
    # Masked before the relu: an infinity would make the gradient NaN.
    apart_L = torch.where(whole_L, farthest_L, 0.0) - torch.where(whole_L, nearest_L, 0.0) + margin
    return torch.where(whole_L, apart_L.clamp_min(0.0), 0.0)
