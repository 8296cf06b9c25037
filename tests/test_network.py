"""Bad networks and bad servers: the client prints the whole right answer, or nothing and why."""

import concurrent.futures
import contextlib
import random
import socket
import ssl
import time

from support import (CA, CLIENT, PATIENCE, PEER, Process, Relay, Server, TestCase, client, client_command,
                     receive_all, reset, tls_client, tls_server)


class BadNetworks(TestCase):
    def check_whole_or_nothing(self, port, *arguments):
        status, output, errors = client(port, "-n", "122", "-n", "1233", *arguments)
        self.assertIn((status, output), [(0, "123\n1234\n"), (1, "")], errors)
        self.assertNotIn("Traceback", errors)
        if status:
            self.assertLine(errors.splitlines()[-1], f"client_try: {PEER}(hung up in the handshake|hung up, no reply|bad reply: b'[0-9]+'|"
                            "hung up|no answer within 1 s)")
        return status

    def each(self, server, make_treat, places, *arguments):
        """Run a client over a relay for each of the places; return the set of exit statuses."""
        def one(place):
            with Relay(server.port, make_treat(place)) as relay:
                return self.check_whole_or_nothing(relay.port, *arguments)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return set(pool.map(one, places))

    def places(self):
        """Return numbers of bytes after which to cut: some of the handshake's, and all of the replies'."""
        sizes = []
        with Server() as server:
            with Relay(server.port, lambda data, passed, _: sizes.append(passed + len(data)) or data) as relay:
                self.check_whole_or_nothing(relay.port)
        total = sizes[-1]
        return sorted({0, 1, 5, *random.Random(1).sample(range(total), 5), *range(total - 80, total + 10, 7)})  # signatures differ in length

    def test_cut_after_any_number_of_bytes(self):
        def cut(place):
            def treat(data, passed, to_client):
                if passed + len(data) > place:
                    to_client.sendall(data[:max(place - passed, 0)])
                    if place % 2:
                        reset(to_client)
                    raise ConnectionError
                return data
            return treat
        with Server() as server:
            self.assertEqual(self.each(server, cut, self.places()), {0, 1})

    def test_delay_and_dripping(self):
        def delay(seconds):
            def treat(data, passed, to_client):
                for start in range(0, len(data), 400):
                    time.sleep(seconds)
                    to_client.sendall(data[start:start + 400])
                return b""
            return treat
        with Server() as server:
            self.assertEqual(self.each(server, delay, [0.01, 0.1]), {0})

    def test_stalled_it_gives_up_in_time(self):
        def stall(place):
            def treat(data, passed, to_client):
                if passed + len(data) <= place:
                    return data
                to_client.sendall(data[:max(place - passed, 0)])
                for byte in data[max(place - passed, 0):]:
                    time.sleep(0.3)
                    to_client.sendall(bytes([byte]))
                return b""
            return treat
        with Server() as server:
            begun = time.monotonic()
            places = self.places()
            self.assertEqual(self.each(server, stall, [0, 700, places[-18]], "--timeout", "1"), {1})
            self.assertLess(time.monotonic() - begun, PATIENCE)

    def test_reason_of_a_refusal_arrives_over_a_slow_line(self):
        def slow(data, passed, to_client):
            time.sleep(0.15)
            return data
        with Server() as server, Relay(server.port, slow) as relay:
            for files, reason in [((CA,), "certificate required"),
                                  ((CA, "auth/alt-client.crt", CLIENT[1]), "(unknown ca|decrypt error)"),
                                  ((CA, "auth/expired-client.crt", CLIENT[1]), "certificate expired"),
                                  ((CA, "auth/self-signed.crt", CLIENT[1]), "unknown ca")]:
                self.assertRefused(client(relay.port, "-n", "9" * 4000, files=files), f"turned us away: {reason}")

    def test_reason_arrives_when_much_was_sent_before_it(self):
        """A close with bytes unread would be a reset, which the relay passes on before the alert."""
        def slow(data, passed, to_client):
            time.sleep(0.3)
            return data
        with Server() as server, Relay(server.port, slow) as relay:
            with socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as raw:
                tls = tls_client(None).wrap_socket(raw, server_hostname="example.com")
                with tls, self.assertRaisesRegex(ssl.SSLError, "certificate required"):
                    for _ in range(30):
                        tls.sendall(b"1\n" * 5000)
                        time.sleep(0.02)
                    receive_all(tls)


class BadServers(TestCase):
    """They have a certificate that our CA vouches for; that is no reason to trust what they say."""

    def against(self, behave, *arguments):
        context = tls_server()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with Process(*client_command(port, "--timeout", str(PATIENCE), *arguments)) as process:
                raw, _ = listener.accept()
                with context.wrap_socket(raw, server_side=True) as tls, contextlib.suppress(OSError):
                    tls.recv(100)
                    behave(tls)
                status = process.end()
                output = process.process.stdout.read()
        self.assertNotRegex(process.log(), r"[^ -~\n]|Traceback|_ssl\.c")
        return status, output, process.lines[-2].rpartition(f"client_try: 127.0.0.1:{port}: ")[2]

    def test_no_reply_to_trust(self):
        for reply in [b"\n", b"forty-two\n", b"42 \n", b"\x1b[31m42\n", b"4_2\n", "٤٢\n".encode(), b"\xff\n", b"42\r\n", b"42\x00\n",
                      b"error: not today\n", b"error: \x1b]0;owned\x07\n", b"42", b"", b"-\n"]:
            with self.subTest(reply):
                self.assertEqual(self.against(lambda tls: tls.sendall(reply)),
                                 (1, b"", f"bad reply: {reply!r}" if reply else "hung up, no reply"))

    def test_nothing_is_printed_unless_all_is_well(self):
        def second_is_bad(tls):
            tls.sendall(b"42\n")
            tls.recv(100)
            tls.sendall(b"no\n")
        self.assertEqual(self.against(second_is_bad, "-n", "41", "-n", "42"), (1, b"", "bad reply: b'no\\n'"))

    def test_what_it_said_before_it_left_is_heard(self):
        """Even where the next number can no longer be sent."""
        def leave(tls):
            tls.sendall(b"42\nerror: enough\n")
            reset(tls)
        self.assertEqual(self.against(leave, "-n", "41", "-n", "42"), (1, b"", r"bad reply: b'error: enough\n'"))

    def test_digits_without_end(self):
        def digits(tls):
            while True:
                tls.sendall(b"9" * 10000)
        self.assertEqual(self.against(digits), (1, b"", f"bad reply: b'{'9' * 80}'"))

    def test_digits_that_drip_and_silence(self):
        def drip(tls):
            for _ in range(1000):
                tls.sendall(b"9")
                time.sleep(0.1)
        for behave in drip, lambda tls: tls.recv(100):
            begun = time.monotonic()
            self.assertEqual(self.against(behave, "--timeout", "1"), (1, b"", "no answer within 1 s"))
            self.assertGreater(time.monotonic() - begun, 0.9)

    def test_reply_that_comes_in_pieces_is_put_together(self):
        def pieces(tls):
            for byte in b"4200\n":
                tls.sendall(bytes([byte]))
        self.assertEqual(self.against(pieces)[:2], (0, b"4200\n"))
