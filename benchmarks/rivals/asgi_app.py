"""uvicorn and the network of a config, nothing else: a rival in benchmarks/serve.py. Arguments: config, port."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn

from streamlearn.app.build import model_spec
from streamlearn.config import load_config
from streamlearn.models.build import build

torch.set_num_threads(1)
SPEC = model_spec(load_config(Path(sys.argv[-2])))
NET = build(SPEC, seed=0).eval()


@torch.inference_mode()
def answer(body: bytes) -> bytes:
    """Class and probabilities of one image."""
    x = torch.frombuffer(bytearray(body), dtype=torch.uint8).view(1, *SPEC.shape)
    probabilities = NET(x)[0].softmax(0)
    return json.dumps({"class": int(probabilities.argmax()), "probabilities": probabilities.tolist()}).encode()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer any POST; an empty body gets an empty object."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    content = answer(body) if body else b"{}"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[-1]), log_level="error", access_log=False)
