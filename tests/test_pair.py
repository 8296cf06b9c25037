"""The pair as its users run it: who is let in, who is turned away, and who is told what."""

import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import tempfile
import time
import unittest

from support import (ACCEPTED, CA, CLIENT, CONNECTED, EXAMPLE, FAST, LISTENING, PEER, ROOT, SECOND_CA, SERVER,
                     SHOWING, TRUSTING, VERIFY, WRONG_ROLE, Process, Project, Relay, Server, TestCase, client, client_command, connection,
                     python_after, run, tls_client, tls_server)

ALT_CA = "auth/alt-ca/alt-ca.cert"
ALT_SERVER = ("auth/alt-server.crt", SERVER[1])
ALT_CLIENT = ("auth/alt-client.crt", CLIENT[1])
SHOW_NO_DELAY = """
import socket, ssl
wrap = ssl.SSLContext.wrap_socket
def show_and_wrap(context, sock, **more):
    print("no delay:", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), file=sys.stderr, flush=True)
    return wrap(context, sock, **more)
ssl.SSLContext.wrap_socket = show_and_wrap
"""


def ipv6():
    """Tell whether ::1 can be bound."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as trial:
        trial.bind(("::1", 0))
        return True
    return False


class Exchange(TestCase):
    """Both certificates are right."""

    def test_both_ends_say_who_the_other_is(self):
        with Server() as server:
            status, output, errors = client(server.port)
            self.assertEqual((status, output), (0, "42\n"), errors)
            self.assertLine(errors, CONNECTED % rf"127\.0\.0\.1:{server.port}" + "\nsent 41\n")
            server.wait_for(PEER + "answered 1, done")
            self.assertLine(server.log(), "\n".join([TRUSTING, SHOWING, rf"listening on 127\.0\.0\.1:{server.port}", ACCEPTED % EXAMPLE % "Client",
                                                     PEER + "answered 1, done"]))

    def test_numbers_go_over_one_connection_in_order(self):
        big = "9" * 4095
        with Server() as server:
            status, output, errors = client(server.port, "-n", "0", "--number", "-1", "-n", "-43", "-n", "+5", "-n", big)
            self.assertEqual((status, output.split()), (0, ["1", "0", "-42", "6", "1" + "0" * 4095]), errors)
            server.wait_for(PEER + "answered 5, done")

    def test_server_goes_on_and_a_silent_client_holds_nobody_up(self):
        with Server() as server:
            silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
            with connection(server.port):
                for _ in range(3):
                    self.assertEqual(client(server.port)[1], "42\n")
            for one in silent:
                one.close()

    def test_addresses(self):
        with Server("--host", "localhost") as server:
            self.assertEqual(client(server.port, "--host", "localhost")[1], "42\n")
            self.assertEqual(client(server.port, "--host", "127.0.0.1")[1], "42\n")

    @unittest.skipUnless(ipv6(), "no IPv6 on this machine")
    def test_ipv6_address_is_shown_in_brackets(self):
        with Server("--host", "::1") as server:
            self.assertEqual(server.lines[2], f"listening on [::1]:{server.port}")
            status, output, errors = client(server.port, "--host", "::1", "--server-name", "localhost")
            self.assertEqual((status, output), (0, "42\n"), errors)
            self.assertLine(errors, CONNECTED % rf"\[::1]:{server.port}" + "\nsent 41\n")
            server.wait_for(r"\[::1]:\d+: answered 1, done")
            self.assertEqual(client(server.port, "--host", "::1"), (1, "", f"client_try: [::1]:{server.port}: turned away: certificate verify "
                                                                    "failed: IP address mismatch, certificate is not valid for '::1'.\n"))

    @unittest.skipUnless(ipv6() and socket.has_dualstack_ipv6(), "no IPv6 on this machine, or none with IPv4")
    def test_two_colons_are_every_address(self):
        with Server("--host", "::") as server:
            for host, shown in ("127.0.0.1", r"127\.0\.0\.1"), ("::1", r"\[::1]"):
                self.assertEqual(client(server.port, "--host", host, "--server-name", "example.com")[1], "42\n")
                server.wait_for(rf"{shown}:\d+: answered 1, done")

    def client_of(self, addresses, port, timeout):
        """Run a client whose host has these addresses; return its status, standard output and standard error."""
        resolver = ("import socket; real = socket.getaddrinfo\n"
                    f"socket.getaddrinfo = lambda host, *rest, **more: sum((real(one, *rest, **more) for one in {addresses}), [])")
        return run(*python_after(resolver, "client_try", "--port", str(port), "--host", "db", "--server-name", "example.com",
                                 "--timeout", timeout, CA, *CLIENT))

    def test_an_address_has_its_share_of_the_time_and_what_follows_has_the_rest(self):
        """A twentieth of the twenty seconds, here, and the handshake takes longer."""
        def slow(data, passed, to_client):
            time.sleep(0 if passed else 1.2)
            return data
        with Server() as server, Relay(server.port, slow) as relay:
            self.assertEqual(self.client_of(["127.0.0.1"] * 20, relay.port, "20")[:2], (0, "42\n"))

    def test_first_address_is_silent(self):
        """At the first of twenty addresses nobody takes connections, and its queue is full."""
        with Server() as server, contextlib.ExitStack() as stack:
            silent = stack.enter_context(socket.socket())
            try:
                silent.bind(("127.0.0.2", server.port))
            except OSError:
                self.skipTest("127.0.0.2 is no address of this machine")
            silent.listen(0)
            with contextlib.suppress(socket.timeout):
                while True:
                    stack.enter_context(socket.create_connection(("127.0.0.2", server.port), 0.3))
            status, output, errors = self.client_of(["127.0.0.2"] + ["127.0.0.1"] * 19, server.port, "20")
            self.assertEqual((status, output), (0, "42\n"), errors)

    def test_key_log_opens_the_handshake_to_wireshark(self):
        log = os.path.join(Project.get(), "keys.log")
        with Server() as server:
            client(server.port, env={**os.environ, "SSLKEYLOGFILE": log})
        with open(log) as lines:
            labels = {line.split()[0] for line in lines if not line.startswith("#")}
        self.assertEqual(os.stat(log).st_mode & 0o777, 0o600)
        self.assertLessEqual({"CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_HANDSHAKE_TRAFFIC_SECRET",
                              "CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"}, labels)

    def test_neither_end_waits_for_an_acknowledgement(self):
        """Each has TCP_NODELAY on its sockets when it wraps them, or a second message would wait some 40 ms."""
        with Process(*python_after(SHOW_NO_DELAY, "server_try", "--port", "0", CA, *SERVER)) as server:
            port = server.wait_for(LISTENING)[1]
            status, _, errors = run(*python_after(SHOW_NO_DELAY, "client_try", "--port", port, CA, *CLIENT))
            self.assertEqual((status, errors.splitlines()[0]), (0, "no delay: 1"))
            server.wait_for("no delay: 1")

    def test_no_session_ticket_is_sent(self):
        with Server() as server, connection(server.port) as tls:
            tls.sendall(b"1\n")
            self.assertEqual(tls.recv(10), b"2\n")
            self.assertFalse(tls.session.has_ticket)

    def test_stops_with_status_0(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with Server() as server, connection(server.port):
                self.assertEqual(server.stop(number), 0)
                self.assertNotIn("Traceback", server.log())


class Refusals(TestCase):
    """One certificate is not right: both ends say so, why, and who turned whom away."""

    def refused(self, server_files, client_files, *options, client_says, server_says):
        with Server(files=server_files) as server:
            self.assertRefused(client(server.port, *options, files=client_files), client_says)
            server.wait_for(PEER + server_says)

    def test_client_without_certificate(self):
        self.refused((CA, *SERVER), (CA,), client_says="turned us away: certificate required",
                     server_says="turned away: peer did not return a certificate")

    def test_server_without_certificate(self):
        # OpenSSL finds that without a certificate it cannot speak TLS 1.3, and puts it like this.
        self.refused((CA,), (CA, *CLIENT), client_says="turned us away: protocol version",
                     server_says="turned away: unsupported protocol")

    def test_second_ca_at_the_client(self):
        self.refused((CA, *SERVER), (ALT_CA, *ALT_CLIENT), client_says=SECOND_CA,
                     server_says="turned us away: (unknown ca|decrypt error|bad certificate)")

    def test_second_ca_at_the_server(self):
        self.refused((ALT_CA, *ALT_SERVER), (CA, *CLIENT), client_says=SECOND_CA,
                     server_says="turned us away: (unknown ca|decrypt error|bad certificate)")

    def test_second_ca_vouches_for_the_client_alone(self):
        self.refused((CA, *SERVER), (CA, *ALT_CLIENT), client_says="turned us away: (unknown ca|decrypt error)",
                     server_says=SECOND_CA)

    def test_second_ca_at_both(self):
        with Server(files=(ALT_CA, *ALT_SERVER)) as server:
            self.assertEqual(client(server.port, files=(ALT_CA, *ALT_CLIENT))[:2], (0, "42\n"))

    def test_client_certificate_cannot_play_server(self):
        self.refused((CA, *CLIENT), (CA, *CLIENT), server_says="turned us away: unsupported certificate",
                     client_says=VERIFY + WRONG_ROLE)

    def test_server_certificate_cannot_play_client(self):
        self.refused((CA, *SERVER), (CA, *SERVER), client_says="turned us away: unsupported certificate",
                     server_says=VERIFY + WRONG_ROLE)

    def test_another_name(self):
        self.refused((CA, *SERVER), (CA, *CLIENT), "--server-name", "example.org",
                     client_says=VERIFY + "Hostname mismatch, certificate is not valid for 'example.org'.", server_says="turned us away: bad certificate")

    def test_tls_1_2(self):
        context = tls_client()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with Server() as server:
            with self.assertRaisesRegex(ssl.SSLError, "protocol version"):
                with connection(server.port, context):
                    pass
            server.wait_for(PEER + "turned away: unsupported protocol")

    def test_server_of_tls_1_2(self):
        context = tls_server()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with Process(*client_command(port)) as process:
                raw, _ = listener.accept()
                with raw, self.assertRaises(ssl.SSLError):
                    context.wrap_socket(raw, server_side=True)
                self.assertEqual(process.end(), 1)
                self.assertLine(process.log(), f"client_try: {PEER}turned us away: protocol version\n")


class HandMade(TestCase):
    """The exercise's own commands, and its own command lines."""

    CONFIG = """
        [ca]
        default_ca = CA_default
        [CA_default]
        dir = auth/test-ca
        database = $dir/index.txt
        new_certs_dir = $dir/new_certs
        serial = $dir/serial
        default_days = 30
        default_md = default
        policy = policy_match
        [policy_match]
        commonName = supplied
        countryName = optional
        stateOrProvinceName = optional
        localityName = optional
        organizationName = optional
        organizationalUnitName = optional
        emailAddress = optional
        """

    COMMANDS = """
        set -e
        mkdir -p auth/test-ca auth/test-ca/new_certs
        touch auth/test-ca/index.txt
        echo 1111 >auth/test-ca/serial
        name="/C=NZ/ST=Waikato/L=Hamilton/O=MegaCorp Inc"
        openssl req -new -x509 -subj "$name/OU=Trust Me/CN=example.com/emailAddress=postmaster@example.com" \\
            -newkey rsa:2048 -nodes -days 365 -keyout auth/test-ca/test-ca.key -out auth/test-ca/test-ca.cert
        for end in client server; do
            openssl req -new -subj "$name/OU=$end/CN=example.com" \\
                -newkey rsa:2048 -nodes -keyout auth/$end.key -out auth/$end.req
            openssl ca -batch -config auth/test-ca.conf \\
                -cert auth/test-ca/test-ca.cert -keyfile auth/test-ca/test-ca.key \\
                -in auth/$end.req -days 30 -out auth/$end.crt
        done
        """

    def test_exercise(self):
        for config in (self.CONFIG, None):
            with self.subTest("with the exercise's configuration" if config else "with ours"):
                with tempfile.TemporaryDirectory() as folder:
                    os.mkdir(os.path.join(folder, "auth"))
                    shutil.copy(os.path.join(ROOT, "auth/test-ca.conf"), os.path.join(folder, "auth"))
                    if config:
                        with open(os.path.join(folder, "auth/test-ca.conf"), "w") as file:
                            file.write(config)
                    commands = self.COMMANDS if config else self.COMMANDS.replace("rsa:2048", FAST.partition("=")[2])
                    status, _, errors = run("sh", "-c", commands, folder=folder)
                    self.assertEqual(status, 0, errors)
                    with Server(folder=folder) as server:
                        status, output, errors = client(server.port, folder=folder)
                        self.assertEqual((status, output), (0, "42\n"), errors)
                        server.wait_for(ACCEPTED.replace(r"\w+", "1111", 1) % EXAMPLE % "client")


