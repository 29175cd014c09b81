"""The reward server in the tests' own process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tre_lightning.tasks.alignment.scorer import PreferenceScorer
from tre_lightning.tasks.alignment.server import listen, reward_app, uvicorn_server


@contextmanager
def rewarding(scorer: PreferenceScorer, **options: int) -> Iterator[str]:
    """Its address; ``options`` are those of ``reward_app``."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn_server(reward_app(scorer, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
