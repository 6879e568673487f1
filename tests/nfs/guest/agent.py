"""Runs commands for whoever connects: one a connection, as root, until that ends.

    {"argv": ["ls", "/"], "environment": {}}\n    -->    {"pid": 123}\n, what it prints, and \0{"exit": 0}\n

What it prints, to standard output and error, comes as it is printed. When the connection ends before, the
command and all that it has started is killed.
"""

import contextlib
import json
import os
import select
import signal
import socketserver
import subprocess

PORT = 9


class Command(socketserver.StreamRequestHandler):
    """One command."""

    def handle(self):
        asked = json.loads(self.rfile.readline())
        command = subprocess.Popen(
            asked["argv"],
            env=os.environ | asked["environment"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.say({"pid": command.pid})
        try:
            while self.pass_on(command.stdout):
                pass
            self.wfile.write(b"\0")
            self.say({"exit": command.wait()})
        except OSError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
            command.wait()

    def pass_on(self, output):
        """Pass on what was printed; False at its end. OSError when nobody listens any more."""
        ready, _, _ = select.select([output, self.connection], [], [])
        if self.connection in ready:
            raise OSError
        data = os.read(output.fileno(), 65536)
        self.wfile.write(data)
        return bool(data)

    def say(self, what):
        self.wfile.write(json.dumps(what).encode() + b"\n")


class Agent(socketserver.ThreadingTCPServer):
    """As many at a time as are wanted."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


with Agent(("", PORT), Command) as agent:
    agent.serve_forever()
