"""The floor: the least that can answer a stock nnsight client. uvicorn, a Redis list, pub/sub and one worker loop.

Nothing is durable, nobody is kept apart, nothing is checked, one crash loses everything. It is what edif_hpc's own cost
is measured against: `python -m tests.bench.floor server PORT REDIS_URL` and `... worker REDIS_URL CACHE MODEL_KEY`.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import sys
import uuid


def server(port: int, redis_url: str) -> None:
    import uvicorn
    from fastapi import FastAPI, Form, UploadFile, WebSocket
    from redis.asyncio import Redis

    app, redis, sockets = FastAPI(), Redis.from_url(redis_url), {}

    @app.post("/request")
    async def request(data: str = Form(), blob: UploadFile = None) -> dict:  # type: ignore[assignment]
        request_id = uuid.uuid4().hex
        await redis.rpush("floor", pickle.dumps((request_id, data, await blob.read())))  # type: ignore[misc]
        return {"id": request_id, "status": "RECEIVED", "description": "", "data": None, "meta": None}

    @app.websocket("/subscribe")
    async def subscribe(socket: WebSocket) -> None:
        session = uuid.uuid4().hex
        answer = sockets[session] = asyncio.get_running_loop().create_future()
        await socket.accept()
        await socket.send_json({"session_id": session})
        await socket.send_bytes(await answer)
        await socket.close()

    async def relay() -> None:
        async with redis.pubsub() as pubsub:
            await pubsub.subscribe("floor")
            async for message in pubsub.listen():
                if message["type"] == "message":
                    sockets.pop(message["data"].decode()).set_result(await redis.getdel(message["data"]))

    app.router.on_startup.append(lambda: setattr(app.state, "relay", asyncio.ensure_future(relay())))
    uvicorn.run(app, port=port, log_level="warning", access_log=False, ws_per_message_deflate=False)


def worker(redis_url: str, cache: str, model_key: str) -> None:
    import json

    import torch
    import zstandard
    from nnsight.modeling.transformers import TransformersModel
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import _saves, dec, inc
    from redis import Redis

    redis = Redis.from_url(redis_url)
    model = TransformersModel.from_model_key(model_key, dispatch=True, model_kwargs={"cache_dir": cache})
    model._module.requires_grad_(False)
    objects = model._remoteable_persistent_objects()
    redis.set("floor-ready", 1)
    while True:
        request_id, data, blob = pickle.loads(redis.blpop(["floor"])[1])
        envelope = json.loads(data)
        tracer = RequestModel.deserialize(blob, objects, compress=envelope["compress"])
        inc()
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        dec()
        result = zstandard.compress(buffer.getvalue(), 1) if envelope["compress"] else buffer.getvalue()
        frame = io.BytesIO()
        torch.save({"id": request_id, "status": "COMPLETED", "data": result}, frame, pickle_protocol=4)
        redis.set(envelope["session_id"], frame.getvalue())
        redis.publish("floor", envelope["session_id"])


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        server(int(arguments[0]), arguments[1])
    else:
        worker(*arguments)
