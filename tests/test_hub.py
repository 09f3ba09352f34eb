"""From a hub to a run and back: a small server on this machine speaks the hub's protocol, files have the public layout."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import save_file
from test_weights import gpt2_names, hugging_face_names, openai_names

from vad import OUR_LEXICON

COMMIT = "c" * 40
SHORT = ["--epochs", "1", "--batch", "8", "--validate-every", "100", "--precision", "float32", "--device", "cpu"]


@pytest.fixture
def hub(tmp_path):
    """A folder of owner/name folders, and its address."""
    root = tmp_path / "hub"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0].strip("/")
            if path.startswith("api/models/"):
                name, _, tree = path.removeprefix("api/models/").partition("/tree/")
                files = [{"type": "file", "path": str(file.relative_to(root / name)), "size": file.stat().st_size, "oid": "0" * 40}
                         for file in (root / name).rglob("*") if file.is_file()]
                return self.reply(200, json.dumps(files if tree else {"id": name.split("/revision/")[0], "sha": COMMIT}).encode())
            repository, _, rest = path.partition("/resolve/")
            file = root / repository / rest.partition("/")[2]
            if not file.is_file():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if (root / repository).is_dir() else "RepoNotFound"})
            content = file.read_bytes()
            self.reply(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

        do_HEAD = do_GET

        def reply(self, status: int, content: bytes, headers: dict | None = None) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def publish(root: Path, name: str, tensors: dict, *files: tuple[str, str]) -> None:
    (root / name).mkdir(parents=True)
    save_file(tensors, root / name / "model.safetensors")
    for file, text in files:
        (root / name / file).write_text(text)


@pytest.mark.parametrize("names", [openai_names, hugging_face_names])
def test_train_pass_on_and_ask(hub, names, make_model, tokenizer_json, toy_root, tmp_path):
    """CLIP and GPT-2 come from the hub, ArtEmis from a folder; the run goes to the hub as it is, and answers from there."""
    (root, address), model = hub, make_model(tower_heads=1, heads=1)
    publish(root, "someone/clip", {name: tensor.contiguous() for name, tensor in names(model).items()})
    publish(root, "someone/gpt2", gpt2_names(model), ("tokenizer.json", tokenizer_json))
    artemis = tmp_path / "data" / "artemis_v1"
    shutil.copytree(toy_root / "toy-60", artemis, ignore=shutil.ignore_patterns("cache", "toy.json"))
    (artemis / "lexicon.txt").rename(artemis / "NRC-VAD-Lexicon.txt")
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)

    def run(*command) -> str:
        told = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        return told.stdout
    run("train.py", "--data", "artemis_v1", "--data-root", tmp_path / "data", "--clip", "someone/clip", "--gpt2", "someone/gpt2",
        "--runs", tmp_path / "runs", "--name", "one", *SHORT)
    results = json.loads((tmp_path / "runs" / "one" / "results.json").read_text())
    assert results["test"]["greedy"]["counts"]["images"] and (tmp_path / "runs" / "one" / "report.html").is_file()
    shutil.copytree(tmp_path / "runs" / "one", root / "me" / "model", ignore=shutil.ignore_patterns("state"))
    picture = ROOT / "examples" / "awe-moon.png"
    answers = [json.loads(run("sample.py", picture, "--checkpoint", source, "--greedy", "--json", "--precision", "float32"))
               for source in ("me/model", tmp_path / "runs" / "one")]
    for answer in answers:
        del answer["seconds"]
    assert answers[0] == answers[1]


def test_the_authors_release_comes_from_the_hub_and_stays(hub, tmp_path):
    """Once fetched it needs no hub; what was never fetched is missed within seconds, not after half a minute."""
    root, address = hub
    official = ROOT / "tests" / "fixtures" / "official"
    shutil.copytree(official, root / "someone" / "sevlm")
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)

    def convert(name: str) -> tuple[int, str]:
        told = subprocess.run([sys.executable, "-m", "related.authors", name, "--clip", official / "clip_openai.safetensors", "--lexicon",
                               OUR_LEXICON, "--out", tmp_path / f"ours-{len(list(tmp_path.iterdir()))}"],
                              cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=20)
        return told.returncode, told.stderr
    assert convert("someone/sevlm")[0] == 0
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody is there
    assert convert("someone/sevlm") == (0, "")
    code, problem = convert("someone/else")
    assert code == 1 and "the hub did not give someone/else" in problem and "Traceback" not in problem
