"""Bad starts: one clear line that names the culprit, the right exit status, no traceback and no hang."""

import contextlib
import os
import pty
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import unittest

from support import (CA, CLIENT, CONNECTED, LISTENING, PATIENCE, PEER, ROOT, SERVER, TRUSTING, VERIFY,
                     Process, Project, Server, TestCase, at_terminal_command, client, client_command,
                     path_with, python, python_after, run, served, wait_until)


NO_CA = "; wanted: CA certificates in PEM form"
NO_PAIR = "; wanted: PEM certificate, PEM key, passphrase if any"
UNREADABLE = "[a-z0-9 ]+"  # in the words of some version of OpenSSL
ENCRYPTED = "auth/server.crt and encrypted.key: ([a-z ]+|Invalid argument)" + NO_PAIR


class BadFiles(TestCase):
    """Every file, at one end or both: both load them with the same lines."""

    def setUp(self):
        self.folder = Project.get()

    def write(self, name, content=b""):
        with open(os.path.join(self.folder, name), "wb") as file:
            file.write(content)
        return name

    def refused(self, files, says, scripts=("server_try", "client_try")):
        for script in scripts:
            with self.subTest(script, files=files):
                status, output, errors = run(*python(script, "--port", "1", *files))
                self.assertEqual((status, output), (1, ""), errors)
                self.assertLine(errors, f"{script}: {says}\n")

    def test_no_good_at_all(self):
        cut = open(os.path.join(self.folder, CA), "rb")
        with cut:
            half = cut.read()[:-300]
        link = os.path.join(self.folder, "loop")
        if not os.path.islink(link):
            os.symlink("loop", link)
        for name, reason in [("missing", "No such file or directory"), ("auth", "Is a directory"),
                             ("loop", "Too many levels of symbolic links|Symbolic link loop"),
                             (self.write("empty"), UNREADABLE), (self.write("junk", os.urandom(999)), UNREADABLE),
                             (self.write("half", half), UNREADABLE)]:
            self.refused((name, *SERVER), f"{name}: ({reason}){NO_CA}", ["server_try"])
            self.refused((CA, name, SERVER[1]), f"{name} and {SERVER[1]}: ({reason}){NO_PAIR}", ["client_try"])
            self.refused((CA, SERVER[0], name), f"{SERVER[0]} and {name}: ({reason}){NO_PAIR}", ["server_try"])

    @unittest.skipIf(os.geteuid() == 0, "root may read anything")
    def test_unreadable(self):
        os.chmod(os.path.join(self.folder, self.write("secret")), 0)
        self.refused(("secret", *SERVER), "secret: Permission denied" + NO_CA)
        self.refused((CA, "secret", SERVER[1]), "secret and auth/server.key: Permission denied" + NO_PAIR)

    def test_wrong_way_round(self):
        self.refused((CA, SERVER[1], SERVER[0]), f"{SERVER[1]} and {SERVER[0]}: {UNREADABLE}{NO_PAIR}", ["client_try"])
        self.refused((SERVER[0], CA, SERVER[1]), f"{SERVER[0]}: not a CA certificate, or not only that{NO_CA}")
        self.refused((SERVER[1], SERVER[0], CA), f"{SERVER[1]}: {UNREADABLE}{NO_CA}", ["server_try"])

    def test_key_of_another_certificate(self):
        self.refused((CA, SERVER[0], CLIENT[1]), f"{SERVER[0]} and {CLIENT[1]}: key values mismatch{NO_PAIR}")

    def test_der_where_pem_is_wanted(self):
        self.assertEqual(run("openssl", "x509", "-in", CA, "-outform", "DER", "-out", "der")[0], 0)
        self.refused(("der", *SERVER), f"der: {UNREADABLE}{NO_CA}")

    def test_a_crl_is_no_ca(self):
        with open(os.path.join(self.folder, "auth/test-ca/crlnumber"), "w") as file:
            file.write("01\n")
        status, _, errors = run("openssl", "ca", "-config", "auth/test-ca.conf", "-cert", CA, "-keyfile", CA[:-4] + "key",
                                "-gencrl", "-out", "a.crl")
        self.assertEqual(status, 0, errors)
        self.refused(("a.crl", *SERVER), "a.crl: not a CA certificate, or not only that" + NO_CA)
        self.refused(("--crl", CA, CA, *SERVER), rf"{CA}: not a CRL, or not only that; wanted: a list of revoked certificates \(CRL\) in PEM form")

    def test_a_ca_certificate_that_python_cannot_decode(self):
        self.write("long.cnf", b"oid_section = oids\n[oids]\nlong = 1.2." + b".".join([b"4294967295"] * 400) +
                   b"\n[req]\ndistinguished_name = none\n[none]\n[ca]\nbasicConstraints = CA:TRUE\n")
        status, _, errors = run("openssl", "req", "-x509", "-new", "-config", "long.cnf", "-extensions", "ca", "-key", SERVER[1],
                                "-subj", "/long=x/CN=example.com", "-out", "long.crt")
        self.assertEqual(status, 0, errors)
        self.refused(("long.crt", *SERVER), "long.crt: unreadable" + NO_CA)

    def test_an_openssl_configuration_that_leaves_nothing(self):
        """Properties that no provider has, as where FIPS is asked for and is not installed."""
        self.write("fips.cnf", b"openssl_conf = init\n[init]\nalg_section = algs\n[algs]\ndefault_properties = fips=yes\n")
        if ssl.OPENSSL_VERSION_INFO < (3,):
            self.skipTest("this OpenSSL has no properties")
        for script in "server_try", "client_try":
            status, _, errors = run(*python(script), "--port", "1", CA, *SERVER,
                                    env={**os.environ, "OPENSSL_CONF": "fips.cnf"})
            self.assertEqual(status, 1)
            self.assertLine(errors, f"{script}: fips.cnf: {UNREADABLE}; wanted: a set-up of OpenSSL with TLS 1.3\n")

    def test_an_openssl_configuration_that_knows_no_tls_1_3(self):
        self.write("old.cnf", b"openssl_conf = i\n[i]\nssl_conf = s\n[s]\nsystem_default = d\n[d]\nMaxProtocol = TLSv1.2\n")
        environment = {**os.environ, "OPENSSL_CONF": os.path.join(self.folder, "old.cnf")}
        with Server(env=environment) as server:
            self.assertEqual(client(server.port, env=environment)[:2], (0, "42\n"))

    def encrypted(self):
        key = "encrypted.key"
        run("openssl", "pkey", "-in", SERVER[1], "-aes128", "-passout", "pass:secret", "-out", key)
        return (CA, SERVER[0], key)

    def test_encrypted_key_and_no_terminal(self):
        files = self.encrypted()
        for script in "server_try", "client_try":
            status, _, errors = run(*python(script, "--port", "1", *files), start_new_session=True)
            self.assertEqual(status, 1)
            self.assertLine(errors.splitlines()[-1], f"{script}: {ENCRYPTED}")
            self.assertNotIn("Traceback", errors)

    def at_a_terminal(self, answer):
        """Start the server with an encrypted key at a terminal of its own, and type an answer; return it and the terminal."""
        terminal, other_end = pty.openpty()
        server = subprocess.Popen(at_terminal_command("--port", "0", *self.encrypted()), cwd=self.folder, stdin=other_end,
                                  stderr=subprocess.PIPE)
        os.close(other_end)
        for end in server.kill, server.wait, server.stderr.close, lambda: os.close(terminal):
            self.addCleanup(end)
        self._cleanups.reverse()
        self.answer(terminal, answer)
        return server, terminal

    def answer(self, terminal, text):
        """Wait until OpenSSL asks for the passphrase, and type it."""
        shown = b""
        while b"Enter PEM pass phrase:" not in shown:
            self.assertTrue(select.select([terminal], [], [], PATIENCE)[0], shown)
            shown += os.read(terminal, 1000)
        os.write(terminal, text)

    def test_passphrase_is_asked_for_at_the_terminal_at_the_start_and_at_a_reload(self):
        server, terminal = self.at_a_terminal(b"secret\n")
        self.assertLine(server.stderr.readline().decode(), LISTENING + "\n")
        self.assertLine(server.stderr.readline().decode(), TRUSTING + "\n")
        server.send_signal(signal.SIGHUP)
        self.answer(terminal, b"secret\n")
        self.assertEqual(server.stderr.readline(), b"reloaded\n")
        server.terminate()
        self.assertEqual(server.wait(PATIENCE), 0)

    def test_passphrase_that_is_wrong_or_not_given(self):
        for answer in b"wrong\n", b"\x04", b"\x03":
            server, terminal = self.at_a_terminal(answer)

            def has_ended():
                os.write(terminal, answer)  # OpenSSL 3 asks twice
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(0.2)
                return server.poll() is not None
            wait_until(has_ended)
            self.assertIn(server.wait(0), (0, 1) if answer == b"\x03" else (1,))
            if server.returncode:
                self.assertLine(server.stderr.read().decode().splitlines()[-1], f"server_try: {ENCRYPTED}")

    def test_file_through_a_pipe(self):
        if not os.path.isdir("/dev/fd"):
            self.skipTest("no /dev/fd here")
        command = 'cat "$1" | "$0" "$2" --port 1 /dev/fd/0 auth/client.crt auth/client.key'
        for ca, says in (CA, "127.0.0.1:1: Connection refused"), (CLIENT[1], f"/dev/fd/0: {UNREADABLE}{NO_CA}"):
            status, _, errors = run("sh", "-c", command, sys.executable, ca, os.path.join(ROOT, "client_try"))
            self.assertEqual(status, 1)
            self.assertLine(errors, f"client_try: {says}\n")

    def test_key_log_that_cannot_be_written(self):
        status, _, errors = client(1, env={**os.environ, "SSLKEYLOGFILE": "no/such/folder"})
        self.assertEqual(status, 1)
        self.assertEqual(errors, "client_try: no/such/folder: No such file or directory; wanted: a file to write to\n")


