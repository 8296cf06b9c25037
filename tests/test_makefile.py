"""The Makefile: the pair's certificates, the second CA's, the demo."""

import contextlib
import glob
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import unittest

from support import ALL, CA, CLIENT, SERVER, Home, Server, connection, plain_environment, template, wait_until


class Clone(Home):
    def test_bare_make_lists_the_targets_a_line_each(self):
        lines = self.make().splitlines()
        for target in ("certs", "demo", "alt-certs odd-certs", "server-cert", "client-cert", "list", "check", "renew", "revoke", "crl",
                       "test", "bench", "clean"):
            self.assertEqual(len([line for line in lines if re.match(rf"make {target}\b", line)]), 1, target)

    def test_certs_shows_each_openssl_command_and_what_comes_next(self):
        shown = self.make("certs")
        self.assertEqual(len(re.findall("openssl (?:req|ca) -config auth/test-ca.conf ", shown)), 5)
        self.assertNotRegex(shown, r"\.{5}|Signature ok|writing new")
        self.assertIn("Next: ./server_try auth/test-ca/test-ca.cert auth/server.crt auth/server.key\n", shown)

    def test_the_second_ca_needs_no_first_one(self):
        self.make("alt-certs")
        self.verify("auth/alt-client.crt", ca="auth/alt-ca/alt-ca.cert")
        self.assertFalse(os.path.exists(self.path("auth/test-ca")))

    def test_settings(self):
        self.make("certs", "SERIAL=ABCD", "DAYS=3", "CA_DAYS=2", "ORGANIZATION=/O=Ours")
        text = self.openssl("x509", "-noout", "-text", "-in", CLIENT[0])
        self.assertRegex(text, "O ?= ?Ours, OU ?= ?Client, CN ?= ?example.com")
        self.assertIn("0xabcd", text)
        self.assertIn("prime256v1", text)
        for file, days in (CLIENT[0], 3), (CA, 2):
            self.openssl("x509", "-noout", "-checkend", str(days * 86400 - 3600), "-in", file)
            self.openssl("x509", "-noout", "-checkend", str(days * 86400 + 60), "-in", file, status=1)

    def test_what_fails_leaves_no_certificate(self):
        self.make("certs", "CA_SUBJECT=nonsense", status=2)
        self.assertEqual([name for name in self.listing() if name.endswith((".cert", ".crt"))], [])

    def test_what_is_interrupted_leaves_no_certificate(self):
        before = self.listing()
        with self.start("certs", "NEWKEY=rsa:16384", output=subprocess.PIPE) as process:
            self.read_to(process, b"mkdir -p auth/test-ca")
            while not self.gone(process.pid):  # a process that is just being started can escape a signal
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGINT)
                    process.wait(0.5)
        self.assertNotEqual(process.returncode, 0)
        for name in set(self.listing()) - set(before):
            self.assertRegex(name, r"(index.txt|serial|\.key|\.new)$")  # no certificate goes with the key: it is made anew
        self.make("certs")

    def test_too_old_an_openssl_or_make_is_told(self):
        self.assertIn("or later, is needed; this is OpenSSL 1.0.2", self.make("certs", self.false_openssl("echo OpenSSL 1.0.2\n"), status=2))
        self.assertRegex(self.make("certs", "MAKE_VERSION=3.80", status=2), r"\A.*GNU make 3.81 or later is needed; this is 3.80.*\n\Z")


