"""W&B's server on 127.0.0.1, as far as `wandb sweep` and `wandb agent` ask it for a grid's runs.

What it is asked is GraphQL, sent by the real programs; what it answers follows wandb/apis/public/sweeps.py.
"""

import itertools
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY = "tests"


class Sweep:
    """A sweep of one agent, which makes its runs one by one."""

    def __init__(self, config: str, project: str):
        self.config = config
        self.project = {"id": "p", "name": project, "entity": {"id": "e", "name": ENTITY}}
        parameters = yaml.safe_load(config)["parameters"]
        grid = itertools.product(*(one["values"] for one in parameters.values()))
        self.left = [dict(zip(parameters, values, strict=True)) for values in grid]
        self.given: list[dict] = []

    def commands(self, running: dict) -> list[dict]:
        """Returns what the agent is to do now."""
        if running:
            return []
        if not self.left:
            return [{"type": "exit"}]
        self.given.append(self.left.pop(0))
        args = {name: {"value": value} for name, value in self.given[-1].items()}
        return [{"type": "run", "run_id": f"run{len(self.given)}", "program": None, "args": args}]


class Server(ThreadingHTTPServer):
    """Answers with one sweep, which `wandb sweep` has to create."""

    sweep: Sweep | None = None

    def answer(self, operation: str, asked: dict) -> dict:
        """Returns the data of an answer."""
        if operation == "UpsertSweep":
            self.sweep = Sweep(asked["config"], asked["projectName"])
            made = {"name": "sweep1", "project": self.sweep.project}
            return {"upsertSweep": {"sweep": made, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            found = {"id": "s", "name": "sweep1", "config": self.sweep.config, "runs": {"edges": []}}
            return {"project": {"sweep": found}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if operation == "Heartbeat":
            commands = self.sweep.commands(json.loads(asked["runState"]))
            return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": ENTITY, "username": ENTITY, "teams": {"edges": []}}}
        raise LookupError(operation)  # the connection ends, and the program says so


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path != "/graphql":  # how the program is used, in a form of its own
            self.send_error(404)
            return
        asked = json.loads(asked)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
        answer = {"data": self.server.answer(operation, asked.get("variables") or {})}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@contextmanager
def served():
    """Runs a server; yields it and its address."""
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