SERVER_FLIGHT = ["ServerHello", "EncryptedExtensions", "CertificateRequest", "Certificate", "CertificateVerify", "Finished"]


class Trace(TestCase):
    """Each message of the handshake and each alert, by its name, in order, with its size."""

    def traced(self, lines, peer=r""):
        """Return direction and name of each line of a trace."""
        lines = [line.replace("CompressedCertificate", "Certificate") for line in lines]  # OpenSSL from 3.2 on may do that
        return [match.groups() for match in (re.match(peer + r"([<>]) (\w+), [1-9]\d* bytes$", line) for line in lines) if match]

    def handshake(self, client_flight, ours="<", theirs=">"):
        return ([(theirs, "ClientHello")] + [(ours, name) for name in SERVER_FLIGHT] + [(theirs, name) for name in client_flight])

    def test_a_good_handshake_at_both_ends(self):
        flight = ["Certificate", "CertificateVerify", "Finished"]
        with Server("--trace") as server:
            status, output, errors = client(server.port, "--trace")
            self.assertEqual((status, output), (0, "42\n"), errors)
            said = self.traced(errors.splitlines())
            if said[-1] == ("<", "CloseNotify"):  # the client does not wait for it, but it may have come
                said.pop()
            self.assertEqual(said, [*self.handshake(flight), (">", "CloseNotify")])
            server.wait_for(PEER + "> CloseNotify, 2 bytes")
            self.assertEqual(self.traced(server.lines, PEER),
                             [*self.handshake(flight, ">", "<"), ("<", "CloseNotify"), (">", "CloseNotify")])
            self.assertNotRegex(errors + server.log(), r"\b41\b.*bytes")
        with Server() as server:
            errors = client(server.port)[2]
            server.wait_for(PEER + "answered 1, done")
            self.assertEqual(self.traced(errors.splitlines()) + self.traced(server.lines, PEER), [])

    def test_without_a_certificate_two_messages_change(self):
        with Server("--trace") as server:
            errors = client(server.port, "--trace", files=(CA,))[2]
            self.assertIn("\n> Certificate, 8 bytes\n> Finished, ", errors)
            self.assertEqual(self.traced(errors.splitlines()),
                             [*self.handshake(["Certificate", "Finished"]), ("<", "CertificateRequired")])
            server.wait_for(PEER + "> CertificateRequired, 2 bytes")

    def test_each_line_has_its_own_client_when_many_connect_at_once(self):
        with Server("--trace") as server:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                self.assertEqual([done[:2] for done in pool.map(client, [server.port] * 8)], [(0, "42\n")] * 8)
            for _ in range(8):
                peer = server.wait_for("(.*): > CloseNotify, 2 bytes")[1]
                mine = [line for line in server.lines if line.startswith(peer + ": ")]
                self.assertEqual(len(self.traced(mine, PEER)), 12)
                server.lines = [line for line in server.lines if not line.startswith(peer + ": ")]

    def test_tickets_of_another_server(self):
        context = tls_server()
        context.num_tickets = 1
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Process(*client_command(listener.getsockname()[1], "--trace")) as process:
                with context.wrap_socket(listener.accept()[0], server_side=True) as tls:
                    tls.recv(100)
                    tls.sendall(b"42\n")
                    self.assertEqual(process.end(), 0)
                process.wait_for(r"< NewSessionTicket, \d+ bytes")


