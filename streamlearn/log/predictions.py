"""Records of the predictions topic: one answer of a published teacher, as JSON, with the sample's id as the key.

    {"id", "class", "class_index", "probabilities", "model_version",
     "position": {"topic", "partition", "offset"}, "time", "predicted_at"}

`position` is the sample's place in the log, `time` is when the log received it and `predicted_at` when it was answered,
in seconds since the epoch. `probabilities` are in the order of the classes; a spare class without a name has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from streamlearn.records import NewRecord, Prediction, Sample
from streamlearn.schema.fields import key_of

_HEADERS = (("content-type", b"application/json"),)


def encode_prediction(
    sample: Sample, prediction: Prediction, classes: Sequence[str], predicted_at_s: float
) -> NewRecord:
    """Return the record of one answer. `classes` are the teacher's, by index."""
    fields = {
        "id": sample.sample_id,
        "class": classes[prediction.class_index],
        "class_index": prediction.class_index,
        "probabilities": prediction.probabilities_C[: len(classes)],
        "model_version": prediction.model_version,
        "position": sample.position._asdict(),
        "time": sample.timestamp_s,
        "predicted_at": round(predicted_at_s, 3),
    }
    value = orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
    return NewRecord(key_of(sample.sample_id), value, _HEADERS)
