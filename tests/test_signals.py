"""Signals, terminals and containers: the server ends when it is told to, and only then."""

import contextlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import time

from support import (CA, LISTENING, PATIENCE, SERVER, TRUSTING, Process, Project, Server, TestCase,
                     at_terminal_command, client, client_command, connection, fill, mistaken, python, python_after,
                     run, served, shortened, stuck_connection, temporary_folder, unread, wait_until)

# A limit on threads, as under systemd's TasksMax=.
FEW_THREADS = """
import threading
start, left = threading.Thread.start, list(range(9))
def start_one_of_few(thread):
    if not left:
        raise RuntimeError("can't start new thread")
    left.pop()
    start(thread)
threading.Thread.start = start_one_of_few
"""


def send_until_it_ends(process, number, pid=None):
    """Send a signal until a process ends: one that comes just before a system call does not interrupt it."""
    def has_ended():
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(pid or process.process.pid, number)
            process.process.wait(0.5)
        return process.process.poll() is not None
    wait_until(has_ended)


class Starting(TestCase):
    def test_sigterm_in_the_first_instants(self):
        command = python("server_try", "--port", "0", CA, *SERVER)
        for number in range(10):
            with subprocess.Popen(command, cwd=Project.get(), stderr=subprocess.PIPE) as server:
                time.sleep(number * 0.012)
                server.terminate()
                said = server.stderr.read().decode()
                status = server.wait(PATIENCE)
            self.assertIn(status, (0,) if "listening" in said else (143, -signal.SIGTERM))  # while Python itself starts
            self.assertNotIn("Traceback", said)

    def test_a_reload_while_it_starts_waits(self):
        """Its CA comes through a pipe, so that the signal comes while that is loaded."""
        fifo = os.path.join(temporary_folder(), "fifo")
        os.mkfifo(fifo)
        with open(os.path.join(Project.get(), CA)) as file:
            certificate = file.read()
        with Process(*python("server_try"), "--port", "0", fifo, *SERVER) as server:
            for ready in LISTENING, "reloaded":
                with open(fifo, "w") as pipe:
                    if ready == LISTENING:
                        server.process.send_signal(signal.SIGHUP)
                    pipe.write(certificate)
                server.wait_for(TRUSTING)
                server.lines.clear()
                with open(fifo, "w") as pipe:  # once more, for the client that it tries its certificate with
                    pipe.write(certificate)
                server.wait_for(ready)
            server.process.terminate()
            self.assertEqual(server.end(), 0)

    def test_ctrl_c_and_sigterm_before_it_listens(self):
        for script, *options in ["server_try"], ["server_try", "--check"], ["client_try"]:
            for number, status in (signal.SIGINT, 130), (signal.SIGTERM, 143):
                fifo = os.path.join(temporary_folder(), "fifo")
                os.mkfifo(fifo)
                process = subprocess.Popen(python(script, *options, fifo), stderr=subprocess.PIPE)
                with process:
                    with open(fifo, "w"):  # it has got as far as its CA certificate
                        process.send_signal(number)
                    self.assertEqual(process.stderr.read(), b"")
                self.assertEqual(process.returncode, status)