class Helpers(TestCase):
    """What stands in both scripts is one text."""

    def test_copies_are_equal(self):
        texts = []
        for script in "server_try", "client_try":
            with open(os.path.join(ROOT, script), encoding="utf-8") as file:
                own, mark, shared = file.read().partition("# From here on server_try and client_try are the same")
            self.assertTrue(mark)
            self.assertIn("\ndef make_context(", shared)
            texts.append((set(re.findall(r"(?m)^(?:def|class) (\w+)", own)), shared))
        (server, shared), (client, same) = texts
        self.assertEqual(shared, same)
        self.assertEqual(server & client, {"main", "parse_arguments"})

    def test_the_times_and_sizes_are_those_of_the_documents(self):
        for script, constants in ("server_try", ("IDLE_SECONDS = 60", "STOP_SECONDS = 4", "LINE_LIMIT = 4096")), ("client_try", ("LINE_LIMIT = 4096",)):
            with open(os.path.join(ROOT, script), encoding="utf-8") as file:
                lines = [line.partition("  #")[0] for line in file.read().splitlines()]
            for constant in constants:
                self.assertIn(constant, lines)

    def test_the_limits_of_the_scripts(self):
        for script, limit in ("server_try", 376), ("client_try", 250):
            with open(os.path.join(ROOT, script), encoding="utf-8") as file:
                lines = file.read().splitlines()
            self.assertLessEqual(len(lines), limit)
            self.assertLessEqual(max(map(len, lines)), 100)


if __name__ == "__main__":
    unittest.main()
