"""Bad starts: one clear line that names the culprit, the right exit status, no traceback and no hang."""

import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest

from support import CA, CLIENT, PATIENCE, ROOT, SERVER, Process, Project, Server, TestCase, client, client_command, run


class BadFiles(TestCase):
    """Every file, at each end."""

    def setUp(self):
        self.folder = Project.get()

    def write(self, name, content=b""):
        with open(os.path.join(self.folder, name), "wb") as file:
            file.write(content)
        return name

    def refused(self, files, *wanted):
        for script in "server_try", "client_try":
            with self.subTest(script, files=files):
                status, output, errors = run(sys.executable, os.path.join(ROOT, script), "--port", "1", *files)
                self.assertEqual((status, output), (1, ""), errors)
                self.assertOneLine(errors, script + ": ", *wanted)

    def test_no_good_at_all(self):
        cut = open(os.path.join(self.folder, CA), "rb")
        with cut:
            half = cut.read()[:-300]
        link = os.path.join(self.folder, "loop")
        if not os.path.islink(link):
            os.symlink("loop", link)
        for name, reason in [("missing", "No such file"), ("auth", "Is a directory"), ("loop", "Too many levels"),
                             (self.write("empty"), ""), (self.write("junk", os.urandom(999)), ""),
                             (self.write("text", b"what is this?\n"), ""), (self.write("half", half), "")]:
            self.refused((name, *SERVER), f": {name}: ", reason)
            self.refused((CA, name, SERVER[1]), f": {name} and {SERVER[1]}: ", reason or "not PEM, cut short")
            self.refused((CA, SERVER[0], name), f": {SERVER[0]} and {name}: ", reason or "or a wrong passphrase")

    @unittest.skipIf(os.geteuid() == 0, "root may read anything")
    def test_unreadable(self):
        os.chmod(os.path.join(self.folder, self.write("secret")), 0)
        self.refused(("secret", *SERVER), ": secret: Permission denied")
        self.refused((CA, "secret", SERVER[1]), ": secret and auth/server.key: Permission denied")

    def test_wrong_way_round(self):
        self.refused((CA, SERVER[1], SERVER[0]), f": {SERVER[1]} and {SERVER[0]}: not PEM")
        self.refused((SERVER[0], CA, SERVER[1]), SERVER[0] + ": not a CA certificate, or not only that")
        self.refused((SERVER[1], SERVER[0], CA), SERVER[1] + ": ")

    def test_key_of_another_certificate(self):
        self.refused((CA, SERVER[0], CLIENT[1]), f": {SERVER[0]} and {CLIENT[1]}: key values mismatch")

    def encrypted(self):
        key = "encrypted.key"
        run("openssl", "pkey", "-in", SERVER[1], "-aes128", "-passout", "pass:secret", "-out", key)
        return (CA, SERVER[0], key)

    def test_encrypted_key_and_no_terminal(self):
        files = self.encrypted()
        for stdin in subprocess.DEVNULL, subprocess.PIPE:
            for script in "server_try", "client_try":
                with subprocess.Popen([sys.executable, os.path.join(ROOT, script), "--port", "1", *files], cwd=self.folder,
                                      stdin=stdin, stderr=subprocess.PIPE, start_new_session=True) as process:
                    said = process.stderr.read().decode()
                self.assertEqual(process.returncode, 1)
                self.assertOneLine(said, f"{script}: auth/server.crt and encrypted.key: encrypted, and there is no terminal")

    def at_a_terminal(self, answer):
        """Start the server with an encrypted key at a terminal of its own, and type an answer; return both."""
        terminal, other_end = pty.openpty()
        server = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys, termios; os.setsid();"
                                   "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])",
                                   sys.executable, os.path.join(ROOT, "server_try"), "--port", "0", *self.encrypted()],
                                  cwd=self.folder, stdin=other_end, stderr=subprocess.PIPE)
        os.close(other_end)
        self.addCleanup(os.close, terminal)
        self.addCleanup(server.stderr.close)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        shown = b""
        while b"Passphrase of encrypted.key: " not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, answer)
        return server

    def test_passphrase_is_asked_once_and_remembered(self):
        server = self.at_a_terminal(b"secret\n")
        self.assertRegex(server.stderr.readline(), b"^listening on ")
        self.assertRegex(server.stderr.readline(), b"^trusting ")
        server.send_signal(signal.SIGHUP)
        self.assertEqual(server.stderr.readline(), b"reloaded\n")
        server.terminate()
        self.assertEqual(server.wait(PATIENCE), 0)

    def test_passphrase_that_is_wrong_or_not_given(self):
        for answer, says in (b"wrong\n", b"or a wrong passphrase\n"), (b"\x04", b"no passphrase\n"):
            server = self.at_a_terminal(answer)
            self.assertRegex(server.stderr.read(), b"^server_try: auth/server.crt and encrypted.key: .*" + says)
            self.assertEqual(server.wait(PATIENCE), 1)
        server = self.at_a_terminal(b"\x03")
        self.assertEqual((server.stderr.read(), server.wait(PATIENCE)), (b"", -signal.SIGINT))

    def test_file_through_a_pipe(self):
        if not os.path.isdir("/dev/fd"):
            self.skipTest("no /dev/fd here")
        command = 'cat "$1" | "$0" "$2" --port 1 /dev/fd/0 auth/client.crt auth/client.key'
        for ca, says in (CA, "Connection refused"), (CLIENT[1], "client_try: /dev/fd/0: "):
            status, _, errors = run("sh", "-c", command, sys.executable, ca, os.path.join(ROOT, "client_try"))
            self.assertEqual(status, 1)
            self.assertOneLine(errors, says)

    def test_key_log_that_cannot_be_written(self):
        status, _, errors = client(1, env={**os.environ, "SSLKEYLOGFILE": "no/such/folder"})
        self.assertEqual(status, 1)
        self.assertOneLine(errors, "client_try: no/such/folder: No such file or directory")


