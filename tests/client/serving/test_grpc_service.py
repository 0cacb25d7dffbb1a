"""Drafts over gRPC on a Unix socket: the same events, errors by name, a private directory."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from client import drafting_pb2, drafting_pb2_grpc
from client.serving.grpc_service import start_grpc
from common.errors import ServingRefused
from tests.client.serving.hosting import Hosted, png


def test_a_local_tool_drafts_over_the_socket(host: Hosted, tmp_path: Path) -> None:
    path = tmp_path / "run" / "drafting.sock"
    server = host.run(start_grpc(host.service, path, user="local:grpc"))
    try:
        assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
        with pytest.raises(ServingRefused, match="free socket"):
            host.run(start_grpc(host.service, path, user="local:grpc"))
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = drafting_pb2_grpc.DraftingStub(channel)
            about = stub.About(drafting_pb2.AboutRequest())
            assert about.model.label == host.service.model.label and about.model.release_epsilon == 7.5
            request = drafting_pb2.DraftRequest(image=png(1), indication="Cough.", max_new_tokens=9)
            events = list(stub.Draft(request, timeout=300))
            kinds = [event.WhichOneof("event") for event in events]
            assert kinds == ["decision", *["token"] * 9, "draft"]
            draft = events[-1].draft
            assert draft.text and draft.model.round == 2 and draft.access_record
            assert draft.sentences[0].text == draft.text[: draft.sentences[0].end]
            for bad, code in (
                (drafting_pb2.DraftRequest(image=b"no image"), grpc.StatusCode.INVALID_ARGUMENT),
                (drafting_pb2.DraftRequest(image=png(1), max_new_tokens=99999), "RequestRefused"),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    list(stub.Draft(bad, timeout=300))
                assert code in (caught.value.code(), str(caught.value.details()).partition(":")[0])
    finally:
        host.run(server.stop(1.0))


def test_a_socket_in_an_open_directory_is_refused(host: Hosted, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ServingRefused, match="0700"):
        host.run(start_grpc(host.service, folder / "x.sock", user="local:grpc"))
