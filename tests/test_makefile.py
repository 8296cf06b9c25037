"""The Makefile: what it makes, and what it leaves alone."""

import glob
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess

from support import (CA, CLIENT, FAST, SERVER, Project, Server, TestCase, client, connection, copy_project, make, run,
                     temporary_folder)


def listing(folder):
    return sorted(os.path.relpath(os.path.join(where, name), folder)
                  for where, _, names in os.walk(folder) for name in names)


class Fresh(TestCase):
    """Each in a clone of its own."""

    def setUp(self):
        self.folder = copy_project(os.path.join(temporary_folder(), "clone"))

    def openssl(self, *arguments, status=0):
        ended, output, errors = run("openssl", *arguments, folder=self.folder)
        self.assertEqual(ended, status, output + errors)
        return output

    def test_bare_make_lists_the_targets_a_line_each(self):
        lines = make(self.folder).splitlines()
        for target in "certs", "alt-certs", "server-cert", "client-cert", "renew", "demo", "test", "clean":
            self.assertEqual(len([line for line in lines if re.match(rf"make {target}\b", line)]), 1, target)

    def test_certs_twice_and_clean(self):
        before = listing(self.folder)
        make(self.folder, FAST, "certs", "alt-certs")
        made = {name: os.stat(os.path.join(self.folder, name)).st_mtime_ns for name in listing(self.folder)}
        make(self.folder, FAST, "certs", "alt-certs")
        self.assertEqual(made, {name: os.stat(os.path.join(self.folder, name)).st_mtime_ns for name in listing(self.folder)})
        for key in glob.glob(self.folder + "/**/*.key", recursive=True):
            self.assertEqual(os.stat(key).st_mode & 0o777, 0o600, key)
        for public in CA, SERVER[0], CLIENT[0]:
            self.assertEqual(os.stat(os.path.join(self.folder, public)).st_mode & 0o444, 0o444, public)
        make(self.folder, "clean")
        self.assertEqual(listing(self.folder), before)

    def test_parallel_makes_distinct_serials_and_a_sound_database(self):
        make(self.folder, FAST, "-j8", "certs", "alt-certs")
        for ca, files in ("test-ca", ("client", "server")), ("alt-ca", ("alt-client", "alt-server")):
            with open(os.path.join(self.folder, "auth", ca, "index.txt")) as index:
                rows = [line.rstrip("\n").split("\t") for line in index]
            self.assertEqual([row[0] for row in rows], ["V", "V"])
            self.assertEqual(sorted(row[3] for row in rows), ["1111", "1112"])
            for name in files:
                self.openssl("verify", "-x509_strict", "-CAfile", f"auth/{ca}/{ca}.cert", f"auth/{name}.crt")

    def test_demo(self):
        shown = make(self.folder, "demo", "PORT=0", FAST)
        for line in (r"server: listening on 127.0.0.1:\d+", "client: connected to .*OU=Server", "client: sent 41", "client: 42",
                     "server: .*: accepted .*OU=Client", "server: .*: answered 1, done", "server: stopped"):
            self.assertRegex(shown, f"(?m)^{line}")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            shown = make(self.folder, "demo", f"PORT={taken.getsockname()[1]}", status=2)
            self.assertIn("Address already in use", shown)
        os.replace(os.path.join(self.folder, SERVER[1]), os.path.join(self.folder, CLIENT[1]))
        self.assertNotIn("auth/demo", listing(self.folder))

    def test_demo_fails_where_an_end_does(self):
        make(self.folder, "certs", "alt-certs", FAST)
        shutil.copy(os.path.join(self.folder, "auth/alt-client.crt"), os.path.join(self.folder, "auth/client.crt"))
        self.assertIn("turned us away", make(self.folder, "demo", "PORT=0", status=2))

    def test_other_machines(self):
        make(self.folder, "certs", FAST)
        for goal, name, shown in [("server-cert", "db1.internal", "DNS:db1.internal"), ("client-cert", "laptop7", "DNS:laptop7"),
                                  ("server-cert", "192.0.2.7", "IP Address:192.0.2.7"), ("client-cert", "::2", None),
                                  ("server-cert", "2001:db8::1", "IP Address:2001:DB8:0:0:0:0:0:1")]:
            if name.startswith(":"):
                make(self.folder, goal, f"NAME={name}", FAST, status=2)
                continue
            for _ in range(2):
                make(self.folder, goal, f"NAME={name}", FAST)
            text = self.openssl("x509", "-noout", "-text", "-in", f"./auth/{name}.crt")
            self.assertIn(shown, text)
            self.assertIn(f"CN = {name}", text)
            self.assertEqual(os.stat(f"{self.folder}/auth/{name}.key").st_mode & 0o777, 0o600)
        with Server(folder=self.folder, files=(CA, "auth/db1.internal.crt", "auth/db1.internal.key")) as server:
            files = (CA, "auth/laptop7.crt", "auth/laptop7.key")
            self.assertEqual(client(server.port, "--server-name", "db1.internal", files=files, folder=self.folder)[:2], (0, "42\n"))
            server.wait_for("accepted .*CN=laptop7")
        self.assertIn("unsuitable certificate purpose", make(self.folder, "client-cert", "NAME=db1.internal", status=2))
        for name in "", "client", "alt-server", "a b", "../x", "a'b", "-x", "a;b", "$(HOME)", "*":
            before = listing(self.folder)
            make(self.folder, "server-cert", f"NAME={name}", status=2)
            self.assertEqual(listing(self.folder), before)

    def test_renew(self):
        make(self.folder, "renew", status=2)
        make(self.folder, "certs", "alt-certs", "server-cert", "NAME=db1.internal", FAST)
        os.remove(os.path.join(self.folder, "auth/db1.internal.key"))  # it has gone to its machine
        names = ["client", "server", "alt-client", "alt-server", "db1.internal"]

        def facts(*options):
            return [self.openssl("x509", "-noout", *options, "-in", f"auth/{name}.crt") for name in names]

        what = ("-pubkey", "-subject", "-ext", "subjectAltName,extendedKeyUsage")
        before, serials = facts(*what), facts("-serial")
        make(self.folder, "renew")
        self.assertEqual(facts(*what), before)
        for old, new in zip(serials, facts("-serial")):
            self.assertNotEqual(old, new)
        self.openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", CA, "auth/db1.internal.crt")

    def test_revoke(self):
        make(self.folder, "certs", "alt-certs", "odd-certs", FAST, "ORGANIZATION=/O=Café")
        make(self.folder, "client-cert", "NAME=laptop7", FAST, "ORGANIZATION=/O=Café")
        make(self.folder, "client-cert", "NAME=laptop70", FAST, "ORGANIZATION=/O=Café")
        make(self.folder, "renew")

        def revoked():
            with open(os.path.join(self.folder, "auth/test-ca/index.txt"), encoding="utf-8") as index:
                return [line.rpartition("CN=")[2].strip() for line in index if line.startswith("R")]

        for name in "alt-client", "self-signed", "expired-client", "nobody", "", "a b", "../client":
            make(self.folder, "revoke", f"NAME={name}", status=2)
        self.assertEqual(revoked(), [])
        make(self.folder, "revoke", "NAME=laptop7")
        self.assertEqual(revoked(), ["laptop7", "laptop7"])
        make(self.folder, "revoke", "NAME=laptop7")
        make(self.folder, "revoke", "NAME=server")
        self.assertEqual(set(revoked()), {"laptop7", "example.com"})
        text = self.openssl("crl", "-in", "auth/test-ca/test-ca.crl", "-noout", "-text")
        self.assertIn("Version 2", text)
        self.assertEqual(text.count("Revocation Date"), len(revoked()))

    def test_variables(self):
        make(self.folder, "certs", FAST, "SERIAL=ABCD", "DAYS=3", "CA_DAYS=5", "ORGANIZATION=/O=Ours")
        text = self.openssl("x509", "-noout", "-text", "-in", CLIENT[0])
        self.assertIn("O = Ours, OU = Client, CN = example.com", text)
        self.assertIn("0xabcd", text)
        self.assertIn("prime256v1", text)
        for file, days in (CLIENT[0], 3), (CA, 5):
            self.openssl("x509", "-noout", "-checkend", str(days * 86400 - 3600), "-in", file)
            self.openssl("x509", "-noout", "-checkend", str(days * 86400 + 60), "-in", file, status=1)

    def test_failure_and_interrupt_leave_nothing_half_made(self):
        before = listing(self.folder)
        make(self.folder, "certs", FAST, "CA_SUBJECT=nonsense", status=2)
        self.assertEqual([name for name in listing(self.folder) if name.endswith((".key", ".cert"))], [])
        make(self.folder, "clean")
        process = subprocess.Popen(["make", "certs", "NEWKEY=rsa:8192"], cwd=self.folder, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        with process:
            process.stderr.read(1)  # openssl has begun
            os.killpg(process.pid, signal.SIGINT)
        self.assertNotEqual(process.returncode, 0)
        for name in set(listing(self.folder)) - set(before):
            self.assertRegex(name, r"(index.txt|serial)$")
        make(self.folder, "certs", FAST)

    def test_strict_default_of_python_3_13(self):
        folder = Project.get()
        context = ssl.create_default_context(cafile=os.path.join(folder, CA))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(*(os.path.join(folder, name) for name in CLIENT))
        with Server() as server:
            with connection(server.port, context) as tls:
                names = tls.getpeercert()["subjectAltName"]
        self.assertEqual(names, (("DNS", "example.com"), ("DNS", "localhost"), ("IP Address", "127.0.0.1")))
        for files in SERVER, CLIENT:
            status, output, errors = run("openssl", "verify", "-x509_strict", "-CAfile", CA, files[0])
            self.assertEqual(status, 0, errors)
