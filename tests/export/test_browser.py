"""The shipped nano's eyes in a browser: onnxruntime-web in a headless Chromium, on images that need no resize.

Needs Chromium, the extra `onnx`, and the npm package onnxruntime-web, whose folder `dist` UHD_ORT_WEB names.
"""

import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

import uhd
from tests.export.parts import tokens_of
from tests.slicing.test_planner_js import BROWSERS, SOURCE
from tests.tiny import picture
from uhd import export
from uhd.export.host import Graph

pytestmark = [pytest.mark.slow, pytest.mark.onnx, pytest.mark.filterwarnings("ignore")]

PAGE = """<!DOCTYPE html><script src="/ort.wasm.min.js"></script><script src="/planner.js"></script><script>
// Plans by planner.js, cuts pixels to normalised patches, and takes what follows from grids alone from the server.
function patchesOf(pixels, [height, width], graph) {
  const p = graph.patch_size, found = new Float32Array(height * width * 3);
  let at = 0;
  for (let y = 0; y < height; y += p) for (let x = 0; x < width; x += p)
    for (let c = 0; c < 3; c++) for (let py = 0; py < p; py++) for (let px = 0; px < p; px++)
      found[at++] = (pixels[((y + py) * width + x + px) * 4 + c] / 255 - graph.pixels.mean[c]) / graph.pixels.std[c];
  return found;
}
async function pixelsOf(url) {
  const bitmap = await createImageBitmap(await (await fetch(url)).blob(), { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  canvas.drawImage(bitmap, 0, 0);
  return [canvas.getImageData(0, 0, bitmap.width, bitmap.height).data, [bitmap.height, bitmap.width]];
}
function made(type, x) {
  if (type === "int64") return BigInt64Array.from(x.map(BigInt));
  return type === "bool" ? Uint8Array.from(x) : Float32Array.from(x);
}
async function encode(session, graph, name) {
  const [pixels, size] = await pixelsOf(`/${name}.png`);
  const plan = uhdPlanner.plan(size, graph.slicing);
  if (plan.views.length !== 1 || plan.overview_hw.join() !== size.join()) throw new Error("it needs a resize");
  const feeds = {};
  for (const [key, { dims, type, data }] of Object.entries(await (await fetch(`/${name}.json`)).json()))
    feeds[key] = new ort.Tensor(type, made(type, data), dims);
  const patches = patchesOf(pixels, size, graph);
  feeds.patches = new ort.Tensor("float32", patches, [1, patches.length / (3 * graph.patch_size ** 2),
    3 * graph.patch_size ** 2]);
  const { tokens } = await session.run(feeds);
  return { dims: tokens.dims, data: Array.from(tokens.data) };
}
(async () => {
  let result;
  try {
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create("/model.onnx", { executionProviders: ["wasm"] });
    const graph = await (await fetch("/model.json")).json();
    result = { agent: navigator.userAgent, ort: ort.env.versions.web, images: [] };
    for (let n = 0; n < COUNT; n++) result.images.push(await encode(session, graph, `image${n}`));
  } catch (problem) { result = { error: String(problem) }; }
  await fetch("/result", { method: "POST", body: JSON.stringify(result) });
})();
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_POST(self):
        self.server.result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_):
        pass


def served(folder, browser):
    """What the page of a folder posts once a browser has run it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
    server.done, server.result = threading.Event(), None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    page = f"http://127.0.0.1:{server.server_port}/index.html"
    window = subprocess.Popen([*command, "--remote-debugging-port=0", page], stderr=subprocess.DEVNULL)
    try:
        server.done.wait(240)
    finally:
        window.terminate()
        window.wait(30)
        server.shutdown()
        server.server_close()
    return server.result


def test_the_nano_sees_the_same_in_a_browser(tmp_path):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    dist = Path(os.environ.get("UHD_ORT_WEB", ""))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or not (dist / "ort.wasm.min.js").is_file():
        pytest.skip("Chromium, or the package onnxruntime-web in the folder UHD_ORT_WEB, is missing")
    made = uhd.load_nano().visual
    export.onnx(made, tmp_path / "model.onnx")
    for file in ("ort.wasm.min.js", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs"):
        shutil.copy(dist / file, tmp_path)
    shutil.copy(SOURCE, tmp_path)
    images = [picture(*size, seed) for seed, size in enumerate(whole_sizes(made.slicing))]
    graph = Graph.read(tmp_path / "model.json")
    for number, image in enumerate(images):
        image.save(tmp_path / f"image{number}.png")
        given = export.inputs([image], graph)
        del given["patches"]
        told = {
            name: {"dims": array.shape, "type": str(array.dtype), "data": array.astype(float).ravel().tolist()}
            for name, array in given.items()
        }
        (tmp_path / f"image{number}.json").write_text(json.dumps(told))
    (tmp_path / "index.html").write_text(PAGE.replace("COUNT", str(len(images))))
    result = served(tmp_path, browser)
    assert result is not None
    assert "error" not in result, result
    assert len(result["images"]) == len(images) == 3
    print(result["agent"], "onnxruntime-web", result["ort"])
    for image, found in zip(images, result["images"], strict=True):
        tokens = np.array(found["data"], np.float32).reshape(found["dims"])
        off = np.abs(tokens - tokens_of(made, [image])).max()
        print(image.size, off)
        assert off <= 1e-3


def whole_sizes(slicing):
    """Three (height, width) that are one view, as they are."""
    unit, side = slicing.unit, slicing.image_size
    sizes = [(h, w) for h in range(unit, 2 * side, unit) for w in range(unit, 2 * side, unit)]
    whole = [size for size in sizes if (found := slicing.plan(size)).grid is None and found.overview_hw == size]
    return [whole[0], whole[len(whole) // 2], whole[-1]]
