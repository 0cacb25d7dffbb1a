"""A small OpenAI-compatible server on loopback that judges by the rule labeller, for tests.

`python -m tests.client.evaluate.judge_server` serves until interrupted and prints its address. With
`--break N` every Nth answer is no JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from client.evaluate.judge import ERROR_KINDS
from common.labeller import NO_FINDING, present_findings


def verdict(question: str) -> dict[str, Any]:
    """Answer one of the two questions from the findings that the labeller reads."""
    truth, _, draft = question.partition("Radiologist: ")[2].partition("\n\nDraft: ")
    there, said = (present_findings(text) - {NO_FINDING} for text in (truth, draft))
    if '"matched"' in question:
        return {
            "matched": [{"urgency": "actionable", "errors": []} for _ in said & there],
            "missed": [{"urgency": "actionable"} for _ in there - said],
            "false": [{"urgency": "actionable"} for _ in said - there],
        }
    counts = dict.fromkeys(ERROR_KINDS, 0)
    significant = counts | {"false_finding": len(said - there), "missed_finding": len(there - said)}
    return {"significant": significant, "insignificant": counts}


@contextmanager
def judge_server(*, break_every: int = 0, status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve on a free loopback port; yields the URL for `local_endpoint` and the requests seen."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, **body})
            text = json.dumps(verdict(body["messages"][0]["content"]))
            if break_every and len(seen) % break_every == 0:
                text = "I would say this draft is fine."
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            data = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    with judge_server(break_every=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as (address, _):
        print(address, flush=True)
        threading.Event().wait()
