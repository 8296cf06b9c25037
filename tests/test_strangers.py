"""Strangers at the port, slow peers, and more of them than there is room for."""

import concurrent.futures
import contextlib
import os
import random
import resource
import socket
import ssl
import threading
import time
import unittest

from support import (ACCEPTED, CA, EXAMPLE, PATIENCE, PEER, Process, Project, Server, TestCase, client,
                     client_command, connection, python_after, receive_all, reset, served, shortened,
                     tls_client, wait_until)

PROC = os.path.isdir("/proc/self/fd")
CONNECT_AND_WAIT = """
import select, socket
connect = socket.create_connection
def connect_and_wait(*where):
    sock = connect(*where)
    sock.sendall(b"x")
    select.select([sock], [], [])
    return sock
socket.create_connection = connect_and_wait
"""


def usage(server):
    """Return how many descriptors and threads a process has, and its resident kilobytes."""
    pid = server.process.pid
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":\t", 1) for line in status)
    return len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]), int(fields["VmRSS"].split()[0])


def queued(port):
    """Return how many connections the kernel holds for a listening port until they are accepted."""
    with open("/proc/net/tcp") as table:
        for row in map(str.split, table):
            if row[1].endswith(f":{port:04X}") and row[3] == "0A":
                return int(row[4].partition(":")[2], 16)
    return 0


def ended_lines(server):
    """Return the lines with which the server took leave of connections."""
    return [line for line in server.lines if ": accepted " not in line and line.startswith("127.0.0.1:")]


def client_hello():
    """Return the bytes of a ClientHello."""
    outgoing = ssl.MemoryBIO()
    tls = tls_client().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="example.com")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