class Check(TestCase):
    def test_it_loads_the_files_says_whom_it_trusts_and_ends(self):
        with Server() as server:  # the port is taken, as before a reload
            command = python("server_try", "--check", "--port", str(server.port))
            status, output, errors = run(*command, CA, *SERVER)
            self.assertEqual((status, output), (0, ""), errors)
            self.assertEqual(errors, f"the files are good\n{server.wait_for(TRUSTING).string}\n")
            status, output, errors = run(*command, CA, SERVER[0], CLIENT[1])
            self.assertEqual((status, output), (1, ""))
            self.assertEqual(errors, f"server_try: auth/server.crt and auth/client.key: key values mismatch{NO_PAIR}\n")


class BadAddresses(TestCase):
    def server(self, *arguments):
        status, output, errors = run(*python("server_try", *arguments, CA, *SERVER))
        self.assertEqual((status, output), (1, ""), errors)
        return errors

    def test_port_taken(self):
        with Server() as server:
            self.assertEqual(self.server("--port", str(server.port)),
                             "server_try: cannot listen at 127.0.0.1: Address already in use (while attempting to bind on address "
                             f"('127.0.0.1', {server.port})); wanted: a free port at an address of this machine\n")

    def test_hosts_that_are_none(self):
        for host in "no.such.host.invalid", "a" * 70 + ".example", "192.0.2.1", "::zz":
            with self.subTest(host):
                self.assertLine(self.server("--host", host, "--port", "0"),
                                f"server_try: cannot listen at {host}: .+; wanted: a free port at an address of this machine\n")
        for host in "no.such.host.invalid", "a" * 70 + ".example", "::zz":
            with self.subTest(host):
                status, output, errors = client(6420, "--host", host)
                self.assertEqual((status, output), (1, ""))
                self.assertLine(errors, rf"client_try: \[?{host}]?:6420: .+\n")

    def test_server_names_that_are_none(self):
        with Server() as server:
            for name in ".example.com", "a" * 70 + ".com":
                with self.subTest(name):
                    self.assertRefused(client(server.port, "--server-name", name), ".+")

    def test_nobody_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        status, output, errors = client(port)
        self.assertEqual((status, output), (1, ""))
        self.assertEqual(errors, f"client_try: 127.0.0.1:{port}: Connection refused\n")

    def test_somebody_listens_who_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            begun = time.monotonic()
            status, output, errors = client(listener.getsockname()[1], "--timeout", "1")
            self.assertEqual((status, output), (1, ""))
            self.assertLine(errors, f"client_try: {PEER}no answer within 1 s\n")
            self.assertGreater(time.monotonic() - begun, 1)
            self.assertLess(time.monotonic() - begun, PATIENCE / 2)

    def test_somebody_else_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Process(*client_command(listener.getsockname()[1])) as process:
                other, _ = listener.accept()
                with other:
                    other.sendall(b"220 mail.example.com ESMTP\r\n")
                    self.assertEqual(process.end(), 1)
                    self.assertLine(process.log(), f"client_try: {PEER}turned away: (wrong version number)\n")