class BadAddresses(TestCase):
    def server(self, *arguments):
        status, output, errors = run(sys.executable, os.path.join(ROOT, "server_try"), *arguments, CA, *SERVER)
        self.assertEqual((status, output), (1, ""), errors)
        return errors

    def test_port_taken(self):
        with Server() as server:
            self.assertOneLine(self.server("--port", str(server.port)),
                               "server_try: Address already in use (while attempting to bind on address "
                               f"('127.0.0.1', {server.port}))")

    def test_hosts_that_are_none(self):
        for host in "no.such.host.invalid", "a" * 70 + ".example", "192.0.2.1", "::zz":
            with self.subTest(host):
                self.assertOneLine(self.server("--host", host, "--port", "0"), f"(while attempting to bind on address ('{host}', 0")
        for host in "no.such.host.invalid", "a" * 70 + ".example", "::zz":
            with self.subTest(host):
                status, output, errors = client(6420, "--host", host)
                self.assertEqual((status, output), (1, ""))
                self.assertOneLine(errors, "client_try: ", host)

    def test_server_names_that_are_none(self):
        with Server() as server:
            for name in "", ".example.com", "a" * 70 + ".com":
                with self.subTest(name):
                    status, output, errors = client(server.port, "--server-name", name)
                    self.assertIn(status, (1, 2))
                    self.assertEqual(output, "")
                    self.assertOneLine(errors[errors.index("client_try: "):], "no empty value" if not name else "")

    def test_nobody_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        status, output, errors = client(port)
        self.assertEqual((status, output), (1, ""))
        self.assertOneLine(errors, f"client_try: 127.0.0.1:{port}: Connection refused")

    def test_somebody_listens_who_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            begun = time.monotonic()
            status, output, errors = client(listener.getsockname()[1], "--timeout", "1")
            self.assertEqual((status, output), (1, ""))
            self.assertOneLine(errors, "no answer within 1 s")
            self.assertGreater(time.monotonic() - begun, 1)
            self.assertLess(time.monotonic() - begun, PATIENCE / 2)

    def test_somebody_else_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Process(*client_command(listener.getsockname()[1])) as process:
                other, _ = listener.accept()
                with other:
                    other.sendall(b"220 mail.example.com ESMTP\r\n")
                    self.assertEqual(process.end(), 1)
                    self.assertIn("wrong version number", process.log())


