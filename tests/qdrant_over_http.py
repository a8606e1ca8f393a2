"""Qdrant's HTTP interface in front of qdrant-client's local mode, with failures on demand.

Only the calls that the server store makes. What comes in and goes out has the shapes of the
client's own models.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qdrant_client import QdrantClient, models


class QdrantOverHttp:
    """A server on a free port of this machine; a context manager.

    Attributes:
        url: Where it listens.
        key: What requests must carry as `api-key`; None for nothing.
        drop: How many of the next requests are cut off, before or (`after`) they took effect.
        status: What all requests are answered with instead, if not None.
        seen: Method and path of every request.
    """

    def __init__(self, *, key: str | None = None) -> None:
        self.local = QdrantClient(":memory:")
        self.key = key
        self.drop = 0
        self.after = False
        self.status: int | None = None
        self.seen: list[str] = []
        # The local mode is not made for several threads.
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "QdrantOverHttp":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.local.close()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """The result of one request."""
        local = self.local
        if path == "/aliases":
            return local.get_aliases()
        if path == "/collections/aliases":
            operations = models.ChangeAliasesOperation(**body).actions
            return local.update_collection_aliases(operations)
        found = re.fullmatch(r"/collections/([^/]+)(.*)", path)
        assert found, path
        name, rest = found.groups()
        match method, rest:
            case "GET", "/exists":
                return {"exists": local.collection_exists(name)}
            case "GET", "":
                return local.get_collection(name)
            case "PUT", "":
                wanted = models.CreateCollection(**body)
                return local.create_collection(
                    name, vectors_config=wanted.vectors, metadata=wanted.metadata
                )
            case "PATCH", "":
                return local.update_collection(name, metadata=body["metadata"])
            case "DELETE", "":
                return local.delete_collection(name)
            case "PUT", "/points":
                return local.upsert(name, models.PointsBatch(**body).batch)
            case "POST", "/points":
                wanted = models.PointRequest(**body)
                return local.retrieve(
                    name, wanted.ids, wanted.with_payload, with_vectors=wanted.with_vector
                )
            case "POST", "/points/delete":
                return local.delete(name, models.PointIdsList(**body))
            case "POST", "/points/scroll":
                wanted = models.ScrollRequest(**body)
                points, following = local.scroll(
                    name,
                    limit=wanted.limit,
                    offset=wanted.offset,
                    with_payload=wanted.with_payload,
                    with_vectors=wanted.with_vector,
                )
                return {"points": points, "next_page_offset": following}
            case "POST", "/points/count":
                return local.count(name, exact=body["exact"])
            case "POST", "/points/query/batch":
                searches = models.QueryRequestBatch(**body).searches
                return local.query_batch_points(name, searches)
        raise AssertionError(f"{method} {path} is not known")


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(one) for one in result]
    if isinstance(result, dict):
        return {name: _plain(one) for name, one in result.items()}
    return result.model_dump(mode="json") if hasattr(result, "model_dump") else result


def _handler(over: QdrantOverHttp) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            with over.lock:
                over.seen.append(f"{self.command} {path}")
                cut, over.drop = over.drop > 0, max(0, over.drop - 1)
                if cut and not over.after:
                    self.close_connection = True
                    return
                if over.key is not None and self.headers.get("api-key") != over.key:
                    self.reply(403, {"status": {"error": "forbidden"}})
                    return
                if over.status is not None:
                    self.reply(over.status, {"status": {"error": "as the test wants it"}})
                    return
                try:
                    result = _plain(over.answer(self.command, path, json.loads(body or "{}")))
                except ValueError as error:
                    status = 404 if "not found" in str(error) else 400
                    self.reply(status, {"status": {"error": str(error)}})
                    return
                if cut:
                    self.close_connection = True
                    return
                self.reply(200, {"result": result, "status": "ok", "time": 0.0})

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_one

        def reply(self, status: int, document: Any) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
