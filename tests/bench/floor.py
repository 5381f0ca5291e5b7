"""The floor: the least that can answer a stock nnsight client. uvicorn, a Redis list, pub/sub and one worker loop.

Nothing is durable, nobody is kept apart, nothing is checked, one crash loses everything. It is what edif_hpc's own cost
is measured against: `python -m tests.bench.floor server PORT REDIS_URL` and `... worker REDIS_URL MODEL_KEY`,
one worker for each model, which finds it in HF_HUB_CACHE. It is made no slower than it need be: one thread of torch
like the service beside it, garbage of the start frozen, no per-message deflate.
"""

import asyncio
import contextlib
import io
import json
import sys
import uuid
from collections.abc import AsyncIterator


def server(port: int, redis_url: str) -> None:
    import uvicorn
    from fastapi import FastAPI, Form, UploadFile, WebSocket
    from redis.asyncio import Redis

    redis, sockets = Redis.from_url(redis_url, socket_timeout=None), {}

    async def relay() -> None:
        async with redis.pubsub() as pubsub:
            await pubsub.subscribe("floor")
            async for message in pubsub.listen():
                if message["type"] == "message":
                    sockets.pop(message["data"].decode()).set_result(await redis.getdel(message["data"]))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.relay = asyncio.create_task(relay())
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/request")
    # FastAPI tells a file by its annotation alone; None is never its value.
    async def request(data: str = Form(), blob: UploadFile = None) -> dict:  # type: ignore[assignment]
        request_id, envelope = uuid.uuid4().hex, json.loads(data)
        session, compress = envelope["session_id"].encode(), b"%d" % envelope["compress"]
        waiting = f"floor:{envelope['model_key']}"
        await redis.rpush(waiting, b" ".join((request_id.encode(), session, compress, await blob.read())))
        return {"id": request_id, "status": "RECEIVED", "description": "", "data": None, "meta": None}

    @app.websocket("/subscribe")
    async def subscribe(socket: WebSocket) -> None:
        session = uuid.uuid4().hex
        answer = sockets[session] = asyncio.get_running_loop().create_future()
        await socket.accept()
        await socket.send_json({"session_id": session})
        await socket.send_bytes(await answer)
        await socket.close()

    uvicorn.run(app, port=port, log_level="warning", access_log=False, ws_per_message_deflate=False)


def worker(redis_url: str, model_key: str) -> None:
    import gc

    import torch
    import zstandard
    from nnsight.modeling.transformers import TransformersModel
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import _saves, dec, inc
    from redis import Redis

    redis = Redis.from_url(redis_url, socket_timeout=None)
    model = TransformersModel.from_model_key(model_key, dispatch=True)
    model._module.requires_grad_(False)
    objects = model._remoteable_persistent_objects()
    gc.collect()
    gc.freeze()
    redis.set(f"ready:{model_key}", 1)
    while True:
        request_id, session, compress, blob = redis.blpop([f"floor:{model_key}"])[1].split(b" ", 3)
        tracer = RequestModel.deserialize(blob, objects, compress=compress == b"1")
        inc()
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        dec()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        result = zstandard.compress(buffer.getvalue(), 1) if compress == b"1" else buffer.getvalue()
        frame = io.BytesIO()
        answer = {"id": request_id.decode(), "status": "COMPLETED", "description": "", "data": result, "meta": None}
        torch.save(answer, frame, pickle_protocol=4)
        redis.set(session, frame.getvalue())
        redis.publish("floor", session)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        server(int(arguments[0]), arguments[1])
    else:
        worker(*arguments)
