"""Texts that act where they are not only text, and a server that records what a page fetches."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Listener:
    """A web server of this machine. asked: the path of every request; a connection without one is `connected`."""

    port: int = 0
    asked: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Each ends a block of markup in another way, and then wants something fetched, followed, run or drawn."""
        here = f"http://127.0.0.1:{self.port}"
        return [
            f"\r\n\r\n<img src={here}/img><script>fetch('{here}/script')</script></code></pre></h2></div></b>",
            f"\r\r# heading\n\n[a](javascript:alert(1)) ![b]({here}/picture)\n\n[c]\n\n[c]: {here}/reference\n\n",
            f"\n```\n``````````\n~~~\n~~~~~~~~~~\n<iframe src={here}/frame></iframe>\n\n    <b>x</b>\n--> ]]> \n- item",
            f"| a | b |\n|-|-|\n| {here}/auto | <{here}/angle> | www.example.com you@example.com @you \u2028\u2029",
            f"\x00\x1b[31mred\x07\x7f\x9b1m\u202eback\u2066 &lt;img src={here}/entity&gt; &#60;b&#62; \t_a_ **b**",
            f"\\\" + warn('{here}') + '<svg onload=\"fetch('{here}/svg')\"><image href={here}/image /></svg>",
            f"<a href={here}/link>x</a><link rel=icon href={here}/css><style>@import '{here}/style'</style><!-- <p>",
        ]


@contextlib.contextmanager
def listener() -> Iterator[Listener]:
    heard = Listener()

    class Handler(http.server.BaseHTTPRequestHandler):
        def setup(self) -> None:
            heard.asked.append("connected")
            super().setup()

        def do_GET(self) -> None:
            heard.asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        heard.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield heard
        finally:
            server.shutdown()
            thread.join()