class Names(TestCase):
    """What is looked up is not quite what is verified."""

    def test_final_dot(self):
        with Server("--host", "localhost") as server:
            self.assertEqual(client(server.port, "--host", "127.0.0.1", "--server-name", "localhost.")[:2], (0, "42\n"))
            status, output, errors = client(server.port, "--host", "localhost.")
            if "localhost.:" in errors and status and "turned" not in errors:
                self.skipTest("localhost. is no name here: " + errors)
            self.assertEqual((status, output), (0, "42\n"), errors)

    def test_link_local_address_with_its_zone(self):
        """In a network namespace of its own, with an interface that has such an address."""
        steps = """ip link set lo up && ip link add zone type veth peer name other && ip link set zone up && ip link set other up || exit 77
            while ip -6 address show dev zone | grep -q tentative; do sleep 0.1; done
            address=$(ip -6 address show dev zone | sed -n 's/.*inet6 \\(fe80[^/]*\\).*/\\1/p')%zone
            ip address show dev zone | grep -q fe80 || exit 77
            "$0" "$1" --port 6420 --host $address "$3" "$4" "$5" 2> zone.log & server=$!
            until grep -q trusting zone.log || ! kill -0 $server; do sleep 0.1; done
            "$0" "$2" --host $address --server-name example.com "$3" "$4" "$5"; "$0" "$2" --host $address "$3" "$4" "$5"
            kill $server; cat zone.log >&2"""
        scripts = [os.path.join(ROOT, script) for script in ("server_try", "client_try")]
        if not shutil.which("unshare") or not shutil.which("ip"):
            self.skipTest("needs unshare and ip")
        # One certificate cannot be a server's and a client's: the refusals say which name was looked at.
        status, output, errors = run("unshare", "--net", "sh", "-c", steps, sys.executable, *scripts, CA, *SERVER)
        if status in (1, 77):
            self.skipTest("no network namespace can be made here: " + errors)
        self.assertRegex(errors, r"(?m)^listening on \[fe80::[\da-f:]+\]:6420$")
        self.assertRegex(errors, f"(?m)^{CONNECTED}$" % r"\[fe80::[\da-f:]+%zone]:6420")
        self.assertRegex(errors, rf"(?m)^client_try: \[fe80::[\da-f:]+%zone]:6420: {VERIFY}IP address mismatch, "
                         r"certificate is not valid for 'fe80::[\da-f:]+'\.$")