class Certs(Home):
    commands = (ALL,)

    def test_a_second_time_makes_nothing_and_clean_removes_it_all(self):
        made = {name: os.stat(self.path(name)).st_mtime_ns for name in self.listing()}
        self.make("certs", "alt-certs", "odd-certs")
        self.assertEqual(made, {name: os.stat(self.path(name)).st_mtime_ns for name in self.listing()})
        for key in glob.glob(glob.escape(self.folder) + "/**/*.key", recursive=True):
            self.assertEqual(os.stat(key).st_mode & 0o777, 0o600, key)
        for public in CA, SERVER[0], CLIENT[0]:
            self.assertEqual(os.stat(self.path(public)).st_mode & 0o444, 0o444, public)
        self.make("clean")
        self.assertEqual(self.listing(), self.listing(template()))

    def test_made_in_parallel_they_have_a_serial_each_and_verify(self):
        for ca, names in ("test-ca", ("client", "server")), ("alt-ca", ("alt-client", "alt-server")):
            rows = [line.split("\t") for line in self.read(f"auth/{ca}/index.txt").splitlines()]
            self.assertEqual({row[0] for row in rows}, {"V"})
            self.assertEqual(sorted(row[3] for row in rows), [f"{0x1111 + number:X}" for number in range(len(rows))])
            for name in names:
                self.verify(f"auth/{name}.crt", ca=f"auth/{ca}/{ca}.cert")
                self.assertEqual(self.read(f"auth/{name}.crt").count("BEGIN CERTIFICATE"), 2)  # the CA's own goes along

    def test_what_is_only_shown_and_what_is_made_anew(self):
        self.assertRegex(self.make("-n", "test"), r"\A\S.* tests\n\Z")
        before = self.read(CA), self.read("auth/server.key"), self.read(SERVER[0])
        said = self.make("-B", "certs")
        for kept in CA, "auth/client.req", "auth/server.req":
            self.assertIn(f"{kept} already exists, and is kept\n", said)
        self.assertEqual((self.read(CA), self.read("auth/server.key")), before[:2])
        self.assertNotEqual(self.read(SERVER[0]), before[2])
        self.verify(SERVER[0])

    def test_the_strict_default_of_python_3_13_takes_them(self):
        context = ssl.create_default_context(cafile=self.path(CA))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(*(self.path(name) for name in CLIENT))
        with Server(folder=self.folder) as server, connection(server.port, context) as tls:
            names = tls.getpeercert()["subjectAltName"]
        self.assertEqual(names, (("DNS", "example.com"), ("DNS", "localhost"), ("IP Address", "127.0.0.1")))

    def test_demo_says_when_it_cannot_have_the_port(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            shown = self.make("demo", f"PORT={taken.getsockname()[1]}", status=2)
        self.assertRegex(shown, "Address already in use(?s:.*)\nChoose another port: make demo PORT=6421, or PORT=0 for any free one\n")
        self.assertRegex(self.make("demo", "PORT=abc", status=2), "server: usage: .*\nserver: .*invalid int value: 'abc'")
        shutil.copy(self.path(CLIENT[1]), self.path(SERVER[1]))
        self.assertNotIn("port", self.make("demo", "PORT=0", status=2).split("server: ")[1])

    def test_demo_waits_for_no_line_that_does_not_come(self):
        self.assertIn("Invalid -W option ignored", self.make("demo", "PORT=0", environment=dict(plain_environment(), PYTHONWARNINGS="bogus")))

    def test_demo_fails_where_an_end_does(self):
        shutil.copy(self.path("auth/alt-client.crt"), self.path("auth/client.crt"))
        self.assertIn("turned us away", self.make("demo", "PORT=0", status=2))

    def test_demo_renews_what_has_expired(self):
        for end in "client", "server":
            shutil.copy(self.path(f"auth/expired-{end}.crt"), self.path(f"auth/{end}.crt"))
        self.assertRegex(self.make("demo", "PORT=0"), "renewing auth/client.crt, .*\nrenewing auth/server.crt(?s:.*)client: 42")

    def test_demo_interrupted_at_any_line_leaves_no_server(self):
        for number, line in enumerate([b"", b"server: listening", b"1. ", b"client: ", b"3. "]):
            with self.start("demo", "PORT=0", output=subprocess.PIPE) as process:
                self.read_to(process, line)
                (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGTERM)
                if number % 2:
                    self.assertNotIn(b"3. ", process.stdout.read())  # and it went no further
            wait_until(lambda: self.gone(process.pid))


if __name__ == "__main__":
    unittest.main()