class Usage(TestCase):
    def test_is_told_with_status_2(self):
        for arguments in [[], ["a", "b"], ["a", "b", "c", "d"], ["--port", "65536", "a"], ["--port", "-1", "a"],
                          ["--port", "x", "a"], ["--timeout", "0", "a"], ["--timeout", "nan", "a"], ["--timeout", "inf", "a"],
                          ["--timeout", "-1", "a"], ["--what", "a"], ["--host", "", "a"]]:
            for script in "server_try", "client_try":
                self.check(script, arguments)
        for number in "", "x", "1_0", " 1", "٤", "1.0", "9" * 4096, "-", "\x1b[31m":
            self.check("client_try", ["-n", number, "a"])
        self.check("client_try", ["--port", "0", "a"])

    def test_a_value_of_two_dashes(self):
        """argparse takes it for none until 3.13."""
        for script in "server_try", "client_try":
            for option in "host", "port", "crl", "timeout":
                status, _, errors = run(sys.executable, os.path.join(ROOT, script), f"--{option}=--", "a")
                self.assertIn(status, (1, 2))
                self.assertNotIn("Traceback", errors)
        self.check("client_try", ["--number=--", "a"])

    def test_a_python_that_cannot_do_it(self):
        """Those that are here, and this one as if its ssl module were without TLS 1.3."""
        old = [name for name in ("python3.6", "python3.7") if shutil.which(name) and run(name, "-c", "")[0] == 0]
        for script in "server_try", "client_try":
            commands = [[name, os.path.join(ROOT, script)] for name in old]
            commands.append([sys.executable, "-c", "import runpy, ssl; ssl.HAS_TLSv1_3 = False; ssl.OPENSSL_VERSION = 'LibreSSL 2.8.3';"
                             f"runpy.run_path({os.path.join(ROOT, script)!r}, run_name='__main__')"])
            for command in commands:
                status, _, errors = run(*command)
                self.assertEqual(status, 1)
                self.assertOneLine(errors, "needs Python 3.8, TLS 1.3; this is 3.", "SSL ")

    def check(self, script, arguments):
        with self.subTest(script, arguments=arguments):
            status, output, errors = run(sys.executable, os.path.join(ROOT, script), *arguments)
            self.assertEqual((status, output), (2, ""), errors)
            self.assertRegex(errors, rf"\Ausage: {script} [^\x1b]*\n{script}: error: [^\x1b]+\n\Z")

    def test_help(self):
        for script in "server_try", "client_try":
            status, output, errors = run(os.path.join(ROOT, script), "--help")
            self.assertEqual((status, errors), (0, ""))
            self.assertIn("CA [CERT KEY]", output)

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

    def test_standard_error_closed(self):
        with Server() as server:
            command = '"$0" "$@" 2>&-'
            self.assertEqual(run("sh", "-c", command, *client_command(server.port))[:2], (0, "42\n"))

    def test_nobody_reads_the_log_any_more(self):
        reader, writer = os.pipe()
        with subprocess.Popen([sys.executable, os.path.join(ROOT, "server_try"), "--port", "0", CA, *SERVER],
                              cwd=Project.get(), stderr=writer) as second:
            try:
                os.close(writer)
                with open(reader, "rb") as log:
                    port = int(log.readline().decode().rpartition(":")[2])
                for _ in range(3):
                    self.assertEqual(client(port)[1], "42\n")
            finally:
                second.terminate()
        self.assertEqual(second.returncode, 0)