class Usage(TestCase):
    def test_is_told_with_status_2(self):
        for arguments in [], ["a", "b"], ["a", "b", "c", "d"]:
            for script in "server_try", "client_try":
                said = self.check(script, arguments)
                self.assertEqual("error: CERT needs its KEY: one file or three\n" in said, len(arguments) == 2)
        self.check("server_try", ["--port", "x", "a"])
        self.check("client_try", ["--what", "a"])
        for option in "--host", "--crl", "--server-name":
            for script in ("client_try",) if option == "--server-name" else ("server_try", "client_try"):
                self.assertIn("that is not empty\n", self.check(script, [option, "", "a"]))
        for option, value, *scripts in [("--port", "65536", "server_try", "client_try"), ("--port", "-1", "server_try"),
                                        ("--timeout", "nan", "server_try", "client_try"), ("--timeout", "-1", "server_try"),
                                        ("--timeout", "0", "client_try"), ("--timeout", "inf", "server_try", "client_try"),
                                        ("--max-clients", "0", "server_try"), ("--max-clients", "-5", "server_try")]:
            for script in scripts:
                self.assertIn(f"error: {option} is ", self.check(script, [option, value, "a"]))
        for number in "", "x", "1_0", " 1", "٤", "1.0", "9" * 4096, "-", "\x1b[31m":
            self.check("client_try", ["-n", number, "a"])
        self.check("client_try", ["--port", "0", "a"])

    def test_a_value_of_two_dashes(self):
        """argparse takes it for none until 3.13."""
        for script, *options in ("server_try", "host", "crl", "port"), ("client_try", "host", "crl", "server-name", "timeout"):
            for option in options:
                status, _, errors = run(*python(script, f"--{option}=--", CA))
                self.assertIn(status, (1, 2))
                self.assertNotIn("Traceback", errors)
        self.check("client_try", ["--number=--", "a"])

    def test_a_python_that_cannot_do_it(self):
        """This one as if it were old, or its ssl module were without TLS 1.3."""
        for script in "server_try", "client_try":
            for lack in "sys.version_info = (3, 7, 17)", "ssl.HAS_TLSv1_3 = False; ssl.OPENSSL_VERSION = 'LibreSSL 2.8.3'":
                status, _, errors = run(*python_after(f"import ssl; {lack}", script))
                self.assertEqual(status, 1)
                self.assertLine(errors, r"needs Python 3\.8 with TLS 1\.3; this is 3\..+SSL .+\n")

    def check(self, script, arguments):
        with self.subTest(script, arguments=arguments):
            status, output, errors = run(*python(script, *arguments))
            self.assertEqual((status, output), (2, ""), errors)
            self.assertRegex(errors, rf"\Ausage: {script} [^\x1b]*\n{script}: error: [^\x1b]+\n\Z")
        return errors

    def test_help(self):
        for script, defaults in ("server_try", ("127.0.0.1", "6420", "1000", "10")), ("client_try", ("127.0.0.1", "6420", "10", "41")):
            status, output, errors = run(os.path.join(ROOT, script), "--help", env={**os.environ, "PATH": path_with()})
            self.assertEqual((status, errors), (0, ""))
            self.assertIn("CA [CERT KEY]", output)
            for default in defaults:
                self.assertIn(f"({default})", output)

    def test_files_may_stand_anywhere(self):
        with Server("--timeout", "9", files=(CA, "--host", "127.0.0.1", *SERVER)) as server:
            self.assertEqual(client(server.port, "-n", "1", files=(CA, *CLIENT, "-n", "2"))[:2], (0, "2\n3\n"))


