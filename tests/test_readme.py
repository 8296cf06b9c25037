"""The README's console blocks, run in a fresh copy of the project: what they print is what it shows.

A block with a command of ./server_try starts a server, which later blocks without a command show
the further lines of. In what is shown, … stands for anything.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import unittest

from support import MAKE, PATIENCE, Process, TestCase, copy_project, plain_environment, temporary_folder

ASIDE = [(r"\(serial [\w…]+, until \w+ [ \d]\d [\d:]+ \d+ GMT\)", "(serial N)"), (r"127\.0\.0\.1:\d+", "HOST:PORT"),
         (r"(?m)^revoked \w+", "revoked N"),
         # OpenSSL's words change with its version.
         ("self signed", "self-signed"), ("unsupported certificate purpose", "unsuitable certificate purpose"),
         (" or the system clock is incorrect", "")]


def blocks(text):
    """Yield each console block as the number of its first line and its lines."""
    for match in re.finditer(r"^```console\n(.*?)^```$", text, re.M | re.S):
        yield text[:match.start(1)].count("\n") + 1, match.group(1).splitlines()


def matches(shown, said):
    """Tell whether lines are as shown; … stands for any text, alone on a line for any lines."""
    def aside(lines):
        text = "\n".join(lines) + "\n"
        for pattern, name in ASIDE:
            text = re.sub(pattern, name, text)
        return text
    pattern = re.escape(aside(shown)).replace("\\\n", "\n").replace("\\…", "…")
    pattern = re.sub(r"(?m)^…\n", r"(?:.*\\n)*", pattern).replace("…", ".*")
    return re.fullmatch(pattern, aside(said)) is not None


class Readme(TestCase):
    def test_console_blocks(self):
        self.folder = copy_project(os.path.join(temporary_folder(), "clone"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        for name in "server_try", "client_try", "README.md":
            path = os.path.join(self.folder, name)
            with open(path, encoding="utf-8") as file:
                text = file.read().replace("6420", port)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        bin_folder = temporary_folder()  # the scripts' python3 is this one
        os.symlink(sys.executable, os.path.join(bin_folder, "python3"))
        os.symlink(shutil.which(MAKE), os.path.join(bin_folder, "make"))
        self.env = plain_environment()
        self.env.update(PATH=bin_folder + os.pathsep + os.environ["PATH"], PYTHONIOENCODING="utf-8")
        self.server, self.seen, run = None, 0, 0
        try:
            for number, lines in blocks(text):
                run += 1
                if lines[0].startswith("$ ./server_try"):
                    self.start(number, lines)
                elif lines[0].startswith("$ "):
                    self.commands(number, lines)
                else:
                    self.server_says(number, lines)
            self.stop()
        finally:
            if self.server:
                self.server.__exit__()
        self.assertGreater(run, 30)

    def wrong(self, number, shown, said):
        """Fail, and name the first line of the README that is not what is said."""
        for one, other in zip(shown, said):
            if one == "…" or not matches([one], [other]):
                break
            number += 1
        self.fail(f"README.md:{number}: shows\n" + "\n".join(shown) + "\n\nbut what is said is\n" + "\n".join(said))

    def start(self, number, lines):
        self.stop()
        self.server = Process("sh", "-c", "exec " + lines[0][2:], folder=self.folder, env=self.env)
        self.seen = 0
        self.env["SERVER"] = str(self.server.process.pid)
        self.server_says(number + 1, lines[1:])

    def server_says(self, number, shown):
        """Wait for as many lines of the server as are shown, and compare them."""
        with self.server.news:
            self.server.news.wait_for(lambda: len(self.server.lines) >= self.seen + len(shown), PATIENCE / 4)
            said = self.server.lines[self.seen:self.seen + len(shown)]
        self.seen += len(shown)
        # Of two connections the lines may come in either order.
        if not matches(sorted(shown), sorted(said)):
            self.wrong(number, shown, said)

    def stop(self):
        """Stop the server; it must have said no more than the README showed."""
        if self.server:
            with self.server:
                self.server.process.send_signal(signal.SIGINT)
                self.assertEqual(self.server.end(), 0)
                # It says how a connection ended a moment before it stops counting it.
                self.assertRegex("\n".join(self.server.lines[self.seen:]), r"\Astopping, connections: [01] \(who .*\)\nstopped\n\Z")
            self.server = None

    def commands(self, number, lines):
        starts = [place for place, line in enumerate(lines) if line.startswith("$ ")] + [len(lines)]
        for start, end in zip(starts, starts[1:]):
            done = subprocess.run(["sh", "-c", lines[start][2:]], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
            said = done.stdout.decode("utf-8", "backslashreplace").splitlines()
            if not matches(lines[start + 1:end], said):
                self.wrong(number + start + 1, lines[start + 1:end], said)


if __name__ == "__main__":
    unittest.main()
