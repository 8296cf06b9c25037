"""What may be asked, what may not, and what becomes of those who ask it."""

import contextlib
import socket
import time

from support import (PATIENCE, PEER, Server, TestCase, client, connection, mistaken, receive_all, served,
                     shortened, stuck_connection, tls_client)


class Requests(TestCase):
    def setUp(self):
        self.server = Server()
        self.addCleanup(self.server.__exit__)

    def ask(self, data):
        """Send bytes to the server, and return all that it answers before it closes properly."""
        with connection(self.server.port) as tls:
            tls.sendall(data)
            return receive_all(tls)

    def test_good_ones(self):
        digits = b"8" * 4095
        with connection(self.server.port) as tls:
            for request, reply in [(b"41\n", b"42\n"), (b"0\n", b"1\n"), (b"-1\n", b"0\n"), (b"-0\n", b"1\n"),
                                   (b"+7\r\n", b"8\n"), (b"007\n", b"8\n"), (b"-" + b"9" * 4000 + b"\n", b"-" + b"9" * 3999 + b"8\n"),
                                   (digits + b"\n", digits[:-1] + b"9\n"), (b"1\n2\n3\n", b"2\n3\n4\n")]:
                tls.sendall(request)
                got = b""
                while len(got) < len(reply):
                    part = tls.recv(65536)
                    self.assertTrue(part)
                    got += part
                self.assertEqual(got, reply)

    def test_many_at_once(self):
        with connection(self.server.port) as tls:
            tls.sendall(b"".join(b"%d\n" % number for number in range(20000)) + b"no more\n")
            *replies, error = receive_all(tls).splitlines()
            self.assertEqual(replies, [b"%d" % (number + 1) for number in range(20000)])
            self.assertEqual(error, b"error: not an integer in decimal digits")

    def test_byte_by_byte(self):
        with connection(self.server.port) as tls:
            for byte in b"-123456\n":
                tls.sendall(bytes([byte]))
            self.assertEqual(tls.recv(100), b"-123455\n")

    def test_bad_ones_are_told_so_and_sent_away(self):
        for request in [b"forty-one", b"", b" ", b" 41", b"41 ", b"4 1", b"1_000", b"4.0", b"1e3", b"0x10", b"--1", b"+-1", b"-", b"+",
                        "٤١".encode(), "４１".encode(), b"4\x001", b"\x00", b"\xff\xfe", b"\x1b[31m41", b"41\r\r", b"\r", b"41\x0b", b"9" * 4096]:
            with self.subTest(request[:20]):
                reason = "no newline within 4096 bytes" if len(request) > 4095 else "not an integer in decimal digits"
                reply = self.ask(b"1\n" + request + b"\n" + b"2\n" * 1000)
                self.assertEqual(reply.decode(), f"2\nerror: {reason}\n")
                self.server.wait_for(f"{PEER}answered 1, turned away: {reason}")
                self.server.lines.clear()
        self.assertEqual(served(self.server.port), b"42\n")

    def test_line_too_long_is_told_before_it_ends(self):
        self.assertEqual(self.ask(b"9" * 5000), b"error: no newline within 4096 bytes\n")
        self.assertEqual(self.ask(b"9" * 500000), b"error: no newline within 4096 bytes\n")

    def test_whoever_keeps_the_server_waiting_is_told_so_and_let_go(self):
        """The copy waits 1 second instead of 60."""
        with Server("--timeout", "3600", script=shortened("server_try", IDLE_SECONDS=1)) as server:
            with contextlib.ExitStack() as stack:
                idle, half, later = (stack.enter_context(connection(server.port)) for _ in range(3))
                begun = time.monotonic()
                half.sendall(b"4")
                later.sendall(b"1\n4")
                told = b"error: no request for 1 s\n"
                self.assertEqual(receive_all(half), told)
                self.assertEqual(receive_all(later), b"2\n" + told)
                self.assertEqual(receive_all(idle), told)
                idle.unwrap().close()  # needs the server's close_notify
                self.assertGreater(time.monotonic() - begun, 0.9)
            server.wait_for(PEER + "answered 0, turned away: no request for 1 s")

    def test_a_client_that_never_reads_is_cut_off(self):
        with Server(script=shortened("server_try", IDLE_SECONDS=1, STOP_SECONDS=1)) as server, stuck_connection(server.port):
            server.wait_for(PEER + r"answered \d+, took no reply for 1 s")

    def test_a_client_that_reads_late_gets_all_that_was_said(self):
        """More than it has room for, and with bytes left that the server has not read."""
        with Server(script=shortened("server_try", STOP_SECONDS=PATIENCE)) as server, socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", server.port))
            with tls_client().wrap_socket(raw, server_hostname="example.com") as tls:
                tls.sendall(b"1\n" * 2000 + b"x\n" + b"1\n" * 20000)
                server.wait_for(PEER + "answered 2000, turned away: not an integer in decimal digits")
                self.assertEqual(receive_all(tls), b"2\n" * 2000 + b"error: not an integer in decimal digits\n")

    def test_closed_in_the_middle_of_a_line(self):
        with connection(self.server.port) as tls:
            tls.sendall(b"1\n4")
            socket.socket.shutdown(tls, socket.SHUT_WR)
            self.assertEqual(receive_all(tls), b"2\nerror: no newline at the end\n")

    def test_a_mistake_of_our_own_shows_its_traceback_and_the_server_goes_on(self):
        with Server("--max-clients", "3", script=mistaken()) as server:
            for number in range(12):  # more than there are places, and threads that wait
                if number:
                    with connection(server.port) as tls:
                        tls.sendall(b"13\n")
                        self.assertEqual(receive_all(tls), b"")
                else:
                    self.assertRefused(client(server.port, "-n", "13"), "hung up, no reply")
                server.wait_for("NameError: name 'nmber' is not defined")
                self.assertIn("Traceback (most recent call last):", server.log())
                server.lines.clear()
            self.assertEqual(served(server.port), b"42\n")
            self.assertEqual(server.stop(), 0)
