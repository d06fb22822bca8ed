"""The ledger as other processes read it: the state of a label, and the payload of a sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamlearn.ledger import LabelState, LabelStatus
from streamlearn.ledger.held import HeldRow, newest_held
from streamlearn.ledger.rows import CORRECTED, SCORED, LabelRow, Payloads, key_of, unpack_answer, unpack_sample
from streamlearn.ledger.store_view import Get, StoreView
from streamlearn.records import ERASED, Array, Position, Schema


class LedgerView:
    """The ledger as of its last flush, for other processes (servers). Any thread may use it.

    It may be opened before the learner has ever run: then it knows no sample and no label.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._payloads = Payloads(schema)
        self._view = StoreView(path)

    def get(self, sample_id: str) -> LabelStatus | None:
        """The state of a sample's label; None if neither sample nor label is known.

        Raises:
            StoreError: the store cannot be read, see `StoreView.read`.
        """
        key = key_of(sample_id)
        with self._view.read() as get:
            row_number = get("ids", key)
            label = get("early", key) if row_number is None else get("labels", row_number)
            sample = None if row_number is None else get("samples", row_number) or get("evicted", row_number)
            held = newest_held(get, key) if label is None else None
            if label is not None:
                status = _label_status(get, label)
            elif held is not None:
                status = _held_status(get, held)
            else:
                status = LabelStatus(LabelState.UNLABELLED)
            if sample is None:
                return None if status.state is LabelState.UNLABELLED else status
            known, published = unpack_sample(sample), get("answers", row_number)
            if published is not None:
                answer = unpack_answer(published)
                known = known._replace(predicted_class=answer.class_index, model_version=answer.model_version)
            return replace(
                status,
                sample_position=_position(get, known.topic, known.partition, known.offset),
                sample_time_s=known.arrived_s,
                predicted_class=None if known.predicted_class < 0 else known.predicted_class,
                model_version=None if known.predicted_class < 0 else known.model_version,
            )

    def payload(self, sample_id: str) -> Array | None:
        """The payload of a sample, read-only. None if the store does not hold it, or if the sample is erased.

        Raises:
            StoreError: the store cannot be read, see `StoreView.read`.
        """
        with self._view.read() as get:
            row_number = get("ids", key_of(sample_id))
            if row_number is None:
                return None
            data, label = get("samples", row_number), get("labels", row_number)
        if data is None or (label is not None and LabelRow.unpack(label).class_index == ERASED):
            return None
        return self._payloads.read(data)

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._view.close()


def _label_status(get: Get, data: bytes) -> LabelStatus:
    row = LabelRow.unpack(data)
    record = row.deciding
    return LabelStatus(
        row.progress,
        None if row.class_index < 0 else row.class_index,
        label_position=None if record is None else _position(get, *record.place),
        label_time_s=None if record is None else record.time_s,
        corrected=bool(row.flags & CORRECTED),
        scored=bool(row.flags & SCORED),
        first_trained_step=row.trained_step or None,
        implied=record is None,
    )


def _held_status(get: Get, row: HeldRow) -> LabelStatus:
    return LabelStatus(
        LabelState.HELD,
        label_position=_position(get, row.topic, row.partition, row.offset),
        label_time_s=row.time_s,
        class_name=row.class_name,
    )


def _position(get: Get, topic: int, partition: int, offset: int) -> Position:
    return Position(get("topics", topic), partition, offset)