class Outputs(TestCase):
    """Where what it has to say cannot be written."""

    def test_full_disk(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        with Server() as server, open("/dev/full", "wb") as full:
            done = subprocess.run(client_command(server.port), cwd=Project.get(), stdout=full, stderr=subprocess.PIPE,
                                  timeout=PATIENCE)
            self.assertEqual(done.returncode, 1)
            self.assertEqual(done.stderr.decode().splitlines()[-1],
                             "client_try: cannot write to standard output: No space left on device")
            self.assertNotIn(b"Traceback", done.stderr)

    def test_whoever_reads_the_replies_late_gets_them_all(self):
        """The time for the run is up by then; what is read exceeds the buffer of a pipe."""
        with Server() as server, Process(*client_command(server.port, "--timeout", "1", *["-n", "1" * 4000] * 40)) as process:
            server.wait_for(PEER + "answered 40, done")
            time.sleep(1.5)
            self.assertEqual(process.process.stdout.read(), b"".join([b"1" * 3999 + b"2\n"] * 40))
            self.assertEqual(process.end(), 0)

    def test_standard_output_closed(self):
        with Server() as server:
            command = '"$0" "$@" >&-'
            self.assertEqual(run("sh", "-c", command, *client_command(server.port)),
                             (1, "", "client_try: standard output is closed\n"))

    def test_python_has_nothing_to_warn_of(self):
        strict = [sys.executable, "-X", "dev", "-W", "error"]
        with Process(*strict, os.path.join(ROOT, "server_try"), "--port", "0", CA, *SERVER) as server:
            port = server.wait_for(LISTENING)[1]
            for files, lines in ((CA, *CLIENT), 2), ((CA,), 3), (("auth/alt-ca/alt-ca.cert", *CLIENT), 1):
                command = client_command(port, files=files)[1:]
                status, _, errors = run(*strict, *command)
                self.assertEqual(len(errors.splitlines()), lines, errors)
            self.assertEqual(len(run(*strict, *client_command(1)[1:])[2].splitlines()), 1)
            server.process.terminate()
            self.assertEqual(server.end(), 0)
            self.assertNotRegex(server.log(), "Warning|Traceback")

    def test_standard_error_closed(self):
        with Server() as server:
            command = '"$0" "$@" 2>&-'
            self.assertEqual(run("sh", "-c", command, *client_command(server.port))[:2], (0, "42\n"))

    def test_nobody_reads_the_log_any_more(self):
        reader, writer = os.pipe()
        with subprocess.Popen(python("server_try", "--port", "0", CA, *SERVER),
                              cwd=Project.get(), stderr=writer) as second:
            try:
                os.close(writer)
                with open(reader, "rb") as log:
                    port = int(log.readline().decode().rpartition(":")[2])
                for _ in range(3):
                    self.assertEqual(served(port), b"42\n")
            finally:
                second.terminate()
        self.assertEqual(second.returncode, 0)
