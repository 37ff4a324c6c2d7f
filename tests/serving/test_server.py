"""``uhd serve``, over HTTP as its users meet it: what is read, what is refused, and what it lives through."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

import uhd
from tests.serving.running import data_uri, post, question, running, said, streamed
from uhd.cli import main
from uhd.nano.task import scene

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed)

FRESH = 4_000_000  # a seed that neither training nor the card's numbers use
DRAWN = scene(FRESH, 1)
GREY = Image.new("L", (50, 40), 222)


@pytest.fixture(scope="module")
def nano():
    with running("uhd.cli", "serve", "--nano") as (process, address):
        yield process, address


@pytest.fixture(scope="module")
def address(nano):
    return nano[1]


def test_one_command_reads_what_is_on_an_image(address):
    asked = question("all?", DRAWN.image)
    status, body = post(address, asked)
    assert status == 200
    assert body["model"] == "nano"
    assert body["choices"][0]["message"]["content"] == DRAWN.text
    assert body["choices"][0]["finish_reason"] == "stop"
    assert streamed(post(address, {**asked, "stream": True})[1]) == (DRAWN.text, "stop")
    assert post(address, {**asked, "max_tokens": 2})[1]["choices"][0]["finish_reason"] == "length"
    stop = DRAWN.text[:3]
    for form in (stop, ["nowhere", stop]):
        assert said(post(address, {**asked, "stop": form})) == stop
    assert streamed(post(address, {**asked, "stop": stop, "stream": True})[1])[0] == stop
    assert said(post(address, {**asked, "stop": []})) == DRAWN.text


def test_openai_s_client_is_understood(address):
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:  # else its connection stays open
        assert [model.id for model in client.models.list()] == ["nano"]
        messages = question("all?", DRAWN.image)["messages"]
        found = client.chat.completions.create(model="nano", messages=messages)
        assert found.choices[0].message.content == DRAWN.text
        parts = client.chat.completions.create(model="nano", messages=messages, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == DRAWN.text
        with pytest.raises(openai.BadRequestError, match="cannot be decoded"):
            client.chat.completions.create(
                model="nano", messages=question("all?", "data:image/png;base64,!")["messages"]
            )


def test_no_image_and_several_and_words_that_look_like_one(address):
    def positions(body):
        status, found = post(address, {**body, "max_tokens": 2})
        assert status == 200, found
        return found["usage"]["prompt_tokens"]

    plans = [uhd.load_nano().visual.plan(image.size[::-1]).num_tokens for image in (DRAWN.image, GREY)]
    begin = 1
    assert positions(question("all?")) == begin + 4
    assert positions({"messages": [{"role": "user", "content": "all?"}]}) == begin + 4
    assert positions(question("all?", DRAWN.image, GREY)) == begin + sum(plans) + 4
    assert positions(question("<image>", GREY)) == begin + plans[1] + len("<image>")
    assert positions(question("<end><image>")) == begin + len("<end><image>")


def test_wrong_input_is_answered_with_the_sentence_that_refuses_it(address):
    whole = data_uri(DRAWN.image)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
    wrong = {
        "truncated or damaged": question("all?", whole[:200]),
        "base64 cannot be decoded": question("all?", "data:image/png;base64,####"),
        "not an image in a format": question("all?", "data:text/plain,words"),
        "cannot be fetched": question("all?", nobody),
        "come as data: URIs or from http(s)://, got '/etc/hostname'": question("all?", "/etc/hostname"),
        "the language model has 512": question("x" * 600, GREY),
        "60 images": question("all?", *[GREY] * 60),
        "requested 'gpt'": question("all?", model="gpt"),
        "messages holds no message": {"model": "nano", "messages": []},
        "KeyError: 'messages'": {"model": "nano"},
        "KeyError: 'image_url'": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "got 'audio'": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}]},
        "greater than 0": question("all?", GREY, max_tokens=-1),
        "stop is a text, or a list of texts, got 3": question("all?", stop=3),
        "tools is a list, got 3": question("all?", tools=3),
        "surrogates not allowed": question("\ud800"),
        "is a string, got 3": question(3),
        "(TypeError: the JSON object": question("all?", generation_config=3),
        "text, image_url or video_url, got ['image']": {
            "messages": [{"role": "user", "content": [{"type": "image", "url": whole}]}]
        },
    }
    wrong["the language model has 512"]["stream"] = True  # refused before a stream begins
    wrong["of them images or videos"] = wrong.pop("60 images")
    for words, body in wrong.items():
        status, found = post(address, body)
        assert 400 <= status < 500, found
        assert words in json.dumps(found), found
    assert post(address, {"model": "gpt"}, "/load_model")[0] == 404


def test_what_would_be_left_aside_is_refused_and_what_asks_for_no_more_is_not(address):
    asked = question("all?", DRAWN.image)
    more = {
        "n": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "presence_penalty": 0.5,
        "response_format": {"type": "json_object"},
        "tool_choice": "none",
        "reasoning_effort": "low",
        "verbosity": "low",
    }
    for field, value in more.items():
        for stream in (False, True):
            status, found = post(address, {**asked, field: value, "stream": stream})
            assert status == 400
            assert (
                f"this server does not do '{field}', got {json.dumps(value)}: leave it out"
                in found["error"]["message"]
            )
    plain = {"n": 1, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me"}
    assert said(post(address, {**asked, **plain, "tool_choice": None, "metadata": {"a": "b"}})) == DRAWN.text
    counted = post(address, {**asked, "stream": True, "stream_options": {"include_usage": True}})[1]
    assert '"completion_tokens":' in counted
    legacy = {"model": "nano", "prompt": "all?", "max_tokens": 2}
    assert post(address, {**legacy, "logprobs": 0}, "/v1/completions")[0] == 400
    assert post(address, {**legacy, "logit_bias": {"5": 9}}, "/v1/completions")[0] == 400
    assert said(post(address, {**asked, "logit_bias": {"5": 0.1}})) == DRAWN.text  # there it is done
    assert post(address, {**legacy, "best_of": 1}, "/v1/completions")[0] == 200
    new = {"model": "nano", "input": "all?", "stream": False, "max_output_tokens": 2}
    assert post(address, {**new, "previous_response_id": "resp_1"}, "/v1/responses")[0] == 400
    for field, value in {"reasoning": {"effort": "high"}, "conversation": "conv_1"}.items():
        assert f"'{field}'" in post(address, {**new, field: value}, "/v1/responses")[1]["error"]["message"]
    assert post(address, {**new, "store": False, "truncation": "disabled"}, "/v1/responses")[0] == 200


def test_the_page_s_commands_give_what_it_says(address, capsys):
    page = (pathlib.Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()
    ask = re.search(r"question.json <<'ASK'\n(.*?)\nASK\n", page, re.S)[1]
    exec(compile(ask, "docs/serving.md", "exec"), {})
    found = said(post(address, json.loads(capsys.readouterr().out)))
    assert f"`content` is `{found}`".replace("\n", "\\n") in page


def test_what_it_cannot_serve(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for arguments, words in {
        (str(tmp_path),): "holds a model of type 'llama'",
        (str(tmp_path / "no"),): "no folder with a saved model",
        ("--nano", "--port", "70000"): "--port is a number from 0 to 65535, got 70000",
    }.items():
        assert main(["serve", *arguments]) == 1
        found = capsys.readouterr().err
        assert found.startswith("uhd serve: ")
        assert words in found
    with pytest.raises(SystemExit, match="2"):
        main(["serve"])


def test_a_limit_that_lets_no_picture_through_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("uhd.serving.server.ready", lambda *args, **kwargs: pytest.fail("it loads a model"))
    for limit in ("0", "-1"):
        assert main(["--max-pixels", limit, "serve", "--nano"]) == 1
        assert capsys.readouterr().err == f"uhd serve: max_pixels must be a positive int, got {limit}\n"


@pytest.mark.slow
def test_the_other_shipped_model_by_its_name():
    from uhd.serving.server import ready

    with running("uhd.cli", "serve", "--nano", "nano-plus") as (_, address):
        assert said(post(address, question("all?", DRAWN.image, model="nano-plus"))) == DRAWN.text
    with pytest.raises(ValueError, match="no model 'nan' comes"):
        ready("nan")


@pytest.mark.slow
def test_a_folder_by_its_path_and_its_name_and_by_the_stock_command(tmp_path):
    folder = tmp_path / "eyes"
    uhd.load_nano().save_pretrained(folder)
    stock = ("transformers.cli.transformers", "serve", str(folder), "--trust-remote-code")
    with running(*stock, HF_MODULES_CACHE=str(tmp_path)) as (_, address):
        asked = question("all?", DRAWN.image, model=str(folder), max_tokens=48)
        assert said(post(address, asked)) == DRAWN.text
    folder = folder.rename(tmp_path / "eyes@2")
    with running("uhd.cli", "--max-pixels", "3000", "serve", str(folder)) as (process, address):
        assert post(address, question("all?", Image.new("L", (61, 50)), model=folder.name))[0] == 400
        with urllib.request.urlopen(f"{address}/v1/models") as listed:
            assert json.load(listed)["data"][0]["id"] == str(folder)
        for name in (str(folder), folder.name):
            assert said(post(address, question("all?", DRAWN.image, model=name))) == DRAWN.text
        with urllib.request.urlopen(urllib.request.Request(f"{address}/reset", method="POST")) as done:
            assert done.status == 200
        assert said(post(address, question("all?", DRAWN.image, model=folder.name))) == DRAWN.text
        port = address.rpartition(":")[2]
        again = [sys.executable, "-m", "uhd.cli", "serve", "--nano", "--port", port]
        taken = subprocess.run(again, capture_output=True, text=True)
        assert taken.returncode == 1
        assert "address already in use" in taken.stderr
        process.terminate()
        assert process.wait(60) == 143


@pytest.mark.slow
def test_answers_equal_generate_s(address):
    model, drawn = uhd.load_nano(), [scene(FRESH, index) for index in range(100)]
    for item in drawn:
        batch = model.processor(text="<begin><image>all?", images=item.image)
        ids = model.generate(**batch, do_sample=False, max_new_tokens=100)[0, batch["input_ids"].shape[1] :]
        wanted = model.processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert said(post(address, question("all?", item.image, temperature=0, max_tokens=100))) == wanted


def memory(process):
    """Resident memory of a process, bytes."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_it_lives_through_what_clients_do_and_its_memory_returns(nano):
    process, address = nano
    asked = question("all?", DRAWN.image)
    large = data_uri(Image.new("L", (10_000, 6_000), 230))
    for _ in range(8):
        said(post(address, asked))
    before = memory(process)
    drawn = [scene(FRESH, index) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda item: said(post(address, question("all?", item.image))), drawn))
    assert together == [said(post(address, question("all?", item.image))) for item in drawn]
    lasting = json.dumps({"max_new_tokens": 400, "min_new_tokens": 400})
    leave_mid_stream(address, question("all?", GREY, stream=True, generation_config=lasting))
    status, body = post(address, question("all?", large))
    assert status == 400
    assert "60000000" in body["error"]["message"].replace(",", "").replace("_", ""), body
    whole = data_uri(DRAWN.image)
    for cut in range(200):
        status, _ = post(address, question("all?", whole[: len(whole) // 2 - cut % 50]))
        assert status == 400
    assert said(post(address, asked)) == DRAWN.text
    assert memory(process) < before * 1.1


def leave_mid_stream(address, body):
    """Begin to read a streamed answer, and hang up."""
    host, port = address.removeprefix("http://").split(":")
    text = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as line:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        assert b"content" in b"".join(line.recv(500) for _ in range(3))
