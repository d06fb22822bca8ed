"""GET /schema: what a sample and a label look like, from the config."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from streamlearn.log.codec import Codec
from streamlearn.serve.parts import Parts
from streamlearn.serve.record_schema import label_example, sample_example, sample_schema
from streamlearn.serve.replies import JsonReply
from streamlearn.serve.request_schemas import tensor_example, tensor_sample
from streamlearn.serve.schemas import SchemaReply, described


def add_schema_route(router: APIRouter, parts: Parts) -> None:
    """Add the route."""
    configured = _configured(parts.codec)

    @router.get(
        "/schema",
        summary="What a sample and a label look like",
        **described("predict", SchemaReply, 500),
    )
    async def schema() -> Response:
        """The fields of a record, where id, time and label are, the classes, and examples."""
        return JsonReply({**configured, "classes": parts.predictor.classes})


def _configured(codec: Codec) -> dict[str, Any]:
    """What the config says of samples and labels. Not where a user's encoder is, nor the registry."""
    has_columns = codec.rows is not None
    return {
        "columns": [
            {
                "name": name,
                "kind": config.kind,
                "path": config.path(name).text,
                "options": {option: getattr(config, option) for option in config.options if option != "encoder"},
            }
            for name, config in codec.columns.items()
        ],
        "shape": codec.schema.shape,
        "dtype": codec.schema.dtype.name,
        "samples": codec.source.samples.model_dump(exclude={"message"}),
        "labels": codec.source.labels.model_dump(exclude={"message"}),
        "sample_schema": sample_schema(codec) if has_columns else tensor_sample(codec),
        "sample_example": sample_example(codec) if has_columns else tensor_example(codec.schema),
        "label_example": label_example(codec),
    }