class Notification(TestCase):
    """sd_notify(3): whoever starts the server is told when it serves."""

    def test_ready_is_said_once_it_listens_and_a_reload_can_be_asked_for(self):
        path = os.path.join(temporary_folder(), "notify")
        for name, address in (path, path), (f"@server_try-{os.getpid()}", f"\0server_try-{os.getpid()}"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                try:
                    manager.bind(address)
                except OSError:
                    continue  # only Linux has the second kind
                manager.settimeout(PATIENCE)
                with Process(*python("server_try"), "--port", "0", CA, *SERVER, env={**os.environ, "NOTIFY_SOCKET": name}) as server:
                    self.assertEqual(manager.recv(100), b"READY=1")
                    server.process.send_signal(signal.SIGHUP)
                    self.assertEqual(served(int(server.wait_for(LISTENING)[1])), b"42\n")
                    server.wait_for("reloaded")
                    server.process.terminate()
                    self.assertEqual(server.end(), 0)
                with Server() as taken:
                    run(*python("server_try"), "--port", str(taken.port), CA, *SERVER, env={**os.environ, "NOTIFY_SOCKET": name})
                manager.setblocking(False)
                self.assertRaises(BlockingIOError, manager.recv, 100)

    def test_a_manager_that_reads_nothing_holds_nobody_up(self):
        path = os.path.join(temporary_folder(), "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            manager.bind(path)
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    other.sendto(b"x", path)
            with Server(env={**os.environ, "NOTIFY_SOCKET": path}) as server:
                self.assertEqual(served(server.port), b"42\n")
                self.assertEqual(server.stop(), 0)

    def test_nobody_need_be_at_the_other_end(self):
        for name in "", "/nowhere/at/all", "@nobody", "x" * 200, "relative":
            with Server(env={**os.environ, "NOTIFY_SOCKET": name}) as server:
                self.assertEqual(served(server.port), b"42\n")


class Reloading(TestCase):
    def test_sigterm_and_ctrl_c_while_it_waits_for_a_file(self):
        """Its CA has become a pipe that nobody writes into."""
        ca = os.path.join(temporary_folder(), "ca")
        for number in signal.SIGTERM, signal.SIGINT:
            shutil.copy(os.path.join(Project.get(), CA), ca)
            with Process(*python("server_try"), "--port", "0", ca, *SERVER) as server:
                server.wait_for(LISTENING)
                os.remove(ca)
                os.mkfifo(ca)
                server.process.send_signal(signal.SIGHUP)
                with open(ca, "w"):  # it has begun to load
                    send_until_it_ends(server, number)
                self.assertEqual(server.end(), 0)
                os.remove(ca)

    def test_a_stop_that_comes_with_a_reload_is_a_whole_one(self):
        with Server(script=shortened("server_try", STOP_SECONDS=1)) as server, stuck_connection(server.port):
            for number in signal.SIGSTOP, signal.SIGHUP, signal.SIGTERM, signal.SIGCONT:
                server.process.send_signal(number)
            server.wait_for("stopping, connections: 1")
            server.process.terminate()  # a second one changes nothing
            self.assertEqual(server.end(), 0)
            self.assertTrue(server.log().endswith("stopped\n"), server.log())

    def test_sigterm_while_a_reload_writes_to_a_log_that_nobody_reads(self):
        with unread(python(shortened("server_try", STOP_SECONDS=1), "--port", "0", CA, *SERVER)) as (process, _, _, writer):
            fill(writer)
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)


class Terminal(TestCase):
    def test_it_ends_with_its_logs_terminal_and_reloads_while_that_is_there(self):
        terminal, other_end = pty.openpty()
        with subprocess.Popen(at_terminal_command("--port", "0", CA, *SERVER), cwd=Project.get(), stdin=other_end, stderr=other_end) as server:
            os.close(other_end)
            for ready in b"listening on", b"reloaded":
                said = b""
                while ready not in said:
                    said += os.read(terminal, 1000)
                if ready != b"reloaded":
                    server.send_signal(signal.SIGHUP)
            os.close(terminal)
            self.assertEqual(server.wait(PATIENCE), 0)

    def test_it_reloads_where_only_its_input_was_a_terminal(self):
        """As a server in the background of a shell that has ended since, with its log in a file."""
        terminal, other_end = pty.openpty()
        with Process(*at_terminal_command("--port", "0", CA, *SERVER), stdin=other_end) as server:
            os.close(other_end)
            server.wait_for(LISTENING)
            os.close(terminal)  # for which the kernel sends SIGHUP
            server.wait_for("reloaded")
            server.lines.clear()
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reloaded")
            self.assertIsNone(server.process.poll())


class Container(TestCase):
    """As process 1 of a container, where the kernel ignores signals that nobody handles."""

    CONTAINER = ["unshare", "--pid", "--fork", "--kill-child"]

    def setUp(self):
        if not shutil.which("unshare") or run(*self.CONTAINER, "true")[0]:
            self.skipTest("no process namespace can be made here")

    def first_process(self, process):
        """Return the process ID of what is process 1 there."""
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
            return int(children.read())

    def test_the_client_can_be_interrupted(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            command = client_command(silent.getsockname()[1], "--timeout", str(PATIENCE))
            with Process(*self.CONTAINER, *command) as process:
                with silent.accept()[0] as connected:
                    connected.recv(1)
                    inner = self.first_process(process.process)
                    send_until_it_ends(process, signal.SIGINT, inner)
                    self.assertEqual(process.end(), 130)

    def test_the_server_stops_even_where_nobody_reads_its_log(self):
        command = [*self.CONTAINER, *python(shortened("server_try", STOP_SECONDS=1)), "--port", "0", CA, *SERVER]
        with unread(command) as (process, port, _, writer):
            fill(writer)
            for _ in range(20):
                socket.create_connection(("127.0.0.1", port)).close()
            os.kill(self.first_process(process), signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)


class Threads(TestCase):
    def test_a_thread_that_cannot_be_had_keeps_one_client_waiting_and_nobody_else(self):
        with Process(*python_after(FEW_THREADS, "server_try", "--port", "0", CA, *SERVER)) as server:
            port = int(server.wait_for(LISTENING)[1])
            with contextlib.ExitStack() as stack:
                first, *others = [stack.enter_context(connection(port)) for _ in range(8)]
                self.assertRefused(client(port, "--timeout", "1"), "no answer within 1 s")
                server.wait_for("cannot serve more clients at once for now: can't start new thread")
                for tls in others:
                    tls.sendall(b"1\n")
                    self.assertEqual(tls.recv(10), b"2\n")
                first.unwrap().close()
                self.assertEqual(served(port), b"42\n")
            server.process.terminate()
            self.assertEqual(server.end(), 0)
            self.assertNotIn("Traceback", server.log())

    def test_a_thread_is_tried_for_again_where_all_others_have_died_of_a_mistake(self):
        few = FEW_THREADS.replace("if not left:", "if threading.active_count() > 9:").replace("    left.pop()\n", "")
        with Process(*python_after(few, mistaken(), "--port", "0", CA, *SERVER)) as server:
            port = int(server.wait_for(LISTENING)[1])
            with contextlib.ExitStack() as stack:
                eight = [stack.enter_context(connection(port)) for _ in range(8)]
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                server.wait_for("cannot serve more clients at once for now: can't start new thread")
                for tls in eight:
                    tls.sendall(b"13\n")
                for _ in eight:
                    server.wait_for("NameError: .*")
                self.assertEqual(served(port), b"42\n")

    def test_too_few_threads_at_the_start_are_one_line(self):
        few = FEW_THREADS.replace("range(9)", "range(3)")
        path = os.path.join(temporary_folder(), "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(path)
            status, _, errors = run(*python_after(few, "server_try", "--port", "0", CA, *SERVER), env={**os.environ, "NOTIFY_SOCKET": path})
            self.assertEqual(status, 1)
            self.assertNotIn("listening", errors)
            manager.setblocking(False)
            self.assertRaises(BlockingIOError, manager.recv, 100)
        self.assertEqual(errors.splitlines()[-1], "server_try: can't start new thread")
