"""The Makefile: what it makes, and what it leaves alone."""

import contextlib
import fcntl
import glob
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

from support import (CA, CLIENT, FAST, MAKE, PATIENCE, SERVER, Project, Server, TestCase, client, connection, copy_project, make,
                     plain_environment, run, temporary_folder, wait_until)


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

    def path(self, name):
        return os.path.join(self.folder, name)

    def index(self):
        """Return the CA's records, a list of columns for each certificate."""
        with open(self.path("auth/test-ca/index.txt"), encoding="utf-8") as index:
            return [line.rstrip("\n").split("\t") for line in index]

    def valid(self, name):
        """Return the serial numbers of a machine's certificates that are not revoked."""
        return [row[3] for row in self.index() if row[0] == "V" and row[5].endswith("/CN=" + name)]

    def start(self, *arguments, stdout=subprocess.DEVNULL):
        """Start make in a process group of its own, as a shell does."""
        return subprocess.Popen([MAKE, f"PYTHON={sys.executable}", *arguments], cwd=self.folder, env=plain_environment(), start_new_session=True,
                                stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def test_bare_make_lists_the_targets_a_line_each(self):
        lines = make(self.folder).splitlines()
        for target in "certs", "alt-certs", "server-cert", "client-cert", "list", "renew", "revoke", "demo", "test", "clean":
            self.assertEqual(len([line for line in lines if re.match(rf"make {target}\b", line)]), 1, target)

    def test_certs_twice_and_clean(self):
        before = listing(self.folder)
        self.assertIn("Next: ./server_try", make(self.folder, FAST, "certs", "alt-certs"))
        made = {name: os.stat(self.path(name)).st_mtime_ns for name in listing(self.folder)}
        make(self.folder, FAST, "certs", "alt-certs")
        self.assertEqual(made, {name: os.stat(self.path(name)).st_mtime_ns for name in listing(self.folder)})
        for key in glob.glob(self.folder + "/**/*.key", recursive=True):
            self.assertEqual(os.stat(key).st_mode & 0o777, 0o600, key)
        for public in CA, SERVER[0], CLIENT[0]:
            self.assertEqual(os.stat(self.path(public)).st_mode & 0o444, 0o444, public)
        make(self.folder, "clean")
        self.assertEqual(listing(self.folder), before)

    def test_the_second_ca_needs_no_first_one(self):
        make(self.folder, FAST, "alt-certs")
        self.openssl("verify", "-CAfile", "auth/alt-ca/alt-ca.cert", "auth/alt-client.crt")
        self.assertFalse(os.path.exists(self.path("auth/test-ca")))

    def test_clean_spares_a_ca_in_use(self):
        make(self.folder, FAST, "client-cert", "NAME=laptop7")
        self.assertRegex(make(self.folder, "clean", status=2), "in use.*laptop7\n.*FORCE=yes")
        self.assertTrue(os.path.exists(self.path("auth/test-ca/test-ca.key")))
        make(self.folder, "clean", "FORCE=yes")
        self.assertFalse(os.path.exists(self.path("auth/test-ca")))

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
        make(self.folder, "demo", "PORT=0", FAST)  # test_readme has what it prints
        shown = make(self.folder, "clean", "certs", FAST)
        self.assertEqual(len(re.findall("(?m)^openssl (?:req|ca) -config auth/test-ca.conf ", shown)), 5)
        self.assertNotRegex(shown, r"\.{5}|Signature ok|writing new")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            shown = make(self.folder, "demo", f"PORT={taken.getsockname()[1]}", status=2)
            self.assertRegex(shown, "Address already in use(?s:.*)Choose another port: ")
        self.assertRegex(make(self.folder, "demo", "PORT=abc", status=2), "server: usage: .*\nserver: .*invalid int value: 'abc'")
        shutil.copy(self.path(CLIENT[1]), self.path(SERVER[1]))
        self.assertNotIn("port", make(self.folder, "demo", "PORT=0", status=2).split("server: ")[1])

    def test_demo_waits_for_no_line_that_does_not_come(self):
        make(self.folder, "certs", "alt-certs", FAST)
        done = subprocess.run([MAKE, "demo", "PORT=0"], cwd=self.folder, env=dict(plain_environment(), PYTHONWARNINGS="bogus"),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn(b"server: Invalid -W option", done.stdout)

    def test_demo_fails_where_an_end_does(self):
        make(self.folder, "certs", "alt-certs", FAST)
        shutil.copy(self.path("auth/alt-client.crt"), self.path("auth/client.crt"))
        self.assertIn("turned us away", make(self.folder, "demo", "PORT=0", status=2))

    def test_demo_renews_what_has_expired(self):
        make(self.folder, "certs", "odd-certs", FAST)
        for end in "client", "server":
            shutil.copy(self.path(f"auth/expired-{end}.crt"), self.path(f"auth/{end}.crt"))
        self.assertRegex(make(self.folder, "demo", "PORT=0"), "renewing auth/server.crt(?s:.*)client: 42")

    def test_demo_interrupted_leaves_no_server(self):
        make(self.folder, "certs", FAST)
        for number in range(10):
            with self.start("demo", "PORT=0", stdout=subprocess.PIPE) as process:
                for line in process.stdout if number > 7 else ():
                    if line.startswith(b"server: listening"):
                        break
                time.sleep(0.02 * number)
                (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGTERM)
            wait_until(lambda: self.gone(process.pid))

    @staticmethod
    def gone(group):
        """Tell whether a process group is empty, but for ended processes that nobody has waited for."""
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        states = []
        for stat in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError), open(stat) as file:
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
                if int(its_group) == group:
                    states.append(state)
        return bool(states) and set(states) == {"Z"}

    def test_other_machines(self):
        make(self.folder, "certs", FAST)
        for goal, name, shown in [("server-cert", "db1.internal", "DNS:db1.internal"), ("client-cert", "laptop7", "DNS:laptop7"),
                                  ("server-cert", "192.0.2.7", "IP Address:192.0.2.7"), ("client-cert", "db1.internal", "DNS:db1.internal"),
                                  ("server-cert", "2001:db8::1", "IP Address:2001:DB8:0:0:0:0:0:1"), ("server-cert", "server.lan", "DNS:server.lan"),
                                  ("client-cert", "build-server", "DNS:build-server"), ("server-cert", "client.x", "DNS:client.x")]:
            file = f"auth/{goal[:6]}s/{name}"
            for _ in range(2):
                self.assertIn(f"For {name}: {file}.crt, {file}.key", make(self.folder, goal, f"NAME={name}", FAST))
            text = self.openssl("x509", "-noout", "-text", "-in", file + ".crt")
            self.assertIn(shown, text)
            self.assertRegex(text, f"CN ?= ?{name}")
            self.openssl("verify", "-x509_strict", "-purpose", "ssl" + goal[:6], "-CAfile", CA, file + ".crt")
            self.assertEqual(os.stat(self.path(file + ".key")).st_mode & 0o777, 0o600)
            with open(self.path(file + ".crt")) as both:  # the CA's own goes along
                self.assertEqual(both.read().count("BEGIN CERTIFICATE"), 2)
        with Server(folder=self.folder, files=(CA, "auth/servers/db1.internal.crt", "auth/servers/db1.internal.key")) as server:
            files = (CA, "auth/clients/laptop7.crt", "auth/clients/laptop7.key")
            self.assertEqual(client(server.port, "--server-name", "db1.internal", files=files, folder=self.folder)[:2], (0, "42\n"))
            server.wait_for("accepted .*CN=laptop7")

    def test_names_that_are_none_get_a_sentence_each(self):
        make(self.folder, "certs", FAST)
        before, said = listing(self.folder), set()
        for name in "", "a b", "*.internal", "a;b", "-x", "999.1.1.1":
            said.add(re.sub("NAME=.*?: |make: .*", "", make(self.folder, "server-cert", f"NAME={name}", status=2)))
            self.assertEqual(listing(self.folder), before)
        self.assertEqual(len(said), 6, said)
        for name in "host:8080", "../x", "a'b", "$(HOME)", ".x", "::zz":
            make(self.folder, "client-cert", f"NAME={name}", status=2)
            make(self.folder, "client-cert", "NAME=fine", f"NAMES=one {name}", status=2)
            self.assertEqual(listing(self.folder), before)

    def test_further_names_and_the_key_last(self):
        make(self.folder, "server-cert", "NAME=db1.internal", "NAMES=db1 10.0.0.7 fd00::7", FAST)
        file = self.path("auth/servers/db1.internal")
        os.remove(file + ".key")  # it has gone to its machine
        what = ("x509", "-noout", "-pubkey", "-subject", "-ext", "subjectAltName,extendedKeyUsage,basicConstraints", "-in", file + ".crt")
        before, serial = self.openssl(*what), self.openssl("x509", "-noout", "-serial", "-in", file + ".crt")
        self.assertRegex(before, "DNS:db1.internal, DNS:db1, IP Address:10.0.0.7, IP Address:FD00:0:0:0:0:0:0:7")
        self.assertRegex(make(self.folder, "renew"), r"(?m)^auth/servers/db1.internal.crt until \w")
        make(self.folder, "server-cert", "NAME=db1.internal")
        self.assertEqual(self.openssl(*what), before)
        self.assertNotEqual(self.openssl("x509", "-noout", "-serial", "-in", file + ".crt"), serial)
        self.assertFalse(os.path.exists(file + ".key"))

    def test_a_request_decides_nothing_but_names(self):
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-key", "auth/clients/laptop7.key", "-subj", "/CN=laptop7",
                     "-addext", "basicConstraints = CA:TRUE", "-addext", "extendedKeyUsage = serverAuth", "-addext",
                     "subjectAltName = DNS:laptop7", "-out", "auth/clients/laptop7.req")
        make(self.folder, "renew")
        text = self.openssl("x509", "-noout", "-text", "-in", "auth/clients/laptop7.crt")
        self.assertIn("CA:FALSE", text)
        self.assertIn("TLS Web Client Authentication", text)
        self.assertNotIn("TLS Web Server Authentication", text)

    def test_renew(self):
        make(self.folder, "renew", status=2)
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        make(self.folder, "certs", "crl", FAST)
        before = self.openssl("crl", "-noout", "-crlnumber", "-in", "auth/test-ca/test-ca.crl")
        said = make(self.folder, "renew").splitlines()
        self.assertNotEqual(self.openssl("crl", "-noout", "-crlnumber", "-in", "auth/test-ca/test-ca.crl"), before)
        self.assertEqual([line.split()[0] for line in said],
                         ["auth/client.crt", "auth/server.crt", "auth/clients/laptop7.crt", "auth/test-ca/test-ca.crl", "Copy"])
        with open(self.path("auth/clients/laptop7.crt")) as file:
            good = file.read()
        os.remove(self.path("auth/clients/laptop7.req"))
        os.remove(self.path("auth/client.crt"))
        self.assertIn("auth/client.crt until", make(self.folder, "renew"))  # it goes by the requests
        with open(self.path("auth/clients/laptop7.crt")) as file:
            self.assertEqual(file.read(), good)

    def test_end_of_the_ca_is_told(self):
        for arguments in ["certs"], ["client-cert", "NAME=laptop7"], ["renew"]:
            self.assertRegex(make(self.folder, *arguments, FAST, "CA_DAYS=3"), "test-ca.cert until .* expires soon; what it signs is of no use after that")

    def test_list(self):
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        make(self.folder, "server-cert", "NAME=db1", FAST, "DAYS=3")
        make(self.folder, "certs", FAST)
        for _ in range(3):
            make(self.folder, "renew", "DAYS=30")
        make(self.folder, "revoke", "NAME=laptop7")
        make(self.folder, "server-cert", "NAME=db2", FAST, "DAYS=3")
        lines = make(self.folder, "list").splitlines()
        for line in ("auth/test-ca/test-ca.cert CA .* valid", r"laptop7 Client \w+ revoked", "db2 Server 1121 until .* expires soon",
                     r"example.com Client \w+ until .* valid", r"db1 Server \w+ until .* valid", r"example.com Server \w+ until .* valid",
                     r"auth/test-ca/test-ca.crl CRL (0x)?01 until .* valid"):
            self.assertEqual(len([one for one in lines if re.fullmatch(line, one)]), 1, (line, lines))
        self.assertEqual(len(lines), 7)  # a line a machine, its newest certificate; the CA and the CRL
        make(self.folder, "crl", "CRL_DAYS=3")
        self.assertRegex(make(self.folder, "list"), "test-ca.crl CRL (0x)?02 until .* expires soon\n")

    def test_revoke(self):
        organization = "ORGANIZATION=/O=Caf\u00e9"
        for arguments in ["client-cert", "NAME=laptop7"], ["client-cert", "NAME=laptop70"], ["server-cert", "NAME=laptop7"], ["certs"]:
            make(self.folder, *arguments, FAST, organization)
        make(self.folder, "renew")
        for name in "nobody", "", "a b", "../client", "aptop7":
            make(self.folder, "revoke", f"NAME={name}", status=2)
        self.assertEqual({row[0] for row in self.index()}, {"V"})
        for _ in range(2):
            self.assertIn("Copy auth/test-ca/test-ca.crl", make(self.folder, "revoke", "NAME=laptop7"))
            self.assertEqual([row[5].rpartition("=")[2] for row in self.index() if row[0] == "R"], ["laptop7"] * 4)
        text = self.openssl("crl", "-in", "auth/test-ca/test-ca.crl", "-noout", "-text")
        self.assertIn("Version 2", text)
        self.assertEqual(text.count("Revocation Date"), 4)
        self.assertNotIn("laptop7.crt", make(self.folder, "renew"))
        self.assertEqual(self.valid("laptop7"), [])
        make(self.folder, "client-cert", "NAME=laptop7", FAST)  # with a new key
        self.assertEqual(len(self.valid("laptop7")), 1)

    def test_one_at_a_time(self):
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        make(self.folder, "certs", FAST)
        for arguments in ["renew"], ["revoke", "NAME=laptop7"], ["server-cert", "NAME=db1", FAST]:
            before = self.index(), listing(self.folder)
            lock = os.open(self.path("auth"), os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self.start(*arguments) as process:
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(1)
                self.assertEqual((self.index(), listing(self.folder)), before)
                os.close(lock)
                self.assertEqual(process.wait(PATIENCE), 0)
            self.assertNotEqual((self.index(), listing(self.folder)), before)

    def test_what_has_begun_at_the_ca_is_finished(self):
        """Ctrl-C in the middle of `openssl ca`, which renames its records one by one."""
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        with open(self.path("openssl"), "w") as file:
            file.write('#!/bin/sh\ntrap "" INT\nif test "$1" = ca; then kill -INT 0; fi\nopenssl "$@"\n')
        os.chmod(self.path("openssl"), 0o755)
        with self.start("renew", "OPENSSL=./openssl") as process:
            process.wait(PATIENCE)
        wait_until(lambda: self.gone(process.pid))
        self.assertEqual(len(self.index()), 2)
        self.openssl("verify", "-x509_strict", "-CAfile", CA, "auth/clients/laptop7.crt")

    def test_revoke_beside_renew(self):
        make(self.folder, "certs", FAST)
        for number in range(3):
            make(self.folder, "client-cert", f"NAME=laptop{number}", FAST)
            with self.start("renew") as one, self.start("renew") as two:
                time.sleep(0.07 * number)
                make(self.folder, "revoke", f"NAME=laptop{number}")
            self.assertEqual(self.valid(f"laptop{number}"), [])
            self.assertNotIn(f"laptop{number}", make(self.folder, "renew"))
        serials = [row[3] for row in self.index()]
        self.assertEqual(len(serials), len(set(serials)))

    def test_interrupted_renew_loses_nothing(self):
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        for number in range(6):
            with self.start("renew") as process:
                time.sleep(0.03 * number)
                os.killpg(process.pid, signal.SIGINT)
            self.openssl("verify", "-x509_strict", "-CAfile", CA, "auth/clients/laptop7.crt")
        self.assertIn("auth/clients/laptop7.crt until", make(self.folder, "renew"))

    def test_records_that_a_full_disk_would_empty(self):
        """An openssl that says all is well, and has emptied its records, as the real one does on a full disk."""
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        before = self.index()
        openssl = self.path("openssl")
        with open(openssl, "w") as file:
            file.write('#!/bin/sh\nopenssl "$@"; status=$?\nif test "$1" = ca; then : > auth/test-ca/index.txt; fi\nexit $status\n')
        os.chmod(openssl, 0o755)
        for arguments in ["renew"], ["revoke", "NAME=laptop7"]:
            self.assertIn("is the disk full?", make(self.folder, *arguments, "OPENSSL=./openssl", status=2))
            self.assertEqual(self.index()[0][3:], before[0][3:])
            self.openssl("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", CA, "auth/clients/laptop7.crt")

    def test_what_does_not_verify_takes_nobodys_place(self):
        make(self.folder, "client-cert", "NAME=laptop7", FAST)
        certificate = self.path("auth/clients/laptop7.crt")
        with open(certificate) as file:
            good = file.read()
        with open(self.path("openssl"), "w") as file:
            file.write('#!/bin/sh\ntest "$1" != verify && openssl "$@"\n')
        os.chmod(self.path("openssl"), 0o755)
        self.assertIn("NOT renewed: auth/clients/laptop7.crt", make(self.folder, "renew", "OPENSSL=./openssl", status=2))
        with open(certificate) as file:
            self.assertEqual(file.read(), good)
        self.assertIn("auth/clients/laptop7.crt until", make(self.folder, "renew"))
        self.assertEqual([row[3] for row in self.index()], ["1111", "1112", "1113"])

    def test_openssl_that_is_too_old(self):
        openssl = self.path("openssl")
        with open(openssl, "w") as file:
            file.write("#!/bin/sh\necho OpenSSL 1.0.2\n")
        os.chmod(openssl, 0o755)
        self.assertIn("or later, is needed; this is OpenSSL 1.0.2", make(self.folder, "certs", "OPENSSL=./openssl", status=2))

    def test_make_that_is_too_old(self):
        self.assertRegex(make(self.folder, "certs", "MAKE_VERSION=3.80", status=2), r"\A.*GNU make 3.81 or later is needed; this is 3.80.*\n\Z")

    def test_variables(self):
        make(self.folder, "certs", FAST, "SERIAL=ABCD", "DAYS=3", "CA_DAYS=5", "ORGANIZATION=/O=Ours")
        text = self.openssl("x509", "-noout", "-text", "-in", CLIENT[0])
        self.assertRegex(text, "O ?= ?Ours, OU ?= ?Client, CN ?= ?example.com")
        self.assertIn("0xabcd", text)
        self.assertIn("prime256v1", text)
        for file, days in (CLIENT[0], 3), (CA, 5):
            self.openssl("x509", "-noout", "-checkend", str(days * 86400 - 3600), "-in", file)
            self.openssl("x509", "-noout", "-checkend", str(days * 86400 + 60), "-in", file, status=1)

    def test_failure_and_interrupt_leave_nothing_half_made(self):
        before = listing(self.folder)
        make(self.folder, "certs", FAST, "CA_SUBJECT=nonsense", status=2)
        self.assertEqual([name for name in listing(self.folder) if name.endswith(".cert")], [])
        make(self.folder, "clean")
        with self.start("certs", "NEWKEY=rsa:16384", stdout=subprocess.PIPE) as process:
            while not process.stdout.readline().startswith(b"openssl req"):
                pass
            while process.poll() is None:  # make blocks the signal for the instant in which it starts a command
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGINT)
                    process.wait(0.5)
        self.assertNotEqual(process.returncode, 0)
        for name in set(listing(self.folder)) - set(before):
            self.assertRegex(name, r"(index.txt|serial|crlnumber|\.key)$")  # no certificate goes with the key: it is made anew
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
