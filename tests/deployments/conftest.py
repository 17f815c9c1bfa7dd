"""A tiny exported model, and an engine behind the HTTP layer without Ray."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai import OpenAI
from pydantic import BaseModel

from deployments.backend import Method, Piece
from deployments.ingress import build_app
from deployments.keys import AccessSettings
from deployments.metrics import Meter
from deployments.prompts import limits_of
from deployments.service import OpenAiService
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.model.weights import export_model
from nsa_platform.serve.async_engine import AsyncEngine, EngineDead
from nsa_platform.serve.loading import load_engine
from tests.conftest import DataFolder
from tests.deployments.running import Serving
from tests.deployments.running import serving as serve_on_ray
from tests.waiting import PATIENCE_S

MODEL_ID = "tiny"
MAX_CONTEXT = 4096
"""Of the exported model: long enough for streams that last some seconds."""
MAX_MODEL_LEN = 256
"""Of the engine in this process: short, so that its end is soon reached."""
ENGINE = EngineConfig(
    max_model_len=MAX_MODEL_LEN, max_num_seqs=4, max_num_batched_tokens=64, max_num_queued=200
)


def tiny_config(**fields: object) -> ModelConfig:
    """Two layers with small blocks: a short prompt crosses every border."""
    return ModelConfig.parse(
        {
            "vocab_size": 512,
            "layers": 2,
            "width": 32,
            "ffn_width": 48,
            "max_context": MAX_CONTEXT,
            "tie_embeddings": False,
            "attention": {
                "kind": "nsa",
                "query_heads": 4,
                "kv_heads": 2,
                "key_width": 16,
                "value_width": 8,
                "compression_block_size": 8,
                "compression_stride": 4,
                "selection_block_size": 8,
                "num_selected_blocks": 3,
                "num_local_blocks": 1,
                "window_size": 12,
            },
            **fields,
        }
    )


@pytest.fixture(scope="session")
def model_folder(tiny_shards: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with noise on every parameter, so that its text does not repeat itself."""
    config = tiny_config()
    model = Transformer(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("served") / "model"
    return export_model(folder, config, model.state_dict(), tokenizer_dir=tiny_shards.tokenizer)


class LocalBackend:
    """One engine in this process."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        engine = load_engine(folder, config, "cpu")
        self.engine = AsyncEngine(engine)
        self.engine.start()
        self.models: Mapping[str, str] = {MODEL_ID: str(folder)}
        self.meter = Meter(self.engine, model=MODEL_ID, replica="here")
        self.service = OpenAiService(
            self.engine,
            engine.tokenizer,
            limits=limits_of(
                engine.tokenizer,
                max_model_len=engine.max_model_len,
                vocab_size=engine.vocab_size,
            ),
            model_id=MODEL_ID,
            fingerprint="0123456789ab",
            meter=self.meter,
        )

    async def answer(
        self, model: str, method: Method, request: BaseModel, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        if method in ("tokenize", "detokenize"):
            yield await getattr(self.service, method)(request)
            return
        async for piece in getattr(self.service, method)(request, request_id):
            yield piece

    async def max_model_len(self, model: str) -> int | None:
        return self.service.limits.max_model_len

    async def is_ready(self, model: str) -> bool:
        try:
            self.engine.check_health()
        except EngineDead:
            return False
        return True

    async def num_requests(self) -> int:
        return self.service.num_requests()

    async def reset_prefix_cache(self) -> None:
        self.service.reset_prefix_cache()

    async def metrics(self) -> Sequence[str]:
        return [self.meter.exposition()]


@contextmanager
def local_app(
    folder: Path, config: EngineConfig = ENGINE, access: AccessSettings | None = None
) -> Iterator[tuple[FastAPI, LocalBackend]]:
    """The HTTP application in front of an engine of its own."""
    backend = LocalBackend(folder, config)
    try:
        yield build_app(backend, access), backend
    finally:
        backend.service.close()
        asyncio.run(backend.engine.close())


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a port of this machine."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as line:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{line.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def app(model_folder: Path) -> Iterator[FastAPI]:
    with local_app(model_folder) as (app, _):
        yield app


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(client: TestClient) -> Iterator[OpenAI]:
    """The official client, whose requests go to the application in this process."""
    yield OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder)


@pytest.fixture(scope="module")
def serving(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The application on Ray Serve, as long as a module's tests need it."""
    with serve_on_ray(model_folder, tmp_path_factory.mktemp("serving")) as running:
        yield running