class Crowds(TestCase):
    def test_silent_and_idle_ones_hold_nobody_up(self):
        with Server("--timeout", str(PATIENCE)) as server:
            with contextlib.ExitStack() as stack:
                silent = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(100)]
                context = tls_client()
                for _ in range(100):
                    stack.enter_context(connection(server.port, context))
                self.assertEqual(served(server.port), b"42\n")
                for stranger in silent:
                    stranger.setblocking(False)
                    self.assertRaises(BlockingIOError, stranger.recv, 1)  # still there
            wait_until(lambda: not PROC or usage(server)[1] <= 10)  # the main one, and 9 that wait

    def test_handshake_ends_in_time_however_it_drips(self):
        script = shortened("server_try", STOP_SECONDS=1)
        with Server("--timeout", "1", script=script) as server, socket.create_connection(("127.0.0.1", server.port)) as stranger:
            begun = time.monotonic()
            stranger.settimeout(0.1)
            with contextlib.suppress(ConnectionError):
                for byte in client_hello()[:-1]:
                    stranger.sendall(bytes([byte]))
                    with contextlib.suppress(socket.timeout):
                        self.assertEqual(stranger.recv(1), b"")
                        break
            self.assertGreater(time.monotonic() - begun, 0.9)
            server.wait_for(PEER + "no handshake within 1 s")

    def test_beyond_max_clients_they_wait_and_the_log_says_so_once(self):
        with Server("--max-clients", "2") as server:
            with connection(server.port), connection(server.port):
                wait_until(lambda: server.log().count("accepted") == 2)
                self.assertNotIn("places", server.log())
                self.assertRefused(client(server.port, "--timeout", "1"), "no answer within 1 s")
                waiting = [Process(*client_command(server.port, "--timeout", str(PATIENCE))) for _ in range(4)]
                server.wait_for("all 2 places are taken, and others wait")
                self.assertEqual([process.process.poll() for process in waiting], [None] * 4)
                self.assertEqual(server.log().count("accepted"), 2)
            for process in waiting:
                with process:
                    self.assertEqual((process.end(), process.process.stdout.read()), (0, b"42\n"), process.log())
            self.assertEqual(server.log().count("places are taken"), 1)

    @unittest.skipUnless(PROC, "needs /proc")
    def test_however_many_wait_they_cost_no_threads(self):
        with Server("--max-clients", "2", "--timeout", str(PATIENCE)) as server:
            with contextlib.ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                wait_until(lambda: queued(server.port) >= 85)
                self.assertLessEqual(usage(server)[1], 12)
            self.assertEqual(served(server.port), b"42\n")

    @unittest.skipUnless(PROC, "needs /proc")
    def test_out_of_file_descriptors(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with Server("--timeout", str(PATIENCE), preexec_fn=limit) as server:
            strangers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(150)]
            server.wait_for("cannot take more connections for now: Too many open files")
            before, begun = self.processor_seconds(server), time.monotonic()
            waiting = Process(*client_command(server.port, "--timeout", str(PATIENCE)))
            while time.monotonic() < begun + 1:
                self.assertIsNone(server.process.poll())
                time.sleep(0.1)
            self.assertLess(self.processor_seconds(server) - before, 0.25)
            for stranger in strangers:
                stranger.close()
            with waiting:
                self.assertEqual((waiting.end(), waiting.process.stdout.read()), (0, b"42\n"), waiting.log())
            self.assertEqual(server.lines.count("cannot take more connections for now: Too many open files"), 1)
            self.assertNotIn("Traceback", server.log())

    def processor_seconds(self, server):
        with open(f"/proc/{server.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @unittest.skipUnless(PROC, "counts threads in /proc")
    def test_threads_end_after_a_crowd(self):
        context, together = tls_client(), threading.Barrier(120)

        def ask(port):
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw:
                together.wait(PATIENCE)
                with context.wrap_socket(raw, server_hostname="example.com") as tls:
                    tls.sendall(b"1\n")
                    self.assertEqual(tls.recv(10), b"2\n")

        with Server() as server, concurrent.futures.ThreadPoolExecutor(120) as pool:
            for task in os.listdir(f"/proc/{server.process.pid}/task"):  # so that threads are in each other's way
                os.sched_setaffinity(int(task), list(os.sched_getaffinity(0))[:1])
            for crowd in range(1, 4):
                list(pool.map(ask, [server.port] * 120))
                wait_until(lambda: len(ended_lines(server)) == 120 * crowd)
                wait_until(lambda: usage(server)[1] <= 10)  # the main one, and 9 that wait


class Leaving(TestCase):
    """A peer that leaves before the handshake is over has hung up, however it does that."""

    def test_in_the_handshake(self):
        hello = client_hello()
        with Server() as server:
            for said in b"", hello[:1], hello[:100], hello:
                for leave in socket.socket.close, reset, lambda stranger: stranger.shutdown(socket.SHUT_WR):
                    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
                        peer = "127.0.0.1:%d: " % stranger.getsockname()[1]
                        stranger.sendall(said)
                        leave(stranger)
                        self.assertEqual(server.wait_for(peer + ".*").string, peer + "hung up in the handshake")

    def test_a_server_that_leaves_in_the_handshake(self):
        for said in b"", b"\x16\x03\x03":
            for leave in socket.socket.close, reset:
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    port = listener.getsockname()[1]
                    with Process(*client_command(port)) as process:
                        stranger = listener.accept()[0]
                        stranger.recv(10000)
                        stranger.sendall(said)
                        leave(stranger)
                        self.assertEqual(process.end(), 1)
                        self.assertEqual(process.lines[:-1], [f"client_try: 127.0.0.1:{port}: hung up in the handshake"])

    def test_a_server_that_leaves_before_the_handshake(self):
        """The client looks at its connection only when that has come to an end."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with Process(*python_after(CONNECT_AND_WAIT, "client_try", "--port", str(port), CA)) as process:
                stranger = listener.accept()[0]
                self.assertEqual(stranger.recv(1), b"x")
                reset(stranger)
                self.assertEqual(process.end(), 1)
                self.assertEqual(process.lines[:-1], [f"client_try: 127.0.0.1:{port}: hung up in the handshake"])

    def test_a_reset_after_it_was_accepted_is_something_else(self):
        with Server() as server:
            with connection(server.port) as tls:
                server.wait_for(ACCEPTED % EXAMPLE % "Client")
                reset(tls)
            server.wait_for(PEER + "answered 0, hung up")

    def test_one_that_leaves_without_its_replies(self):
        with Server() as server:
            for leave in self.say_goodbye, socket.socket.close, reset:
                with connection(server.port) as tls:
                    server.wait_for(ACCEPTED % EXAMPLE % "Client")
                    with server.halted():
                        tls.sendall(b"1\n" * 3)
                        leave(tls)
                    server.wait_for(PEER + r"answered \d, " + ("hung up" if leave is reset else "(hung up|done)"))
                    server.lines.clear()

    @staticmethod
    def say_goodbye(tls):
        """Send close_notify, and close without reading."""
        tls.settimeout(0)
        with contextlib.suppress(OSError):
            tls.unwrap()
        reset(tls)

    def test_a_stranger_who_is_refused_late_holds_a_place_no_longer_than_that(self):
        """It sends a byte just before the server's patience ends; here that is after four seconds."""
        with Server("--max-clients", "1") as server:
            with socket.create_connection(("127.0.0.1", server.port)) as stranger:
                stranger.sendall(b"no TLS at all\n")
                server.wait_for(PEER + "turned away: (wrong version number|http request|packet length too long|record layer failure)")
                begun = time.monotonic()
                time.sleep(3.8)
                stranger.sendall(b"x")
                self.assertEqual(served(server.port), b"42\n")
                self.assertLess(time.monotonic() - begun, 7.5)

    def test_a_stranger_who_is_refused_and_sends_without_end_holds_a_place_no_longer_than_that(self):
        with Server("--max-clients", "1", script=shortened("server_try", STOP_SECONDS=1)) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as stranger:
                def send():
                    with contextlib.suppress(OSError):
                        while True:
                            stranger.sendall(bytes(1000))
                            time.sleep(0.0002)
                thread = threading.Thread(target=send)
                thread.start()
                self.assertEqual(served(server.port), b"42\n")
                thread.join()

    def test_a_client_that_is_sent_away_and_stays_holds_its_place_no_longer_than_that(self):
        with Server("--max-clients", "1", script=shortened("server_try", STOP_SECONDS=1)) as server, connection(server.port) as tls:
            tls.sendall(b"x\n")
            self.assertEqual(tls.recv(100), b"error: not an integer in decimal digits\n")
            self.assertEqual(served(server.port), b"42\n")


class Garbage(TestCase):
    """Whatever comes, it costs one line in the log, and nothing for good."""

    def test_fuzz(self):
        chance = random.Random(20261123)
        hello = client_hello()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(os.path.join(Project.get(), CA))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        good = tls_client()

        def bytes_and(end):
            def act(port):
                kind = chance.randrange(5)
                data = (chance.randbytes(chance.randrange(1, 3000)) if kind == 0 and hasattr(chance, "randbytes") else
                        bytes(chance.randrange(256) for _ in range(chance.randrange(1, 300))) if kind == 0 else
                        b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n" if kind == 1 else
                        hello[:chance.randrange(len(hello))] if kind == 2 else
                        self.flipped(hello, chance) if kind == 3 else b"")
                stranger = socket.create_connection(("127.0.0.1", port), PATIENCE)
                with stranger, contextlib.suppress(ConnectionError):
                    stranger.sendall(data)
                    end(stranger)
            return act

        def half_close(stranger):
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(65536):
                pass

        def tls_1_2(port):
            with contextlib.suppress(OSError), connection(port, old):
                pass

        def no_certificate(port):
            with contextlib.suppress(OSError), connection(port, tls_client(None)) as tls:
                tls.sendall(b"1\n" * 100)
                receive_all(tls)

        def authenticated_and(end):
            def act(port):
                with contextlib.suppress(OSError), connection(port, good) as tls:
                    tls.sendall(chance.choice([b"", b"1\n", b"1\nx", b"x\n", b"1\n" * 500]))
                    end(tls)
            return act

        acts = [bytes_and(half_close), bytes_and(reset), bytes_and(socket.socket.close), tls_1_2, no_certificate,
                authenticated_and(reset), authenticated_and(socket.socket.close), authenticated_and(lambda tls: tls.unwrap())]
        with Server() as server:
            measured = []
            for batch in range(3):
                for _ in range(80):
                    chance.choice(acts)(server.port)
                self.assertEqual(served(server.port), b"42\n")
                wait_until(lambda: len(ended_lines(server)) == 81 * (batch + 1))
                if PROC:
                    measured.append(usage(server))
            ended = ended_lines(server)
            self.assertEqual(len(ended), 243, server.log()[-3000:])  # one line for each connection
            for line in server.lines:
                self.assertRegex(line, r"\A[ -~]*\Z")
                self.assertNotRegex(line, r"Traceback|_ssl\.c|internal error")
            if PROC:
                for descriptors, threads, _ in measured:
                    self.assertLessEqual(descriptors, 8, measured)
                    self.assertLessEqual(threads, 30, measured)
                self.assertLess(measured[2][2] - measured[1][2], 2000, measured)

    @staticmethod
    def flipped(data, chance):
        data = bytearray(data)
        for _ in range(chance.randrange(1, 9)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)

    def test_client_hello_cut_at_every_length(self):
        hello = client_hello()
        with Server() as server:
            for length in range(len(hello)):
                with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as stranger:
                    stranger.sendall(hello[:length])
                    stranger.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionError):
                        while stranger.recv(65536):
                            pass
            self.assertEqual(served(server.port), b"42\n")
            server.wait_for(PEER + "answered 1, done")
            lines = [line for line in server.lines if line.startswith("127.0.0.1:")]
            self.assertEqual(len(lines), len(hello) + 2)


if __name__ == "__main__":
    unittest.main()
