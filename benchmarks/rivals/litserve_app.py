"""LitServe with the network of a config, JSON in and out: a rival in benchmarks/serve.py. Arguments: config, port."""

import sys
from pathlib import Path
from typing import Any

import litserve
import torch

from streamlearn.app.build import model_spec
from streamlearn.config import load_config
from streamlearn.models.build import build


class Api(litserve.LitAPI):  # type: ignore[misc]
    """One image in, its probabilities out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - its interface
        """Build the network in the worker."""
        torch.set_num_threads(1)
        self.net = build(model_spec(load_config(Path(sys.argv[-2]))), seed=0).eval()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation, and fails
        """Pixels to a tensor."""
        return torch.tensor(request["x"], dtype=torch.uint8)

    @torch.inference_mode()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Answer one image."""
        probabilities: torch.Tensor = self.net(x[None])[0].softmax(0)
        return probabilities

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        """Class and probabilities."""
        return {"class": int(output.argmax()), "probabilities": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu")
    server.run(port=int(sys.argv[-1]), host="127.0.0.1", log_level="error", generate_client_file=False)
