"""A server that a test starts and stops on a free port of this machine, and how it is asked."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


@contextmanager
def running(*command, **environment):
    """Run a server, which takes ``--port``, until the block ends; gives its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=30):
                    break
            except urllib.error.URLError:
                assert process.poll() is None, process.stdout.read()[-3000:]
                time.sleep(0.1)
        yield process, address
    finally:
        process.terminate()
        process.communicate(timeout=60)


def data_uri(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def post(address, body, path="/v1/chat/completions"):
    """(status, JSON, or text where it is streamed) of an answer."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
            return answer.status, text if text.startswith("data:") else json.loads(text)
    except urllib.error.HTTPError as problem:
        with problem:
            return problem.code, json.loads(problem.read())


def question(text, *images, **more):
    """The body of a request about images: Pillow images, or what stands for their addresses."""
    parts = [{"type": "image_url", "image_url": {"url": i if isinstance(i, str) else data_uri(i)}} for i in images]
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "model": "nano", **more}


def said(found):
    """The text of an answer that came whole."""
    status, body = found
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def streamed(text):
    """The words of a streamed answer, and why it ended."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    return "".join(choice["delta"].get("content") or "" for choice in choices), choices[-1]["finish_reason"]
