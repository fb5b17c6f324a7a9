"""Models that are no folder: found in the cache, or by a hub that answers; else refused at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from rl_lightning.models.folder import check_model_folder
from rl_lightning.models.hub import check_hub
from rl_lightning.prompts.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub whose connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("rl_lightning.models.hub.PATIENCE_S", 0.0)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One that knows no model; gives what it was asked."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def test_without_a_way_to_the_hub_a_name_is_refused():
    for refuse, what in (
        (lambda: check_model_folder("model.path", "m/n"), "model.path=m/n"),
        (lambda: load_tokenizer("m/n"), "'m/n'"),
    ):
        with pytest.raises(ValueError, match=rf"{what} is no folder here .* cannot be reached \(.*refused\): give a .* HF_HOME"):
            refuse()


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        check_model_folder("model.path", "m/n")


def test_a_path_that_does_not_exist_is_refused_without_asking(hub: list[str]):
    with pytest.raises(ValueError, match=r"model.path=/no/such/folder is no folder here .*, and the hub has no such names"):
        check_model_folder("model.path", "/no/such/folder")
    assert hub == []


def test_a_hub_that_answers_is_left_to_the_loader(hub: list[str]):
    check_hub("model.path=m/n", "m/n")
    assert hub == ["/api/models/m/n"]


def test_what_was_downloaded_needs_no_hub(cache: Path):
    (cache / "models--m--n/refs").mkdir(parents=True)
    (cache / "models--m--n/refs/main").write_text("0" * 40)
    (cache / "models--m--n/snapshots" / ("0" * 40)).mkdir(parents=True)
    (cache / "models--m--n/snapshots" / ("0" * 40) / "config.json").write_text("{}")
    check_hub("model.path=m/n", "m/n")
